"""What torch's rebuild functions become: views of storages, every bound checked in Python integers.

Source: torch/_utils.py and torch/_tensor.py of torch 2.13 and their ancestors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from ckptool.formats.pickle import opaque
from ckptool.formats.pickle.opaque import KINDS, NARROW, attributes
from ckptool.formats.pickle.reading import Handler, Malformed, PickledStorage, Reading, StorageType
from ckptool.formats.pickle.views import BYTES, arguments, check_hooks, check_view, dtype_of, measure_integers, place
from ckptool.model.dtypes import ALIASES, BY_NAME, BY_STORAGE
from ckptool.model.values import DictNode, GlobalRef, OpaqueTensor, Stub, TensorSpec, walk


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


def _dense(storage: Any, dtype: Any, args: tuple[Any, ...], metadata: Any) -> TensorSpec:
    offset, shape, stride, requires_grad = args
    start = check_view(storage, dtype, offset, shape, stride)
    if dtype.kind == "quantized":
        raise Malformed("rebuilds a plain tensor from a quantized storage")
    if metadata is None:
        return TensorSpec(dtype, shape, stride, start, storage.storage, False, False, requires_grad is True)
    conj, neg = _read_bits(metadata)
    return TensorSpec(dtype, shape, stride, start, storage.storage, conj, neg, requires_grad is True)


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
        span, numel = measure_integers(shape, stride)
        dtype = dtype or BYTES
        # What lies inside a storage that is there need not be asked whether it could be addressed.
        if start or not 0 <= offset < held - span or numel > held:
            offset = place(found, dtype, offset, (span, numel))
        if dtype.kind == "quantized":
            raise Malformed("rebuilds a plain tensor from a quantized storage")
        specs.append(TensorSpec(dtype, shape, stride, offset, storage, False, False, requires_grad))
    return specs


def _rebuild_tensor(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    storage, *view = arguments(args, 4, 4)
    return _dense(storage, dtype_of(storage), (*view, False), None)


def rebuild_tensor_v2(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    storage, *_, hooks, metadata = arguments(args, 6, 7)
    check_hooks(reading, hooks)
    return _dense(storage, dtype_of(storage), args[1:5], metadata)


def _rebuild_tensor_v3(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    storage, *_, hooks, dtype, metadata = arguments(args, 7, 8)
    check_hooks(reading, hooks)
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
    data, requires_grad, hooks = arguments(args, 3, 3)
    check_hooks(reading, hooks)
    return as_parameter(data, requires_grad is True)


def _rebuild_parameter_with_state(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    data, requires_grad, hooks, state = arguments(args, 4, 4)
    check_hooks(reading, hooks)
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
        parts = (("data", data), *attributes(reading, state))
        return OpaqueTensor("subclass", "a tensor with tensors as attributes", data.dtype, data.shape, parts)
    reading.note("tensor-attributes", "a tensor carries Python attributes; they are dropped")
    return data


_LOOKED_AT = 256  # nodes of one tensor's attributes: a pickle may show them again and again
_PLAIN = {("torch", "Tensor"): False, ("torch.nn.parameter", "Parameter"): True}


def _rebuild_from_type(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Read a tensor with attributes or of a subclass; only a rebuild function may make what is inside."""
    function, kind, inner, state = arguments(args, 4, 4)
    if type(function) is Stub:
        reading.note_computed_call(reading.label)
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
    name = KINDS.get(kind.name, "subclass")
    return OpaqueTensor(name, kind.full_name, data.dtype, data.shape, (*parts, *attributes(reading, state)))


def _unwrap_device_tensor(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Take the CPU copy that accelerators without storages write (XLA, MAIA, HPU)."""
    data, dtype, _, requires_grad = arguments(args, 4, 4)
    if type(data) is not TensorSpec:
        raise Malformed("rebuilds a device tensor from something that is none")
    if dtype is not data.dtype:
        reading.note("device-cast", "a tensor of an accelerator was saved in another element type and is kept so")
    return TensorSpec(
        data.dtype, data.shape, data.stride, data.offset, data.storage, data.conj, data.neg, requires_grad is True
    )


# What may stand inside ``_rebuild_from_type_v2``.
REBUILDERS: dict[tuple[str, str], Handler] = {
    **opaque.REBUILDERS,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter_with_state,
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _unwrap_device_tensor,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _unwrap_device_tensor,
    ("torch._utils", "_rebuild_xla_tensor"): _unwrap_device_tensor,
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

# Names that mean something to torch and are never called: tensor types, and element types that cannot be saved.
REFERENCES = frozenset(
    {("torch", "Tensor"), ("torch.storage", "TypedStorage"), ("torch.storage", "_TypedStorage")}
    | {("torch", name) for name in NARROW}
    | {
        (module, f"{element}Tensor")
        for module in ("torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse")
        for element in _ELEMENTS
    }
    | {("torch.nested._internal.nested_tensor", "NestedTensor"), ("torch.distributed.tensor", "DTensor")}
)
