"""Hold the tensors of two checkpoints of one model against each other: what they have in common is a check."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ckptool.layouts.segments import any_glob, quoted
from ckptool.model.sources import NoProgress, Progress
from ckptool.model.values import OpaqueTensor, TensorSpec
from ckptool.model.verification import Check, VerifyOptions
from ckptool.operations.digest import digest
from ckptool.operations.opening import OpenedCheckpoint
from ckptool.operations.pairing import by_common_names, find_view
from ckptool.operations.rounding import coarsest
from ckptool.operations.tensor_agreement import TensorAgreement, TensorDifference, compare_tensors

CHECK = "agreement.tensors"
GOLDEN_KEY = "ckptool.golden"  # metadata of a file of recorded answers
_EXAMPLES = 10


def stored_precision(tensors: Iterable[TensorSpec | OpaqueTensor]) -> str:
    """Name the coarsest floating dtype among tensors."""
    return coarsest(tensor.dtype.name for tensor in tensors if tensor.dtype is not None)


def view_other(other: OpenedCheckpoint, options: VerifyOptions) -> OpenedCheckpoint:
    """Look at what the options mean in another checkpoint or, where it has no such thing, at its main weights.

    What was written from the averaged weights of a container, or from a subtree, holds these alone.
    """
    return find_view(other, options.weights, options.keys)


def check_tensors(
    opened: OpenedCheckpoint, other: OpenedCheckpoint, options: VerifyOptions, progress: Progress | None = None
) -> tuple[Check, TensorAgreement]:
    """Compare the tensors of ``--against`` with those of the file: equal to the bit, or rounded to a narrower type.

    :raises CkptoolError: one of the files cannot be read, or which weights are meant is open.
    """
    agreement = compare_tensors(*by_common_names(opened, other), progress or NoProgress())
    return _judge_agreement(agreement, other.checkpoint.path, options), agreement


def digest_of(opened: OpenedCheckpoint) -> str | None:
    """Give one number for all tensors that are meant, as ``ckptool.operations.digest``; None where one is not dense.

    :raises CkptoolError: the file cannot be read, or which weights are meant is open.
    """
    dense = {name: tensor for name, tensor in opened.tensors.items() if isinstance(tensor, TensorSpec)}
    return digest(dense) if len(dense) == len(opened.tensors) else None


def check_digest(found: str | None, recorded: str | None, golden: Path) -> Check:
    """Compare digests where only that of the other tensors is known: another one settles nothing."""
    evidence = {"digest": found, "recorded": recorded}
    if found is None or recorded is None:
        return Check(CHECK, "skip", f"{golden} holds answers and no tensors to compare", evidence)
    if found == recorded:
        return Check(CHECK, "pass", f"all tensors are those that {golden} was recorded with, bit for bit", evidence)
    message = f"the tensors are not, bit for bit, those that {golden} was recorded with; their answers decide"
    return Check(CHECK, "skip", message, evidence)


def _judge_agreement(agreement: TensorAgreement, other: Path, options: VerifyOptions) -> Check:
    """Turn a comparison into a check: one difference that is neither a rounding nor allowed fails it."""
    missing = _not_allowed(agreement.only_theirs, options.allow_missing)
    unexpected = _not_allowed(agreement.only_ours, options.allow_unexpected)
    evidence = _evidence(agreement, missing, unexpected)
    faults = _faults(agreement, missing, unexpected, other)
    if not agreement.common:
        advice = "give the file that this one was made from, or name the weights with --weights"
        return Check(CHECK, "fail", f"no tensor has the same name in {other}", evidence, advice)
    if faults:
        advice = "give the file that this one was made from with --against, or convert it again"
        return Check(CHECK, "fail", "; ".join(faults), evidence, advice)
    if agreement.uncompared:
        message = f"{_agreeing(agreement, other)}; {quoted(agreement.uncompared)} cannot be compared as numbers"
        return Check(CHECK, "warn", message, evidence)
    return Check(CHECK, "pass", _agreeing(agreement, other), evidence)


def _not_allowed(names: Sequence[str], globs: Sequence[str]) -> tuple[str, ...]:
    is_allowed = any_glob(globs)
    return tuple(name for name in names if not is_allowed(name))


def _faults(agreement: TensorAgreement, missing: Sequence[str], unexpected: Sequence[str], other: Path) -> list[str]:
    faults = []
    if agreement.changed:
        faults.append(
            f"{len(agreement.changed)} of {agreement.common} tensors differ from {other}, {_worst(agreement)}"
        )
    if agreement.misfits:
        name, ours, theirs = agreement.misfits[0]
        faults.append(f'{len(agreement.misfits)} do not fit those of {other} ("{name}" is {ours} instead of {theirs})')
    if missing:
        faults.append(f"{len(missing)} tensors of {other} are missing ({quoted(missing)})")
    if unexpected:
        faults.append(f"{len(unexpected)} tensors are not in {other} ({quoted(unexpected)})")
    return faults


def _worst(agreement: TensorAgreement) -> str:
    worst = agreement.changed[0]
    if worst.broken:
        return f'most of all "{worst.name}" ({worst.broken} of {worst.elements} values are finite in one file only)'
    extent = f"{worst.changed} of {worst.elements} values, relative error {worst.relative_error:.3g}"
    return f'most of all "{worst.name}" ({extent})'


def _agreeing(agreement: TensorAgreement, other: Path) -> str:
    same, rounded = len(agreement.identical), agreement.rounded
    if not rounded:
        return f"all {agreement.common} tensors are those of {other}, bit for bit"
    kinds = Counter(each.rounded for each in rounded if each.changed)
    equal = len(rounded) - kinds.total()
    parts = [f"{same} bit for bit", *(f"{count} rounded to {dtype}" for dtype, count in kinds.most_common())]
    parts += [f"{equal} with equal values"] if equal else []
    return f"all {agreement.common} tensors are those of {other}: {', '.join(parts)}"


def _evidence(agreement: TensorAgreement, missing: Sequence[str], unexpected: Sequence[str]) -> dict[str, Any]:
    return {
        "compared": agreement.common,
        "identical": len(agreement.identical),
        "rounded": len(agreement.rounded),
        "changed": len(agreement.changed),
        "precision": agreement.precision,
        "missing": list(missing[:_EXAMPLES]),
        "unexpected": list(unexpected[:_EXAMPLES]),
        "misfits": [list(each) for each in agreement.misfits[:_EXAMPLES]],
        "uncompared": list(agreement.uncompared[:_EXAMPLES]),
        "most_changed": [_as_evidence(each) for each in agreement.changed[:_EXAMPLES]],
    }


def _as_evidence(difference: TensorDifference) -> dict[str, Any]:
    error = difference.relative_error
    return {
        "key": difference.name,
        "changed": difference.changed,
        "elements": difference.elements,
        "max_abs": difference.largest,
        "relative_error": error if math.isfinite(error) else None,
        "finite_in_one_only": difference.broken,
    }
