"""A checkpoint of torch.save since 1.6: a zip archive with a pickle and one record for each storage.

Records, all under one folder of any name: ``data.pkl``, ``data/KEY``, ``version``, and of later versions
``byteorder``, ``.format_version``, ``.storage_alignment``, ``.data/serialization_id``
(torch/csrc/jit/serialization/... PyTorchStreamWriter, torch/serialization.py _save).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from ckptool.errors import AGAIN, ChecksumMismatch, UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.pickle import (
    SCANNED_BYTES,
    GlobalLog,
    PickledStorage,
    StorageType,
    read_pickle,
    scan_foreign,
    scan_rest,
)
from ckptool.formats.sources import StoredRange
from ckptool.formats.zip import DEFLATED, STORED, Archive, Record
from ckptool.model.checkpoint import Checkpoint, Finding
from ckptool.model.checksums import crc32
from ckptool.model.rows import make_rows
from ckptool.model.sources import ByteSource
from ckptool.model.values import Storage

LARGEST_PICKLE = 512 << 20
_LARGEST_FACT = 64
# A record that is inflated into memory may not be a bomb; real pickles shrink to a tenth.
_MOST_INFLATION = 200
_SMALL_RECORD = 1 << 20

_LONGEST_KEY = 64
_KEY = re.compile(rf"[0-9A-Za-z_.-]{{1,{_LONGEST_KEY}}}")
_KEY_LETTERS = re.compile(r"[0-9A-Za-z_.-]*")
_VERSION = re.compile(rb"[0-9]{1,4}\s*")
_OWN_RECORDS = frozenset(
    ("data.pkl", "version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")
)
_CHECKED_ALONE = (".storage_alignment", ".data/serialization_id")  # they tell nothing, but torch.load stops at others
# What torch does not read, by what it could do if someone did.
_EXTRA_KINDS = (
    (re.compile(r"\.(?:pkl|pickle|p|joblib|debug_pkl)$"), "extra-pickle", "pickles that are not the checkpoint's"),
    (re.compile(r"\.(?:py|pyc|so|dll|exe|sh|js)$"), "extra-code", "program files"),
    (re.compile(r""), "extra-member", "records that torch.save does not write"),
)

_RESAVE = "write it anew with torch.save"


def read_torch_zip(file: InputFile, archive: Archive) -> Checkpoint:
    """Describe a checkpoint of torch.save; no storage is read.

    :raises UnreadableCheckpoint: it is damaged, or contradicts itself. ``globals`` of the error are those found until
        then.
    """
    records = archive.records
    if any(name.endswith("/") for name in records):
        records = {name: record for name, record in records.items() if not name.endswith("/")}
    root = find_root(archive.records)
    facts = read_facts(file, records, root)
    table = StorageTable(file, records, f"{root}/data/", big_endian=facts.get("byteorder") == "big")
    log = GlobalLog()
    value = read_pickle_record(file, records[f"{root}/data.pkl"], table, log)
    left_over = table.left_over()
    used, unused = table.used(), table.open_unused(left_over)
    extras = _extra_names(left_over, root)
    others = [records[f"{root}/{name}"] for name in extras]
    scan_records(file, others, log)
    findings = (
        *archive.findings,
        *log.findings,
        *_fact_findings(facts),
        *storage_findings(used, unused),
        *extra_findings(extras),
    )
    return Checkpoint(
        path=file.path,
        format="torch-zip",
        file_bytes=file.size,
        root=value,
        file=file,
        storages=(*used, *unused),
        globals=log.uses(),
        findings=findings,
        facts=facts,
        others=other_records(file, others),
    )


def find_root(names: Iterable[str]) -> str:
    """Give the one folder that all records lie in.

    :raises UnreadableCheckpoint: there are several.
    """
    roots = {name.partition("/")[0] for name in names}
    if len(roots) > 1:
        first, second, *_ = sorted(roots)
        raise UnreadableCheckpoint(f"the archive has more than one folder: {first!r:.60} and {second!r:.60}; {_RESAVE}")
    return roots.pop()


def read_facts(file: InputFile, records: dict[str, Record], root: str) -> dict[str, str]:
    """Read the small records that say how the rest is to be read.

    :raises UnreadableCheckpoint: one says what torch never writes.
    """
    facts = {"root": root}
    for name in ("version", "byteorder", ".format_version"):
        record = records.get(f"{root}/{name}")
        if record is not None:
            facts[name.removeprefix(".")] = _read_fact(file, record)
    for name in _CHECKED_ALONE:
        record = records.get(f"{root}/{name}")
        if record is not None:
            _read_fact(file, record)
    deflated = [record.method for record in records.values()].count(DEFLATED)
    if deflated:
        facts["compressed"] = f"{deflated} of {len(records)} records"
    return facts


_FACT_FORMS = {
    "byteorder": re.compile(rb"little|big"),
    ".storage_alignment": re.compile(rb"[0-9]{1,10}"),
    "serialization_id": re.compile(rb"[\x20-\x7e]*"),
}


def _read_fact(file: InputFile, record: Record) -> str:
    if record.nbytes > _LARGEST_FACT:
        raise UnreadableCheckpoint(f"the record {record.name!r:.100} is too long to be what it says; {_RESAVE}")
    data = b"".join(bytes(chunk) for chunk in record.open(file).stream())
    form = _FACT_FORMS.get(record.name.rpartition("/")[2], _VERSION)
    if not form.fullmatch(data):
        raise UnreadableCheckpoint(
            f"the record {record.name!r:.100} says {data!r:.40}, which torch never writes; {_RESAVE}"
        )
    return data.decode("ascii").strip()


def read_pickle_record(
    file: InputFile, record: Record, table: StorageTable, log: GlobalLog, label: str = "data.pkl"
) -> Any:
    """Read the pickle in a record once; a wrong checksum is told after the pickle has told its globals.

    :raises UnreadableCheckpoint: it is damaged, or contradicts the storages.
    """
    limit = min(LARGEST_PICKLE, record.stored_bytes * _MOST_INFLATION + _SMALL_RECORD)
    if record.nbytes > limit:
        raise UnreadableCheckpoint(
            f"the record {record.name!r:.100} declares {record.nbytes:,} bytes, more than are read; {AGAIN}"
        )
    source = record._replace(crc32=0).open(file)
    data = b"".join([bytes(chunk) for chunk in source.stream()])
    damaged = record.crc32 != 0 and crc32(data) != record.crc32
    try:
        unpickled = read_pickle(data, label=label, load_storage=table.load, load_storages=table.load_all, log=log)
    except UnreadableCheckpoint as error:
        raise (_mismatch(record, log) if damaged else error) from error
    if damaged:
        raise _mismatch(record, log)
    scan_rest(data, label=label, log=log, start=unpickled.end)
    return unpickled.value


def _mismatch(record: Record, log: GlobalLog) -> ChecksumMismatch:
    error = ChecksumMismatch(f"the bytes of {record.name!r:.100} do not match their stored checksum; {AGAIN}")
    error.globals = log.uses()
    return error


class StorageTable:
    """Turn persistent ids into storages, each checked against its record."""

    def __init__(self, file: InputFile, records: dict[str, Record], prefix: str, *, big_endian: bool) -> None:
        self._file = file
        self._records = records
        self._prefix = prefix
        self._big_endian = big_endian
        self._loaded: dict[str, PickledStorage] = {}
        self._used: set[str] = set()

    def load(self, identifier: tuple[Any, ...]) -> PickledStorage:
        """Find the storage that a persistent id names: ("storage", type, key, location, elements)."""
        if len(identifier) != 5:
            raise UnreadableCheckpoint(f"a storage is named with {len(identifier)} parts, not 5; {_RESAVE}")
        _, kind, key, location, numel = identifier
        check_identifier(kind, key, location, numel)
        known = self._loaded.get(key)
        if known is None:
            known = self._loaded[key] = self._load_new(kind, key, location, numel)
        elif (known.dtype, known.storage.location, known.numel) != (kind.dtype, location, numel):
            raise UnreadableCheckpoint(f"the storage {key!r:.80} is declared twice, differently; {_RESAVE}")
        return known

    def load_all(
        self, kinds: Sequence[StorageType], keys: Sequence[str], locations: Sequence[str], numels: Sequence[int]
    ) -> list[PickledStorage] | None:
        """Find many storages as ``load`` does, in a third of the time; None where one is known already, or odd."""
        names = [self._prefix + key for key in keys]
        try:
            records = [self._records[name] for name in names]
        except KeyError:
            return None
        if not self._are_new(keys):
            return None
        sizes = [record.nbytes for record in records]
        dtypes = [kind.dtype for kind in kinds]
        declared = [numel * dtype.itemsize if dtype else -1 for numel, dtype in zip(numels, dtypes, strict=True)]
        if sizes != declared or {record.method for record in records} != {STORED}:
            return None
        file, big = self._file, self._big_endian
        sources = [StoredRange(file, name, offset, nbytes, crc) for name, _, crc, nbytes, _, offset in records]
        columns = zip(keys, sources, sizes, locations, strict=True)
        storages = [Storage(key, source, nbytes, location, big) for key, source, nbytes, location in columns]
        found = make_rows(PickledStorage, storages, dtypes, [0] * len(keys), numels)
        self._loaded.update(zip(keys, found, strict=True))
        self._used.update(names)
        return found

    def _are_new(self, keys: Sequence[str]) -> bool:
        plain = _KEY_LETTERS.fullmatch("".join(keys)) and max(map(len, keys)) <= _LONGEST_KEY
        return bool(plain) and len(set(keys)) == len(keys) and self._loaded.keys().isdisjoint(keys)

    def _load_new(self, kind: StorageType, key: str, location: str, numel: int) -> PickledStorage:
        record = self._records.get(self._prefix + key)
        if record is None:
            raise UnreadableCheckpoint(f"the storage {key!r:.80} has no record in the archive; {AGAIN}")
        self._used.add(record.name)
        itemsize = kind.dtype.itemsize if kind.dtype else 1
        if numel * itemsize != record.nbytes:
            raise UnreadableCheckpoint(
                f"the storage {key!r:.80} declares {numel * itemsize:,} bytes and has {record.nbytes:,}; {AGAIN}"
            )
        if self._big_endian and kind.dtype is None and numel:
            # torch swaps by the storage's type, so it reads these wrongly: there is no right answer to agree with.
            raise UnreadableCheckpoint(
                f"the storage {key!r:.80} holds untyped bytes of a big-endian machine; {_RESAVE}"
            )
        storage = Storage(key, record.open(self._file), record.nbytes, location, self._big_endian)
        return PickledStorage(storage, kind.dtype, 0, numel)

    def open_unused(self, names: Iterable[str]) -> list[Storage]:
        """List the storages among the records that are left over."""
        at = len(self._prefix)
        return [
            Storage(
                name[at:], self._records[name].open(self._file), self._records[name].nbytes, big_endian=self._big_endian
            )
            for name in names
            if name.startswith(self._prefix) and _KEY.fullmatch(name, at)
        ]

    def used(self) -> list[Storage]:
        """List the storages that the pickle names, in its order."""
        return [loaded.storage for loaded in self._loaded.values()]

    def left_over(self) -> list[str]:
        """List the records that are no storage of the pickle's, in the order of the file."""
        return [name for name in self._records if name not in self._used]


