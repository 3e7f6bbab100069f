"""A table that an archive keeps as JSON, read so that no two readers could disagree on it."""

from __future__ import annotations

import json
from typing import Any

from ckptool.model.repeats import first_repeated


def read_json(data: bytes) -> Any:
    """Parse JSON in UTF-8.

    :raises ValueError: it is none, nests too deeply, or holds a name twice in one object.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError(f"it holds {first_repeated(name for name, _ in pairs)!r:.100} twice")
    return table
