"""The command that compares checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ckptool.cli import Status, options, worst
from ckptool.cli.app import command
from ckptool.cli.diff_plot import require_plot, write_plot
from ckptool.cli.terminal import Terminal, canvas_of, complain, detect, remark, show
from ckptool.errors import CkptoolError

if TYPE_CHECKING:  # its result types would slow every other command's start
    from ckptool.model.comparison import CompareOptions, Comparison, Drift

# Typer evaluates these on Python 3.10, too, where it wants Optional spelled out.
# ruff: noqa: UP045

_Paths = Annotated[
    list[Path],
    typer.Argument(
        help="A and B; or a base and several to compare with it.",
        show_default=False,
        metavar="[PATH]...",
        parser=options.as_place,
    ),
]


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """What is compared, and how much of it is shown."""

    exact_names: Annotated[
        bool, typer.Option("--exact-names", help="Compare the names as they stand in the files.")
    ] = False
    values: Annotated[
        bool, typer.Option("--values/--no-values", help="Compare values, or names, shapes and dtypes alone.")
    ] = True
    rtol: Annotated[float, typer.Option("--rtol", help="Same where |b - a| <= ATOL + RTOL * |a|.", metavar="RTOL")] = 0
    atol: Annotated[float, typer.Option("--atol", help="See --rtol; 0 and 0 is exact.", metavar="ATOL")] = 0
    metadata: Annotated[
        bool, typer.Option("--metadata", help="Compare hyperparameters, training facts, metadata and config.json.")
    ] = False
    tree: Annotated[bool, typer.Option("--tree", help="Sum up by module: which moved, which were frozen.")] = False
    top: Annotated[
        Optional[int], typer.Option("--top", help="List only the N most changed tensors.", metavar="N", min=0)
    ] = None
    plot: Annotated[
        Optional[Path],
        typer.Option("--plot", help="Draw relative change over depth: .svg, .png or .html.", metavar="FILE"),
    ] = None


@command("diff", "Say what changed between two checkpoints.", "ckptool diff epoch1.ckpt epoch2.ckpt --tree")
def diff(
    paths: _Paths,
    choice: options.ChoiceOptions,
    names: options.NameOptions,
    asked: DiffOptions,
    view: options.AnswerOptions,
) -> Status:
    """Say what changed between two checkpoints: names, shapes, dtypes, bytes, numbers.

    Names are compared clean, so any two containers can be; NaN equals NaN. Exit status: 0 same, 1 different, 2 could
    not compare. --map, --rename and --add-prefix change the names of A, all other options are for both.
    """
    if len(paths) < 2:
        raise CkptoolError("name two checkpoints, A and B; or a base and several others")
    terminal = detect(view.color, view.quiet)
    wanted = _wanted(choice, names, asked)
    if asked.plot is not None:
        require_plot(asked.plot)
    answers = [_answer(paths[0], other, wanted, view) for other in paths[1:]]
    _show(answers, asked.top, view, terminal)
    found = [answer.comparison for answer in answers if answer.comparison is not None]
    if asked.plot is not None and found:
        write_plot(asked.plot, found)
    return worst(*(answer.status for answer in answers))


@dataclass(frozen=True, slots=True)
class _Answer:
    """Hold what came out for one pair: a comparison, or the reason why there is none."""

    base: Path
    other: Path
    comparison: Comparison | None
    error: str = ""

    @property
    def status(self) -> Status:
        """Give the exit status of this pair."""
        if self.comparison is None:
            return Status.UNANSWERED
        if self.comparison.differs:
            return Status.NO
        return Status.DONE if self.comparison.same else Status.UNANSWERED


def _wanted(choice: options.ChoiceOptions, names: options.NameOptions, asked: DiffOptions) -> CompareOptions:
    from ckptool.model.comparison import CompareOptions

    for option, number in (("--rtol", asked.rtol), ("--atol", asked.atol)):
        if not (math.isfinite(number) and number >= 0):
            raise CkptoolError(f"{option} {number}: give a number from 0 on")
    needing = {"--tree": asked.tree, "--plot": asked.plot, "--rtol": asked.rtol, "--atol": asked.atol}
    idle = next((option for option, given in needing.items() if given), None)
    if idle is not None and not asked.values:
        raise CkptoolError(f"{idle}: is about values; leave out --no-values")
    return CompareOptions(
        weights=choice.weights,
        keys=options.key_options(choice, names),
        exact_names=asked.exact_names,
        values=asked.values,
        rtol=asked.rtol,
        atol=asked.atol,
        metadata=asked.metadata,
        tree=asked.tree,
    )


def _answer(base: Path, other: Path, wanted: CompareOptions, view: options.AnswerOptions) -> _Answer:
    from ckptool.operations.compare import compare_files
    from ckptool.reports.progress import ProgressBar

    try:
        with ProgressBar(quiet=view.quiet) as progress:
            return _Answer(base, other, compare_files(base, other, wanted, progress))
    except CkptoolError as error:
        complain(str(error))
        return _Answer(base, other, None, str(error))


def _show(answers: list[_Answer], top: int | None, view: options.AnswerOptions, terminal: Terminal) -> None:
    several = len(answers) > 1
    if view.json:
        if several or answers[0].comparison is not None:
            _print_json(answers, top, several=several)
        return
    if view.quiet:
        return
    found = [answer.comparison for answer in answers if answer.comparison is not None]
    for text in dict.fromkeys(note.text for comparison in found for note in comparison.notes):
        remark(text, terminal)
    _print(answers, top, terminal, several=several)


def _print_json(answers: list[_Answer], top: int | None, *, several: bool) -> None:
    from ckptool.reports import comparison as report

    documents: list[dict[str, Any]] = [
        report.document(answer.comparison, top)
        if answer.comparison is not None
        else {"a": str(answer.base), "b": str(answer.other), "error": answer.error}
        for answer in answers
    ]
    show(report.answer(documents, [_drift(answer) for answer in answers], several=several))


def _print(answers: list[_Answer], top: int | None, terminal: Terminal, *, several: bool) -> None:
    if terminal.is_terminal:
        _draw(answers, top, terminal, several=several)
        return
    from ckptool.reports import comparison as report

    found = answers[0].comparison
    if several:
        show("".join([f"{line}\n" for line in report.drift_lines([_drift(answer) for answer in answers])]))
    elif found is not None:
        show("".join([f"{line}\n" for line in report.lines(found, top)]))


def _draw(answers: list[_Answer], top: int | None, terminal: Terminal, *, several: bool) -> None:
    from ckptool.reports.comparison_view import drift_view, view

    found = answers[0].comparison
    if several:
        show(drift_view(str(answers[0].base), [_drift(answer) for answer in answers], canvas_of(terminal)))
    elif found is not None:
        show(view(found, top, canvas_of(terminal)))


def _drift(answer: _Answer) -> Drift:
    from ckptool.model.comparison import Drift, drift_of

    if answer.comparison is None:
        return Drift(str(answer.other), None, error=answer.error)
    return drift_of(answer.comparison)
