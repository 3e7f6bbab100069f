"""Programs, NumPy's files, pickles, tar archives, files inside files: what is read is what their own readers read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from support.containers import (
    exported_members,
    npy,
    npz,
    old_script_members,
    script_members,
    tarred,
    torch_tar_members,
    zipped,
)
from support.tensors import bits, same, torch_bytes
from torch import nn

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats import open_checkpoint
from ckptool.loading import load_state_dict
from ckptool.model.values import DictNode, OpaqueTensor, TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore")

Tensors = dict[str, torch.Tensor]


class Block(nn.Module):
    """Have what programs keep: parameters, buffers of both kinds, a tensor that is neither, a list, a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.tied = self.linear
        self.register_buffer("fleeting", torch.ones(2), persistent=False)
        self.plain = torch.arange(4.0)
        self.sizes = [1, 2]
        self.wide = nn.Parameter(torch.randn(2, 3).t().bfloat16(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.tied(x)) * self.fleeting + self.plain.sum() + self.wide.float().sum()


@pytest.fixture(scope="module")
def block() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


def scripted(block: nn.Module) -> tuple[bytes, Tensors]:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(block), stream)
    stream.seek(0)
    return stream.getvalue(), torch.jit.load(stream).state_dict()


def traced(block: nn.Module) -> tuple[bytes, Tensors]:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(block, torch.ones(4, 3)), stream)
    stream.seek(0)
    return stream.getvalue(), torch.jit.load(stream).state_dict()


def mobile(block: nn.Module) -> tuple[bytes, Tensors]:
    data = torch.jit.script(block)._save_to_buffer_for_lite_interpreter()
    return data, torch.jit.load(io.BytesIO(data)).state_dict()


def exported(block: nn.Module) -> tuple[bytes, Tensors]:
    stream = io.BytesIO()
    torch.export.save(torch.export.export(block, (torch.ones(4, 3),)), stream)
    stream.seek(0)
    return stream.getvalue(), torch.export.load(stream).state_dict


def exported_before(block: nn.Module) -> tuple[bytes, Tensors]:
    """Write the layout of torch 2.1 to 2.7, which torch still reads."""
    from torch._export.serde.schema import SCHEMA_VERSION
    from torch._export.serde.serialize import serialize

    saved = serialize(torch.export.export(block, (torch.ones(4, 3),)))
    data = zipped(
        {
            "version": ".".join(map(str, SCHEMA_VERSION)).encode(),
            "serialized_exported_program.json": saved.exported_program,
            "serialized_state_dict.pt": saved.state_dict,
            "serialized_constants.pt": saved.constants,
            "serialized_example_inputs.pt": saved.example_inputs,
        }
    )
    return data, torch.export.load(io.BytesIO(data)).state_dict


PROGRAMS = {
    "scripted": (scripted, "torchscript"),
    "traced": (traced, "torchscript"),
    "mobile": (mobile, "torchscript"),
    "exported": (exported, "torch-export"),
    "exported-before-2.8": (exported_before, "torch-export"),
}

ARRAYS = {
    "layer.weight": numpy.arange(6, dtype="<f4").reshape(2, 3),
    "fortran": numpy.asfortranarray(numpy.arange(6, dtype="<f8").reshape(2, 3)),
    "big_endian": numpy.arange(3, dtype=">i4"),
    "half": numpy.ones(3, "<f2"),
    "flags": numpy.array([True, False]),
    "scalar": numpy.float32(3),
    "none": numpy.zeros((0, 4), "<f4"),
    "complex": numpy.array([1 + 2j], "<c8"),
    "unsigned": numpy.array([1, 2**16 - 1], "<u2"),
}


def as_torch(arrays: dict[str, Any]) -> Tensors:
    return {
        name: torch.from_numpy(numpy.array(array, numpy.asarray(array).dtype.newbyteorder("=")).copy())
        for name, array in arrays.items()
    }


def loaded_npz(data: bytes) -> Tensors:
    return as_torch(dict(numpy.load(io.BytesIO(data), allow_pickle=False)))


