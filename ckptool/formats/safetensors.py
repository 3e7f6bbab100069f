"""A safetensors file, read by rules at least as strict as the library's own.

Layout: 8 bytes little-endian header length, a JSON header, the tensors' bytes back to back
(https://github.com/huggingface/safetensors, README "Format"; its tensor.rs refuses what is refused here, and the
cases where this reader is stricter are those that two JSON parsers would read differently).
"""

from __future__ import annotations

import json
import re
from typing import Any

from ckptool.errors import AGAIN, UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.rank_files import PARTS_FIELD, parts_of_one_rank
from ckptool.formats.sources import StoredRange
from ckptool.model.checkpoint import Checkpoint, Finding
from ckptool.model.dtypes import BY_NAME, BY_SAFETENSORS, DType
from ckptool.model.values import MOST_DIMENSIONS, DictNode, OpaqueTensor, Storage, TensorSpec, row_major

LENGTH_BYTES = 8
LARGEST_HEADER = 100_000_000

_FIELDS = frozenset(("dtype", "shape", "data_offsets"))
# Six-bit floats have no torch type: bits per element, to check their size and to list them.
_PACKED_BITS = {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_LARGEST_SIZE = 2**63 - 1
_LARGEST_COUNT = 2**64 - 1
# Where a negative number may stand (or a name only looks like it); Python takes -0 for a size, the library does not.
_MINUS = re.compile(r"[:\[,]\s*-")
_SCALARS = (str, int, bool, type(None))

_RESAVE = "write it anew with safetensors"


def read_safetensors(file: InputFile) -> Checkpoint:
    """Describe a safetensors file; no tensor is read.

    :raises IncompleteCheckpoint: its tensors are parts, which the files of other ranks complete.
    :raises UnreadableCheckpoint: the header breaks a rule of the format, or does not cover the file exactly.
    """
    text, start = _read_header(file)
    header = _parse(text)
    metadata = _check_metadata(header.pop("__metadata__", None))
    findings = [] if text.startswith("{") else [Finding("leading-space", "the header does not begin with a brace")]
    pairs: list[tuple[Any, Any]] = []
    storages: list[Storage] = []
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        unknown = _check_entry(name, entry)
        if unknown:
            findings.append(Finding("unknown-fields", f"the tensor {name!r:.100} has unknown fields: {unknown:.100}"))
        begin, end = entry["data_offsets"]
        storage = Storage(name, StoredRange(file, name, start + begin, end - begin), end - begin)
        pairs.append((name, _describe(name, entry, storage)))
        storages.append(storage)
        ranges.append((begin, end, name))
    _check_cover(ranges, file.size - start)
    if PARTS_FIELD in metadata:
        findings += parts_of_one_rank(file.path, metadata[PARTS_FIELD])
    return Checkpoint(
        path=file.path,
        format="safetensors",
        file_bytes=file.size,
        root=DictNode(pairs),
        file=file,
        storages=tuple(storages),
        findings=tuple(findings),
        metadata=metadata,
    )


def _read_header(file: InputFile) -> tuple[str, int]:
    """Give the header's text and the offset of the first tensor byte."""
    if file.size < LENGTH_BYTES:
        raise UnreadableCheckpoint(f"the file has only {file.size} bytes, too few for safetensors; {AGAIN}")
    nbytes = int.from_bytes(file.read(0, LENGTH_BYTES), "little")
    if nbytes > LARGEST_HEADER:
        raise UnreadableCheckpoint(
            f"the safetensors header declares {nbytes:,} bytes, more than the {LARGEST_HEADER:,} allowed; {AGAIN}"
        )
    if LENGTH_BYTES + nbytes > file.size:
        raise UnreadableCheckpoint(
            f"the file is truncated: its header declares {nbytes:,} bytes, and the file has {file.size:,}; {AGAIN}"
        )
    try:
        return file.read(LENGTH_BYTES, nbytes).decode("utf-8"), LENGTH_BYTES + nbytes
    except UnicodeDecodeError as error:
        raise UnreadableCheckpoint(f"the safetensors header is not UTF-8; {AGAIN}") from error


def _parse(text: str) -> dict[str, Any]:
    try:
        header = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_refuse_negative if _MINUS.search(text) else int,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
        # JSON can spell half a character (\ud800), which no other text here can hold.
        if "\\u" in text:
            _strings(header).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise UnreadableCheckpoint(f"the safetensors header is not valid JSON; {AGAIN}") from error
    if type(header) is not dict:
        raise UnreadableCheckpoint(f"the safetensors header is no table of tensors; {AGAIN}")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) == len(pairs):
        return table
    from ckptool.model.repeats import first_repeated  # what no sound file needs

    twin = first_repeated(name for name, _ in pairs)
    raise UnreadableCheckpoint(f"the safetensors header holds {twin!r:.100} twice, and readers differ; {_RESAVE}")


