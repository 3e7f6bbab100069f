"""What strip-prefixes and convert are asked for, and what they did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ckptool.model.checkpoint import Shard
from ckptool.model.dtypes import DType
from ckptool.model.plans import KeyMove, KeyOptions, Note, Wrapper
from ckptool.model.results import CastLoss

BESIDE = "beside the weights"  # the reason for which other content of a container is not in the output
OutputKind = Literal["torch", "safetensors"]
# What a suffix of an output stands for.
OUTPUT_SUFFIXES: Mapping[str, OutputKind] = {
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
}


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Say what to write, and how; the defaults write the main weights under clean names.

    ``dtype`` casts floating tensors. ``keep_rest`` keeps the container around the state dict (torch files only);
    ``foreign`` says whether objects of foreign classes in it are dropped or become plain dicts of their fields.
    ``weights_only`` lets an in-place rewrite lose them. ``metadata`` carries facts over as text into safetensors.
    ``max_shard_size`` (bytes) splits the output into files of at most that size, as far as no tensor is larger.
    ``average_with`` are further checkpoints, of which and the input the mean is written.
    ``densify`` writes sparse tensors as dense ones, ``dequantize`` quantized ones as float32.
    """

    weights: str = "main"
    keys: KeyOptions = field(default_factory=KeyOptions)
    dtype: DType | None = None
    ties: Literal["keep", "copy"] = "keep"
    keep_rest: bool = False
    foreign: Literal["drop", "fields"] = "drop"
    weights_only: bool = False
    metadata: bool = True
    densify: bool = False
    dequantize: bool = False
    fail_on_overflow: bool = False
    digest: bool = False
    force: bool = False
    in_place: bool = False
    dry_run: bool = False
    max_shard_size: int | None = None
    average_with: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """Name one thing that is not in the output, and why; ``nbytes`` is what it took, 0 for what is no tensor."""

    name: str
    reason: str
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Tie:
    """Say that ``name`` is the same tensor as ``kept``; ``written`` tells whether the name itself is in the output."""

    name: str
    kept: str
    written: bool


@dataclass(frozen=True, slots=True)
class MadeDense:
    """Say that ``name`` was written as a dense tensor; ``was`` is what it is in the source (``sparse COO float32``)."""

    name: str
    was: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """Tell what one conversion did, or with ``dry_run`` would do.

    ``state_dict`` and ``role`` say which state dict was taken. ``moves`` are all its keys; ``dropped`` lists what did
    not make it into the output, keys and other content; ``flattened`` the foreign objects of which the fields are kept
    as plain data; ``made_dense`` the sparse and quantized tensors that were asked to be dense. ``source_bytes`` and
    ``target_bytes`` are file sizes (of the tensors alone in a dry run). ``shards`` are the files in a folder that is
    written, ``index_name`` is that of their index, empty where one file needs none.
    ``averaged`` are the further checkpoints that the mean is of.
    ``digest`` is that of the written tensors, where asked for.
    """

    source: Path
    target: Path | None
    kind: OutputKind
    dry_run: bool
    state_dict: str
    role: str
    certainty: str
    wrappers: tuple[Wrapper, ...]
    moves: tuple[KeyMove, ...]
    tensors: int
    dropped: tuple[Dropped, ...]
    flattened: tuple[str, ...]
    ties: tuple[Tie, ...]
    casts: tuple[CastLoss, ...]
    notes: tuple[Note, ...]
    source_bytes: int
    target_bytes: int
    digest: str | None = None
    made_dense: tuple[MadeDense, ...] = ()
    shards: tuple[Shard, ...] = ()
    index_name: str = ""
    averaged: tuple[Path, ...] = ()

    @property
    def renamed(self) -> tuple[KeyMove, ...]:
        """List the keys that are in the output under another name."""
        return tuple(move for move in self.moves if move.target not in (None, move.source))

    @property
    def already_clean(self) -> bool:
        """Tell whether every key kept its name."""
        return all(move.source == move.target for move in self.moves)
