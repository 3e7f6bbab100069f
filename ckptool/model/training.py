"""What a checkpoint says about the training that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Fact:
    """State one value and where in the file it was found."""

    value: Any
    evidence: str


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """Gather what stands beside the weights; None and empty mean that the file does not say.

    ``metrics`` maps names to numbers: a checkpoint's own score under the metric's name, the best one so far under
    ``best_`` and the name. ``monitor`` is the metric that the trainer chose by, ``mode`` is ``min`` or ``max``.
    ``compiled`` and ``ema`` hold True or False, ``strategy`` a word (``ddp``, ``fsdp``, ``deepspeed``).
    ``versions`` maps libraries to version texts. ``hyper_parameters`` are plain values, with the stubs of foreign
    objects among them; ``hyper_parameter_source`` is where they stand in the file.
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
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    hyper_parameter_source: str = ""
