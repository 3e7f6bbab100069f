"""One strict JSON document per answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

_DELETE = "\x7f"  # the one control character that JSON lets through
_ENCODER = json.JSONEncoder(allow_nan=False)


class Encoded(tuple[str, ...]):
    """Hold the items of a list that are JSON already: 50,000 of a kind are faster written than described."""


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
    pieces = ["{\n"]
    for name, value in document.items():
        pieces += (f"  {to_text(name)}: ", *_field(value), ",\n")
    return "".join((*pieces[:-1], "\n}\n"))


def _field(value: Any) -> Sequence[str]:
    if not isinstance(value, list | tuple) or not value:
        return (to_text(value),)
    items = value if isinstance(value, Encoded) else map(to_text, value)
    return "[\n    ", ",\n    ".join(items), "\n  ]"


def to_text(value: Any) -> str:
    """Write one value on one line, as ``to_json`` does."""
    if isinstance(value, Encoded):
        return "[" + ", ".join(value) + "]"
    if isinstance(value, Mapping) and any(isinstance(child, Encoded) for child in value.values()):
        return "{" + ", ".join([f"{to_text(name)}: {to_text(child)}" for name, child in value.items()]) + "}"
    try:
        text = _ENCODER.encode(value)
    except ValueError:
        text = _ENCODER.encode(_strict(value))
    return text.replace(_DELETE, "\\u007f")


def encode_texts(texts: Sequence[str]) -> list[str]:
    """Write each text, far faster than one by one."""
    # A quote inside a text has a backslash before it, and a line break is written: neither stands inside of one.
    return to_text(texts)[1:-1].replace('", "', '"\n"').split("\n") if texts else []


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
