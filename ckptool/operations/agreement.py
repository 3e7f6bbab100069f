"""Hold the tensors of two checkpoints of one model against each other, name by name, in flat memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptool.layouts.segments import quoted
from ckptool.model.comparison import ratio
from ckptool.model.copies import Payload
from ckptool.model.dtypes import BY_NAME, DType
from ckptool.model.sources import NoProgress, Progress
from ckptool.model.values import OpaqueTensor, TensorSpec
from ckptool.model.verification import Check, VerifyOptions
from ckptool.operations.cast_kernels import cast_bytes, widen
from ckptool.operations.differences import RUN_ELEMENTS as TALLY_ELEMENTS
from ckptool.operations.differences import DifferenceTally, equal_values
from ckptool.operations.digest import digest
from ckptool.operations.opening import OpenedCheckpoint
from ckptool.operations.pairing import Tensor, Tensors, by_common_names, find_view, kind_text
from ckptool.operations.runs import Run, paired_runs, same_bytes
from ckptool.operations.transforms import payload_of
from ckptool.operations.values import decode

CHECK = "agreement.tensors"
GOLDEN_KEY = "ckptool.golden"  # metadata of a file of recorded answers
_EXAMPLES = 10

# What a conversion may have rounded to, the finest first, with the largest relative error of one rounding. A tensor
# that was rounded in another way than torch's (cut off, rounded at random) may be off by twice that.
_ROUNDING = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float8_e4m3fn": 2.0**-4,
    "float8_e4m3fnuz": 2.0**-4,
    "float8_e5m2": 2.0**-3,
    "float8_e5m2fnuz": 2.0**-3,
}
_ORDER = tuple(_ROUNDING)
_LARGEST_LOSS = 0.1  # relative error: a tensor of tiny values is lost in a type that has no such small ones


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """Tell how the values of one tensor differ; ``ours`` and ``theirs`` are dtype names.

    ``rounded`` names the dtype of which one rounding explains every difference (None: nothing does). ``changed`` and
    ``broken`` count elements: unequal ones, and those that are finite in one file only. ``relative_error`` is
    ``|ours - theirs| / |theirs|`` over all elements that are finite in both, ``largest`` the largest absolute
    difference.
    """

    name: str
    ours: str
    theirs: str
    elements: int
    changed: int
    broken: int
    largest: float
    relative_error: float
    rounded: str | None


@dataclass(frozen=True, slots=True)
class TensorAgreement:
    """Sort the tensors of two checkpoints by how they agree; all names are clean names.

    ``identical`` are equal to the bit, ``different`` have other values, rounded ones among them. ``misfits`` have
    another shape or kind, with both descriptions; ``uncompared`` are of types without numbers, and not equal.
    """

    identical: tuple[str, ...] = ()
    different: tuple[TensorDifference, ...] = ()
    only_ours: tuple[str, ...] = ()
    only_theirs: tuple[str, ...] = ()
    misfits: tuple[tuple[str, str, str], ...] = ()
    uncompared: tuple[str, ...] = ()

    @property
    def rounded(self) -> tuple[TensorDifference, ...]:
        """List the tensors whose differences one rounding explains."""
        return tuple(each for each in self.different if each.rounded is not None)

    @property
    def changed(self) -> tuple[TensorDifference, ...]:
        """List the tensors with values that no rounding explains, the most different first."""
        found = [each for each in self.different if each.rounded is None]
        return tuple(sorted(found, key=lambda each: (-each.broken, -each.relative_error)))

    @property
    def common(self) -> int:
        """Count the names that both have."""
        return len(self.identical) + len(self.different) + len(self.misfits) + len(self.uncompared)

    @property
    def precision(self) -> str:
        """Name the coarsest dtype that one of the files was rounded to; ``float32`` where none was."""
        return coarsest(each.rounded for each in self.rounded if each.rounded is not None and each.changed)


def coarsest(dtypes: Iterable[str]) -> str:
    """Give the coarsest of some floating types, float32 at the least; other names do not count."""
    return max(("float32", *(name for name in dtypes if name in _ROUNDING)), key=_ORDER.index)


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
    agreement = _compare_tensors(*by_common_names(opened, other), progress or NoProgress())
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


def _compare_tensors(ours: Tensors, theirs: Tensors, progress: Progress) -> TensorAgreement:
    """Compare tensors by name; each pair is read at most twice.

    :raises UnsupportedTensor: a tensor expands far beyond its storage.
    :raises UnreadableCheckpoint: bytes cannot be read, or do not match their checksum.
    """
    common = [name for name in ours if name in theirs]
    sorted_out = _Sorted()
    progress.start("comparing", sum(ours[name].nbytes for name in common))
    for name in common:
        sorted_out.add(name, ours[name], theirs[name], progress)
    return TensorAgreement(
        identical=tuple(sorted_out.identical),
        different=tuple(sorted_out.different),
        only_ours=tuple(name for name in ours if name not in theirs),
        only_theirs=tuple(name for name in theirs if name not in ours),
        misfits=tuple(sorted_out.misfits),
        uncompared=tuple(sorted_out.uncompared),
    )


@dataclass(slots=True)
class _Sorted:
    identical: list[str] = field(default_factory=list)
    different: list[TensorDifference] = field(default_factory=list)
    misfits: list[tuple[str, str, str]] = field(default_factory=list)
    uncompared: list[str] = field(default_factory=list)

    def add(self, name: str, ours: Tensor, theirs: Tensor, progress: Progress) -> None:
        if isinstance(ours, OpaqueTensor) and isinstance(theirs, OpaqueTensor):
            self.uncompared.append(name)
        elif isinstance(ours, OpaqueTensor) or isinstance(theirs, OpaqueTensor) or ours.shape != theirs.shape:
            self.misfits.append((name, kind_text(ours), kind_text(theirs)))
        else:
            self._add_dense(name, ours, theirs, progress)

    def _add_dense(self, name: str, ours: TensorSpec, theirs: TensorSpec, progress: Progress) -> None:
        pair = payload_of(ours, key=name), payload_of(theirs, key=name)
        if ours.dtype == theirs.dtype and same_bytes(*pair, progress):
            self.identical.append(name)
        elif ours.dtype.has_numbers and theirs.dtype.has_numbers:
            self.different.append(_measure(name, *pair, progress))
        else:
            self.uncompared.append(name)


def _measure(name: str, ours: Payload, theirs: Payload, progress: Progress) -> TensorDifference:
    rounding = _Rounding(ours.dtype, theirs.dtype, _candidates(ours.dtype, theirs.dtype))
    tally = DifferenceTally()
    with np.errstate(all="ignore"):
        for mine, yours in paired_runs(ours, theirs, TALLY_ELEMENTS):
            rounding.narrow(mine, yours)
            tally.add(decode(yours, theirs.dtype), decode(mine, ours.dtype))
            progress.advance(len(mine))
    error = ratio(tally.change_norm, tally.weight_norm)
    return TensorDifference(
        name=name,
        ours=ours.dtype.name,
        theirs=theirs.dtype.name,
        elements=ours.numel,
        changed=tally.changed,
        broken=tally.broken,
        largest=float(tally.largest),
        relative_error=error,
        rounded=rounding.conclude(changed=tally.changed, broken=tally.broken, relative_error=error),
    )


def _candidates(ours: DType, theirs: DType) -> list[DType]:
    """List the types that one rounding may have gone through: the coarser of the two, or any that is coarser still."""
    if not (ours.name in _ROUNDING and theirs.name in _ROUNDING):
        return []
    least = _ORDER.index(coarsest((ours.name, theirs.name))) if ours != theirs else _ORDER.index(ours.name) + 1
    return [BY_NAME[name] for name in _ORDER[least:]]


@dataclass(slots=True)
class _Rounding:
    """Look for the one rounding that explains a pair; of ``possible`` stay those that explain everything so far."""

    ours: DType
    theirs: DType
    possible: list[DType]

    def narrow(self, ours: Run, theirs: Run) -> None:
        """Look at one run of both."""
        if not self.possible:
            return
        a_bytes, b_bytes = np.frombuffer(ours, np.uint8), np.frombuffer(theirs, np.uint8)
        a, b = decode(a_bytes, self.ours), decode(b_bytes, self.theirs)
        self.possible = [
            dtype
            for dtype in self.possible
            if equal_values(_rounded(a_bytes, self.ours, dtype), b).all()
            or equal_values(_rounded(b_bytes, self.theirs, dtype), a).all()
        ]

    def conclude(self, *, changed: int, broken: int, relative_error: float) -> str | None:
        """Name the finest rounding that explains all and leaves the values much as they were."""
        coarser = coarsest((self.ours.name, self.theirs.name))
        if not changed:
            return coarser if self.ours.name in _ROUNDING else self.ours.name
        if broken or relative_error > _LARGEST_LOSS:
            return None
        if self.possible:
            return self.possible[0].name
        is_cast = self.ours != self.theirs and self.ours.name in _ROUNDING and self.theirs.name in _ROUNDING
        return coarser if is_cast and relative_error <= 2 * _ROUNDING[coarser] else None


def _rounded(data: NDArray[Any], source: DType, target: DType) -> NDArray[Any]:
    return widen(cast_bytes(data, source, target).view(np.uint8), target)


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
    return tuple(name for name in names if not any(fnmatchcase(name, glob) for glob in globs))


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
