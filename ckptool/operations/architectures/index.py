"""Names and shapes of published architectures, as trees of modules whose equal parts are held once."""

from __future__ import annotations

import json
import sys
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from ckptool.layouts.reference import COUNTER, Shape
from ckptool.operations.module_tree import Branch

PATH = Path(__file__).with_name("index.zlib")  # xz is a quarter smaller, and takes ten times as long to read
HERE = ""  # the segment of a tensor at a place where modules lie below, too
INTEGERS = "I"  # in the file: 4 bytes, little-endian


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
            path = prefix + name if name != HERE else prefix[:-1]
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
    """Read an index from the bytes that ``IndexBuilder.encode`` gave."""
    head, _, rest = zlib.decompress(data).partition(b"\n")
    facts = json.loads(head)
    names = [tuple(texts) for texts in facts["names"]]
    numbers = array(INTEGERS, rest)
    if sys.byteorder == "big":
        numbers.byteswap()
    kinds = numbers[: facts["nodes"]]
    starts = [0, *accumulate([len(names[kind]) for kind in kinds])]
    columns = [facts["models"][name] for name in Entry._fields]
    entries = list(map(Entry, *columns))
    shapes = [None if shape is None else tuple(shape) for shape in facts["shapes"]]
    return Index(facts["versions"], entries, shapes, names, kinds, numbers[facts["nodes"] :], starts)


def count(branch: Branch) -> int:
    """Count the tensors of a tree, without ``num_batches_tracked``."""
    own = branch.leaf is not None
    return own + sum([count(child) if child.below else name != COUNTER for name, child in branch.below.items()])
