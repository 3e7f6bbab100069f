"""Bytes to ``Checkpoint``: what a file is, and one reader for each container."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.file import InputFile, is_folder, open_file
from ckptool.formats.readers import ENVELOPES, closed_on_failure, read_file
from ckptool.formats.sniff import SHARD_INDEX, sniff
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.places import RemotePath

__all__ = ["open_checkpoint"]

_DISTRIBUTED_NAME = ".metadata"  # of a folder that torch.distributed.checkpoint wrote


def open_checkpoint(path: Path) -> Checkpoint:
    """Describe the checkpoint in a file, or in the files that an index or a model's folder names.

    Nothing in it is run, no tensor is read. Of a file elsewhere (a ``RemotePath``) the description alone is fetched.

    A path may lead into an archive as if it were a folder: ``runs.zip/best.ckpt``.

    :raises UnreadableCheckpoint: it is no checkpoint, damaged, hostile, or of a kind that is not read yet. The
        message begins with the path; ``globals`` are what its pickle named until then.
    """
    try:
        return _open_folder(path) if is_folder(path) else _open_file(path)
    except UnreadableCheckpoint as error:
        # A source of bytes names its file itself, and so does a file in the folder.
        if not str(error).startswith((f"{path}: ", f"{path}{os.sep}")):
            error.args = (f"{path}: {error}",)
        raise


# Few checkpoints are in shards: the others are spared the imports.


def _open_folder(path: Path) -> Checkpoint:
    if os.path.lexists(path / _DISTRIBUTED_NAME):
        return _open_distributed(path, path)
    from ckptool.formats.joined import open_folder

    return open_folder(path, _open_single)


def _open_distributed(folder: Path, path: Path) -> Checkpoint:
    from ckptool.formats.dcp import open_distributed

    with _paused_collection():
        return open_distributed(folder, path, _open_single)


def _open_file(path: Path) -> Checkpoint:
    if path.name == _DISTRIBUTED_NAME:
        if isinstance(path, RemotePath):
            raise UnreadableCheckpoint("a distributed checkpoint is read from this disk only; download its folder")
        return _open_distributed(path.parent, path)
    if path.suffix == ".distcp":
        raise UnreadableCheckpoint("this is one file of a distributed checkpoint; name its folder to read it")
    file, wanted = _open(path)
    kind = _sniff(file)
    if kind == SHARD_INDEX:
        from ckptool.formats.joined import open_index

        return open_index(file, path, _open_single)
    checkpoint = _read(file, kind, wanted)
    return _say_if_shard(checkpoint) if "-of-" in path.name else checkpoint


def _say_if_shard(checkpoint: Checkpoint) -> Checkpoint:
    from ckptool.formats.shards import one_of_several

    return replace(checkpoint, findings=(*checkpoint.findings, *one_of_several(checkpoint.path.name)))


def _open_single(path: Path) -> Checkpoint:
    file = open_file(path)
    kind = _sniff(file)
    if kind == SHARD_INDEX:
        file.close()
        raise UnreadableCheckpoint("this is an index where a file of weights is expected; do not trust it")
    return _read(file, kind)


def _sniff(file: InputFile) -> str:
    with closed_on_failure(file):
        return sniff(file)


def _read(file: InputFile, kind: str, wanted: str | None = None) -> Checkpoint:
    with _paused_collection():
        return read_file(file, kind, wanted)


def _open(path: Path) -> tuple[InputFile, str | None]:
    """Open a file; where the path leads into an archive, open that, and name the file in it."""
    try:
        return open_file(path), None
    except UnreadableCheckpoint as error:
        if not isinstance(error.__cause__, NotADirectoryError):
            raise
        outer = next(parent for parent in path.parents if parent.is_file())
        file = open_file(outer)
        file.path = path
        if _is_envelope(file):
            return file, path.relative_to(outer).as_posix()
        file.close()
        raise


def _is_envelope(file: InputFile) -> bool:
    try:
        return sniff(file) in ENVELOPES
    except UnreadableCheckpoint:
        return False


@contextmanager
def _paused_collection() -> Iterator[None]:
    """Spare the collector the many small values of a description: none of them is garbage yet."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
