"""Which state dict of a checkpoint is meant, and what its clean keys are. Knows no container format."""

from __future__ import annotations

from ckptool.layouts.candidates import node_at, steps_below
from ckptool.layouts.distributed import is_shard, local_parts, share_of, whole_tensor
from ckptool.layouts.keys import plan_keys
from ckptool.layouts.packed import packed_scales
from ckptool.layouts.producers import identify
from ckptool.layouts.rename import rename_key, rename_module_path
from ckptool.layouts.select import select
from ckptool.layouts.training import read_training

__all__ = [
    "identify",
    "is_shard",
    "local_parts",
    "node_at",
    "packed_scales",
    "plan_keys",
    "read_training",
    "rename_key",
    "rename_module_path",
    "select",
    "share_of",
    "steps_below",
    "whole_tensor",
]
