"""Many small named tuples, for less than each by itself."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

Row = TypeVar("Row", bound="tuple[Any, ...]")


def make_rows(kind: type[Row], *columns: Iterable[Any]) -> list[Row]:
    """Make a list of named tuples from their fields by column, which all have the same length.

    The call of a named tuple is Python code and takes twice as long; with 50,000 tensors that shows.
    """
    make: Any = partial(tuple.__new__, kind)
    return list(map(make, zip(*columns, strict=True)))
