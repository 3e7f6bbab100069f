"""Which trees of the index share the most names and shapes with a tree of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptool.layouts.reference import COUNTER
from ckptool.operations.architectures.index import Entry, Index, count
from ckptool.operations.module_tree import Branch

LEAST_SHARE = 0.5  # of the tensors of both: below it, two networks have a few layers in common and not more
CLOSE = 0.1  # how much further than the closest one others may be and still be named
DEEPEST_PREFIX = 3  # segments that one more wrapper may put before every name
_MAIN_SHARE = 0.6  # of all tensors: what holds them may be the network, the rest a head beside it


class Place(NamedTuple):
    """Say where in a tree a network may lie: the segments before its names, and what lies below them."""

    prefix: tuple[str, ...]
    branch: Branch


class Candidate(NamedTuple):
    """Say how much one tree of the index shares with the network: tensors of equal name and shape, of all of both."""

    score: float
    shared: int
    root: int
    place: Place


def rank(index: Index, root: Branch, sizes: Mapping[int, int]) -> list[Candidate]:
    """List the trees that share most with the network and ``LEAST_SHARE`` at least, the closest first.

    ``sizes`` are the trees in question, each with how many tensors it has.
    """
    tensors = count(root)
    places = list(_places(root, tensors))
    overlap = Overlap(index)
    most = {node: min(size, tensors) / max(size, tensors) for node, size in sizes.items()}
    found: list[Candidate] = []
    enough = LEAST_SHARE
    for node in sorted(most, key=most.__getitem__, reverse=True):
        if most[node] < enough:
            break
        shared, place = max([(overlap.shared(node, place.branch), place) for place in places], key=_first)
        score = shared / (tensors + sizes[node] - shared)
        if score >= enough:
            found.append(Candidate(score, shared, node, place))
            enough = max(enough, score - CLOSE) if score < 1 else 1
    return sorted([candidate for candidate in found if candidate.score >= enough], key=_preference)


def _first(pair: tuple[int, Place]) -> int:
    return pair[0]


def _preference(candidate: Candidate) -> tuple[float, int]:
    return -candidate.score, len(candidate.place.prefix)


def _places(root: Branch, tensors: int) -> Iterator[Place]:
    place: Place | None = Place((), root)
    while place is not None:
        yield place
        place = _main_part(place, tensors) if len(place.prefix) < DEEPEST_PREFIX else None


def _main_part(place: Place, tensors: int) -> Place | None:
    """Find the module that holds most of the tensors; None where none does, or blocks are all there is below."""
    for name, child in place.branch.below.items():
        if child.below and count(child) >= _MAIN_SHARE * tensors:
            return Place((*place.prefix, name), child)
    return None


@dataclass(slots=True)
class Overlap:
    """Count what trees of the index have in common with one tree; equal parts are compared once."""

    index: Index
    _known: dict[tuple[int, int], int] = field(default_factory=dict)

    def shared(self, node: int, branch: Branch) -> int:
        """Count the tensors of equal path and shape, without ``num_batches_tracked``."""
        key = (node, id(branch))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._count(node, branch)
        return known

    def _count(self, node: int, branch: Branch) -> int:
        total, below = 0, branch.below
        for name, child, shape in self.index.below(node):
            other = below.get(name) if name else branch
            if other is None or name == COUNTER:
                continue
            if child is None:
                total += other.leaf is not None and other.leaf.shape == shape
            elif other.below:
                total += self.shared(child, other)
        return total


def entries_of(index: Index, root: int) -> list[Entry]:
    """List the architectures that one tree stands for, the one to name first at the front."""
    return sorted([entry for entry in index.entries if entry.root == root], key=fame)


_ZOOS = ("timm", "torchvision", "transformers")


def fame(entry: Entry) -> tuple[int, int, str]:
    """Order architectures: the one to name first comes first."""
    # The plain one of several twins has the shortest name.
    return _ZOOS.index(entry.zoo), len(entry.name), entry.name
