"""What NumPy's pickle functions become: arrays over the bytes in the pickle, scalars as plain numbers.

Sources: numpy/_core/src/multiarray: methods.c (array_reduce), descriptor.c (arraydescr_reduce); numeric.py
(_frombuffer).
"""

from __future__ import annotations

import math
import re
import struct
from typing import Any

from ckptool.formats.pickle import limits
from ckptool.formats.pickle.reading import Draft, Handler, Malformed, Reading
from ckptool.formats.sources import MemorySource
from ckptool.model.dtypes import BY_NUMPY, DType
from ckptool.model.values import MOST_DIMENSIONS, GlobalRef, Storage, Stub, TensorSpec

_ORDERS = {"<": False, "=": False, "|": False, ">": True}  # "=" is the writer's own order: every one of today is little
# Objects, texts, records and dates, and numbers of more bits than any tensor's.
_NO_NUMBERS = re.compile(r"[OSUVMma][0-9]{0,9}(?:\[[^\]]{1,20}\])?|f12|f16|c24|c32")
# The state of an element type: version, byte order, subarray, names, fields, size, alignment, flags[, metadata].
_STATES = {8: 3, 9: 4}
_NONE, _UNSET = (type(None), None), (int, -1)
_PLAIN_STATE = [_NONE, _NONE, _NONE, _UNSET, _UNSET, (int, 0)]
_ARRAY_VERSION = 1
_BEGUN_AS = ("b", b"b")  # the type of the empty array that the state fills
_SCALARS = {
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
    "f2": "e", "f4": "f", "f8": "d", "c8": "ff", "c16": "dd",
}  # fmt: skip


