"""Run a command in many processes of its own, each of which the disk, a signal or death meets one step later.

Run as a program: it reads a request as JSON from its standard input and answers with one row for each process. It
never loads torch, so that a process is forked, runs and is gone within milliseconds.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CREATING = os.O_CREAT
_LAST = f"cli{os.sep}__init__.py", "_run"  # behind it, there is nothing left to interrupt
_STEPS = ("fsync", "replace", "rename", "link", "fchmod", "unlink", "remove")
_SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}
_ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EIO", "EFBIG", "EROFS", "ESTALE", "ENOLINK")}


def die() -> None:
    """End as a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Fault:
    """Strike at one step; ``name`` is ``kill before``, ``kill within``, ``kill after``, an errno or a signal."""

    def __init__(self, name: str, at: int) -> None:
        self.name = name
        self.left = at
        self.has_struck = False

    def meet(self, step: str, call: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Do one step, or what is left of it."""
        self.left -= 1
        if self.left > 0 or (self.left < 0 and self.name not in _ERRORS):
            return call()
        if self.name in _ERRORS and step in ("unlink", "remove"):  # a full disk lets go of what it holds
            return call()
        self.has_struck = True
        return self._strike(call, half)

    def _strike(self, call: Callable[[], Any], half: Callable[[], Any] | None) -> Any:
        if self.name in _ERRORS:
            raise OSError(_ERRORS[self.name], os.strerror(_ERRORS[self.name]))
        if self.name == "short":
            return half() if half is not None else call()
        if self.name in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[self.name])
            return call()
        if self.name == "kill within" and half is not None:
            half()
        try:
            if self.name == "kill after":
                call()
        finally:
            die()


class FaultyFile(io.FileIO):
    """Write to the disk as a file does, step by step."""

    fault: Fault

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        write = super().write
        return self.fault.meet("write", lambda: write(view), lambda: write(view[: max(1, len(view) // 2)]))


def install(fault: Fault) -> None:
    """Let every step by which a program changes a file system meet the fault."""

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: fault.meet(name, lambda: function(*args, **options))

    for name in _STEPS:
        setattr(os, name, wrapped(name, getattr(os, name)))
    opened, fdopen = os.open, os.fdopen

    def open_(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if not flags & _CREATING:
            return opened(path, flags, *args, **options)
        return fault.meet("create", lambda: opened(path, flags, *args, **options))

    def fdopen_(handle: int, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
        if mode != "wb":
            return fdopen(handle, mode, buffering, **options)
        file = FaultyFile(handle, "wb")
        file.fault = fault
        return io.BufferedWriter(file, buffering)

    os.open, os.fdopen = open_, fdopen_


class Interruption:
    """Send a signal to the process at one of the calls and returns from one function to the last."""

    def __init__(self, number: int, at: int, since: str) -> None:
        self.number = number
        self.since = since
        self.left = at
        self.count = 0
        self.has_begun = False

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if not self.has_begun:
            if frame.f_code.co_name != self.since:
                return
            self.has_begun = True
        self.count += 1
        code = frame.f_code
        if event == "return" and code.co_name == _LAST[1] and code.co_filename.endswith(_LAST[0]):
            sys.setprofile(None)
        if self.count == self.left:
            sys.setprofile(None)
            os.kill(os.getpid(), self.number)


def run_once(arguments: list[str], prepare: Callable[[], Callable[[], bool]]) -> dict[str, Any]:
    """Run the command in a process of its own; ``prepare`` arms it there and gives what tells whether it struck."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        run_child(arguments, prepare, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read().decode()
    _, status = os.waitpid(child, 0)
    struck, _, errors = said.partition("\n")
    return {"status": os.waitstatus_to_exitcode(status), "struck": struck != "no", "errors": errors}


def run_child(arguments: list[str], prepare: Callable[[], Callable[[], bool]], writing: int) -> None:
    """Be the process; never returns."""
    from ckptool.cli import main

    status = 99
    errors = io.StringIO()
    sys.stdout, sys.stderr = io.StringIO(), errors
    write = os.write
    try:
        has_struck = prepare()
        status = main(arguments)
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException as error:  # whatever leaves the command is a bug: tell it
        errors.write(f"left the command: {error!r}\n")
    finally:
        sys.setprofile(None)
    write(writing, f"{'yes' if has_struck() else 'no'}\n{errors.getvalue()}".encode())
    os._exit(status)


def list_files(folder: Path) -> dict[str, str]:
    """Give every file in a folder, with its content in hexadecimal digits."""
    return {path.name: path.read_bytes().hex() for path in sorted(folder.iterdir())}


def reset(folder: Path, before: dict[str, str]) -> None:
    """Bring a folder back to what it was."""
    for path in folder.iterdir():
        path.unlink()
    for name, content in before.items():
        (folder / name).write_bytes(bytes.fromhex(content))


def trials(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run the command once for each step, until a step is named that there is none of."""
    folder, arguments, name = Path(request["folder"]), request["arguments"], request["fault"]
    before = list_files(folder)
    if request["moments"] is None:
        moments: Iterator[int] = iter(range(1, 1000))
    else:
        moments = iter(spread(count_moments(request, before), request["moments"]))
    for at in moments:
        reset(folder, before)
        row = run_once(arguments, lambda at=at: arm(request, name, at))
        if not row["struck"]:
            return
        yield {**row, "at": at, "files": list_files(folder)}


def arm(request: dict[str, Any], name: str, at: int) -> Callable[[], bool]:
    """Install the fault in this process."""
    if request["moments"] is not None:
        interruption = Interruption(_SIGNALS[name], at, request["since"])
        sys.setprofile(interruption)
        return lambda: interruption.count >= at
    fault = Fault(name, at)
    install(fault)
    return lambda: fault.has_struck


def count_moments(request: dict[str, Any], before: dict[str, str]) -> int:
    """Count the calls and returns at which a signal may come."""
    from ckptool.cli import main

    interruption = Interruption(0, 0, request["since"])
    sys.setprofile(interruption)
    main(request["arguments"])
    sys.setprofile(None)
    reset(Path(request["folder"]), before)
    return interruption.count


def spread(count: int, wanted: int) -> list[int]:
    """Choose moments: all at the start and at the end, where files come and go, and some of those between."""
    edge = min(count, wanted // 3)
    between = range(edge, count - edge, max(1, (count - 2 * edge) // max(1, wanted - 2 * edge)))
    return sorted({*range(1, edge), *between, *range(count - edge, count + 1)})


def answer() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    shown, sys.stdout = sys.stdout, io.StringIO()
    from ckptool.cli import main

    folder = Path(request["folder"])
    before = list_files(folder)
    main(request["arguments"])  # imports what it needs: the processes to come are forked from here
    whole = list_files(folder)
    reset(folder, before)
    json.dump({"whole": whole, "trials": list(trials(request))}, shown)


if __name__ == "__main__":
    answer()
