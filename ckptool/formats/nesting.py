"""Flat names back to the mappings and lists that they were flattened from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ckptool.errors import UnreadableCheckpoint
from ckptool.model.values import DictNode, TensorSpec

_Step = str | int
# Megatron flattens names itself: optimizer.state.exp_avg.decoder.layers..., chained_0.optimizer....
_OPTIMIZER = re.compile(r"(?:optim(?:izer)?(?:_\d+)?|chained_\d+)\.(?=.)")


def nest(values: Mapping[str, Any], paths: Mapping[str, tuple[_Step, ...]]) -> DictNode:
    """Put each value where its path says, in the order of the paths; one without a path stands under its flat name.

    Where an optimizer's values are among those without a path, they go under its root, and the others under "model"; so
    do weights that lie at the top beside an optimizer.

    :raises UnreadableCheckpoint: two paths contradict each other.
    """
    placed = {**paths, **_flat_paths([name for name in values if name not in paths])}
    placed |= _bare_weights({name: path for name, path in placed.items() if name in values}, values)
    root: dict[_Step, Any] = {}
    for name in (name for name in placed if name in values):
        _put(root, placed[name], values[name], name)
    return DictNode([(step, _as_tree(value)) for step, value in root.items()])


def _flat_paths(names: list[str]) -> dict[str, tuple[_Step, ...]]:
    optimizers = {name: match for name in names if (match := _OPTIMIZER.match(name))}
    roots: tuple[_Step, ...] = ("model",) if optimizers else ()
    return {
        name: (optimizers[name][0][:-1], name[optimizers[name].end() :]) if name in optimizers else (*roots, name)
        for name in names
    }


def _bare_weights(placed: Mapping[str, tuple[_Step, ...]], values: Mapping[str, Any]) -> dict[str, tuple[_Step, ...]]:
    """Give a root to the tensors at the top (torchtitan's), where their names are those of weights."""
    roots = {str(path[0]) for path in placed.values()}
    bare = [name for name, path in placed.items() if len(path) == 1 and isinstance(values[name], TensorSpec)]
    dotted = [name for name in bare if "." in name]
    is_beside_optimizer = any(_OPTIMIZER.match(f"{root}.x") for root in roots - set(bare))
    if "model" in roots or not is_beside_optimizer or not dotted or 2 * len(dotted) < len(bare):
        return {}
    return {name: ("model", *placed[name]) for name in bare}


class _Branch(dict[_Step, Any]):
    """Tell what is still to be filled from a value that is a mapping itself."""


def _put(root: dict[_Step, Any], path: tuple[_Step, ...], value: Any, name: str) -> None:
    node = root
    for step in path[:-1]:
        below = node.setdefault(step, _Branch())
        if not isinstance(below, _Branch):
            raise _contradiction(name)
        node = below
    if path[-1] in node:
        raise _contradiction(name)
    node[path[-1]] = value


def _contradiction(name: str) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(f"the path of {name!r:.100} leads through another value; save the checkpoint again")


def _as_tree(value: Any) -> Any:
    """Make a list of what is counted without a gap, as torch does, and a mapping of any other branch."""
    if not isinstance(value, _Branch):
        return value
    below = {step: _as_tree(child) for step, child in value.items()}
    if below.keys() == set(range(len(below))):
        return [below[index] for index in range(len(below))]
    return DictNode(list(below.items()))
