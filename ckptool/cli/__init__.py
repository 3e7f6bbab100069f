"""The edge: options in, one operation, one report, one exit status."""

from __future__ import annotations

import gc
import os
import signal
import sys
from enum import IntEnum
from types import FrameType

BROKEN_PIPE = 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1


class Status(IntEnum):
    """Answer in one number; over several inputs the worst wins, and ``worst`` knows the order."""

    DONE = 0
    NO = 1
    UNANSWERED = 2
    INTERRUPTED = 130


def worst(*statuses: Status) -> Status:
    """Pick what the whole command answers: could not answer, then no, then done."""
    return max(statuses, default=Status.DONE)


def main(argv: list[str] | None = None) -> int:
    """Run one command line and give its exit status; every refusal becomes one sentence on stderr."""
    signal.signal(signal.SIGTERM, _stop)
    collecting = gc.isenabled()
    gc.disable()  # a description is many small values, none of them garbage before the process ends
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone; pointing stdout elsewhere keeps the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    finally:
        if collecting:
            gc.enable()
    return status


def _run(argv: list[str] | None) -> int:
    from ckptool.cli.app import app

    _import_commands(set(sys.argv[1:] if argv is None else argv))
    try:
        app(args=argv, prog_name="ckptool")
    except SystemExit as exit_request:
        return exit_request.code if isinstance(exit_request.code, int) else int(exit_request.code is not None)
    return Status.DONE


def _import_commands(words: set[str]) -> None:
    """Import what registers the commands that are named, or all of them where none is (help, a misspelling)."""
    writing = {"strip-prefixes", "convert"}
    everything = not words & {"inspect", *writing}
    if everything or "inspect" in words:
        import ckptool.cli.inspect
    if everything or words & writing:
        import ckptool.cli.writing  # noqa: F401


def _stop(signum: int, frame: FrameType | None) -> None:
    # An exception, so that a half-written output is removed on the way out.
    raise SystemExit(128 + signum)
