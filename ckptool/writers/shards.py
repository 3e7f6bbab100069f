"""Publish several files together: staged in a hidden folder, moved into place in an order that never looks whole.

The layout of the index is that of huggingface_hub, ``serialization/_torch.py`` (``save_torch_state_dict``).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any, BinaryIO

from ckptool.errors import OutputRefused
from ckptool.writers.staging import create_hidden, move_to_new_name, refusals_of, require_space, sync_folder, syncing

_STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def encode_index(homes: Mapping[str, str], total_bytes: int, metadata: Mapping[str, str]) -> bytes:
    """Write an index: the file of every tensor, and the bytes of all of them."""
    stated = {"total_size": total_bytes, **metadata}
    return (json.dumps({"metadata": stated, "weight_map": dict(homes)}, indent=2) + "\n").encode()


@dataclass(slots=True, eq=False)
class StagedFolder:
    """Hold files that nobody can see yet: write them with ``create``, read them again in ``path``, then ``publish``.

    ``names`` are those of the weights, ``index_name`` is empty where one file needs none. ``replaced`` are the names
    that make room, with their permissions: what is left of them when all is published belonged to what was there
    before. A file keeps the permissions of the one that it replaces, and a new one beside those gets none that they
    did not all have. A disk that fails in the midst of that leaves the files ``is_half_published``, and nothing is
    removed.
    """

    path: Path
    names: tuple[str, ...]
    index_name: str
    replaced: Mapping[str, int]
    _target: Path
    is_half_published: bool = False

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Write one of the files; on leaving it is on the disk."""
        shared = reduce(and_, self.replaced.values()) if self.replaced else None
        with create_hidden(self.path / name, self.replaced.get(name, shared)) as file:
            with syncing(file):
                yield file
                file.flush()
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Give all files their names, the index last; until then nothing in the folder passes for a whole.

        :raises OutputRefused: one of the names has come to exist meanwhile and must not be replaced.
        """
        sync_folder(self.path)
        with _undisturbed():
            if self.path.parent != self._target:
                self.path.rename(self._target)
            elif self.replaced:
                self._replace_or_keep()
            else:
                self._move_to_new_names()
        sync_folder(self._target if self.path.parent == self._target else self._target.parent)

    def _move_to_new_names(self) -> None:
        moved: list[Path] = []
        try:
            for name in self._all_names():
                move_to_new_name(self.path / name, self._target / name)
                moved.append(self._target / name)
        except BaseException:
            for path in moved:
                path.unlink()
            raise

    def _replace_or_keep(self) -> None:
        try:
            self._replace()
        except OSError as error:
            self.is_half_published = True
            raise OutputRefused(
                f"{self._target}: the disk failed while files were replaced ({error.strerror}); "
                f"those that are not in place yet are in {self.path}: move them, the index last"
            ) from error

    def _replace(self) -> None:
        """Take the index away, then the first file, and give both back last: in between, a part is missing."""
        first, *others = self.names
        stale = set(self.replaced).difference(self._all_names())
        for name in (self.index_name, *sorted(stale & _indexes(stale))):
            self._forget(name)
        if others:
            self._forget(first)
        sync_folder(self._target)
        for name in (*others, first):
            (self.path / name).replace(self._target / name)
        if self.index_name:
            sync_folder(self._target)
            (self.path / self.index_name).replace(self._target / self.index_name)
        for name in stale:
            self._forget(name)

    def _all_names(self) -> tuple[str, ...]:
        return (*self.names, self.index_name) if self.index_name else self.names

    def _forget(self, name: str) -> None:
        if name:
            (self._target / name).unlink(missing_ok=True)


def _indexes(names: set[str]) -> set[str]:
    return {name for name in names if name.endswith(".json")}


@contextmanager
def staging_folder(
    folder: Path, names: Sequence[str], index_name: str, *, replaced: Sequence[str] = (), nbytes: int = 0
) -> Iterator[StagedFolder]:
    """Stage files for ``folder`` and remove them on leaving, unless they were published.

    A folder that does not exist yet comes into being with all its files at once. In one that does, ``replaced`` are
    the files that may go; a symbolic link among them is replaced itself, not what it leads to. ``nbytes`` is what is
    about to be written.

    :raises OutputRefused: a name is taken, the folder cannot be made or written to, or the disk is full.
    """
    with refusals_of(folder):
        target = Path(os.path.realpath(folder))
        beside = target if target.is_dir() else target.parent
        modes = {name: _mode_of(target / name) for name in replaced}
        require_space(folder, beside, nbytes)
        path = beside / f".ckptool-{secrets.token_hex(8)}.tmp"
        staged = StagedFolder(path, tuple(names), index_name, modes, target)
        try:
            path.mkdir()
            yield staged
        finally:
            if not staged.is_half_published:
                _remove_surely(path)


def _mode_of(path: Path) -> int:
    """Give the permissions of a file that is to be replaced, or of what a link there leads to."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        with suppress(OSError):  # it leads nowhere: nobody can read what is there
            return stat.S_IMODE(path.stat().st_mode) & 0o777
        return 0o600
    if not stat.S_ISREG(mode):
        raise OutputRefused(f"{path}: is no file; move it away, or write to another folder")
    return stat.S_IMODE(mode) & 0o777


def _remove_surely(folder: Path) -> None:
    try:
        _remove(folder)
    finally:
        _remove(folder)  # a signal may have come before the first attempt


def _remove(folder: Path) -> None:
    with suppress(OSError):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let signals wait: the names change within milliseconds, and half of them would be no checkpoint."""
    before: Any = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
