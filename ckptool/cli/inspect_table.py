"""Many checkpoints on one command line: a table, or the path of the best one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ckptool.cli import Status, options, worst
from ckptool.cli.inspect import TableOptions, canvas_of, describe_each
from ckptool.cli.terminal import Terminal, complain, show
from ckptool.errors import CkptoolError
from ckptool.formats import open_checkpoint
from ckptool.model.folder import FileRow, Mode, Ranking, Table
from ckptool.model.inspection import InspectOptions
from ckptool.operations.describe import describe, judge_refused
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
    answers = list(_read(found, asked if view.json else None, choice.jobs, quiet=view.quiet or view.json))
    rows = [row for row, _ in answers]
    table = Table(rank(rows, choice.metric, mode), found.skipped)
    unreadable = [row.error for row in rows if row.error]
    # A view shows the reason in the row.
    if view.json or view.quiet or choice.best or not terminal.is_terminal or len(rows) == 1:
        for error in unreadable:
            complain(error)
    if len(rows) > len(unreadable) or len(rows) > 1:
        _settle(table.ranking, choice, paths)
        _print(table, answers, paths, choice, view, terminal)
    return Status.UNANSWERED if unreadable else Status.DONE


def _named(paths: Iterable[Path]) -> list[Path]:
    """Put the paths on standard input in the place of ``-``.

    :raises CkptoolError: there are none.
    """
    named = [given for path in paths for given in (_listed_paths() if path == _STDIN else [path])]
    if not named:
        raise CkptoolError("-: standard input names no path; give one a line, or end each with a NUL byte")
    return named


def _listed_paths() -> list[Path]:
    """Read paths: where a NUL byte is among them each ends with one (find -print0), else each is a line."""
    data = sys.stdin.buffer.read()
    return [Path(os.fsdecode(name)) for name in data.split(b"\0" if b"\0" in data else b"\n") if name]


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
            return describe_row(checkpoint, path), document(describe(checkpoint, asked))
    except CkptoolError as error:
        return unreadable_row(path, str(error)), refused_document(str(path), str(error), judge_refused(error))


def _settle(ranking: Ranking, choice: TableOptions, paths: Sequence[Path]) -> None:
    if ranking.refusal and (choice.best or choice.metric is not None):
        raise CkptoolError(f"{paths[0]}: {ranking.refusal}" if len(paths) == 1 else ranking.refusal)


def _print(
    table: Table,
    answers: Sequence[Answer],
    paths: Sequence[Path],
    choice: TableOptions,
    view: options.AnswerOptions,
    terminal: Terminal,
) -> None:
    if view.json:
        rows, documents = zip(*answers, strict=True)
        show(to_json({"schema": SCHEMA, **table_document(rows, documents, table)}))
    elif choice.best:
        _print_path(table.ranking)
    elif not view.quiet and terminal.is_terminal:
        from ckptool.reports.folder_view import view_table

        show(view_table(table, paths[0] if len(paths) == 1 else None, canvas_of(terminal)))
    elif not view.quiet:
        show("".join([f"{line}\n" for line in table_lines(table)]))


def _print_path(ranking: Ranking) -> None:
    """Print the path of the best: escaped where it is looked at, byte for byte where a program takes it."""
    path = ranking.best.path if ranking.best is not None else ""
    path = f"./{path}" if path.startswith("-") else path  # else the next command takes it for an option
    if sys.stdout.isatty() or (path.isascii() and path.isprintable()):
        show(safe_text(path) + "\n")
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(path) + b"\n")
