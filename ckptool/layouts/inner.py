"""Several sets of weights inside one state dict: an EMA copy under another root, or under flattened names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckptool.layouts.reference import shape_of
from ckptool.layouts.roots import EMA_ROOTS
from ckptool.layouts.segments import Names, under, without
from ckptool.layouts.twins import LITEMA_COUNTERS, dotless_twins, is_flattened, underscored_twins
from ckptool.model.plans import Producer, StateDict


def inner_candidates(found: list[StateDict], producer: Producer) -> list[StateDict]:
    """List the state dicts, each followed by the ones inside it that a rule can tell apart."""
    listed: list[StateDict] = []
    for state_dict in found:
        listed += _split(state_dict, producer)
    return listed


def _split(state_dict: StateDict, producer: Producer) -> list[StateDict]:
    names = Names(state_dict.entries)
    underscored = underscored_twins(names)
    if underscored and _same_shapes(state_dict.entries, underscored):
        averaged = replace(state_dict, role="ema", reason="mmcv swaps the averaged weights in before it saves")
        return [averaged, _swapped(state_dict, underscored, "raw", "the ema_* buffers, which mmcv leaves the raw ones")]
    dotless = dotless_twins(names)
    if dotless and _same_shapes(state_dict.entries, dotless):
        return [state_dict, _swapped(state_dict, dotless, "ema", 'the copy below "model_ema.", under its own names')]
    return [state_dict, *(_below_root(state_dict, root) for root in _ema_roots(state_dict, names, producer))]


def _same_shapes(entries: Mapping[str, object], twins: Mapping[str, str]) -> bool:
    return all(shape_of(entries[flat]) == shape_of(entries[name]) for flat, name in twins.items())


def _swapped(state_dict: StateDict, twins: Mapping[str, str], role: str, reason: str) -> StateDict:
    """Give the state dict with the twins' values under the names that they belong to."""
    entries = dict(state_dict.entries)
    for flat, name in twins.items():
        entries[name] = entries.pop(flat)
    for counter in LITEMA_COUNTERS:
        entries.pop(counter, None)
    return replace(state_dict, role="raw" if role == "raw" else "ema", entries=entries, reason=reason)


def _ema_roots(state_dict: StateDict, keys: Names, producer: Producer) -> list[str]:
    """List the roots of EMA copies beside ``model``, in a container where that is the network's place."""
    if not producer.container or state_dict.role != "main":
        return []
    if not any(root in keys.text for root in EMA_ROOTS):  # as in most files, whatever wraps the keys
        return []
    segments = keys.private_segments()
    names = keys.without(segments)
    roots = {root for root in EMA_ROOTS.intersection(names.roots) if not is_flattened(names, root)}
    return sorted(roots) if names.any_below("model") else []


def _below_root(state_dict: StateDict, root: str) -> StateDict:
    segments = Names(state_dict.entries).private_segments()
    entries = {key: value for key, value in state_dict.entries.items() if under(without(key, segments), root)}
    return replace(state_dict, role="ema", entries=entries, reason=f'the copy below "{root}."')