def check_identifier(kind: Any, key: Any, location: Any, numel: Any) -> None:
    """Demand the exact types of a storage's persistent id, and a key that is a plain file name.

    :raises UnreadableCheckpoint: something else stands there.
    """
    if type(kind) is not StorageType or type(key) is not str or type(location) is not str or type(numel) is not int:
        raise UnreadableCheckpoint(f"a storage is named with values of other types than torch writes; {_RESAVE}")
    if not _KEY.fullmatch(key):
        raise UnreadableCheckpoint(f"the storage key {key!r:.80} is not a plain name; {_RESAVE}")
    if numel < 0:
        raise UnreadableCheckpoint(f"the storage {key!r:.80} declares {numel:,} elements; {_RESAVE}")


def _fact_findings(facts: dict[str, str]) -> Iterable[Finding]:
    if "version" not in facts:
        yield Finding("no-version", "the record 'version' is missing, and torch.load asks for it")
    if "compressed" in facts:
        yield Finding(
            "compressed", f"{facts['compressed']} are compressed; torch.load(mmap=True) would take them for values"
        )


def storage_findings(used: list[Storage], unused: list[Storage]) -> Iterable[Finding]:
    """Tell of storages without a checksum, and of those that no tensor uses."""
    unchecked = sum([storage.source.crc32 is None and storage.nbytes > 0 for storage in used])
    if unchecked:
        yield Finding("no-checksums", f"{unchecked} storages were written without a checksum: damage goes unnoticed")
    if unused:
        keys = [storage.key for storage in unused]
        yield Finding("unreferenced-storage", f"no tensor uses {len(keys)} storages: {_some(keys)}")


