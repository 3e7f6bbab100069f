"""Say which bytes make up a tensor: a range of its storage, or a source that computes them."""

from __future__ import annotations

import math

from ckptool.errors import UnsupportedTensor
from ckptool.model.copies import Extent, Payload
from ckptool.model.dtypes import PER_BYTE, DType
from ckptool.model.sources import ByteSource
from ckptool.model.values import TensorSpec
from ckptool.operations.casts import CastTally

# An expanded view of a few bytes can declare any size. What it takes in memory it may take in the output: up to
# this size, or this multiple of what is stored.
EXPANSION_BYTES = 64 << 20
EXPANSION_FACTOR = 4

# The types that torch can negate, and so the only ones whose lazy bit it sets.
_NEGATED = frozenset(
    {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"}
    | {"complex32", "complex64", "complex128"}
)


def payload_of(spec: TensorSpec, *, key: str, cast: DType | None = None, tally: CastTally | None = None) -> Payload:
    """Give the row-major little-endian bytes of a view, cast where asked and where it is a floating tensor.

    Quantized codes of less than a byte stay packed: their payload counts bytes, not elements.

    ``key`` names the tensor in messages; ``tally`` counts what the cast loses each time the whole is streamed.

    :raises UnsupportedTensor: it expands far beyond its storage, or carries a bit or a cast that torch has not.
    """
    _refuse_expansion(spec, key)
    _refuse_bits(spec, key)
    if spec.dtype.name in PER_BYTE:
        return _packed(spec, key)
    target = _target(spec, key, cast)
    extents = (_extent(spec, target, tally),) if spec.numel else ()
    return Payload(target, spec.numel, extents)


def _packed(spec: TensorSpec, key: str) -> Payload:
    """Give packed codes as they lie, counted in bytes.

    torch reads them in a row, but allocates whole bytes for each row of the last dimension.
    """
    per_byte = PER_BYTE[spec.dtype.name]
    if not spec.is_contiguous or spec.offset % per_byte:
        raise UnsupportedTensor(
            f'tensor "{key}" is a view into packed {spec.dtype.name} values; save a copy of it, or leave it out with '
            "--exclude"
        )
    start = spec.offset // per_byte
    allocated = math.prod(spec.shape[:-1]) * -(-spec.shape[-1] // per_byte) if spec.shape else 1
    nbytes = min(spec.storage.nbytes - start, allocated)
    extents = (Extent(spec.storage.source, start, nbytes),) if nbytes else ()
    return Payload(spec.dtype, nbytes, extents)


def _extent(spec: TensorSpec, target: DType, tally: CastTally | None) -> Extent:
    if target == spec.dtype and _is_stored_as_is(spec):
        return Extent(spec.storage.source, spec.offset * spec.dtype.itemsize, spec.nbytes)
    source = _computed(spec, target, tally)
    return Extent(source, 0, source.nbytes)


def _is_stored_as_is(spec: TensorSpec) -> bool:
    swapped = spec.storage.big_endian and spec.dtype.swap_size > 1
    return spec.is_contiguous and not (spec.conj or spec.neg or swapped)


def _computed(spec: TensorSpec, target: DType, tally: CastTally | None) -> ByteSource:
    from ckptool.operations.computed import ComputedSource  # NumPy, which most tensors do without

    return ComputedSource(spec, target, tally)


def _target(spec: TensorSpec, key: str, cast: DType | None) -> DType:
    if cast is None or not spec.dtype.is_floating:
        return spec.dtype
    if not cast.is_floating:
        raise UnsupportedTensor(f'tensor "{key}" cannot be cast to {cast.name}; choose a floating type such as float16')
    return cast


def _refuse_expansion(spec: TensorSpec, key: str) -> None:
    if spec.nbytes > max(EXPANSION_BYTES, EXPANSION_FACTOR * spec.storage.nbytes):
        raise UnsupportedTensor(
            f'tensor "{key}" is a view that repeats {spec.storage.nbytes} stored bytes up to {spec.nbytes}; '
            "leave it out with --exclude"
        )


def _refuse_bits(spec: TensorSpec, key: str) -> None:
    if spec.neg and spec.dtype.name not in _NEGATED:
        raise UnsupportedTensor(
            f'tensor "{key}" is marked as negated, which {spec.dtype.name} cannot be; leave it out with --exclude'
        )
