"""Read JSON more strictly than Python does."""

from __future__ import annotations

import json
from typing import Any


def strictly(text: str) -> Any:
    """Parse one document; NaN and Infinity are no JSON, and no field may stand twice."""
    return json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({name for name, _ in pairs}) == len(pairs)
    return dict(pairs)
