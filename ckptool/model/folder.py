"""Many checkpoints side by side: a row each, and which one is the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ckptool.model.inspection import Verdict
from ckptool.model.training import Fact

Mode = Literal["min", "max"]


@dataclass(frozen=True, slots=True)
class FileRow:
    """Say in one row what a file holds; ``error`` says why it cannot be read, and the facts are then empty.

    ``nbytes`` is its size, ``modified`` the time of its last change in seconds since 1970 (None: there is no such
    file). The facts are plain values; where the file states none, they come from its name, and say so. ``monitor``
    and ``mode`` are what the trainer itself chose by.
    """

    path: str
    nbytes: int | None
    modified: float | None
    kind: str = ""
    format: str = ""
    has_weights: bool = False
    verdict: Verdict = "unknown"
    epoch: Fact | None = None
    global_step: Fact | None = None
    metrics: Mapping[str, Fact] = field(default_factory=dict)
    monitor: Fact | None = None
    mode: Fact | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Order rows: the ranked ones best first, then those without the metric by time, then the unreadable ones.

    ``metric`` and ``mode`` are what they are ranked by, with where that comes from. ``reason`` says why ``best`` is
    the best; without one it is empty, and ``refusal`` says what would settle it.
    """

    rows: tuple[FileRow, ...]
    ranked: int = 0
    metric: Fact | None = None
    mode: Fact | None = None
    best: FileRow | None = None
    reason: str = ""
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Hold one answer over many files; ``skipped`` counts by kind what is no checkpoint (``image``, ``text``)."""

    ranking: Ranking
    skipped: Mapping[str, int]
