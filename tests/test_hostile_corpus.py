"""Everything hostile that the suite knows, through the command line, in one process with a gibibyte of memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import corpus, crafted
from support.opcodes import Pickle
from support.strict_json import strictly
from test_hostile_containers import LEGACY, ODD_ZIPS, SAFETENSORS, STORAGES, ZIPS
from test_pickle_machine import LAUGHS

ROOT = Path(__file__).parents[1]


def nested_rebuild(depth: int) -> bytes:
    """Let a tensor be rebuilt by the function that rebuilds tensors, again and again."""
    stream = Pickle().name("torch._tensor", "_rebuild_from_type_v2").put(0).pop()
    for _ in range(depth):
        stream.get(0).mark().get(0).name("torch", "Tensor").mark()
    stream.none()
    for _ in range(depth):
        stream.raw(b"t").none().raw(b"tR")
    return stream.stop()


def scalar(nbytes: int) -> bytes:
    stream = Pickle().name("numpy._core.multiarray", "scalar").mark().call("numpy", "dtype", "f8", False, True)
    return stream.value((3, "<", None, None, None, -1, -1, 0)).build().value(bytes(nbytes)).raw(b"tR").stop()


def state_dict(push: Callable[[Pickle], Pickle]) -> bytes:
    """Put a value beside the weights of a container."""
    stream = Pickle().raw(b"}(").text("state_dict").raw(b"}(").text("w").tensor().raw(b"u").text("value")
    return push(stream).raw(b"u").stop()


def views(count: int) -> bytes:
    """Make many views of one storage."""
    stream = Pickle().storage().put(1).pop().name("torch._utils", "_rebuild_tensor").put(0).pop().raw(b"}(")
    view = b"h\x00(h\x01K\x00K\x04\x85K\x01\x85tR"
    items = (b"X" + struct.pack("<I", 8) + b"%08d" % index + view for index in range(count))
    return stream.raw(b"".join(items)).raw(b"u").stop()


def colliding(count: int) -> Callable[[Pickle], Pickle]:
    def push(stream: Pickle) -> Pickle:
        keys = (b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(count))
        return stream.raw(b"}(" + b"".join(keys) + b"u")

    return push


def expanded(*shape: int) -> bytes:
    """Stretch four elements over any shape by strides of zero."""
    return Pickle().raw(b"}(").text("w").tensor(0, shape, (0,) * len(shape)).raw(b"u").stop()


def named(*keys: str) -> bytes:
    stream = Pickle().raw(b"}(")
    for key in keys:
        stream.text(key).tensor()
    return stream.raw(b"u").stop()


def hooked() -> bytes:
    """Give a parameter hooks, which torch would call, and something that is no gradient flag."""
    stream = Pickle().raw(b"}(").text("w").name("torch._utils", "_rebuild_parameter").mark().tensor().value("yes")
    stream.call("collections", "OrderedDict").mark().text("h").name("os", "system").raw(b"utR")
    return stream.raw(b"u").stop()


# Pickles in an archive that is sound; None is for those that may be read or refused.
READ, REFUSED = 0, 2
PICKLES: dict[str, tuple[Callable[[], bytes], int | None]] = {
    **{f"B1 shared values: {name}": ((lambda name=name: LAUGHS[name] + b"."), READ) for name in LAUGHS},
    "A23 an array of 50 GiB": (lambda: state_dict(lambda s: s.call("builtins", "bytearray", 50 << 30)), READ),
    "A23 a tensor of 4 TB": (lambda: state_dict(lambda s: s.call("torch", "FloatTensor", 10**12)), READ),
    "A31 a rebuild within rebuilds": (lambda: nested_rebuild(1000), REFUSED),
    "A34 a number of another size": (lambda: scalar(7), REFUSED),
    "A34 a number of its size": (lambda: scalar(8), READ),
    "B4 deep keys": (lambda: b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.", REFUSED),
    "B5 deep tuples": (lambda: b")" + b"\x85" * 50_000 + b".", REFUSED),
    "B5 open groups": (lambda: b"(" * 1_000_000 + b".", REFUSED),
    "B6 a list in itself": (lambda: state_dict(lambda s: s.raw(b"]q\x07h\x07a")), READ),
    "B6 a mapping in itself": (lambda: state_dict(lambda s: s.raw(b"}q\x07K\x01h\x07s")), READ),
    "B6 a tuple in its list": (lambda: state_dict(lambda s: s.raw(b"]q\x07(h\x07ta")), READ),
    "B8 colliding keys": (lambda: state_dict(colliding(20_000)), READ),
    "B9 an integer of 4000 bytes": (
        lambda: state_dict(lambda s: s.raw(b"\x8b" + struct.pack("<i", 4000) + b"\x01" * 4000)),
        READ,
    ),
    "B9 an integer of 60 bytes": (lambda: state_dict(lambda s: s.raw(b"\x8a\x3c" + b"\x01" * 60)), READ),
    "B10 ten million digits": (lambda: state_dict(lambda s: s.raw(b"L" + b"9" * 10_000_000 + b"L\n")), None),
    "B11 two gigabytes of text": (lambda: b"X\xff\xff\xff\x7f.", REFUSED),
    "B11 an exbibyte of bytes": (lambda: b"\x8e" + b"\xff" * 7 + b"\x0f.", REFUSED),
    "B13 the last memo index": (lambda: state_dict(lambda s: s.raw(b"Nr\xff\xff\xff\x7f")), READ),
    "B13 many memo indices": (
        lambda: b"".join(b"Nr" + struct.pack("<I", i * 4000) + b"0" for i in range(200_000)) + b"N.",
        READ,
    ),
    "B21 half a character in a name": (lambda: named("a\udc80b"), READ),
    "B23 numbers that are none": (lambda: state_dict(lambda s: s.raw(b"](Fnan\nFinf\nF-inf\nF1e999\ne")), READ),
    "B23 NaN as a key": (lambda: state_dict(lambda s: s.raw(b"}Fnan\nNs")), READ),
    "B24 a million opcodes": (lambda: state_dict(lambda s: s.raw(b"N0" * 500_000 + b"N")), READ),
    "B24 many dictionaries": (lambda: state_dict(lambda s: s.raw(b"](" + b"}" * 100_000 + b"e")), READ),
    "B25 a key twice": (lambda: named("a", "a"), REFUSED),
    "E4 a petabyte out of four numbers": (lambda: expanded(2**48), READ),
    "E4 more elements than can be counted": (lambda: expanded(2**40, 2**40), REFUSED),
    "E7 empty and huge": (lambda: expanded(0, 2**62), READ),
    "E13 hooks": (hooked, READ),
    "E19 many views": (lambda: views(20_000), READ),
    "G3 names with line breaks": (lambda: named("a\nwrote\tx", "b\r", "c\x1b[2J"), READ),
    "G4 a name of 4096 characters": (lambda: named("a" * 4096), READ),
    "G4 a name of a megabyte": (lambda: named("a" * 1_000_000), REFUSED),
    "G5 names that look alike": (lambda: named("w", "w\u200b", "w\u202e", "\uff57"), READ),
    "G6 an integer beyond 2 ** 53": (lambda: state_dict(lambda s: s.value(2**80)), READ),
}


def in_archive(data: bytes) -> bytes:
    members = crafted.members_of(None, _0=crafted.FOUR_FLOATS)
    return crafted.archived(members | {"archive/data.pkl": data})


REFUSED_FILES = {
    f"{table} {name}": make
    for table, cases in (("zip", ZIPS), ("storage", STORAGES), ("legacy", LEGACY), ("safetensors", SAFETENSORS))
    for name, (make, _) in cases.items()
} | {
    "empty": lambda: b"",
    "zeros": lambda: bytes(1000),
    "one STOP": lambda: b".",
    "text": lambda: b"hello",
    "half a signature": lambda: b"PK\x03",
}  # fmt: skip
# A bare pickle may be read as one, or refused; it is never sound.
BARE = {
    "A25 text": lambda: b"cos\nsystem\n(S'true'\ntR.",
    "A25 text of Python 2": lambda: b"(dp0\nS'w'\np1\nc__builtin__\neval\np2\n(S'1'\ntRp3\ns.",
    "protocol 4": lambda: Pickle(4).call("os", "system", "true").stop(),
    "A15 two": lambda: Pickle().value([1]).stop() + Pickle().call("os", "system", "true").stop(),
    "A12 broken": lambda: Pickle().call("os", "system", "true").raw(b"\xff").stop(),
}


def answers(tmp_path: Path, files: dict[str, Callable[[], bytes]]) -> tuple[dict[str, dict[str, Any]], int]:
    """Run every command over every file; give the rows by name, and the most memory that was taken, in bytes."""
    folder, paths = tmp_path / "out", []
    folder.mkdir()
    for index, make in enumerate(files.values()):
        paths.append(tmp_path / f"{index}.pt")
        paths[-1].write_bytes(make())
    commands = {"inspect": ["--json", "--tensors"], "verify": ["--json"]}
    ran = subprocess.run(
        [sys.executable, corpus.__file__],
        input=json.dumps({"paths": list(map(str, paths)), "folder": str(folder), "commands": commands}),
        capture_output=True,
        text=True,
        check=False,
        # Each thread of a library for matrices would reserve memory of its own.
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    assert not answer["torch"]
    return dict(zip(files, answer["rows"], strict=True)), answer["peak"]


def check_row(name: str, row: dict[str, Any]) -> None:
    """Demand what holds for every file: a status that means something, one document, one sentence, nothing left."""
    allowed = {"inspect": {0, 2}, "verify": {0, 1, 2}, "convert": {0, 2}}
    for command, statuses in allowed.items():
        ran = row[command]
        assert ran["status"] in statuses, (name, command, ran["err"])
        assert "Traceback" not in ran["err"] + ran["out"], (name, command, ran["err"])
        assert "memory is used up" not in ran["err"], (name, command)
        refusals = [line for line in ran["err"].splitlines() if line.startswith("ckptool: ")]
        assert len(refusals) == (ran["status"] == 2 and (command != "verify" or bool(refusals))), (
            name,
            command,
            refusals,
        )
        assert all(len(line) < 1200 and line.isprintable() for line in ran["err"].splitlines()), (name, command)
        if command != "convert" and ran["out"] and len(ran["out"]) < 1_000_000:
            strictly(ran["out"])
    assert row["written"] == (row["convert"]["status"] == 0), name
    assert row["left"] == [], name


def test_what_is_refused_is_refused_by_every_command(tmp_path: Path) -> None:
    rows, peak = answers(tmp_path, REFUSED_FILES)
    for name, row in rows.items():
        check_row(name, row)
        assert row["inspect"]["status"] == row["convert"]["status"] == 2, name
        # Where a checksum proves the damage, the answer is no.
        assert row["verify"]["status"] in (1, 2), name
        if row["verify"]["status"] == 1:
            assert "checksum" in row["verify"]["out"], name
    assert peak < 300 << 20


def test_what_is_only_odd_is_told_by_every_command(tmp_path: Path) -> None:
    rows, _ = answers(tmp_path, {name: make for name, (make, _) in ODD_ZIPS.items()})
    for name, row in rows.items():
        check_row(name, row)
        assert [row[command]["status"] for command in ("inspect", "convert")] == [0, 0], name


def test_bare_pickles_are_never_sound(tmp_path: Path) -> None:
    rows, _ = answers(tmp_path, BARE)
    for name, row in rows.items():
        check_row(name, row)
        assert row["verify"]["status"] in (1, 2), name
        assert '"verdict": "clean"' not in row["inspect"]["out"], name
        assert row["convert"]["status"] == 2, name


def test_hostile_pickles(tmp_path: Path) -> None:
    rows, peak = answers(
        tmp_path, {name: (lambda make=make: in_archive(make())) for name, (make, _) in PICKLES.items()}
    )
    for name, row in rows.items():
        check_row(name, row)
        expected = PICKLES[name][1]
        if expected is not None:
            assert row["inspect"]["status"] == expected, (name, row["inspect"]["err"])
        if expected == REFUSED:
            assert row["convert"]["status"] == 2, name
            assert row["verify"]["status"] == 2, name
    assert peak < 600 << 20
    assert "repeats 16 stored bytes" in rows["E4 a petabyte out of four numbers"]["convert"]["err"]
    assert rows["E13 hooks"]["verify"]["status"] == 1


def test_a_finder_of_attributes_in_other_hands_is_no_sound_file(run: Callable[..., Any], tmp_path: Path) -> None:
    """A5: what calls it is on no list, and never needs to be."""
    stream = state_dict(
        lambda s: s.name("some.lib", "starmap").mark().name("__builtin__", "getattr").raw(b"](").name("cfg", "Mode")
        .text("__globals__").raw(b"\x86etR")
    )  # fmt: skip
    (tmp_path / "in.pt").write_bytes(in_archive(stream))
    ran = run("verify", tmp_path / "in.pt")
    assert ran.status == 1
    assert "__builtin__.getattr" in ran.out


def test_many_views_of_one_storage_are_not_written_out_unasked(run: Callable[..., Any], tmp_path: Path) -> None:
    """E19."""
    base = torch.arange(250_000.0)
    torch.save({f"w{index}": base[index:] for index in range(200)}, tmp_path / "in.pt")
    ran = run("convert", tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert (ran.status, (tmp_path / "out.safetensors").exists()) == (2, False)
    assert "would become" in ran.err
    assert "add --force if that is meant" in ran.err


@pytest.mark.parametrize("pushed", [b"]q\x07h\x07a", b"}q\x07K\x01h\x07s", b"]q\x07(h\x07ta"])
def test_a_value_in_itself_is_never_written(run: Callable[..., Any], tmp_path: Path, pushed: bytes) -> None:
    """B6."""
    (tmp_path / "in.pt").write_bytes(in_archive(state_dict(lambda stream: stream.raw(pushed))))
    ran = run("convert", tmp_path / "in.pt", tmp_path / "out.pt", "--keep-rest")
    assert (ran.status, (tmp_path / "out.pt").exists()) == (2, False)
    assert "holds itself: write the weights alone, without --keep-rest" in ran.err
    assert run("convert", tmp_path / "in.pt", tmp_path / "out.pt").status == 0
