"""Judge a checkpoint without a model: what one pass over its bytes, its names and its pickle tell."""

from ckptool.operations.health.check import check_file
from ckptool.operations.health.container import check_safety

__all__ = ["check_file", "check_safety"]
