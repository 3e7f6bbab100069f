"""Turn what a reader describes into torch tensors, to compare bit by bit with what the oracle loaded."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch

from ckptool.model.checkpoint import Checkpoint
from ckptool.model.values import DictNode, TensorSpec

# Bits are compared as integers (16 bytes: as a pair), so that NaNs count and every dtype can be indexed.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def torch_bytes(value: Any, **options: Any) -> bytes:
    """Save a value with torch."""
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def storage_bytes(spec: TensorSpec) -> bytes:
    """Read the whole storage of a tensor, little-endian."""
    data = b"".join([bytes(chunk) for chunk in spec.storage.source.stream()])
    size = spec.dtype.swap_size
    if not spec.storage.big_endian or size == 1:
        return data
    return b"".join(data[at : at + size][::-1] for at in range(0, len(data), size))


def materialise(spec: TensorSpec) -> torch.Tensor:
    """Make the tensor that a description means."""
    dtype = getattr(torch, spec.dtype.name)
    data = storage_bytes(spec)
    if not spec.numel:
        return torch.empty(spec.shape, dtype=dtype)
    bits = torch.frombuffer(bytearray(data), dtype=_BITS[spec.dtype.itemsize])
    tensor = bits.as_strided(spec.shape, spec.stride, spec.offset).clone().view(dtype)
    tensor = tensor.conj() if spec.conj else tensor
    return torch._neg_view(tensor) if spec.neg else tensor


def bits(tensor: torch.Tensor) -> bytes:
    """Give the bytes of a tensor's elements in row-major order, lazy bits resolved."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.view(_BITS[plain.element_size()]).numpy().tobytes()


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Demand the same names, and under each the same dtype, shape and bits."""
    assert sorted(found) == sorted(expected)
    kinds = [{name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} for tensors in (found, expected)]
    assert kinds[0] == kinds[1]
    assert [name for name in expected if bits(found[name]) != bits(expected[name])] == []


def same(spec: TensorSpec, tensor: torch.Tensor) -> bool:
    """Tell whether a description means exactly this tensor: dtype, shape and bits."""
    return (
        spec.dtype.name == str(tensor.dtype).removeprefix("torch.")
        and spec.shape == tuple(tensor.shape)
        and bits(materialise(spec)) == bits(tensor)
    )


def tensors_of(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """Give the tensors of a flat checkpoint by name."""
    assert isinstance(checkpoint.root, DictNode)
    return {key: value for key, value in checkpoint.root.text_items().items() if isinstance(value, TensorSpec)}
