"""Tensors that are no dense arrays: written as they are, made dense, or refused by name; torch is the judge."""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.crafted import archived, unzipped
from support.tensors import bits, torch_bytes

from ckptool.formats import open_checkpoint
from ckptool.operations.densify import densify
from ckptool.operations.dequantize import dequantize
from ckptool.operations.describe import describe
from ckptool.reports.canvas import Canvas
from ckptool.reports.inspect_view import view

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
    "CSR without values": lambda: torch.zeros(3, 4).to_sparse_csr(),
    "CSR without values in batches": lambda: torch.zeros(2, 3, 4).to_sparse_csr(),
    "CSR without rows": lambda: torch.zeros(0, 4).to_sparse_csr(),
    "CSC without columns": lambda: torch.zeros(3, 0).to_sparse_csc(),
    "BSR without values": lambda: torch.zeros(4, 6).to_sparse_bsr((2, 3)),
    "CSR of empty elements": lambda: torch.zeros(2, 2, 0).to_sparse_csr(dense_dim=1),
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


def test_both_options_and_a_cast_go_together(tmp_path: Path, run: Callable[..., Any]) -> None:
    state = {"s": MATRIX.to_sparse_csr(), "q": made(QUANTIZED["per row"]), "n": made(NESTED["nested"])}
    torch.save({"model": state, "epoch": 3}, tmp_path / "in.pt")
    assert run("convert", tmp_path / "in.pt", tmp_path / "kept.pt", "--dtype", "float16", "--keep-rest").status == 0
    kept = torch.load(tmp_path / "kept.pt", weights_only=True)
    assert kept["epoch"] == 3
    assert same_parts(kept["model"]["s"], state["s"].to(torch.float16))
    assert same_parts(kept["model"]["q"], state["q"])
    assert same_parts(kept["model"]["n"], state["n"].to(torch.float16))
    options = ("--dtype", "bfloat16", "--densify", "--dequantize", "--exclude", "n", "--digest")
    ran = run("convert", tmp_path / "in.pt", tmp_path / "dense.safetensors", *options)
    assert ran.status == 0, ran.err
    dense = load_file(tmp_path / "dense.safetensors")
    assert torch.equal(dense["s"], MATRIX.to(torch.bfloat16))
    assert torch.equal(dense["q"], state["q"].dequantize().to(torch.bfloat16))


def test_a_digest_of_what_has_no_dense_form_is_refused(tmp_path: Path, run: Callable[..., Any]) -> None:
    torch.save({"w": torch.ones(2), "x": MATRIX.to_sparse()}, tmp_path / "in.pt")
    ran = run("convert", tmp_path / "in.pt", tmp_path / "out.pt", "--digest")
    assert (ran.status, "--densify" in ran.err, (tmp_path / "out.pt").exists()) == (2, True, False)


def test_a_quantized_module_survives(tmp_path: Path, run: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(4, 4)), dtype=torch.qint8)
        expected = network(torch.ones(1, 4))
        torch.save(torch.nn.DataParallel(network).state_dict(), tmp_path / "in.pt")
        assert run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt").status == 0
        network[0].set_weight_bias(torch.quantize_per_tensor(torch.zeros(4, 4), 1.0, 0, torch.qint8), torch.zeros(4))
        assert not torch.equal(network(torch.ones(1, 4)), expected)
        network.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
        assert torch.equal(network(torch.ones(1, 4)), expected)


# --- what is no tensor that anybody could write ---


class Own(torch.Tensor):
    """Stand for the tensor of a library."""


