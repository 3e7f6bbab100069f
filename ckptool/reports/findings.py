"""What of a verification a pipeline has to hear of, in the words that every report format shares."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckptool.model.verification import Check, CheckStatus, Verdict, Verification
from ckptool.reports.text import plural

Level = Literal["error", "warning"]

MEANINGS: dict[Verdict, str] = {
    "pass": "sound",
    "fail": "not sound",
    "inconclusive": "not settled",
    "error": "not answered",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Name one thing that is wrong with, or open about, one checkpoint.

    ``check`` is None where there is no answer at all. ``text`` is not yet escaped.
    """

    path: str
    level: Level
    text: str
    check: Check | None = None

    @property
    def title(self) -> str:
        """Name the check: ``CK401 values.finite``."""
        return "ckptool verify" if self.check is None else title_of(self.check)


def title_of(check: Check) -> str:
    """Give the number and the name of a check."""
    return f"{check.code} {check.id}"


def is_address(path: str) -> bool:
    """Tell whether a checkpoint is not on this disk (``https://...``)."""
    return "://" in path


def place_of(path: str) -> str:
    """Write a path with slashes, as pipelines do on every system; an address stays what it is."""
    return path if is_address(path) else Path(path).as_posix()


def findings(verification: Verification, gate: Collection[CheckStatus]) -> Iterator[Finding]:
    """Yield what did not pass and is not allowed; ``gate`` holds the statuses that mean no."""
    if unsaid_error(verification) is not None:
        yield Finding(verification.path, "error", f"could not be answered: {verification.error}")
    for check in verification.checks:
        if check.status in ("fail", "warn", "inconclusive") and not check.allowed:
            yield Finding(verification.path, level_of(check, gate), sentence(check), check)


def unsaid_error(verification: Verification) -> str | None:
    """Give the reason for which there is no answer, unless a check says it."""
    said = any(check.message == verification.error and check.status == "fail" for check in verification.checks)
    return None if said else verification.error


def level_of(check: Check, gate: Collection[CheckStatus]) -> Level:
    """Tell how loud a finding is: what can end in another exit status than 0 is an error."""
    return "warning" if check.status == "warn" and "warn" not in gate else "error"


def sentence(check: Check) -> str:
    """Say what was found, that it is open where it is, and what to do about it."""
    opening = "not settled: " if check.status == "inconclusive" else ""
    return f"{opening}{check.message}" + (f"; remedy: {check.advice}" if check.advice else "")


def summary(verifications: Sequence[Verification]) -> str:
    """Count the verdicts: ``3 checkpoints: 2 sound, 1 not sound``."""
    verdicts = [verification.verdict for verification in verifications]
    counts = [f"{verdicts.count(verdict)} {meaning}" for verdict, meaning in MEANINGS.items() if verdict in verdicts]
    return f"{plural(len(verdicts), 'checkpoint')}: {', '.join(counts)}"
