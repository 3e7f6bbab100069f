"""Pickles that nobody's pickler wrote, whole and damaged: read as torch and CPython read them, or refused."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import pickletools
import random
import subprocess
import sys
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import atheris_readers, crafted
from support.programs import STORAGES, Dialect, mutate, write_program
from test_fuzz_containers import REFUSED, UNABLE, Outcome, meaning
from test_pickle_machine import PlainUnpickler

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats import open_checkpoint
from ckptool.formats.pickle import GlobalLog, read_pickle, severity
from ckptool.model.dtypes import DType
from ckptool.model.values import DictNode, GlobalRef, SetNode, Stub

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[1]
MEMBERS = {
    "archive/byteorder": b"little",
    "archive/version": b"3\n",
    **{f"archive/data/{key}": bytes(range(4 * numel)) for key, numel in enumerate(STORAGES)},
}


def archived(program: bytes) -> bytes:
    """Put a program into an archive that has every storage it may name."""
    return crafted.archived({"archive/data.pkl": program, **MEMBERS})


def outcome(data: bytes) -> Outcome:
    """Open a file in memory; tell what it means, and whether anything odd was told."""
    handle = os.memfd_create("model")
    try:
        os.write(handle, data)
        with open_checkpoint(Path(f"/proc/self/fd/{handle}")) as checkpoint:
            odd = {finding.code for finding in checkpoint.findings} - {"unreferenced-storage", "cycle"}
            told = bool(odd) or any(use.ref.severity != "safe" for use in checkpoint.globals)
            return Outcome(settled(checkpoint.root), told)
    except UnreadableCheckpoint:
        return Outcome(REFUSED, told=True)
    finally:
        os.close(handle)


def settled(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Spell a value, ours or that of torch, so that equal ones look equal: later keys win, sets have no order."""
    if id(value) in above:
        return "cycle"
    above = (*above, id(value))
    if isinstance(value, Stub):
        return "stub"
    if isinstance(value, dict | DictNode):
        pairs = value.pairs if isinstance(value, DictNode) else value.items()
        return "dict", sorted({repr(settled(key, above)): repr(settled(item, above)) for key, item in pairs}.items())
    if isinstance(value, set | frozenset | SetNode):
        items = value.items if isinstance(value, SetNode) else value
        return "set", sorted({repr(settled(item, above)) for item in items})
    if isinstance(value, list | tuple):
        return "list" if isinstance(value, list) else "tuple", [settled(child, above) for child in value]
    if isinstance(value, DType | torch.dtype):
        return "dtype", str(value.name if isinstance(value, DType) else value).removeprefix("torch.")
    if isinstance(value, GlobalRef):
        return "global", ".".join(severity.normalise(value.module, value.name))
    if isinstance(value, BuiltinFunctionType):
        return "global", f"{value.__module__}.{value.__name__}"
    return meaning(value)


def torch_outcome(data: bytes) -> Any:
    """Ask torch itself; it raises a dozen kinds of errors."""
    try:
        value = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        # Names that it does not know lie outside of what it can judge, as opcodes that it lacks do.
        return UNABLE if "Unsupported operand" in str(error) or "Unsupported global" in str(error) else REFUSED
    return settled(value)


def programs(dialect: Dialect) -> st.SearchStrategy[bytes]:
    sources = st.randoms(use_true_random=False)
    return st.builds(lambda source, steps: write_program(source.randrange, steps, dialect), sources, st.integers(1, 20))


def check_against_torch(program: bytes) -> bool:
    """Demand that a program means what torch makes of it, is refused, or is told of; give whether it was read."""
    data = archived(program)
    found = outcome(data)
    if found.meaning is REFUSED or found.told:
        return False
    expected = torch_outcome(data)
    assert expected is UNABLE or found.meaning == expected, program
    return True


def check_against_cpython(program: bytes) -> bool:
    """Demand that a program of plain data means what CPython makes of it; give whether both read it."""
    log = GlobalLog()
    try:
        value = read_pickle(program, label="data.pkl", load_storage=None, log=log).value
    except UnreadableCheckpoint:
        return False
    if log.uses():
        return False
    try:
        expected = PlainUnpickler(io.BytesIO(program), encoding="utf-8").load()
    except (pickle.UnpicklingError, UnicodeDecodeError):  # it has no names, nor bytes for texts of Python 2
        return False
    assert settled(value) == settled(expected), program
    return True


@settings(max_examples=150, deadline=None)
@given(program=programs("torch"))
def test_programs_mean_what_torch_makes_of_them(program: bytes) -> None:
    check_against_torch(program)


@settings(max_examples=150, deadline=None)
@given(program=programs("plain"))
def test_programs_of_plain_data_mean_what_cpython_makes_of_them(program: bytes) -> None:
    for _ in pickletools.genops(program):  # the generator writes programs, not noise
        pass
    check_against_cpython(program)


@settings(max_examples=150, deadline=None)
@given(program=programs("any"), source=st.randoms(use_true_random=False))
def test_damaged_programs_are_read_as_before_or_refused(program: bytes, source: random.Random) -> None:
    damaged = mutate(program, source.randrange)
    check_against_torch(damaged)
    check_against_cpython(damaged)


def test_the_programs_are_read_more_often_than_not() -> None:
    """Whoever refused everything would pass all of the above."""
    source = random.Random(0)
    read = [check_against_torch(write_program(source.randrange, 10, "torch")) for _ in range(200)]
    assert sum(read) > 100
    read = [check_against_cpython(write_program(source.randrange, 10, "plain")) for _ in range(200)]
    assert sum(read) > 100


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(4))
def test_campaign_of_programs(seed: int) -> None:
    source = random.Random(seed)
    for _ in range(10_000):
        dialect = source.choice(["any", "plain", "torch"])
        program = write_program(source.randrange, source.choice([5, 10, 20]), dialect)
        for candidate in (program, mutate(program, source.randrange)):
            check_against_torch(candidate)
            check_against_cpython(candidate)


@pytest.mark.fuzz
@pytest.mark.parametrize("target", atheris_readers.TARGETS)
def test_coverage_guided_campaign(tmp_path: Path, target: str) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install atheris")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index, seed in enumerate(atheris_readers.seeds(target)):
        (corpus / str(index)).write_bytes(seed)
    limits = ["-max_total_time=60", "-timeout=10", "-rss_limit_mb=1024", "-max_len=8192"]
    ran = subprocess.run(
        [sys.executable, atheris_readers.__file__, target, *limits, f"-artifact_prefix={tmp_path}/", str(corpus)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "DONE" in ran.stderr or "Done" in ran.stderr
