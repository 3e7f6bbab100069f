"""The ``.metadata`` of a torch.distributed.checkpoint folder: which tensors there are, and where each part lies.

Source: torch/distributed/checkpoint/metadata.py and filesystem.py (``_StorageInfo``): a pickle of ``Metadata`` with
``state_dict_metadata`` (by flat name: the shape, the element type and the boxes of a tensor, or that it is some other
value), ``storage_data`` (by flat name and offset: file, offset and length) and ``planner_data`` (the path of each flat
name).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckptool.errors import IncompleteCheckpoint, UnreadableCheckpoint
from ckptool.model.dtypes import DType
from ckptool.model.values import MOST_DIMENSIONS, DictNode, Stub

Sizes = tuple[int, ...]
_RESAVE = "save it anew with torch.distributed.checkpoint"
_STRIDED = "torch.strided"
_LONGEST_PATH = 64


class Place(NamedTuple):
    """Say in which file an item lies, and its bytes there."""

    file: str
    offset: int
    nbytes: int


class Box(NamedTuple):
    """Say which box of a tensor an item holds, in elements."""

    offsets: Sizes
    sizes: Sizes
    place: Place


class TensorEntry(NamedTuple):
    """Describe one tensor: the boxes without elements are left out."""

    dtype: DType
    shape: Sizes
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class FolderMetadata:
    """Hold what ``.metadata`` says: tensors and other values by flat name, and the path of each name."""

    tensors: Mapping[str, TensorEntry]
    values: Mapping[str, Place]
    paths: Mapping[str, tuple[str | int, ...]]
    unlisted: tuple[str, ...]
    extras: tuple[str, ...]

    @property
    def places(self) -> Iterator[tuple[str, Place]]:
        """Yield the flat name and the place of every item."""
        yield from self.values.items()
        for name, entry in self.tensors.items():
            yield from ((name, box.place) for box in entry.boxes)


def read_metadata(root: Any) -> FolderMetadata:
    """Read the unpickled ``Metadata``.

    :raises IncompleteCheckpoint: a part of a tensor has no place in any file.
    :raises UnreadableCheckpoint: it is something else, or of a kind that is not read.
    """
    fields = _fields(root, "Metadata")
    described, stored = _mapping(fields, "state_dict_metadata"), _mapping(fields, "storage_data")
    places = dict(map(_placed, stored.pairs))
    if len(places) != len(stored.pairs):
        raise _odd("it places an item twice")
    tensors: dict[str, TensorEntry] = {}
    values: dict[str, Place] = {}
    for name, entry in described.pairs:
        if type(name) is not str:
            raise _odd(f"it has a name of type {type(name).__name__}")
        if _kind(entry) == "BytesStorageMetadata":
            values[name] = _take(places, name, None)
        else:
            tensors[name] = _tensor(name, entry, places)
    unlisted = tuple(dict.fromkeys(name for name, _ in places if name not in tensors and name not in values))
    extras = tuple(key for key in fields.text_items() if key not in _OWN_FIELDS)
    return FolderMetadata(tensors, values, _paths(fields.get("planner_data")), unlisted, extras)


_OWN_FIELDS = frozenset({"state_dict_metadata", "storage_data", "planner_data", "storage_meta", "version"})


def _kind(value: Any) -> str:
    return value.ref.name if isinstance(value, Stub) else type(value).__name__


def _fields(value: Any, kind: str) -> DictNode:
    fields = value.fields if isinstance(value, Stub) and value.ref.name == kind else None
    if fields is None:
        raise _odd(f"it holds {_kind(value)!r:.60} where {kind} is expected")
    return fields


def _mapping(fields: DictNode, name: str) -> DictNode:
    value = fields.get(name)
    if not isinstance(value, DictNode):
        raise _odd(f"its {name} is no mapping")
    return value


def _sizes(value: Any, what: str) -> Sizes:
    if not isinstance(value, tuple | list) or len(value) > MOST_DIMENSIONS:
        raise _odd(f"its {what} is no shape")
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in value):
        raise _odd(f"its {what} is no shape")
    return tuple(value)


_Index = tuple[str, Sizes | None]


def _placed(pair: tuple[Any, Any]) -> tuple[_Index, Place]:
    """Read one row of ``storage_data``; the number of a part is a hint that torch does not compare either."""
    index, info = _fields(pair[0], "MetadataIndex"), _fields(pair[1], "_StorageInfo")
    name, offset = index.get("fqn"), index.get("offset")
    if type(name) is not str:
        raise _odd("it places an item without a name")
    if info.get("transform_descriptors"):
        raise UnreadableCheckpoint(
            f"{name!r:.100} is stored through an extension (transform_descriptors), which is not read;"
            " save it without extensions"
        )
    file, start, nbytes = (info.get(field) for field in ("relative_path", "offset", "length"))
    if type(file) is not str or type(start) is not int or type(nbytes) is not int or start < 0 or nbytes < 0:
        raise _odd(f"it says of {name!r:.100} no place in a file")
    return (name, None if offset is None else _sizes(offset, f"offset of {name!r:.100}")), Place(file, start, nbytes)


def _take(places: Mapping[_Index, Place], name: str, offset: Sizes | None) -> Place:
    place = places.get((name, offset))
    if place is None:
        where = f"the part at {list(offset)} of {name!r:.100}" if offset is not None else f"{name!r:.100}"
        raise IncompleteCheckpoint(f"it names no file that holds {where}; {_RESAVE}")
    return place


def _tensor(name: str, entry: Any, places: Mapping[_Index, Place]) -> TensorEntry:
    fields = _fields(entry, "TensorStorageMetadata")
    dtype, layout = _properties(fields.get("properties"))
    if not isinstance(dtype, DType) or layout != _STRIDED or not dtype.itemsize or dtype.kind == "quantized":
        raise UnreadableCheckpoint(f"the tensor {name!r:.100} is not one dense array; {_RESAVE} as a dense one")
    shape = _sizes(fields.get("size"), f"size of {name!r:.100}")
    chunks = fields.get("chunks")
    if not isinstance(chunks, list):
        raise _odd(f"it lists no parts of {name!r:.100}")
    boxes = []
    for chunk in chunks:
        part = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = (_sizes(part.get(field), f"{field} of {name!r:.100}") for field in ("offsets", "sizes"))
        if math.prod(sizes):
            boxes.append(Box(offsets, sizes, _take(places, name, offsets)))
    return TensorEntry(dtype, shape, tuple(boxes))


def _properties(value: Any) -> tuple[Any, Any]:
    """Read the element type and the layout; ``TensorProperties`` pickles itself as a tuple that begins with them."""
    state = value.state if isinstance(value, Stub) and value.ref.name == "TensorProperties" else None
    if not isinstance(state, tuple) or len(state) < 2:
        raise _odd("it says no element type")
    return state[0], state[1]


def _paths(value: Any) -> dict[str, tuple[str | int, ...]]:
    """Read how flat names are to be nested; without a planner's data they stay flat."""
    if not isinstance(value, DictNode):
        return {}
    return {name: path for name, path in value.text_items().items() if isinstance(path, tuple) and _is_path(path)}


def _is_path(path: tuple[Any, ...]) -> bool:
    return 0 < len(path) <= _LONGEST_PATH and all(
        type(step) is str or (type(step) is int and step >= 0) for step in path
    )


def _odd(what: str) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(f"this is no metadata of torch.distributed.checkpoint ({what}); {_RESAVE}")
