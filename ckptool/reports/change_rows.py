"""How far tensors and modules moved, as aligned rows with bars: the most changed, the tree, the drift of several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.cells import cell_len

from ckptool.model.comparison import Drift, ModuleChange, ValueChange
from ckptool.reports.canvas import Canvas
from ckptool.reports.columns import Column, Row, padded, table_lines, wrap_items
from ckptool.reports.text import file_names, plural, safe_text, shorten

_LONGEST_NAME = 200
_WIDEST_BAR = 20
_WIDEST_TREE = 0.5  # of a line, for the names of a tree
_UNKNOWN = "-"


def change_text(relative: float | None) -> str:
    """Write a relative change in percent; ``from zero`` where there was nothing before."""
    if relative is None:
        return _UNKNOWN
    if not math.isfinite(relative):
        return "NaN" if relative != relative else "inf"
    percent = 100 * relative
    return f"{percent:,.0f}%" if 1000 <= percent < 1e9 else f"{percent:.3g}%"


def change_listing(changed: Sequence[ValueChange], top: int, canvas: Canvas) -> str:
    """List the most changed tensors in aligned columns, and how many more there are."""
    shown = changed[:top]
    lines = list(table_lines("most changed", [_row(value) for value in shown], _columns(shown, canvas), canvas))
    if len(changed) > len(shown):
        lines.append(canvas.paint(f"... and {len(changed) - len(shown):,} more: --top N lists N", "dim"))
    return "".join([f"{line}\n" for line in lines])


def _row(value: ValueChange) -> Row:
    return Row(_name(value.key), style="red" if value.broken else "")


def _name(text: str) -> str:
    return safe_text(shorten(text, _LONGEST_NAME))


def _columns(shown: Sequence[ValueChange], canvas: Canvas) -> list[Column]:
    bars = change_bars([None if value.is_counter else value.relative_change for value in shown], canvas)
    columns = [
        Column("", bars, 8, "<", "yellow"),
        Column("change", tuple([_told(value) for value in shown])),
        Column("max abs", tuple([_number(value.max_abs) for value in shown]), 7),
        Column("elements", tuple([_share(value) for value in shown]), 6),
        Column("cosine", tuple([_UNKNOWN if value.cosine is None else f"{value.cosine:.5f}" for value in shown]), 5),
    ]
    return [column for column in columns if set(column.cells) != {_UNKNOWN}]


def _told(value: ValueChange) -> str:
    """Say in percent how far it moved, or in words what percent cannot say."""
    if value.broken:
        return f"{value.broken:,} broken"
    if value.is_counter:
        return "counted on"
    return "from zero" if value.relative_change == math.inf else change_text(value.relative_change)


def _number(number: float | int | None) -> str:
    return _UNKNOWN if number is None else "NaN" if number != number else f"{number:.3g}"


def _share(value: ValueChange) -> str:
    if not value.changed or not value.elements:
        return _UNKNOWN
    percent = math.floor(1000 * value.changed / value.elements) / 10  # all but one element is less than 100%
    return f"{percent:g}%" if percent >= 1 else f"{value.changed:,}"


def change_bars(changes: Sequence[float | None], canvas: Canvas) -> tuple[str, ...]:
    """Draw a bar for each relative change, against the largest; whatever moved has one, and NaN a full one."""
    width = min(max(canvas.width // 8, 6), _WIDEST_BAR)
    largest = max((change for change in changes if change is not None and math.isfinite(change)), default=0.0)
    return tuple([canvas.glyphs.bar * _cells(change, largest, width) for change in changes])


def _cells(change: float | None, largest: float, width: int) -> int:
    if not change:
        return 0
    return max(round(width * change / largest), 1) if math.isfinite(change) else width


def tree_listing(root: ModuleChange, canvas: Canvas) -> str:
    """Draw the modules as a tree with the relative change of each; what is frozen is one line."""
    branches = list(_branches(root, "", "", canvas))
    bars = change_bars([branch.node.relative_change for branch in branches], canvas)
    lead = max([branch.width for branch in branches if branch.width <= _WIDEST_TREE * canvas.width], default=0)
    lines = []
    for branch, bar in zip(branches, bars, strict=True):
        first = canvas.paint(branch.lead, "dim") + canvas.paint(branch.name, "dim" if branch.node.is_frozen else "bold")
        filled = f"\n{canvas.paint(padded(branch.below, lead), 'dim')}" if branch.width > lead else ""
        filled = filled or " " * (lead - branch.width)
        lines.append(first + filled + _movement(branch, lead, bar, max(map(cell_len, bars)), canvas))
    return "".join([f"{line}\n" for line in lines])


class _Branch(NamedTuple):
    """Hold one line of a tree: what is drawn before the name, and before what goes on below it."""

    lead: str
    below: str
    node: ModuleChange

    @property
    def name(self) -> str:
        return _name(self.node.name or "(model)")

    @property
    def width(self) -> int:
        return cell_len(self.lead) + cell_len(self.name)


def _branches(node: ModuleChange, lead: str, below: str, canvas: Canvas) -> Iterator[_Branch]:
    yield _Branch(lead, below, node)
    if node.is_frozen or _only_side(node) or _holds_only_tensors(node):
        return
    for branch in canvas.branches(node.children, below):
        yield from _branches(*branch, canvas)


def _holds_only_tensors(node: ModuleChange) -> bool:
    return all(child.key and not child.children for child in node.children)


def _movement(branch: _Branch, lead: int, bar: str, bar_width: int, canvas: Canvas) -> str:
    node = branch.node
    if node.is_frozen:
        return canvas.paint(f"  {'frozen':>8}  {plural(node.tensors, 'tensor')}", "dim")
    told = f"  {change_text(node.relative_change) if node.change_norm else '':>8}  "
    indent = lead + len(told) + bar_width + 2
    fate = wrap_items(_fates(node), ", ", max(canvas.width - indent, 20))
    start = told + canvas.paint(padded(bar, bar_width), "yellow") + "  "
    joint = "\n" + canvas.paint(padded(branch.below, indent), "dim")
    return (start + joint.join([canvas.paint(line, "dim") for line in fate])).rstrip()


def _fates(node: ModuleChange) -> list[str]:
    if _only_side(node):
        return [f"{plural(node.tensors, 'tensor')} {_only_side(node)}"]
    if not node.children:
        return [] if node.change_norm and not node.broken else [_leaf_fate(node)]
    if len(node.children) == 1 and node.change_norm and not node.broken and _holds_only_tensors(node):
        return [_name(node.children[0].name)]
    if _holds_only_tensors(node):
        return [f"{_name(child.name)} {_leaf_fate(child)}" for child in node.children]
    counts = ((node.moved, "changed"), (node.only_in_a, "only in A"), (node.only_in_b, "only in B"))
    told = [f"{count:,} {what}" for count, what in counts if count]
    told[-1] += f" of {plural(node.tensors, 'tensor')}"
    return [*told, f"{plural(node.broken, 'element')} broken"] if node.broken else told


def _only_side(node: ModuleChange) -> str:
    sides = {"only in A": node.only_in_a, "only in B": node.only_in_b}
    return next((side for side, count in sides.items() if count == node.tensors), "")


def _leaf_fate(leaf: ModuleChange) -> str:
    if leaf.is_frozen:
        return "frozen"
    if leaf.broken:
        return f"{leaf.broken:,} broken"
    if leaf.change_norm:
        return change_text(leaf.relative_change)
    return _only_side(leaf) or ("counted on" if leaf.changed else "of another kind")


def drift_listing(drifts: Sequence[Drift], canvas: Canvas) -> str:
    """List several checkpoints against their base, a row each, and below them those without an answer."""
    answered = [drift for drift in drifts if drift.error is None]
    lines = list(_drift_lines(answered, canvas)) if answered else []
    for drift in drifts:
        if drift.error is not None:
            lines.append(canvas.paint(f"{canvas.glyphs.no} {_name(drift.path)}: could not be compared", "red"))
    return "".join([f"{line}\n" for line in lines])


def _drift_lines(drifts: Sequence[Drift], canvas: Canvas) -> Iterator[str]:
    names = [_name(name) for name in file_names([drift.path for drift in drifts])]
    styles = {True: "green", False: "", None: "red"}
    rows = [Row(name, style=styles[drift.same]) for name, drift in zip(names, drifts, strict=True)]
    changes = [drift.relative_change for drift in drifts]
    columns = [
        Column("epoch", tuple([_count(drift.progress.epoch) for drift in drifts]), 7),
        Column("step", tuple([_count(drift.progress.global_step) for drift in drifts]), 4),
        Column("", change_bars(changes, canvas), 8, "<", "yellow"),
        Column("change", tuple([_drift_told(drift) for drift in drifts])),
        Column("changed", tuple([f"{drift.moved:,} of {drift.tensors:,}" for drift in drifts]), 6),
        Column("structure", tuple([_count(drift.structure or None) for drift in drifts]), 5),
        Column("max abs", tuple([_number(drift.max_abs) if drift.moved else _UNKNOWN for drift in drifts]), 3),
        Column("cosine", tuple([_UNKNOWN if drift.cosine is None else f"{drift.cosine:.5f}" for drift in drifts]), 2),
        Column("most changed", tuple([_name(drift.most_changed or _UNKNOWN) for drift in drifts]), 1, "<"),
    ]
    return table_lines("file", rows, [column for column in columns if set(column.cells) != {_UNKNOWN}], canvas)


def _drift_told(drift: Drift) -> str:
    return {True: "same", None: "unknown"}.get(drift.same) or change_text(drift.relative_change)


def _count(count: int | None) -> str:
    return _UNKNOWN if count is None else f"{count:,}"
