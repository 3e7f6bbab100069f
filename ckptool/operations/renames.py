"""Find tensors that kept their content and changed their name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptool.model.checksums import crc32
from ckptool.model.comparison import Ambiguity, Rename
from ckptool.model.sources import Progress
from ckptool.model.values import TensorSpec
from ckptool.operations.pairing import Tensors
from ckptool.operations.runs import element_runs, same_bytes
from ckptool.operations.transforms import payload_of

_RULES_TRIED = 8


@dataclass(slots=True)
class _Content:
    """Hold all names of one content; ``is_constant`` says that every element is the same, as in a fresh bias."""

    specimen: TensorSpec
    is_constant: bool
    a: dict[str, None] = field(default_factory=dict)  # as sets that keep their order: there may be many names
    b: dict[str, None] = field(default_factory=dict)

    @property
    def is_pair(self) -> bool:
        """Tell whether there is but one name on either side."""
        return len(self.a) == 1 and len(self.b) == 1

    def take_only(self) -> Rename:
        """Settle the one name on either side."""
        return self.take(next(iter(self.a)), next(iter(self.b)))

    def take(self, a: str, b: str) -> Rename:
        """Settle one pair of names."""
        del self.a[a], self.b[b]
        return Rename(a, b, self.specimen.numel)


def find_renames(
    only_a: Tensors, only_b: Tensors, progress: Progress
) -> tuple[tuple[Rename, ...], tuple[Ambiguity, ...]]:
    """Pair the names of one file with those of the other by equal dtype, shape and bytes.

    Content that several names share goes by what the unmistakable pairs have in common (``encoder`` became
    ``backbone``); a constant tensor alone on both sides by its last segment. What stays open is said to be so. Empty
    tensors are not looked at.

    :raises UnsupportedTensor: a tensor expands far beyond its storage.
    :raises UnreadableCheckpoint: bytes cannot be read, or do not match their checksum.
    """
    contents = _shared_contents(only_a, only_b, progress)
    certain = [each.take_only() for each in contents if each.is_pair and not each.is_constant]
    rules = _rules(certain)
    by_rule = [rename for each in contents for rename in _settle(each, rules)]
    alike = [each.take_only() for each in contents if each.is_pair and _end_alike(each)]
    left = tuple(Ambiguity(tuple(each.a), tuple(each.b)) for each in contents if each.a and each.b)
    order = {name: index for index, name in enumerate(only_a)}
    return tuple(sorted((*certain, *by_rule, *alike), key=lambda rename: order[rename.a])), left


def _end_alike(content: _Content) -> bool:
    return len({name.rpartition(".")[2] for name in (*content.a, *content.b)}) == 1


def _shared_contents(only_a: Tensors, only_b: Tensors, progress: Progress) -> list[_Content]:
    """Group the names of both by content; a checksum finds candidates, and the bytes decide."""
    sides = _dense(only_a), _dense(only_b)
    kinds = [{(spec.dtype, spec.shape) for spec in side.values()} for side in sides]
    wanted = kinds[0] & kinds[1]
    named = [
        (side, name, spec)
        for side, specs in enumerate(sides)
        for name, spec in specs.items()
        if (spec.dtype, spec.shape) in wanted
    ]
    progress.start("looking for renamed tensors", sum(spec.nbytes for _, _, spec in named))
    found: dict[Any, _Content] = {}
    for side, name, spec in named:
        checksum, is_constant = _fingerprint(spec, name, progress)
        content = found.setdefault((spec.dtype, spec.shape, checksum), _Content(spec, is_constant))
        if content.specimen is spec or _are_equal(content.specimen, spec, name):
            (content.a, content.b)[side][name] = None
    return [content for content in found.values() if content.a and content.b]


def _dense(tensors: Tensors) -> Mapping[str, TensorSpec]:
    return {name: spec for name, spec in tensors.items() if isinstance(spec, TensorSpec) and spec.numel}


def _fingerprint(spec: TensorSpec, name: str, progress: Progress) -> tuple[int, bool]:
    """Give a checksum of the elements, and whether all have the same bytes."""
    checksum, first, is_constant = 0, b"", True
    for run in element_runs(payload_of(spec, key=name)):
        checksum = crc32(run, checksum)
        first = first or bytes(run[: spec.dtype.itemsize])
        is_constant = is_constant and bytearray(first) * (len(run) // len(first)) == run
        progress.advance(len(run))
    return checksum, is_constant


def _are_equal(one: TensorSpec, other: TensorSpec, name: str) -> bool:
    return same_bytes(payload_of(one, key=name), payload_of(other, key=name))


def _rules(renames: Iterable[Rename]) -> list[tuple[str, str]]:
    """List what names of A begin with and what it became, the most frequent first."""
    fronts = Counter(_fronts(rename.a, rename.b) for rename in renames)
    return [fronts_pair for fronts_pair, _ in fronts.most_common(_RULES_TRIED)]


def _fronts(a: str, b: str) -> tuple[str, str]:
    """Take off the segments at the end that both names share."""
    ours, theirs = a.split("."), b.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return ".".join(ours), ".".join(theirs)


def _settle(content: _Content, rules: Sequence[tuple[str, str]]) -> Iterator[Rename]:
    """Pair names that a rule leads from one to the other; where rules contradict each other, none counts."""
    for name in list(content.a):
        reached = dict.fromkeys(target for rule in rules if (target := _apply(name, rule)) in content.b)
        if len(reached) == 1:
            yield content.take(name, next(iter(reached)))


def _apply(name: str, rule: tuple[str, str]) -> str | None:
    front, becomes = rule
    rest = name.removeprefix(f"{front}.") if front else name
    if front and rest == name:
        return None
    return f"{becomes}.{rest}" if becomes else rest
