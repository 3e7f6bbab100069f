"""Draw relative change over the depth of the network: one colour per part of the model, or per checkpoint."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptool.model.comparison import Comparison
from ckptool.reports.change_points import (
    BROKEN,
    OTHERS,
    ROWS,
    UNCHANGED,
    Depth,
    Point,
    Series,
    depth_of,
    series_of,
    short_name,
)
from ckptool.reports.change_rows import change_text
from ckptool.reports.text import file_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GROUP_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D31", "#7F3C8D")
_ROW_COLORS = {UNCHANGED: "#9A9A9A", BROKEN: "#D00000"}
_MAX_NAMES = 48  # tensors: with more, modules are named
_MAX_LABELS = 40
_MAX_STEMS = 160
_LOG_FROM = 30.0  # ratio of the largest to the smallest change
_LABEL_FIVES_TO = 1000.0
_MATRIX_AREA, _VECTOR_AREA = 34.0, 14.0  # of a marker, in square points
_VECTOR = "vector (bias, norm)"
_MAX_TITLES = 24
_TALLEST_ROW = 1.2  # in inches
_INCHES_PER_LETTER = 0.07
_ACROSS = 90  # letters that fit on one line below the axis
_ROOMY = 400  # tensors: with more, the markers are smaller


@dataclass(frozen=True, slots=True)
class Spot:
    """Say where a point was drawn: ``x`` and ``y`` from the upper left corner, in shares of the picture."""

    x: float
    y: float
    series: str
    point: Point


@dataclass(frozen=True, slots=True)
class Drawing:
    """Hold a picture and what it shows where."""

    figure: Figure
    title: str
    width: float
    height: float
    series: tuple[Series, ...]
    places: tuple[tuple[int, Point, Axes, float], ...]

    def spots(self) -> Iterator[Spot]:
        """Yield where every point lies; to be asked once the figure was drawn."""
        for number, point, axes, y in self.places:
            place = axes.transData.transform((point.index, y))
            across, up = self.figure.transFigure.inverted().transform(place)
            yield Spot(float(across), 1 - float(up), self.series[number].title, point)


def draw_changes(comparisons: Sequence[Comparison]) -> Drawing:
    """Draw one comparison, or several with the same base; needs matplotlib."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    depth = depth_of(comparisons)
    series = series_of(comparisons, depth)
    count = len(depth.keys)
    rows = [row for row in ROWS if any(point.row == row for each in series for point in each.points)]
    row_inches = min(0.3 + 0.08 * (len(series) - 1), _TALLEST_ROW)
    ticks, names = _ticks(depth)
    colored = _colored(series, depth)
    across = sum(map(len, names)) < _ACROSS
    width = min(6.6 + 0.02 * count, 12.0) + 1.2 + _INCHES_PER_LETTER * max(map(len, (*dict(colored), _VECTOR)))
    height = 4.7 + row_inches * len(rows) + (0.2 if across else _INCHES_PER_LETTER * max(map(len, names)))
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    main, strip = figure.subplots(
        2, 1, sharex=True, height_ratios=(4.2, max(row_inches * len(rows), 0.02)), gridspec_kw={"hspace": 0.02}
    )
    places = [*_draw_main(main, series, depth), *_draw_strip(strip, series, rows, depth)]
    _shade(main, strip, depth)
    strip.set_xticks(ticks, names, rotation=0 if across else 90, fontsize=8 if len(names) < 30 else 7, parse_math=False)
    strip.set_xlabel(f"depth: {count:,} tensors in the order of A, numbered modules counted up")
    title = _title(short_name(file_names([comparisons[0].path_a])[0]), series)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    main.set_title("\n".join(_captions(series, round(11 * width))), loc="left", fontsize=9, parse_math=False)
    _add_legend(main, colored, any(point.is_vector for each in series for point in each.moved))
    return Drawing(figure, title, width, height, tuple(series), tuple(places))


def _title(base: str, series: Sequence[Series]) -> str:
    return f"{base} → {series[0].title if len(series) == 1 else f'{len(series):,} checkpoints'}"


def _captions(series: Sequence[Series], width: int) -> Iterator[str]:
    """Tell the numbers of the last series in lines of so many characters."""
    last = series[-1]
    yield from textwrap.wrap(last.summary if len(series) == 1 else f"{last.title}: {last.summary}", width)
    ranked = sorted(last.moved, key=lambda point: -(point.relative or 0))[:3]
    if ranked:
        told = (f"{short_name(point.name)} {change_text(point.relative)}" for point in ranked)
        yield from textwrap.wrap(f"most changed: {', '.join(told)}", width)


def _draw_main(axes: Axes, series: Sequence[Series], depth: Depth) -> Iterator[tuple[int, Point, Axes, float]]:
    sizes = [point.relative for each in series for point in each.moved if point.relative]
    _scale(axes, sizes)
    if not sizes:
        axes.text(0.5, 0.5, "no weight moved", transform=axes.transAxes, ha="center", va="center", color="#777777")
    for number, each in enumerate(series):
        draw = _draw_points if len(series) == 1 else _draw_line
        draw(axes, each.moved, depth, _series_color(number, len(series)))
        yield from ((number, point, axes, point.relative or 0.0) for point in each.moved)


def _scale(axes: Axes, sizes: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_ylabel("relative change  ‖B - A‖ / ‖A‖")
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    if not sizes:
        axes.set_yticks([])
        return
    ratio = max(sizes) / min(sizes)
    if ratio > _LOG_FROM:
        axes.set_yscale("log")
        axes.set_ylim(min(sizes) / 1.6, max(sizes) * 1.6)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < _LABEL_FIVES_TO else (1.0,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, max(sizes) * 1.08)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: change_text(size)))


