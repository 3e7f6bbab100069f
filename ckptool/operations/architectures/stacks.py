"""Find the stacks of alike blocks in a tree of modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from ckptool.layouts.reference import Shape
from ckptool.operations.module_tree import Branch

_NUMBERED = re.compile(r"(.*?)(\d{1,9})")
_NO_STACKS = frozenset({"aux", "experts", "heads"})  # they stand side by side
_FEWEST_WEIGHTS = 2  # of a block; a module with one is a layer
_ALIKE = 0.6  # of the names in the smaller of two blocks
_LOOKED_AT = 6  # neighbours in one stack; the others are like them
_PROBED = 2  # modules at the front of several, beside the last one: where these have no stacks, the others have none


class Stack(NamedTuple):
    """Name a stack of blocks, how many there are, and names and shapes in the first and the last of them."""

    name: str
    blocks: int
    first: Mapping[str, Shape]
    shapes: Mapping[str, Shape]


def stacks(branch: Branch, name: str = "", in_block: bool = False, alone: bool = False) -> Iterator[Stack]:
    """List the innermost stacks of a tree, in the order of its modules.

    ``in_block`` says that the tree is one of several in a row: ``conv1`` and ``conv2`` in it are its layers. ``alone``
    says that others like the tree hold stacks: a single ``block1`` in it is one, too.
    """
    for stem, modules in _groups(branch).items():
        path = f"{name}.{stem}" if name and stem else name or stem
        inner = _inner(modules, name, in_block or (not stem and len(modules) > 1))
        is_layer = path.rpartition(".")[2] in _NO_STACKS or (in_block and stem)
        blocks = [] if inner or is_layer else [*filter(_is_block, modules.values())]
        is_long = len(blocks) > bool(stem) or (alone and stem not in modules)
        if blocks and is_long and 2 * len(blocks) > len(modules) and _are_alike(blocks[:_LOOKED_AT]):
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


def _inner(modules: Mapping[str, Branch], name: str, are_blocks: bool) -> list[Stack]:
    """List the stacks inside of some modules; none where the first two and the last have none.

    Of blocks, a stack that holds less than half of the tensors is a part: several networks behind one attention.
    """
    paths = {segment: f"{name}.{segment}" if name else segment for segment in modules}
    some = {*[*modules][:_PROBED], *[*modules][-1:]}
    found = {segment: [*stacks(modules[segment], paths[segment], are_blocks)] for segment in some}
    if not any(found.values()) or (are_blocks and _are_parts(found, modules)):
        return []
    rest = modules.keys() - some
    found |= {segment: [*stacks(modules[segment], paths[segment], are_blocks)] for segment in rest}
    # Of stages that are alike, the shortest have but one block.
    return [
        stack
        for segment, child in modules.items()
        for stack in found[segment] or stacks(child, paths[segment], are_blocks, alone=True)
    ]


def _are_parts(found: Mapping[str, Sequence[Stack]], modules: Mapping[str, Branch]) -> bool:
    """Tell whether modules are blocks, in each of which the stacks hold less than half of the tensors."""
    sizes = {segment: sum(1 for _ in _shapes(modules[segment])) for segment in found}
    inside = {segment: sum([stack.blocks * len(stack.shapes) for stack in inner]) for segment, inner in found.items()}
    is_small = all(2 * inside[segment] < size for segment, size in sizes.items())
    return is_small and _are_alike([*modules.values()][:_LOOKED_AT])


def _is_block(branch: Branch) -> bool:
    weights = (name for name, shape in _shapes(branch) if shape is not None and len(shape) - shape.count(1) > 1)
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
