"""Write checkpoints that torch would not write: every part of the file can be set."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import torch
import torch._utils

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


class Command:
    """Pickle as the call of a command, as attacks do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@dataclass(frozen=True)
class PersistentId:
    """Stand for what a pickle only refers to."""

    value: Any


@dataclass(frozen=True)
class Rebuilt:
    """Pickle as a tensor of 32-bit floats over a storage that is only named."""

    storage: Any
    size: Any = (4,)
    stride: Any = (1,)
    offset: Any = 0

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (PersistentId(self.storage), self.offset, self.size, self.stride, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.value if isinstance(value, PersistentId) else None


def named(key: Any = "0", numel: Any = 4, kind: Any = torch.FloatStorage, location: Any = "cpu", *rest: Any) -> tuple:
    """Make the persistent id of a storage."""
    return ("storage", kind, key, location, numel, *rest)


def pickled(value: Any, protocol: int = 2) -> bytes:
    """Pickle a value; persistent ids become what they stand for."""
    stream = io.BytesIO()
    _Pickler(stream, protocol).dump(value)
    return stream.getvalue()


FOUR_FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def archived(members: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """Write a zip archive as Python does: no descriptors, no alignment, no 64-bit records."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, data)
    return stream.getvalue()


def unzipped(data: bytes) -> dict[str, bytes]:
    """Read every member of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def members_of(value: Any, **storages: bytes) -> dict[str, bytes]:
    """Make the records of a checkpoint that holds this value and, under these keys, these storages."""
    records = {f"data/{key.removeprefix('_')}": data for key, data in storages.items()}
    return {
        f"archive/{name}": data
        for name, data in ({"data.pkl": pickled(value), "byteorder": b"little"} | records | {"version": b"3\n"}).items()
    }


def legacy(
    value: Any,
    keys: Any,
    storages: list[tuple[int, bytes]],
    *,
    magic: Any = MAGIC,
    protocol: Any = 1001,
    system: Any = SYSTEM,
    tail: bytes = b"",
) -> bytes:
    """Write the stream of torch before 1.6: five pickles, then a count and the bytes of each storage."""
    head = b"".join(pickled(part) for part in (magic, protocol, system, value, keys))
    return head + b"".join(struct.pack("<q", count) + data for count, data in storages) + tail


def safetensors_file(header: str | bytes, data: bytes = b"") -> bytes:
    """Write a safetensors file with any header."""
    header = header.encode() if isinstance(header, str) else header
    return len(header).to_bytes(8, "little") + header + data
