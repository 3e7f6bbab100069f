"""One strict JSON document per answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

_ENCODER = json.JSONEncoder(allow_nan=False)
_AT_ONCE = 1000  # items that are encoded in one call; more would only take fresh memory


def answer_json(schema: str, documents: Sequence[Mapping[str, Any]], *, several: bool) -> str:
    """Write the answer of one command: the fields of its one input, or the answers to ``several`` under ``files``."""
    if several:
        return to_json({"schema": schema, "files": documents})
    return to_json({"schema": schema, **documents[0]})


def to_json(document: Mapping[str, Any]) -> str:
    """Write one document: a field per line, an item of a top-level list per line, ASCII only, exact integers.

    JSON has no word for a number that is not finite: it becomes ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``. An
    integer too long for Python to write in decimal becomes hexadecimal text.
    """
    fields = [f"  {_encode(name)}: {_field(value)}" for name, value in document.items()]
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _field(value: Any) -> str:
    if not isinstance(value, list | tuple) or not value:
        return _encode(value)
    if not isinstance(value[0], Mapping) or not value[0]:
        return "[\n    " + ",\n    ".join(map(_encode, value)) + "\n  ]"
    # One call for many items is twice as fast. A bare quote before a letter opens a text and never ends one: what is
    # looked for here stands between two items (or in a list below one, where a line break does no harm either).
    opening = f'{{"{next(iter(value[0]))}": '
    texts = [_encode(value[start : start + _AT_ONCE])[1:-1] for start in range(0, len(value), _AT_ONCE)]
    items = [text.replace(f"}}, {opening}", f"}},\n    {opening}") for text in texts]
    return "[\n    " + ",\n    ".join(items) + "\n  ]"


def _encode(value: Any) -> str:
    try:
        text = _ENCODER.encode(value)
    except ValueError:
        text = _ENCODER.encode(_strict(value))
    # The one control character that JSON lets through.
    return text.replace("\x7f", "\\u007f")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _strict(child) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if type(value) is int and value.bit_length() > 4096:
        return hex(value)
    return value