def with_tensors() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(4, 1).to(torch.uint8), requires_grad=False)
    parameter.quant_state = {"absmax": torch.ones(2)}
    return parameter


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "meta": (lambda: torch.empty(3, device="meta"), "holds no data"),
    "jagged": (
        lambda: torch.nested.nested_tensor([seeded(2, 3), seeded(4, 3)], layout=torch.jagged),
        "a jagged nested tensor, which torch.load refuses",
    ),
    "subclass": (lambda: seeded(3).as_subclass(Own), "test_tensor_kinds.Own), which ckptool does not write"),
    "a parameter with tensors": (with_tensors, "subclass (a tensor with tensors as attributes)"),
    "records": (lambda: np.zeros(2, dtype=[("a", "f4")]), "a NumPy array of records, which no tensor can hold"),
    "objects": (lambda: np.array([1, "a"], dtype=object), "a NumPy array of objects"),
    "texts": (lambda: np.array(["a"]), "a NumPy array of texts"),
    "dates": (lambda: np.array(["2020-01-01"], "M8[D]"), "a NumPy array of dates"),
    "long floats": (lambda: np.zeros(2, np.longdouble), "a NumPy array of long floats"),
    "a list of them": (lambda: [torch.empty(3, device="meta")], "holds no data"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_refused_by_name(
    name: str, suffix: str, tmp_path: Path, run: Callable[..., Any]
) -> None:
    make, says = REFUSED[name]
    path, out = tmp_path / "in.pt", tmp_path / f"out{suffix}"
    torch.save({"a.w": torch.ones(2), "b.w": torch.ones(2), "a.x": made(make)}, path)
    ran = run("convert", path, out, "--densify", "--dequantize")
    assert (ran.status, '"a.x": ' in ran.err, says in ran.err, out.exists()) == (2, True, True, False), ran.err
    assert run("convert", path, out, "--exclude", "a.x").status == 0
    assert run("inspect", path, "--tensors", "--tree", "--stats").status == 0
    assert run("diff", path, path).status == (2 if name == "meta" else 0)  # no values can be told apart


def test_a_tensor_of_torchao_is_refused_with_what_settles_it(tmp_path: Path, run: Callable[..., Any]) -> None:
    kind = type("Int8Tensor", (Own,), {"__module__": "torchao.quantization"})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torchao", "torchao.quantization"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(sys.modules["torchao.quantization"], "Int8Tensor", kind, raising=False)
        torch.save({"x": seeded(2, 2).as_subclass(kind), "w": torch.ones(1)}, tmp_path / "in.pt")
    ran = run("convert", tmp_path / "in.pt", tmp_path / "out.pt")
    assert (ran.status, "save weight.dequantize()" in ran.err) == (2, True)


# --- NumPy arrays beside tensors ---

ARRAYS: dict[str, np.ndarray] = {
    **{f"little {code}": np.arange(6).reshape(2, 3).astype(f"<{code}") for code in ("f4", "f8", "i2", "u8", "c16")},
    **{f"big {code}": np.arange(6).reshape(2, 3).astype(f">{code}") for code in ("f2", "f4", "i8", "u4", "c8")},
    "Fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "scalar array": np.array(3.5),
    "empty": np.empty((0, 3)),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_arrays_become_the_tensors_that_they_mean(
    suffix: str, module: str, tmp_path: Path, run: Callable[..., Any]
) -> None:
    arrays = {name: array for name, array in ARRAYS.items() if suffix == ".pt" or name != "little c16"}
    members = unzipped(torch_bytes({"w": torch.ones(1), **arrays}))
    (name,) = [name for name in members if name.endswith("data.pkl")]
    members[name] = members[name].replace(b"numpy._core", module.encode())
    (tmp_path / "in.pt").write_bytes(archived(members))
    ran = run("convert", tmp_path / "in.pt", tmp_path / f"out{suffix}")
    assert (ran.status, f"{len(arrays)} NumPy array(s) are written as tensors" in ran.err) == (0, True), ran.err
    out = tmp_path / f"out{suffix}"
    written = torch.load(out, weights_only=True) if suffix == ".pt" else load_file(out)
    for name, array in arrays.items():
        meant = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))).reshape(array.shape))
        assert (written[name].dtype, written[name].shape) == (meant.dtype, meant.shape)
        assert bits(written[name]) == bits(meant)


SCALARS = {
    "f": np.float32(1.5),
    "h": np.float16(0.1),
    "i": np.int64(-3),
    "b": np.bool_(True),
    "c": np.complex64(1 + 2j),
}


