"""Hold a test to what no file may exceed or cause: time, memory, and any action of its own.

A file is described by ``model``, ``formats`` and ``layouts``; whatever happens there beyond reading is taken to be its
doing. The other rooms act for the user: they may import, and the writers may write.
"""

from __future__ import annotations

import codecs
import dis
import importlib
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ckptool

SECONDS = 10  # of processor time: another program that keeps the machine busy is no fault of the file's
WAITING_SECONDS = 120
NBYTES = 1 << 30

_PACKAGE = f"{Path(ckptool.__file__).parent}{os.sep}"
_IMPORTLIB = ("<frozen importlib", f"{Path(importlib.__file__).parent}{os.sep}")
_NAMELESS = tempfile.TemporaryFile.__code__
_IMPORT_STATEMENT = dis.opmap["IMPORT_NAME"]

_PROCESSES = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "subprocess.", "pty."),
    *("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "poplib.", "imaplib.", "ctypes.", "webbrowser."),
    *("pickle.", "code.", "tempfile.", "shutil.", "builtins.input", "os.kill", "sys.settrace"),
)
_PROGRAMS = ("import", "exec", "compile", "marshal.")
_FILES = ("open", "os.remove", "os.rename", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate", "os.rmdir")
_FOLDERS = ("os.mkdir",)
_WATCHED = (*_PROCESSES, *_PROGRAMS, *_FILES, *_FOLDERS)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# What each room must not do, all of it unless it is named here.
_FORBIDDEN: dict[str, tuple[str, ...]] = {
    "__init__.py": (),  # imports the rooms of the API when they are first asked for
    "operations": (*_PROCESSES, *_FILES, *_FOLDERS),
    "reports": (*_PROCESSES, *_FILES, *_FOLDERS),
    "cli": (*_PROCESSES, *_FILES),  # --out-dir makes a folder
    "writers": _PROCESSES,
    # What the user names by an address is asked for there.
    "formats/remote/http.py": tuple(event for event in _WATCHED if event not in ("socket.", "http.")),
    "formats/remote/buckets.py": (),  # libraries of others sign in there
    "operations/parallel.py": (),  # reads many files in processes of its own
    "loading": (),  # builds and runs the model that the user names
    "verification": (),
}


class Acted(BaseException):
    """Stop what a file has caused; nothing that handles errors may handle it."""


class Watch:
    """Record and stop every action of a file; an audit hook stays for good, so this one has a switch."""

    def __init__(self) -> None:
        self.is_on = False
        self.is_installed = False
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.is_on and event.startswith(_WATCHED) and _is_offence(event, args, sys._getframe(1)):
            self.seen.append(f"{event} {args!r:.200}")
            raise Acted(self.seen[-1])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what happens inside, and fail if anything was caught, even where the program went on."""
        if not self.is_installed:
            sys.addaudithook(self)
            self.is_installed = True
        self.seen.clear()
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False
        assert self.seen == []


WATCH = Watch()
codecs.lookup("cp437")  # the one codec that the zip format itself names: Python imports it when it is first used


def _is_offence(event: str, args: tuple[Any, ...], frame: FrameType) -> bool:
    if event == "open" and not (isinstance(args[0], str | bytes) and args[2] & _WRITING and args[0] != os.devnull):
        return False
    place = _place(frame, is_import=event == "import")
    if place is None:
        return False
    forbidden = _FORBIDDEN.get(place, _FORBIDDEN.get(place.partition("/")[0], _WATCHED))
    return event.startswith(forbidden)


def _place(frame: FrameType | None, *, is_import: bool) -> str | None:
    """Give the module of the package in which something happens.

    None where a module is being imported by a statement, or where it is a temporary file without a name.
    """
    place = None
    while frame is not None:
        code = frame.f_code
        if code is _NAMELESS or (is_import and code.co_code[frame.f_lasti] == _IMPORT_STATEMENT):
            return None
        is_import = code.co_filename.startswith(_IMPORTLIB)
        if place is None and code.co_filename.startswith(_PACKAGE):
            place = code.co_filename[len(_PACKAGE) :]
        frame = frame.f_back
    return place


@contextmanager
def limited_time(seconds: float = SECONDS, waiting_seconds: float = WAITING_SECONDS) -> Iterator[None]:
    """Fail what computes, or waits, for longer."""

    def fail(number: int, _: FrameType | None) -> None:
        raise Acted(f"it took more than {waiting_seconds if number == signal.SIGALRM else seconds} seconds")

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, seconds), signal.ITIMER_REAL: (signal.SIGALRM, waiting_seconds)}
    before = {number: signal.signal(number, fail) for number, _ in timers.values()}
    for timer, (_, limit) in timers.items():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def limited_memory(nbytes: int = NBYTES) -> Iterator[None]:
    """Let the process, torch and all, grow by no more private memory: beyond it there is a ``MemoryError``."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_private_bytes() + nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _private_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmData:")[2].split()[0]) << 10
