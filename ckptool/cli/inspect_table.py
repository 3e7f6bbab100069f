"""Many checkpoints on one command line: a table, or the path of the best one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ckptool.cli import Status, options, worst
from ckptool.cli.inspect import TableOptions, describe_each, describe_open
from ckptool.cli.terminal import Terminal, canvas_of, complain, show
from ckptool.errors import CkptoolError
from ckptool.formats import open_checkpoint
from ckptool.formats.file import is_folder
from ckptool.model.folder import FileRow, Mode, Table
from ckptool.model.inspection import InspectOptions
from ckptool.model.places import as_path
from ckptool.operations.describe import judge_refused
from ckptool.operations.folder import Found, describe_row, find, read_row, unreadable_row
from ckptool.operations.parallel import map_in_order
from ckptool.operations.ranking import rank
from ckptool.reports.folder import table_document, table_lines
from ckptool.reports.inspect import SCHEMA, document, refused_document
from ckptool.reports.json import to_json
from ckptool.reports.text import safe_text

Answer = tuple[FileRow, dict[str, Any]]

_STDIN = Path("-")
_MODES: dict[str, Mode] = {"min": "min", "max": "max"}


def answer_table(
    paths: list[Path], asked: InspectOptions, choice: TableOptions, view: options.AnswerOptions, terminal: Terminal
) -> Status:
    """Read every checkpoint that the paths lead to and answer for all of them at once.

    :raises CkptoolError: the best one was asked for, or a metric, and nothing settles it.
    """
    mode = None if choice.mode is None else options.one_of("--mode", choice.mode, _MODES)
    found = find(_named(paths), recursive=choice.recursive)
    if (asked.lists_tensors or asked.tree) and not view.json and not choice.best:
        return _describe(found, asked, view, terminal)
    answers = tuple(_read(found, asked if view.json else None, choice.jobs, quiet=view.quiet or view.json))
    ranking = rank([row for row, _ in answers], choice.metric, mode)
    shown = _Shown(
        answers, Table(ranking, found.skipped), paths[0] if len(paths) == 1 and is_folder(paths[0]) else None, terminal
    )
    form = _form(choice, view, terminal)
    if form != "view" or len(answers) == 1:  # a view shows the reason in the row
        for error in shown.errors:
            complain(error)
    if len(answers) > 1 or not shown.errors:
        _require_answer(shown, choice)
        _PRINTERS[form](shown)
    return Status.UNANSWERED if shown.errors else Status.DONE


def _form(choice: TableOptions, view: options.AnswerOptions, terminal: Terminal) -> str:
    asked = (("json", view.json), ("best", choice.best), ("quiet", view.quiet), ("view", terminal.is_terminal))
    return next((form for form, is_wanted in asked if is_wanted), "lines")


@dataclass(frozen=True, slots=True)
class _Shown:
    """Hold what is printed; ``folder`` is the one that was named, if it was one."""

    answers: tuple[Answer, ...]
    table: Table
    folder: Path | None
    terminal: Terminal

    @property
    def errors(self) -> list[str]:
        return [row.error for row, _ in self.answers if row.error]


def _require_answer(shown: _Shown, choice: TableOptions) -> None:
    refusal = shown.table.ranking.refusal
    if refusal and (choice.best or choice.metric is not None):
        raise CkptoolError(f"{shown.folder}: {refusal}" if shown.folder is not None else refusal)


def _named(paths: Iterable[Path]) -> list[Path]:
    """Put the paths on standard input in the place of ``-``.

    :raises CkptoolError: there are none.
    """
    named = [given for path in paths for given in (_listed_paths() if path == _STDIN else [path])]
    if not named:
        raise CkptoolError("-: standard input names no path; give one a line, or end each with a NUL byte")
    return named


def _listed_paths() -> list[Path]:
    """Read paths: where a NUL byte is among them each ends with one (find -print0), else each is a line.

    :raises CkptoolError: standard input is closed, or cannot be read.
    """
    if sys.stdin is None:  # a shell's <&-
        raise CkptoolError("-: standard input is closed; give a path a line")
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise CkptoolError(f"-: standard input cannot be read ({error.strerror}); give a path a line") from error
    return [as_path(os.fsdecode(name)) for name in data.split(b"\0" if b"\0" in data else b"\n") if name]


def _describe(found: Found, asked: InspectOptions, view: options.AnswerOptions, terminal: Terminal) -> Status:
    """Describe one checkpoint after the other: lists of tensors fit into no table."""
    for error in found.errors.values():
        complain(error)
    readable = [path for path in found.paths if path not in found.errors]
    return worst(describe_each(readable, asked, view, terminal), Status.UNANSWERED if found.errors else Status.DONE)


def _read(found: Found, asked: InspectOptions | None, jobs: int | None, *, quiet: bool) -> Iterator[Answer]:
    from ckptool.reports.progress import ProgressBar

    readable = [path for path in found.paths if path not in found.errors]
    answers = map_in_order(partial(_read_one, asked), readable, jobs)
    with ProgressBar(quiet=quiet) as progress:
        progress.start("reading checkpoints", sum(map(_size, readable)))
        for path in found.paths:
            error = found.errors.get(path)
            if error is not None:
                yield unreadable_row(path, error), {"path": str(path), "error": error}
                continue
            row, document = next(answers)
            progress.advance(row.nbytes or 0)
            yield row, document


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


def _read_one(asked: InspectOptions | None, path: Path) -> Answer:
    """Read the row of a file, and its whole document where one is asked for."""
    if asked is None:
        return read_row(path), {}
    try:
        with open_checkpoint(path) as checkpoint:
            return describe_row(checkpoint, path), document(describe_open(checkpoint, asked))
    except CkptoolError as error:
        safety = judge_refused(error)
        return unreadable_row(path, str(error), safety.verdict), refused_document(str(path), str(error), safety)


def _print_json(shown: _Shown) -> None:
    rows, documents = zip(*shown.answers, strict=True)
    show(to_json({"schema": SCHEMA, **table_document(rows, documents, shown.table)}))


def _print_path(shown: _Shown) -> None:
    """Print the path of the best: escaped where it is looked at, byte for byte where a program takes it."""
    best = shown.table.ranking.best
    path = "" if best is None else best.path
    path = f"./{path}" if path.startswith("-") else path  # else the next command takes it for an option
    if sys.stdout.isatty() or (path.isascii() and path.isprintable()):
        show(safe_text(path) + "\n")
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(path) + b"\n")


def _print_view(shown: _Shown) -> None:
    from ckptool.reports.folder_view import view_table

    show(view_table(shown.table, shown.folder, canvas_of(shown.terminal)))


def _print_lines(shown: _Shown) -> None:
    show("".join([f"{line}\n" for line in table_lines(shown.table)]))


def _print_nothing(_: _Shown) -> None:
    pass


_PRINTERS: Mapping[str, Callable[[_Shown], None]] = {
    "json": _print_json,
    "best": _print_path,
    "quiet": _print_nothing,
    "view": _print_view,
    "lines": _print_lines,
}
