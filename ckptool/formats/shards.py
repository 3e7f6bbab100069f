"""Checkpoints in several files, as the Hugging Face libraries lay them out: the names, the index, the folder.

Sources: huggingface_hub, ``serialization/_base.py`` (names and index), ``constants.py`` (file names); transformers,
``modeling_utils.py`` (``_add_variant``: ``model.fp16-00001-of-00002.safetensors``,
``model.safetensors.index.fp16.json``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptool.errors import IncompleteCheckpoint, UnreadableCheckpoint
from ckptool.formats.file import InputFile, listing
from ckptool.formats.rank_files import require_one_rank
from ckptool.model.checkpoint import Finding
from ckptool.model.places import RemotePath

_SUFFIX = r"\.(?P<suffix>safetensors|bin|pth?|ckpt)"  # others are of other frameworks (tf_model.h5.index.json)
INDEX_NAME = re.compile(rf"(?P<stem>.+){_SUFFIX}\.index(?:\.(?P<variant>[^.]+))?\.json", re.DOTALL)
SHARD_NAME = re.compile(rf"(?P<stem>.+)-(?P<number>\d{{5}})-of-(?P<count>\d{{5}}){_SUFFIX}", re.DOTALL)
_LARGEST_INDEX = 32 << 20  # 300,000 tensors; a checkpoint of 1,000 takes 100 kB
_SINGLE = re.compile(
    r"(?P<stem>(?:(?:diffusion_)?pytorch_model|(?:adapter_)?model)(?:\.\w+)?)\.(?P<suffix>safetensors|bin)"
)
# What lies beside the weights where a folder is one checkpoint: transformers, diffusers, PEFT, accelerate.
_SIGNS_OF_ONE = frozenset({"config.json", "adapter_config.json", "trainer_state.json", "optimizer.bin"})
# Findings: what an index says otherwise than its files.
INDEX_CONTRADICTIONS = frozenset({"misplaced-tensor", "total-size", "unindexed-tensor", "unlisted-shard"})
_MAX_NAMED = 3
_RESAVE = "save it anew with save_pretrained"


@dataclass(frozen=True, slots=True)
class ShardSet:
    """Name the files of one checkpoint: all in ``folder``, in the order of their names.

    ``path`` is what the user named. ``index_name`` is empty where there is no index; else ``keys`` maps every tensor to
    its file, and ``metadata`` is what the index says besides.
    """

    path: Path
    folder: Path
    names: tuple[str, ...]
    index_name: str = ""
    index_bytes: int = 0
    keys: Mapping[str, str] | None = None
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class FolderWeights:
    """Say which weights of a folder are meant: a file or an index by ``name``, or the ``shards`` of a set without one.

    ``findings`` tell what else was there to choose from.
    """

    name: str
    shards: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def is_index(self) -> bool:
        """Tell whether ``name`` is that of an index."""
        return self.name.endswith(".json")


# --- the index ---


def read_index(file: InputFile, path: Path) -> ShardSet:
    """Read which tensor is in which file; ``path`` is what the user named, the index or its folder.

    :raises UnreadableCheckpoint: it is no index, or names a file that is not in its own folder.
    """
    if file.size > _LARGEST_INDEX:
        raise UnreadableCheckpoint(f"the index has {file.size:,} bytes, more than any; get it again")
    content = _parse(file.read(0, file.size))
    keys = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(keys, dict) or not keys or not all(isinstance(name, str) for name in keys.values()):
        raise UnreadableCheckpoint(f"the index maps no tensors to files; {_RESAVE}")
    names = tuple(sorted(set(keys.values())))
    for name in names:
        require_plain_name(name)
    metadata = content.get("metadata")
    return ShardSet(
        path=path,
        folder=file.path.parent,
        names=names,
        index_name=file.path.name,
        index_bytes=file.size,
        keys=keys,
        metadata=metadata if isinstance(metadata, dict) else {},
    )


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UnreadableCheckpoint("the index is not valid JSON; get it again") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        from ckptool.model.repeats import first_repeated  # what no sound index needs

        twin = first_repeated(name for name, _ in pairs)
        raise UnreadableCheckpoint(f"the index holds {twin!r:.100} twice, and readers differ; {_RESAVE}")
    return table


def require_plain_name(name: str) -> None:
    """Refuse whatever could lead out of the folder, on any system: the index is not to choose what is opened."""
    if not name or name in (".", "..") or not name.isprintable() or set(name) & set('/\\:*?"<>|'):
        raise UnreadableCheckpoint(
            f"the index names {name!r:.100}, which is no plain name of a file beside it; do not trust it"
        )


def require_files(shards: ShardSet) -> None:
    """Make sure that every shard is there, is in the folder, and is not another one under a second name.

    :raises IncompleteCheckpoint: a file is missing.
    :raises UnreadableCheckpoint: a link leads out of the folder, or two names are one file.
    """
    if isinstance(shards.folder, RemotePath):
        return  # none can be a link there, and a missing one is told when it is opened
    missing = [name for name in shards.names if not os.path.lexists(shards.folder / name)]
    if missing:
        source = "its index names" if shards.index_name else "their numbers ask for"
        raise IncompleteCheckpoint(
            f"{len(missing)} of {len(shards.names)} files that {source} are not there ({some(missing)}); get them, too"
        )
    homes = _homes(shards.folder)
    real: dict[Path, str] = {}
    for name in shards.names:
        place = Path(os.path.realpath(shards.folder / name))
        if place.parent not in homes:
            raise UnreadableCheckpoint(
                f"{name!r:.100} is a link that leads out of the folder; put the file itself there"
            )
        if place in real:
            raise UnreadableCheckpoint(f"{real[place]!r:.100} and {name!r:.100} are one file; {_RESAVE}")
        real[place] = name


def _homes(folder: Path) -> set[Path]:
    """Give the folders in which the shards may lie: their own and, in the cache of the Hub, the blobs beside it.

    Source: huggingface_hub, ``file_download.py``: ``snapshots/REVISION/...`` holds links into ``blobs``.
    """
    real = Path(os.path.realpath(folder))
    caches = [parent for parent in real.parents if parent.name == "snapshots"]
    return {real, *(snapshots.parent / "blobs" for snapshots in caches)}


# --- names ---


def some(names: Iterable[str]) -> str:
    """Quote the first few of many names."""
    listed = list(names)
    more = f" and {len(listed) - _MAX_NAMED} more" if len(listed) > _MAX_NAMED else ""
    return ", ".join(f"{name!r:.100}" for name in listed[:_MAX_NAMED]) + more


def one_of_several(name: str) -> tuple[Finding, ...]:
    """Say so where a file's name tells that it is one shard of several."""
    match = SHARD_NAME.fullmatch(name)
    if match is None or int(match["count"]) < 2:
        return ()
    text = (
        f"this is shard {int(match['number'])} of {int(match['count'])}: name the folder or the index to read them all"
    )
    return (Finding("one-shard", text),)


