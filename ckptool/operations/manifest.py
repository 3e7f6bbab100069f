"""Describe a checkpoint in a manifest, and hold it against one later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptool.errors import CkptoolError, PlanRefused, UnreadableCheckpoint, UnsupportedTensor
from ckptool.formats import open_checkpoint
from ckptool.layouts.segments import quoted
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.manifest import MANIFEST_SCHEMA, HashedFile, HashedTensor, Manifest
from ckptool.model.plans import KeyOptions
from ckptool.model.sources import Progress
from ckptool.model.values import OpaqueTensor, TensorSpec
from ckptool.model.verification import Check
from ckptool.operations.digest import combine_digests, tensor_digests
from ckptool.operations.file_hash import hash_file
from ckptool.operations.opening import OpenedCheckpoint
from ckptool.operations.sharding import file_names, folder_of
from ckptool.operations.tables import by_place, tabulate

_CHECK = "manifest"
_MAX_BYTES = 1 << 28  # of a manifest: a million tensors
_AGAIN = "get the files again, from where the manifest was published"


def describe_files(path: Path, progress: Progress) -> tuple[HashedFile, ...]:
    """Hash the files that a checkpoint is read from, its index included.

    :raises CkptoolError: they cannot be read.
    """
    with open_checkpoint(path) as checkpoint:
        return _hash_files(checkpoint, progress)


def describe(path: Path, weights: str, progress: Progress) -> Manifest:
    """Describe a checkpoint: every file and, of the state dict that is named, every tensor as the file calls it.

    :raises CkptoolError: it cannot be read.
    """
    with open_checkpoint(path) as checkpoint:
        tensors = _hash_tensors(_tensors(checkpoint, weights), progress)
        return Manifest(_hash_files(checkpoint, progress), weights, tensors, _digest(tensors))


def _digest(tensors: Mapping[str, HashedTensor]) -> str | None:
    digests = {name: tensor.sha256 for name, tensor in tensors.items() if tensor.sha256 is not None}
    return combine_digests(digests) if len(digests) == len(tensors) else None


def _hash_files(checkpoint: Checkpoint, progress: Progress) -> tuple[HashedFile, ...]:
    progress.start("hashing files", checkpoint.file_bytes)
    return tuple(hash_file(folder_of(checkpoint) / name, progress) for name in file_names(checkpoint))


def _tensors(checkpoint: Checkpoint, weights: str) -> Mapping[str, TensorSpec | OpaqueTensor]:
    try:
        return OpenedCheckpoint(checkpoint, weights, KeyOptions(keep_prefixes=True)).tensors
    except PlanRefused:
        return by_place(checkpoint)


def _hash_tensors(tensors: Mapping[str, TensorSpec | OpaqueTensor], progress: Progress) -> dict[str, HashedTensor]:
    dense = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, TensorSpec)}
    progress.start("hashing tensors", sum(tensor.nbytes for tensor in dense.values()))
    digests = tensor_digests(dense, progress)
    table = tabulate(tensors)
    columns = zip(table.sources, table.dtypes, table.shapes, table.sizes, strict=True)
    return {name: HashedTensor(dtype, shape, nbytes, digests.get(name)) for name, dtype, shape, nbytes in columns}


def check_manifest(checkpoint: Checkpoint, path: Path, progress: Progress) -> Check:
    """Tell whether a checkpoint is the one that a manifest describes, byte for byte; else, which tensors differ.

    A file may have been renamed since; of several files each has to have its name.

    :raises CkptoolError: the manifest cannot be read.
    """
    manifest = read_manifest(path)
    files = _hash_files(checkpoint, progress)
    evidence = {"files": {file.name: file.sha256 for file in files}}
    if _same_files(files, manifest.files):
        count = f"{len(files)} files are those" if len(files) > 1 else "the file is the one"
        return Check(_CHECK, "pass", f"{count} that {path} describes, byte for byte", evidence)
    try:
        found = _hash_tensors(_tensors(checkpoint, manifest.weights), progress)
    except (UnreadableCheckpoint, UnsupportedTensor) as error:
        return Check(_CHECK, "fail", f"not what {path} describes: {error}", evidence, _AGAIN)
    differences = _differences(found, manifest.tensors)
    said = [f"{kind} {quoted(names)}" for kind, names in differences.items() if names]
    what = "; ".join(said) if said else "its tensors are the same, bit for bit, but the file around them is another"
    return Check(_CHECK, "fail", f"not what {path} describes: {what}", {**evidence, **differences}, _AGAIN)


def _same_files(found: Sequence[HashedFile], described: Sequence[HashedFile]) -> bool:
    if len(found) == len(described) == 1:
        return found[0].sha256 == described[0].sha256
    return sorted((file.name, file.sha256) for file in found) == sorted((each.name, each.sha256) for each in described)


def _differences(found: Mapping[str, HashedTensor], described: Mapping[str, HashedTensor]) -> dict[str, Sequence[str]]:
    return {
        "missing": [name for name in described if name not in found],
        "unexpected": [name for name in found if name not in described],
        "changed": [name for name, tensor in found.items() if name in described and tensor != described[name]],
    }


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    :raises CkptoolError: it cannot be read, or is none.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise CkptoolError(f"{path}: is larger than a manifest may be ({_MAX_BYTES} bytes); name the manifest")
        return _parse(json.loads(content))
    except OSError as error:
        raise CkptoolError(f"{path}: cannot be read ({error.strerror}); name the manifest") from error
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise CkptoolError(f"{path}: is no manifest of ckptool; write one with ckptool convert --manifest") from error


def _parse(document: Any) -> Manifest:
    """Read what ``reports.manifest`` wrote; what is missing or of another kind is an error of Python's own."""
    if document["schema"] != MANIFEST_SCHEMA or not document["files"]:
        raise ValueError("another schema")
    files = tuple(HashedFile(str(each["name"]), int(each["bytes"]), str(each["sha256"])) for each in document["files"])
    tensors = {str(each["name"]): _tensor(each) for each in document["tensors"]}
    return Manifest(files, str(document["weights"]), tensors, document["digest"])


def _tensor(entry: Mapping[str, Any]) -> HashedTensor:
    shape = None if entry["shape"] is None else tuple(int(size) for size in entry["shape"])
    sha256 = None if entry["sha256"] is None else str(entry["sha256"])
    return HashedTensor(str(entry["dtype"]), shape, int(entry["bytes"]), sha256)
