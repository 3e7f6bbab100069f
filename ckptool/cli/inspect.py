"""The command that describes checkpoints."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptool.cli import Status, options, worst
from ckptool.cli.app import command
from ckptool.cli.terminal import Terminal, complain, detect, show
from ckptool.errors import CkptoolError

if TYPE_CHECKING:  # its many result types would slow every other command's start
    from ckptool.model.inspection import Inspection, InspectOptions, SortOrder

_ORDERS: dict[str, SortOrder] = {
    "file": "file",
    "name": "name",
    "size": "size",
    "dtype": "dtype",
    "shape": "shape",
}


@dataclass(frozen=True, slots=True)
class ListOptions:
    """Which lists are shown."""

    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor under its clean name.")] = False
    tree: Annotated[bool, typer.Option("--tree", help="Show the modules as a tree, equal blocks folded.")] = False
    stats: Annotated[bool, typer.Option("--stats", help="Read the values: finite, zeros, min, max, mean, std.")] = False
    sort: Annotated[
        str, typer.Option("--sort", help="Order of --tensors: file, name, size, dtype or shape.", metavar="ORDER")
    ] = "file"


@command("inspect", "ckptool inspect last.ckpt")
def inspect(
    paths: options.Paths, choice: options.ChoiceOptions, lists: ListOptions, view: options.AnswerOptions
) -> Status:
    """Say what a checkpoint holds, and what its clean keys are.

    Reads the description alone, no tensor, and runs nothing; on a terminal for people, piped as tab-separated lines.
    """
    terminal = detect(view.color, view.quiet)
    asked = _asked(choice, lists)
    answers = [_answer(path, asked, view, terminal) for path in paths]
    several = len(paths) > 1
    if view.json and (several or answers[0].status is Status.DONE):
        _print_json([answer.document for answer in answers], several=several)
    return worst(*(answer.status for answer in answers))


@dataclass(frozen=True, slots=True)
class _Answer:
    """Hold what is known about one path; ``document`` is empty where the answer was already printed."""

    status: Status
    document: dict[str, Any]


def _answer(path: Path, asked: InspectOptions, view: options.AnswerOptions, terminal: Terminal) -> _Answer:
    try:
        inspection = _inspect_one(path, asked, quiet=view.quiet or view.json)
    except CkptoolError as error:
        complain(str(error))
        return _Answer(Status.UNANSWERED, {"path": str(path), "error": str(error)})
    if view.json:
        return _Answer(Status.DONE, _document(inspection))
    if not view.quiet:
        _print(inspection, terminal)
    return _Answer(Status.DONE, {})


def _asked(choice: options.ChoiceOptions, lists: ListOptions) -> InspectOptions:
    from ckptool.model.inspection import InspectOptions

    return InspectOptions(
        weights=choice.weights,
        # Globs choose what is listed; what the keys are does not depend on them.
        keys=replace(options.key_options(choice), include=(), exclude=()),
        tensors=lists.tensors,
        tree=lists.tree,
        statistics=lists.stats,
        sort=options.one_of("--sort", lists.sort, _ORDERS),
        include=tuple(choice.include or ()),
        exclude=tuple(choice.exclude or ()),
    )


def _inspect_one(path: Path, asked: InspectOptions, *, quiet: bool) -> Inspection:
    from ckptool.formats import open_checkpoint
    from ckptool.operations.describe import describe
    from ckptool.reports.progress import ProgressBar

    with open_checkpoint(path) as checkpoint, ProgressBar(quiet=quiet) as progress:
        return describe(checkpoint, asked, progress)


def _document(inspection: Inspection) -> dict[str, Any]:
    from ckptool.reports.inspect import document

    return document(inspection)


def _print_json(answers: list[dict[str, Any]], *, several: bool) -> None:
    from ckptool.reports.inspect import SCHEMA
    from ckptool.reports.json import answer_json

    show(answer_json(SCHEMA, answers, several=several))


def _print(inspection: Inspection, terminal: Terminal) -> None:
    if terminal.is_terminal:
        from ckptool.reports.canvas import Canvas
        from ckptool.reports.inspect_view import view

        unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        show(view(inspection, Canvas(terminal.width, terminal.color, unicode)))
        return
    from ckptool.reports.inspect_lines import lines

    show("".join([f"{line}\n" for line in lines(inspection)]))
