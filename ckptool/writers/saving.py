"""Write what a command is asked to keep beside its answer: a new file, published whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ckptool.errors import OutputRefused
from ckptool.writers.staging import StagedFile, staging


def require_new(path: Path) -> None:
    """Refuse a path that exists; to be asked before the work whose result goes there.

    :raises OutputRefused: it exists.
    """
    if path.exists() or path.is_symlink():
        raise OutputRefused(f"{path}: exists already; name another file, or delete it first")


def save(path: Path, write: Callable[[StagedFile], object]) -> None:
    """Write a new file through ``write`` and publish it.

    :raises OutputRefused: the path exists, cannot be created, or the disk refuses.
    """
    require_new(path)
    with staging(path) as staged:
        write(staged)
        staged.publish()