def detectron(protocol: int) -> bytes:
    return pickle.dumps({"model": ARRAYS | {"scalar": numpy.array(3.0)}, "__author__": "someone"}, protocol)


def dumped() -> Tensors:
    """Make tensors of which pickle.dump writes every storage as a file of its own."""
    return {
        "half": torch.arange(6.0).view(2, 3).bfloat16(),
        "transposed": torch.arange(6).view(2, 3).t(),
        "part": torch.arange(8.0)[2:5],
        "parameter": nn.Parameter(torch.ones(2)),
        "none": torch.empty(0, 3),
    }


def of_pickle(data: bytes) -> Tensors:
    return as_torch(pickle.loads(data)["model"])


def of_torch_tar(data: bytes) -> Tensors:
    with tempfile.NamedTemporaryFile() as file:  # torch reads this format from real files only
        Path(file.name).write_bytes(data)
        value = torch.load(file.name, weights_only=False)
    return {name: tensor for name, tensor in value.items() if isinstance(tensor, torch.Tensor)}


FILES: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Tensors], str]] = {
    "npz": (lambda: npz(ARRAYS), loaded_npz, "npz"),
    "npz-compressed": (lambda: npz(ARRAYS, compressed=True), loaded_npz, "npz"),
    "npy-of-a-dict": (
        lambda: npy(ARRAYS | {"scalar": numpy.array(3.0)}, allow_pickle=True),
        lambda data: as_torch(numpy.load(io.BytesIO(data), allow_pickle=True).item()),
        "npy",
    ),
    **{
        f"pickle-{protocol}": (lambda protocol=protocol: detectron(protocol), of_pickle, "pickle")
        for protocol in range(6)
    },
    **{
        f"pickle-of-torch-{protocol}": (
            lambda protocol=protocol: pickle.dumps(dumped(), protocol),
            pickle.loads,
            "pickle",
        )
        for protocol in (0, 2, 5)
    },
    "torch-tar": (lambda: tarred(torch_tar_members()), of_torch_tar, "torch-tar"),
}


def check_reading(run: Callable[..., Any], path: Path, expected: Tensors, kind: str) -> dict[str, Any]:
    """Hold every way to read a file to the tensors of its own reader; give the answer of inspect."""
    before = {entry: entry.read_bytes() for entry in path.parent.iterdir()}
    loaded = load_state_dict(path)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(loaded[name]) == bits(tensor)
    ran = run("inspect", path, "--json")
    assert ran.status == 0, ran.err
    document = json.loads(ran.out)
    assert document["format"] == kind
    assert run("verify", path).status in (0, 1, 2)
    assert {entry: entry.read_bytes() for entry in path.parent.iterdir()} == before
    out = path.parent / "out.safetensors"
    ran = run("convert", path, out, "--ties", "copy")
    assert ran.status == 0, ran.err
    written = load_file(out)
    assert {name: bits(tensor) for name, tensor in written.items()} == {
        name: bits(tensor) for name, tensor in expected.items()
    }
    stripped = path.parent / "out.pt"
    assert run("strip-prefixes", path, stripped).status == 0
    assert {name: bits(tensor) for name, tensor in torch.load(stripped).items()} == {
        name: bits(tensor) for name, tensor in expected.items()
    }
    return document


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_gives_its_weights(run: Any, tmp_path: Path, block: nn.Module, name: str) -> None:
    make, kind = PROGRAMS[name]
    data, expected = make(block)
    assert "wide" in expected
    path = tmp_path / "program"
    path.write_bytes(data)
    document = check_reading(run, path, expected, kind)
    assert "program" in [note["code"] for note in document["notes"]]
    assert document["producer"]["name"] in ("torch.jit.save", "torch.export.save")
    assert document["safety"]["verdict"] == "clean"