def unlisted_shards(shards: ShardSet) -> tuple[Finding, ...]:
    """Tell of shards that lie beside those of an index and belong to the same set."""
    sets = {_set_of(name) for name in shards.names} - {None}
    beside = [name for name in listing(shards.folder) if name not in shards.names and _set_of(name) in sets]
    if not beside:
        return ()
    return (Finding("unlisted-shard", f"{some(beside)} beside its shards are numbered like them and not among them"),)


def _set_of(name: str) -> tuple[str, ...] | None:
    match = SHARD_NAME.fullmatch(name)
    return match.group("stem", "count", "suffix") if match else None


# --- the folder ---


def is_sharded_folder(path: Path) -> bool:
    """Tell whether a folder is to be opened as one checkpoint: an index, numbered shards, or a model's own folder."""
    try:
        return find_weights(path) is not None
    except UnreadableCheckpoint:  # several, or some are missing: opening it says what is wrong
        return True


def find_weights(folder: Path) -> FolderWeights | None:
    """Find the weights in a folder; None where it is not the folder of one checkpoint.

    As the Hub's tools do it takes safetensors before pickles, and the plain names before a variant (``fp16``).

    :raises UnreadableCheckpoint: there are several that none of this tells apart.
    """
    found = _weights_in(listing(folder))
    if not found:
        return None
    ranks = {name: (weights.suffix != "safetensors", "." in weights.stem) for name, weights in found.items()}
    best = [name for name in found if ranks[name] == min(ranks.values())]
    require_one_rank(best)
    if len(best) > 1:
        raise UnreadableCheckpoint(f"the folder holds several checkpoints ({some(best)}); name the one that is meant")
    others = [name for name in found if name not in best]
    text = f"took {best[0]!r:.100} and did not look at {some(others)}: name it to read it"
    findings = (Finding("other-weights", text),) if others else ()
    return FolderWeights(best[0], found[best[0]].shards, findings)


@dataclass(frozen=True, slots=True)
class _Weights:
    stem: str
    suffix: str
    shards: tuple[str, ...] = ()


def _weights_in(listing: list[str]) -> dict[str, _Weights]:
    """Give each checkpoint in a folder by the name that tells of it: an index, a single file, a first shard."""
    found = {}
    for name in listing:
        match = INDEX_NAME.fullmatch(name)
        if match:
            variant = f".{match['variant']}" if match["variant"] else ""
            found[name] = _Weights(match["stem"] + variant, match["suffix"])
    indexed = {(weights.stem, weights.suffix) for weights in found.values()}
    for (stem, count, suffix), shards in _numbered(listing).items():
        if (stem, suffix) not in indexed:
            found[shards[0]] = _Weights(stem, suffix, _all_numbers(stem, int(count), suffix))
    if found or not _SIGNS_OF_ONE.isdisjoint(listing):
        singles = filter(None, map(_SINGLE.fullmatch, listing))
        found |= {match[0]: _Weights(match["stem"], match["suffix"]) for match in singles}
    return found


def _numbered(listing: list[str]) -> dict[tuple[str, ...], list[str]]:
    sets: dict[tuple[str, ...], list[str]] = {}
    for name in listing:
        key = _set_of(name)
        if key is not None:
            sets.setdefault(key, []).append(name)
    return sets


def _all_numbers(stem: str, count: int, suffix: str) -> tuple[str, ...]:
    return tuple(f"{stem}-{number:05d}-of-{count:05d}.{suffix}" for number in range(1, count + 1))
