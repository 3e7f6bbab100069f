"""Damage of programs, arrays, pickles, archives and compressed files: the same tensors, or one refusal.

Where nothing checks the values, what is read must be what the format's own reader makes of the same damaged bytes.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import random
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from support.containers import (
    exported_members,
    npy,
    npz,
    old_script_members,
    script_members,
    short_tar,
    torch_tar_members,
    zipped,
)
from support.crafted import FOUR_FLOATS, Rebuilt, archived, members_of, named
from support.tensors import bits, materialise

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats import open_checkpoint
from ckptool.model.values import TensorSpec, walk

pytestmark = pytest.mark.filterwarnings("ignore")

REFUSED = object()
ARRAY = numpy.arange(6, dtype="<f4").reshape(2, 3)
MOST = 600  # damages of one file in the normal suite; the campaign takes all
ALL = 1 << 30

Reading = Callable[[bytes], Any]


def tiny_zip() -> bytes:
    return archived(members_of({"w": Rebuilt(named())}, _0=FOUR_FLOATS))


def tiny_safetensors() -> bytes:
    return safetensors.torch.save({"w": torch.arange(4.0)})


def array_pickle(protocol: int = 2) -> bytes:
    return pickle.dumps({"model": {"w": ARRAY}, "__author__": "x"}, protocol)


CHECKSUMMED: dict[str, Callable[[], bytes]] = {
    "gzip": lambda: gzip.compress(tiny_zip(), mtime=0),
    "bzip2": lambda: bz2.compress(tiny_safetensors()),
    "xz": lambda: lzma.compress(tiny_safetensors()),
    "zip-around": lambda: zipped({"m.safetensors": tiny_safetensors(), "notes": b"x"}),
    "zip-around-deflated": lambda: zipped({"m.safetensors": tiny_safetensors()}, zipfile.ZIP_DEFLATED),
    "tar-around": lambda: short_tar({"m.pt": tiny_zip()}),
    "npz": lambda: npz({"w": ARRAY}),
    "npz-compressed": lambda: npz({"w": ARRAY}, compressed=True),
    "torchscript": lambda: zipped(script_members()),
    "torchscript-1.0": lambda: zipped(old_script_members()),
    "exported": lambda: zipped(exported_members()),
}


class Plain(pickle.Unpickler):
    """Load arrays, and nothing else, as the judge of a damaged pickle."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


_ALLOWED = {
    ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"), ("torch", "FloatStorage"), ("torch", "FloatTensor"),
    ("torch.storage", "FloatStorage"), ("torch._C", "FloatTensor"),
}  # fmt: skip


def plain_load(file: Any, **_: Any) -> Any:
    return Plain(file).load()


def of_npy(data: bytes) -> Any:
    stream = io.BytesIO(data)
    array = numpy.load(stream, allow_pickle=False)
    return REFUSED if stream.read() else array


def of_pickle(data: bytes) -> Any:
    return plain_load(io.BytesIO(data))


def of_torch_tar(data: bytes) -> Any:
    reader = types.SimpleNamespace(__name__="plain", load=plain_load, Unpickler=Plain)
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        return torch.load(file.name, weights_only=False, pickle_module=reader, map_location="cpu")


UNCHECKED: dict[str, tuple[Callable[[], bytes], Reading]] = {
    "npy": (lambda: npy(ARRAY), of_npy),
    "pickle-2": (array_pickle, of_pickle),
    "pickle-5": (lambda: array_pickle(5), of_pickle),
    "torch-tar": (lambda: short_tar(torch_tar_members()), of_torch_tar),
}


def ours(value: Any) -> Any:
    """Reduce what we read to names, types and bits of its tensors."""
    tensors = [
        (".".join(path), node.dtype.name, node.shape, bits(materialise(node)))
        for path, node in walk(value)
        if isinstance(node, TensorSpec)
    ]
    return sorted(tensors)


