"""A folder of DeepSpeed ZeRO: the fp32 weights of all ranks, cut out of the flat partitions of their optimizers.

Source: deepspeed/utils/zero_to_fp32.py and deepspeed/runtime/engine.py (file names) of 0.19. The files are read as what
they are, checkpoints of torch.save; nothing of DeepSpeed is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ckptool.errors import IncompleteCheckpoint, UnreadableCheckpoint
from ckptool.formats.file import is_folder, listing, open_file
from ckptool.formats.several import Read, all_uses, read_one
from ckptool.formats.shards import require_plain_name, some
from ckptool.formats.zero_weights import RankFile, consolidate
from ckptool.model.checkpoint import Checkpoint, Finding, Shard
from ckptool.model.values import DictNode, Storage

LATEST = "latest"
_LARGEST_TAG = 4096
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<slice>\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<slice>\d+)(?:_\d+)?_model_states\.pt")
_PARALLEL = (
    (re.compile(r"layer_\d+-model_\d+-model_states\.pt"), "pipeline parallel: each file holds a layer"),
    (re.compile(r"(?:layer_\d+_)?expert_\d+_mp_rank_\d+_(?:model|optim)_states\.pt"), "expert parallel"),
    (re.compile(r"expp_rank_\d+_mp_rank_\d+_optim_states\.pt"), "expert parallel"),
)
_FLAT_NAMES = ("single_partition_of_fp32_groups", "fp32_flat_groups")
_UNIVERSAL = "ds_to_universal.py"


@dataclass(frozen=True, slots=True)
class _Files:
    """Name the files of one save, in the folder of its tag: those of the model and of the optimizer by rank."""

    folder: Path
    model: Mapping[int, str]
    optimizer: Mapping[int, str]


def is_zero_folder(folder: Path) -> bool:
    """Tell whether a folder is that of one save of DeepSpeed, or names the latest of several."""
    names = listing(folder)
    return any(map(_OPTIMIZER.fullmatch, names)) or any(map(_MODEL.fullmatch, names)) or latest_tag(folder) is not None


def latest_tag(folder: Path) -> str | None:
    """Give the name of the folder of the latest save in one of several; None where it is no such folder."""
    try:
        tag = _read_tag(folder / LATEST)
    except UnreadableCheckpoint:
        return None
    return tag if is_folder(folder / tag) else None


def open_zero(folder: Path, read: Read) -> Checkpoint:
    """Describe the checkpoint in a folder as one; ``read`` opens one file.

    :raises IncompleteCheckpoint: the file of a rank is missing.
    :raises UnreadableCheckpoint: a file cannot be read, the partitions do not fit the shapes, or the model is split in
        other ways, too.
    """
    files = _find_files(folder)
    with ExitStack() as stack:
        parts: dict[str, Checkpoint] = {}
        try:
            for name in (*files.model.values(), *files.optimizer.values()):
                parts[name] = stack.enter_context(read_one(files.folder / name, read))
            checkpoint = _join(folder, files, parts)
        except UnreadableCheckpoint as error:
            error.globals = (*all_uses(parts.items()), *error.globals)
            raise
        return replace(checkpoint, file=stack.pop_all())


# --- the files ---


def _read_tag(path: Path) -> str:
    file = open_file(path)
    try:
        tag = file.read(0, min(file.size, _LARGEST_TAG)).decode("utf-8", "replace").strip()
    finally:
        file.close()
    require_plain_name(tag)
    return tag


def _find_files(folder: Path) -> _Files:
    names = listing(folder)
    inner = folder
    if not any(map(_MODEL.fullmatch, names)) and LATEST in names:
        inner = folder / _read_tag(folder / LATEST)
        names = listing(inner)
    for pattern, what in _PARALLEL:
        found = [name for name in names if pattern.fullmatch(name)]
        if found:
            raise UnreadableCheckpoint(
                f"the model is {what} ({some(found)}), which is not put together; use DeepSpeed's {_UNIVERSAL}"
            )
    models = [match for match in map(_MODEL.fullmatch, names) if match]
    optimizers = [match for match in map(_OPTIMIZER.fullmatch, names) if match]
    _require_one_slice([*models, *optimizers])
    files = _Files(inner, _by_rank(models), _by_rank(optimizers))
    if not files.model:
        raise IncompleteCheckpoint(
            f"the file of the model (mp_rank_00_model_states.pt) is not in {inner.name!r:.100}; get it, too"
        )
    return files


def _require_one_slice(matches: list[re.Match[str]]) -> None:
    slices = sorted({int(match["slice"]) for match in matches})
    if len(slices) > 1:
        found = some(match[0] for match in matches if int(match["slice"]) > 0)
        raise UnreadableCheckpoint(
            f"the model is tensor parallel in {len(slices)} slices ({found}), which are not put together; use"
            f" DeepSpeed's {_UNIVERSAL}"
        )


def _by_rank(matches: list[re.Match[str]]) -> dict[int, str]:
    found = {int(match["rank"] or 0): match[0] for match in matches}
    if len(found) < len(matches):
        twins = sorted({match[0] for match in matches} - set(found.values()))
        raise UnreadableCheckpoint(f"two files are of one rank ({some(twins)}); take away those of another save")
    return dict(sorted(found.items()))


# --- one checkpoint out of them ---


def _join(folder: Path, files: _Files, parts: Mapping[str, Checkpoint]) -> Checkpoint:
    models = {rank: RankFile(name, parts[name]) for rank, name in files.model.items()}
    optimizers = {rank: RankFile(name, parts[name]) for rank, name in files.optimizer.items()}
    prefix = "" if files.folder == folder else f"{files.folder.name}/"
    first = models[min(models)].checkpoint
    findings: list[Finding] = []
    root = first.root
    weights, partitions = DictNode(), frozenset[Storage]()
    storages = [storage for part in parts.values() for storage in part.storages]
    if optimizers:
        consolidated = consolidate(models, optimizers)
        weights, partitions = consolidated.weights, consolidated.partitions
        findings = [*consolidated.findings]
        root = _with_weights(first.root, weights, consolidated.stage, optimizers)
    keys = tuple(weights.text_items())
    return Checkpoint(
        path=folder,
        format="deepspeed-zero",
        file_bytes=sum(part.file_bytes for part in parts.values()),
        root=root,
        file=first.file,
        storages=tuple(storage for storage in storages if storage not in partitions),
        globals=tuple(all_uses(parts.items())),
        findings=(*findings, *_placed_findings(parts)),
        facts={"index": "none", "shards": str(len(parts)), "tag": files.folder.name},
        shards=tuple(
            Shard(f"{prefix}{name}", part.file_bytes, keys if "optim" in name else ()) for name, part in parts.items()
        ),
        others=tuple(other for part in parts.values() for other in part.others),
    )


def _with_weights(root: DictNode, weights: DictNode, stage: int, optimizers: Mapping[int, RankFile]) -> DictNode:
    """Put the consolidated weights where the model's own were; what the ranks keep besides stays beside them."""
    replaced = {"module": weights, "frozen_param_fragments": None}  # the latter are part of the weights now
    pairs = [(key, replaced.get(key, value) if type(key) is str else value) for key, value in root.pairs]
    if stage < 3:  # in stage 3 nothing but placeholders
        pairs.append(("module_as_trained", root.get("module")))
    ranks = [_without_partitions(rank.optimizer) for rank in optimizers.values()]
    return DictNode([*pairs, ("optimizer_ranks", ranks)], root.type_name)


def _without_partitions(optimizer: DictNode) -> DictNode:
    return DictNode([pair for pair in optimizer.pairs if pair[0] not in _FLAT_NAMES], optimizer.type_name)


def _placed_findings(parts: Mapping[str, Checkpoint]) -> Iterator[Finding]:
    for name, part in parts.items():
        yield from (replace(finding, text=f"{name}: {finding.text}") for finding in part.findings)