@pytest.mark.parametrize("name", FILES)
def test_file_gives_its_tensors(run: Any, tmp_path: Path, name: str) -> None:
    make, oracle, kind = FILES[name]
    data = make()
    path = tmp_path / "file"
    path.write_bytes(data)
    expected = oracle(data)
    assert len(expected) > 1
    check_reading(run, path, expected, kind)


STATE = {"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.tensor([1.5, -2.0])}


def nemo(**options: Any) -> bytes:
    members = {
        "./model_config.yaml": b"name: x\n",
        "./model_weights.ckpt": torch_bytes(STATE),
        "./tokenizer.model": b"x",
    }
    return tarred(members, **options)


def zip_of(data: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    return zipped({"run/notes.txt": b"notes", "run/best.ckpt": data}, method)


def tar_of(data: bytes, layout: int = tarfile.USTAR_FORMAT, name: str = "run/best.ckpt") -> bytes:
    return tarred({"run/notes.txt": b"notes", name: data}, layout)


ENVELOPES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "gzip": (gzip.compress, "gzip"),
    "gzip-in-two": (lambda data: gzip.compress(data[:70]) + gzip.compress(data[70:]) + bytes(7), "gzip"),
    "bzip2": (bz2.compress, "bzip2"),
    "xz": (lzma.compress, "xz"),
    "tar": (tar_of, "tar: run/best.ckpt"),
    "tar-gnu": (lambda data: tar_of(data, tarfile.GNU_FORMAT, "d" * 120), f"tar: {'d' * 120}"),
    "tar-pax": (lambda data: tar_of(data, tarfile.PAX_FORMAT, "\u00fc" * 120), f"tar: {chr(0xFC) * 120}"),
    "tar-prefix": (lambda data: tar_of(data, name=f"{'d' * 90}/best.ckpt"), f"tar: {'d' * 90}/best.ckpt"),
    "tar-gzip": (lambda data: gzip.compress(tar_of(data)), "gzip, tar: run/best.ckpt"),
    "zip": (zip_of, "zip: run/best.ckpt"),
    "zip-deflated": (lambda data: zip_of(data, zipfile.ZIP_DEFLATED), "zip: run/best.ckpt"),
    "zip-in-tar": (lambda data: tarred({"best.zip": zip_of(data)}), "tar: best.zip, zip: run/best.ckpt"),
}
INNER = {
    "torch-zip": lambda: torch_bytes(STATE),
    "torch-legacy": lambda: torch_bytes(STATE, _use_new_zipfile_serialization=False),
    "safetensors": lambda: safetensors.torch.save(STATE),
    "npz": lambda: npz({name: tensor.numpy() for name, tensor in STATE.items()}),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("name", ENVELOPES)
def test_checkpoint_inside_another_file(tmp_path: Path, name: str, inner: str) -> None:
    wrap, inside = ENVELOPES[name]
    path = tmp_path / "file"
    path.write_bytes(wrap(INNER[inner]()))
    descriptors = set(Path("/proc/self/fd").iterdir())
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.format, checkpoint.facts["inside"]) == (inner, inside)
        assert checkpoint.file_bytes == path.stat().st_size
        assert "inside" in [finding.code for finding in checkpoint.findings]
        assert {name: same(spec, STATE[name]) for name, spec in checkpoint.root.pairs} == dict.fromkeys(STATE, True)
    assert set(Path("/proc/self/fd").iterdir()) == descriptors
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("name", ["gzip", "zip"])
def test_checkpoint_inside_is_read_by_every_command(run: Any, tmp_path: Path, name: str, mode: str) -> None:
    path = tmp_path / "model.nemo"
    path.write_bytes(nemo(mode=mode) if name == "gzip" else zip_of(torch_bytes(STATE)))
    check_reading(run, path, STATE, "torch-zip")


def test_what_is_stored_is_read_in_place(tmp_path: Path) -> None:
    path = tmp_path / "file.zip"
    path.write_bytes(zip_of(torch_bytes(STATE)))
    with open_checkpoint(path) as checkpoint:
        place = dict(checkpoint.root.pairs)["layer.bias"].storage.source.file_range
        assert place is not None
        assert path.read_bytes()[place.offset : place.offset + place.nbytes] == bits(STATE["layer.bias"])


def test_a_path_may_lead_into_an_archive(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "runs.zip"
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    path.write_bytes(zipped({"a/last.ckpt": torch_bytes(STATE), "a/best.ckpt": torch_bytes(other)}))
    ran = run("inspect", path)
    assert ran.status == 2
    assert (
        "holds 2 files that may be meant, 'a/last.ckpt', 'a/best.ckpt'; name one of them as 'runs.zip/a/last.ckpt'"
        in ran.err
    )
    loaded = load_state_dict(path / "a" / "best.ckpt")
    assert all(torch.equal(loaded[name], other[name]) for name in other)
    ran = run("inspect", path / "a" / "best.ckpt")
    assert ran.status == 0
    assert f"ckptool convert {path}/a/best.ckpt {tmp_path}/best.safetensors" in ran.out
    ran = run("inspect", path / "a" / "none.ckpt")
    assert ran.status == 2
    assert "this zip archive holds no file 'a/none.ckpt', but 'a/last.ckpt', 'a/best.ckpt'; name another" in ran.err


def test_a_path_into_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(torch_bytes(STATE))
    with pytest.raises(UnreadableCheckpoint, match="leads into a file that is no archive of checkpoints"):
        open_checkpoint(path / "data.pkl")


@pytest.mark.parametrize("name", ["model.npz", "model.pt.gz"])
def test_nothing_else_is_replaced_or_written(run: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(npz({"w": numpy.ones(2)}) if name == "model.npz" else gzip.compress(torch_bytes(STATE)))
    before = path.read_bytes()
    ran = run("strip-prefixes", path, "--in-place")
    assert (ran.status, path.read_bytes()) == (2, before)
    assert "cannot be replaced in place; name OUT" in ran.err
    ran = run("strip-prefixes", path, tmp_path / f"new-{name}")
    assert ran.status == 2
    assert "ckptool writes .pt and .safetensors files only" in ran.err
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_of_a_program_that_are_no_parameters(run: Any, tmp_path: Path, block: nn.Module) -> None:
    path = tmp_path / "program.pt"
    path.write_bytes(scripted(block)[0])
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.root.get("program_attributes").text_items()) == ["plain"]
    ran = run("convert", path, tmp_path / "out.pt", "--weights", "program_attributes")
    assert ran.status == 0, ran.err
    assert torch.equal(torch.load(tmp_path / "out.pt")["plain"], block.plain)


def test_frozen_program_has_no_state_dict(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "frozen.pt"
    linear = nn.Linear(3, 2).eval()
    torch.jit.freeze(torch.jit.script(linear)).save(str(path))
    assert torch.jit.load(path).state_dict() == {}
    ran = run("convert", path, tmp_path / "out.pt")
    assert ran.status == 2
    assert "a program whose tensors are no parameters" in ran.err
    with open_checkpoint(path) as checkpoint:
        constants = checkpoint.root.get("program_constants")
        assert [same(spec, linear.weight) for spec in constants] == [True, False]
        assert [same(spec, linear.bias) for spec in constants] == [False, True]


def test_quantized_program_keeps_its_packed_weights_in_sight(tmp_path: Path) -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)).eval(), {nn.Linear})
    torch.jit.script(model).save(str(tmp_path / "quantized.pt"))
    with open_checkpoint(tmp_path / "quantized.pt") as checkpoint:
        packed = checkpoint.root.get("program_attributes").text_items().values()
        assert [value.kind for value in packed if isinstance(value, OpaqueTensor)] == ["quantized"]


