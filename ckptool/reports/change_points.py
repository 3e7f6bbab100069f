"""Where every tensor stands in the picture of a comparison: its place in the network, how far it moved, its group."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ckptool.model.comparison import Comparison, ValueChange
from ckptool.reports.change_rows import change_text
from ckptool.reports.text import file_names, plural, safe_text, shape_text, shorten

UNCHANGED = "unchanged"
BROKEN = "NaN or inf"
FROM_ZERO = "from zero"
NO_NUMBERS = "not comparable"
ROWS = (UNCHANGED, FROM_ZERO, BROKEN, NO_NUMBERS)  # fates that no axis of numbers can show
_MAX_COLORS = 8
_MAX_DEPTH = 6
_LABELS_SIDE_BY_SIDE = 80
_FEW_RUNS, _FITTING_RUNS, _MANY_RUNS = 8, 40, 160  # of many, not every one is named
_MAX_DIGITS = 18
_MAX_SEGMENTS = 32
_LONGEST_NAME = 60
OTHERS = "others"


@dataclass(frozen=True, slots=True)
class Point:
    """Place one tensor: ``index`` counts tensors from the input of the network to its output.

    ``relative`` is the relative change, None where ``row`` says why there is none. ``lines`` tell the numbers.
    """

    index: int
    name: str
    relative: float | None
    row: str
    is_vector: bool
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """Hold the points of one comparison with the base, and what became of it in few words."""

    title: str
    points: tuple[Point, ...]
    summary: str

    @property
    def moved(self) -> list[Point]:
        """List the points that have a relative change."""
        return [point for point in self.points if point.relative is not None]


@dataclass(frozen=True, slots=True)
class Depth:
    """Hold the tensors in the order of the network, and each one's group: the part of the model it belongs to."""

    keys: tuple[str, ...]
    groups: tuple[str, ...]

    def runs(self) -> list[tuple[str, int, int]]:
        """Divide the depth by modules, finely but not too finely: the name, the first index, one past the last."""
        found = _runs([_module(key)[:1] for key in self.keys])
        for depth in range(2, _MAX_DEPTH):
            finer = _runs([_module(key)[:depth] for key in self.keys])
            if len(finer) > (_MANY_RUNS if len(found) < _FEW_RUNS else _FITTING_RUNS):
                break
            found = finer
        return found

    def labels(self, most: int) -> tuple[list[float], list[str]]:
        """Name at most so many runs in their middle; narrow neighbours, whose names would overlap, share one name."""
        runs = self.runs()
        ticks: list[float] = []
        names: list[str] = []
        for name, start, end in runs[:: math.ceil(len(runs) / most) or 1]:
            middle = (start + end - 1) / 2
            if ticks and middle - ticks[-1] < len(self.keys) / _LABELS_SIDE_BY_SIDE:
                ticks[-1] = (ticks[-1] + middle) / 2
                names[-1] += f", {name}"
            else:
                ticks.append(middle)
                names.append(name)
        return ticks, names


def depth_of(comparisons: Sequence[Comparison]) -> Depth:
    """Order the common tensors as the base has them; counters are no weights, and not in it."""
    counters = {value.key for found in comparisons for value in found.values if value.is_counter}
    keys = [key for key in dict.fromkeys(key for found in comparisons for key in found.names) if key not in counters]
    keys = _counted_up(keys)
    return Depth(tuple(keys), tuple(_colored(keys)))


def _counted_up(keys: Sequence[str]) -> list[str]:
    """Bring numbered modules into the order of their numbers: safetensors files have layer 10 before layer 2."""
    first: dict[tuple[str, ...], int] = {}
    orders: dict[str, list[tuple[int, int]]] = {}
    for index, key in enumerate(keys):
        segments = key.split(".", _MAX_SEGMENTS)
        orders[key] = []
        for depth, segment in enumerate(segments):
            is_number = segment.isdecimal()
            parent = tuple(segments[:depth])
            place = first.setdefault((*parent, "*" if is_number else segment), index)
            orders[key].append((place, int(segment[:_MAX_DIGITS]) if is_number else 0))
    return sorted(keys, key=orders.__getitem__)


def series_of(comparisons: Sequence[Comparison], depth: Depth) -> list[Series]:
    """Place the tensors of every comparison."""
    titles = file_names([found.path_b for found in comparisons])
    places = {key: index for index, key in enumerate(depth.keys)}
    return [
        Series(short_name(title), tuple(_points(found, places)), _summary(found))
        for title, found in zip(titles, comparisons, strict=True)
    ]


