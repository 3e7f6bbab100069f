"""Many checkpoints side by side: which files of a folder are meant, and what each says in one row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ckptool.errors import CkptoolError
from ckptool.formats import open_checkpoint
from ckptool.formats.bystanders import name_bystander
from ckptool.formats.deepspeed import is_zero_folder, latest_tag
from ckptool.formats.file import is_folder
from ckptool.formats.shards import is_sharded_folder
from ckptool.layouts import read_training, select
from ckptool.layouts.file_names import read_name, says_best
from ckptool.layouts.goals import read_goal
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.folder import FileRow
from ckptool.model.inspection import Verdict
from ckptool.model.training import Fact, Training
from ckptool.operations.advice import CHECKPOINT_SUFFIXES
from ckptool.operations.describe import judge, judge_refused
from ckptool.operations.plain import plain_fact
from ckptool.operations.trainer_state import read_trainer_state

# A file of such a name was meant to hold tensors; one that ends as an archive does may hold anything.
_TENSOR_SUFFIXES = CHECKPOINT_SUFFIXES | {".npz", ".npy", ".pt2", ".ptl", ".nemo"}
# What torch.distributed.checkpoint and Megatron leave in the folder of one checkpoint. DeepSpeed's ``latest`` alone
# might be anybody's link to the last file.
_DISTRIBUTED = frozenset({".metadata", "latest_checkpointed_iteration.txt"})


@dataclass(slots=True)
class Found:
    """Gather what a search comes to: the paths that are to be read, in order; why one cannot be; what was skipped."""

    paths: list[Path] = field(default_factory=list)
    errors: dict[Path, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    def refuse(self, path: Path, reason: str) -> None:
        """Keep a path that cannot be read, with the reason."""
        self.paths.append(path)
        self.errors[path] = f"{path}: {reason}"


def find(paths: Iterable[Path], *, recursive: bool = False) -> Found:
    """Replace every folder by the checkpoints in it, by name; a folder that is one checkpoint counts as a file.

    A file with the suffix of a checkpoint counts whatever it holds; any other does unless its content is recognisably
    something else. Hidden files and folders, and links to folders, are left out. Nothing waits for a pipe.
    """
    found = Found()
    for path in paths:
        if not is_folder(path):
            found.paths.append(path)
        elif is_checkpoint_folder(path):
            found.paths += [path, *(_below(path) if recursive else ())]
        else:
            _search(path, found, recursive)
    return found


def _below(folder: Path) -> list[Path]:
    """Give the checkpoints in folders of a checkpoint's own: a Trainer keeps those of the steps below the last one."""
    try:
        listed = _listing(folder)
    except OSError:
        return []
    latest = latest_tag(folder)  # of DeepSpeed, and what the folder itself is read as
    return [path for path in listed if path.name != latest and is_folder(path) and is_checkpoint_folder(path)]


def _listing(folder: Path) -> list[Path]:
    """List a folder by name, numbers by value: ``epoch=9`` before ``epoch=10``.

    :raises OSError: it cannot be read.
    """
    return sorted(folder.iterdir(), key=_by_number)


