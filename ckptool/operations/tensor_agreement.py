"""Compare the tensors of two checkpoints of one model, name by name, in flat memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ckptool.model.comparison import ratio
from ckptool.model.copies import Payload
from ckptool.model.sources import Progress
from ckptool.model.values import OpaqueTensor, TensorSpec
from ckptool.operations.differences import RUN_ELEMENTS, DifferenceTally
from ckptool.operations.pairing import Tensors, kind_text
from ckptool.operations.rounding import Rounding, coarsest
from ckptool.operations.runs import paired_runs, same_bytes
from ckptool.operations.tables import Tensor
from ckptool.operations.transforms import payload_of
from ckptool.operations.values import decode


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


def compare_tensors(ours: Tensors, theirs: Tensors, progress: Progress) -> TensorAgreement:
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
    rounding = Rounding(ours.dtype, theirs.dtype)
    tally = DifferenceTally()
    with np.errstate(all="ignore"):
        for mine, yours in paired_runs(ours, theirs, RUN_ELEMENTS):
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
