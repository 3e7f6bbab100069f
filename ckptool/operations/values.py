"""Bytes as numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptool.model.dtypes import BY_NAME, DType
from ckptool.operations.cast_kernels import widen


def decode(data: memoryview | NDArray[Any], dtype: DType) -> NDArray[Any]:
    """Give whole little-endian elements as an array that may be computed with.

    Floating types become float32 (float64 stays), complex32 becomes complex64, any non-zero byte of a bool is True.
    """
    octets = np.frombuffer(data, np.uint8)
    if dtype.is_floating:
        return widen(octets, dtype)
    if dtype.kind == "bool":
        flags: NDArray[Any] = octets != 0
        return flags
    if dtype.name == "complex32":
        return widen(octets, BY_NAME["float16"]).view("<c8")
    numbers: NDArray[Any] = octets.view(dtype.numpy or dtype.name)
    return numbers
