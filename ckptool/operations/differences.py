"""How far two arrays of numbers lie apart, from one pass over both."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptool.model.copies import Payload
from ckptool.model.sources import Progress
from ckptool.operations.runs import are_equal, paired_runs
from ckptool.operations.values import decode

Array = NDArray[Any]

# Casts take a multiple of 16. Of fewer, threads wait for each other after every step; more overrun the L2 cache.
RUN_ELEMENTS = 1 << 16
_ALONE = 8192  # elements: for the dot product of more, OpenBLAS wakes threads that spin
_EXACT = 1 << 52  # integers up to here, and their differences, are exact in float64
_SCALE = 2.0**-512  # brings the squares of the largest float64 numbers into range


@dataclass(slots=True)
class DifferenceTally:
    """Accumulate runs of pairs; ``b - a`` is the change, ``a`` what is changed.

    ``changed`` counts elements that are not equal, ``beyond`` those with ``|b - a| > atol + rtol * |a|``, ``broken``
    unequal ones that are not finite in both. NaN equals NaN, the zeros are one, infinities equal themselves.
    ``largest`` (exact for integers), ``total`` and ``largest_rel`` are of ``|b - a|`` and ``|b - a| / |a|`` over
    elements that are finite in both; ``saw_nan`` and ``saw_infinity`` say what distances the others have.
    """

    rtol: float = 0.0
    atol: float = 0.0
    elements: int = 0
    changed: int = 0
    beyond: int = 0
    broken: int = 0
    largest: float | int = 0
    total: float | int = 0
    largest_rel: float = 0.0
    saw_nan: bool = False
    saw_infinity: bool = False
    _squares: Array = field(default_factory=lambda: np.zeros(4))  # of a.a, a.b, b.b and d.d, where d is b - a
    _scaled: Array = field(default_factory=lambda: np.zeros(4))  # the same of runs that overflow, times _SCALE twice
    _room: Array = field(default_factory=lambda: np.empty((3, RUN_ELEMENTS)))

    def add(self, a: Array, b: Array) -> None:
        """Count one run of both, as ``decode`` gives them; they are of equal length, and at least one element."""
        self.elements += a.size
        if "c" in a.dtype.kind + b.dtype.kind:
            self._add_numbers(a.astype("<c16"), b.astype("<c16"))
        elif _is_exact_as_float(a) and _is_exact_as_float(b):
            integers = a.dtype.kind in "iub" and b.dtype.kind in "iub"
            self._add_numbers(self._widened(a, 0), self._widened(b, 1), integers=integers)
        elif (common := np.result_type(a, b)).kind in "iu":
            self._add_long(a.astype(common), b.astype(common))
        else:
            self._add_fractions(a, b)

    def add_equal(self, a: Array) -> None:
        """Count one run that is the same in both, to the bit."""
        self.elements += a.size
        parts = _parts(a.astype("<c16")) if a.dtype.kind == "c" else self._widened(a, 0)
        own = _product(parts, parts)
        if math.isfinite(own):
            self._squares += (own, own, own, 0.0)
        else:
            parts = parts[np.isfinite(parts)]
            self._add_products(parts, parts, np.zeros_like(parts))

    def merge(self, other: DifferenceTally) -> None:
        """Count what another tally has counted, of further elements of the same pair."""
        self.elements += other.elements
        self.changed += other.changed
        self.beyond += other.beyond
        self.broken += other.broken
        self.largest = max(self.largest, other.largest)
        self.total += other.total
        self.largest_rel = max(self.largest_rel, other.largest_rel)
        self.saw_nan |= other.saw_nan
        self.saw_infinity |= other.saw_infinity
        self._squares += other._squares
        self._scaled += other._scaled

    def _widened(self, values: Array, row: int) -> Array:
        wide = self._room[row, : values.size]
        np.copyto(wide, values)
        return wide

    def _add_numbers(self, a: Array, b: Array, *, integers: bool = False) -> None:
        """Count numbers in arrays that are this tally's to overwrite."""
        if self._turned_to_change(a, b):
            change = b
        else:
            finite = self._set_apart(a, b)
            a, b = a[finite], b[finite]
            change = b - a
            self._add_products(_parts(a), _parts(b), _parts(change))
        self._add_distances(_sizes(change), _sizes(a), integers=integers)

    def _turned_to_change(self, a: Array, b: Array) -> bool:
        """Count the products and make ``b`` the change; leave both alone where a number is not finite, or a square."""
        ours, theirs = _parts(a), _parts(b)
        own, other = _product(ours, ours), _product(theirs, theirs)
        if not math.isfinite(4 * (own + other)):  # no less than the squares of the change
            return False
        are_alike = 0.25 * own <= other <= 4 * own
        mixed = 0.0 if are_alike else _product(ours, theirs)
        np.subtract(b, a, out=b)
        change = _product(theirs, theirs)
        if are_alike:  # the law of cosines: as exact as the product then, and one pass over both less
            mixed = (own + other - change) / 2
        self._squares += (own, mixed, other, change)
        return True

    def _set_apart(self, a: Array, b: Array) -> NDArray[np.bool_]:
        """Count the elements that are not finite in both; give the places of the others."""
        finite: NDArray[np.bool_] = np.isfinite(a) & np.isfinite(b)
        odd_a, odd_b = a[~finite], b[~finite]
        unequal = ~equal_values(odd_a, odd_b)
        count = int(np.count_nonzero(unequal))
        self.changed += count
        self.beyond += count
        self.broken += count
        is_nan = (np.isnan(odd_a) | np.isnan(odd_b)) & unequal
        self.saw_nan |= bool(is_nan.any())
        self.saw_infinity |= bool((unequal & ~is_nan).any())
        return finite

    def _add_distances(self, distance: Array, size: Array, *, integers: bool = False) -> None:
        if not distance.size:
            return
        changed = int(np.count_nonzero(distance != 0))
        self.changed += changed
        self.beyond += self._count_beyond(distance, size) if self.rtol or self.atol else changed
        largest, total = float(distance.max()), float(distance.sum())
        self.largest = max(self.largest, int(largest) if integers else largest)
        self.total += int(total) if integers else total
        self._add_relative(distance, size)

    def _count_beyond(self, distance: Array, size: Array) -> int:
        return int(np.count_nonzero(distance > self.atol + self.rtol * size))

    def _add_relative(self, distance: Array, size: Array) -> None:
        if self.largest_rel:  # few can exceed it: a product is cheaper than a quotient
            larger = distance > np.multiply(size, self.largest_rel, out=self._room[2, : size.size])
            if not larger.any():
                return
            distance, size = distance[larger], size[larger]
        relative = np.divide(distance, size, out=np.zeros_like(size), where=distance != 0)
        self.largest_rel = max(self.largest_rel, float(relative.max(initial=0.0)))

    def _add_products(self, a: Array, b: Array, change: Array) -> None:
        products = _products(a, b, change)
        if np.isfinite(products).all():
            self._squares += products
        else:
            small_a, small_b = a * _SCALE, b * _SCALE
            self._scaled += _products(small_a, small_b, small_b - small_a)

    def _add_long(self, a: Array, b: Array) -> None:
        """Count integers of 64 bits of one type: distances are exact as unsigned ones."""
        distance = np.maximum(a, b).view("<u8") - np.minimum(a, b).view("<u8")
        change = np.where(a > b, -1.0, 1.0) * distance
        total = (int((distance >> np.uint64(32)).sum()) << 32) + int((distance & np.uint64(0xFFFFFFFF)).sum())
        self._add_exact(distance != 0, (a.astype("<f8"), b.astype("<f8"), change), int(distance.max()), total)

    def _add_fractions(self, a: Array, b: Array) -> None:
        """Count integers of 64 bits against another type, in Python's exact arithmetic."""
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            self._set_apart(a.astype("<f8"), b.astype("<f8"))
            a, b = a[finite], b[finite]
        if not a.size:
            return
        pairs = zip(a.tolist(), b.tolist(), strict=True)
        changes = [Fraction(after) - Fraction(before) for before, after in pairs]
        distances = [abs(change) for change in changes]
        unequal = np.array([distance != 0 for distance in distances])
        change = np.array([float(change) for change in changes])
        largest, total = _plain(max(distances)), _plain(sum(distances, Fraction()))
        self._add_exact(unequal, (a.astype("<f8"), b.astype("<f8"), change), largest, total)

    def _add_exact(
        self, unequal: Array, wide: tuple[Array, Array, Array], largest: float | int, total: float | int
    ) -> None:
        """Count numbers (``a``, ``b`` and the change) of which the largest distance and the sum are known exactly."""
        self._add_products(*wide)
        distance, size = np.abs(wide[2]), np.abs(wide[0])
        changed = int(np.count_nonzero(unequal))
        self.changed += changed
        self.beyond += self._count_beyond(distance, size) if self.rtol or self.atol else changed
        self.largest = max(self.largest, largest)
        self.total += total
        self._add_relative(distance, size)

    @property
    def _sums(self) -> tuple[Array, float]:
        """Give a.a, a.b, b.b, d.d and the factor by which their roots are to be multiplied."""
        if self._scaled.any():
            return self._scaled + self._squares * _SCALE * _SCALE, 1.0 / _SCALE
        return self._squares, 1.0

    @property
    def weight_norm(self) -> float:
        """Give the Euclidean norm of ``a`` over the elements that are finite in both."""
        sums, factor = self._sums
        return math.sqrt(sums[0]) * factor

    @property
    def change_norm(self) -> float:
        """Give the Euclidean norm of ``b - a`` over the elements that are finite in both."""
        sums, factor = self._sums
        return math.sqrt(sums[3]) * factor

    @property
    def cosine(self) -> float | None:
        """Give the cosine of the angle between both; None where one is all zero, or broken."""
        (own, mixed, other, _), _ = self._sums
        if self.broken or own <= 0 or other <= 0:
            return None
        return max(-1.0, min(1.0, float(mixed / math.sqrt(own) / math.sqrt(other))))

    def overall(self, finite: float | int) -> float | int:
        """Give a number over all elements, from the same over those that are finite in both."""
        return math.nan if self.saw_nan else math.inf if self.saw_infinity else finite

    @property
    def mean(self) -> float:
        """Give the mean of ``|b - a|`` over all elements."""
        return float(self.overall(self.total / self.elements if self.elements else 0.0))


