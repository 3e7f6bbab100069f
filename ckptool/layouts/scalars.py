"""Single numbers out of a checkpoint, plain or in a tensor of one element."""

from __future__ import annotations

import math
import struct
from typing import Any

from ckptool.errors import UnreadableCheckpoint
from ckptool.model.values import TensorSpec

_STRUCT_CODES = {
    "float64": "d",
    "float32": "f",
    "float16": "e",
    "int64": "q",
    "int32": "i",
    "int16": "h",
    "int8": "b",
    "uint8": "B",
    "uint16": "H",
    "uint32": "I",
    "uint64": "Q",
}


def number(value: Any) -> int | float | None:
    """Give a number, also out of a tensor of one element; None for anything else or where it cannot be read."""
    if type(value) in (int, float):
        return value  # type: ignore[no-any-return]
    if isinstance(value, TensorSpec) and math.prod(value.shape) == 1:
        return _read_scalar(value)
    return None


def _read_scalar(spec: TensorSpec) -> int | float | None:
    """Read the one element of a tensor; None where its type is no number or its bytes are damaged."""
    size = spec.dtype.itemsize
    try:
        data = b"".join(bytes(chunk) for chunk in spec.storage.source.stream(spec.offset * size, size))
    except UnreadableCheckpoint:
        return None  # a score is not worth the refusal of a file whose weights may be sound
    if spec.storage.big_endian:
        data = data[::-1]
    if spec.dtype.name == "bfloat16":
        data, code = b"\0\0" + data, "f"
    else:
        code = _STRUCT_CODES.get(spec.dtype.name, "")
    if not code or len(data) != struct.calcsize(f"<{code}"):
        return None
    value: int | float = struct.unpack(f"<{code}", data)[0]
    return -value if spec.neg else value
