"""A checkpoint inside another file: in a zip or tar archive, or compressed as a whole.

What lies there as it is, is read in place; what is compressed is inflated into a temporary file without a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.compressed import COMPRESSED, inflate_file, spool
from ckptool.formats.file import InnerFile, InputFile
from ckptool.formats.sniff import HEAD_BYTES, recognise
from ckptool.formats.sources import read_bytes
from ckptool.formats.tar import TarMember, read_tar
from ckptool.formats.zip import STORED, Archive, Record

_MOST_LISTED = 8
_MOST_MEMBERS = 10_000

# The archives of NVIDIA NeMo hold one checkpoint beside their configuration.
_NEMO = ("model_config.yaml", "model_weights.ckpt")


class Held(NamedTuple):
    """Name a file inside an archive; ``read_head`` gives its first bytes, ``open`` makes it readable."""

    name: str
    read_head: Callable[[], bytes]
    open: Callable[[], InputFile]


class Opened(NamedTuple):
    """Hold the file inside another one, ready to be read.

    ``name`` is its name there, None where it has none; ``wanted`` the name that is still to be found inside it.
    ``label`` says what is around it.
    """

    file: InputFile
    name: str | None
    wanted: str | None
    label: str


def open_inside(file: InputFile, kind: str, archive: Archive | None, wanted: str | None) -> Opened:
    """Open the checkpoint inside a file of some ``kind``, or the one that is ``wanted`` by name.

    :raises UnreadableCheckpoint: it is damaged, or holds none, or several equal ones.
    """
    if kind == "tar":
        return _chosen(file, choose(file, _held_in_tar(file, read_tar(file)), wanted, "tar archive"), "tar")
    if kind == "zip-around" and archive is not None:
        return _chosen(file, choose(file, _held_in_zip(file, archive), wanted, "zip archive"), "zip")
    if kind in COMPRESSED:
        return Opened(inflate_file(file, kind), None, wanted, kind)
    raise UnreadableCheckpoint("the path leads into a file that is no archive of checkpoints; name the file itself")


def _chosen(file: InputFile, held: Held, label: str) -> Opened:
    inner = held.open()
    if not isinstance(inner, InnerFile):  # a copy, which needs the archive no more
        file.check_unchanged()
        file.close()
    return Opened(inner, held.name, None, f"{label}: {held.name}")


def _held_in_zip(file: InputFile, archive: Archive) -> list[Held]:
    """List the files in a zip archive."""
    records = [record for name, record in archive.records.items() if not name.endswith("/")]
    return [_in_zip(file, record) for record in records]


def _in_zip(file: InputFile, record: Record) -> Held:
    unchecked = record._replace(crc32=0)
    nbytes = min(record.nbytes, HEAD_BYTES)

    def read_head() -> bytes:
        return read_bytes(unchecked.open(file), nbytes)

    return Held(record.name, read_head, lambda: _open_record(file, record))


def _open_record(file: InputFile, record: Record) -> InputFile:
    """Make a record of a zip archive readable as a file, its checksum checked.

    A zip archive in it has checksums of its own, and is not read for that of the outer one.

    :raises UnreadableCheckpoint: the checksum is wrong, or there is no room to inflate it.
    """
    chunks = record.open(file).stream()
    if record.method != STORED:
        return spool(file.path, chunks)
    inner = InnerFile(file, record.offset, record.nbytes)
    if not record.nbytes or recognise(inner.read(0, min(inner.size, HEAD_BYTES))) != ["zip"]:
        for _ in chunks:
            pass
    return inner


def _held_in_tar(file: InputFile, members: Sequence[TarMember]) -> list[Held]:
    """List the files in a tar archive; links and devices are none."""
    return [_in_tar(file, member) for member in members if member.is_file]


def _in_tar(file: InputFile, member: TarMember) -> Held:
    inner = InnerFile(file, member.offset, member.nbytes)
    return Held(member.name, lambda: inner.read(0, min(member.nbytes, HEAD_BYTES)), lambda: inner)


def choose(file: InputFile, held: Sequence[Held], wanted: str | None, archive: str) -> Held:
    """Give the one checkpoint in an archive (``zip archive``, ``tar archive``), or the file that is ``wanted``.

    :raises UnreadableCheckpoint: there is none, or several are equal.
    """
    if wanted is not None:
        return _choose_wanted(held, wanted, archive)
    if len(held) > _MOST_MEMBERS:
        raise UnreadableCheckpoint(f"this {archive} holds {len(held):,} files; unpack it and name the checkpoint in it")
    found = _nemo_weights(held) or [one for one in held if recognise(one.read_head())]
    if not found:
        raise UnreadableCheckpoint(f"this {archive} holds no checkpoint; check which file is meant")
    if len(found) > 1:
        raise UnreadableCheckpoint(
            f"this {archive} holds {len(found)} files that may be meant, {_listed(found)}; name one of them as "
            f"{f'{file.path.name}/{found[0].name}'!r:.200}"
        )
    return found[0]


def _choose_wanted(held: Sequence[Held], wanted: str, archive: str) -> Held:
    found = [one for one in held if one.name.removeprefix("./") == wanted]
    if not found:
        raise UnreadableCheckpoint(
            f"this {archive} holds no file {wanted!r:.100}, but {_listed(held) or 'none at all'}; name another"
        )
    return found[0]


def _nemo_weights(held: Sequence[Held]) -> list[Held]:
    names = {one.name.rpartition("/")[2] for one in held}
    return [one for one in held if one.name.rpartition("/")[2] == _NEMO[1]] if names.issuperset(_NEMO) else []


def _listed(held: Sequence[Held]) -> str:
    shown = ", ".join(f"{one.name!r:.60}" for one in held[:_MOST_LISTED])
    return shown if len(held) <= _MOST_LISTED else f"{shown} and {len(held) - _MOST_LISTED} more"
