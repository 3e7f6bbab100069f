"""What verify found, as Markdown for a pull request or the summary of a job."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ckptool.model.verification import Check, CheckStatus, Verification
from ckptool.reports.findings import MEANINGS, sentence, summary, title_of, unsaid_error
from ckptool.reports.text import plural, safe_text, shorten

_MAX_CHARACTERS = 60_000  # GitHub takes 65,536 in a comment
_MAX_MESSAGE = 600
# In the order in which they are shown: what matters most first.
_MARKS: dict[CheckStatus, str] = {
    "fail": "**fail**",
    "inconclusive": "**open**",
    "warn": "warn",
    "pass": "pass",
    "skip": "skip",
}
# What Markdown, HTML, a table or GitHub's own links and mentions would make something of.
_ACTIVE = re.compile(r"[&<>|\\`*_\[\]~$@#]|:(?=//)|(?<=www)\.", re.IGNORECASE)
_CALLING = frozenset("@#")


def write_markdown(verifications: Sequence[Verification]) -> str:
    """Write a headline, and for each checkpoint a table of its checks, those that passed folded away.

    What would be longer than a comment may be is left out, and counted.
    """
    blocks = [f"### ckptool verify: {summary(verifications)}\n"]
    room = _MAX_CHARACTERS - len(blocks[0])
    for number, verification in enumerate(verifications):
        block = "\n".join(_lines(verification)) + "\n"
        room -= len(block) + 1
        if room < 0:
            blocks.append(f"{plural(len(verifications) - number, 'checkpoint')} more: see another report format.\n")
            break
        blocks.append(block)
    return "\n".join(blocks)


def _lines(verification: Verification) -> Iterator[str]:
    yield f"#### {_code(verification.path)}: {MEANINGS[verification.verdict]}"
    error = unsaid_error(verification)
    if error is not None:
        yield from ("", _text(error))
    ranked = sorted(verification.checks, key=lambda check: list(_MARKS).index(check.status))
    loud = [check for check in ranked if check.status not in ("pass", "skip")]
    yield from _table(loud)
    quiet = ranked[len(loud) :]
    if quiet:
        passed = sum(check.status == "pass" for check in quiet)
        yield from ("", f"<details><summary>{passed} passed, {len(quiet) - passed} skipped</summary>")
        yield from (*_table(quiet), "", "</details>")
    for note in verification.notes:
        yield from ("", f"Note: {_text(note)}")


def _table(checks: Sequence[Check]) -> Iterator[str]:
    if checks:
        yield from ("", "| check | status | what was found |", "| --- | --- | --- |")
    for check in checks:
        allowed = f"allowed ({_text(check.allowed)}): " if check.allowed else ""
        mark = "allowed" if check.allowed else _MARKS[check.status]
        yield f"| {title_of(check)} | {mark} | {allowed}{_text(sentence(check))} |"


def _text(text: str) -> str:
    """Write foreign text so that it is shown as it is: no markup, no link, no mention of a person or an issue."""
    return _ACTIVE.sub(_as_inert, shorten(safe_text(text), _MAX_MESSAGE))


def _code(text: str) -> str:
    return f"<code>{_ACTIVE.sub(_as_number, shorten(safe_text(text), _MAX_MESSAGE))}</code>"


def _as_inert(match: re.Match[str]) -> str:
    # GitHub looks for mentions in the text that is shown, but not in code.
    return f"<code>{_as_number(match)}</code>" if match[0] in _CALLING else _as_number(match)


def _as_number(match: re.Match[str]) -> str:
    return f"&#{ord(match[0])};"
