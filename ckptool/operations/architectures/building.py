"""Put an index of architectures together, and write it."""

from __future__ import annotations

import json
import sys
import zlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptool.layouts.reference import Shape
from ckptool.operations.architectures.index import HERE, INTEGERS, Entry, count
from ckptool.operations.module_tree import Branch


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
        names = tuple(branch.below) if branch.leaf is None else (*branch.below, HERE)
        kind = self.names.setdefault(names, len(self.names))
        codes = [self._code(child) for child in branch.below.values()]
        if branch.leaf is not None:
            codes.append(self._shape(branch.leaf.shape))
        return self.nodes.setdefault((kind, tuple(codes)), len(self.nodes))

    def _code(self, child: Branch) -> int:
        return -self._node(child) - 1 if child.leaf is None or child.below else self._shape(child.leaf.shape)

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
        numbers = array(INTEGERS, [kind for kind, _ in self.nodes] + children)
        if sys.byteorder == "big":
            numbers.byteswap()
        head = json.dumps(facts, separators=(",", ":")).encode()
        return zlib.compress(head + b"\n" + numbers.tobytes(), 9)
