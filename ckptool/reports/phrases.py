"""Plain values as one short line for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MAX_ITEMS = 8
_MAX_DEPTH = 4
_FORMATS = {
    "torch-shards": "torch shards",
    "safetensors-shards": "safetensors shards",
    "torch-distributed": "torch distributed",
    "deepspeed-zero": "DeepSpeed ZeRO",
    "safetensors": "safetensors",
    "torch-zip": "torch zip",
    "torch-legacy": "torch before 1.6",
    "torch-tar": "torch tar",
    "torchscript": "TorchScript",
    "torch-export": "torch.export",
    "pickle": "plain pickle",
    "npy": "NumPy array",
    "npz": "NumPy archive",
}


def format_phrase(name: str) -> str:
    """Name a container as people do."""
    return _FORMATS.get(name, name)


def value_phrase(value: Any, depth: int = 0) -> str:
    """Write a plain value (``operations/plain.py``) as Python would; long and deep ones are cut with ``...``.

    The text is not yet safe to show.
    """
    if isinstance(value, Mapping):
        return _mapping(value, depth)
    if isinstance(value, list | tuple):
        items = [value_phrase(item, depth + 1) for item in _first(list(value), depth)]
        return f"[{', '.join(_with_rest(items, len(value)))}]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return repr(value) if isinstance(value, str) and depth else str(value)


def _first(items: list[Any], depth: int) -> list[Any]:
    return [] if depth >= _MAX_DEPTH else items[:_MAX_ITEMS]


def _with_rest(shown: list[str], count: int) -> list[str]:
    return shown if count <= len(shown) else [*shown, f"... {count - len(shown):,} more"]


def _mapping(value: Mapping[str, Any], depth: int) -> str:
    if "$tensor" in value:
        return f"tensor({value['$tensor']}, {value.get('shape')})"
    fields = [(name, child) for name, child in value.items() if name != "$class"]
    joint = "=" if "$class" in value else ": "
    shown = [f"{name}{joint}{value_phrase(child, depth + 1)}" for name, child in _first(fields, depth)]
    text = ", ".join(_with_rest(shown, len(fields)))
    return f"{value['$class']}({text})" if "$class" in value else f"{{{text}}}"
