"""Find the stacks of alike blocks in a tree of modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from ckptool.operations.architectures.index import Shape
from ckptool.operations.module_tree import Branch

_NUMBERED = re.compile(r"(.*?)(\d{1,9})")
_NO_STACKS = frozenset({"experts"})  # they stand side by side in one block
_FEWEST_WEIGHTS = 2  # of a block; a module with one is a layer
_ALIKE = 0.6  # of the names in the smaller of two blocks
_LOOKED_AT = 6  # neighbours in one stack; the others are like them


class Stack(NamedTuple):
    """Name a stack of blocks, how many there are, and names and shapes in the first and the last of them."""

    name: str
    blocks: int
    first: Mapping[str, Shape]
    shapes: Mapping[str, Shape]


def stacks(branch: Branch, name: str = "") -> Iterator[Stack]:
    """List the innermost stacks of a tree, in the order of its modules."""
    for stem, modules in _groups(branch).items():
        path = f"{name}.{stem}" if name and stem else name or stem
        inner = _inner(modules, name)
        blocks = [] if inner or path.rpartition(".")[2] in _NO_STACKS else [*filter(_is_block, modules.values())]
        is_stack = len(blocks) > bool(stem) and 2 * len(blocks) > len(modules) and _are_alike(blocks[:_LOOKED_AT])
        if is_stack:
            yield Stack(path, len(blocks), dict(_shapes(blocks[0])), dict(_shapes(blocks[-1])))
        else:
            yield from inner


def _groups(branch: Branch) -> dict[str, dict[str, Branch]]:
    """Put the modules below a module together whose names differ in a number at the end."""
    groups: dict[str, dict[str, Branch]] = {}
    for segment, child in branch.below.items():
        if child.below:
            match = _NUMBERED.fullmatch(segment)
            groups.setdefault(match[1] if match else segment, {})[segment] = child
    return groups


def _inner(modules: Mapping[str, Branch], name: str) -> list[Stack]:
    """List the stacks inside of some modules; none where the first two have none."""
    found: list[Stack] = []
    for place, (segment, child) in enumerate(modules.items()):
        if place == 2 and not found:
            break
        found += stacks(child, f"{name}.{segment}" if name else segment)
    return found


def _is_block(branch: Branch) -> bool:
    weights = (name for name, shape in _shapes(branch) if shape is not None and len(shape) > 1)
    return len([name for name, _ in zip(weights, range(_FEWEST_WEIGHTS), strict=False)]) == _FEWEST_WEIGHTS


def _are_alike(blocks: Sequence[Branch]) -> bool:
    """Tell whether most neighbours have most names in common."""
    names = [{name for name, _ in _shapes(block)} for block in blocks]
    pairs = list(pairwise(names))
    alike = [len(one & other) >= _ALIKE * min(len(one), len(other)) for one, other in pairs]
    return 2 * sum(alike) >= len(alike)


def _shapes(branch: Branch, prefix: str = "") -> Iterator[tuple[str, Shape]]:
    for name, child in branch.below.items():
        if child.leaf is not None:
            yield prefix + name, child.leaf.shape
        yield from _shapes(child, f"{prefix}{name}.")
