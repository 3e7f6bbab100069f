"""Where the reports of verify go: each in its format, to a file or to stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptool import __version__
from ckptool.cli.terminal import Terminal, canvas_of, show
from ckptool.errors import CkptoolError, OutputRefused
from ckptool.formats.file import is_folder
from ckptool.model.conversion import OUTPUT_SUFFIXES
from ckptool.model.places import is_same_file
from ckptool.model.verification import CheckStatus, SideBySide, Verification

_STDOUT = "-"


@dataclass(frozen=True, slots=True)
class Answer:
    """Hold what is reported: the verifications, what sets them side by side, and the statuses that mean no."""

    verifications: Sequence[Verification]
    beside: SideBySide | None
    gate: frozenset[CheckStatus]


@dataclass(frozen=True, slots=True)
class ReportTarget:
    """Name a format, and the file to write it to; None is stdout."""

    format: str
    path: Path | None


def report_targets(texts: Sequence[str], paths: Sequence[Path], *, json: bool) -> list[ReportTarget]:
    """Read what ``--output`` and ``--json`` ask for; text goes to stdout where nothing else does.

    :raises CkptoolError: a format is unknown, two reports have one place, or the place is that of a checkpoint.
    """
    targets = [_target(text) for text in texts] + ([ReportTarget("json", None)] if json else [])
    places = [target.path for target in targets]
    for target in targets:
        if places.count(target.path) > 1:
            raise CkptoolError(
                f"--output: two reports would go to {target.path or 'stdout'}; name a file for one of them"
            )
        if target.path is not None:
            refuse_place(target.path, paths)
    return targets if None in places else [*targets, ReportTarget("text", None)]


def _target(text: str) -> ReportTarget:
    name, _, place = text.partition("=")
    if name not in FORMATS:
        raise CkptoolError(f"--output {text}: write it as FORMAT=FILE; the formats are {', '.join(FORMATS)}")
    return ReportTarget(name, None if place in ("", _STDOUT) else Path(place))


def refuse_place(path: Path, paths: Iterable[Path]) -> None:
    """Refuse before the work begins what could not be written, and what would replace one of the checkpoints.

    :raises OutputRefused: it is so.
    """
    if path.suffix.lower() in OUTPUT_SUFFIXES or any(is_same_file(path, other) for other in paths):
        raise OutputRefused(f"{path}: is named as a checkpoint is; choose another name")
    if not is_folder(path.parent):
        raise OutputRefused(f"{path}: its folder does not exist; create it first")


def write_reports(targets: Sequence[ReportTarget], answer: Answer, terminal: Terminal) -> None:
    """Write every report, that to stdout last: it has no part in what hinders a file.

    :raises OutputRefused: a file cannot be written; all others are.
    """
    refusals = []
    for target in targets:
        if target.path is not None:
            try:
                _publish(target.path, FORMATS[target.format](answer))
            except OutputRefused as refusal:
                refusals.append(refusal)
    for target in targets:
        if target.path is None and (target.format != "text" or not terminal.quiet):
            show(_view(answer, terminal) if target.format == "text" else FORMATS[target.format](answer))
    if refusals:
        raise refusals[0]


def _publish(path: Path, text: str) -> None:
    from ckptool.writers import staging

    with staging(path, force=True) as staged:
        staged.file.write(text.encode("utf-8", "backslashreplace"))
        staged.publish()


def _view(answer: Answer, terminal: Terminal) -> str:
    if not terminal.is_terminal:
        return _text(answer)
    from ckptool.reports.verify_view import view_all

    return view_all(answer.verifications, answer.beside, canvas_of(terminal))


def _text(answer: Answer) -> str:
    from ckptool.reports.verify import all_lines

    return "".join([f"{line}\n" for line in all_lines(answer.verifications, answer.beside)])


def _json(answer: Answer) -> str:
    from ckptool.reports import verify

    return verify.answer(answer.verifications, answer.beside)


def _junit(answer: Answer) -> str:
    from ckptool.reports.junit import write_junit

    return write_junit(answer.verifications, answer.gate)


def _sarif(answer: Answer) -> str:
    from ckptool.reports.sarif import write_sarif

    return write_sarif(answer.verifications, answer.gate, __version__)


def _github(answer: Answer) -> str:
    from ckptool.reports.github import write_github

    return write_github(answer.verifications, answer.gate)


def _markdown(answer: Answer) -> str:
    from ckptool.reports.markdown import write_markdown

    return write_markdown(answer.verifications)


FORMATS: Mapping[str, Callable[[Answer], str]] = {
    "text": _text,
    "json": _json,
    "junit": _junit,
    "sarif": _sarif,
    "github": _github,
    "markdown": _markdown,
}
