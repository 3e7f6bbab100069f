"""Names and shapes of published architectures, as trees of modules whose equal parts are held once."""

from __future__ import annotations

import json
import lzma
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from ckptool.layouts.reference import COUNTER
from ckptool.operations.module_tree import Branch

Shape = tuple[int, ...] | None
PATH = Path(__file__).with_name("index.xz")
_HERE = ""  # the segment of a tensor at a place where modules lie below, too
_INTEGERS = "I"  # in the file: 4 bytes, little-endian


class Entry(NamedTuple):
    """Name one architecture: the zoo that has it, its family there, its tree, the tree without numbers and shapes.

    ``tensors`` and ``templates`` count the tensors of the two trees, without ``num_batches_tracked``.
    """

    zoo: str
    family: str
    name: str
    root: int
    tensors: int
    template: int
    templates: int

    @property
    def full_name(self) -> str:
        """Write it as ``--model`` and ``--like`` take it."""
        return f"{self.zoo}:{self.name}"


@dataclass(frozen=True, eq=False)
class Index:
    """Hold the trees: a node has the names of its children, and for each a shape (odd) or a node further up (even).

    ``versions`` are those of the zoos that the models were built with. ``shapes`` are all that occur; None stands for
    any. ``names`` are the tuples of names that nodes have for their children; ``kinds`` says which of them a node has,
    ``starts`` where its children begin in ``children``.
    """

    versions: Mapping[str, str]
    entries: Sequence[Entry]
    shapes: Sequence[Shape]
    names: Sequence[tuple[str, ...]]
    kinds: Sequence[int]
    children: Sequence[int]
    starts: Sequence[int]
    _below: dict[int, tuple[tuple[str, int | None, Shape], ...]] = field(default_factory=dict)

    def below(self, node: int) -> tuple[tuple[str, int | None, Shape], ...]:
        """List the children of a node: name, and either its node, or None and its shape."""
        found = self._below.get(node)
        if found is None:
            start = self.starts[node]
            names = self.names[self.kinds[node]]
            codes = self.children[start : start + len(names)]
            found = self._below[node] = tuple(
                [
                    (name, None, self.shapes[code >> 1]) if code & 1 else (name, node - (code >> 1), None)
                    for name, code in zip(names, codes, strict=True)
                ]
            )
        return found

    def tensors(self, node: int, prefix: str = "") -> Iterator[tuple[str, Shape]]:
        """List names and shapes below a node, in the order of the modules."""
        for name, child, shape in self.below(node):
            path = prefix + name if name != _HERE else prefix[:-1]
            if child is None:
                yield path, shape
            else:
                yield from self.tensors(child, path + ".")

    def find(self, full_name: str) -> Entry | None:
        """Give the entry of that name (``timm:resnet50``)."""
        return next((entry for entry in self.entries if entry.full_name == full_name), None)


@cache
def load_index() -> Index:
    """Read the index that comes with the package."""
    return decode(PATH.read_bytes())


def decode(data: bytes) -> Index:
    """Read an index from the bytes that ``encode`` gave."""
    head, _, rest = lzma.decompress(data).partition(b"\n")
    facts = json.loads(head)
    names = [tuple(texts) for texts in facts["names"]]
    numbers = array(_INTEGERS, rest)
    if sys.byteorder == "big":
        numbers.byteswap()
    kinds = numbers[: facts["nodes"]]
    starts = [0, *accumulate([len(names[kind]) for kind in kinds])]
    columns = [facts["models"][name] for name in Entry._fields]
    entries = list(map(Entry, *columns))
    shapes = [None if shape is None else tuple(shape) for shape in facts["shapes"]]
    return Index(facts["versions"], entries, shapes, names, kinds, numbers[facts["nodes"] :], starts)


@dataclass(slots=True)
class IndexBuilder:
    """Gather architectures, and give each distinct tree of names and shapes a number."""

    entries: list[Entry] = field(default_factory=list)
    shapes: dict[Shape, int] = field(default_factory=dict)
    names: dict[tuple[str, ...], int] = field(default_factory=dict)
    nodes: dict[tuple[int, tuple[int, ...]], int] = field(default_factory=dict)

    def add(self, zoo: str, family: str, name: str, root: Branch, template: Branch) -> None:
        """Take one architecture in; ``template`` is its tree without numbers, all of whose shapes are None."""
        trees = (self._node(root), count(root), self._node(template), count(template))
        self.entries.append(Entry(zoo, family, name, *trees))

    def _node(self, branch: Branch) -> int:
        below = dict(branch.below)
        if branch.leaf is not None:
            below[_HERE] = branch.leaf
        kind = self.names.setdefault(tuple(below), len(self.names))
        codes = tuple(
            [
                -self._node(child) - 1 if isinstance(child, Branch) else self._shape(child.shape)
                for child in below.values()
            ]
        )
        return self.nodes.setdefault((kind, codes), len(self.nodes))

    def _shape(self, shape: Shape) -> int:
        return self.shapes.setdefault(shape, len(self.shapes))

    def encode(self, versions: Mapping[str, str]) -> bytes:
        """Write the index."""
        models = {name: [entry[place] for entry in self.entries] for place, name in enumerate(Entry._fields)}
        facts = {
            "versions": versions,
            "models": models,
            "shapes": list(self.shapes),
            "names": list(self.names),
            "nodes": len(self.nodes),
        }
        # A node further up is named by the distance: equal parts of many models look the same then.
        children = [
            code << 1 | 1 if code >= 0 else (node + code + 1) << 1
            for node, (_, codes) in enumerate(self.nodes)
            for code in codes
        ]
        numbers = array(_INTEGERS, [kind for kind, _ in self.nodes] + children)
        if sys.byteorder == "big":
            numbers.byteswap()
        head = json.dumps(facts, separators=(",", ":")).encode()
        return lzma.compress(head + b"\n" + numbers.tobytes(), preset=9 | lzma.PRESET_EXTREME)


def count(branch: Branch) -> int:
    """Count the tensors of a tree, without ``num_batches_tracked``."""
    own = branch.leaf is not None
    return own + sum(
        [count(child) if isinstance(child, Branch) else name != COUNTER for name, child in branch.below.items()]
    )