def test_scalars_become_plain_numbers(tmp_path: Path, run: Callable[..., Any]) -> None:
    torch.save({**{f"w{index}": torch.ones(1) for index in range(6)}, **SCALARS}, tmp_path / "in.pt", pickle_protocol=4)
    assert run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt", "--keep-prefixes").status == 0
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert {name: written[name] for name in SCALARS} == {name: scalar.item() for name, scalar in SCALARS.items()}


# --- files of big-endian machines ---


def big_endian(state: dict[str, Any], sizes: list[int]) -> bytes:
    """Write what a big-endian machine would have; ``sizes`` are those of the elements of each storage."""
    members = unzipped(torch_bytes(state))
    swapped = {}
    for name, data in members.items():
        size = sizes[int(name.rpartition("/")[2])] if "/data/" in name else 1
        swapped[name] = b"".join(data[at : at + size][::-1] for at in range(0, len(data), size))
    return archived(swapped | {name: b"big" for name in members if name.endswith("byteorder")})


BIG = {
    "COO": (SPARSE["COO"], [8, 4]),
    "CSR": (SPARSE["CSR of 32-bit indices"], [4, 4, 4]),
    "complex": (SPARSE["COO repeated complex64"], [8, 4]),
    "bfloat16": (SPARSE["COO repeated bfloat16"], [8, 2]),
    "qint32": (QUANTIZED["qint32"], [4]),
    "per channel": (QUANTIZED["per column"], [1, 8, 8]),
    "four bits": (QUANTIZED["four bits"], [1, 4, 4]),
    "nested": (NESTED["nested"], [4, 8, 8, 8]),
}


@pytest.mark.parametrize("name", BIG)
def test_big_endian_files(name: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    make, sizes = BIG[name]
    tensor = made(make)
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    path.write_bytes(big_endian({"x": tensor, "w": torch.ones(2)}, [*sizes, 4]))
    assert same_parts(torch.load(path, weights_only=True)["x"], tensor)  # torch agrees on what the file means
    assert run("strip-prefixes", path, out).status == 0
    assert same_parts(torch.load(out, weights_only=True)["x"], tensor)
    if name != "nested":
        assert run("convert", path, tmp_path / "out.safetensors", "--densify", "--dequantize").status == 0
        dense = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
        assert bits(load_file(tmp_path / "out.safetensors")["x"]) == bits(dense.contiguous())


# --- sparse tensors that contradict themselves ---


def crafted_sparse(layout: str, *parts: Any) -> bytes:
    """Write a sparse tensor as it is said to be, without torch's checks."""

    class Sparse:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_sparse_tensor, (getattr(torch, f"sparse_{layout}"), parts)

    return torch_bytes({"w": torch.ones(2), "x": Sparse()})


def longs(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


TWO, SIZE = torch.ones(2), torch.Size((3, 4))
CONTRADICTORY: dict[str, tuple[str, tuple[Any, ...]]] = {
    "index too large": ("coo", (longs([0, 3], [0, 0]), TWO, SIZE, False)),
    "index negative": ("coo", (longs([0, -1], [0, 0]), TWO, SIZE, False)),
    "more values than indices": ("coo", (longs([0, 1], [0, 0]), torch.ones(3), SIZE, False)),
    "more dimensions than sizes": ("coo", (longs([0, 1], [0, 0], [0, 0]), TWO, SIZE, False)),
    "one dimension of indices": ("coo", (longs(0, 1), TWO, SIZE, False)),
    "values of another shape": ("coo", (longs([0, 1]), torch.ones(2, 5), SIZE, False)),
    "crow does not begin with 0": ("csr", (longs(1, 1, 1, 2), longs(0, 1), TWO, SIZE)),
    "crow does not end with the count": ("csr", (longs(0, 1, 1, 1), longs(0, 1), TWO, SIZE)),
    "crow falls": ("csr", (longs(0, 2, 1, 2), longs(0, 1), TWO, SIZE)),
    "crow too short": ("csr", (longs(0, 2), longs(0, 1), TWO, SIZE)),
    "column too large": ("csr", (longs(0, 1, 1, 2), longs(0, 4), TWO, SIZE)),
    "row too large": ("csc", (longs(0, 1, 1, 1, 2), longs(0, 3), TWO, SIZE)),
    "no matrix": ("csr", (longs(0, 2), longs(0, 1), TWO, torch.Size((4,)))),
    "blocks that do not fit": ("bsr", (longs(0, 1), longs(0), torch.ones(1, 2, 2), SIZE)),
    "blocks without size": ("bsr", (longs(0, 1), longs(0), torch.ones(1, 0, 2), SIZE)),
    "scalars": ("csr", (torch.tensor(0), torch.tensor(0), torch.tensor(1.0), SIZE)),
}


@pytest.mark.parametrize("options", [(), ("--densify",)], ids=["kept", "dense"])
@pytest.mark.parametrize("name", CONTRADICTORY)
def test_contradictory_sparse_tensors_are_refused_as_torch_does(
    name: str, options: tuple[str, ...], tmp_path: Path, run: Callable[..., Any]
) -> None:
    layout, parts = CONTRADICTORY[name]
    path = tmp_path / "in.pt"
    path.write_bytes(crafted_sparse(layout, *parts))
    with pytest.raises(RuntimeError), torch.sparse.check_sparse_tensor_invariants():
        torch.load(path, weights_only=True)
    ran = run("convert", path, tmp_path / "out.pt", *options)
    assert (ran.status, '"x"' in ran.err, "--exclude" in ran.err) == (2, True, True), ran.err
    assert not (tmp_path / "out.pt").exists()
    assert run("inspect", path).status == 0


@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        ("coo", (longs([1, 0, 1], [0, 0, 0]), torch.tensor([0.1, 0.2, 0.3]), SIZE, True)),
        ("csr", (longs(0, 2, 2, 2), longs(3, 0), TWO, SIZE)),
        ("bsc", (longs(0, 2, 2), longs(2, 0), torch.arange(4.0).view(2, 1, 2), SIZE)),
    ],
)
def test_indices_need_not_be_sorted(
    layout: str, parts: tuple[Any, ...], tmp_path: Path, run: Callable[..., Any]
) -> None:
    path = tmp_path / "in.pt"
    path.write_bytes(crafted_sparse(layout, *parts))
    meant = torch.load(path, weights_only=True)["x"]
    assert run("convert", path, tmp_path / "kept.pt").status == 0
    assert same_parts(torch.load(tmp_path / "kept.pt", weights_only=True)["x"], meant)
    assert run("convert", path, tmp_path / "dense.pt", "--densify").status == 0
    assert bits(torch.load(tmp_path / "dense.pt", weights_only=True)["x"]) == bits(meant.to_dense())


