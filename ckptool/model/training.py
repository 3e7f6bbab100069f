"""What a checkpoint says about the training that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptool.model.values import DictNode

# The text metadata under which a conversion to safetensors carries facts over, as JSON.
CARRIED_TRAINING = "ckptool.training"
CARRIED_HYPER_PARAMETERS = "ckptool.hyper_parameters"

# The fields of ``Training`` that hold one fact, and those that hold facts by name.
SINGLE_FACTS = (
    *("epoch", "global_step", "monitor", "mode", "learning_rate"),
    *("optimizer", "compiled", "strategy", "ema"),
)
FACT_TABLES = ("metrics", "versions")


@dataclass(frozen=True, slots=True)
class Fact:
    """State one value and where it was found: the dotted path in the file, or a sentence where it is a conclusion."""

    value: Any
    evidence: str


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """Gather what stands beside the weights; None and empty mean that the file does not say.

    ``metrics`` maps names to numbers: a checkpoint's own score under the metric's name, the best one so far under
    ``best_`` and the name. ``monitor`` is the metric that the trainer chose by, ``mode`` is ``min`` or ``max``.
    ``compiled`` and ``ema`` hold True or False, ``strategy`` a word (``ddp``, ``fsdp``, ``deepspeed``).
    ``versions`` maps libraries to version texts. ``hyper_parameters`` is a value tree: configuration objects as
    mappings, other foreign objects as stubs. ``hyper_parameter_sources`` are the places that it comes from: the
    first gives its names, each further one is a mapping of its own under the name of its place.
    """

    epoch: Fact | None = None
    global_step: Fact | None = None
    metrics: Mapping[str, Fact] = field(default_factory=dict)
    monitor: Fact | None = None
    mode: Fact | None = None
    learning_rate: Fact | None = None
    optimizer: Fact | None = None
    versions: Mapping[str, Fact] = field(default_factory=dict)
    compiled: Fact | None = None
    strategy: Fact | None = None
    ema: Fact | None = None
    hyper_parameters: DictNode = field(default_factory=DictNode)
    hyper_parameter_sources: tuple[str, ...] = ()
