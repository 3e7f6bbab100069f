"""Publish a file whole or not at all: written beside its target, synced, then moved into place."""

from __future__ import annotations

import _thread
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from ckptool.errors import OutputRefused

_BUFFER_BYTES = 1 << 17  # gathers headers and small tensors; larger chunks pass through it
_SYNC_BYTES = 1 << 26  # enough for the disk to be at work, little enough to be soon done at the end
_SYNC_SECONDS = 0.02
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or write to another one",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EFBIG: "the file is larger than the system or a limit allows; write elsewhere or raise the limit",
    errno.EIO: "the disk reports an input/output error; write to another one",
    errno.EACCES: "no permission to write in its folder; write elsewhere or change the permissions",
    errno.EPERM: "no permission to write in its folder; write elsewhere or change the permissions",
    errno.EROFS: "its folder is on a read-only file system; write elsewhere",
    errno.ENOENT: "its folder does not exist; create it first",
    errno.ENOTDIR: "a part of the path is no folder; correct the path",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
    errno.ELOOP: "its symbolic links lead in a circle; correct the path",
    errno.EEXIST: "exists already; add --force to replace it",
    errno.ENOTEMPTY: "exists already; add --force to replace what is in it",
    errno.EISDIR: "is a folder; name a file in it",
}


@dataclass(slots=True, eq=False)
class StagedFile:
    """Hold a file that nobody can see yet: write into ``file``, read ``path`` again, then ``publish``."""

    file: BinaryIO
    path: Path
    _destination: Path
    _replace: bool

    def sync(self) -> None:
        """Bring everything written so far to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def publish(self) -> None:
        """Give the file its name, at once and for good.

        :raises OutputRefused: the target has come to exist meanwhile and must not be replaced.
        """
        self.sync()
        if self._replace:
            self.path.replace(self._destination)
        else:
            move_to_new_name(self.path, self._destination)
        sync_folder(self._destination.parent)


@contextmanager
def syncing(file: BinaryIO) -> Iterator[None]:
    """Bring what the block writes into a large file to the disk while it is at work: less is left to wait for.

    :raises OSError: the disk refused.
    """
    # Bare locks and a bare thread: a signal that comes inside those of ``threading`` leaves them half locked.
    work, at_work, finished = _Syncing(file.fileno()), Lock(), Lock()
    at_work.acquire()
    finished.acquire()
    _thread.start_new_thread(work.run, (at_work, finished))
    try:
        yield
    finally:
        at_work.release()
        finished.acquire()  # before the file is closed: its number may be another's then
    if work.failure is not None:
        raise work.failure  # the system tells of it once


@dataclass(slots=True)
class _Syncing:
    handle: int
    failure: OSError | None = None

    def run(self, at_work: Lock, finished: Lock) -> None:
        """Sync what has come, time and again, as long as somebody is at work."""
        synced = 0
        try:
            while not at_work.acquire(timeout=_SYNC_SECONDS):
                size = os.fstat(self.handle).st_size
                if size - synced >= _SYNC_BYTES:
                    os.fsync(self.handle)
                    synced = size
        except OSError as error:
            self.failure = error
        finally:
            finished.release()


@contextmanager
def staging(target: str | Path, *, force: bool = False, nbytes: int = 0) -> Iterator[StagedFile]:
    """Stage a file beside ``target`` and remove it on leaving, unless it was published.

    A symbolic link is followed: the file it leads to is replaced. A new file gets the mode that the umask allows,
    a replaced one keeps its mode. ``nbytes`` is what is about to be written. An ``OSError`` that leaves the block
    is taken for one of the target: readers translate their own.

    :raises OutputRefused: the target exists (without ``force``), is no regular file, cannot be created, does not fit
        on the disk, or the disk refuses while it is written.
    """
    with refusals_of(target):
        destination, mode = _find_destination(target, force)
        require_space(target, destination.parent, nbytes)
        # Not made from the target's name: that may already be as long as the file system allows.
        path = destination.parent / f".ckptool-{secrets.token_hex(8)}.tmp"
        try:
            # Inside: a signal may come between the moment the file exists and the moment it has a name here.
            with create_hidden(path, mode) as file:
                yield StagedFile(file, path, destination, force)
        finally:
            try:
                _remove(path)
            finally:
                _remove(path)  # a signal may have come before the first attempt


@contextmanager
def refusals_of(target: str | Path) -> Iterator[None]:
    """Take every ``OSError`` inside for one of the target, and say what would settle it."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, f"it cannot be written ({error.strerror}); write elsewhere")
        raise OutputRefused(f"{target}: {reason}") from error


def _find_destination(target: str | Path, force: bool) -> tuple[Path, int | None]:
    """Follow the links and give the place to write to, with the mode of the file that is replaced there."""
    text = os.fspath(target)
    if text.endswith(os.sep):
        raise OutputRefused(f"{text}: names a folder; name a file in it")
    try:
        destination = Path(os.path.realpath(text))
    except ValueError as error:
        raise OutputRefused(f"{text!a}: is no possible file name; choose another") from error
    try:
        mode = destination.lstat().st_mode
    except FileNotFoundError:
        return destination, None
    if stat.S_ISDIR(mode):
        raise OutputRefused(f"{text}: is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise OutputRefused(f"{text}: is a device, pipe, socket or broken link, not a file; choose another name")
    if not force:
        raise OutputRefused(f"{text}: exists already; add --force to replace it")
    return destination, stat.S_IMODE(mode) & 0o777


def require_space(target: str | Path, folder: Path, nbytes: int) -> None:
    """Refuse to begin where the disk has no room for ``nbytes``."""
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    # Some network and FUSE file systems report no size at all.
    if space.f_blocks and free < nbytes:
        raise OutputRefused(
            f"{target}: needs {nbytes} bytes where {free} are free; free some space or write to another disk"
        )


def create_hidden(path: Path, mode: int | None) -> BinaryIO:
    """Create a file that is not there yet, with the permissions ``mode``, or those that the umask allows."""
    # Mode 0666 lets the kernel apply the umask, which cannot be read without changing it for all threads.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, 0o666 if mode is None else 0o600)
    if mode is not None:
        os.fchmod(handle, mode)
    return os.fdopen(handle, "wb", buffering=_BUFFER_BYTES)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def move_to_new_name(path: Path, destination: Path) -> None:
    """Publish under a name that must be free: of two writers that race for it, one fails."""
    try:
        destination.hardlink_to(path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _claim_and_replace(path, destination)


def _claim_and_replace(path: Path, destination: Path) -> None:
    """Do the same where the file system knows no hard links (FAT, some network folders)."""
    os.close(os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        path.replace(destination)
    except BaseException:
        destination.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    # The file is published by now; a folder that cannot be opened or synced (no read permission, some network
    # file systems) leaves nothing to refuse.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
