"""One regular file, open for reading: never blocked on, never mapped, watched for change."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ckptool.errors import UnreadableCheckpoint
from ckptool.model.places import RemotePath
from ckptool.model.sources import CHUNK_BYTES, FileRange

# Without O_NONBLOCK the open of a FIFO waits for a writer that may never come.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC

_OPEN_ERRORS = {
    errno.ENOENT: "there is no such file; check the path",
    errno.ENOTDIR: "a part of the path is no folder; check the path",
    errno.EACCES: "permission denied; ask for the right to read it",
    errno.EPERM: "permission denied; ask for the right to read it",
    errno.ELOOP: "the symbolic links lead in a circle; name the file itself",
    errno.ENAMETOOLONG: "the name is too long for this system; check the path",
    errno.EMFILE: "too many files are open; allow more with ulimit -n",
    errno.ENXIO: "this is a socket or a device, not a file; copy its content into a regular file first",
}

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class InputFile:
    """Read ranges of one open file; ``size`` is in bytes."""

    is_remote = False

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self._stamp = _stamp(os.fstat(fd))
        self.size = self._stamp[0]
        self._spare_buffers: list[bytearray] = []

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        fd, self.fd = self.fd, -1  # a closed number may already belong to another file
        if fd >= 0:
            os.close(fd)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Give exactly ``nbytes`` bytes from ``offset`` on.

        :raises UnreadableCheckpoint: the file ends earlier or cannot be read.
        """
        parts = []
        while nbytes > 0:
            part = self.read_some(offset, nbytes)
            parts.append(part)
            offset += len(part)
            nbytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_some(self, offset: int, nbytes: int) -> bytes:
        """Give up to ``nbytes`` bytes from ``offset`` on, at least one.

        :raises UnreadableCheckpoint: the file ends at ``offset`` or cannot be read.
        """
        try:
            part = os.pread(self.fd, nbytes, offset)
        except OSError as error:
            raise _read_error(error) from error
        if not part:
            raise cut_short(offset)
        return part

    def stream(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Yield ``nbytes`` bytes from ``offset`` on in chunks; each is valid until the next is asked for.

        :raises UnreadableCheckpoint: the file ends early, changed since it was opened, or cannot be read.
        """
        buffer = self._buffer()
        try:
            while nbytes > 0:
                chunk = self._read_into(memoryview(buffer)[: min(nbytes, CHUNK_BYTES)], offset)
                offset += len(chunk)
                nbytes -= len(chunk)
                if nbytes == 0:
                    self.check_unchanged()
                yield chunk
        finally:
            self._spare_buffers.append(buffer)

    def place(self, offset: int, nbytes: int) -> FileRange | None:
        """Say where ``nbytes`` bytes from ``offset`` on lie in the file that is open; None where that is elsewhere."""
        return FileRange(self.fd, offset, nbytes)

    def _buffer(self) -> bytearray:
        try:
            return self._spare_buffers.pop()
        except IndexError:  # asked and not looked for: another thread may take the last one in between
            return bytearray(CHUNK_BYTES)

    def check_unchanged(self) -> None:
        """Compare size, time of the last change and inode with those at the time of opening.

        :raises UnreadableCheckpoint: the file is being written to.
        """
        try:
            stamp = _stamp(os.fstat(self.fd))
        except OSError as error:
            raise _read_error(error) from error
        if stamp != self._stamp:
            raise UnreadableCheckpoint("the file changed while it was read; wait until it is written and try again")

    def _read_into(self, target: memoryview, offset: int) -> memoryview:
        try:
            got = os.preadv(self.fd, [target], offset)
        except OSError as error:
            raise _read_error(error) from error
        if got == 0:
            raise cut_short(offset)
        return target[:got]


class InnerFile(InputFile):
    """Read a file that lies as it is inside another one: ``size`` bytes from byte ``start`` on."""

    def __init__(self, outer: InputFile, start: int, size: int) -> None:
        self.path = outer.path
        self.fd = outer.fd
        self.size = size
        self._outer = outer
        self._start = start
        self._spare_buffers = outer._spare_buffers  # one for all that lie in it: there may be thousands

    def close(self) -> None:
        """Release the outer file; a second call does nothing."""
        self._outer.close()

    def read_some(self, offset: int, nbytes: int) -> bytes:
        """Give up to ``nbytes`` bytes from ``offset`` on, at least one, and none from behind the end.

        :raises UnreadableCheckpoint: the file ends at ``offset`` or cannot be read.
        """
        if offset >= self.size:
            raise cut_short(offset)
        return self._outer.read_some(self._start + offset, min(nbytes, self.size - offset))

    def place(self, offset: int, nbytes: int) -> FileRange | None:
        """Say where ``nbytes`` bytes from ``offset`` on lie in the outer file, as that says it."""
        return self._outer.place(self._start + offset, nbytes)

    def check_unchanged(self) -> None:
        """Compare the outer file with what it was at the time of opening.

        :raises UnreadableCheckpoint: it is being written to.
        """
        self._outer.check_unchanged()

    def _read_into(self, target: memoryview, offset: int) -> memoryview:
        if offset >= self.size:
            raise cut_short(offset)
        return self._outer._read_into(target[: self.size - offset], self._start + offset)


def open_file(path: Path) -> InputFile:
    """Open one regular file for reading; follows symbolic links, never waits. The one at an address is read there.

    :raises UnreadableCheckpoint: it is missing, unreadable, or not a regular file.
    """
    if isinstance(path, RemotePath):
        from ckptool.formats.remote import open_remote  # few files lie elsewhere, and the network is slow to import

        return open_remote(path)
    try:
        fd = os.open(path, _FLAGS)
    except OSError as error:
        remedy = _OPEN_ERRORS.get(error.errno or 0)
        raise UnreadableCheckpoint(remedy or f"it cannot be opened ({error.strerror}); check the path") from error
    except ValueError as error:  # a NUL in the path
        raise UnreadableCheckpoint("this is no possible path; check its characters") from error
    try:
        _refuse_other_kinds(os.fstat(fd).st_mode)
        return InputFile(path, fd)
    except BaseException:
        os.close(fd)
        raise


def is_folder(path: Path) -> bool:
    """Tell whether a path is a folder; what hinders a look at it is told when it is opened."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def listing(folder: Path) -> list[str]:
    """Give the names in a folder, sorted; none where it cannot be listed: what hinders it is told elsewhere."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _refuse_other_kinds(mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for test, name in _KINDS if test(mode)), "no regular file")
    raise UnreadableCheckpoint(f"this is {kind}, not a file; name a regular file")


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def cut_short(offset: int) -> UnreadableCheckpoint:
    """Say that a file ends at ``offset`` (bytes), before what it declares."""
    return UnreadableCheckpoint(f"the file ends at byte {offset}, before what it declares; get it again")


def _read_error(error: OSError) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(f"it cannot be read ({error.strerror}); check the disk and try again")
