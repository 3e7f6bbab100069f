"""Carry what a container says about its training over into the text metadata of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptool.layouts import read_training
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.plans import Selection
from ckptool.model.training import (
    CARRIED_HYPER_PARAMETERS,
    CARRIED_TRAINING,
    FACT_TABLES,
    SINGLE_FACTS,
    Training,
)
from ckptool.operations.plain import to_plain


@dataclass(frozen=True, slots=True)
class CarriedFacts:
    """Hold the metadata ``text``, and the ``places`` in the container that it says in full."""

    text: Mapping[str, str]
    places: frozenset[str]


NO_FACTS = CarriedFacts({}, frozenset())


def facts_as_text(checkpoint: Checkpoint, selection: Selection) -> CarriedFacts:
    """Write training facts and hyperparameters as JSON texts, sorted, so that the same input gives the same bytes."""
    training = read_training(checkpoint, selection)
    said = facts_said(training)
    text = {CARRIED_TRAINING: _json(said)} if said else {}
    if training.hyper_parameters:
        text[CARRIED_HYPER_PARAMETERS] = _json(to_plain(training.hyper_parameters))
    facts = (training.epoch, training.global_step, *training.versions.values(), *training.metrics.values())
    places = {fact.evidence for fact in facts if fact is not None}
    return CarriedFacts(text, frozenset(places.union(training.hyper_parameter_sources)))


def facts_said(training: Training) -> dict[str, Any]:
    """Give the training facts as plain values, by name; what the file does not say is not there."""
    single = {name: getattr(training, name) for name in SINGLE_FACTS}
    tables = {name: getattr(training, name) for name in FACT_TABLES}
    return {
        **{name: to_plain(fact.value) for name, fact in single.items() if fact is not None},
        **{name: {key: to_plain(fact.value) for key, fact in table.items()} for name, table in tables.items() if table},
    }


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
