"""What diff found, for a person at a terminal: what is the same, what is not, and how far it moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.panel import Panel
from rich.text import Text

from ckptool.model.comparison import Comparison, Drift, DTypeChange, FactChange, Progressed, TensorName
from ckptool.model.plans import Wrapper
from ckptool.reports.canvas import Canvas
from ckptool.reports.change_rows import change_listing, drift_listing, tree_listing
from ckptool.reports.parts import MAX_SHOWN, Lines, flow, foreign, line, say_rest, section_grid, stacked_bar
from ckptool.reports.phrases import format_phrase, value_phrase
from ckptool.reports.text import plural, shape_text

_MAX_TENSORS = 20
_LONGEST_VALUE = 60
_VERDICTS = {"same": "bold green", "different": "bold yellow", "unknown": "bold red"}


def view(found: Comparison, top: int | None, canvas: Canvas) -> str:
    """Draw one comparison; ``top`` is how many of the changed tensors are listed, 20 unless it says."""
    parts = [canvas.draw(_head(found, canvas)), *_sections(found, canvas)]
    if found.tree is not None and found.differs:
        parts.append(tree_listing(found.tree, canvas))
    if found.changed and (found.tree is None or top is not None):
        parts.append(change_listing(found.changed, _MAX_TENSORS if top is None else top, canvas))
    return "\n".join(parts)


def drift_view(base: str, drifts: Sequence[Drift], canvas: Canvas) -> str:
    """Draw several comparisons with one base: a row each, in the order in which they were named."""
    head = line(("A  ", "bold cyan"), foreign(base, "bold"), (f"  and {plural(len(drifts), 'other')}", "dim"))
    return canvas.draw(head) + "\n" + drift_listing(drifts, canvas)


def _head(found: Comparison, canvas: Canvas) -> Panel:
    verdict = "same" if found.same else "different" if found.differs else "unknown"
    sides = (
        ("A", found.path_a, found.format_a, found.progress_a),
        ("B", found.path_b, found.format_b, found.progress_b),
    )
    lines = [_side(*side, canvas) for side in sides]
    lines.append(line((verdict.upper(), _VERDICTS[verdict]), f"  {_meaning(found)}"))
    border = box.ROUNDED if canvas.unicode else box.ASCII
    return Panel(Text("\n").join(lines), border_style=_VERDICTS[verdict].removeprefix("bold "), box=border)


def _side(letter: str, path: str, container: str, progress: Progressed, canvas: Canvas) -> Text:
    trained = [("epoch", progress.epoch), ("step", progress.global_step)]
    facts = [format_phrase(container), *(f"{name} {count:,}" for name, count in trained if count is not None)]
    between = f" {canvas.glyphs.dot} "
    return line((f"{letter}  ", "bold cyan"), foreign(path, "bold"), "  ", (between.join(filter(None, facts)), "dim"))


def _meaning(found: Comparison) -> str:
    if found.differs:
        kinds = {
            "names": found.only_in_a or found.only_in_b or found.renamed,
            "shapes": found.shape,
            "dtypes": found.dtype,
            "values": found.changed,
            "entries": found.entries,
            "metadata": found.metadata,
        }
        return f"in {_listed([kind for kind, changes in kinds.items() if changes])}"
    if not found.same:
        return "there are tensors of which nothing can be told"
    if not found.options.values:
        return "in names, shapes and dtypes; the values were not read"
    if found.identical == len(found.names):
        return f"{plural(found.identical, 'tensor')}, equal to the last bit"
    near = any(value.outcome == "close" for value in found.values)
    return f"within rtol {found.options.rtol:g}, atol {found.options.atol:g}" if near else "in every number"


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def _sections(found: Comparison, canvas: Canvas) -> Iterator[str]:
    grid = section_grid((title, draw(found, canvas)) for title, draw in _SECTIONS.items())
    if grid.row_count:
        yield canvas.draw(grid)


class _Share(NamedTuple):
    """Say how many tensors met one fate; ``mark`` tells it where colour does not."""

    tensors: int
    name: str
    mark: str
    style: str


def _shares(found: Comparison) -> Iterator[_Share]:
    outcomes = Counter(value.outcome for value in found.values)
    recast = {change.key for change in found.dtype if change.same_values}
    other_bytes = outcomes["same"] - len(recast)
    yield _Share(outcomes["changed"], "changed", "#", "yellow")
    yield _Share(len(found.shape), "of another shape", "!", "magenta")
    yield _Share(outcomes["unknown"], "unknown", "?", "bright_red")
    yield _Share(len(found.only_in_a), "only in A", "<", "red")
    yield _Share(len(found.only_in_b), "only in B", ">", "blue")
    yield _Share(len(found.renamed), "renamed", "@", "bright_cyan")
    yield _Share(outcomes["close"], "within tolerance", "%", "cyan")
    yield _Share(len(recast), "same values in another dtype", "~", "bright_green")
    yield _Share(other_bytes, "same numbers in other bytes", "-", "bright_black")
    yield _Share(found.identical, "identical", "=", "green")
    if not found.options.values:
        yield _Share(len(found.names) - len(found.shape), "of the same shape, values not read", "=", "green")


def _tensors(found: Comparison, canvas: Canvas) -> Lines:
    shares = [share for share in _shares(found) if share.tensors]
    marks = [canvas.glyphs.bar if canvas.color else share.mark for share in shares]
    marked = list(zip(marks, shares, strict=True))
    yield stacked_bar([(mark, share.tensors, share.style) for mark, share in marked], canvas)
    yield flow([Text(f"{mark} {share.tensors:,} {share.name}", share.style) for mark, share in marked], canvas, "  ")


def _names(found: Comparison, canvas: Canvas) -> Lines:
    for letter, wrappers in (("A", found.wrappers_a), ("B", found.wrappers_b)):
        taken = [wrapper for wrapper in wrappers if wrapper.segment]
        if taken:
            yield line((f"{letter}  ", "bold"), flow([_wrapper(wrapper) for wrapper in taken], canvas))


def _wrapper(wrapper: Wrapper) -> Text:
    return line(foreign(wrapper.segment, "bold"), f" taken off {wrapper.count:,} of {wrapper.of:,} names")


def _only_in_a(found: Comparison, canvas: Canvas) -> Lines:
    return _only(found.only_in_a, "red")


def _only_in_b(found: Comparison, canvas: Canvas) -> Lines:
    return _only(found.only_in_b, "blue")


def _only(names: Sequence[TensorName], style: str) -> Lines:
    for name in names[:MAX_SHOWN]:
        yield line(foreign(name.key, style), "  ", foreign(f"{name.dtype} {shape_text(name.shape)}", "dim"))
    yield from say_rest(len(names) - MAX_SHOWN, "--json")


def _renamed(found: Comparison, canvas: Canvas) -> Lines:
    for rename in found.renamed[:MAX_SHOWN]:
        yield _arrow(foreign(rename.a), foreign(rename.b, "bright_cyan"), canvas)
    yield from say_rest(len(found.renamed) - MAX_SHOWN, "--json")
    for open_case in found.ambiguous[:MAX_SHOWN]:
        before, after = (foreign(" or ".join(names)) for names in (open_case.a, open_case.b))
        yield line(_arrow(before, after, canvas), ("  equal tensors: which became which is open", "dim"))
    yield from say_rest(len(found.ambiguous) - MAX_SHOWN, "--json")


def _arrow(before: Text, after: Text, canvas: Canvas) -> Text:
    return line(before, (f" {canvas.glyphs.arrow} ", "dim"), after)


def _shapes(found: Comparison, canvas: Canvas) -> Lines:
    for change in found.shape[:MAX_SHOWN]:
        kinds = _arrow(foreign(change.a, "dim"), foreign(change.b, "magenta"), canvas)
        yield line(foreign(change.key), "  ", kinds)
    yield from say_rest(len(found.shape) - MAX_SHOWN, "--json")


_SURVIVED = {
    True: ("same values", "green"),
    False: ("other values", "yellow"),
    None: ("values that cannot be compared", "red"),
}


def _dtypes(found: Comparison, canvas: Canvas) -> Lines:
    groups: dict[tuple[str, str, bool | None], list[DTypeChange]] = {}
    for change in found.dtype:
        groups.setdefault((change.a, change.b, change.same_values), []).append(change)
    for (before, after, survived), changes in groups.items():
        kinds = _arrow(foreign(before, "dim"), foreign(after, "bold"), canvas)
        yield flow([kinds, plural(len(changes), "tensor"), Text(*_SURVIVED[survived])], canvas)


def _unknown(found: Comparison, canvas: Canvas) -> Lines:
    for value in found.unknown[:MAX_SHOWN]:
        yield line(foreign(value.key, "red"), "  ", foreign(value.detail, "dim"))
    yield from say_rest(len(found.unknown) - MAX_SHOWN, "--json")


def _entries(found: Comparison, canvas: Canvas) -> Lines:
    return _facts(found.entries, canvas)


def _metadata(found: Comparison, canvas: Canvas) -> Lines:
    if found.metadata == ():
        yield Text(f"{canvas.glyphs.yes} the same", "green")
    yield from _facts(found.metadata or (), canvas)


def _facts(changes: Sequence[FactChange], canvas: Canvas) -> Lines:
    for change in changes[: 2 * MAX_SHOWN]:
        group = "" if change.group == "entry" else f"{change.group.replace('_', ' ')}  "
        yield line((group, "dim"), foreign(change.path, "bold"), "  ", _fact(change, canvas))
    yield from say_rest(len(changes) - 2 * MAX_SHOWN, "--json")


def _fact(change: FactChange, canvas: Canvas) -> Text:
    before, after = (
        foreign(value_phrase(value), style, _LONGEST_VALUE)
        for value, style in ((change.before, "red"), (change.after, "green"))
    )
    if change.present == "both":
        return _arrow(before, after, canvas)
    return line(("only in A  ", "dim"), before) if change.present == "a" else line(("only in B  ", "dim"), after)


_SECTIONS: Mapping[str, Callable[[Comparison, Canvas], Lines]] = {
    "Tensors": _tensors,
    "Names": _names,
    "Only A": _only_in_a,
    "Only B": _only_in_b,
    "Renamed": _renamed,
    "Shapes": _shapes,
    "Dtypes": _dtypes,
    "Unknown": _unknown,
    "Entries": _entries,
    "Metadata": _metadata,
}
