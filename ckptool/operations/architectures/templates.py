"""What is left of names when the numbers of blocks and all sizes go: what one family has in common."""

from __future__ import annotations

from collections.abc import Iterable

from ckptool.model.inspection import TensorRow
from ckptool.operations.module_tree import Branch, grow, is_number

ANY_NUMBER = "#"


def template_of(rows: Iterable[TensorRow]) -> Branch:
    """Make one tree of the names of all blocks, in which every shape is None."""
    names = dict.fromkeys([_without_numbers(row.key or row.source_key) for row in rows])
    return grow([TensorRow(name, name, "", None, 0) for name in names])


def _without_numbers(name: str) -> str:
    if not any(map(str.isdigit, name)):
        return name
    return ".".join([ANY_NUMBER if is_number(segment) else segment for segment in name.split(".")])
