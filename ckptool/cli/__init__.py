"""The edge: options in, one operation, one report, one exit status."""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import suppress
from enum import IntEnum
from types import FrameType

from ckptool.errors import CkptoolError

_STDERR = 2
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP) if hasattr(signal, "SIGHUP") else (signal.SIGTERM,)
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
    _fill_closed_streams()
    collecting = gc.isenabled()
    gc.disable()  # a description is many small values, none of them garbage before the process ends
    try:
        return _run_and_flush(argv)
    finally:
        if argv is None:  # the process is this command's own: all is done, and its teardown has no more to say
            gc.freeze()  # nor has the collector, which would look at a million values on the way out
            _ignore_signals()
        if collecting:
            gc.enable()


def _run_and_flush(argv: list[str] | None) -> int:
    try:
        _heed_signals()
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        _give_streams_up()
        return BROKEN_PIPE
    except OSError as error:  # readers and writers translate their own: this is the answer itself
        _say_last(f"standard output: the answer cannot be written ({error.strerror}); send it elsewhere")
        return Status.UNANSWERED
    except MemoryError:
        _say_last("the memory is used up; allow more of it, or close other programs")
        return Status.UNANSWERED
    except KeyboardInterrupt:
        return Status.INTERRUPTED
    return status


def _run(argv: list[str] | None) -> int:
    from ckptool.cli.app import app

    # Only the first word is a command: behind an option, or a misspelling, there are all of them to choose from.
    import_commands(set((sys.argv[1:] if argv is None else argv)[:1]))
    try:
        app(args=argv, prog_name="ckptool")
    except SystemExit as exit_request:
        if isinstance(exit_request.__context__, BrokenPipeError):  # Typer says 1, which would mean "no"
            raise exit_request.__context__ from None
        return exit_request.code if isinstance(exit_request.code, int) else int(exit_request.code is not None)
    except CkptoolError as error:
        from ckptool.cli.terminal import complain

        complain(str(error))
        return Status.UNANSWERED
    return Status.DONE


def import_commands(words: set[str]) -> None:
    """Import what registers the commands that are named, or all of them where none is (help, a misspelling)."""
    writing = {"strip-prefixes", "convert"}
    everything = not words & {"inspect", "diff", "verify", *writing}
    if everything or "inspect" in words:
        import ckptool.cli.inspect
    if everything or "diff" in words:
        import ckptool.cli.diff
    if everything or words & writing:
        import ckptool.cli.writing
    if everything or "verify" in words:
        import ckptool.cli.verify  # noqa: F401


def _fill_closed_streams() -> None:
    """Open what the shell closed (``>&-``): else the next file that is opened would be taken for stdout."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(handle)
    # It stays open as long as the process: these are its streams.
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(_STDERR, "w")


def _say_last(message: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"ckptool: {message}\n")
    _give_streams_up()


def _give_streams_up() -> None:
    """Point the streams nowhere: the interpreter would complain at exit about what it cannot flush."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


def _heed_signals() -> None:
    """Leave in order when told to stop, or when the terminal is closed (unless ``nohup`` has ruled that out)."""
    for number in _STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, *_STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)


def _stop(signum: int, frame: FrameType | None) -> None:
    # An exception, so that a half-written output is removed on the way out.
    raise SystemExit(128 + signum)