def test_program_of_torch_1_0(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    path.write_bytes(zipped(old_script_members()))
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.root.get("state_dict").text_items()
        assert list(found) == ["w", "steps", "sub.v"]
        assert same(found["w"], torch.tensor([[1.0, 2], [3, 4]]))
        assert same(found["steps"], torch.tensor(7))
        assert same(found["sub.v"], torch.tensor([2.0, 3]))
        assert [spec.shape for spec in checkpoint.root.get("program_constants")] == [(1,)]
        assert checkpoint.facts["torch_version"] == "1.0"


def test_class_that_does_not_list_its_buffers(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    path.write_bytes(zipped(script_members(b"class M(Module):\n  __parameters__ = []\n  w : Tensor\n")))
    assert load_state_dict(path)["w"].tolist() == [1, 2, 3, 4]


def test_crafted_programs_are_what_torch_reads(tmp_path: Path) -> None:
    """Judge the files that the hostile rows start from."""
    path = tmp_path / "program.pt"
    path.write_bytes(zipped(exported_members()))
    assert load_state_dict(path)["w"].tolist() == [[1, 2], [3, 4]]
    path.write_bytes(zipped(script_members()))
    assert torch.jit.load(path).state_dict()["w"].tolist() == load_state_dict(path)["w"].tolist()


def test_several_programs_in_one_archive(run: Any, tmp_path: Path) -> None:
    members = exported_members()
    more = {name.replace("/model_", "/second_").replace("/model.", "/second."): data for name, data in members.items()}
    path = tmp_path / "program.pt2"
    path.write_bytes(zipped(members | more))
    assert run("convert", path, tmp_path / "out.pt").status == 2
    assert run("convert", path, tmp_path / "out.pt", "--weights", "second.state_dict").status == 0


def test_bare_array_is_shown_and_has_no_name(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    path.write_bytes(npy(numpy.arange(4.0)))
    with open_checkpoint(path) as checkpoint:
        assert same(checkpoint.root, torch.arange(4.0, dtype=torch.float64))
    ran = run("convert", path, tmp_path / "out.pt")
    assert ran.status == 2
    assert "it holds a bare tensor" in ran.err


def test_pickle_names_what_it_would_run(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x02}(X\x01\x00\x00\x00wcos\nsystem\nX\x04\x00\x00\x00true\x85Ru.")
    ran = run("inspect", path, "--json")
    assert json.loads(ran.out)["safety"]["verdict"] == "dangerous"
    assert run("verify", path).status == 1


def floats(value: Any) -> Iterator[TensorSpec]:
    if isinstance(value, DictNode):
        yield from (child for _, child in value.pairs if isinstance(child, TensorSpec))


def test_ordered_and_nested_pickles(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(OrderedDict(w=numpy.ones((2, 2), "f4")), 2))
    with open_checkpoint(path) as checkpoint:
        assert [spec.shape for spec in floats(checkpoint.root)] == [(2, 2)]


@pytest.mark.parametrize("make", [scripted, traced, exported])
def test_the_code_of_a_program_is_listed_as_left_behind(
    make: Callable[..., tuple[bytes, Tensors]], run: Any, tmp_path: Path, block: nn.Module
) -> None:
    path = tmp_path / "program.pt"
    path.write_bytes(make(block)[0])
    dropped = json.loads(run("convert", path, tmp_path / "out.pt", "--json").out)["dropped"]
    assert "program" in {drop["name"] for drop in dropped}
    (safety,) = [check for check in json.loads(run("verify", path, "--json").out)["checks"] if check["id"] == "safety"]
    assert safety["status"] == "warn"
    assert "--trust-code" in safety["advice"]


def test_the_file_of_a_program_is_checked_before_it_runs(run: Any, tmp_path: Path) -> None:
    """Let weights be broken that the answers need not show."""
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with torch.no_grad():
        block[0].bias[0] = -torch.inf  # ReLU hides it
    torch.jit.trace(block, torch.ones(1, 4)).save(str(tmp_path / "program.pt"))
    ran = run("verify", tmp_path / "program.pt", "--trust-code", "--input-shape", "input=4", "--json")
    checks = {check["id"]: check["status"] for check in json.loads(ran.out)["checks"]}
    assert (ran.status, checks["values.finite"], checks["output.finite"]) == (1, "fail", "pass"), ran.out
    assert checks["safety"] == "warn"
    assert "keys" not in checks
