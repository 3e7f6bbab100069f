"""Bring two checkpoints of one model to the same names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from ckptool.errors import PlanRefused
from ckptool.model.plans import KeyOptions
from ckptool.model.values import OpaqueTensor
from ckptool.operations.opening import OpenedCheckpoint
from ckptool.operations.tables import Tensor

Tensors: TypeAlias = Mapping[str, Tensor]

_NOT_THERE = ("not-found", "partial-prefix")


def find_view(opened: OpenedCheckpoint, weights: str, keys: KeyOptions) -> OpenedCheckpoint:
    """Look at what the options mean in a checkpoint or, where it has no such thing, at its main weights.

    What was written from the averaged weights of a container, or from a subtree, holds these alone; and where one file
    has a prefix, the other may be without.
    """
    subtrees = (keys, replace(keys, select=None), replace(keys, prefix=None), replace(keys, select=None, prefix=None))
    views = [OpenedCheckpoint(opened.checkpoint, role, asked) for asked in subtrees for role in (weights, "main")]
    return next((view for view in views if _is_there(view)), views[0])


def _is_there(view: OpenedCheckpoint) -> bool:
    try:
        return bool(view.plan.moves)
    except PlanRefused as refused:
        return refused.code not in _NOT_THERE


def by_common_names(ours: OpenedCheckpoint, theirs: OpenedCheckpoint) -> tuple[Tensors, Tensors]:
    """Give the tensors of both by clean name; where none is common, the names of one are the reference of the other.

    :raises PlanRefused: which weights are meant, or what their clean names are, is open.
    """
    named = ours.tensors, theirs.tensors
    if named[0].keys() & named[1].keys():
        return named
    towards = (_named_as(ours, named[1]), named[1]), (named[0], _named_as(theirs, named[0]))
    return next((pair for pair in towards if pair[0].keys() & pair[1].keys()), named)


def _named_as(view: OpenedCheckpoint, wanted: Tensors) -> Tensors:
    reference = {name: tensor.shape for name, tensor in wanted.items()}
    try:
        plan = view.plan_for(replace(view.keys, reference=reference))
    except PlanRefused:
        return view.tensors
    found = view.state_dict.tensors
    return {move.target or move.source: found[move.source] for move in plan.moves if move.source in found}


def dtype_name(tensor: Tensor) -> str:
    """Name the element type; empty where it is not known."""
    return tensor.dtype.name if tensor.dtype is not None else ""


def kind_text(tensor: Tensor) -> str:
    """Describe a tensor in a few words: its dtype and shape, or what it is instead of a dense array."""
    if isinstance(tensor, OpaqueTensor):
        return f"{tensor.kind} ({tensor.detail})"
    return f"{tensor.dtype.name} {list(tensor.shape)}"