def _draw_points(axes: Axes, points: Sequence[Point], depth: Depth, _: Any) -> None:
    colors = _group_colors(depth)
    if len(depth.keys) <= _MAX_STEMS:
        bottom = axes.get_ylim()[0]
        for point in points:
            color = colors[depth.groups[point.index]]
            axes.vlines(point.index, bottom, point.relative or 0.0, colors=color, linewidth=1.2, alpha=0.55)
    shrink = max(min(_ROOMY / max(len(depth.keys), 1), 1.0), 0.1)
    for is_vector in (False, True):
        chosen = [point for point in points if point.is_vector == is_vector]
        shades = [colors[depth.groups[point.index]] for point in chosen]
        axes.scatter(
            [point.index for point in chosen],
            [point.relative or 0.0 for point in chosen],
            s=(_VECTOR_AREA if is_vector else _MATRIX_AREA) * shrink,
            facecolors="white" if is_vector else shades,
            edgecolors=shades,
            linewidths=1.1,
            zorder=3,
        )


def _draw_line(axes: Axes, points: Sequence[Point], depth: Depth, color: Any) -> None:
    """Join the matrices; vectors move further, and would make a saw of the line."""
    joined = [point for point in points if not point.is_vector] or list(points)
    rest = [point for point in points if point.is_vector] if len(joined) < len(points) else []
    size = 5.0 if len(depth.keys) <= _MAX_STEMS else 2.5
    indices, sizes = [point.index for point in joined], [point.relative or 0.0 for point in joined]
    axes.plot(indices, sizes, "-o", color=color, markersize=size, linewidth=1.3, zorder=3)
    axes.scatter(
        [point.index for point in rest],
        [point.relative or 0.0 for point in rest],
        s=_VECTOR_AREA * 0.8,
        facecolors="white",
        edgecolors=[color],
        linewidths=0.9,
        zorder=2,
    )


def _series_color(number: int, count: int) -> Any:
    """Go from dark to light with the order of the checkpoints."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * number / max(count - 1, 1))


def _group_colors(depth: Depth) -> dict[str, str]:
    groups = [group for group in dict.fromkeys(depth.groups) if group != OTHERS]
    return {**dict(zip(groups, _GROUP_COLORS, strict=False)), OTHERS: "#666666"}


def _draw_strip(
    axes: Axes, series: Sequence[Series], rows: Sequence[str], depth: Depth
) -> Iterator[tuple[int, Point, Axes, float]]:
    """Mark what the axis of numbers cannot show, a row for each reason."""
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(bool(rows))
    for number, each in enumerate(series):
        for height, row in enumerate(rows):
            marked = [point for point in each.points if point.row == row]
            y = height + (0.7 * ((number + 0.5) / len(series) - 0.5) if len(series) > 1 else 0)
            color = _ROW_COLORS.get(row, "#7F3C8D") if len(series) == 1 else _series_color(number, len(series))
            marker = "x" if row == BROKEN else "|"
            places = [point.index for point in marked]
            axes.scatter(places, [y] * len(marked), s=30, marker=marker, color=[color], linewidths=1.3)
            yield from ((number, point, axes, y) for point in marked)


def _ticks(depth: Depth) -> tuple[list[float], list[str]]:
    """Name every tensor, or the modules where the tensors are too many."""
    if len(depth.keys) > _MAX_NAMES:
        return depth.labels(_MAX_LABELS)
    return [float(index) for index in range(len(depth.keys))], [short_name(key) for key in depth.keys]


def _shade(main: Axes, strip: Axes, depth: Depth) -> None:
    """Shade every other module, so that the eye finds the name below a point."""
    main.tick_params(axis="x", length=0, labelbottom=False)
    strip.set_xlim(-0.7, max(len(depth.keys), 1) - 0.3)
    for _, start, end in depth.runs()[1::2]:
        for axes in (main, strip):
            axes.axvspan(start - 0.5, end - 0.5, color="#F5F5F7", zorder=0, linewidth=0)


def _colored(series: Sequence[Series], depth: Depth) -> list[tuple[str, Any]]:
    """Say what each colour stands for: a checkpoint where there are several, else a part of the model that moved."""
    if len(series) > 1:
        titles = [(each.title, _series_color(number, len(series))) for number, each in enumerate(series)]
        return titles[:: -(-len(titles) // _MAX_TITLES)]
    colors = _group_colors(depth)
    seen = {depth.groups[point.index] for point in series[0].moved}
    return [(group, colors[group]) for group in dict.fromkeys(depth.groups) if group in seen]


def _add_legend(axes: Axes, colored: Sequence[tuple[str, Any]], with_vectors: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, marker="o", linewidth=0, label=_literal(name)) for name, color in colored]
    if with_vectors:
        style: dict[str, Any] = {"color": "#444444", "linewidth": 0, "markeredgewidth": 1.1, "marker": "o"}
        handles.append(Line2D([], [], markersize=6, label="matrix or larger", **style))
        handles.append(Line2D([], [], markersize=4, markerfacecolor="white", label=_VECTOR, **style))
    if handles:
        box = axes.legend(handles=handles, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        for text in box.get_texts():
            text.set_parse_math(False)


def _literal(name: str) -> str:
    """Keep a name that matplotlib would leave out of a legend: one that starts with an underscore."""
    return f"\u200a{name}" if name.startswith("_") else name
