"""The stored codes of quantized tensors: one element each, or several to a byte."""

from __future__ import annotations

import math

from ckptool.errors import UnsupportedTensor
from ckptool.model.plans import Extent, Payload
from ckptool.model.values import TensorSpec
from ckptool.operations.transforms import payload_of

PER_BYTE = {"quint4x2": 2, "quint2x4": 4}


def payload_of_codes(spec: TensorSpec, key: str) -> Payload:
    """Give the bytes of quantized codes, row-major and little-endian; packed ones as they lie.

    torch reads packed codes in a row, but allocates whole bytes for each row of the last dimension.

    :raises UnsupportedTensor: packed codes are not in a row, or do not begin with a byte.
    """
    per_byte = PER_BYTE.get(spec.dtype.name)
    if per_byte is None:
        return payload_of(spec, key=key)
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
