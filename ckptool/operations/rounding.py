"""Name the one rounding that explains how two copies of a tensor differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptool.model.dtypes import BY_NAME, DType
from ckptool.operations.cast_kernels import cast_bytes, widen
from ckptool.operations.differences import equal_values
from ckptool.operations.runs import Run
from ckptool.operations.values import decode

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


def coarsest(dtypes: Iterable[str]) -> str:
    """Give the coarsest of some floating types, float32 at the least; other names do not count."""
    return max(("float32", *(name for name in dtypes if name in _ROUNDING)), key=_ORDER.index)


def _candidates(ours: DType, theirs: DType) -> list[DType]:
    """List the types that one rounding may have gone through: the coarser of the two, or any that is coarser still."""
    if not (ours.name in _ROUNDING and theirs.name in _ROUNDING):
        return []
    least = _ORDER.index(coarsest((ours.name, theirs.name))) if ours != theirs else _ORDER.index(ours.name) + 1
    return [BY_NAME[name] for name in _ORDER[least:]]


@dataclass(slots=True)
class Rounding:
    """Look for the one rounding that explains a pair; of ``possible`` stay those that explain everything so far."""

    ours: DType
    theirs: DType
    possible: list[DType] = field(init=False)

    def __post_init__(self) -> None:
        self.possible = _candidates(self.ours, self.theirs)

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