def measure(a: Payload, b: Payload, tally: DifferenceTally, progress: Progress) -> None:
    """Read two tensors of numbers once and count how they differ.

    :raises UnreadableCheckpoint: bytes cannot be read, or do not match their checksum.
    """
    with np.errstate(all="ignore"):
        for left, right in paired_runs(a, b, RUN_ELEMENTS):
            if a.dtype == b.dtype and are_equal(left, right):
                tally.add_equal(decode(left, a.dtype))
            else:
                tally.add(decode(left, a.dtype), decode(right, b.dtype))
            progress.advance(len(left))


def equal_values(a: Array, b: Array) -> NDArray[np.bool_]:
    """Compare values; NaN is NaN, and the zeros are one. A complex number is two of them."""
    if a.dtype.kind == "c" or b.dtype.kind == "c":
        wide = a.astype("<c16", copy=False), b.astype("<c16", copy=False)
        return equal_values(wide[0].real, wide[1].real) & equal_values(wide[0].imag, wide[1].imag)
    same: NDArray[np.bool_] = (a == b) | ((a != a) & (b != b))
    return same


def _is_exact_as_float(values: Array) -> bool:
    if values.dtype.kind not in "iu" or values.dtype.itemsize < 8:
        return True
    return bool(int(values.max()) <= _EXACT and int(values.min()) >= -_EXACT)


def _parts(values: Array) -> Array:
    """See complex numbers as twice as many real ones."""
    return values.view("<f8") if values.dtype.kind == "c" else values


def _sizes(values: Array) -> Array:
    """Give absolute values, in place of the numbers where they are as wide."""
    return np.abs(values) if values.dtype.kind == "c" else np.abs(values, out=values)


def _products(a: Array, b: Array, change: Array) -> Array:
    return np.array([_product(a, a), _product(a, b), _product(b, b), _product(change, change)])


def _product(a: Array, b: Array) -> float:
    whole = len(a) // _ALONE * _ALONE
    blocks = np.matmul(a[:whole].reshape(-1, 1, _ALONE), b[:whole].reshape(-1, _ALONE, 1))
    return float(blocks.sum()) + float(np.dot(a[whole:], b[whole:]))


def _plain(number: Fraction) -> float | int:
    return int(number) if number.denominator == 1 else float(number)
