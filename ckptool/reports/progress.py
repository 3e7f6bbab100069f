"""A progress bar on stderr, for whatever takes longer than a second."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is loaded when a bar is really drawn
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_PATIENCE_SECONDS = 1.0
_REDRAW_SECONDS = 0.1


class ProgressBar:
    """Draw bytes moved, rate and time left on stderr, once a task has run for a second; nothing where stderr is piped.

    Implements ``model.sources.Progress``; use it as a context manager.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._wanted = sys.stderr.isatty() and not quiet
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._label, self._total, self._done, self._started, self._drawn = "", 0, 0, time.monotonic(), 0.0

    def start(self, label: str, total_bytes: int) -> None:
        """Begin one task of ``total_bytes``."""
        self._close()
        self._label, self._total, self._done, self._started = label, total_bytes, 0, time.monotonic()

    def advance(self, nbytes: int) -> None:
        """Count ``nbytes`` more."""
        self._done += nbytes
        now = time.monotonic()
        if self._wanted and now - self._started > _PATIENCE_SECONDS and now - self._drawn > _REDRAW_SECONDS:
            self._drawn = now
            self._draw()

    def _draw(self) -> None:
        if self._bar is None:
            self._bar, self._task = self._open()
        assert self._task is not None
        self._bar.update(self._task, completed=self._done)

    def _open(self) -> tuple[RichProgress, TaskID]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        bar.start()
        return bar, bar.add_task(self._label, total=self._total)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
