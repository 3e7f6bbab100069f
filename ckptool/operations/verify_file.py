"""Verify a file by itself, without a model and without torch."""

from __future__ import annotations

from pathlib import Path

from ckptool.errors import ChecksumMismatch, UnreadableCheckpoint
from ckptool.formats import open_checkpoint
from ckptool.model.sources import Progress
from ckptool.model.verification import Check, Verification, VerifyOptions, verdict_of
from ckptool.operations.health import check_file, check_safety
from ckptool.operations.opening import OpenedCheckpoint
from ckptool.operations.suggest import suggest


def verify_file(path: Path, options: VerifyOptions, progress: Progress) -> Verification:
    """Check the container, its pickle, its keys and its values, in one pass over the bytes.

    A file that cannot be read is no error here: its verdict says so, beside what its pickle told until then.
    """
    try:
        with open_checkpoint(path) as checkpoint:
            opened = OpenedCheckpoint(checkpoint)
            checks = wanted(check_file(opened, options, progress), options)
            suggestion = suggest(opened)
    except UnreadableCheckpoint as error:
        return unreadable(path, error, options)
    return Verification(str(path), verdict_of(checks), checks, suggestion=suggestion, thresholds=options.thresholds)


def unreadable(path: Path, error: UnreadableCheckpoint, options: VerifyOptions) -> Verification:
    """Answer for a file that cannot be read: damage that a checksum proves is a failure, the rest an error."""
    damaged = isinstance(error, ChecksumMismatch)
    integrity = Check("integrity", "fail", str(error), advice="get the file again from where it came from")
    safety = (check_safety(error.globals, ()),) if error.globals else ()
    checks = (integrity, *safety)
    return Verification(str(path), "fail" if damaged else "error", checks, thresholds=options.thresholds)


def wanted(checks: tuple[Check, ...], options: VerifyOptions) -> tuple[Check, ...]:
    """Keep the checks that are asked for: by id, or by the part before its dot."""
    return tuple(check for check in checks if is_wanted(check.id, options))


def is_wanted(check_id: str, options: VerifyOptions) -> bool:
    """Tell whether ``--checks`` and ``--skip-checks`` ask for a check."""
    names = {check_id, check_id.partition(".")[0]}
    return (not options.checks or bool(names.intersection(options.checks))) and not names.intersection(
        options.skip_checks
    )
