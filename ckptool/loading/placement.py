"""Which tensor of a file goes to which name of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckptool.errors import PlanRefused
from ckptool.layouts.reference import DEEPEST_PREFIX, LEFT_OVER, Reference, fits, shape_of
from ckptool.layouts.rename import clean_name
from ckptool.layouts.segments import PRIVATE_SEGMENTS, without
from ckptool.loading.library_names import Conversion
from ckptool.loading.model_names import ModelNames, Slot
from ckptool.model import dtypes
from ckptool.model.loading import Mismatch
from ckptool.model.plans import KeyMove, KeyOptions, KeyPlan
from ckptool.model.values import OpaqueTensor, TensorSpec
from ckptool.operations.opening import OpenedCheckpoint

# What a state dict may hold for ``_extra_state`` and can be handed to a model as it is.
_PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes)


@dataclass(slots=True)
class Placement:
    """Sort the entries of a file: those that fit, by the model's clean name, and each way not to.

    ``shapes`` are those in the file, by the same names.
    """

    plan: KeyPlan
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    mismatched: dict[str, Mismatch] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    dropped: list[KeyMove] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def taken(self) -> dict[str, str]:
        """Give the names of the model that tensors have, by the keys in the file."""
        return {key: name for key, name in self.plan.kept.items() if name in self.tensors}


def place(view: OpenedCheckpoint, names: ModelNames) -> Placement:
    """Bring the file's names to the model's, and say for each entry where it goes.

    :raises PlanRefused: two ways of reading the names do equally well, or the weights are not settled.
    """
    placement = _carry_out(view, names, _plan(view, names))
    if names.conversion is None or view.keys.keep_prefixes or len(placement.tensors) == len(names.slots):
        return placement
    converted = _converted(view, names.conversion)
    if converted is None:
        return placement
    other = _carry_out(view, names, converted)
    return other if len(other.tensors) > len(placement.tensors) else placement


def _carry_out(view: OpenedCheckpoint, names: ModelNames, plan: KeyPlan) -> Placement:
    scope = _scope(view)
    placement = Placement(plan)
    for move in plan.moves:
        name = _name_of(plan, move) if move.source in scope else None
        placed = KeyMove(move.source, name, move.reason)
        _sort_entry(placement, names, placed, view.state_dict.entries[move.source])
    return placement


def _converted(view: OpenedCheckpoint, conversion: Conversion) -> KeyPlan | None:
    """Plan with the names that the model's library has for the clean ones."""
    try:
        moves = view.plan.moves
        mapping = {move.source: None if move.target is None else conversion(move.target) for move in moves}
        return view.plan_for(replace(view.keys, mapping=mapping))
    except PlanRefused:
        return None


def _plan(view: OpenedCheckpoint, names: ModelNames) -> KeyPlan:
    """Plan with all names of the model as the reference, else with those that the file can have, else by evidence."""
    wanted: Reference = {name: slot.shape for name, slot in names.slots.items()} | dict.fromkeys(names.values)
    entries = view.state_dict.entries
    return _plan_towards(view, wanted) or _plan_towards(view, _reachable(entries, wanted)) or view.plan


def _plan_towards(view: OpenedCheckpoint, reference: Reference) -> KeyPlan | None:
    try:
        return view.plan_for(replace(view.keys, reference=reference)) if reference else None
    except PlanRefused as refusal:
        if refusal.code == "ref-missing":
            return None
        raise


def _reachable(entries: Mapping[str, Any], wanted: Reference) -> Reference:
    """Give the names that the file has behind one prefix: that behind which it has the most."""
    reached: dict[str, set[str]] = defaultdict(set)
    for key, entry in entries.items():
        shape = shape_of(entry)
        for prefix, tail in _splits(without(key, tuple(PRIVATE_SEGMENTS))):
            if tail in wanted and fits(shape, wanted[tail]):
                reached[prefix].add(tail)
    most = max(reached.values(), key=len, default=set())
    return {name: shape for name, shape in wanted.items() if name in most}


def _splits(key: str) -> Iterator[tuple[str, str]]:
    segments = key.split(".")
    for depth in range(min(len(segments), DEEPEST_PREFIX + 1)):
        yield ".".join(segments[:depth]), ".".join(segments[depth:])


def _scope(view: OpenedCheckpoint) -> Iterable[str]:
    """Give the keys that ``select`` leaves in question."""
    if view.keys.select is None:
        return view.state_dict.entries
    return view.plan_for(KeyOptions(select=view.keys.select, keep_prefixes=True)).kept


def _name_of(plan: KeyPlan, move: KeyMove) -> str | None:
    """Give the name that an entry has or, for one that the reference left over, would have; None outside the model."""
    if move.target is None and move.reason == LEFT_OVER:
        return clean_name(plan.rule, move.source)
    return move.target


def _sort_entry(placement: Placement, names: ModelNames, move: KeyMove, entry: Any) -> None:
    if move.target is None:
        placement.dropped.append(KeyMove(move.source, None, move.reason or "outside of the part that is the model"))
    elif isinstance(entry, TensorSpec | OpaqueTensor):
        _sort_tensor(placement, names.slots.get(move.target), move.target, entry)
    elif move.target in names.values and isinstance(entry, _PLAIN_TYPES):
        placement.values[move.target] = entry
    else:
        placement.dropped.append(KeyMove(move.source, None, "not a tensor"))


def _sort_tensor(placement: Placement, slot: Slot | None, name: str, entry: TensorSpec | OpaqueTensor) -> None:
    if entry.shape is not None:
        placement.shapes.setdefault(name, entry.shape)
    if slot is None or name in placement.tensors:
        placement.unexpected.append(name)
    elif isinstance(entry, TensorSpec) and _is_faithful(slot, entry):
        placement.tensors[name] = entry
    else:
        placement.mismatched[name] = Mismatch(name, _show_slot(slot), _show_entry(entry))


def _is_faithful(slot: Slot, entry: TensorSpec) -> bool:
    """Tell whether torch would copy the values: it drops imaginary parts and fractions without a word."""
    dtype = dtypes.find(_dtype_name(slot))
    return dtype is not None and dtype.kind == entry.dtype.kind and fits(entry.shape, slot.shape)


def _dtype_name(slot: Slot) -> str:
    return str(slot.tensor.dtype).removeprefix("torch.")


def _show_slot(slot: Slot) -> str:
    return f"{_dtype_name(slot)} {'[?]' if slot.shape is None else list(slot.shape)}"


def _show_entry(entry: TensorSpec | OpaqueTensor) -> str:
    return (
        f"{entry.kind} ({entry.detail})"
        if isinstance(entry, OpaqueTensor)
        else f"{entry.dtype.name} {list(entry.shape)}"
    )
