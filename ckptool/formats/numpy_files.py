"""Arrays that NumPy saved: ``.npy``, one array; ``.npz``, a zip archive of them.

Layout: magic, version, header length, a Python literal of three keys, padding, then the elements
(numpy/lib/_format_impl.py, "Format Version 1.0" to "3.0"). An array of objects is a pickle instead; it is read as data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ckptool.errors import AGAIN, UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.pickle import GlobalLog, read_pickle, scan_rest
from ckptool.formats.pickle.arrays import fortran_strides
from ckptool.formats.sources import DeflatedTail, StoredRange, read_bytes
from ckptool.formats.torch_zip import LARGEST_PICKLE
from ckptool.formats.zip import STORED, Archive, Record
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.checksums import crc32, crc32_behind
from ckptool.model.dtypes import BY_NUMPY, DType
from ckptool.model.sources import ByteSource
from ckptool.model.values import MOST_DIMENSIONS, DictNode, Storage, Stub, TensorSpec

MAGIC = b"\x93NUMPY"
_PREAMBLE_BYTES = 12  # magic, version, and four bytes of header length at most
_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}
_LARGEST_HEADER = 64 << 10
_LARGEST_BYTES = 2**63 - 1
_HEADER = re.compile(
    r"\{'descr': '(?P<descr>[^'\\]{1,32})', 'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>(?:\d{1,19}L?(?:, |,(?=\))|(?=\))))*)\), ?\} *\n"
)
_ORDERS = {"<": False, "|": False, ">": True}
_OBJECTS = "O"

_RESAVE = "save it anew with numpy.save as an array of numbers"


class _Array(NamedTuple):
    """Say what one header says; ``dtype`` is None for an array of objects. ``start`` is where its elements begin."""

    dtype: DType | None
    big_endian: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int


class _Place(NamedTuple):
    """Name the bytes of one saved array, its header among them."""

    name: str
    nbytes: int
    read: Callable[[int], bytes]
    source_from: Callable[[int], ByteSource]


def read_npy(file: InputFile) -> Checkpoint:
    """Describe one array; its elements are not read.

    :raises UnreadableCheckpoint: it is damaged, or of a kind of elements that no tensor has.
    """
    place = _Place(
        "the array",
        file.size,
        lambda nbytes: file.read(0, nbytes),
        lambda start: StoredRange(file, "the array", start, file.size - start),
    )
    log = GlobalLog()
    value = _read_array(place, log)
    return _checkpoint(file, "npy", value, log)


def read_npz(file: InputFile, archive: Archive) -> Checkpoint:
    """Describe an archive of arrays; their elements are not read.

    :raises UnreadableCheckpoint: one of them is damaged, or of a kind of elements that no tensor has.
    """
    log = GlobalLog()
    records = archive.records
    pairs = [(name.removesuffix(".npy"), _read_record(file, record, log)) for name, record in records.items()]
    log.findings[:0] = archive.findings
    return _checkpoint(file, "npz", DictNode(pairs), log)


def _checkpoint(file: InputFile, kind: str, root: Any, log: GlobalLog) -> Checkpoint:
    values = [value for _, value in root.pairs] if isinstance(root, DictNode) else [root]
    return Checkpoint(
        path=file.path,
        format=kind,
        file_bytes=file.size,
        root=root,
        file=file,
        storages=tuple(value.storage for value in values if type(value) is TensorSpec),
        globals=log.uses(),
        findings=tuple(log.findings),
    )


def _read_record(file: InputFile, record: Record, log: GlobalLog) -> Any:
    def read(nbytes: int) -> bytes:
        unchecked = record._replace(crc32=0).open(file)
        return read_bytes(unchecked, nbytes)

    def source_from(start: int) -> ByteSource:
        nbytes = record.nbytes - start
        crc = crc32_behind(record.crc32, crc32(read(start)), nbytes) if record.crc32 else 0
        if record.method == STORED:
            return StoredRange(file, record.name, record.offset + start, nbytes, crc)
        return DeflatedTail(record.open(file), start, crc)

    return _read_array(_Place(record.name, record.nbytes, read, source_from), log)


def _read_array(place: _Place, log: GlobalLog) -> Any:
    array = _read_header(place)
    if array.dtype is None:
        return _read_objects(place, array, log)
    numel = 1
    for size in array.shape:
        numel *= size
    nbytes = numel * array.dtype.itemsize
    if nbytes != place.nbytes - array.start or nbytes > _LARGEST_BYTES:
        raise _bad(place, f"has {place.nbytes - array.start:,} bytes, and its shape asks for {nbytes:,}", AGAIN)
    source = place.source_from(array.start)
    storage = Storage(place.name, source, nbytes, big_endian=array.big_endian and array.dtype.itemsize > 1)
    return TensorSpec(array.dtype, array.shape, array.stride, 0, storage, is_numpy=True)


def _read_header(place: _Place) -> _Array:
    preamble = place.read(min(_PREAMBLE_BYTES, place.nbytes))
    version = preamble[len(MAGIC) : len(MAGIC) + 1]
    width = _LENGTH_BYTES.get(version[0] if version else 0)
    if not preamble.startswith(MAGIC) or width is None or preamble[len(MAGIC) + 1 : len(MAGIC) + 2] != b"\0":
        raise _bad(place, "does not begin as an array of NumPy does", AGAIN)
    begin = len(MAGIC) + 2 + width
    start = begin + int.from_bytes(preamble[begin - width : begin], "little")
    if start > min(place.nbytes, _LARGEST_HEADER):
        raise _bad(place, f"has a header that ends at byte {start:,} of {place.nbytes:,}", AGAIN)
    return _parse_header(place, place.read(start)[begin:], start)


def _parse_header(place: _Place, text: bytes, start: int) -> _Array:
    """Read the header in the one spelling that NumPy writes."""
    found = _HEADER.fullmatch(text.decode("latin-1"))
    if found is None:
        raise _bad(place, "holds records or has a header that NumPy does not write", _RESAVE)
    order, code = found["descr"][0], found["descr"][1:]
    if order not in _ORDERS or (code not in BY_NUMPY and code != _OBJECTS):
        raise _bad(place, f"holds elements of the type {found['descr']!r:.40}, which no tensor has", _RESAVE)
    shape = tuple(int(size.rstrip(" L")) for size in found["shape"].split(",") if size.strip())
    if len(shape) > MOST_DIMENSIONS or any(size > _LARGEST_BYTES for size in shape):
        raise _bad(place, "has a shape that no array can have", AGAIN)
    stride = fortran_strides(shape) if found["fortran"] == "True" else fortran_strides(shape[::-1])[::-1]
    return _Array(BY_NUMPY.get(code), _ORDERS[order], shape, stride, start)


def _read_objects(place: _Place, array: _Array, log: GlobalLog) -> Any:
    """Read an array of objects as the data that its pickle is; one without dimensions is its only object."""
    if place.nbytes > LARGEST_PICKLE:
        raise _bad(place, f"is a pickle of {place.nbytes:,} bytes, more than are read", _RESAVE)
    data = read_bytes(place.source_from(array.start))
    unpickled = read_pickle(data, label=place.name, load_storage=None, log=log)
    scan_rest(data, label=place.name, log=log, start=unpickled.end)
    value = unpickled.value
    items = value.args[2] if type(value) is Stub and len(value.args) == 3 else None
    return items[0] if array.shape == () and type(items) is list and len(items) == 1 else value


def _bad(place: _Place, what: str, remedy: str) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(f"{place.name!r:.100} {what}; {remedy}")
