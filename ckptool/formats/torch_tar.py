"""A checkpoint of torch before 0.1.10: a tar archive of four files.

``sys_info`` (a pickle), ``storages`` (a count; for each storage its key, location and type as a pickle, its number of
elements in 8 bytes, its bytes; then the views of storages as a pickle), ``tensors`` (a count; for each tensor its key,
its storage's key and its type as a pickle, the number of dimensions in 4 bytes and 4 of nothing, sizes, strides and
offset in 8 bytes each), ``pickle`` (the object, which refers to tensors by their keys)
(torch/serialization.py, legacy_load). There is no checksum.
"""

from __future__ import annotations

import struct
from typing import Any

from ckptool.errors import AGAIN, UnreadableCheckpoint
from ckptool.formats.file import InnerFile, InputFile
from ckptool.formats.pickle import (
    GlobalLog,
    PickledStorage,
    StorageType,
    TruncatedPickle,
    read_pickle,
    scan_rest,
    storage_type,
    view_tensor,
)
from ckptool.formats.sources import StoredRange
from ckptool.formats.tar import TarMember
from ckptool.formats.torch_zip import LARGEST_PICKLE
from ckptool.model.checkpoint import Checkpoint, Finding
from ckptool.model.values import MOST_DIMENSIONS, DictNode, Storage, TensorSpec

MEMBERS = frozenset({"sys_info", "pickle", "storages", "tensors"})
_WINDOW_BYTES = 64 << 10
_GROWTH = 8
_COUNT = struct.Struct("<q")
_DIMENSIONS = struct.Struct("<i4x")


class _Stream:
    """Read pickles and numbers from one member, one after the other."""

    def __init__(self, file: InputFile, name: str, log: GlobalLog) -> None:
        self.file = file
        self.name = name
        self.position = 0
        self._log = log

    def pickle(self) -> Any:
        """Read the next pickle."""
        nbytes = _WINDOW_BYTES
        left = self.file.size - self.position
        while True:
            window = self.file.read(self.position, min(nbytes, left))
            try:
                unpickled = read_pickle(window, label=self.name, load_storage=None, log=self._log)
            except TruncatedPickle:
                if nbytes >= min(left, LARGEST_PICKLE):
                    raise
                nbytes *= _GROWTH
            else:
                self.position += unpickled.end
                return unpickled.value

    def numbers(self, layout: struct.Struct) -> tuple[int, ...]:
        """Read numbers in a fixed layout."""
        return layout.unpack(self.file.read(self.skip(layout.size), layout.size))

    def skip(self, nbytes: int) -> int:
        """Pass over bytes that are all there; give the offset of the first."""
        begin = self.position
        if nbytes < 0 or nbytes > self.file.size - begin:
            raise _damaged(f"{self.name!r} ends at byte {self.file.size:,}, before what it declares")
        self.position += nbytes
        return begin

    def count(self) -> int:
        """Read how many things follow."""
        number = self.pickle()
        if type(number) is not int or not 0 <= number <= self.file.size:
            raise _damaged(f"{self.name!r} does not say how much it holds")
        return number


def read_torch_tar(file: InputFile, members: list[TarMember]) -> Checkpoint:
    """Describe a checkpoint of torch before 0.1.10; no storage is read.

    :raises UnreadableCheckpoint: it is damaged or contradicts itself. ``globals`` of the error are those found until
        then.
    """
    log = GlobalLog()
    inside = {member.name: InnerFile(file, member.offset, member.nbytes) for member in members if member.is_file}
    try:
        root, storages = _read_members(inside, log)
    except UnreadableCheckpoint as error:
        error.globals = log.uses()
        raise
    extra = sorted(inside.keys() - MEMBERS)
    found = [Finding("extra-member", f"the archive holds {len(extra)} members that torch does not write")]
    return Checkpoint(
        path=file.path,
        format="torch-tar",
        file_bytes=file.size,
        root=root,
        file=file,
        storages=tuple(storages),
        globals=log.uses(),
        findings=(*log.findings, *(found if extra else ())),
        facts={"byteorder": "little"},
    )


