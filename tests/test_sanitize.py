"""examples/sanitize.sh lets nothing through but the weights: markers planted everywhere else are gone."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from support.strict_json import strictly
from support.zips import Entry, archive

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "sanitize.sh"
MARKER = "MARKER-7f3a91"
WEIGHTS = {"fc.weight": torch.arange(12.0).reshape(3, 4), "fc.bias": torch.ones(3)}


@pytest.fixture(scope="module")
def sanitize(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """Run the script with a ``ckptool`` that is this one."""
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "ckptool"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ckptool "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def run_script(*args: object) -> subprocess.CompletedProcess:
        command = ["bash", SCRIPT, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    return run_script


def saved(content: object, **options: object) -> bytes:
    target = io.BytesIO()
    torch.save(content, target, **options)
    return target.getvalue()


def members(content: object) -> list[Entry]:
    """Take a file of torch.save apart, so that its records can be written anew with something beside them."""
    with zipfile.ZipFile(io.BytesIO(saved(content))) as source:
        return [Entry(info.filename, source.read(info)) for info in source.infolist()]


class Command:
    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


class Config:
    def __init__(self):
        self.note = mark("attribute of a foreign object")


def mark(place: str) -> str:
    """Give what is planted in one place, so that what survives tells where from."""
    return f"{MARKER} {place}"


def pickled() -> dict:
    beside = torch.tensor(list(mark("tensor beside the weights").encode()), dtype=torch.uint8)
    hyper_parameters = {"note": mark("hyperparameter"), mark("name of one"): 1}
    content = {"state_dict": WEIGHTS, "callback": Command(), "config": Config(), "buffer": beside}
    return {**content, "hyper_parameters": hyper_parameters, mark("name beside the weights"): {"x": torch.ones(3)}}


def behind_a_view() -> bytes:
    behind = MARKER.encode().ljust(16, b"-")
    storage = torch.frombuffer(bytearray(WEIGHTS["fc.weight"].numpy().tobytes() + behind), dtype=torch.float32)
    return saved({**WEIGHTS, "fc.weight": storage[:12].reshape(3, 4)})


def between_records() -> bytes:
    entries = members(WEIGHTS)
    field = mark("extra field of a record").encode()
    entries[0].central_extra = b"\xfe\xca" + len(field).to_bytes(2, "little") + field
    entries[-1].before = mark("gap between records").encode()
    entries.append(Entry("archive/extra/payload.bin", mark("record that nothing reads").encode()))
    return archive(entries, comment=mark("comment").encode(), gap=mark("gap before the directory").encode())


PLANTED = {
    "in the pickle": lambda: saved(pickled()),
    "in the stream of before torch 1.6": lambda: saved(pickled(), _use_new_zipfile_serialization=False),
    "in a bare pickle": lambda: pickle.dumps(pickled()),
    "behind a view": behind_a_view,
    "between the records": between_records,
    "in the metadata": lambda: safetensors.torch.save(WEIGHTS, metadata={"note": MARKER, MARKER: "x"}),
    "before the archive": lambda: archive(members(WEIGHTS), before=MARKER.encode()),
    "behind the archive": lambda: archive(members(WEIGHTS)) + MARKER.encode(),
}
# What two readers could read differently is refused as a whole, which lets nothing through either.
REFUSED = {"before the archive", "behind the archive"}


@pytest.mark.parametrize("name", PLANTED)
def test_nothing_that_was_planted_survives(sanitize, tmp_path, name):
    content = PLANTED[name]()
    assert MARKER.encode() in content
    (tmp_path / "in.ckpt").write_bytes(content)
    out, manifest = tmp_path / "out.safetensors", tmp_path / "out.manifest.json"
    ran = sanitize(tmp_path / "in.ckpt", out)
    assert not (tmp_path / MARKER).exists()
    if name in REFUSED:
        assert ran.returncode == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.ckpt"]
        return
    assert ran.returncode == 0, ran.stderr
    assert re.findall(rf"{MARKER}[\w ]*", out.read_bytes().decode("latin-1")) == []
    found = safetensors.torch.load_file(out)
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in WEIGHTS.items())
    with safetensors.safe_open(out, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    described = strictly(manifest.read_text())
    assert described["files"][0]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert described["source"]["files"][0]["sha256"] == hashlib.sha256(content).hexdigest()
    # The names of what was left out are told; what it held is not.
    del described["dropped"], described["source"]
    assert MARKER not in str(described)


def test_options_of_convert_go_along(sanitize, tmp_path):
    both = {"state_dict": WEIGHTS, "state_dict_ema": {key: tensor + 1 for key, tensor in WEIGHTS.items()}}
    (tmp_path / "in.ckpt").write_bytes(saved(both))
    ran = sanitize(tmp_path / "in.ckpt", tmp_path / "-out.safetensors", "--weights", "ema", "--dtype", "float16")
    assert ran.returncode == 0, ran.stderr
    found = safetensors.torch.load_file(tmp_path / "-out.safetensors")
    assert torch.equal(found["fc.bias"], torch.full((3,), 2.0).half())


def test_shards_are_verified_too(sanitize, tmp_path):
    (tmp_path / "in.ckpt").write_bytes(saved(WEIGHTS))
    ran = sanitize(tmp_path / "in.ckpt", tmp_path / "out.safetensors", "--max-shard-size", "50")
    assert ran.returncode == 0, ran.stderr
    shards = sorted(tmp_path.glob("out-*.safetensors"))
    index, manifest = tmp_path / "out.safetensors.index.json", tmp_path / "out.manifest.json"
    assert len(shards) == 2
    described = {file["name"]: file["sha256"] for file in strictly(manifest.read_text())["files"]}
    assert described == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (*shards, index)}


def test_no_settings_of_the_folder_have_a_say(sanitize, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckptool.toml").write_text("this is no TOML")
    (tmp_path / "in.ckpt").write_bytes(saved(WEIGHTS))
    assert sanitize("in.ckpt", "out.safetensors").returncode == 0


def test_what_cannot_be_done_leaves_nothing_behind(sanitize, tmp_path):
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    (tmp_path / "in.ckpt").write_bytes(saved(WEIGHTS))
    (tmp_path / "there.safetensors").write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    for args in (
        (),
        ("in.ckpt",),
        ("in.ckpt", "out.pt"),
        ("absent.ckpt", "out.safetensors"),
        ("junk.ckpt", "out.safetensors"),
        ("in.ckpt", "there.safetensors"),
        ("in.ckpt", "absent/out.safetensors"),
    ):
        assert sanitize(*(tmp_path / arg for arg in args)).returncode == 2, args
        assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.safetensors").read_bytes() == b"old"
