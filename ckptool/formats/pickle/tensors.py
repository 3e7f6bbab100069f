"""What torch's rebuild functions become: views of storages, every bound checked in Python integers.

Source: torch/_utils.py and torch/_tensor.py of torch 2.13 and their ancestors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from ckptool.formats.pickle import limits
from ckptool.formats.pickle.reading import Handler, Malformed, PickledStorage, Reading, StorageType
from ckptool.model.dtypes import ALIASES, BY_NAME, BY_STORAGE, PER_BYTE, DType
from ckptool.model.values import DictNode, GlobalRef, OpaqueTensor, Stub, TensorSpec, walk

_BYTES = BY_NAME["uint8"]


class StorageView(TensorSpec):
    """Stand for a storage in a tree that also holds storages without tensors: all its elements."""

    __slots__ = ()


def view_storage(found: PickledStorage) -> StorageView:
    """Describe a storage as a tensor of all its elements; rebuild functions take it as the storage that it is."""
    return StorageView(found.dtype or _BYTES, (found.numel,), (1,), found.offset, found.storage)


_STORAGES = (PickledStorage, StorageView)
_EXTENT = limits.EXTENT


def _check_view(storage: Any, dtype: Any, offset: Any, shape: Any, stride: Any) -> int:
    """Check that a view lies inside its storage; give its absolute offset in elements.

    A dimension of size 1 ignores its stride, and a view without elements lies everywhere: as in torch.
    """
    if type(storage) not in _STORAGES or type(dtype) is not DType:
        raise Malformed("rebuilds a tensor from something that is no storage or no element type")
    if type(offset) is not int or type(shape) is not tuple or type(stride) is not tuple:
        raise Malformed("rebuilds a tensor with an offset or a shape that is none")
    return _place(storage, dtype, offset, _measure(shape, stride))


def _measure(shape: tuple[Any, ...], stride: tuple[Any, ...]) -> tuple[int, int]:
    """Give the distance from the first element to the last, and the number of elements."""
    if len(shape) != len(stride) or len(shape) > limits.DIMENSIONS:
        raise Malformed(f"rebuilds a tensor with {len(shape)} sizes and {len(stride)} strides")
    span, numel = 0, 1
    for size, step in zip(shape, stride, strict=True):
        if type(size) is not int or type(step) is not int or not 0 <= size <= _EXTENT >= step >= 0:
            raise Malformed("rebuilds a tensor with an impossible size or stride")
        span += (size - 1) * step
        numel *= size
    return span, numel


# Only for sizes that are known to be integers: to the cache, True is 1 and so is 1.0.
_measure_integers = lru_cache(4096)(_measure)


def _place(storage: PickledStorage, dtype: DType, offset: int, measures: tuple[int, int]) -> int:
    span, numel = measures
    if not 0 <= offset <= _EXTENT or numel * dtype.itemsize > _EXTENT:
        raise Malformed("rebuilds a tensor of more bytes than can be addressed")
    held, last = storage.numel, offset + span
    if dtype is not storage.dtype:
        held, last = held * (storage.dtype or _BYTES).itemsize, (last + 1) * dtype.itemsize - 1
    if numel and last >= held * PER_BYTE.get(dtype.name, 1):
        raise Malformed("rebuilds a tensor that reaches beyond its storage")
    return offset if storage.offset == 0 else offset + _first_element(storage, dtype)


def _first_element(storage: PickledStorage, dtype: DType) -> int:
    """Count in elements of ``dtype`` where a part of a legacy storage begins."""
    start, remainder = divmod(storage.offset * (storage.dtype or _BYTES).itemsize, dtype.itemsize)
    if remainder:
        raise Malformed("rebuilds a tensor that begins inside an element")
    return start


def _check_hooks(reading: Reading, hooks: Any) -> None:
    if hooks is not None and not (type(hooks) is DictNode and not hooks.pairs):
        reading.note("backward-hooks", "a tensor carries functions to be called during training; they are dropped")


def _read_bits(metadata: Any) -> tuple[bool, bool]:
    """Read the lazy conjugate and negative bits."""
    if metadata is None:
        return False, False
    if type(metadata) is not DictNode or any(
        key not in ("conj", "neg") or type(value) is not bool for key, value in metadata.pairs if type(key) is str
    ):
        raise Malformed("rebuilds a tensor with flags that torch does not have")
    if len(metadata.text_items()) != len(metadata.pairs):
        raise Malformed("rebuilds a tensor with ambiguous flags")
    return metadata.get("conj", False), metadata.get("neg", False)


def _arguments(args: tuple[Any, ...], least: int, most: int) -> tuple[Any, ...]:
    if not least <= len(args) <= most:
        raise Malformed(f"rebuilds a tensor from {len(args)} arguments")
    return args + (None,) * (most - len(args))


def _dense(storage: Any, dtype: Any, args: tuple[Any, ...], metadata: Any) -> TensorSpec:
    offset, shape, stride, requires_grad = args
    start = _check_view(storage, dtype, offset, shape, stride)
    if dtype.kind == "quantized":
        raise Malformed("rebuilds a plain tensor from a quantized storage")
    if metadata is None:
        return TensorSpec(dtype, shape, stride, start, storage.storage, False, False, requires_grad is True)
    conj, neg = _read_bits(metadata)
    return TensorSpec(dtype, shape, stride, start, storage.storage, conj, neg, requires_grad is True)


def _dtype_of(storage: Any) -> Any:
    """Give the element type of a storage; torch counts an untyped one in bytes."""
    return storage.dtype or _BYTES if type(storage) in _STORAGES else None


def rebuild_views(
    storages: Sequence[PickledStorage],
    offsets: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    strides: Sequence[tuple[int, ...]],
    flags: Sequence[bool],
) -> list[TensorSpec]:
    """Rebuild tensors of their storages' element types without hooks and lazy bits, as nearly all are.

    ``flags`` say which ones require gradients.
    """
    specs = []
    for found, offset, shape, stride, requires_grad in zip(storages, offsets, shapes, strides, flags, strict=True):
        storage, dtype, start, held = found
        span, numel = _measure_integers(shape, stride)
        dtype = dtype or _BYTES
        # What lies inside a storage that is there need not be asked whether it could be addressed.
        if start or not 0 <= offset < held - span or numel > held:
            offset = _place(found, dtype, offset, (span, numel))
        if dtype.kind == "quantized":
            raise Malformed("rebuilds a plain tensor from a quantized storage")
        specs.append(TensorSpec(dtype, shape, stride, offset, storage, False, False, requires_grad))
    return specs


def _rebuild_tensor(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    storage, *view = _arguments(args, 4, 4)
    return _dense(storage, _dtype_of(storage), (*view, False), None)


def rebuild_tensor_v2(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    storage, *_, hooks, metadata = _arguments(args, 6, 7)
    _check_hooks(reading, hooks)
    return _dense(storage, _dtype_of(storage), args[1:5], metadata)


def _rebuild_tensor_v3(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    storage, *_, hooks, dtype, metadata = _arguments(args, 7, 8)
    _check_hooks(reading, hooks)
    return _dense(storage, dtype, args[1:5], metadata)


def as_parameter(data: Any, requires_grad: bool) -> Any:
    """Mark a tensor as a parameter; one that is not dense stays what it is."""
    if type(data) is TensorSpec:
        return TensorSpec(
            data.dtype, data.shape, data.stride, data.offset, data.storage, data.conj, data.neg,
            requires_grad, is_parameter=True,
        )  # fmt: skip
    if type(data) in (OpaqueTensor, Stub):
        return data
    raise Malformed("makes a parameter of something that is no tensor")


def _rebuild_parameter(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    data, requires_grad, hooks = _arguments(args, 3, 3)
    _check_hooks(reading, hooks)
    return as_parameter(data, requires_grad is True)


def _rebuild_parameter_with_state(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    data, requires_grad, hooks, state = _arguments(args, 4, 4)
    _check_hooks(reading, hooks)
    return _with_attributes(reading, as_parameter(data, requires_grad is True), state)


def _make_parameter(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Read a Parameter as torch wrote it before 0.4: called with its data."""
    if not 1 <= len(args) <= 2 or type(args[0]) not in (TensorSpec, OpaqueTensor):
        return reading.misfit(ref, args)
    return as_parameter(args[0], args[1:] != (False,))


