"""Split a copy plan over several files: which tensors go together, and how the files are called.

Sizes and names are those of huggingface_hub (``serialization/_base.py``, ``split_state_dict_into_shards_factory``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckptool.errors import OutputRefused
from ckptool.formats.file import is_folder, listing
from ckptool.formats.shards import INDEX_NAME, SHARD_NAME
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.conversion import OUTPUT_SUFFIXES, ConvertOptions, OutputKind
from ckptool.model.copies import CopyPlan, Payload, PlannedOpaque, PlannedTensor
from ckptool.model.plans import KeyPlan
from ckptool.model.values import DictNode

_NAMES: dict[OutputKind, tuple[str, str]] = {
    "safetensors": ("model", ".safetensors"),
    "torch": ("pytorch_model", ".bin"),
}


@dataclass(frozen=True, slots=True)
class ShardNames:
    """Call one file ``STEM.SUFFIX``, and several ``STEM-00001-of-00002.SUFFIX`` with an index ``index_name``."""

    stem: str
    suffix: str
    index_name: str

    def all(self, count: int) -> list[str]:
        """Name ``count`` files."""
        if count == 1:
            return [f"{self.stem}{self.suffix}"]
        return [f"{self.stem}-{number:05d}-of-{count:05d}{self.suffix}" for number in range(1, count + 1)]

    def taken(self, folder: Path) -> list[str]:
        """List the files of this name in a folder, in one piece or in several, and their index."""
        numbered = re.compile(rf"{re.escape(self.stem)}(?:-\d{{5}}-of-\d{{5}})?{re.escape(self.suffix)}")
        return [name for name in listing(folder) if name == self.index_name or numbered.fullmatch(name)]


@dataclass(frozen=True, slots=True)
class ShardedOutput:
    """Say where files go and how they are called; ``max_bytes`` None: the tensors stay together as they are."""

    folder: Path
    names: ShardNames
    max_bytes: int | None


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """Name one file and what is written to it."""

    name: str
    plan: CopyPlan


def sharded_output(
    checkpoint: Checkpoint, source: Path, target: Path | None, kind: OutputKind, options: ConvertOptions
) -> ShardedOutput | None:
    """Tell whether the output is a folder or several files, and how they are called; None where it is one plain file.

    :raises OutputRefused: one file is asked for, and several at once.
    """
    if options.in_place:
        return _in_place(checkpoint, kind, options)
    folder_is_meant = bool(checkpoint.shards) or is_folder(source)
    target = Path() if target is None and (folder_is_meant or options.max_shard_size) else target
    if target is None:
        return None
    names = _names_of_index(target.name)
    if names is None and target.suffix.lower() in OUTPUT_SUFFIXES and not is_folder(target):
        if options.max_shard_size is None:
            return None
        names = _names(target.stem, target.suffix)
    if names is not None:
        _require_folder(target, options)
        return ShardedOutput(target.parent, names, options.max_shard_size)
    if not (folder_is_meant or options.max_shard_size):
        return None
    return ShardedOutput(target, _names_in_folder(checkpoint, kind, source), options.max_shard_size)


def _require_folder(target: Path, options: ConvertOptions) -> None:
    if not is_folder(target.parent) and not options.dry_run:
        raise OutputRefused(f"{target}: its folder does not exist; create it first")


def _in_place(checkpoint: Checkpoint, kind: OutputKind, options: ConvertOptions) -> ShardedOutput | None:
    if checkpoint.shards:
        names = _names_in_folder(checkpoint, kind, checkpoint.path)
        return ShardedOutput(folder_of(checkpoint), names, options.max_shard_size)
    if options.max_shard_size is not None:
        raise OutputRefused(f"{checkpoint.path}: --in-place keeps one file one file; name OUT for several")
    return None


def folder_of(checkpoint: Checkpoint) -> Path:
    """Give the folder in which the files of a checkpoint lie."""
    return checkpoint.path if checkpoint.shards and is_folder(checkpoint.path) else checkpoint.path.parent


def file_names(checkpoint: Checkpoint) -> list[str]:
    """Name the files that a checkpoint was read from, its index included."""
    if not checkpoint.shards:
        return [checkpoint.path.name]
    index = checkpoint.facts["index"]
    return [*(shard.name for shard in checkpoint.shards), *([index] if index != "none" else [])]


def _names_in_folder(checkpoint: Checkpoint, kind: OutputKind, source: Path) -> ShardNames:
    """Keep the names of the source where the kind stays the same; else take those that the Hub's tools look for."""
    stays = checkpoint.is_safetensors == (kind == "safetensors") and (checkpoint.shards or is_folder(source))
    return (_names_of_source(checkpoint) if stays else None) or _names(*_NAMES[kind])


def _names_of_source(checkpoint: Checkpoint) -> ShardNames | None:
    if not checkpoint.shards:
        return _names(checkpoint.path.stem, checkpoint.path.suffix)
    names = _names_of_index(checkpoint.facts.get("index", ""))
    match = SHARD_NAME.fullmatch(checkpoint.shards[0].name)
    return names or (_names(match["stem"], f".{match['suffix']}") if match else None)


def _names(stem: str, suffix: str) -> ShardNames:
    return ShardNames(stem, suffix, f"{stem}{suffix}.index.json")