def _make_dtype(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Keep an array's element type as data: its code in the arguments, its byte order in the state."""
    if 1 <= len(args) <= 3 and type(args[0]) is str:
        return Stub(ref, args)
    return reading.misfit(ref, args)


def _element_type(value: Any) -> tuple[DType, bool] | None:
    """Give the element type and whether it is big-endian, or None for one that is not a plain number."""
    if type(value) is not Stub or (value.ref.module, value.ref.name) != ("numpy", "dtype"):
        return None
    code = value.args[0]
    order = code[0] if code[:1] in _ORDERS else "="
    dtype = BY_NUMPY.get(code.lstrip("<>=|"))
    if dtype is None:
        if not _NO_NUMBERS.fullmatch(code.lstrip("<>=|")):
            raise Malformed("holds NumPy elements of a type that there is not")
        return None
    if value.state is not None:
        order = _check_state(value.state)
    return dtype, _ORDERS[order]


def _check_state(state: Any) -> str:
    """Give the byte order in the state of a plain element type, in the one form that NumPy writes for it."""
    if type(state) is not tuple or len(state) not in _STATES or type(state[0]) is not int:
        raise Malformed("holds NumPy elements of a type in a form that NumPy does not write")
    version, order, *rest = state
    is_plain = [(type(part), part) for part in rest[:6]] == _PLAIN_STATE
    if version != _STATES[len(state)] or type(order) is not str or order not in _ORDERS or not is_plain:
        raise Malformed("holds NumPy elements of a type in a form that NumPy does not write")
    return order


def _raw_bytes(value: Any, nbytes: int) -> bytes | None:
    """Give the bytes of an array or scalar, which Python 2 wrote as its only string type."""
    if type(value) is str:
        value = value.encode("utf-8", "surrogatepass")
    return value if type(value) is bytes and len(value) == nbytes else None


def _make_scalar(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Read a NumPy number as a Python number."""
    element = _element_type(args[0]) if len(args) == 2 else None
    if element is None:
        return reading.misfit(ref, args) if len(args) != 2 else Stub(ref, args)
    dtype, big_endian = element
    data = _raw_bytes(args[1], dtype.itemsize)
    if data is None:
        raise Malformed("holds a NumPy number of another size than its type")
    numbers = struct.unpack((">" if big_endian else "<") + _SCALARS[(dtype.numpy or "")[1:]], data)
    return complex(*numbers) if len(numbers) == 2 else numbers[0]


def _begin_array(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Begin an array; its shape, type and bytes come with BUILD."""
    if len(args) != 3 or type(args[0]) is not GlobalRef or (args[0].module, args[0].name) != ("numpy", "ndarray"):
        return reading.misfit(ref, args)
    array, shape, code = args
    if type(shape) is not tuple or [(type(size), size) for size in shape] != [(int, 0)] or code not in _BEGUN_AS:
        return reading.misfit(ref, args)
    return Draft(lambda state: _finish_array(reading, array, state))


def _finish_array(reading: Reading, ref: GlobalRef, state: Any) -> Any:
    """Read the state of an array: version, shape, element type, Fortran order, bytes."""
    if type(state) is not tuple or len(state) != 5:
        raise Malformed("holds a NumPy array without its five parts")
    version, shape, dtype, is_fortran, data = state
    if type(version) is not int or version != _ARRAY_VERSION or type(is_fortran) not in (bool, int):
        raise Malformed("holds a NumPy array in a form that NumPy does not write")
    return _array(reading, ref, (shape, dtype, is_fortran is True or is_fortran == 1, data))


def _array(reading: Reading, ref: GlobalRef, parts: tuple[Any, ...]) -> Any:
    shape, dtype, is_fortran, data = parts
    element = _element_type(dtype)
    if element is None:
        return _foreign_array(reading, ref, (shape, dtype, data))
    if (
        type(shape) is not tuple
        or len(shape) > MOST_DIMENSIONS
        or not all(type(size) is int and 0 <= size <= limits.EXTENT for size in shape)
    ):
        raise Malformed("holds a NumPy array with an impossible shape")
    raw = _raw_bytes(data, math.prod(shape) * element[0].itemsize)
    if raw is None:
        raise Malformed("holds a NumPy array whose bytes do not fill its shape")
    return _describe(reading, shape, element, is_fortran, raw)


def _describe(
    reading: Reading, shape: tuple[int, ...], element: tuple[DType, bool], is_fortran: bool, raw: bytes
) -> TensorSpec:
    dtype, big_endian = element
    source = MemorySource(f"{reading.label}: an array", raw)
    storage = Storage("array", source, len(raw), big_endian=big_endian and dtype.itemsize > 1)
    stride = fortran_strides(shape[::-1])[::-1] if not is_fortran else fortran_strides(shape)
    return TensorSpec(dtype, shape, stride, 0, storage, is_numpy=True)


def fortran_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Count elements between neighbours, the first dimension being the fastest."""
    strides, step = [], 1
    for size in shape:
        strides.append(step)
        step *= max(size, 1)
    return tuple(strides)


def _foreign_array(reading: Reading, ref: GlobalRef, parts: tuple[Any, ...]) -> Stub:
    """Keep an array of objects, texts or records as data."""
    is_object = type(parts[2]) is list
    severity = "unknown" if is_object else ref.severity
    doubted = GlobalRef(ref.module, ref.name, severity)
    if is_object:
        reading.log.record(doubted, reading.label, called=True)
        reading.note("object-array", "holds a NumPy array of Python objects")
    return Stub(doubted, parts)


def _from_buffer(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Read what protocol 5 writes for an array: bytes, element type, shape, order."""
    if len(args) != 4 or args[3] not in ("C", "F"):
        return reading.misfit(ref, args)
    data, dtype, shape, order = args
    return _array(reading, GlobalRef("numpy", "ndarray", "safe"), (shape, dtype, order == "F", data))


HANDLERS: dict[tuple[str, str], Handler] = {
    ("numpy", "dtype"): _make_dtype,
    ("numpy._core.multiarray", "scalar"): _make_scalar,
    ("numpy._core.multiarray", "_reconstruct"): _begin_array,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
}

REFERENCES = frozenset({("numpy", "ndarray")})
