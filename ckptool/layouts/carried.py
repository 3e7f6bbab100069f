"""Read back what an earlier conversion carried over into the text metadata of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckptool.model.training import (
    CARRIED_HYPER_PARAMETERS,
    CARRIED_TRAINING,
    FACT_TABLES,
    SINGLE_FACTS,
    Fact,
    Training,
)
from ckptool.model.values import DictNode

_DEEPEST = 100


def carried_training(metadata: Mapping[str, str]) -> Training | None:
    """Give the facts in the metadata; None where there are none that can be read."""
    said = _parsed(metadata.get(CARRIED_TRAINING))
    settings = _parsed(metadata.get(CARRIED_HYPER_PARAMETERS))
    if said is None and settings is None:
        return None
    found = said or DictNode()
    facts: dict[str, Any] = {name: _fact(found.get(name)) for name in SINGLE_FACTS}
    for name in FACT_TABLES:
        table = found.get(name)
        facts[name] = {key: Fact(value, CARRIED_TRAINING) for key, value in _items(table)}
    places = (CARRIED_HYPER_PARAMETERS,) if settings is not None else ()
    return Training(**facts, hyper_parameters=settings or DictNode(), hyper_parameter_sources=places)


def _fact(value: Any) -> Fact | None:
    return None if value is None or isinstance(value, DictNode | list) else Fact(value, CARRIED_TRAINING)


def _items(table: Any) -> list[tuple[str, Any]]:
    values = table.text_items().items() if isinstance(table, DictNode) else ()
    return [(name, value) for name, value in values if _fact(value) is not None]


def _parsed(text: str | None) -> DictNode | None:
    """Read one JSON object as a value tree: the text is foreign, whatever wrote it first."""
    if text is None:
        return None
    try:
        value = _node(json.loads(text), 0)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, DictNode) else None


def _node(value: Any, depth: int) -> Any:
    if depth > _DEEPEST:
        raise RecursionError
    if isinstance(value, dict):
        return DictNode([(key, _node(child, depth + 1)) for key, child in value.items()])
    return [_node(child, depth + 1) for child in value] if isinstance(value, list) else value