def _names_of_index(name: str) -> ShardNames | None:
    match = INDEX_NAME.fullmatch(name)
    if match is None:
        return None
    variant = f".{match['variant']}" if match["variant"] else ""
    return ShardNames(match["stem"] + variant, f".{match['suffix']}", name)


# --- which tensors go together ---


def split(plan: CopyPlan, output: ShardedOutput, checkpoint: Checkpoint, key_plan: KeyPlan) -> tuple[PlannedShard, ...]:
    """Plan each file: filled up to the size that is asked for, or as the source is split.

    :raises OutputRefused: the output is no flat state dict.
    """
    entries = _entries(plan, output.folder)
    tensors = {name: _payloads(value) for name, value in entries.items() if _payloads(value)}
    if output.max_bytes is None:
        groups = _as_source(tensors, checkpoint, key_plan)
    else:
        groups = _by_size(tensors, output.max_bytes)
    groups[0] += [name for name in entries if name not in tensors]
    names = _file_names(output, groups, checkpoint)
    return tuple(PlannedShard(name, _part(plan, set(group))) for name, group in zip(names, groups, strict=True))


def _entries(plan: CopyPlan, folder: Path) -> Mapping[str, Any]:
    """Give what is written by name; several files hold one flat state dict and nothing around it."""
    if plan.root is None:
        return plan.tensors
    entries = dict(plan.root.pairs) if isinstance(plan.root, DictNode) else {}
    if not entries.keys() >= plan.tensors.keys():
        raise OutputRefused(f"{folder}: the rest of a container does not go into shards; leave --keep-rest out")
    return entries


def _payloads(value: Any) -> tuple[Payload, ...]:
    if isinstance(value, PlannedTensor):
        return (value.payload,)
    parts = value.parts if isinstance(value, PlannedOpaque) else ()
    return tuple(payload for _, part in parts for payload in _payloads(part))


def _by_size(tensors: Mapping[str, tuple[Payload, ...]], max_bytes: int) -> list[list[str]]:
    """Fill one file after the other in the order of the names; what is larger than a file has one of its own."""
    blocks = _tied(tensors)
    groups: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for block in blocks:
        nbytes = sum(payload.nbytes for payload in tensors[block[0]])
        if nbytes > max_bytes:
            groups.append(block)
            continue
        if current and filled + nbytes > max_bytes:
            groups.append(current)
            current, filled = [], 0
        current += block
        filled += nbytes
    return [*groups, current] if current else groups


def _tied(tensors: Mapping[str, tuple[Payload, ...]]) -> list[list[str]]:
    """Put names that share their bytes together, where the first of them stands."""
    blocks: dict[int, list[str]] = {}
    for name, payloads in tensors.items():
        blocks.setdefault(id(payloads[0]), []).append(name)
    return list(blocks.values())


def _as_source(
    tensors: Mapping[str, tuple[Payload, ...]], checkpoint: Checkpoint, key_plan: KeyPlan
) -> list[list[str]]:
    """Leave every tensor in the file where it is; files that would be empty are left out."""
    homes = {key: number for number, shard in enumerate(checkpoint.shards) for key in shard.keys}
    sources = {target: source for source, target in key_plan.kept.items()}
    groups: dict[int, list[str]] = {}
    for name in tensors:
        source = sources.get(name, name)
        home = homes.get(source, homes.get(checkpoint.metadata.get(source, ""), 0))  # an alias is where its tensor is
        groups.setdefault(home, []).append(name)
    return [groups[number] for number in sorted(groups)]


def _file_names(output: ShardedOutput, groups: Sequence[Sequence[str]], checkpoint: Checkpoint) -> Iterable[str]:
    """Keep the names of the source's files where all of them, and their kind, stay."""
    own = [shard.name for shard in checkpoint.shards]
    stays = output.max_bytes is None and len(own) == len(groups) > 1 and output.names == _names_of_source(checkpoint)
    return own if stays else output.names.all(len(groups))


def _part(plan: CopyPlan, names: set[str]) -> CopyPlan:
    tensors = {name: tensor for name, tensor in plan.tensors.items() if name in names}
    if plan.root is None:
        return replace(plan, tensors=tensors, aliases={})
    root = DictNode([pair for pair in plan.root.pairs if pair[0] in names], plan.root.type_name)
    root.attributes = plan.root.attributes
    return replace(plan, tensors=tensors, root=root)


# --- the index ---


def homes_of(shards: Sequence[PlannedShard], plan: CopyPlan) -> dict[str, str]:
    """Map every name to its file, in the order of the state dict."""
    homes = {name: shard.name for shard in shards for name in entry_names(shard.plan)}
    return {name: homes[name] for name in entry_names(plan)}


def entry_names(plan: CopyPlan) -> Iterator[str]:
    """Give the names that a file holds, in its order."""
    return iter(plan.tensors) if plan.root is None else (key for key, _ in plan.root.pairs)


def total_bytes(shards: Iterable[PlannedShard]) -> int:
    """Sum the bytes of all tensors, tied ones once."""
    values = [value for shard in shards for value in _values(shard.plan)]
    return sum(payload.nbytes for payload in {payload for value in values for payload in _payloads(value)})


def _values(plan: CopyPlan) -> Iterable[Any]:
    return plan.tensors.values() if plan.root is None else [value for _, value in plan.root.pairs]
