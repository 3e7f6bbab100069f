"""Distributed tensors: which are whole on this rank, and which are one rank's part."""

from __future__ import annotations

from typing import Any

from ckptool.model.values import OpaqueTensor, Stub, TensorSpec, walk


def whole_tensors(entries: dict[str, Any]) -> dict[str, Any]:
    """Give distributed tensors that are all on this rank as the plain tensors that they are."""
    if OpaqueTensor not in set(map(type, entries.values())):
        return entries
    return {key: whole_tensor(value) for key, value in entries.items()}


def whole_tensor(value: Any) -> Any:
    """Give the local tensor of a DTensor where it has the shape of the whole; else the value itself.

    Source: torch/distributed/tensor/_api.py, ``DTensor.__tensor_flatten__``; with a ``Partial`` placement the local
    tensor is one term of a sum.
    """
    if not isinstance(value, OpaqueTensor) or value.kind != "dtensor":
        return value
    if any(isinstance(node, Stub) and node.ref.name in ("Partial", "_Partial") for _, node in walk(value)):
        return value
    tensors = (part for _, part in value.parts if isinstance(part, TensorSpec) and part.shape == value.shape)
    return next(tensors, value)


def is_shard(value: Any) -> bool:
    """Tell whether a distributed tensor holds only a part of itself."""
    if not isinstance(value, OpaqueTensor):
        return False
    return value.kind == "sharded" or (value.kind == "dtensor" and whole_tensor(value) is value)
