"""One checkpoint out of several files: opened side by side, held against their index, never merged on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptool.errors import IncompleteCheckpoint, UnreadableCheckpoint
from ckptool.formats.deepspeed import is_zero_folder, open_zero
from ckptool.formats.file import InputFile, open_file
from ckptool.formats.several import Read, all_uses, read_one
from ckptool.formats.shards import (
    FolderWeights,
    ShardSet,
    find_weights,
    read_index,
    require_files,
    some,
    unlisted_shards,
)
from ckptool.formats.sniff import explain_folder
from ckptool.model.checkpoint import Checkpoint, Finding, Shard
from ckptool.model.values import DictNode, OpaqueTensor, TensorSpec

_FORMATS = {"safetensors": "safetensors-shards", "torch-zip": "torch-shards", "torch-legacy": "torch-shards"}


def open_folder(folder: Path, read: Read) -> Checkpoint:
    """Describe the weights in a model's folder; ``read`` opens one file of weights.

    :raises UnreadableCheckpoint: it is another kind of folder, or it is open which weights are meant.
    """
    weights = find_weights(folder)
    if weights is None:
        if is_zero_folder(folder):
            return open_zero(folder, read)
        raise UnreadableCheckpoint(explain_folder(folder))
    opened = _open_found(folder, weights, read)
    return replace(opened, findings=(*opened.findings, *weights.findings))


def _open_found(folder: Path, weights: FolderWeights, read: Read) -> Checkpoint:
    if weights.shards:
        return _open_shards(ShardSet(folder, folder, weights.shards), read)
    path = folder / weights.name
    return open_index(open_file(path), folder, read) if weights.is_index else read_one(path, read)


def open_index(file: InputFile, path: Path, read: Read) -> Checkpoint:
    """Describe the checkpoint that an index names, and close the index; ``path`` is what the user named.

    :raises UnreadableCheckpoint: the index or a shard cannot be read, or they contradict each other.
    """
    try:
        shards = read_index(file, path)
    finally:
        file.close()
    return _open_shards(shards, read)


def _open_shards(shards: ShardSet, read: Read) -> Checkpoint:
    """Describe the shards as one checkpoint.

    :raises IncompleteCheckpoint: a file, or a tensor that the index promises, is missing.
    :raises UnreadableCheckpoint: a shard cannot be read, holds no flat state dict, or repeats a name of another.
    """
    require_files(shards)
    parts: list[Checkpoint] = []
    with ExitStack() as stack:
        try:
            for name in shards.names:
                part = read_one(shards.folder / name, read)
                parts.append(stack.enter_context(part))
            joined = _join(shards, parts)
        except UnreadableCheckpoint as error:
            error.globals = (*all_uses(zip(shards.names, parts, strict=False)), *error.globals)
            raise
        return replace(joined, file=stack.pop_all())


def _join(shards: ShardSet, parts: Sequence[Checkpoint]) -> Checkpoint:
    kind = _common_format(shards.names, parts)
    root, homes = _joined_root(shards.names, parts)
    metadata, differing = _joined_metadata(shards, parts)
    own = (*_findings_within(shards.names, parts), *_against_index(shards, root, homes), *unlisted_shards(shards))
    return Checkpoint(
        path=shards.path,
        format=kind,
        file_bytes=sum(part.file_bytes for part in parts) + shards.index_bytes,
        root=root,
        file=parts[0].file,
        storages=tuple(storage for part in parts for storage in part.storages),
        globals=tuple(all_uses(zip(shards.names, parts, strict=True))),
        findings=(*own, *differing),
        metadata=metadata,
        facts=_joined_facts(shards, parts),
        shards=tuple(
            Shard(name, part.file_bytes, tuple(part.root.text_items()))
            for name, part in zip(shards.names, parts, strict=True)
        ),
        others=tuple(other for part in parts for other in part.others),
    )


def _common_format(names: Sequence[str], parts: Sequence[Checkpoint]) -> str:
    kinds: dict[str, str] = {}
    for name, part in zip(names, parts, strict=True):
        kind = _FORMATS.get(part.format)
        if kind is None or "inside" in part.facts:
            raise UnreadableCheckpoint(f"{name!r:.100} is no shard but {part.format}; name this file alone")
        kinds.setdefault(kind, name)
    if len(kinds) > 1:
        listed = " and ".join(f"{name!r:.100} is {kind.removesuffix('-shards')}" for kind, name in kinds.items())
        raise UnreadableCheckpoint(f"its shards are of different formats ({listed}); convert them one by one")
    return next(iter(kinds))


def _joined_root(names: Sequence[str], parts: Sequence[Checkpoint]) -> tuple[DictNode, dict[str, str]]:
    """Put the entries of all shards into one mapping, in their order, and say where each lies; none may come twice."""
    root = DictNode(type_name="OrderedDict")
    home: dict[str, str] = {}
    for name, part in zip(names, parts, strict=True):
        for key, value in _flat_entries(name, part):
            if key in home:
                raise UnreadableCheckpoint(
                    f"the tensor {key!r:.100} is in {home[key]!r:.100} and in {name!r:.100}, and readers differ;"
                    " name the shard that is meant"
                )
            home[key] = name
            root.pairs.append((key, value))
    root.attributes = _joined_attributes([part.root.attributes for part in parts])
    return root, home


def _flat_entries(name: str, part: Checkpoint) -> list[tuple[Any, Any]]:
    root = part.root
    if not isinstance(root, DictNode) or not all(type(key) is str for key, _ in root.pairs):
        raise UnreadableCheckpoint(f"{name!r:.100} holds no flat state dict, as a shard does; name this file alone")
    if not any(isinstance(value, TensorSpec | OpaqueTensor) for _, value in root.pairs):
        raise UnreadableCheckpoint(f"{name!r:.100} holds no tensors at its top, as a shard does; name this file alone")
    return root.pairs


def _joined_attributes(attributes: Sequence[DictNode | None]) -> DictNode | None:
    """Unite what is set on the mappings (torch's ``_metadata``, by module); the first shard to say a thing counts."""
    united: dict[str, Any] = {}
    for node in attributes:
        for name, value in node.text_items().items() if node is not None else ():
            known = united.setdefault(name, value)
            if isinstance(known, DictNode) and isinstance(value, DictNode) and known is not value:
                entries = {**value.text_items(), **known.text_items()}
                united[name] = DictNode(list(entries.items()), known.type_name)
    return DictNode(list(united.items())) if united else None


def _findings_within(names: Sequence[str], parts: Sequence[Checkpoint]) -> Iterator[Finding]:
    for name, part in zip(names, parts, strict=True):
        yield from (replace(finding, text=f"{name}: {finding.text}") for finding in part.findings)


def _against_index(shards: ShardSet, root: DictNode, homes: Mapping[str, str]) -> Iterator[Finding]:
    """Compare the names in the index with those in the files, both ways, and the sizes."""
    if shards.keys is None:
        yield Finding("no-index", f"there is no index: {len(shards.names)} shards were joined by their numbers")
        return
    missing = [key for key in shards.keys if key not in homes]
    if missing:
        raise IncompleteCheckpoint(
            f"its index names {len(missing)} tensors that no shard holds ({some(missing)});"
            " get index and shards again, from one place"
        )
    extra = [key for key in homes if key not in shards.keys]
    if extra:
        yield Finding("unindexed-tensor", f"the index does not name {len(extra)} tensors of its shards: {some(extra)}")
    moved = [key for key, name in shards.keys.items() if homes[key] != name]
    if moved:
        yield Finding(
            "misplaced-tensor", f"{len(moved)} tensors lie in another shard than the index says: {some(moved)}"
        )
    yield from _check_total(shards.metadata or {}, [value for _, value in root.pairs])


def _check_total(metadata: Mapping[str, Any], values: Sequence[Any]) -> Iterator[Finding]:
    """Compare the size that the index states; a tied tensor counts once or under each name, as writers differ."""
    stated = metadata.get("total_size")
    if stated is None:
        return
    tensors = [value for value in values if isinstance(value, TensorSpec | OpaqueTensor)]
    every_name = sum(tensor.nbytes for tensor in tensors)
    if stated == every_name and not isinstance(stated, bool):
        return
    distinct = {tensor.view_key if isinstance(tensor, TensorSpec) else id(tensor): tensor.nbytes for tensor in tensors}
    if isinstance(stated, bool) or stated != sum(distinct.values()):
        shown = f"{stated:,}" if isinstance(stated, int) else f"{stated!r:.40}"
        yield Finding("total-size", f"the index states {shown} bytes of tensors, and its shards hold {every_name:,}")


def _joined_metadata(shards: ShardSet, parts: Sequence[Checkpoint]) -> tuple[dict[str, str], tuple[Finding, ...]]:
    """Unite the text metadata of the index and all headers; where they differ, the first shard counts."""
    united: dict[str, str] = {}
    differing: dict[str, None] = {}
    said = {key: text for key, text in (shards.metadata or {}).items() if isinstance(text, str)}
    for metadata in (*(part.metadata for part in parts), said):
        for key, text in metadata.items():
            if united.setdefault(key, text) != text:
                differing[key] = None
    if not differing:
        return united, ()
    text = f"its files do not agree on {some(differing)} in their metadata: what the first one says is shown"
    return united, (Finding("metadata-differs", text),)


def _joined_facts(shards: ShardSet, parts: Sequence[Checkpoint]) -> dict[str, str]:
    common = [fact for fact in parts[0].facts.items() if all(fact in part.facts.items() for part in parts)]
    return {**dict(common), "shards": str(len(parts)), "index": shards.index_name or "none"}
