"""Accept findings that a settings file names, in the very file that it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ckptool.errors import UnreadableCheckpoint
from ckptool.model.gate import Allowance
from ckptool.model.verification import Check, Verification, verdict_of
from ckptool.operations.file_hash import hash_file

_ACCEPTED = frozenset(("fail", "warn", "inconclusive"))


def allow(verification: Verification, allowances: Sequence[Allowance]) -> Verification:
    """Mark the findings that are accepted, and conclude anew; an answer that there is none stays.

    The file is read for its SHA-256 only where an allowance names a check that found something.
    """
    found = {check.id for check in verification.checks if check.status in _ACCEPTED}
    named = [allowance for allowance in allowances if allowance.check in found]
    if not named or not Path(verification.path).is_file():
        return verification
    try:
        sha256 = hash_file(Path(verification.path)).sha256
    except UnreadableCheckpoint:  # it has gone since: nothing is known of what is there now
        return verification
    reasons = {allowance.check: allowance.reason for allowance in named if allowance.sha256 == sha256}
    checks = tuple(_allowed(check, reasons) for check in verification.checks)
    verdict = verification.verdict if verification.verdict == "error" else verdict_of(checks)
    return replace(verification, checks=checks, verdict=verdict)


def _allowed(check: Check, reasons: dict[str, str]) -> Check:
    if check.status not in _ACCEPTED or check.id not in reasons:
        return check
    return replace(check, allowed=reasons[check.id])
