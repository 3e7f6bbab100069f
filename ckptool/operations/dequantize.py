"""Quantized tensors as the float32 ones that they mean, computed while they are read, bit for bit as torch does.

Source: aten/src/ATen/native/quantized/AffineQuantizer.cpp and AffineQuantizerBase.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptool.errors import UnsupportedTensor
from ckptool.model.copies import Payload
from ckptool.model.dtypes import BY_NAME, PER_BYTE
from ckptool.model.sources import range_end
from ckptool.model.values import OpaqueTensor, Storage, TensorSpec, row_major
from ckptool.operations.computed import recut
from ckptool.operations.transforms import payload_of

Array = NDArray[Any]

_FLOAT = BY_NAME["float32"]
_CODES = {"qint8": "|i1", "quint8": "|u1", "qint32": "<i4"}
_PIECE = 1 << 16  # elements that are computed together
_PIECE_BYTES = _PIECE * _FLOAT.itemsize


def dequantize(tensor: OpaqueTensor, key: str) -> TensorSpec:
    """Describe the float32 tensor that a quantized one means; only its scales and zero points are read here.

    :raises UnsupportedTensor: its values cannot be taken from its storage one by one.
    """
    parts = dict(tensor.parts)
    data: TensorSpec = parts["data"]
    source = DequantizedSource(payload_of(data, key=key), data.dtype.name, data.shape, _formula(tensor, key))
    return TensorSpec(_FLOAT, data.shape, row_major(data.shape), 0, Storage("dequantized", source, source.nbytes))


@dataclass(frozen=True, slots=True, eq=False)
class DequantizedSource:
    """Give the row-major little-endian float32 values of quantized codes (see ``ByteSource``)."""

    codes: Payload
    dtype: str
    shape: tuple[int, ...]
    formula: Callable[[Array, Array], Array]
    crc32: None = None
    file_range: None = None

    @property
    def label(self) -> str:
        """Name the place of the codes."""
        return self.codes.extents[0].source.label if self.codes.extents else "an empty tensor"

    @property
    def nbytes(self) -> int:
        """Give the length in bytes."""
        return math.prod(self.shape) * _FLOAT.itemsize

    def stream(self, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes from ``offset`` on, as ``ByteSource.stream`` says."""
        end = range_end(self, offset, nbytes)
        at = offset // _PIECE_BYTES * _PIECE_BYTES
        for codes in self._pieces(at // _PIECE_BYTES) if offset < end else ():
            first = at // _FLOAT.itemsize
            values = self.formula(codes, np.arange(first, first + len(codes)))
            octets = values.astype("<f4", copy=False).view(np.uint8)
            yield octets.data[max(0, offset - at) : end - at]
            at += len(octets)
            if at >= end:
                return

    def _pieces(self, first: int) -> Iterator[Array]:
        """Yield the codes piece by piece, from the given one on."""
        (extent,) = self.codes.extents
        per_byte = PER_BYTE.get(self.dtype, 1)
        step = _PIECE * self.codes.dtype.itemsize // per_byte
        left = math.prod(self.shape) - first * _PIECE
        chunks = extent.source.stream(extent.offset + first * step, extent.nbytes - first * step)
        for piece in recut(chunks, step):
            codes = _unpack(piece, per_byte) if per_byte > 1 else piece.view(_CODES[self.dtype])
            yield codes[:left]
            left -= _PIECE


def _unpack(packed: Array, per_byte: int) -> Array:
    """Take the codes out of their bytes, the lowest bits first."""
    bits = 8 // per_byte
    parts = [(packed >> (bits * place)) & ((1 << bits) - 1) for place in range(per_byte)]
    codes: Array = np.stack(parts, axis=-1).reshape(-1)
    return codes


def _formula(tensor: OpaqueTensor, key: str) -> Callable[[Array, Array], Array]:
    """Give the function of codes and their positions (row-major) that torch computes for the scheme."""
    parts = dict(tensor.parts)
    if tensor.detail == "per_tensor_affine":
        (scale,), (zero,) = _numbers([parts["scale"]], key), _numbers([parts["zero_point"]], key)
        if not -(1 << 31) <= zero < 1 << 31:
            raise _bad_scales(key)
        with np.errstate(all="ignore"):
            narrow = np.float32(scale)
        return lambda codes, _: _per_tensor(codes, narrow, np.int32(zero))
    axis = parts["axis"]
    scales, zeros = _numbers(parts["scales"], key), _numbers(parts["zero_points"], key)
    has_float_zeros = zeros.dtype.kind == "f"
    compute = _per_channel_float if has_float_zeros else _per_channel
    inner, channels = math.prod(tensor.shape[axis + 1 :] if tensor.shape else ()), len(scales)

    def per_channel(codes: Array, positions: Array) -> Array:
        channel = positions // inner % channels
        with np.errstate(all="ignore"):
            return compute(codes, scales[channel], zeros[channel])

    return per_channel


def _per_tensor(codes: Array, scale: np.float32, zero: np.int32) -> Array:
    """Subtract as 32-bit integers do, wrapping around."""
    with np.errstate(all="ignore"):
        values: Array = (codes.astype(np.int32) - zero).astype(np.float32) * scale
    return values


def _per_channel(codes: Array, scales: Array, zeros: Array) -> Array:
    centred = codes.astype(np.float32) - zeros.astype(np.float32)
    values: Array = (centred.astype(np.float64) * scales.astype(np.float64)).astype(np.float32)
    return values


def _per_channel_float(codes: Array, scales: Array, zeros: Array) -> Array:
    """Compute what torch calls ``per_channel_affine_float_qparams``, which it saves without that name."""
    values: Array = (codes.astype(np.float32) - zeros.astype(np.float32)) * scales.astype(np.float32)
    return values


def _bad_scales(key: str) -> UnsupportedTensor:
    return UnsupportedTensor(f'tensor "{key}" has scales or zero points that are none; leave it out with --exclude')


def _numbers(value: Any, key: str) -> Array:
    if isinstance(value, list):
        numbers = np.asarray(value if all(type(item) in (int, float) for item in value) else [""])
        if numbers.dtype.kind not in "if" and value:
            raise _bad_scales(key)
        return numbers
    spec: TensorSpec = value
    if spec.dtype.numpy is None or spec.dtype.kind not in ("float", "int"):
        raise _bad_scales(key)
    chunks = [
        bytes(chunk)
        for extent in payload_of(spec, key=key).extents
        for chunk in extent.source.stream(extent.offset, extent.nbytes)
    ]
    return np.frombuffer(b"".join(chunks), spec.dtype.numpy)
