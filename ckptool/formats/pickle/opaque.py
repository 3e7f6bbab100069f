"""What torch's rebuild functions become that make no dense arrays: described by their parts, never made.

Source: torch/_utils.py, torch/_tensor.py and torch/nested/_internal/nested_tensor.py of torch 2.13.
"""

from __future__ import annotations

from typing import Any

from ckptool.formats.pickle import limits
from ckptool.formats.pickle.reading import Handler, Malformed, Reading
from ckptool.formats.pickle.views import arguments, check_hooks, check_view, dtype_of
from ckptool.model.dtypes import DType
from ckptool.model.values import MOST_DIMENSIONS, DictNode, GlobalRef, OpaqueTensor, TensorSpec

KINDS = {"DTensor": "dtensor", "ShardedTensor": "sharded", "NestedTensor": "nested"}
NARROW = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8))


def attributes(reading: Reading, state: Any) -> tuple[tuple[str, Any], ...]:
    """List what a subclass carries by name; the usual pair is that of its attributes and its slots."""
    if type(state) is tuple and all(part is None or type(part) is DictNode for part in state):
        return tuple(pair for part in state for pair in attributes(reading, part))
    if state is None:
        return ()
    if type(state) is not DictNode:
        return (("state", state),)
    reading.charge(len(state.pairs))
    return tuple((str(key), value) for key, value in state.pairs if type(key) in (str, int))


def _rebuild_qtensor(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    storage, offset, shape, stride, quantizer, _, hooks = arguments(args, 7, 7)
    check_hooks(reading, hooks)
    start = check_view(storage, dtype_of(storage), offset, shape, stride)
    if storage.dtype is None or storage.dtype.kind != "quantized":
        raise Malformed("rebuilds a quantized tensor from a plain storage")
    data = TensorSpec(storage.dtype, shape, stride, start, storage.storage)
    if type(quantizer) is not tuple or not quantizer or type(quantizer[0]) is not str:
        raise Malformed("rebuilds a quantized tensor without its scheme")
    scheme = quantizer[0].removeprefix("torch.")
    return OpaqueTensor(
        "quantized", scheme, storage.dtype, shape, (("data", data), *_quantizer(scheme, quantizer, shape))
    )


def _quantizer(scheme: str, quantizer: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[tuple[str, Any], ...]:
    """Check the parameters of a quantization scheme; a channel's axis and its numbers must fit the shape."""
    if scheme == "per_tensor_affine" and len(quantizer) == 3:
        scale, zero = quantizer[1:]
        if type(scale) in (float, int) and type(zero) is int:
            return (("scale", scale), ("zero_point", zero))
    elif scheme in ("per_channel_affine", "per_channel_affine_float_qparams") and len(quantizer) == 4:
        _, scales, zeros, axis = quantizer
        if type(axis) is int and 0 <= axis < len(shape) and _length(scales) == _length(zeros) == shape[axis]:
            return (("scales", scales), ("zero_points", zeros), ("axis", axis))
    raise Malformed("rebuilds a quantized tensor with parameters that do not fit it")


def _length(value: Any) -> int | None:
    if type(value) is list:
        return len(value)
    return value.numel if type(value) is TensorSpec else None


_SPARSE = {
    "torch.sparse_coo": ("COO", ("indices", "values")),
    "torch.sparse_csr": ("CSR", ("crow_indices", "col_indices", "values")),
    "torch.sparse_csc": ("CSC", ("ccol_indices", "row_indices", "values")),
    "torch.sparse_bsr": ("BSR", ("crow_indices", "col_indices", "values")),
    "torch.sparse_bsc": ("BSC", ("ccol_indices", "row_indices", "values")),
}


def _is_shape(value: Any) -> bool:
    return (
        type(value) is tuple
        and len(value) <= MOST_DIMENSIONS
        and all(type(size) is int and 0 <= size <= limits.EXTENT for size in value)
    )


def _rebuild_sparse_tensor(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Describe a sparse tensor by its dense parts; it is never densified."""
    layout, data = arguments(args, 2, 2)
    detail, names = _SPARSE.get(layout if type(layout) is str else "", ("", ()))
    if not names or type(data) is not tuple or not len(names) < len(data) <= len(names) + 2:
        raise Malformed("rebuilds a sparse tensor of no known layout")
    parts = tuple(zip(names, data[: len(names)], strict=True))
    shape, *flags = data[len(names) :]
    if not _is_shape(shape) or not all(type(part) is TensorSpec for _, part in parts):
        raise Malformed("rebuilds a sparse tensor from something that is none")
    coalesced = (("is_coalesced", flags[0]),) if detail == "COO" and flags and type(flags[0]) is bool else ()
    return OpaqueTensor("sparse", detail, parts[-1][1].dtype, shape, (*parts, *coalesced))


def _rebuild_nested_tensor(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    parts = tuple(zip(("values", "sizes", "strides", "offsets"), arguments(args, 4, 4), strict=True))
    if not all(type(part) is TensorSpec for _, part in parts):
        raise Malformed("rebuilds a nested tensor from something that is none")
    return OpaqueTensor("nested", "strided", parts[0][1].dtype, None, parts)


def _rebuild_jagged_tensor(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    if len(args) != 1 or type(args[0]) is not DictNode:
        return reading.misfit(ref, args)
    parts = attributes(reading, args[0])
    values = args[0].get("values")
    return OpaqueTensor("nested", "jagged", values.dtype if type(values) is TensorSpec else None, None, parts)


def _rebuild_meta_tensor(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    dtype, shape, _, _ = arguments(args, 4, 4)
    detail = f"no data, {dtype.name}" if _is_narrow(dtype) else "no data"
    return OpaqueTensor("meta", detail, *_described(dtype, shape))


def _rebuild_wrapper_subclass(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    kind, dtype, shape = arguments(args, 8, 8)[:3]
    if type(kind) is not GlobalRef:
        return reading.misfit(ref, args)
    return OpaqueTensor(KINDS.get(kind.name, "subclass"), kind.full_name, *_described(dtype, shape))


def _described(dtype: Any, shape: Any) -> tuple[DType | None, tuple[int, ...]]:
    if not _is_shape(shape) or (type(dtype) is not DType and not _is_narrow(dtype)):
        raise Malformed("describes a tensor without an element type or a shape")
    return dtype if type(dtype) is DType else None, shape


def _is_narrow(dtype: Any) -> bool:
    """Tell an element type of less than a byte, which has a name and whose bytes torch cannot save."""
    return type(dtype) is GlobalRef and dtype.module == "torch" and dtype.name in NARROW


REBUILDERS: dict[tuple[str, str], Handler] = {
    ("torch._utils", "_rebuild_qtensor"): _rebuild_qtensor,
    ("torch._utils", "_rebuild_sparse_tensor"): _rebuild_sparse_tensor,
    ("torch._utils", "_rebuild_nested_tensor"): _rebuild_nested_tensor,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _rebuild_meta_tensor,
    ("torch._utils", "_rebuild_wrapper_subclass"): _rebuild_wrapper_subclass,
    ("torch.nested._internal.nested_tensor", "_rebuild_njt"): _rebuild_jagged_tensor,
}
