"""What the values of a tensor look like, from one pass over them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptool.model.results import TensorStatistics
from ckptool.model.values import TensorSpec
from ckptool.operations.runs import element_runs
from ckptool.operations.transforms import payload_of
from ckptool.operations.values import decode


def tensor_statistics(spec: TensorSpec, *, key: str) -> TensorStatistics | None:
    """Read a tensor once and describe its values; None for a type without numbers (bits, quantized, packed).

    ``key`` names it in messages.

    :raises UnsupportedTensor: it expands far beyond its storage.
    :raises UnreadableCheckpoint: its bytes cannot be read, or do not match their checksum.
    """
    if not spec.dtype.has_numbers:
        return None
    counted = StatisticsTally()
    with np.errstate(all="ignore"):
        for run in element_runs(payload_of(spec, key=key)):
            counted.add(decode(run, spec.dtype))
    return counted.result()


@dataclass(slots=True)
class StatisticsTally:
    """Accumulate runs; ``deviation`` is the sum of squared distances from the mean (Chan, Golub and LeVeque 1979)."""

    elements: int = 0
    nan: int = 0
    infinite: int = 0
    zeros: int = 0
    minimum: float | int = math.inf
    maximum: float | int = -math.inf
    mean: float = 0.0
    deviation: float = 0.0

    def add(self, values: NDArray[Any]) -> None:
        """Count one run of at least one element."""
        finite_before = self.elements - self.nan - self.infinite
        self.elements += values.size
        self.zeros += values.size - int(np.count_nonzero(values))
        finite = self._finite(np.abs(values.astype("<c16")) if values.dtype.kind == "c" else values)
        if finite.size:
            self._merge(finite, finite_before)

    def _finite(self, values: NDArray[Any]) -> NDArray[Any]:
        if values.dtype.kind != "f":
            return values
        is_finite = np.isfinite(values)
        if is_finite.all():
            return values
        nan = int(np.count_nonzero(np.isnan(values)))
        self.nan += nan
        self.infinite += values.size - int(np.count_nonzero(is_finite)) - nan
        finite: NDArray[Any] = values[is_finite]
        return finite

    def _merge(self, finite: NDArray[Any], before: int) -> None:
        self.minimum = min(self.minimum, _plain(finite.min()))
        self.maximum = max(self.maximum, _plain(finite.max()))
        wide = finite.astype("<f8", copy=False)
        mean = float(wide.mean())
        centred = wide - mean
        total = before + finite.size
        gap = mean - self.mean
        squares = float(np.einsum("i,i->", centred, centred))  # a dot product would start threads for so little
        self.deviation += squares + gap * before / total * finite.size * gap
        self.mean += gap * finite.size / total

    def result(self) -> TensorStatistics:
        """Give the account of all runs."""
        finite = self.elements - self.nan - self.infinite
        counts = (self.elements, self.nan, self.infinite, self.zeros)
        if not finite:
            return TensorStatistics(*counts, None, None, None, None)
        return TensorStatistics(*counts, self.minimum, self.maximum, self.mean, math.sqrt(self.deviation / finite))


def _plain(number: Any) -> float | int:
    """Turn a NumPy scalar into a Python number, a bool into 0 or 1; both are exact."""
    return int(number) if number.dtype.kind in "iub" else float(number)
