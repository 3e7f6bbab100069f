"""Say which published architecture a network is, or is closest to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckptool.model.inspection import ArchitectureMatch, MatchKind, TensorRow
from ckptool.operations.architectures.differences import difference, phrases
from ckptool.operations.architectures.index import Index, load_index
from ckptool.operations.architectures.matching import Candidate, entries_of, fame, rank
from ckptool.operations.architectures.templates import template_of
from ckptool.operations.module_tree import Branch

_FEWEST = 8  # tensors, or names without numbers, in common: fewer are found by chance
_COMPARED = 12  # candidates that are looked at tensor by tensor
_FAMILY_SHARE = 0.8  # of the names without numbers, where sizes do not agree


def identify(root: Branch, rows: Sequence[TensorRow]) -> ArchitectureMatch | None:
    """Find the architecture of a network by its clean names and shapes, ``root`` being their tree.

    In this order: one with the very same names and shapes, one that differs in head and stem alone, the one that
    shares the most tensors, those whose modules have the same names. None where it is close to none of them.
    """
    if len(rows) < _FEWEST:
        return None
    index = load_index()
    candidates = rank(index, root, {entry.root: entry.tensors for entry in index.entries})
    near = [candidate for candidate in candidates if candidate.shared >= _FEWEST]
    exact = [candidate for candidate in near if candidate.score == 1]
    if exact:
        return _matched("exact", index, exact, root)
    ends = _equal_but_for_the_ends(index, near[:_COMPARED], root)
    if ends:
        return _matched("head", index, ends, root)
    return _matched("nearest", index, near, root) if near else _named_alike(index, rows)


def _equal_but_for_the_ends(index: Index, near: Iterable[Candidate], root: Branch) -> list[Candidate]:
    """Pick those that differ in head and stem alone: of these, the ones that differ least."""
    compared = [(difference(index, candidate, root), candidate) for candidate in near]
    ends = [(found.cost, candidate) for found, candidate in compared if found.is_at_the_ends]
    least = min([cost for cost, _ in ends], default=None)
    return [candidate for cost, candidate in ends if cost == least]


def _named_alike(index: Index, rows: Sequence[TensorRow]) -> ArchitectureMatch | None:
    """Find the architectures with the same modules, whatever their sizes and however many blocks."""
    candidates = rank(index, template_of(rows), {entry.template: entry.templates for entry in index.entries})
    alike = [found for found in candidates if found.shared >= _FEWEST and found.score >= _FAMILY_SHARE]
    best = [found.root for found in alike if found.score == alike[0].score]
    entries = sorted([entry for entry in index.entries if entry.template in best], key=fame)
    families = {entry.family for entry in entries}
    if not entries:
        return None
    names = tuple([entry.full_name for entry in entries])
    return ArchitectureMatch("structure", None, families.pop() if len(families) == 1 else None, alike[0].score, names)


def _matched(kind: MatchKind, index: Index, found: list[Candidate], root: Branch) -> ArchitectureMatch:
    """Name the first of the candidates; the others, and those that the same tree stands for, are alternatives."""
    best, *others = [entries_of(index, candidate.root) for candidate in found]
    # Of those that share less, their twins are left out.
    rest = [entry for entries in others for entry in (entries[:1] if kind == "nearest" else entries)]
    said = phrases(difference(index, found[0], root)) if kind != "exact" or found[0].place.prefix else ()
    alternatives = tuple([entry.full_name for entry in (*best[1:], *rest)])
    return ArchitectureMatch(kind, best[0].full_name, best[0].family, found[0].score, alternatives, said)