def _refuse_negative(digits: str) -> int:
    return _refuse_number(digits) if digits.startswith("-") else int(digits)


def _refuse_number(digits: str) -> int:
    raise UnreadableCheckpoint(f"the safetensors header holds {digits:.30}, which is no size; {_RESAVE}")


def _strings(value: Any) -> str:
    """Join every string of a parsed header."""
    parts: list[str] = []
    stack = [value]
    while stack:
        value = stack.pop()
        if type(value) is str:
            parts.append(value)
        elif type(value) is dict:
            stack.extend(value)
            stack.extend(value.values())
        elif type(value) is list:
            stack.extend(value)
    return "".join(parts)


def _check_metadata(metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise UnreadableCheckpoint(f"the safetensors metadata holds something other than text; {_RESAVE}")
    return metadata


def _check_entry(name: str, entry: Any) -> str:
    """Check the types of one entry; give the names of its unknown fields."""
    if type(entry) is not dict or not entry.keys() >= _FIELDS:
        raise _bad(name, "lacks its dtype, shape or data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if type(entry["dtype"]) is not str or type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        raise _bad(name, "has a dtype, shape or data_offsets of another type")
    for number in (*shape, *offsets):
        if type(number) is not int or number > _LARGEST_SIZE:
            raise _bad(name, "has a size or an offset that is no number of elements or bytes")
    if len(shape) > MOST_DIMENSIONS:
        raise _bad(name, f"has {len(shape):,} dimensions, more than any tensor")
    return "" if len(entry) == len(_FIELDS) else _check_unknown(name, entry)


def _check_unknown(name: str, entry: dict[str, Any]) -> str:
    unknown = sorted(entry.keys() - _FIELDS)
    if any(type(entry[field]) not in _SCALARS for field in unknown):
        raise _bad(name, "has unknown fields that hide more data")
    return ", ".join(unknown)


def _describe(name: str, entry: dict[str, Any], storage: Storage) -> TensorSpec | OpaqueTensor:
    """Describe one tensor; its bytes must be as many as its shape and dtype ask for."""
    spelling = entry["dtype"]
    dtype = BY_SAFETENSORS.get(spelling)
    bits = _PACKED_BITS.get(spelling) or (dtype.itemsize * 8 if dtype else 0)
    if not bits:
        raise _bad(name, f"has the unknown dtype {spelling!r:.40}")
    shape = tuple(entry["shape"])
    nbits = _count(name, shape) * bits
    if nbits > _LARGEST_COUNT or nbits % 8 or nbits // 8 != storage.nbytes:
        raise _bad(name, f"occupies {storage.nbytes:,} bytes, but its shape and dtype ask for {nbits / 8:,g}")
    if dtype is None:
        return _opaque(spelling, shape, storage)
    if spelling == "F4":
        shape = _halve(name, shape)
    return _dense(dtype, shape, storage)


def _count(name: str, shape: tuple[int, ...]) -> int:
    """Multiply as the library does, which refuses an overflow even where a later size is 0."""
    count = 1
    for size in shape:
        count *= size
        if count > _LARGEST_COUNT:
            raise _bad(name, "has more elements than can be counted")
    return count


def _halve(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Turn a shape that counts four-bit values into torch's, which counts pairs in the last dimension."""
    if not shape or shape[-1] % 2:
        raise _bad(name, "has four-bit values that do not fill whole bytes in its last dimension")
    return (*shape[:-1], shape[-1] // 2)


def _dense(dtype: DType, shape: tuple[int, ...], storage: Storage) -> TensorSpec:
    return TensorSpec(dtype, shape, row_major(shape), 0, storage)


def _opaque(spelling: str, shape: tuple[int, ...], storage: Storage) -> OpaqueTensor:
    """List a tensor whose type torch does not have, with its bytes."""
    data = _dense(BY_NAME["uint8"], (storage.nbytes,), storage)
    return OpaqueTensor("packed", spelling, None, shape, (("data", data),))


def _check_cover(ranges: list[tuple[int, int, str]], nbytes: int) -> None:
    """Demand that the tensors tile the bytes behind the header: no hole, no overlap, nothing left."""
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position or end < begin:
            raise _bad(name, f"begins at byte {begin:,}, not at {position:,} where the one before it ends")
        position = end
    if position > nbytes:
        raise UnreadableCheckpoint(
            f"the file is truncated: its tensors need {position:,} bytes and {nbytes:,} are there; {AGAIN}"
        )
    if position < nbytes:
        raise UnreadableCheckpoint(f"{nbytes - position:,} bytes follow the last tensor; cut them off or {AGAIN}")


def _bad(name: str, what: str) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(f"the tensor {name!r:.100} {what}; {_RESAVE}")