def theirs(value: Any, path: tuple[str, ...] = ()) -> Iterator[Any]:
    """Reduce what the oracle read alike."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from theirs(child, (*path, f".{key}"))
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from theirs(child, (*path, f"[{index}]"))
    elif isinstance(value, numpy.ndarray | torch.Tensor):
        array = value.numpy() if isinstance(value, torch.Tensor) else value
        native = array.astype(array.dtype.newbyteorder("="))
        yield ".".join(path), str(native.dtype), array.shape, native.tobytes()


@dataclass(frozen=True)
class Outcome:
    """Hold what was read, and whether the reader told of anything odd."""

    tensors: Any
    told: bool


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], Outcome]:
    path = tmp_path / "model"

    def read(data: bytes) -> Outcome:
        path.write_bytes(data)
        try:
            with open_checkpoint(path) as checkpoint:
                odd = [finding for finding in checkpoint.findings if finding.code not in ("inside", "program")]
                told = bool(odd) or any(use.ref.severity in ("unknown", "dangerous") for use in checkpoint.globals)
                return Outcome(ours(checkpoint.root), told)
        except UnreadableCheckpoint:
            return Outcome(REFUSED, told=True)

    return read


def some(places: range, most: int) -> list[int]:
    """Take all of few places, and of many as many as are asked for, always the same ones."""
    return list(places) if len(places) <= most else random.Random(len(places)).sample(places, most)


def flips(data: bytes, most: int) -> Iterator[bytes]:
    """Flip single bits."""
    for place in some(range(8 * len(data)), most):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        yield bytes(damaged)


def judged(oracle: Reading, data: bytes) -> Any:
    try:
        value = oracle(data)
        return value if value is REFUSED else sorted(theirs(value))
    except Exception:  # each of these readers raises a dozen kinds on damaged bytes
        return REFUSED


def check_flips_of_checked(opened: Callable[[bytes], Outcome], name: str, most: int) -> None:
    data = CHECKSUMMED[name]()
    expected = opened(data).tensors
    assert expected
    assert expected is not REFUSED
    outcomes = [opened(damaged).tensors for damaged in flips(data, most)]
    assert [outcome for outcome in outcomes if outcome is not REFUSED and outcome != expected] == []
    assert REFUSED in outcomes


def check_flips_of_unchecked(opened: Callable[[bytes], Outcome], name: str, most: int) -> None:
    make, oracle = UNCHECKED[name]
    data = make()
    assert opened(data) == Outcome(judged(oracle, data), told=False)
    wrong = []
    for damaged in flips(data, most):
        outcome = opened(damaged)
        if outcome.tensors is not REFUSED:
            expected = judged(oracle, damaged)
            if outcome.tensors != expected and not outcome.told:
                wrong.append(damaged)
    assert wrong == []


def check_cuts(opened: Callable[[bytes], Outcome], name: str, most: int) -> None:
    data = (CHECKSUMMED.get(name) or UNCHECKED[name][0])()
    lengths = some(range(len(data)), most)
    assert [length for length in lengths if opened(data[:length]).tensors is not REFUSED] == []


@pytest.mark.parametrize("name", CHECKSUMMED)
def test_flipped_bit_where_something_checks(opened: Callable[[bytes], Outcome], name: str) -> None:
    check_flips_of_checked(opened, name, MOST)


@pytest.mark.parametrize("name", UNCHECKED)
def test_flipped_bit_where_nothing_checks(opened: Callable[[bytes], Outcome], name: str) -> None:
    check_flips_of_unchecked(opened, name, MOST)


@pytest.mark.parametrize("name", [*CHECKSUMMED, *UNCHECKED])
def test_cut_file_is_refused(opened: Callable[[bytes], Outcome], name: str) -> None:
    check_cuts(opened, name, MOST // 3)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", [*CHECKSUMMED, *UNCHECKED])
def test_every_flip_and_every_cut(opened: Callable[[bytes], Outcome], name: str) -> None:
    check = check_flips_of_checked if name in CHECKSUMMED else check_flips_of_unchecked
    check(opened, name, ALL)
    check_cuts(opened, name, ALL)
