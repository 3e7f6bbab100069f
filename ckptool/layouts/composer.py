"""The averaged weights that Composer keeps with its algorithms, and what they say about ``state.model``.

Source: composer/algorithms/ema/ema.py: while ``ema_weights_active`` holds, the two sets are swapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ckptool.layouts.producers import lookup
from ckptool.model.plans import StateDict
from ckptool.model.values import DictNode

_MODEL = ("state", "model")


def with_averages(found: list[StateDict], root: Any) -> list[StateDict]:
    """Add the averaged weights to the state dicts of a Composer file, all under the roles that they really have."""
    listed = found
    for path, state in _average_states(root):
        swapped = state.get("ema_weights_active") is True
        entries = _entries(state.get("ema_model"))
        if entries:
            why = "ema_weights_active is True" if swapped else "kept by the EMA algorithm"
            own = StateDict((*path, "ema_model"), "raw" if swapped else "ema", entries, why)
            listed = [*(_swap(state_dict, why) if swapped else state_dict for state_dict in listed), own]
    return listed


def _swap(state_dict: StateDict, why: str) -> StateDict:
    return replace(state_dict, role="ema", reason=why) if state_dict.path == _MODEL else state_dict


def _average_states(root: Any) -> Iterator[tuple[tuple[str, ...], DictNode]]:
    """Yield the states of the algorithms that keep an ``ema_model``: a list of (name, state), or a mapping."""
    algorithms = lookup(root, "state.algorithms")
    if isinstance(algorithms, DictNode):
        named = algorithms.text_items()
        places: list[tuple[tuple[str, ...], Any]] = [((name,), state) for name, state in named.items()]
    elif isinstance(algorithms, list | tuple):
        pairs = [(index, pair) for index, pair in enumerate(algorithms) if isinstance(pair, list | tuple)]
        places = [((str(index), "1"), pair[1]) for index, pair in pairs if len(pair) == 2]
    else:
        return
    for steps, state in places:
        if isinstance(state, DictNode) and "ema_model" in state:
            yield ("state", "algorithms", *steps), state


def _entries(model: Any) -> dict[str, Any]:
    """Give the named tensors: a state dict, or parameters and buffers apart."""
    if not isinstance(model, DictNode):
        return {}
    parts = [lookup(model, "named_parameters_dict"), lookup(model, "named_buffers_dict")]
    named = [part.text_items() for part in parts if isinstance(part, DictNode)]
    return {name: value for part in named for name, value in part.items()} if named else model.text_items()
