"""Every element type of torch 2.13 and safetensors 0.8, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["float", "int", "bool", "complex", "bits", "quantized"]


@dataclass(frozen=True, slots=True)
class DType:
    """Describe one element type.

    ``itemsize`` is in bytes. ``storage`` is the typed storage class that torch pickles for it, or None where
    torch writes an ``UntypedStorage`` with ``_rebuild_tensor_v3``. ``safetensors`` is its name in a header,
    ``numpy`` the little-endian NumPy type with the same bit layout; each is None where there is none.
    """

    name: str
    itemsize: int
    kind: Kind
    storage: str | None = None
    safetensors: str | None = None
    numpy: str | None = None

    @property
    def is_floating(self) -> bool:
        """Tell whether a cast (``--dtype``) applies to it."""
        return self.kind == "float" and self.name != "float4_e2m1fn_x2"

    @property
    def has_numbers(self) -> bool:
        """Tell whether its values can be computed with: not those of bits, quantized and packed types."""
        return self.is_floating or self.kind in ("int", "bool", "complex")

    @property
    def swap_size(self) -> int:
        """Give the bytes that are reversed together between byte orders (a complex number is two parts)."""
        return self.itemsize // 2 if self.kind == "complex" else self.itemsize


# Sources: torch/storage.py (_dtype_to_storage_type_map), safetensors/src/tensor.rs (Dtype).
_TABLE = (
    DType("float64", 8, "float", "DoubleStorage", "F64", "<f8"),
    DType("float32", 4, "float", "FloatStorage", "F32", "<f4"),
    DType("float16", 2, "float", "HalfStorage", "F16", "<f2"),
    DType("bfloat16", 2, "float", "BFloat16Storage", "BF16"),
    DType("float8_e4m3fn", 1, "float", None, "F8_E4M3"),
    DType("float8_e5m2", 1, "float", None, "F8_E5M2"),
    DType("float8_e4m3fnuz", 1, "float", None, "F8_E4M3FNUZ"),
    DType("float8_e5m2fnuz", 1, "float", None, "F8_E5M2FNUZ"),
    DType("float8_e8m0fnu", 1, "float", None, "F8_E8M0"),
    # One byte holds two values: torch counts bytes in the last dimension, a safetensors header counts values.
    DType("float4_e2m1fn_x2", 1, "float", None, "F4"),
    DType("int64", 8, "int", "LongStorage", "I64", "<i8"),
    DType("int32", 4, "int", "IntStorage", "I32", "<i4"),
    DType("int16", 2, "int", "ShortStorage", "I16", "<i2"),
    DType("int8", 1, "int", "CharStorage", "I8", "|i1"),
    DType("uint8", 1, "int", "ByteStorage", "U8", "|u1"),
    DType("uint16", 2, "int", None, "U16", "<u2"),
    DType("uint32", 4, "int", None, "U32", "<u4"),
    DType("uint64", 8, "int", None, "U64", "<u8"),
    DType("bool", 1, "bool", "BoolStorage", "BOOL", "|b1"),
    DType("complex32", 4, "complex"),
    DType("complex64", 8, "complex", "ComplexFloatStorage", "C64", "<c8"),
    DType("complex128", 16, "complex", "ComplexDoubleStorage", None, "<c16"),
    DType("bits8", 1, "bits"),
    DType("bits16", 2, "bits"),
    DType("bits1x8", 1, "bits"),
    DType("bits2x4", 1, "bits"),
    DType("bits4x2", 1, "bits"),
    DType("qint8", 1, "quantized", "QInt8Storage"),
    DType("quint8", 1, "quantized", "QUInt8Storage"),
    DType("qint32", 4, "quantized", "QInt32Storage"),
    DType("quint4x2", 1, "quantized", "QUInt4x2Storage"),
    DType("quint2x4", 1, "quantized", "QUInt2x4Storage"),
)

# Quantized elements of less than a byte lie several to a byte; torch counts elements in shapes and offsets.
PER_BYTE = {"quint4x2": 2, "quint2x4": 4}

BY_NAME = {dtype.name: dtype for dtype in _TABLE}
BY_STORAGE = {dtype.storage: dtype for dtype in _TABLE if dtype.storage is not None}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in _TABLE if dtype.safetensors is not None}
BY_NUMPY = {dtype.numpy[1:]: dtype for dtype in _TABLE if dtype.numpy is not None}

# Spellings that torch accepts for the same type (torch.half is torch.float16).
ALIASES = {
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "cfloat": "complex64",
    "cdouble": "complex128",
    "chalf": "complex32",
}


def find(name: str) -> DType | None:
    """Look a torch dtype up by its name or one of its aliases, without the leading ``torch.``."""
    return BY_NAME.get(ALIASES.get(name, name))
