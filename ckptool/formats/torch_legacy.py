"""A checkpoint of torch.save before 1.6: one stream of five pickles, then the storages.

Magic number, protocol version, system information, the object, the sorted storage keys; then for each key its number
of elements (8 bytes, little-endian) and its bytes (torch/serialization.py, _legacy_save and _legacy_load). There is no
checksum.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from ckptool.errors import AGAIN, UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.pickle import (
    SCANNED_BYTES,
    GlobalLog,
    LoadStorage,
    PickledStorage,
    StorageType,
    TruncatedPickle,
    Unpickled,
    read_pickle,
    scan_foreign,
)
from ckptool.formats.sources import StoredRange
from ckptool.formats.torch_zip import LARGEST_PICKLE, check_identifier
from ckptool.model.checkpoint import Checkpoint, Finding
from ckptool.model.values import DictNode, Storage

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
COUNT_BYTES = 8
_FIRST_HEAD = 1 << 20
_HEAD_GROWTH = 8
# Sizes of C types in bytes; torch writes those of struct's standard mode on every machine.
_TYPE_SIZES = {"short": 2, "int": 4, "long": 4}

_RESAVE = "write it anew with torch.save"


class _Root(NamedTuple):
    """Keep one storage of the stream: what named it, and its place, known only after the object is read."""

    identifier: tuple[Any, ...]
    source: StoredRange
    storage: Storage


def read_torch_legacy(file: InputFile) -> Checkpoint:
    """Describe a checkpoint of torch before 1.6; no storage is read.

    :raises UnreadableCheckpoint: it is damaged or contradicts itself. ``globals`` of the error are those found until
        then.
    """
    stream = _Stream(file)
    table = _StorageTable(file)
    try:
        check_preamble(stream)
        value = stream.read("object", table.load)
        end = table.place(stream.read("storage keys"), stream.position)
    except UnreadableCheckpoint as error:
        error.globals = stream.log.uses()
        raise
    findings = list(stream.log.findings)
    if end != file.size:
        # Another checkpoint may follow, which a second torch.load of the same open file would load.
        rest = bytes(file.read(end, min(file.size - end, SCANNED_BYTES)))
        scan_foreign(rest, label="behind the last storage", log=stream.log)
        findings.append(
            Finding("trailing-bytes", f"{file.size - end:,} bytes follow the last storage, unread by torch")
        )
    return Checkpoint(
        path=file.path,
        format="torch-legacy",
        file_bytes=file.size,
        root=value,
        file=file,
        storages=table.storages(),
        globals=stream.log.uses(),
        findings=tuple(findings),
        facts={"byteorder": "little"},
    )


class _Stream:
    """Read one pickle after the other from the head of the file, which is read as far as needed."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._limit = min(file.size, LARGEST_PICKLE)
        self._head = file.read(0, min(self._limit, _FIRST_HEAD))
        self.position = 0
        self.log = GlobalLog()

    def read(self, label: str, load_storage: LoadStorage | None = None) -> Any:
        """Read the next pickle of the stream."""
        unpickled = self._try(label, load_storage)
        while unpickled is None:
            self._grow()
            unpickled = self._try(label, load_storage)
        self.position = unpickled.end
        return unpickled.value

    def _try(self, label: str, load_storage: LoadStorage | None) -> Unpickled | None:
        """Read a pickle, or give None where it may go on behind the head."""
        try:
            return read_pickle(self._head, label=label, load_storage=load_storage, log=self.log, start=self.position)
        except TruncatedPickle:
            if len(self._head) == self._limit:
                raise
            return None

    def _grow(self) -> None:
        nbytes = min(len(self._head) * _HEAD_GROWTH, self._limit)
        self._head = b""  # read again rather than joined: never two heads at once
        self._head = self._file.read(0, nbytes)


class PickleStream(Protocol):
    """Read one pickle after the other, wherever they lie; ``log`` gets what they name."""

    @property
    def log(self) -> GlobalLog: ...
    def read(self, label: str) -> Any: ...


def check_preamble(stream: PickleStream) -> None:
    """Read the three pickles before the object, which hold plain numbers and text and nothing else.

    :raises UnreadableCheckpoint: they hold anything else.
    """
    magic, protocol, system = (
        stream.read(label) for label in ("magic number", "protocol version", "system information")
    )
    if stream.log.uses():
        raise UnreadableCheckpoint(
            "the preamble of the file names code, which torch never writes there; do not trust it"
        )
    if type(magic) is not int or magic != _MAGIC or type(protocol) is not int or protocol != _PROTOCOL:
        raise UnreadableCheckpoint(f"the preamble is not that of torch's format {_PROTOCOL}; {AGAIN}")
    if type(system) is not DictNode or system.get("protocol_version") != _PROTOCOL:
        raise UnreadableCheckpoint(f"the system information in the preamble is damaged; {AGAIN}")
    sizes = system.get("type_sizes")
    if system.get("little_endian") is not True or type(sizes) is not DictNode or sizes.text_items() != _TYPE_SIZES:
        raise UnreadableCheckpoint(
            f"the file was written on a machine with another byte order or other types; {_RESAVE}"
        )


