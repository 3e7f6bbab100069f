"""Many small tasks in several processes: reading a description is Python at work, which threads cannot share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ckptool.errors import CkptoolError

Item = TypeVar("Item")
Result = TypeVar("Result")

# A process takes some ten milliseconds to start, a file a few to read.
_ITEMS_WORTH_A_PROCESS = 16
_CHUNK = 8


def map_in_order(
    function: Callable[[Item], Result], items: Sequence[Item], jobs: int | None = None
) -> Iterator[Result]:
    """Yield the results in the order of the items; ``jobs`` processes work on them (None: as many as pay off).

    :raises CkptoolError: a process was killed.
    """
    wanted = jobs or min(available_cores(), len(items) // _ITEMS_WORTH_A_PROCESS)
    if min(wanted, len(items)) <= 1:
        yield from map(function, items)
    else:
        yield from _map_in_processes(function, items, min(wanted, len(items)))


def available_cores() -> int:
    """Count the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _map_in_processes(function: Callable[[Item], Result], items: Sequence[Item], jobs: int) -> Iterator[Result]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # A fork inherits what is imported already; only Linux takes one without harm.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    executor = ProcessPoolExecutor(jobs, context, _leave_signals_to_the_parent)
    try:
        yield from executor.map(function, items, chunksize=max(1, min(_CHUNK, len(items) // jobs)))
    except BrokenProcessPool as error:
        raise CkptoolError(
            "a process that read files was killed, perhaps for its memory; run it with --jobs 1"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _leave_signals_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
