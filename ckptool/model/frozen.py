"""Dataclasses that the type checker keeps frozen, and that cost little while the program runs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(*, frozen: bool = False, slots: bool = False, eq: bool = True) -> Any:
        """Make a dataclass that can be hashed where it can be compared, but guard nothing against being set.

        To guard it would triple what each instance costs, and a file may hold 100,000; it would also take twice as long
        to make the class, and fifty are made before any command begins.
        """
        return dataclasses.dataclass(slots=slots, eq=eq, unsafe_hash=frozen and eq)
