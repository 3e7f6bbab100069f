"""The torch side of the Python API: tensors out of a file, a model filled from it."""

from __future__ import annotations

from ckptool.loading.load import load_into, load_state_dict
from ckptool.loading.materialise import check_bytes, materialise

__all__ = ["check_bytes", "load_into", "load_state_dict", "materialise"]
