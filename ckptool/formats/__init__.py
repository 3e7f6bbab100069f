"""Bytes to ``Checkpoint``: what a file is, and one reader for each container."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.file import InputFile, open_file
from ckptool.formats.safetensors import read_safetensors
from ckptool.formats.sniff import explain_folder, sniff
from ckptool.formats.torch_legacy import read_torch_legacy
from ckptool.formats.torch_zip import read_torch_zip
from ckptool.model.checkpoint import Checkpoint

__all__ = ["open_checkpoint"]

_READERS: dict[str, Callable[[InputFile], Checkpoint]] = {
    "zip": read_torch_zip,
    "torch-legacy": read_torch_legacy,
    "safetensors": read_safetensors,
}


def open_checkpoint(path: Path) -> Checkpoint:
    """Describe the checkpoint in a file; nothing in it is run, no tensor is read.

    :raises UnreadableCheckpoint: it is no checkpoint, damaged, hostile, or of a kind that is not read yet. The
        message begins with the path; ``globals`` are what its pickle named until then.
    """
    try:
        if _is_folder(path):
            raise UnreadableCheckpoint(explain_folder(path))
        return _read(open_file(path))
    except UnreadableCheckpoint as error:
        if not str(error).startswith(f"{path}: "):  # a source of bytes names its file itself
            error.args = (f"{path}: {error}",)
        raise


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # what hinders it is told when the file is opened
        return False


def _read(file: InputFile) -> Checkpoint:
    try:
        with _paused_collection():
            checkpoint = _READERS[sniff(file)](file)
        file.check_unchanged()
    except BaseException:
        file.close()
        raise
    return checkpoint


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