def build_parameter(value: TensorSpec, state: Any) -> TensorSpec:
    """Apply the state of a Parameter of torch before 0.4: requires_grad, volatile, hooks."""
    if not value.is_parameter or type(state) is not tuple or len(state) not in (3, 4):
        raise Malformed("sets attributes on a tensor")
    parameter: TensorSpec = as_parameter(value, state[-3] is True)
    return parameter


def _with_attributes(reading: Reading, data: Any, state: Any) -> Any:
    """Take the attributes of a plain tensor for decoration, but those with tensors in them for a part of it.

    A packed weight of bitsandbytes is such a parameter: without its ``quant_state`` its bytes mean nothing.
    """
    if state is None or (type(state) is DictNode and not state.pairs):
        return data
    nodes = islice(walk(state), _LOOKED_AT)
    if type(data) is TensorSpec and any(isinstance(node, TensorSpec | OpaqueTensor) for _, node in nodes):
        parts = (("data", data), *_attributes(reading, state))
        return OpaqueTensor("subclass", "a tensor with tensors as attributes", data.dtype, data.shape, parts)
    reading.note("tensor-attributes", "a tensor carries Python attributes; they are dropped")
    return data


_LOOKED_AT = 256  # nodes of one tensor's attributes: a pickle may show them again and again
_PLAIN = {("torch", "Tensor"): False, ("torch.nn.parameter", "Parameter"): True}
_KINDS = {"DTensor": "dtensor", "ShardedTensor": "sharded", "NestedTensor": "nested"}