class _StorageTable:
    """Turn persistent ids into storages, and place them once the whole stream is known."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._roots: dict[str, _Root] = {}
        self._views: dict[str, tuple[Any, ...]] = {}

    def load(self, identifier: tuple[Any, ...]) -> PickledStorage:
        """Find what a persistent id names: ("storage", type, key, location, elements, view or None)."""
        if len(identifier) != 6:
            raise UnreadableCheckpoint(f"a storage is named with {len(identifier)} parts, not 6; {_RESAVE}")
        _, kind, key, location, numel, view = identifier
        check_identifier(kind, key, location, numel)
        root = self._roots.get(key)
        if root is None:
            root = self._roots[key] = self._load_new(kind, key, location, numel)
        elif root.identifier != identifier[:5]:
            raise UnreadableCheckpoint(f"the storage {key!r:.80} is declared twice, differently; {_RESAVE}")
        if view is None:
            return PickledStorage(root.storage, kind.dtype, 0, numel)
        return PickledStorage(root.storage, kind.dtype, *self._check_view(key, numel, view))

    def _load_new(self, kind: StorageType, key: str, location: str, numel: int) -> _Root:
        itemsize = kind.dtype.itemsize if kind.dtype else 1
        nbytes = numel * itemsize
        if nbytes > self._file.size:
            raise UnreadableCheckpoint(
                f"the storage {key!r:.80} declares {nbytes:,} bytes, but the file has {self._file.size:,}; {AGAIN}"
            )
        source = StoredRange(self._file, f"storage {key}", 0, nbytes)
        return _Root(("storage", kind, key, location, numel), source, Storage(key, source, nbytes, location))

    def _check_view(self, key: str, numel: int, view: Any) -> tuple[int, int]:
        """Check the part of a storage that is meant: (its own key, offset, size), in elements."""
        if type(view) is not tuple or [type(part) for part in view] != [str, int, int]:
            raise UnreadableCheckpoint(f"a view of the storage {key!r:.80} is not what torch writes; {_RESAVE}")
        view_key, offset, size = view
        if offset < 0 or size < 0 or offset + size > numel:
            raise UnreadableCheckpoint(f"a view of the storage {key!r:.80} reaches beyond it; {AGAIN}")
        # torch keeps the first view of a name for all later ones.
        if self._views.setdefault(view_key, (key, offset, size)) != (key, offset, size):
            raise UnreadableCheckpoint(f"the storage view {view_key!r:.80} is declared twice, differently; {_RESAVE}")
        return offset, size

    def place(self, keys: Any, position: int) -> int:
        """Lay the storages out behind the pickles, in the order of ``keys``; give the end of the last, in bytes."""
        if type(keys) is not list or any(type(key) is not str for key in keys) or len(set(keys)) != len(keys):
            raise UnreadableCheckpoint(f"the list of storages is damaged; {AGAIN}")
        if set(keys) != self._roots.keys():
            raise UnreadableCheckpoint(f"the list of storages is not that of the tensors; {AGAIN}")
        # torch looks both up in one table, so a name that is both would mean either.
        if self._views.keys() & self._roots.keys():
            raise UnreadableCheckpoint(f"a storage and a view of one have the same name; {_RESAVE}")
        for key in keys:
            position = self._place_one(self._roots[key], position)
        return position

    def _place_one(self, root: _Root, position: int) -> int:
        key, numel = root.storage.key, root.identifier[4]
        begin = position + COUNT_BYTES
        end = begin + root.storage.nbytes
        if end > self._file.size:
            raise UnreadableCheckpoint(
                f"the file is truncated: the storage {key!r:.80} ends at byte {end:,} of {self._file.size:,}; {AGAIN}"
            )
        count = int.from_bytes(self._file.read(position, COUNT_BYTES), "little", signed=True)
        if count != numel:
            raise UnreadableCheckpoint(
                f"the storage {key!r:.80} declares {numel:,} elements and has {count:,}; {AGAIN}"
            )
        root.source.place(begin)
        return end

    def storages(self) -> tuple[Storage, ...]:
        """List the storages in the order in which the object names them."""
        return tuple(root.storage for root in self._roots.values())
