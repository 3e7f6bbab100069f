"""Tensors that are no dense arrays: which are written as they are, which become dense, why the others are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ckptool.errors import UnsupportedTensor
from ckptool.model.conversion import MadeDense, OutputKind
from ckptool.model.copies import PlannedOpaque, PlannedTensor
from ckptool.model.dtypes import DType
from ckptool.model.values import OpaqueTensor, TensorSpec
from ckptool.operations.transforms import payload_of

PlaceTensor = Callable[[TensorSpec, str, "DType | None"], PlannedTensor]

# The option that makes a kind dense.
OPTIONS = {"sparse": "--densify", "quantized": "--dequantize"}
# What torch.load(weights_only=True) rebuilds without anything else being imported.
_WRITTEN = frozenset({"sparse", "quantized", "nested"})
_REASONS = {
    "meta": "a meta tensor, which holds no data; save it once it has some",
    "sharded": "one rank's part of a ShardedTensor; save a full state dict",
    "dtensor": "one rank's part of a DTensor; save a full state dict",
    "packed": "of a type that torch does not have",
    "jagged": "a jagged nested tensor, which torch.load refuses unless torch.nested and torch._dynamo are imported",
}
# What settles it for the tensors of a library.
_ADVICE = {"torchao.": "save weight.dequantize() instead, or keep the file as it is, for torchao to load"}


@dataclass(slots=True)
class OpaquePolicy:
    """Say what becomes of each tensor that is no dense array; the same tensor always becomes the same.

    ``densify`` and ``dequantize`` make sparse and quantized ones dense; ``made_dense`` tells which. Without any options
    only dense arrays are accepted. ``keeps_fields``: of objects of foreign classes the fields are written.
    """

    densify: bool = False
    dequantize: bool = False
    kind: OutputKind = "safetensors"
    keeps_fields: bool = False
    made_dense: list[MadeDense] = field(default_factory=list)
    _dense: dict[int, TensorSpec] = field(default_factory=dict)
    _planned: dict[int, PlannedOpaque] = field(default_factory=dict)

    def refusal(self, tensor: OpaqueTensor) -> str:
        """Say why a tensor cannot be written; empty where it can."""
        if self._becomes_dense(tensor):
            return ""
        what = f"{tensor.kind} ({tensor.detail})"
        if tensor.kind not in _WRITTEN or _is_jagged(tensor):
            reason = _REASONS.get("jagged" if _is_jagged(tensor) else tensor.kind)
            return reason or f"{what}, which ckptool does not write{_advice(tensor.detail)}"
        if self.kind == "torch":
            return ""
        option = OPTIONS.get(tensor.kind)
        remedy = f"convert it with {option}, or to a .pt file" if option else "convert it to a .pt file"
        return f"{tensor.kind}, no dense array: {remedy}"

    def dense(self, tensor: OpaqueTensor, key: str) -> TensorSpec | None:
        """Give the dense tensor that it becomes, or None where it stays what it is.

        :raises CkptoolError: its parts do not fit each other, or its type has no dense form.
        """
        if not self._becomes_dense(tensor):
            return None
        if id(tensor) not in self._dense:
            self._dense[id(tensor)] = _make_dense(tensor, key)
        dtype = "" if tensor.dtype is None else tensor.dtype.name
        self.made_dense.append(MadeDense(key, f"{tensor.kind} {tensor.detail} {dtype}".rstrip()))
        return self._dense[id(tensor)]

    def plan(self, tensor: OpaqueTensor, key: str, place: PlaceTensor, cast: DType | None) -> PlannedOpaque:
        """Plan to write a tensor as it is; ``cast`` is for its floating values.

        :raises CkptoolError: it cannot be, or its parts do not fit each other.
        """
        reason = self.refusal(tensor)
        if reason:
            raise UnsupportedTensor(f'tensor "{key}" is {reason}; or leave it out with --exclude')
        if id(tensor) not in self._planned:
            if tensor.kind == "sparse":
                from ckptool.operations.sparse_places import read_runs  # NumPy, only where there are indices to check

                read_runs(tensor, key)
            self._planned[id(tensor)] = _plan(tensor, key, place, cast)
        return self._planned[id(tensor)]

    def _becomes_dense(self, tensor: OpaqueTensor) -> bool:
        return (self.densify and tensor.kind == "sparse") or (self.dequantize and tensor.kind == "quantized")


def _advice(name: str) -> str:
    return next((f"; {text}" for library, text in _ADVICE.items() if name.startswith(library)), "")


def _is_jagged(tensor: OpaqueTensor) -> bool:
    """Tell a nested tensor of one ragged dimension from the older kind of four parts."""
    return tensor.kind == "nested" and tensor.detail == "jagged"


def _make_dense(tensor: OpaqueTensor, key: str) -> TensorSpec:
    """Load NumPy only where it is needed."""
    if tensor.kind == "sparse":
        from ckptool.operations.densify import densify

        return densify(tensor, key)
    from ckptool.operations.dequantize import dequantize

    return dequantize(tensor, key)


def _plan(tensor: OpaqueTensor, key: str, place: PlaceTensor, cast: DType | None) -> PlannedOpaque:
    target = cast if tensor.dtype is not None and tensor.dtype.is_floating else None
    parts = tuple((name, _plan_part(part, f"{key}.{name}", place, target)) for name, part in tensor.parts)
    dtype = target or tensor.dtype
    return PlannedOpaque(tensor.kind, tensor.detail, dtype, tensor.shape, parts)


def _plan_part(part: Any, key: str, place: PlaceTensor, cast: DType | None) -> Any:
    if not isinstance(part, TensorSpec):
        return part
    if part.dtype.kind == "quantized":
        return PlannedTensor(part.dtype, part.shape, payload_of(part, key=key))
    return place(part, key, cast if key.endswith(".values") else None)