def _by_number(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path.name


def is_checkpoint_folder(path: Path) -> bool:
    """Tell whether a folder is one checkpoint: of a Hugging Face library, or the parts of a distributed one."""
    return is_sharded_folder(path) or _is_distributed(path) or is_zero_folder(path)


def _is_distributed(path: Path) -> bool:
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError:
        return False
    is_deepspeed = _is_named_so(path) or any(name.startswith("global_step") for name in names)
    is_part = any(name.endswith(".distcp") for name in names)  # without their .metadata, which opening them asks for
    return is_part or ("latest" in names and is_deepspeed) or not _DISTRIBUTED.isdisjoint(names)


def _is_named_so(path: Path) -> bool:
    return path.suffix.lower() in CHECKPOINT_SUFFIXES


def _search(top: Path, found: Found, recursive: bool) -> None:
    already, skipped, folders = len(found.paths), found.skipped.total(), found.skipped["folder"]
    pending = [top]
    while pending:
        below = []
        for path in _listed(pending.pop(), found):
            if not is_folder(path):
                _take_file(path, found)
            elif is_checkpoint_folder(path):
                found.paths += [path, *(_below(path) if recursive else ())]
            elif recursive and not path.name.startswith(".") and not path.is_symlink():
                below.append(path)
            else:
                found.skipped["folder"] += 1
        pending += reversed(below)
    if len(found.paths) == already:
        closed = found.skipped["folder"] - folders
        found.refuse(top, _emptiness(found.skipped.total() - skipped - closed, closed, recursive))


def _listed(folder: Path, found: Found) -> list[Path]:
    try:
        return _listing(folder)
    except OSError as error:
        found.refuse(folder, f"this folder cannot be listed ({error.strerror}); ask for the right to read it")
        return []


def _take_file(path: Path, found: Found) -> None:
    kind = None
    if path.suffix.lower() not in _TENSOR_SUFFIXES:
        kind = "hidden file" if path.name.startswith(".") else _bystander(path)
    if kind is None:
        found.paths.append(path)
    else:
        found.skipped[kind] += 1


def _bystander(path: Path) -> str | None:
    try:
        return name_bystander(path)
    except (CkptoolError, OSError):  # what cannot be looked at may be anything: it gets a row, with the reason
        return None


def _emptiness(files: int, folders: int, recursive: bool) -> str:
    seen = f" ({files} other file{'s' if files != 1 else ''} in it)" if files else ""
    deeper = f", or add -r to look into its {folders} folder{'s' if folders != 1 else ''}"
    return f"no checkpoint in this folder{seen}; save one into it{deeper if folders and not recursive else ''}"


def read_row(path: Path) -> FileRow:
    """Say in one row what a file holds, no tensor read but scores; what cannot be read is a row with its reason."""
    try:
        with open_checkpoint(path) as checkpoint:
            return describe_row(checkpoint, path)
    except CkptoolError as error:
        return unreadable_row(path, str(error), judge_refused(error).verdict)


def unreadable_row(path: Path, reason: str, verdict: Verdict = "unknown") -> FileRow:
    """Make the row of what cannot be read; ``verdict`` is on what its pickle named until then."""
    nbytes, modified = _size_and_time(path)
    return FileRow(str(path), nbytes, modified, verdict=verdict, error=reason)


def describe_row(checkpoint: Checkpoint, path: Path) -> FileRow:
    """Say in one row what the checkpoint at ``path`` holds; what it does not say itself, its folder or name may.

    :raises UnreadableCheckpoint: a pickled module in it nests without end.
    """
    selection = select(checkpoint)
    said = read_training(checkpoint, selection)
    beside = read_trainer_state(path) if is_folder(path) else Training()
    sources = (said, read_goal(said), beside, read_name(path.name))
    return FileRow(
        path=str(path),
        nbytes=checkpoint.file_bytes,
        modified=_size_and_time(path)[1],
        kind=selection.producer.name if selection.candidates else f"{selection.producer.name}, no weights",
        format=checkpoint.format,
        has_weights=bool(selection.candidates),
        verdict=judge(checkpoint.globals).verdict,
        epoch=_first([said.epoch for said in sources]),
        global_step=_first([said.global_step for said in sources]),
        metrics={name: plain_fact(fact) for name, fact in _metrics(sources).items()},
        monitor=_first([said.monitor for said in sources]),
        mode=_first([said.mode for said in sources]),
    )


def _first(facts: Iterable[Fact | None]) -> Fact | None:
    return next((plain_fact(fact) for fact in facts if fact is not None), None)


def _metrics(sources: Iterable[Training]) -> Mapping[str, Fact]:
    """Give the scores of the first source that has any of the checkpoint's own, and the records before it."""
    metrics: dict[str, Fact] = {}
    for said in sources:
        metrics |= said.metrics
        if not all(says_best(name) for name in metrics):
            break
    return metrics


def _size_and_time(path: Path) -> tuple[int | None, float | None]:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None, None
    return status.st_size, status.st_mtime