def _extra_names(names: Iterable[str], root: str) -> list[str]:
    """List the records that torch.save does not write."""
    within = {name.removeprefix(f"{root}/") for name in names} - _OWN_RECORDS
    return sorted(name for name in within if not name.startswith("data/") or not _KEY.fullmatch(name, len("data/")))


def other_records(file: InputFile, records: Iterable[Record]) -> tuple[Storage, ...]:
    """Describe records that hold no tensor: they have checksums, too."""
    return tuple([Storage(record.name, record.open(file), record.nbytes) for record in records if record.nbytes])


def scan_records(file: InputFile, records: Iterable[Record], log: GlobalLog) -> None:
    """Log what pickles name in records that the reader of the container passes over, as far as they can be read."""
    left = SCANNED_BYTES
    for record in records:
        if not left:
            return
        data = _readable(record._replace(crc32=0).open(file), left)
        scan_foreign(data, label=record.name.partition("/")[2], log=log)
        left -= len(data)


def _readable(source: ByteSource, most: int) -> bytes:
    """Read the first bytes of a source, as far as it is sound."""
    data = bytearray()
    with suppress(UnreadableCheckpoint):
        for chunk in source.stream():
            data += chunk
            if len(data) >= most:
                break
    return bytes(data[:most])


def extra_findings(extras: list[str]) -> Iterable[Finding]:
    """Tell of records that the container's own writer does not write."""
    left = extras
    for pattern, code, what in _EXTRA_KINDS:
        found = [name for name in left if pattern.search(name)]
        left = [name for name in left if not pattern.search(name)]
        if found:
            yield Finding(code, f"the archive holds {len(found)} {what}: {_some(found)}")


def _some(names: list[str]) -> str:
    shown = ", ".join(f"{name!r:.60}" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
