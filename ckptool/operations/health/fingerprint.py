"""Tell a matrix that still is what an initialiser drew from one that was trained, from its values alone.

The singular values of a matrix of independent draws end at a known edge (Marchenko and Pastur 1967; Bai and Yin 1988);
training adds directions beyond it, makes rows and columns unequal, and gives the values heavier tails.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SAMPLE_SIDE = 256
_LEAST_SIDE = 16
_LEAST_ELEMENTS = 512
_LEAST_NARROW = 128  # elements of what only one exact distribution can be recognised in

_BLOCK = 16  # neighbours that are sampled together: in a convolution they are alike once it is trained
_EDGE_MARGIN = 1.01
# How many standard errors from that of independent draws a number may be.
_KURTOSIS_ERRORS = 4.0
_OTHER_ERRORS = 5.0
_RARE = 1e-4


class Distribution(NamedTuple):
    """Describe what initialisers draw from: its kurtosis, and the variance of a sample's kurtosis times its size.

    ``bound`` is the largest possible value in standard deviations.
    """

    name: str
    kurtosis: float
    spread: float
    bound: float

    def largest(self, count: int) -> float:
        """Give what the largest of ``count`` draws hardly ever exceeds, in standard deviations of that sample."""
        # A normal tail lies below exp(-t^2 / 2); the deviation of a sample has an error of its own.
        reach = min(self.bound, math.sqrt(2 * math.log(count / _RARE)))
        return reach * (1 + _OTHER_ERRORS * math.sqrt((self.kurtosis - 1) / count) / 2)


def _distribution(name: str, bound: float, *moments: float) -> Distribution:
    """Derive it from its bound and its 2nd, 4th, 6th and 8th central moments (it is symmetric)."""
    second, fourth, sixth, eighth = moments
    four, six, eight = fourth / second**2, sixth / second**3, eighth / second**4
    return Distribution(name, four, eight - 4 * four * six + 4 * four**3 - four**2, bound / math.sqrt(second))


def _truncated_moments(limit: float) -> list[float]:
    """Give the even moments up to the 8th of a normal distribution that is cut at ``limit`` standard deviations."""
    density = math.exp(-limit * limit / 2) / math.sqrt(2 * math.pi)
    edge = 2 * density / math.erf(limit / math.sqrt(2))
    moments = [1.0]
    for order in (2, 4, 6, 8):
        moments.append((order - 1) * moments[-1] - limit ** (order - 1) * edge)
    return moments[1:]


DISTRIBUTIONS = (
    _distribution("normal", math.inf, 1, 3, 15, 105),
    _distribution("uniform", 1, 1 / 3, 1 / 5, 1 / 7, 1 / 9),
    _distribution("truncated normal", 2, *_truncated_moments(2.0)),
)
BY_NAME = {distribution.name: distribution for distribution in DISTRIBUTIONS}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Describe a sample of a matrix.

    ``drawn`` names the distribution that the values alone could come from. ``edge`` is the largest singular value over
    that of independent draws with the same deviation, in the limit of a large matrix; None where the matrix is too
    narrow to tell or shows order otherwise. ``init`` is ``drawn`` where nothing speaks against independent draws.
    """

    std: float
    kurtosis: float
    drawn: str | None
    edge: float | None
    init: str | None


class Sampler:
    """Pick a fixed sample of rows and columns out of a tensor that passes by, seen as a matrix [first, rest]."""

    def __init__(self, rows: int, columns: int) -> None:
        picked_rows, picked_columns = _pick(rows), _pick(columns)
        self.sides = (len(picked_rows), len(picked_columns))
        self._places = (picked_rows[:, None] * columns + picked_columns).reshape(-1)
        self._sample = np.empty(len(self._places), "<f8")
        self._seen = 0
        self._filled = 0

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Sampler | None:
        """Give a sampler, or None for what is no matrix or too small to be judged."""
        if len(shape) < 2 or math.prod(shape) < _LEAST_NARROW:
            return None
        return cls(shape[0], math.prod(shape[1:]))

    def add(self, values: NDArray[Any]) -> None:
        """Take from the next run of elements what belongs to the sample."""
        end = self._seen + values.size
        filled = int(np.searchsorted(self._places, end))
        self._sample[self._filled : filled] = values[self._places[self._filled : filled] - self._seen]
        self._seen, self._filled = end, filled

    def result(self) -> Fingerprint | None:
        """Judge the sample; None where it is constant or not finite."""
        return fingerprint(self._sample.reshape(self.sides))


