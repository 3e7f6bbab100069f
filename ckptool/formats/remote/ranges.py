"""What a place elsewhere must be able to do: give ranges of one file, and say which version of it they are of."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ckptool.errors import UnreadableCheckpoint


class Piece(NamedTuple):
    """Hold some bytes of a file, its whole size in bytes, and what tells this version of it from another."""

    data: bytes
    size: int
    version: tuple[str, ...]


class Ranges(Protocol):
    """Fetch ranges of one file."""

    def fetch(self, start: int, stop: int) -> Piece:
        """Give the bytes from ``start`` to ``stop``, or to the end where that is earlier; a file may be empty.

        :raises UnreadableCheckpoint: the file is not there, may not be read, or not by ranges.
        """

    def close(self) -> None:
        """Let the connection go."""


def changed() -> UnreadableCheckpoint:
    """Say that two pieces are not of one version."""
    return UnreadableCheckpoint("the file changed while it was read; wait until it is written and try again")
