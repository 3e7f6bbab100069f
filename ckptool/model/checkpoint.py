"""One opened checkpoint: its values, described; its bytes, not yet read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from ckptool.model.values import GlobalUse, Storage


class OpenFile(Protocol):
    """Keep the file open while its bytes may be asked for."""

    def close(self) -> None:
        """Release the file."""


@dataclass(frozen=True, slots=True)
class Finding:
    """State one thing about the container that a reader should know; ``code`` is stable, ``text`` one sentence."""

    code: str
    text: str


class Shard(NamedTuple):
    """Name one file of a checkpoint in several, its size in bytes, and the keys in it."""

    name: str
    nbytes: int
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """Hold what a file says, as data: no tensor read, no class imported.

        ``format`` is ``torch-zip``, ``torch-legacy``, ``torch-tar``, ``torchscript``, ``torch-export``, ``pickle``,
    ``npy``, ``npz`` or ``safetensors``, and for a checkpoint in several files ``torch-shards`` or
    ``safetensors-shards``: those are its ``shards``, in the folder that ``path`` is, or where the index lies that it
    is. A folder of torch.distributed.checkpoint is ``torch-distributed``: a tensor may be in several of its ``shards``.
    ``file_bytes`` is the sum of them and the index. ``root`` is the value tree of ``model/values.py`` (for
    safetensors a flat ``DictNode`` of tensors). ``metadata`` is the text metadata of a safetensors header; ``facts``
    are properties of the container itself (``byteorder``, ``version``; ``inside``: the archives around it).
        ``storages`` are all records with tensor bytes, those that no tensor uses included; ``others`` are records that
    hold no tensor, and of which the description needs nothing. Close it, or use it as a context manager, when its bytes
    are no longer needed.
    """

    path: Path
    format: str
    file_bytes: int
    root: Any
    file: OpenFile
    storages: tuple[Storage, ...] = ()
    globals: tuple[GlobalUse, ...] = ()
    findings: tuple[Finding, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    others: tuple[Storage, ...] = ()

    @property
    def is_safetensors(self) -> bool:
        """Tell whether it is a flat table of tensors with text metadata, its names in no telling order."""
        return self.format.startswith("safetensors")

    def close(self) -> None:
        """Release the file."""
        self.file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
