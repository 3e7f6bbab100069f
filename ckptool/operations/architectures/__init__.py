"""Which published architecture a network is, and how it is built, told by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ckptool.model.inspection import Architecture, TensorRow
from ckptool.operations.architectures.recognition import identify
from ckptool.operations.architectures.stacks import stacks
from ckptool.operations.architectures.structure import structure_of
from ckptool.operations.module_tree import grow

MOST_TENSORS = 8_000  # twice as many as the largest network of the index has


def recognise(sketch: Architecture, rows: Sequence[TensorRow]) -> Architecture:
    """Add to what is known of a network how it is built, and which published one it is or is close to.

    ``rows`` are its tensors under clean names.
    """
    if len(rows) > MOST_TENSORS:
        return sketch
    root = grow(rows)
    structure = structure_of(rows, list(stacks(root)), sketch)
    return replace(sketch, structure=structure, match=identify(root, rows))
