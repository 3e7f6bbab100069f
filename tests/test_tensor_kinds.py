"""Tensors that are no dense arrays: written as they are, made dense, or refused by name; torch is the judge."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tensors import bits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

MATRIX = torch.tensor([[0, 1.5, 0, 0], [2, 0, 0, -3], [0, 0, 0, 0], [0, 0, 4, 0]])
ODD = torch.tensor([0x80000000 - 2**32, 0x7FA00001, 0xFFC00123 - 2**32], dtype=torch.int32).view(torch.float32)


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def repeated(dtype: torch.dtype) -> torch.Tensor:
    """Give a COO tensor that names most of its places many times."""
    generator = torch.Generator().manual_seed(7)
    places = torch.randint(0, 5, (2, 600), generator=generator)
    values = torch.randint(-100, 100, (600,), generator=generator).double() / 3
    return torch.sparse_coo_tensor(places, values.to(dtype), (5, 6))


def narrow_indices(tensor: torch.Tensor) -> torch.Tensor:
    parts = tensor.crow_indices().int(), tensor.col_indices().int(), tensor.values()
    return torch.sparse_csr_tensor(*parts, size=tensor.shape)


def channels(count: int, kind: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    zeros = torch.arange(count) if kind == torch.float64 else torch.arange(count) + 0.5
    return torch.linspace(0.05, 0.9, count, dtype=kind), zeros


def per_channel(axis: int, dtype: torch.dtype, shape: tuple[int, ...] = (3, 5), kind: torch.dtype = torch.float64):
    return torch.quantize_per_channel(seeded(*shape) * 9, *channels(shape[axis], kind), axis, dtype)


SPARSE: dict[str, Callable[[], torch.Tensor]] = {
    "COO": MATRIX.to_sparse,
    "COO not coalesced": lambda: torch.sparse_coo_tensor([[0, 0, 1], [1, 1, 0]], [1.0, 2.0, 3.0], (2, 3)),
    "COO with dense dimensions": lambda: torch.sparse_coo_tensor([[2, 0]], seeded(2, 3, 2), (4, 3, 2)),
    "COO without sparse dimensions": lambda: torch.sparse_coo_tensor(torch.empty(0, 2).long(), seeded(2, 3), (3,)),
    "COO of odd floats": lambda: torch.sparse_coo_tensor([[0, 1, 2]], ODD, (4,)),
    "COO without values": lambda: torch.zeros(3, 4).to_sparse(),
    "COO without elements": lambda: torch.sparse_coo_tensor(torch.empty(2, 0).long(), torch.empty(0), (0, 4)),
    "COO of large size": lambda: torch.sparse_coo_tensor([[0, 700_000]], [1.0, 2.0], (1_000_003,)),
    **{
        f"COO repeated {name}": lambda name=name: repeated(getattr(torch, name))
        for name in ("float64", "float32", "float16", "bfloat16", "int64", "int8", "uint8", "bool", "complex64")
    },
    "COO conjugated": lambda: torch.sparse_coo_tensor([[1]], torch.tensor([1 + 2j]).conj(), (2,)),
    "CSR": MATRIX.to_sparse_csr,
    "CSR of 32-bit indices": lambda: narrow_indices(MATRIX.to_sparse_csr()),
    "CSR in batches": lambda: torch.stack([MATRIX, MATRIX.roll(1, 0)]).to_sparse_csr(),
    "CSR with dense dimensions": lambda: torch.stack([MATRIX, MATRIX * 2], -1).to_sparse_csr(dense_dim=1),
    "CSR of odd floats": lambda: torch.sparse_csr_tensor([0, 3], [0, 1, 2], ODD, (1, 3)),
    "CSC": MATRIX[:3].to_sparse_csc,
    "BSR": lambda: MATRIX.to_sparse_bsr((2, 2)),
    "BSR of wide blocks": lambda: seeded(4, 6).to_sparse_bsr((2, 3)),
    "BSC": lambda: MATRIX.to_sparse_bsc((2, 1)),
    "BSC in batches": lambda: torch.stack([MATRIX, MATRIX.roll(1, 0)]).to_sparse_bsc((1, 2)),
}

QUANTIZED: dict[str, Callable[[], torch.Tensor]] = {
    "quint8": lambda: torch.quantize_per_tensor(seeded(3, 4), 0.1, 3, torch.quint8),
    "qint8": lambda: torch.quantize_per_tensor(seeded(300, 400), 0.013, -5, torch.qint8),
    "qint32": lambda: torch.quantize_per_tensor(seeded(3, 4), 1e-7, 3, torch.qint32),
    "qint32 that wraps around": lambda: torch._make_per_tensor_quantized_tensor(
        torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32), 0.5, -(2**31)
    ),
    "scalar": lambda: torch.quantize_per_tensor(torch.tensor(1.0), 0.1, 3, torch.quint8),
    "empty": lambda: torch.quantize_per_tensor(torch.empty(0, 3), 0.1, 3, torch.quint8),
    "transposed": lambda: torch.quantize_per_tensor(seeded(3, 4), 0.1, 3, torch.quint8).t(),
    "per row": lambda: per_channel(0, torch.qint8),
    "per column": lambda: per_channel(1, torch.quint8),
    "per channel qint32": lambda: per_channel(1, torch.qint32, (2, 3, 4)),
    "per channel with float zero points": lambda: per_channel(0, torch.quint8, kind=torch.float32),
    "four bits": lambda: per_channel(0, torch.quint4x2, (3, 5), torch.float32),
    "four bits in three dimensions": lambda: per_channel(0, torch.quint4x2, (4, 3, 7), torch.float32),
    "two bits": lambda: per_channel(0, torch.quint2x4, (3, 6), torch.float32),
    "two bits, many": lambda: per_channel(0, torch.quint2x4, (300, 555), torch.float32),
}
NESTED = {"nested": lambda: torch.nested.nested_tensor([seeded(2, 3), seeded(4, 3)])}


def made(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def parts_of(tensor: torch.Tensor) -> list[Any]:
    """List all that there is to a tensor of one of these kinds, as comparable values."""
    what = [tensor.dtype, tensor.layout]
    if tensor.is_quantized and tensor.qscheme() == torch.per_tensor_affine:
        return [*what, tensor.shape, tensor.int_repr().tolist(), tensor.q_scale(), tensor.q_zero_point()]
    if tensor.is_quantized:
        scheme = tensor.q_per_channel_scales().tolist(), tensor.q_per_channel_zero_points().tolist()
        return [*what, tensor.shape, bits(tensor.dequantize()), scheme, tensor.q_per_channel_axis(), tensor.qscheme()]
    if tensor.is_nested:
        return [*what, [bits(part) for part in tensor.unbind()], [part.shape for part in tensor.unbind()]]
    if tensor.layout == torch.sparse_coo:
        return [*what, tensor.shape, tensor._indices(), bits(tensor._values()), tensor.is_coalesced()]
    named = ("crow_indices", "col_indices") if tensor.layout in (torch.sparse_csr, torch.sparse_bsr) else (
        "ccol_indices", "row_indices")  # fmt: skip
    indices = [getattr(tensor, name)() for name in named]
    return [*what, tensor.shape, *indices, bits(tensor.values())]


def same_parts(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    pairs = zip(parts_of(ours), parts_of(theirs), strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(a) else a == b for a, b in pairs)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", [*SPARSE, *QUANTIZED, *NESTED])
def test_a_torch_file_keeps_it(name: str, legacy: bool, tmp_path: Path, run: Callable[..., Any]) -> None:
    tensor = made((SPARSE | QUANTIZED | NESTED)[name])
    state = {"module.w": torch.ones(2), "module.x": tensor, "module.y": tensor}
    torch.save(state, tmp_path / "in.pt", _use_new_zipfile_serialization=not legacy)
    ran = run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt")
    assert ran.status == 0, ran.err
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(written) == ["w", "x", "y"]
    assert same_parts(written["x"], tensor)
    assert written["y"] is written["x"]
    refused = run("convert", tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert (refused.status, '"x", "y": ' in refused.err) == (2, True)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", [*SPARSE, *QUANTIZED])
def test_it_becomes_dense_where_asked(name: str, suffix: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    tensor = made((SPARSE | QUANTIZED)[name])
    torch.save({"w": torch.ones(2), "x": tensor}, tmp_path / "in.pt")
    option, meant = ("--densify", tensor.to_dense()) if name in SPARSE else ("--dequantize", tensor.dequantize())
    out = tmp_path / f"out{suffix}"
    ran = run("convert", tmp_path / "in.pt", out, option)
    assert ran.status == 0, ran.err
    written = (load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True))["x"]
    assert (written.dtype, written.shape, bits(written)) == (meant.dtype, meant.shape, bits(meant.contiguous()))
    assert "dense\tx\t" in ran.out
