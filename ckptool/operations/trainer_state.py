"""What transformers' Trainer writes beside the weights of a checkpoint folder: how far it was, and how good."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ckptool.errors import CkptoolError
from ckptool.formats import open_checkpoint
from ckptool.layouts.producers import lookup
from ckptool.model.training import Fact, Training

# Source: transformers/trainer.py (PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME, TRAINING_ARGS_NAME).
_STATE, _ARGUMENTS = "trainer_state.json", "training_args.bin"
_LARGEST_STATE = 64 << 20  # bytes; a hundred thousand logged steps take 15 MB
_SCORE_PREFIX = "eval_"
_SPEED_ENDINGS = ("_runtime", "_per_second", "_time")


def read_trainer_state(folder: Path) -> Training:
    """Read the facts of a folder ``checkpoint-STEP``; nothing where there are none.

    The folder that all of those are in has a state, too, but perhaps the weights of another step: the best one.
    """
    state = _read_json(folder / _STATE)
    step = state.get("global_step")
    if type(step) is not int or folder.name != f"checkpoint-{step}":
        return Training()
    monitor, mode = _monitored(folder / _ARGUMENTS)
    return Training(
        epoch=_number(state.get("epoch")),
        global_step=_number(step),
        metrics={name: Fact(value, _STATE) for name, value in _scores(state.get("log_history"), step)},
        monitor=monitor,
        mode=mode,
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        facts = json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size <= _LARGEST_STATE else None
    except (OSError, ValueError, RecursionError):  # the weights are what counts, and they are sound
        return {}
    return facts if isinstance(facts, Mapping) else {}


def _number(value: Any) -> Fact | None:
    if type(value) is float and value.is_integer():
        value = int(value)
    return Fact(value, _STATE) if type(value) in (int, float) else None


def _scores(history: Any, step: int) -> Iterator[tuple[str, float]]:
    """Yield what was measured at this very step."""
    entries = history if isinstance(history, list) else []
    for entry in entries:
        if isinstance(entry, Mapping) and entry.get("step") == step:
            yield from (
                (name, value) for name, value in entry.items() if _is_score(name) and type(value) in (int, float)
            )


def _is_score(name: str) -> bool:
    return name.startswith(_SCORE_PREFIX) and not name.endswith(_SPEED_ENDINGS)


def _monitored(path: Path) -> tuple[Fact | None, Fact | None]:
    """Read by which metric the Trainer chose the best checkpoint, out of its pickled arguments."""
    try:
        with open_checkpoint(path) as arguments:
            metric = lookup(arguments.root, "metric_for_best_model")
            greater = lookup(arguments.root, "greater_is_better")
    except CkptoolError:  # as above
        return None, None
    if not isinstance(metric, str):
        return None, None
    evidence = f"{_ARGUMENTS}: metric_for_best_model"
    name = metric if metric.startswith(_SCORE_PREFIX) else _SCORE_PREFIX + metric
    mode = Fact("max" if greater else "min", f"{_ARGUMENTS}: greater_is_better") if type(greater) is bool else None
    return Fact(name, evidence), mode
