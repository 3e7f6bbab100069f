"""A checkpoint in several files: each read by itself, and told by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ckptool.errors import UnreadableCheckpoint
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.values import GlobalRef, GlobalUse

Read = Callable[[Path], Checkpoint]


def read_one(path: Path, read: Read) -> Checkpoint:
    """Read one of the files in a folder; a refusal names it.

    :raises UnreadableCheckpoint: it cannot be read.
    """
    try:
        return read(path)
    except UnreadableCheckpoint as error:
        error.args = (f"{path.name!r:.100}: {error}",)
        error.globals = tuple(placed_uses(path.name, error.globals))
        raise


def placed_uses(name: str, uses: Iterable[GlobalUse]) -> Iterator[GlobalUse]:
    """Say of what a pickle names in which file it does."""
    return (replace(use, where=f"{name}: {use.where}") for use in uses)


def all_uses(named: Iterable[tuple[str, Checkpoint]]) -> Iterator[GlobalUse]:
    """List what every file names; what is harmless, and the same in all of them, once."""
    said: set[tuple[GlobalRef, bool]] = set()
    for name, part in named:
        for use in placed_uses(name, part.globals):
            if use.ref.severity != "safe" or (use.ref, use.called) not in said:
                said.add((use.ref, use.called))
                yield use
