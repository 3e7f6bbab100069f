"""Which reader reads which kind of file, and how a checkpoint inside another file is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.safetensors import read_safetensors
from ckptool.formats.sniff import SHARD_INDEX, archive_kind, sniff
from ckptool.formats.torch_legacy import read_torch_legacy
from ckptool.formats.torch_zip import read_torch_zip
from ckptool.formats.zip import Archive, read_archive
from ckptool.model.checkpoint import Checkpoint, Finding

if TYPE_CHECKING:
    from ckptool.formats.envelopes import Opened


# What is rare is imported when it comes along.
def _read_npy(file: InputFile) -> Checkpoint:
    from ckptool.formats.numpy_files import read_npy

    return read_npy(file)


def _read_raw_pickle(file: InputFile) -> Checkpoint:
    from ckptool.formats.raw_pickle import read_raw_pickle

    return read_raw_pickle(file)


def _read_npz(file: InputFile, archive: Archive) -> Checkpoint:
    from ckptool.formats.numpy_files import read_npz

    return read_npz(file, archive)


def _read_torchscript(file: InputFile, archive: Archive) -> Checkpoint:
    from ckptool.formats.torchscript import read_torchscript

    return read_torchscript(file, archive)


def _read_old_torchscript(file: InputFile, archive: Archive) -> Checkpoint:
    from ckptool.formats.torchscript_old import read_old_torchscript

    return read_old_torchscript(file, archive)


def _read_exported(file: InputFile, archive: Archive) -> Checkpoint:
    from ckptool.formats.exported import read_exported

    return read_exported(file, archive)


def _read_old_exported(file: InputFile, archive: Archive) -> Checkpoint:
    from ckptool.formats.exported import read_old_exported

    return read_old_exported(file, archive)


def _read_tar(file: InputFile) -> Checkpoint | None:
    from ckptool.formats.tar import read_tar
    from ckptool.formats.torch_tar import MEMBERS, read_torch_tar

    members = read_tar(file)
    is_of_torch = len(MEMBERS.intersection(member.name for member in members)) > 1
    return read_torch_tar(file, members) if is_of_torch else None


_READERS: dict[str, Callable[[InputFile], Checkpoint | None]] = {
    "torch-legacy": read_torch_legacy,
    "safetensors": read_safetensors,
    "pickle": _read_raw_pickle,
    "npy": _read_npy,
    "tar": _read_tar,
}
_ARCHIVE_READERS: dict[str, Callable[[InputFile, Archive], Checkpoint]] = {
    "torch-zip": read_torch_zip,
    "npz": _read_npz,
    "torchscript": _read_torchscript,
    "torchscript-1.0": _read_old_torchscript,
    "torch-export": _read_exported,
    "torch-export-2.1": _read_old_exported,
}
ENVELOPES = frozenset({"zip", "tar", "gzip", "bzip2", "xz"})
_MOST_ENVELOPES = 2  # a .tar.gz is two


def read_file(file: InputFile, kind: str, wanted: str | None = None, around: tuple[str, ...] = ()) -> Checkpoint:
    """Read a file of some ``kind`` (as ``sniff`` names it), or the one inside it, and close it on any failure.

    ``wanted`` is the name of the one inside, where a user gave it; ``around`` are the envelopes that it lies in.

    :raises UnreadableCheckpoint: it is damaged, hostile, or holds no checkpoint, or several.
    """
    with closed_on_failure(file):
        archive = read_archive(file) if kind == "zip" else None
        if archive is not None:
            kind = archive_kind(archive.records)
        checkpoint = None if wanted is not None else _read_checkpoint(file, kind, archive)
        if checkpoint is None:
            return _read_inside(file, kind, archive, wanted, around)
        file.check_unchanged()
        return checkpoint


@contextmanager
def closed_on_failure(file: InputFile) -> Iterator[None]:
    """Close a file that something prevents from being read; a refusal also tells what its pickles name."""
    try:
        yield
    except UnreadableCheckpoint as error:
        _tell_named(file, error)
        file.close()
        raise
    except BaseException:
        file.close()
        raise


def _tell_named(file: InputFile, error: UnreadableCheckpoint) -> None:
    """Add to a refusal what the pickles of the file name, where it came before any of them was read."""
    if error.globals:
        return
    from ckptool.formats.salvage import named_in_ruins

    with suppress(UnreadableCheckpoint):  # the file cannot be read at all, which the refusal says already
        error.globals = named_in_ruins(file)


def _read_checkpoint(file: InputFile, kind: str, archive: Archive | None) -> Checkpoint | None:
    """Read a file that is a checkpoint itself; give None for one that may hold some."""
    if archive is not None:
        return _ARCHIVE_READERS[kind](file, archive) if kind in _ARCHIVE_READERS else None
    return _READERS[kind](file) if kind in _READERS else None


def _read_inside(
    file: InputFile, kind: str, archive: Archive | None, wanted: str | None, around: tuple[str, ...]
) -> Checkpoint:
    from ckptool.formats.envelopes import open_inside

    if len(around) == _MOST_ENVELOPES:
        raise UnreadableCheckpoint(f"more than {_MOST_ENVELOPES} archives lie in one another; unpack the outer ones")
    inside = open_inside(file, kind, archive, wanted)
    checkpoint = _read_named(inside, (*around, inside.label))
    return replace(checkpoint, file_bytes=file.size)


def _read_named(inside: Opened, around: tuple[str, ...]) -> Checkpoint:
    """Read a file inside another; messages say which."""
    try:
        checkpoint = read_file(inside.file, _sniff(inside.file), inside.wanted, around)
    except UnreadableCheckpoint as error:
        if inside.name is not None and not str(error).startswith(f"{inside.file.path}: "):
            error.args = (f"{inside.name!r:.100} in it: {error}",)
        raise
    return checkpoint if "inside" in checkpoint.facts else _placed(checkpoint, around)


def _placed(checkpoint: Checkpoint, around: tuple[str, ...]) -> Checkpoint:
    """Say where the checkpoint was found."""
    place = ", ".join(around)
    finding = Finding("inside", f"the checkpoint lies inside another file ({place})")
    facts = {**checkpoint.facts, "inside": place}
    return replace(checkpoint, facts=facts, findings=(finding, *checkpoint.findings))


def _sniff(file: InputFile) -> str:
    """Name the kind of a file inside another; an index of shards is of no use there."""
    with closed_on_failure(file):
        kind = sniff(file)
        if kind == SHARD_INDEX:
            raise UnreadableCheckpoint("this is the index of a checkpoint in shards; unpack the archive and name it")
        return kind
