"""Which state dict of a checkpoint is meant, and what its clean keys are. Knows no container format."""

from __future__ import annotations

from ckptool.layouts.keys import plan_keys
from ckptool.layouts.rename import rename_key, rename_module_path

__all__ = ["plan_keys", "rename_key", "rename_module_path"]
