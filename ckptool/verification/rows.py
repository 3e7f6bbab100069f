"""Inputs as rows, made or read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """Give some rows of one of the model's arguments."""

    def __len__(self) -> int:
        """Count the rows."""

    def take(self, places: Sequence[int]) -> Tensor:
        """Give some rows, shape (len(places), ...)."""


@dataclass(frozen=True, slots=True, eq=False)
class Stacked:
    """Give rows of a tensor; with ``prepare`` as that makes them."""

    tensor: Tensor
    prepare: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, places: Sequence[int]) -> Tensor:
        """Give some rows."""
        rows = self.tensor[list(places)]
        return rows if self.prepare is None else self.prepare(rows)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Give rows that are computed, each from its place alone; the longest beginning asked for is kept."""

    count: int
    draw: Callable[[int], Tensor]
    _kept: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def take(self, places: Sequence[int]) -> Tensor:
        """Give some rows."""
        for place in range(len(self._kept), max(places) + 1):
            self._kept.append(self.draw(place))
        return torch.stack([self._kept[place] for place in places])


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """Give the rows of one source, then those of another."""

    first: Rows
    second: Rows

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def take(self, places: Sequence[int]) -> Tensor:
        """Give some rows."""
        return torch.stack([self._one(place) for place in places])

    def _one(self, place: int) -> Tensor:
        split = len(self.first)
        return (self.first.take([place]) if place < split else self.second.take([place - split]))[0]


@dataclass(frozen=True, slots=True, eq=False)
class Turned:
    """Give the rows of another source from a later one on, the first ones last."""

    rows: Rows
    by: int

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Sequence[int]) -> Tensor:
        """Give some rows."""
        return self.rows.take([(place + self.by) % len(self.rows) for place in places])
