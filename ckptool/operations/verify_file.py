"""Verify a file by itself, without a model and without torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckptool.errors import ChecksumMismatch, CkptoolError, IncompleteCheckpoint, UnreadableCheckpoint
from ckptool.formats import open_checkpoint
from ckptool.model.sources import Progress
from ckptool.model.verification import Check, Verification, VerifyOptions, verdict_of
from ckptool.operations.agreement import GOLDEN_KEY, check_digest, check_tensors, digest_of, view_other
from ckptool.operations.health import check_file, check_safety
from ckptool.operations.opening import OpenedCheckpoint, open_path
from ckptool.operations.suggest import suggest


def verify_file(path: Path, options: VerifyOptions, progress: Progress) -> Verification:
    """Check the container, its pickle, its keys and its values, in one pass over the bytes.

    A file that cannot be read is no error here: its verdict says so, beside what its pickle told until then. With
    ``against`` the tensors are compared with those of the other file.

    :raises CkptoolError: the other file cannot be read, or no check that is asked for can be made.
    """
    try:
        with open_checkpoint(path) as checkpoint:
            opened = OpenedCheckpoint(checkpoint, options.weights, options.keys)
            made = check_file(opened, options, progress)
            suggestion = suggest(opened)
            if options.against is not None and is_wanted("agreement.tensors", options):
                made += (_check_against(opened, options.against, options, progress),)
    except UnreadableCheckpoint as error:
        return unreadable(path, error, options)
    checks = wanted(made, options)
    return Verification(str(path), verdict_of(checks), checks, suggestion=suggestion, thresholds=options.thresholds)


def _check_against(opened: OpenedCheckpoint, path: Path, options: VerifyOptions, progress: Progress) -> Check:
    """Compare with another checkpoint, or with the digest that a golden file keeps."""
    try:
        with open_path(path) as other:
            if GOLDEN_KEY in other.checkpoint.metadata:
                return _with_advice(check_digest(digest_of(opened), other.checkpoint.metadata.get("digest"), path))
            return check_tensors(opened, view_other(other, options), options, progress)[0]
    except UnreadableCheckpoint as error:  # not the file that is judged
        raise CkptoolError(str(error)) from error


def _with_advice(check: Check) -> Check:
    """Leave open what only answers can decide: without a model there are none."""
    if check.status != "skip":
        return check
    return replace(check, status="inconclusive", advice="ask a model for its answers, too: name it with --model")


def unreadable(path: Path, error: UnreadableCheckpoint, options: VerifyOptions) -> Verification:
    """Answer for a file that cannot be read: proven damage or a missing part fails, the rest is an error."""
    is_damaged = isinstance(error, ChecksumMismatch | IncompleteCheckpoint)
    integrity = Check("integrity", "fail", str(error))
    safety = check_safety(error.globals, ())
    checks = (integrity,) if safety.status == "pass" else (integrity, safety)  # what was not read is not safe
    if is_damaged:
        return Verification(str(path), "fail", checks, thresholds=options.thresholds)
    return Verification(str(path), "error", checks, error=str(error), thresholds=options.thresholds)


def wanted(checks: tuple[Check, ...], options: VerifyOptions) -> tuple[Check, ...]:
    """Keep the checks that are asked for: by id, or by the part before its dot.

    :raises CkptoolError: none of them was made, which is no pass.
    """
    kept = tuple(check for check in checks if is_wanted(check.id, options))
    if not kept:
        raise CkptoolError("--checks and --skip-checks leave no check that can be made here; name others, or a --model")
    return kept


def is_wanted(check_id: str, options: VerifyOptions) -> bool:
    """Tell whether ``--checks`` and ``--skip-checks`` ask for a check."""
    names = {check_id, check_id.partition(".")[0]}
    return (not options.checks or bool(names.intersection(options.checks))) and not names.intersection(
        options.skip_checks
    )