def test_a_compressed_tensor_with_a_place_named_twice_stays_what_it_is(tmp_path: Path, run: Callable[..., Any]) -> None:
    path = tmp_path / "in.pt"
    path.write_bytes(crafted_sparse("csr", longs(0, 2, 2, 2), longs(1, 1), TWO, SIZE))
    assert run("convert", path, tmp_path / "kept.pt").status == 0
    ran = run("convert", path, tmp_path / "dense.pt", "--densify")
    assert (ran.status, "names a place twice" in ran.err) == (2, True)


def test_a_huge_dense_size_is_refused(tmp_path: Path, run: Callable[..., Any]) -> None:
    for size in (10**12, 2**62):
        torch.save({"x": torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], (size,))}, tmp_path / "in.pt")
        assert run("convert", tmp_path / "in.pt", tmp_path / "out.pt", "--force").status == 0
        ran = run("convert", tmp_path / "in.pt", tmp_path / "dense.pt", "--densify")
        assert (ran.status, (tmp_path / "dense.pt").exists()) == (2, False)
        assert "--force" in ran.err or "too large" in ran.err


@pytest.mark.parametrize("name", ["float8_e5m2", "uint16", "complex32"])
def test_what_torch_cannot_densify_is_refused(name: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    values = torch.zeros(2, dtype=torch.uint8).view(torch.uint8).to(torch.float32).to(getattr(torch, name))
    torch.save({"x": torch.sparse_coo_tensor([[0, 1]], values, (3,))}, tmp_path / "in.pt")
    ran = run("convert", tmp_path / "in.pt", tmp_path / "out.pt", "--densify")
    assert (ran.status, f"sparse and {name}" in ran.err) == (2, True), ran.err


# --- what inspect says ---

SHOWN: dict[str, tuple[Callable[[], torch.Tensor], dict[str, Any]]] = {
    "COO": (SPARSE["COO"], {"kind": "sparse", "detail": "COO", "stored": 4, "density": 0.25, "coalesced": True}),
    "COO hybrid": (SPARSE["COO with dense dimensions"], {"stored": 2, "density": 0.5, "shape": [4, 3, 2]}),
    "CSR": (SPARSE["CSR of 32-bit indices"], {"detail": "CSR", "stored": 4, "index_dtype": "int32", "bytes": 52}),
    "BSR": (SPARSE["BSR of wide blocks"], {"detail": "BSR", "block": [2, 3], "stored": 4}),
    "per tensor": (QUANTIZED["quint8"], {"detail": "per_tensor_affine", "dtype": "quint8", "scale": 0.1,
                                         "zero_point": 3, "bytes": 12}),
    "per channel": (QUANTIZED["per column"], {"detail": "per_channel_affine", "axis": 1, "channels": 5}),
    "four bits": (QUANTIZED["four bits"], {"dtype": "quint4x2", "shape": [3, 5], "bytes": 9 + 12 + 12}),
    "nested": (NESTED["nested"], {"kind": "nested", "detail": "strided", "tensors": 2, "shape": None}),
    "jagged": (REFUSED["jagged"][0], {"kind": "nested", "tensors": 2, "dtype": "float32"}),
    "meta": (REFUSED["meta"][0], {"kind": "meta", "shape": [3], "bytes": 0, "parts": []}),
    "subclass": (REFUSED["subclass"][0], {"kind": "subclass", "bytes": 12}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_inspect_shows_what_it_holds(name: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    make, facts = SHOWN[name]
    torch.save({"module.w": torch.ones(2), "module.x": made(make)}, tmp_path / "in.pt")
    answer = json.loads(run("inspect", tmp_path / "in.pt", "--json").out)
    (shown,) = answer["not_dense"]
    assert (shown["key"], shown["source_key"]) == ("x", "module.x")
    assert {field: shown[field] for field in facts} == facts
    assert sum(part["bytes"] for part in shown["parts"]) == shown["bytes"]
    (line,) = [line for line in run("inspect", tmp_path / "in.pt").out.splitlines() if line.startswith("not_dense\t")]
    assert line.split("\t")[1:4] == ["x", "module.x", shown["kind"]]
    with open_checkpoint(tmp_path / "in.pt") as checkpoint:
        drawn = view(describe(checkpoint), Canvas(400, color=False))
    (row,) = [row for row in drawn.splitlines() if row.startswith("Not dense")]
    assert f"x · {shown['kind']} {shown['detail']}" in row


def test_equal_ones_compare_equal_and_others_do_not(tmp_path: Path, run: Callable[..., Any]) -> None:
    for name, make in (SPARSE | QUANTIZED | NESTED).items():
        torch.save({"w": torch.ones(2), "x": made(make)}, tmp_path / "a.pt")
        assert run("diff", tmp_path / "a.pt", tmp_path / "a.pt").status == 0, name
    torch.save({"w": torch.ones(2), "x": MATRIX.to_sparse()}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(2), "x": (MATRIX * 2).to_sparse()}, tmp_path / "b.pt")
    assert run("diff", tmp_path / "a.pt", tmp_path / "b.pt").status != 0


# --- element types of less than a byte, and packed weights of libraries ---


@pytest.mark.parametrize("name", ["float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2", "complex32"])
def test_types_without_numbers_keep_their_bytes(name: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    torch.save({"w": torch.ones(2), "x": codes.view(getattr(torch, name))[1:]}, tmp_path / "in.pt")
    assert run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt").status == 0
    written = torch.load(tmp_path / "out.pt", weights_only=True)["x"]
    assert written.dtype == getattr(torch, name)
    assert bytes(written.untyped_storage()) == bytes(codes[written.element_size() :].untyped_storage())[
        written.element_size() :
    ]  # fmt: skip
    refused = run("convert", tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert (refused.status, name in refused.err) == ((0, False) if name.startswith("float4") else (2, True))


@pytest.mark.parametrize("name", ["uint1", "uint4", "int2", "int7"])
def test_types_that_have_no_bytes_yet_are_described(name: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    shape = torch.empty(3, dtype=getattr(torch, name), device="meta")
    torch.save({"w": torch.ones(2), "x": shape}, tmp_path / "in.pt")
    (shown,) = json.loads(run("inspect", tmp_path / "in.pt", "--json").out)["not_dense"]
    assert (shown["kind"], shown["detail"], shown["shape"]) == ("meta", f"no data, {name}", [3])
    assert run("convert", tmp_path / "in.pt", tmp_path / "out.pt").status == 2


def test_tied_ones_stay_tied_when_dense(tmp_path: Path, run: Callable[..., Any]) -> None:
    tensor = MATRIX.to_sparse_csc()
    torch.save({"w": torch.ones(2), "x": tensor, "y": tensor}, tmp_path / "in.pt")
    assert run("convert", tmp_path / "in.pt", tmp_path / "out.pt", "--densify").status == 0
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert written["x"].data_ptr() == written["y"].data_ptr()


# As bitsandbytes 0.50.2 saves a Linear4bit with nested statistics and a Linear8bitLt.
BITSANDBYTES = {
    "0.weight": torch.zeros(1024, 1, dtype=torch.uint8), "0.bias": torch.ones(32),
    "0.weight.absmax": torch.zeros(32, dtype=torch.uint8), "0.weight.quant_map": torch.full((16,), 0.1),
    "0.weight.nested_absmax": torch.full((1,), 1e-9), "0.weight.nested_quant_map": torch.full((256,), 0.1),
    "0.weight.quant_state.bitsandbytes__nf4": torch.zeros(167, dtype=torch.uint8),
    "1.weight": torch.zeros(16, 32, dtype=torch.int8), "1.bias": torch.ones(16), "1.SCB": torch.full((16,), 1e-9),
    "1.weight_format": torch.tensor(0, dtype=torch.uint8), "2.absmax": torch.ones(2),
}  # fmt: skip


def test_a_cast_leaves_the_scales_of_packed_weights(tmp_path: Path, run: Callable[..., Any]) -> None:
    torch.save(BITSANDBYTES, tmp_path / "in.pt")
    ran = run("convert", tmp_path / "in.pt", tmp_path / "out.safetensors", "--dtype", "float16")
    assert (ran.status, "4 scale(s) of bitsandbytes keep their type" in ran.err) == (0, True), ran.err
    written = load_file(tmp_path / "out.safetensors")
    cast = {"0.bias", "1.bias", "2.absmax"}
    assert {name for name, tensor in written.items() if tensor.dtype == torch.float16} == cast
    assert all(torch.equal(written[name], BITSANDBYTES[name]) for name in BITSANDBYTES.keys() - cast)


# --- hostile ones ---


def crafted_quantized(quantizer: tuple[Any, ...], storage: Any = None) -> bytes:
    """Write a quantized tensor with any scheme."""
    codes = torch.quantize_per_tensor(torch.ones(2, 3), 0.5, 1, torch.qint8)
    held = codes._typed_storage() if storage is None else storage

    class Quantized:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_qtensor, (held, 0, (2, 3), (3, 1), quantizer, False, OrderedDict())

    return torch_bytes({"w": torch.ones(2), "x": Quantized()})


HOSTILE: dict[str, Callable[[], bytes]] = {
    "zero point too large": lambda: crafted_quantized((torch.per_tensor_affine, 0.1, 2**31)),
    "scale too large": lambda: crafted_quantized((torch.per_tensor_affine, 10**150, 0)),
    "scales of text": lambda: crafted_quantized((torch.per_channel_affine, ["a", "b"], [0, 0], 0)),
    "scales in lists": lambda: crafted_quantized((torch.per_channel_affine, [[1], [2, 3]], [0, 0], 0)),
    "zero points too large": lambda: crafted_quantized((torch.per_channel_affine, [1.0, 2.0], [2**70, 0], 0)),
    "scales of bools": lambda: crafted_quantized(
        (torch.per_channel_affine, torch.ones(2).bool(), torch.zeros(2).long(), 0)
    ),
    "a plain storage": lambda: crafted_quantized((torch.per_tensor_affine, 0.1, 0), torch.ones(6)._typed_storage()),
    "indices without dimensions": lambda: crafted_sparse(
        "coo", torch.empty(0, 2**40).long(), torch.ones(1).expand(2**40), torch.Size(()), False
    ),
    "indices of nothing": lambda: crafted_sparse(
        "coo", torch.empty(0, 2**40).long(), torch.empty(2**40, 0), torch.Size((0,)), False
    ),
    "a block of repeated values": lambda: crafted_sparse(
        "bsr", longs(0, 1), longs(0), torch.ones(1).expand(1, 2**40, 1), torch.Size((2**40, 1))
    ),
    "a block of nothing": lambda: crafted_sparse(
        "bsr", longs(0, 1), longs(0), torch.empty(1, 2**40, 1, 0), torch.Size((2**40, 1, 0))
    ),
    "many batches of nothing": lambda: crafted_sparse(
        "csr", torch.empty(2**40, 0).long(), torch.empty(2**40, 0).long(), torch.empty(2**40, 0),
        torch.Size((2**40, 0, 4)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_one_is_answered_in_one_sentence(name: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    path = tmp_path / "in.pt"
    path.write_bytes(made(HOSTILE[name]))
    for arguments in (("inspect", path), ("diff", path, path), ("verify", path)):
        assert run(*arguments).status in (0, 1, 2)
    for option in ((), ("--densify", "--dequantize")):
        ran = run("convert", path, tmp_path / "out.pt", "--force", *option)
        assert ran.status in (0, 2)
        assert "Traceback" not in ran.err


@pytest.mark.parametrize("name", ["COO of large size", "BSR of wide blocks", "COO repeated bfloat16", "CSR in batches"])
def test_any_part_of_a_dense_one_can_be_read(name: str, tmp_path: Path) -> None:
    check_parts(tmp_path, SPARSE[name](), densify)


@pytest.mark.parametrize("name", ["qint8", "per column", "four bits in three dimensions", "two bits, many"])
def test_any_part_of_a_dequantized_one_can_be_read(name: str, tmp_path: Path) -> None:
    check_parts(tmp_path, made(QUANTIZED[name]), dequantize)


def check_parts(folder: Path, tensor: torch.Tensor, make: Callable[[Any, str], Any]) -> None:
    torch.save({"x": tensor}, folder / "in.pt")
    with open_checkpoint(folder / "in.pt") as checkpoint:
        source = make(checkpoint.root.get("x"), "x").storage.source
        whole = b"".join(map(bytes, source.stream()))
        assert len(whole) == source.nbytes
        for start, end in ((0, 5), (3, 21), (len(whole) // 3, len(whole) // 2 + 1), (len(whole) - 1, len(whole))):
            assert b"".join(map(bytes, source.stream(start, end - start))) == whole[start:end]
        assert list(source.stream(7, 0)) == []


def test_each_reason_is_said_once_with_its_own_names(tmp_path: Path, run: Callable[..., Any]) -> None:
    state = {name: SPARSE[name]() for name in ("COO", "CSR")} | {"meta": torch.ones(2, device="meta")}
    torch.save(state, tmp_path / "in.pt")
    refused = run("convert", tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert refused.status == 2
    assert '"COO", "CSR": sparse, no dense array: convert it with --densify, or to a .pt file; "meta": a' in refused.err


def test_a_jagged_tensor_of_torch_is_no_alarm(tmp_path: Path, run: Callable[..., Any]) -> None:
    torch.save({"w": torch.nested.nested_tensor([seeded(2, 3), seeded(4, 3)], layout=torch.jagged)}, tmp_path / "in.pt")
    assert json.loads(run("inspect", tmp_path / "in.pt", "--json").out)["safety"]["verdict"] == "clean"
