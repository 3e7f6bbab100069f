"""What verify found, as annotations of GitHub Actions: workflow commands, one a line.

GitHub shows ten errors and ten warnings of a step: what is more is counted in the last one. Source: GitHub's
documentation, "Workflow commands for GitHub Actions".
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain

from ckptool.model.verification import CheckStatus, Verification
from ckptool.reports.findings import Finding, Level, findings, place_of, summary
from ckptool.reports.text import safe_text, shorten

_MAX_SHOWN = 10
_MAX_CHARACTERS = 4000  # of a message; 4096 are shown
_LEVELS: tuple[Level, ...] = ("error", "warning")
_IN_DATA = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_IN_PROPERTY = {**_IN_DATA, ":": "%3A", ",": "%2C"}


def write_github(verifications: Sequence[Verification], gate: Collection[CheckStatus]) -> str:
    """Write the errors, then the warnings, then a line that counts the verdicts; ``gate``: the statuses that mean no.

    No line begins with foreign text, so none of it can be a command.
    """
    found = list(chain.from_iterable(findings(each, gate) for each in verifications))
    lines = [line for level in _LEVELS for line in _lines(level, [each for each in found if each.level == level])]
    return "".join(f"{line}\n" for line in (*lines, f"ckptool verify: {summary(verifications)}"))


def _lines(level: Level, found: Sequence[Finding]) -> list[str]:
    if len(found) <= _MAX_SHOWN:
        return [_annotation(finding) for finding in found]
    shown = found[: _MAX_SHOWN - 1]
    files = len({finding.path for finding in found[len(shown) :]})
    more = f"{len(found) - len(shown)} more findings in {files} checkpoint(s); another --output format lists all"
    return [*(_annotation(finding) for finding in shown), f"::{level} title=ckptool verify::{more}"]


def _annotation(finding: Finding) -> str:
    message = _escape(shorten(safe_text(finding.text), _MAX_CHARACTERS), _IN_DATA)
    file, title = (_escape(safe_text(text), _IN_PROPERTY) for text in (place_of(finding.path), finding.title))
    return f"::{finding.level} file={file},title={title}::{message}"


def _escape(text: str, table: dict[str, str]) -> str:
    return "".join([table.get(character, character) for character in text])
