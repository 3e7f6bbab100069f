"""Every way in which ckptool refuses: one base error, few subclasses, one sentence each.

A message names the culprit first and the remedy last.
"""

from __future__ import annotations

from typing import Any

AGAIN = "get the file again"  # the remedy where its bytes are not those that were written


class CkptoolError(Exception):
    """Say in one sentence what could not be answered and what would settle it (exit status 2)."""


class UnreadableCheckpoint(CkptoolError):
    """Refuse a file that is damaged, hostile, of another kind, or open to two readings.

    ``globals`` are the ``GlobalUse`` values found before the reader gave up: a broken rest hides nothing.
    """

    globals: tuple[Any, ...] = ()


class ChecksumMismatch(UnreadableCheckpoint):
    """Refuse bytes whose checksum is not the one stored beside them."""


class IncompleteCheckpoint(UnreadableCheckpoint):
    """Refuse a checkpoint in several files of which some, or some tensors, are not there."""


class SourceUnavailable(CkptoolError):
    """Give up on an open file elsewhere: its server let go, or it changed; what was said of its content stays open."""


class UnsupportedTensor(CkptoolError):
    """Refuse a tensor that is understood but cannot be carried over without changing it."""


class PlanRefused(CkptoolError):
    """Refuse to guess which tensors are meant or what their clean keys are.

    ``code`` is stable: ``collision``, ``choose``, ``flat-param``, ``sharded``, ``ref-missing``, ``ref-tie``,
    ``partial-prefix``, ``bad-key``, ``no-weights``, ``nameless``, ``bad-map``, ``not-found``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class OutputRefused(CkptoolError):
    """Refuse to write: the target exists, is no regular file, or cannot be created."""
