"""Carry what a container says about its training over into the text metadata of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptool.layouts import read_training
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.plans import Selection
from ckptool.model.training import Fact, Training
from ckptool.operations.plain import to_plain

TRAINING_KEY = "ckptool.training"
HYPER_PARAMETERS_KEY = "ckptool.hyper_parameters"


@dataclass(frozen=True, slots=True)
class CarriedFacts:
    """Hold the metadata ``text``, and the ``places`` in the container that it says in full."""

    text: Mapping[str, str]
    places: frozenset[str]


NO_FACTS = CarriedFacts({}, frozenset())


def facts_as_text(checkpoint: Checkpoint, selection: Selection) -> CarriedFacts:
    """Write training facts and hyperparameters as JSON texts, sorted, so that the same input gives the same bytes."""
    training = read_training(checkpoint, selection)
    said = {name: to_plain(value) for name, value in _said(training, selection).items()}
    text = {TRAINING_KEY: _json(said)} if said else {}
    if training.hyper_parameters:
        text[HYPER_PARAMETERS_KEY] = _json(to_plain(training.hyper_parameters))
    facts = (training.epoch, training.global_step, *training.versions.values(), *training.metrics.values())
    places = {fact.evidence for fact in facts if fact is not None}
    return CarriedFacts(text, frozenset(places.union(training.hyper_parameter_sources)))


def _said(training: Training, selection: Selection) -> dict[str, Any]:
    facts: dict[str, Fact | None] = {
        "epoch": training.epoch,
        "global_step": training.global_step,
        "monitor": training.monitor,
        "learning_rate": training.learning_rate,
    }
    said = {name: fact.value for name, fact in facts.items() if fact is not None}
    if training.metrics:
        said["metrics"] = {name: fact.value for name, fact in training.metrics.items()}
    if said and selection.producer.name:
        said["producer"] = f"{selection.producer.name} {selection.producer.version or ''}".strip()
    return said


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
