"""The command that describes checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ckptool.cli import Status, options, worst
from ckptool.cli.app import command
from ckptool.cli.terminal import Terminal, canvas_of, complain, detect, show
from ckptool.errors import CkptoolError, UnreadableCheckpoint

if TYPE_CHECKING:  # its many result types would slow every other command's start
    from ckptool.model.checkpoint import Checkpoint
    from ckptool.model.inspection import Inspection, InspectOptions, Safety, SortOrder
    from ckptool.model.sources import Progress

# Typer evaluates these on Python 3.10, too, where it wants Optional spelled out.
# ruff: noqa: UP045

InspectPaths = Annotated[
    list[Path],
    typer.Argument(
        help="Checkpoint files, folders of them, addresses (https, s3, gs, hf), or - for paths on stdin.",
        show_default=False,
        metavar="[PATH]...",
        parser=options.as_place,
    ),
]
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
    architecture: Annotated[
        bool, typer.Option("--architecture/--no-architecture", help="Say what network it is, by names and shapes.")
    ] = True


@dataclass(frozen=True, slots=True)
class TableOptions:
    """How many checkpoints are compared."""

    best: Annotated[bool, typer.Option("--best", help="Print the path of the best checkpoint, nothing else.")] = False
    metric: Annotated[
        Optional[str], typer.Option("--metric", help="Rank by this metric, not by the monitored one.", metavar="NAME")
    ] = None
    mode: Annotated[Optional[str], typer.Option("--mode", help="What is better: min or max.", metavar="WHICH")] = None
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Look into the folders of a folder.")] = False
    jobs: Annotated[
        Optional[int], typer.Option("--jobs", help="Processes that read (else as many as pay off).", min=1, metavar="N")
    ] = None


@command("inspect", "Say what a checkpoint is, and what its keys become.", "ckptool inspect last.ckpt")
def inspect(
    paths: InspectPaths,
    choice: options.ChoiceOptions,
    lists: ListOptions,
    table: TableOptions,
    view: options.AnswerOptions,
) -> Status:
    """Say what a checkpoint holds, and what its clean keys are; of several, or of a folder, which is the best.

    Reads the description alone, no tensor, and runs nothing; on a terminal for people, piped as tab-separated lines.
    """
    terminal = detect(view.color, view.quiet)
    asked = _asked(choice, lists)
    if _is_table(paths, table):
        from ckptool.cli.inspect_table import answer_table

        return answer_table(paths, asked, table, view, terminal)
    return describe_each(paths, asked, view, terminal)


def _is_table(paths: Sequence[Path], table: TableOptions) -> bool:
    """Tell several checkpoints from one; a folder may be either."""
    if len(paths) > 1 or str(paths[0]) == "-" or table.best or table.metric is not None or table.mode is not None:
        return True
    try:
        if not paths[0].is_dir():
            return False
    except OSError:  # told when it is opened
        return False
    from ckptool.operations.folder import is_checkpoint_folder

    return table.recursive or not is_checkpoint_folder(paths[0])


def describe_each(
    paths: Sequence[Path], asked: InspectOptions, view: options.AnswerOptions, terminal: Terminal
) -> Status:
    """Answer for one path after the other."""
    answers = [_answer(path, asked, view, terminal) for path in paths]
    if view.json and answers[0].tells_more:
        _print_json(answers[0].document)
    return worst(*(answer.status for answer in answers))


@dataclass(frozen=True, slots=True)
class _Answer:
    """Hold what is known about one path; ``document`` is empty where the answer was already printed."""

    status: Status
    document: dict[str, Any]

    @property
    def tells_more(self) -> bool:
        """Tell whether the document says more than the sentence on stderr."""
        return "error" not in self.document or "safety" in self.document


def _answer(path: Path, asked: InspectOptions, view: options.AnswerOptions, terminal: Terminal) -> _Answer:
    try:
        inspection = _inspect_one(path, asked, quiet=view.quiet or view.json)
    except CkptoolError as error:
        complain(str(error))
        return _refused(path, error, view, terminal)
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
        architecture=lists.architecture,
        tensors=lists.tensors,
        tree=lists.tree,
        statistics=lists.stats,
        sort=options.one_of("--sort", lists.sort, _ORDERS),
        include=tuple(choice.include or ()),
        exclude=tuple(choice.exclude or ()),
    )


def _inspect_one(path: Path, asked: InspectOptions, *, quiet: bool) -> Inspection:
    from ckptool.formats import open_checkpoint
    from ckptool.reports.progress import ProgressBar

    with open_checkpoint(path) as checkpoint, ProgressBar(quiet=quiet) as progress:
        return describe_open(checkpoint, asked, progress)


def describe_open(checkpoint: Checkpoint, asked: InspectOptions, progress: Progress | None = None) -> Inspection:
    """Describe a checkpoint; what its pickle names stays known where its values cannot be read.

    :raises UnreadableCheckpoint: values were read, and are not those that were written.
    """
    from ckptool.operations.describe import describe

    try:
        return describe(checkpoint, asked, progress)
    except UnreadableCheckpoint as error:  # values that --stats reads: the pickle was read before them
        error.globals = checkpoint.globals
        raise


def _refused(path: Path, error: CkptoolError, view: options.AnswerOptions, terminal: Terminal) -> _Answer:
    """Tell what the pickle named before the file turned out to be unreadable: damage hides nothing."""
    from ckptool.operations.describe import judge_refused
    from ckptool.reports.inspect import refused_document

    safety = judge_refused(error)
    if safety.globals and not view.json and not view.quiet:
        _print_refused(str(path), safety, terminal)
    return _Answer(Status.UNANSWERED, refused_document(str(path), str(error), safety))


def _print_refused(path: str, safety: Safety, terminal: Terminal) -> None:
    if terminal.is_terminal:
        from ckptool.reports.inspect_view import refused_view

        show(refused_view(path, safety, canvas_of(terminal)))
        return
    from ckptool.reports.inspect_lines import refused_lines

    show("".join([f"{line}\n" for line in refused_lines(path, safety)]))


def _document(inspection: Inspection) -> dict[str, Any]:
    from ckptool.reports.inspect import document

    return document(inspection)


def _print_json(answer: dict[str, Any]) -> None:
    from ckptool.reports.inspect import SCHEMA
    from ckptool.reports.json import answer_json

    show(answer_json(SCHEMA, [answer], several=False))


def _print(inspection: Inspection, terminal: Terminal) -> None:
    if terminal.is_terminal:
        from ckptool.reports.inspect_view import view

        show(view(inspection, canvas_of(terminal)))
        return
    from ckptool.reports.inspect_lines import lines

    show("".join([f"{line}\n" for line in lines(inspection)]))
