"""A folder of torch.distributed.checkpoint: one ``.metadata``, and files in which parts of tensors lie back to back.

Every part is a whole file of torch.save (torch/distributed/checkpoint/filesystem.py, ``_write_item``); it is opened
when its bytes are asked for. What is no tensor is read at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.assembly import assemble
from ckptool.formats.dcp_metadata import FolderMetadata, TensorEntry, read_metadata
from ckptool.formats.dcp_parts import StoredPart
from ckptool.formats.file import InnerFile, InputFile, listing, open_file
from ckptool.formats.nesting import nest
from ckptool.formats.pickle import GlobalLog, read_pickle
from ckptool.formats.several import placed_uses
from ckptool.formats.shards import ShardSet, is_sharded_folder, require_files, require_plain_name, some
from ckptool.formats.torch_zip import LARGEST_PICKLE, read_torch_zip
from ckptool.formats.zip import read_archive
from ckptool.model.checkpoint import Checkpoint, Finding, Shard
from ckptool.model.values import DictNode, GlobalUse, Storage, TensorSpec, row_major

METADATA_NAME = ".metadata"
SUFFIX = ".distcp"
FABRIC_NAME = "meta.pt"  # lightning/fabric/utilities/load.py, _METADATA_FILENAME: what is no weight and no optimizer
_MEGATRON_NAME = "common.pt"

_Read = Callable[[Path], Checkpoint]


def open_distributed(folder: Path, path: Path, read: _Read) -> Checkpoint:
    """Describe the checkpoint in a folder as one; ``read`` opens a file beside it, ``path`` is what the user named.

    :raises IncompleteCheckpoint: a file, or a part of a tensor, is missing.
    :raises UnreadableCheckpoint: a file cannot be read, or the metadata contradicts itself or its files.
    """
    log = GlobalLog()
    metadata, metadata_bytes = _read_metadata(folder, log)
    with ExitStack() as stack:
        try:
            files = _open_files(folder, metadata, stack)
            found = _Items(metadata, files, log)
            beside = _open_beside(folder, read, stack)
            checkpoint = found.describe(path, beside)
        except UnreadableCheckpoint as error:
            error.globals = (*log.uses(), *error.globals)
            raise
        nbytes = metadata_bytes + sum(file.size for file in files.values()) + sum(one.file_bytes for one in beside)
        findings = (*checkpoint.findings, *_unlisted(folder, metadata, files), *_other_weights(folder))
        return replace(checkpoint, file_bytes=nbytes, findings=findings, file=stack.pop_all())


def _read_metadata(folder: Path, log: GlobalLog) -> tuple[FolderMetadata, int]:
    try:
        file = open_file(folder / METADATA_NAME)
        try:
            if file.size > LARGEST_PICKLE:
                raise UnreadableCheckpoint(
                    f"it has {file.size:,} bytes, and {LARGEST_PICKLE:,} are read at most; get the folder again"
                )
            data = file.read(0, file.size)
        finally:
            file.close()
        unpickled = read_pickle(data, label=METADATA_NAME, load_storage=None, log=log)
        return read_metadata(unpickled.value), file.size
    except UnreadableCheckpoint as error:
        if not str(error).startswith(METADATA_NAME):  # the pickle machine names what it reads itself
            error.args = (f"{METADATA_NAME}: {error}",)
        raise


def _open_files(folder: Path, metadata: FolderMetadata, stack: ExitStack) -> dict[str, InputFile]:
    names = tuple(sorted({place.file for _, place in metadata.places}))
    for name in names:
        require_plain_name(name)
    require_files(ShardSet(folder, folder, names, METADATA_NAME))
    files = {name: _open_file(folder / name, stack) for name in names}
    for item, place in metadata.places:
        if place.offset + place.nbytes > files[place.file].size:
            raise UnreadableCheckpoint(
                f"{place.file!r:.100} ends at byte {files[place.file].size:,}, before {item!r:.100} does"
                f" ({place.offset + place.nbytes:,}); get the file again"
            )
    return files


def _open_file(path: Path, stack: ExitStack) -> InputFile:
    try:
        file = open_file(path)
    except UnreadableCheckpoint as error:
        error.args = (f"{path.name!r:.100}: {error}",)
        raise
    stack.callback(file.close)
    return file


def _open_beside(folder: Path, read: _Read, stack: ExitStack) -> list[Checkpoint]:
    """Open the file in which Fabric, or Megatron, keeps what is neither a weight nor of an optimizer."""
    names = [name for name in (FABRIC_NAME, _MEGATRON_NAME) if os.path.lexists(folder / name)]
    return [stack.enter_context(_read_beside(folder / name, read)) for name in names]


def _read_beside(path: Path, read: _Read) -> Checkpoint:
    try:
        return read(path)
    except UnreadableCheckpoint as error:
        error.args = (f"{path.name!r}: {error}",)
        raise


class _Items:
    """Turn what the metadata names into values."""

    def __init__(self, metadata: FolderMetadata, files: Mapping[str, InputFile], log: GlobalLog) -> None:
        self._metadata = metadata
        self._files = files
        self._log = log
        self._storages: list[Storage] = []
        self._uses: list[GlobalUse] = []
        self._findings: list[Finding] = []

    def describe(self, path: Path, beside: list[Checkpoint]) -> Checkpoint:
        values = {name: self._tensor(name, entry) for name, entry in self._metadata.tensors.items()}
        values |= {name: self._value(name) for name in self._metadata.values}
        root = nest(values, self._metadata.paths)
        for other in beside:
            _add_beside(root, other)
        return Checkpoint(
            path=path,
            format="torch-distributed",
            file_bytes=0,
            root=root,
            file=next(iter(self._files.values())),
            storages=(*self._storages, *(storage for other in beside for storage in other.storages)),
            globals=(*self._log.uses(), *self._uses, *_placed_uses(beside)),
            findings=(*self._log.findings, *self._findings, *self._own_findings(), *_placed_findings(beside)),
            facts={"index": METADATA_NAME, "shards": str(len(self._files))},
            shards=self._shards(),
        )

    def _tensor(self, name: str, entry: TensorEntry) -> TensorSpec:
        parts = [
            (box.offsets, box.sizes, StoredPart(self._files[box.place.file], name, box, entry.dtype))
            for box in entry.boxes
        ]
        try:
            source = assemble(f"{self._folder}: {name}", entry.shape, entry.dtype.itemsize, parts)
        except UnreadableCheckpoint as error:
            error.args = (f"the tensor {name!r:.100}: {error}",)
            raise
        storage = Storage(name, source, source.nbytes)
        self._storages.append(storage)
        return TensorSpec(entry.dtype, entry.shape, row_major(entry.shape), 0, storage)

    @property
    def _folder(self) -> Path:
        return next(iter(self._files.values())).path.parent

    def _value(self, name: str) -> Any:
        place = self._metadata.values[name]
        inner = InnerFile(self._files[place.file], place.offset, place.nbytes)
        try:
            found = read_torch_zip(inner, read_archive(inner))
        except UnreadableCheckpoint as error:
            error.args = (f"{place.file!r:.100}: the value {name!r:.100}: {error}",)
            raise
        self._storages += found.storages
        self._uses += (replace(use, where=f"{place.file}: {name}: {use.where}") for use in found.globals)
        self._findings += (replace(one, text=f"{name}: {one.text}") for one in found.findings)
        return found.root

    def _own_findings(self) -> Iterator[Finding]:
        count = sum(len(entry.boxes) for entry in self._metadata.tensors.values())
        if count:
            text = f"the pickles around {count} parts of tensors are looked at when the values are, as verify does"
            yield Finding("parts-unread", text)
        if self._metadata.unlisted:
            yield Finding(
                "unlisted-item", f"its files hold items that no name stands for: {some(self._metadata.unlisted)}"
            )
        if "mcore_data" in self._metadata.extras:
            text = "Megatron wrote it: layers may be stacked in one tensor, and names are its own"
            yield Finding("megatron", text)

    def _shards(self) -> tuple[Shard, ...]:
        keys: dict[str, dict[str, None]] = {name: {} for name in self._files}
        for name, entry in self._metadata.tensors.items():
            for box in entry.boxes:
                keys[box.place.file][name] = None
        return tuple(Shard(name, file.size, tuple(keys[name])) for name, file in self._files.items())


def _add_beside(root: DictNode, other: Checkpoint) -> None:
    """Put the rest of a container beside the state dicts; what is in both is an error of the one who put them there."""
    if not isinstance(other.root, DictNode):
        raise UnreadableCheckpoint(
            f"{other.path.name!r:.100} holds no mapping; put what belongs beside the weights there"
        )
    for key, value in other.root.pairs:
        if type(key) is str and key in root:
            raise UnreadableCheckpoint(
                f"{key!r:.100} is in {METADATA_NAME!r} and in {other.path.name!r:.100}; take one away"
            )
        root.pairs.append((key, value))


def _placed_uses(beside: list[Checkpoint]) -> Iterator[GlobalUse]:
    for other in beside:
        yield from placed_uses(other.path.name, other.globals)


def _placed_findings(beside: list[Checkpoint]) -> Iterator[Finding]:
    for other in beside:
        yield from (replace(finding, text=f"{other.path.name}: {finding.text}") for finding in other.findings)


def _other_weights(folder: Path) -> Iterator[Finding]:
    if is_sharded_folder(folder):
        text = "took the distributed checkpoint and did not look at other weights beside it: name them to read them"
        yield Finding("other-weights", text)


def _unlisted(folder: Path, metadata: FolderMetadata, files: Mapping[str, InputFile]) -> Iterator[Finding]:
    """Tell of files of another save, or of other ranks, that lie in the same folder."""
    beside = [name for name in listing(folder) if name.endswith(SUFFIX) and name not in files]
    if beside:
        yield Finding("unlisted-shard", f"{some(beside)} lie beside, and the metadata names nothing in them")