def short_name(text: str) -> str:
    """Make a foreign name fit to be shown in a picture."""
    shown = safe_text(text)
    keep = _LONGEST_NAME // 2 - 1
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[:keep]}…{shown[-keep:]}"


def _module(key: str) -> tuple[str, ...]:
    segments = key.split(".", _MAX_SEGMENTS)
    return tuple(segments[:-1] or segments)


def _runs(modules: Sequence[tuple[str, ...]]) -> list[tuple[str, int, int]]:
    runs, start = [], 0
    for module, group in groupby(modules):
        end = start + len(list(group))
        runs.append((short_name(".".join(module)), start, end))
        start = end
    return runs


def _colored(keys: Sequence[str]) -> list[str]:
    """Group the names by what their modules are called, as finely as there are colours; numbers are all one."""
    found = [_role(key, 1) for key in keys]
    for depth in range(2, _MAX_DEPTH):
        finer = [_role(key, depth) for key in keys]
        if len(set(finer)) > _MAX_COLORS:
            break
        found = finer
    counts = Counter(found)
    if len(counts) <= _MAX_COLORS:
        return found
    kept = {name for name, _ in counts.most_common(_MAX_COLORS - 1)}
    return [name if name in kept else OTHERS for name in found]


def _role(key: str, depth: int) -> str:
    """Name the module by its first ``depth`` segments that are no numbers: ``layers.*.mlp``."""
    taken: list[str] = []
    pending: list[str] = []
    for segment in _module(key):
        if segment.isdecimal():
            pending.append("*")
        elif depth:
            taken += [*pending, segment]
            pending, depth = [], depth - 1
    return short_name(".".join(taken or pending))


def _points(found: Comparison, places: dict[str, int]) -> Iterator[Point]:
    values = found.by_key
    kinds = {change.key: change for change in found.shape}
    for key in found.names:
        if key not in places:
            continue
        value, name = values.get(key), safe_text(shorten(key, 4 * _LONGEST_NAME))
        if key in kinds:
            lines: tuple[str, ...] = (safe_text(f"A is {kinds[key].a}"), safe_text(f"B is {kinds[key].b}"))
            yield Point(places[key], name, None, NO_NUMBERS, False, lines)
        elif value is None:
            yield Point(places[key], name, None, UNCHANGED, False, ("identical",))
        else:
            row = _row(value)
            relative = None if row else value.relative_change
            yield Point(places[key], name, relative, row, len(value.shape or ()) < 2, tuple(_lines(value)))


def _row(value: ValueChange) -> str:
    relative = value.relative_change
    if value.outcome == "same":
        return UNCHANGED
    if value.broken:
        return BROKEN
    if relative is None or relative != relative or relative == 0:
        return NO_NUMBERS
    return FROM_ZERO if relative == math.inf else ""


def _lines(value: ValueChange) -> Iterator[str]:
    kinds = " to ".join(map(safe_text, dict.fromkeys((value.dtype_a, value.dtype_b))))
    yield f"{kinds} {shape_text(value.shape)}"
    if value.outcome == "same":
        yield "the same numbers"
    elif value.relative_change is None:
        yield safe_text(value.detail)
    else:
        yield f"relative change {change_text(value.relative_change)}"
        yield f"{value.changed or 0:,} of {plural(value.elements, 'element')} changed, {value.broken or 0:,} broken"
        yield f"max abs {value.max_abs:.4g}, mean abs {value.mean_abs:.4g}"
        yield "cosine unknown" if value.cosine is None else f"cosine {value.cosine:.6f}"


def _summary(found: Comparison) -> str:
    weights = [value for value in found.changed if not value.is_counter]
    counters = sum(value.is_counter for value in found.values)
    parts = [f"{len(weights):,} of {plural(len(found.names) - counters, 'tensor')} changed"]
    for count, what in (
        (sum(bool(value.broken) for value in found.values), "with NaN or inf"),
        (len(found.shape), "of another shape"),
        (len(found.only_in_a), "only in A"),
        (len(found.only_in_b), "only in B"),
        (len(found.renamed), "renamed"),
        (counters, "counters not drawn"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    return ", ".join(parts)
