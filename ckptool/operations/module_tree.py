"""Fold flat names into the tree of modules that they come from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ckptool.model.inspection import ModuleNode, TensorRow
from ckptool.operations.tables import elements_of

# A name can hold more dots than Python can recurse; what lies deeper stays one segment.
MAX_DEPTH = 64


class Branch:
    """Hold one level of names: what goes on below it, and the tensor that ends here, if one does."""

    __slots__ = ("below", "leaf")

    def __init__(self, leaf: TensorRow | None = None) -> None:
        self.leaf = leaf
        self.below: dict[str, Branch] = {}


def grow(rows: Iterable[TensorRow]) -> Branch:
    """Sort tensors into a tree by the segments of their clean names, in the given order."""
    root = Branch()
    # Tensors share their modules: the way to each is gone once. None is no module: the name "" is one.
    known: dict[str | None, dict[str, Branch]] = {None: root.below}
    for row in rows:
        key = row[0] or row[1]
        module, dot, name = key.rpartition(".")
        place = module if dot else None
        below = known.get(place)
        if below is None:
            below = known[place] = _descend(root, module.split(".", MAX_DEPTH)).below
        if name in below:
            below[name].leaf = row
        else:
            below[name] = Branch(row)
    return root


def _descend(branch: Branch, segments: Iterable[str]) -> Branch:
    """Follow segments, and make what is missing."""
    for segment in segments:
        below = branch.below.get(segment)
        if below is None:
            below = branch.below[segment] = Branch()
        branch = below
    return branch


def fold(root: Branch, name: str = "") -> ModuleNode:
    """Sum up a tree; equal neighbours with consecutive numbers become one node, chains of single children too."""
    return _Folder().fold(name, root)[0]


@dataclass(slots=True)
class _Folder:
    """Number every distinct subtree shape, so that comparing two of them is comparing two numbers."""

    shapes: dict[object, int] = field(default_factory=dict)

    def fold(self, name: str, branch: Branch) -> tuple[ModuleNode, int]:
        name, branch = follow_chain(name, branch)
        folded = [self.fold(segment, below) for segment, below in branch.below.items()]
        children = [child for child, _ in folded]
        leaf = branch.leaf
        shape = (
            leaf and (leaf.dtype, leaf.shape),
            tuple((child.name, number) for child, number in folded),
        )
        node = _node(name, leaf, children, tuple(_merge_repeats(folded)))
        return node, self.shapes.setdefault(shape, len(self.shapes))


def _node(name: str, leaf: TensorRow | None, children: list[ModuleNode], shown: tuple[ModuleNode, ...]) -> ModuleNode:
    node = ModuleNode(
        name,
        1,
        sum(child.tensors for child in children),
        sum(child.elements for child in children),
        sum(child.nbytes for child in children),
        children=shown,
    )
    if leaf is None:
        return node
    return replace(
        node,
        tensors=node.tensors + 1,
        elements=node.elements + elements_of(leaf.shape),
        nbytes=node.nbytes + leaf.nbytes,
        dtype=leaf.dtype,
        shape=leaf.shape,
    )


def follow_chain(name: str, branch: Branch) -> tuple[str, Branch]:
    """Go down while there is only one way, and join the names; give the joined name and where it leads."""
    # A number stays alone: only then can it be joined with its neighbours.
    if is_number(name):
        return name, branch
    while branch.leaf is None and len(branch.below) == 1:
        segment, following = next(iter(branch.below.items()))
        if following.leaf is not None:
            break
        name, branch = f"{name}.{segment}" if name else segment, following
        if is_number(segment):
            break
    return name, branch


def _merge_repeats(folded: list[tuple[ModuleNode, int]]) -> Iterable[ModuleNode]:
    """Join runs of equal subtrees with consecutive numbers into one node each."""
    start = 0
    for end in range(1, len(folded) + 1):
        if end == len(folded) or not _continues(folded[end - 1], folded[end]):
            yield _repeat([node for node, _ in folded[start:end]])
            start = end


def _continues(one: tuple[ModuleNode, int], other: tuple[ModuleNode, int]) -> bool:
    return one[1] == other[1] and is_number(one[0].name) and other[0].name == str(int(one[0].name) + 1)


def is_number(segment: str) -> bool:
    """Tell whether a segment is an index, as a ``ModuleList`` writes it."""
    return segment.isascii() and segment.isdigit() and len(segment) < 10


def _repeat(nodes: list[ModuleNode]) -> ModuleNode:
    first = nodes[0]
    if len(nodes) == 1:
        return first
    return ModuleNode(
        f"[{first.name}-{nodes[-1].name}]",
        len(nodes),
        sum(node.tensors for node in nodes),
        sum(node.elements for node in nodes),
        sum(node.nbytes for node in nodes),
        first.dtype,
        first.shape,
        first.children,
    )