def _rebuild_from_type(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Read a tensor with attributes or of a subclass; only a rebuild function may make what is inside."""
    function, kind, inner, state = _arguments(args, 4, 4)
    if type(function) is not GlobalRef or type(kind) is not GlobalRef or type(inner) is not tuple:
        return reading.misfit(ref, args)
    rebuild = REBUILDERS.get((function.module, function.name))
    if rebuild is None:
        return reading.misfit(ref, args)
    reading.log.record(function, reading.label, called=True)
    return _of_type(reading, kind, rebuild(reading, function, inner), state)


def _of_type(reading: Reading, kind: GlobalRef, data: Any, state: Any) -> Any:
    plain = _PLAIN.get((kind.module, kind.name))
    if plain is not None:
        marked = as_parameter(data, data.requires_grad) if plain and type(data) is TensorSpec else data
        return _with_attributes(reading, marked, state)
    if type(data) is OpaqueTensor and data.kind == "nested":
        return data  # its attributes are what it was made of, once more
    parts = data.parts if type(data) is OpaqueTensor else (("data", data),)
    name = _KINDS.get(kind.name, "subclass")
    return OpaqueTensor(name, kind.full_name, data.dtype, data.shape, (*parts, *_attributes(reading, state)))


def _attributes(reading: Reading, state: Any) -> tuple[tuple[str, Any], ...]:
    """List what a subclass carries by name; the usual pair is that of its attributes and its slots."""
    if type(state) is tuple and all(part is None or type(part) is DictNode for part in state):
        return tuple(pair for part in state for pair in _attributes(reading, part))
    if state is None:
        return ()
    if type(state) is not DictNode:
        return (("state", state),)
    reading.charge(len(state.pairs))
    return tuple((str(key), value) for key, value in state.pairs if type(key) in (str, int))


def _rebuild_qtensor(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    storage, offset, shape, stride, quantizer, _, hooks = _arguments(args, 7, 7)
    _check_hooks(reading, hooks)
    start = _check_view(storage, _dtype_of(storage), offset, shape, stride)
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
        and len(value) <= limits.DIMENSIONS
        and all(type(size) is int and 0 <= size <= limits.EXTENT for size in value)
    )


def _rebuild_sparse_tensor(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Describe a sparse tensor by its dense parts; it is never densified."""
    layout, data = _arguments(args, 2, 2)
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
    parts = tuple(zip(("values", "sizes", "strides", "offsets"), _arguments(args, 4, 4), strict=True))
    if not all(type(part) is TensorSpec for _, part in parts):
        raise Malformed("rebuilds a nested tensor from something that is none")
    return OpaqueTensor("nested", "strided", parts[0][1].dtype, None, parts)


def _rebuild_jagged_tensor(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    if len(args) != 1 or type(args[0]) is not DictNode:
        return reading.misfit(ref, args)
    parts = _attributes(reading, args[0])
    values = args[0].get("values")
    return OpaqueTensor("nested", "jagged", values.dtype if type(values) is TensorSpec else None, None, parts)


def _rebuild_meta_tensor(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    dtype, shape, _, _ = _arguments(args, 4, 4)
    detail = f"no data, {dtype.name}" if _is_narrow(dtype) else "no data"
    return OpaqueTensor("meta", detail, *_described(dtype, shape))


def _rebuild_wrapper_subclass(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    kind, dtype, shape = _arguments(args, 8, 8)[:3]
    if type(kind) is not GlobalRef:
        return reading.misfit(ref, args)
    return OpaqueTensor(_KINDS.get(kind.name, "subclass"), kind.full_name, *_described(dtype, shape))


def _described(dtype: Any, shape: Any) -> tuple[DType | None, tuple[int, ...]]:
    if not _is_shape(shape) or (type(dtype) is not DType and not _is_narrow(dtype)):
        raise Malformed("describes a tensor without an element type or a shape")
    return dtype if type(dtype) is DType else None, shape


def _is_narrow(dtype: Any) -> bool:
    """Tell an element type of less than a byte, which has a name and whose bytes torch cannot save."""
    return type(dtype) is GlobalRef and dtype.module == "torch" and dtype.name in _NARROW


def _unwrap_device_tensor(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Take the CPU copy that accelerators without storages write (XLA, MAIA, HPU)."""
    data, dtype, _, requires_grad = _arguments(args, 4, 4)
    if type(data) is not TensorSpec:
        raise Malformed("rebuilds a device tensor from something that is none")
    if dtype is not data.dtype:
        reading.note("device-cast", "a tensor of an accelerator was saved in another element type and is kept so")
    return TensorSpec(
        data.dtype, data.shape, data.stride, data.offset, data.storage, data.conj, data.neg, requires_grad is True
    )


# What may stand inside ``_rebuild_from_type_v2``.
REBUILDERS: dict[tuple[str, str], Handler] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter_with_state,
    ("torch._utils", "_rebuild_qtensor"): _rebuild_qtensor,
    ("torch._utils", "_rebuild_sparse_tensor"): _rebuild_sparse_tensor,
    ("torch._utils", "_rebuild_nested_tensor"): _rebuild_nested_tensor,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _rebuild_meta_tensor,
    ("torch._utils", "_rebuild_wrapper_subclass"): _rebuild_wrapper_subclass,
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _unwrap_device_tensor,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _unwrap_device_tensor,
    ("torch._utils", "_rebuild_xla_tensor"): _unwrap_device_tensor,
    ("torch.nested._internal.nested_tensor", "_rebuild_njt"): _rebuild_jagged_tensor,
}

HANDLERS: dict[tuple[str, str], Handler] = {
    **REBUILDERS,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch.nn.parameter", "Parameter"): _make_parameter,
}

_UNTYPED = ("UntypedStorage", "_UntypedStorage")
# TorchScript has typed storages for these, too (c10/core/ScalarType.h, toString).
_SCRIPTED = {
    "UInt16Storage": "uint16", "UInt32Storage": "uint32", "UInt64Storage": "uint64", "ComplexHalfStorage": "complex32",
    "Float8_e4m3fnStorage": "float8_e4m3fn", "Float8_e5m2Storage": "float8_e5m2",
    "Float8_e4m3fnuzStorage": "float8_e4m3fnuz", "Float8_e5m2fnuzStorage": "float8_e5m2fnuz",
    "Float8_e8m0fnuStorage": "float8_e8m0fnu",
}  # fmt: skip
STORAGE_TYPES: dict[tuple[str, str], StorageType] = {
    **{
        (module, name): StorageType(name, dtype)
        for module in ("torch", "torch.cuda")
        for name, dtype in BY_STORAGE.items()
    },
    **{("torch", name): StorageType(name, BY_NAME[dtype]) for name, dtype in _SCRIPTED.items()},
    **{(module, name): StorageType(name, None) for module in ("torch", "torch.storage") for name in _UNTYPED},
}

_SCHEMES = (
    "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric",
    "per_channel_affine_float_qparams",
)  # fmt: skip

# Names that stand for a plain value.
CONSTANTS: dict[tuple[str, str], Any] = {
    **{("torch", name): dtype for name, dtype in BY_NAME.items()},
    **{("torch", alias): BY_NAME[name] for alias, name in ALIASES.items() if not alias.startswith(("fp", "bf"))},
    **{("torch", scheme): f"torch.{scheme}" for scheme in _SCHEMES},
}

_ELEMENTS = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
_NARROW = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8))

# Names that mean something to torch and are never called: tensor types, and element types that cannot be saved.
REFERENCES = frozenset(
    {("torch", "Tensor"), ("torch.storage", "TypedStorage"), ("torch.storage", "_TypedStorage")}
    | {("torch", name) for name in _NARROW}
    | {
        (module, f"{element}Tensor")
        for module in ("torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse")
        for element in _ELEMENTS
    }
    | {("torch.nested._internal.nested_tensor", "NestedTensor"), ("torch._dynamo.decorators", "_DimRange")}
    | {("torch.distributed.tensor", "DTensor")}
)