def _pick(length: int) -> NDArray[Any]:
    """Pick at most ``SAMPLE_SIDE`` indices, the same ones every time, in blocks of neighbours with no common step."""
    if length <= SAMPLE_SIDE:
        return np.arange(length)
    blocks = np.random.default_rng(0).choice(length // _BLOCK, SAMPLE_SIDE // _BLOCK, replace=False, shuffle=False)
    blocks.sort()
    picked: NDArray[Any] = (blocks[:, None] * _BLOCK + np.arange(_BLOCK)).reshape(-1)
    return picked


def fingerprint(sample: NDArray[Any]) -> Fingerprint | None:
    """Judge a matrix of float64 values; None where it is constant or not finite."""
    std = float(sample.std())
    if not (0 < std < math.inf):
        return None
    mean = float(sample.mean())
    scaled = (sample - mean) / std
    kurtosis = float(np.mean(np.square(scaled) ** 2))
    drawn = _drawn_from(kurtosis, sample.size)
    is_centred = abs(mean) < _OTHER_ERRORS * std / math.sqrt(sample.size)
    rows, columns = sample.shape
    is_wide = min(rows, columns) >= _LEAST_SIDE and sample.size >= _LEAST_ELEMENTS
    edge = _edge(scaled) if is_wide and drawn and is_centred and _is_even(scaled, kurtosis) else None
    init = drawn if edge is not None and edge <= _EDGE_MARGIN + min(rows, columns) ** (-2 / 3) else None
    return Fingerprint(std, kurtosis, drawn, edge, init)


def _drawn_from(kurtosis: float, count: int) -> str | None:
    """Name the distribution whose kurtosis is nearest, measured in standard errors of a sample of this size."""
    errors = {one.name: abs(kurtosis - one.kurtosis) / math.sqrt(one.spread / count) for one in DISTRIBUTIONS}
    nearest = min(errors, key=errors.__getitem__)
    return nearest if errors[nearest] <= _KURTOSIS_ERRORS else None


def _is_even(scaled: NDArray[Any], kurtosis: float) -> bool:
    """Tell whether rows, columns and neighbours show no more order than independent draws do."""
    neighbours = float(np.mean(_within_blocks(scaled))) * math.sqrt(scaled.size)
    squares = (scaled**2 - 1) / math.sqrt(kurtosis - 1)
    return abs(neighbours) <= _OTHER_ERRORS and all(
        _excess(matrix.mean(axis=axis), matrix.shape[axis]) <= _OTHER_ERRORS
        for matrix in (scaled, squares)
        for axis in (0, 1)
    )


def _within_blocks(scaled: NDArray[Any]) -> NDArray[Any]:
    """Multiply each value with the next one of its row, where both were neighbours before the sample was taken."""
    products: NDArray[Any] = scaled[:, :-1] * scaled[:, 1:]
    is_inside = np.arange(1, scaled.shape[1]) % _BLOCK != 0
    return products[:, is_inside]


def _excess(means: NDArray[Any], count: int) -> float:
    """Give the standard errors by which means of ``count`` values scatter more than those of independent ones."""
    return float(np.mean(means**2) * count - 1) * math.sqrt(len(means) / 2)


def _edge(scaled: NDArray[Any]) -> float:
    rows, columns = scaled.shape
    narrow = scaled if rows <= columns else scaled.T
    largest = float(np.linalg.eigvalsh(narrow @ narrow.T)[-1])
    return math.sqrt(max(largest, 0.0)) / (math.sqrt(rows) + math.sqrt(columns))
