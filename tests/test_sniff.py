"""What is no checkpoint is named by its content, in one sentence, and what comes later is not mistaken for damage."""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats import open_checkpoint

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 417003520\n" % (b"4d" * 32)
AGAIN = "get the file again"
EXPORT = "load it where it was made and save its tensors with torch.save or safetensors"


def saved(**options: object) -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, stream, **options)
    return stream.getvalue()


def zipped(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return stream.getvalue()


def named_zip(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return stream.getvalue()


def tarred(*names: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 700
            archive.addfile(info, io.BytesIO(bytes(700)))
    return stream.getvalue()


WEB_PAGE = "this is a web page, not a checkpoint: the download failed; download the file itself"
XML = "this is XML, probably a server's error reply, not a checkpoint; download the file itself"
JSON = "this is JSON (an error reply or a configuration), not a checkpoint; download the file itself"
INDEX = "1 of 1 files that its index names are not there ('a.safetensors'); get them, too"
UNKNOWN = "this is no format of PyTorch checkpoints that ckptool knows; check which file is meant"
LFS_POINTER = "this is a Git LFS pointer to a file of 417,003,520 bytes, not the checkpoint itself; run git lfs pull"

FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", f"the file is empty; {AGAIN}"),
    "zeros": (
        lambda: bytes(5000),
        f"the file is filled with zeros, as a full disk or a download that never ended leaves it; {AGAIN}",
    ),
    "zeros-then-data": (
        lambda: bytes(5000) + b"\x01" * 9,
        f"the file begins with 4,096 zero bytes, as no checkpoint does; {AGAIN}",
    ),
    "lfs": (lambda: LFS, LFS_POINTER),
    "lfs-crlf": (lambda: LFS.replace(b"\n", b"\r\n"), LFS_POINTER),
    "lfs-no-size": (
        lambda: LFS[:100],
        "this is a Git LFS pointer, not the checkpoint itself; run git lfs pull",
    ),
    "html": (lambda: b"<!DOCTYPE html>\n<html><body>404</body></html>", WEB_PAGE),
    "html-space": (lambda: b"\n  <HTML><head>", WEB_PAGE),
    "xml": (lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", XML),
    "json": (lambda: b'{"error": "Repository not found"}', JSON),
    "json-list": (lambda: b"[1, 2]", JSON),
    "index": (lambda: json.dumps({"metadata": {}, "weight_map": {"w": "a.safetensors"}}).encode(), INDEX),
    "text": (
        lambda: b"Entry not found\nsecond line",
        "this is text that begins 'Entry not found', not a checkpoint; download the file itself",
    ),
    "text-escape": (
        lambda: "caf\u00e9 \u202e".encode(),
        UNKNOWN,
    ),
    "noise": (lambda: b"\x07\x13\xff\xfe junk", UNKNOWN),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(40), "this is a 7z archive; unpack it first"),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd" + b"\x01" * 40, "this is compressed with zstd; run unzstd on it first"),
    "lz4": (lambda: b"\x04\x22\x4d\x18" + b"\x01" * 40, "this is compressed with lz4; run unlz4 on it first"),
    "rar": (lambda: b"Rar!\x1a\x07\x01\x00" + b"\x01" * 40, "this is a rar archive; unpack it first"),
    "gguf": (
        lambda: b"GGUF\x03\x00\x00\x00" + bytes(40),
        f"this is a GGUF model for llama.cpp, which ckptool does not read yet; {EXPORT}",
    ),
    "hdf5": (
        lambda: b"\x89HDF\r\n\x1a\n" + bytes(40),
        f"this is an HDF5 file (Keras or h5py), not a PyTorch checkpoint; {EXPORT}",
    ),
    "onnx": (
        lambda: b"\x08\x08\x12\x07pytorch\x1a\x052.1.0\x3a\x10" + bytes(16),
        "this looks like an ONNX model, not a PyTorch checkpoint; go back to the model it was exported from",
    ),
    "empty-zip": (lambda: zipped(), f"this is an empty zip archive; {AGAIN}"),
    "half-zip": (
        lambda: saved()[:700],
        f"this is a truncated zip archive: 700 bytes are there, its end is not; {AGAIN}",
    ),
    "zip-of-nothing": (
        lambda: zipped(**{"notes.txt": b"x"}),
        "this zip archive holds no checkpoint; check which file is meant",
    ),
    "zip-no-folder": (
        lambda: named_zip("data.pkl", "version"),
        "this zip archive has no folder around its records; zip the folder, not its content",
    ),
    "keras": (
        lambda: named_zip("metadata.json", "config.json", "model.weights.h5"),
        f"this is a Keras model, not a PyTorch checkpoint; {EXPORT}",
    ),
    "legacy-and-zip": (
        lambda: saved(_use_new_zipfile_serialization=False) + saved(),
        "the file is two formats at once (torch-legacy and zip); do not trust it",
    ),
    "safetensors-and-zip": (
        lambda: safetensors.torch.save({"w": torch.ones(2)}) + saved(),
        "the file is two formats at once (safetensors and zip); do not trust it",
    ),
    "tar-and-zip": (
        lambda: tarred("weights.pt") + saved(),
        "the file is two formats at once (tar and zip); do not trust it",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FILES)
def test_file_is_named(tmp_path: Path, case: str) -> None:
    make, message = FILES[case]
    path = tmp_path / "model.pt"
    path.write_bytes(make())
    with pytest.raises(UnreadableCheckpoint) as refused:
        open_checkpoint(path)
    assert str(refused.value) == f"{path}: {message}"


DISTRIBUTED = (
    "this folder holds parts of a distributed checkpoint without the .metadata that says what of; get it, too "
    "(it is written last: where it never was, the save did not end)"
)
FOLDERS = {
    "empty": ((), "this is a folder, not a file; name a file in it"),
    "distributed": (
        ("__0_0.distcp", "__1_0.distcp"),
        DISTRIBUTED,
    ),
    "some shards": (
        ("model-00001-of-00002.safetensors",),
        "1 of 2 files that their numbers ask for are not there ('model-00002-of-00002.safetensors'); get them, too",
    ),
    "deepspeed": (
        ("latest", "zero_to_fp32.py"),
        "this folder names a save of DeepSpeed that is not in it, or a universal one, which is not read; get all of it",
    ),
    "megatron": (
        ("latest_checkpointed_iteration.txt",),
        "this folder holds checkpoints of Megatron; name one of them (iter_...), which is read where it is torch_dist",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folder_is_named(tmp_path: Path, case: str) -> None:
    names, message = FOLDERS[case]
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UnreadableCheckpoint) as refused:
        open_checkpoint(tmp_path)
    assert str(refused.value) == f"{tmp_path}: {message}"


def missing(path: Path) -> Path:
    return path / "none.pt"


def beneath_a_file(path: Path) -> Path:
    (path / "file").touch()
    return path / "file" / "model.pt"


def dangling(path: Path) -> Path:
    (path / "link").symlink_to(path / "none")
    return path / "link"


def circle(path: Path) -> Path:
    (path / "one").symlink_to(path / "two")
    (path / "two").symlink_to(path / "one")
    return path / "one"


def pipe(path: Path) -> Path:
    os.mkfifo(path / "pipe")
    return path / "pipe"


def unix_socket(path: Path) -> Path:
    # A relative name: a socket's path may have no more than some hundred bytes.
    os.chdir(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    return path / "socket"


def endless(_: Path) -> Path:
    return Path("/dev/zero")


def nul(path: Path) -> Path:
    return path / "a\0b"


def long_name(path: Path) -> Path:
    return path / ("n" * 300)


NO_FILES = {
    missing: "there is no such file; check the path",
    beneath_a_file: "a part of the path is no folder; check the path",
    dangling: "there is no such file; check the path",
    circle: "the symbolic links lead in a circle; name the file itself",
    pipe: "this is a pipe, not a file; name a regular file",
    unix_socket: "this is a socket or a device, not a file; copy its content into a regular file first",
    endless: "this is a device, not a file; name a regular file",
    nul: "this is no possible path; check its characters",
    long_name: "the name is too long for this system; check the path",
}


@pytest.mark.parametrize("make", NO_FILES, ids=lambda make: make.__name__)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable) -> None:
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path)
    with pytest.raises(UnreadableCheckpoint) as refused:
        open_checkpoint(path)
    assert str(refused.value) == f"{path}: {NO_FILES[make]}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(saved())
    path.chmod(stat.S_IWUSR)
    with pytest.raises(UnreadableCheckpoint, match="permission denied; ask for the right to read it"):
        open_checkpoint(path)


def test_denied_open_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for a missing permission, which root never meets."""

    def deny(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "model.pt"
    path.write_bytes(saved())
    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(UnreadableCheckpoint) as refused:
        open_checkpoint(path)
    monkeypatch.undo()
    assert str(refused.value) == f"{path}: permission denied; ask for the right to read it"


@pytest.mark.parametrize("name", ["model.safetensors", "model.zip", "noextension", "model.txt"])
def test_the_extension_has_no_say(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(saved())
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "torch-zip"
    path.write_bytes(safetensors.torch.save({"w": torch.ones(2)}))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "safetensors"
    path.write_bytes(saved(_use_new_zipfile_serialization=False))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "torch-legacy"


def test_no_file_stays_open_after_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(saved()[:-30])
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(UnreadableCheckpoint):
        open_checkpoint(path)
    assert set(Path("/proc/self/fd").iterdir()) == before