def _read_members(inside: dict[str, InnerFile], log: GlobalLog) -> tuple[Any, list[Storage]]:
    if not inside.keys() >= MEMBERS:
        missing = ", ".join(sorted(MEMBERS - inside.keys()))
        raise _damaged(f"it lacks {missing}")
    system = _Stream(inside["sys_info"], "sys_info", log).pickle()
    if type(system) is not DictNode or system.get("little_endian") is not True:
        raise UnreadableCheckpoint("the file was written on a big-endian machine; write it anew with torch.save there")
    storages = _read_storages(_Stream(inside["storages"], "storages", log))
    tensors = _read_tensors(_Stream(inside["tensors"], "tensors", log), storages)
    known: dict[str, Any] = {str(key): value for key, value in (*storages.items(), *tensors.items())}
    if len(known) != len(storages) + len(tensors):
        raise _damaged("a storage and a tensor have the same key")
    data = _read_object(inside["pickle"])
    unpickled = read_pickle(data, label="pickle", load_storage=None, load_named=known.get, log=log)
    scan_rest(data, label="pickle", log=log, start=unpickled.end)
    return unpickled.value, list(dict.fromkeys(found.storage for found in storages.values()))


def _read_object(file: InputFile) -> bytes:
    if file.size > LARGEST_PICKLE:
        raise UnreadableCheckpoint(f"its pickle has {file.size:,} bytes, more than are read; {AGAIN}")
    return file.read(0, file.size)


# --- storages and tensors -----------------------------------------------------------------------------------------


def _read_storages(stream: _Stream) -> dict[int, PickledStorage]:
    storages: dict[int, PickledStorage] = {}
    for _ in range(stream.count()):
        key, location, kind = _triple(stream)
        if type(location) is not str or kind is None or kind.dtype is None:
            raise _damaged("a storage is named with values of other types than torch writes")
        _add(storages, key, _read_storage(stream, str(key), location, kind))
    views = stream.pickle()
    if type(views) is not list:
        raise _damaged("the list of its storage views is none")
    for view in views:
        _add_view(storages, view)
    _check_end(stream)
    return storages


def _triple(stream: _Stream) -> tuple[Any, Any, StorageType | None]:
    named = stream.pickle()
    if type(named) is not tuple or len(named) != 3:
        raise _damaged(f"{stream.name!r} names something with other than three values")
    return named[0], named[1], storage_type(named[2])


def _read_storage(stream: _Stream, key: str, location: str, kind: StorageType) -> PickledStorage:
    (numel,) = stream.numbers(_COUNT)
    nbytes = numel * (kind.dtype.itemsize if kind.dtype else 1)
    begin = stream.skip(nbytes)
    source = StoredRange(stream.file, f"storage {key}", begin, nbytes)
    return PickledStorage(Storage(key, source, nbytes, location), kind.dtype, 0, numel)


def _add(known: dict[int, Any], key: Any, value: Any) -> None:
    if type(key) is not int or key in known:
        raise _damaged("the key of a storage or tensor is no number, or stands for two")
    known[key] = value


def _add_view(storages: dict[int, PickledStorage], view: Any) -> None:
    """Add a part of a storage as one of its own: (key, key of the whole, offset, size), in elements."""
    if type(view) is not tuple or [type(part) for part in view] != [int, int, int, int] or view[1] not in storages:
        raise _damaged("a view of a storage is not what torch writes")
    key, whole, offset, numel = view
    root = storages[whole]
    if offset < 0 or numel < 0 or offset + numel > root.numel:
        raise _damaged("a view of a storage reaches beyond it")
    _add(storages, key, PickledStorage(root.storage, root.dtype, root.offset + offset, numel))


def _read_tensors(stream: _Stream, storages: dict[int, PickledStorage]) -> dict[int, TensorSpec]:
    tensors: dict[int, TensorSpec] = {}
    for _ in range(stream.count()):
        key, storage_key, _ = _triple(stream)
        (dimensions,) = stream.numbers(_DIMENSIONS)
        if not 0 <= dimensions <= MOST_DIMENSIONS:
            raise _damaged(f"a tensor has {dimensions:,} dimensions")
        sizes = stream.numbers(struct.Struct(f"<{dimensions}q"))
        strides = stream.numbers(struct.Struct(f"<{dimensions}q"))
        (offset,) = stream.numbers(_COUNT)
        storage = storages.get(storage_key) if type(storage_key) is int else None
        if storage is None:
            raise _damaged("a tensor has no storage")
        view = view_tensor(
            storage, offset, sizes, strides, requires_grad=False, is_parameter=False, label=f"tensor {key}"
        )
        _add(tensors, key, view)
    _check_end(stream)
    return tensors


def _check_end(stream: _Stream) -> None:
    if stream.position != stream.file.size:
        raise _damaged(f"{stream.file.size - stream.position:,} bytes follow the last of {stream.name!r}")


def _damaged(what: str) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(f"this checkpoint of torch before 0.1.10 is damaged: {what}; {AGAIN}")
