"""Casts between floating types, bit-equal to torch's ``.to``, and the count of what they lose.

Types of 8 and 16 bits have few values: their casts are tables, made once by widening every code to float32 and
narrowing that. A float64 is narrowed through float32, as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptool.model.dtypes import BY_NAME, DType
from ckptool.model.results import CastLoss

Array = NDArray[Any]

_CODES = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}
_QUIET = np.uint32(0x00400000)  # the bit that hardware sets in a float32 NaN when it converts one

# torch's x86 kernel converts 16 elements at a time and writes 0xFFFF for NaN; what is left over at the end of a
# float64 tensor goes through scalar code, which writes 0x7FC0. Narrow types always go through scalar code.
_VECTOR = 16
_VECTOR_NAN = 0xFFFF
_SCALAR_NAN = 0x7FC0


@dataclass(frozen=True, slots=True)
class _Float8:
    """Describe an 8-bit type: its fields, how many codes of one sign are finite, what torch writes for the rest.

    ``overflow`` and ``nan`` are codes; ``signed_special`` says whether those two have a sign.
    """

    mantissa_bits: int
    bias: int
    finite_codes: int
    overflow: int
    nan: int
    signed_special: bool = True

    @property
    def saturates(self) -> bool:
        """Tell whether too large a value becomes the largest one."""
        return self.overflow < self.finite_codes


# Source: torch 2.13, torch/headeronly/util/Float8_*.h. An e4m3fn saturates there, at infinity too.
_FLOAT8 = {
    "float8_e4m3fn": _Float8(3, 7, 0x7F, overflow=0x7E, nan=0x7F),
    "float8_e5m2": _Float8(2, 15, 0x7C, overflow=0x7C, nan=0x7F),
    "float8_e4m3fnuz": _Float8(3, 8, 0x80, overflow=0x80, nan=0x80, signed_special=False),
    "float8_e5m2fnuz": _Float8(2, 16, 0x80, overflow=0x80, nan=0x80, signed_special=False),
}

# The float32 NaNs that torch widens these to, by code; the NaNs of e5m2 are those of a float16 cut short.
_WIDE_NAN = {
    "float8_e4m3fn": {0x7F: 0x7FF00000, 0xFF: 0xFFF00000},
    "float8_e4m3fnuz": {0x80: 0x7F800001},
    "float8_e5m2fnuz": {0x80: 0x7F800001},
    "float8_e8m0fnu": {0xFF: 0x7F800001},
}


def cast_bytes(data: Array, source: DType, target: DType) -> Array:
    """Cast a run of elements, given and returned as uint8 arrays.

    A tensor that is cast in pieces has to be cut at multiples of 16 elements.
    """
    codes = data.view(_CODES[source.itemsize])
    if source.itemsize <= 2:
        cast = _look_up(_cast_table(source.name, target.name), codes)
    else:
        cast = _cast_wide(codes.view(f"<f{source.itemsize}"), target.name)
    return cast.view(np.uint8)


def widen(data: Array, dtype: DType) -> Array:
    """Give a floating uint8 run as float32 values, or as float64 where they are that already."""
    codes: Array = data.view(_CODES[dtype.itemsize])
    if dtype.itemsize > 2:
        return codes.view(f"<f{dtype.itemsize}")
    if dtype.name == "bfloat16":
        shifted: Array = np.left_shift(codes, 16, dtype="<u4")
        return shifted.view("<f4")
    return _look_up(_wide_table(dtype.name), codes)


def _look_up(table: Array, codes: Array) -> Array:
    found: Array = table.take(codes)  # in half the time of table[codes]
    return found


def _cast_wide(values: Array, target: str) -> Array:
    with np.errstate(all="ignore"):
        cast = _narrow(values.astype("<f4", copy=False), target)
    if values.itemsize == 8 and target == "bfloat16":
        _rewrite_nan(cast, values, slice(len(cast) // _VECTOR * _VECTOR, None))
    return cast


def _rewrite_nan(cast: Array, values: Array, where: slice) -> None:
    cast[where][np.isnan(values[where])] = _SCALAR_NAN


@cache
def _cast_table(source: str, target: str) -> Array:
    """Give the target code of every code of an 8- or 16-bit type."""
    values = _wide_table(source)
    with np.errstate(all="ignore"):
        table = _narrow(values, target)
    if target == "bfloat16":
        _rewrite_nan(table, values, slice(None))
    return table


@cache
def _wide_table(name: str) -> Array:
    """Give every code of an 8- or 16-bit type as float32, with the NaN bits that torch gives."""
    if name == "bfloat16":
        return (np.arange(1 << 16, dtype="<u4") << 16).view("<f4")
    if name == "float16":
        return _quieted(np.arange(1 << 16, dtype="<u2").view("<f2").astype("<f4"))
    if name == "float8_e5m2":
        return np.ascontiguousarray(_wide_table("float16")[:: 1 << 8])
    table = _powers_of_two() if name == "float8_e8m0fnu" else _finite_values(_FLOAT8[name])
    for code, bits in _WIDE_NAN[name].items():
        table.view("<u4")[code] = bits
    return table


def _quieted(values: Array) -> Array:
    values.view("<u4")[np.isnan(values)] |= _QUIET
    return values


def _powers_of_two() -> Array:
    """Give every code of an e8m0fnu, which is an exponent and nothing else, as float32."""
    exponents = np.minimum(np.arange(1 << 8), 0xFE) - 127  # the last code is no power
    powers: Array = np.ldexp(1.0, exponents)
    return powers.astype("<f4")


def _finite_values(float8: _Float8) -> Array:
    """Give every code of an 8-bit type as float32, as if none were special."""
    codes = np.arange(1 << 8)
    exponents = (codes & 0x7F) >> float8.mantissa_bits
    fractions = (codes & ((1 << float8.mantissa_bits) - 1)) / (1 << float8.mantissa_bits)
    magnitudes = np.ldexp(fractions + (exponents > 0), np.maximum(exponents, 1) - float8.bias)
    values: Array = np.where(codes >= 0x80, -magnitudes, magnitudes)
    return values.astype("<f4")


def _narrow(values: Array, target: str) -> Array:
    """Cast float32 values; float8 and bfloat16 come as codes."""
    return _NARROW[target](values)


def _to_float16(values: Array) -> Array:
    half = values.astype("<f2")
    nan = np.isnan(values)
    if nan.any():
        bits = values.view("<u4")[nan]
        half.view("<u2")[nan] = (bits >> 16 & 0x8000) | 0x7E00 | (bits >> 13 & 0x01FF)
    return half


def _to_bfloat16(values: Array) -> Array:
    bits = values.view("<u4")
    rounded: Array = ((bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16).astype("<u2")
    rounded[np.isnan(values)] = _VECTOR_NAN
    return rounded


def _to_float8(name: str) -> Callable[[Array], Array]:
    def narrow(values: Array) -> Array:
        """Round to odd at 16 bits, which keeps every tie and every inequality, then look the code up."""
        bits = values.view("<u4")
        table = _e8m0_table() if name == "float8_e8m0fnu" else _float8_table(name)
        return _look_up(table, (bits >> 16) | ((bits & 0xFFFF) != 0))

    return narrow


_NARROW: dict[str, Callable[[Array], Array]] = {
    "float64": lambda values: values.astype("<f8"),
    "float32": lambda values: values,
    "float16": _to_float16,
    "bfloat16": _to_bfloat16,
    **{name: _to_float8(name) for name in (*_FLOAT8, "float8_e8m0fnu")},
}


@cache
def _float8_table(name: str) -> Array:
    """Give the 8-bit code nearest to every bfloat16 value, what overflows and NaN included."""
    float8 = _FLOAT8[name]
    values = _wide_table("bfloat16").astype("<f8")
    codes = _nearest(np.abs(values), _grid(float8))
    special = np.isnan(values) | (codes == float8.finite_codes)
    codes = np.where(np.isnan(values), float8.nan, np.where(special, float8.overflow, codes))
    signed = np.signbit(values) & (~special | float8.signed_special)
    if name.endswith("fnuz"):
        signed &= codes != 0  # the code of -0 is NaN
    table: Array = codes | signed << 7
    return table.astype(np.uint8)


@cache
def _e8m0_table() -> Array:
    """Give the exponent nearest to every bfloat16 value, signs dropped; infinity and NaN are 0xFF.

    Half-way is up, except from the subnormal 2**-127: that is code 0, and all between it and 2**-126 is code 1.
    """
    codes = np.arange(1 << 16)
    exponents, fractions = codes >> 7 & 0xFF, codes & 0x7F
    is_up = np.where(exponents == 0, fractions > 0x40, fractions >= 0x40)
    table: Array = np.minimum(exponents + is_up, 0xFF)
    return table.astype(np.uint8)


def _grid(float8: _Float8) -> Array:
    """Give the finite magnitudes in ascending order, as float64."""
    return _finite_values(float8)[: float8.finite_codes].astype("<f8")


def _nearest(magnitudes: Array, grid: Array) -> Array:
    """Give the index of the nearest value of a grid, even on a tie, or its length where none is near."""
    midpoints = np.append((grid[:-1] + grid[1:]) / 2, _end(grid))
    index: Array = np.searchsorted(midpoints, magnitudes, side="left")
    is_tie = midpoints[np.minimum(index, len(grid) - 1)] == magnitudes
    index += is_tie & (index % 2 == 1)
    return index


def _end(grid: Array) -> float:
    """Give the value half a step beyond the largest."""
    return float(grid[-1] + (grid[-1] - grid[-2]) / 2)


@cache
def _largest(target: str) -> float:
    """Give the largest finite value of a type."""
    if target in _FLOAT8:
        return float(_grid(_FLOAT8[target])[-1])
    if target in _NATIVE:
        return float(np.finfo(_NATIVE[target]).max)
    return {"bfloat16": float.fromhex("0x1.fep127"), "float8_e8m0fnu": 2.0**127}[target]


_NATIVE = {"float64": "<f8", "float32": "<f4", "float16": "<f2"}


@cache
def _saturation_limit(target: str) -> float:
    """Give the magnitude above which the largest value stands in: infinity where nothing saturates."""
    float8 = _FLOAT8.get(target)
    return _end(_grid(float8)) if float8 is not None and float8.saturates else math.inf


@cache
def _is_exact(source: str, target: str) -> bool:
    """Tell whether the target has every finite value of the source."""
    if source in ("float32", "float64"):
        return target == "float64"
    fates, errors = _judged_codes(source, target)
    return not fates.any() and not errors.any()


def measure_loss(loss: CastLoss, before: Array, after: Array, source: DType, target: DType) -> CastLoss:
    """Add a run of elements, as uint8 arrays before and after their cast, to an account."""
    counted = replace(loss, elements=loss.elements + len(before) // source.itemsize)
    with np.errstate(all="ignore"):
        if _is_exact(source.name, target.name):
            return counted
        if source.itemsize <= 2:
            codes = before.view(_CODES[source.itemsize])
            fates, errors = (_look_up(table, codes) for table in _judged_codes(source.name, target.name))
            return _add(counted, fates, errors)
        return _add_wide(counted, widen(before, source), widen(after, target))


def _add_wide(loss: CastLoss, old: Array, new: Array) -> CastLoss:
    """Look for nothing but the largest error where no value left the range of the target, as is usual."""
    magnitude = np.abs(old)
    is_inside = magnitude.max() <= _largest(loss.target)  # not so for NaN
    if not is_inside or np.count_nonzero(new == 0) != np.count_nonzero(old == 0) or loss.target == "float8_e8m0fnu":
        return _add(loss, *_judge(old, new, loss.target))
    error = new - old
    np.abs(error, out=error)
    error /= magnitude
    return replace(loss, largest_relative_error=max(loss.largest_relative_error, float(np.fmax.reduce(error))))


_OVERFLOWED, _SATURATED, _UNDERFLOWED = 1, 2, 3


def _judge(old: Array, new: Array, target: str) -> tuple[Array, Array]:
    """Give the fate of each value (0: it is kept) and the relative error of those that are kept."""
    magnitude = np.abs(old)
    is_finite = np.isfinite(new)
    fates = np.zeros(len(old), np.uint8)
    fates[np.isfinite(old) & ~is_finite] = _OVERFLOWED
    fates[is_finite & (magnitude > _saturation_limit(target))] = _SATURATED
    fates[(new == 0) & (old != 0)] = _UNDERFLOWED
    error = np.abs(new.astype("<f8", copy=False) - old) / magnitude
    error[~is_finite | (fates != 0) | (old == 0)] = 0
    return fates, error


@cache
def _judged_codes(source: str, target: str) -> tuple[Array, Array]:
    """Judge every code of an 8- or 16-bit type."""
    cast = _cast_table(source, target).view(np.uint8)
    return _judge(_wide_table(source), widen(cast, BY_NAME[target]), target)


def _add(loss: CastLoss, fates: Array, errors: Array) -> CastLoss:
    return replace(
        loss,
        overflowed=loss.overflowed + int(np.count_nonzero(fates == _OVERFLOWED)),
        saturated=loss.saturated + int(np.count_nonzero(fates == _SATURATED)),
        underflowed=loss.underflowed + int(np.count_nonzero(fates == _UNDERFLOWED)),
        largest_relative_error=max(loss.largest_relative_error, float(errors.max())),
    )
