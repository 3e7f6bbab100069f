"""What a copy leaves out, and why: everything that is not written is listed."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from ckptool.layouts import node_at, steps_below, whole_tensor
from ckptool.layouts.modules import is_module
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.conversion import BESIDE, Dropped
from ckptool.model.plans import KeyPlan, StateDict
from ckptool.model.values import DictNode, Stub, TensorSpec, walk


def dropped_keys(state_dict: StateDict, key_plan: KeyPlan) -> list[Dropped]:
    """List the keys that the plan drops."""
    return [Dropped(move.source, move.reason, _nbytes(state_dict.entries[move.source])) for move in key_plan.dropped]


def without_tensors(state_dict: StateDict, key_plan: KeyPlan, tensors: Container[str]) -> list[Dropped]:
    """List the entries that are not among the tensors, but for those that say nothing."""
    return [
        Dropped(source, "not a tensor: a safetensors file holds tensors only")
        for source, target in key_plan.kept.items()
        if target not in tensors and not _says_nothing(state_dict.entries[source])
    ]


def _says_nothing(value: Any) -> bool:
    """Tell whether a value is empty, as ``get_extra_state`` of many modules returns it."""
    return value is None or value == b"" or (isinstance(value, DictNode | list | tuple) and len(value) == 0)


def beside(checkpoint: Checkpoint, state_dict: StateDict, carried: frozenset[str]) -> list[Dropped]:
    """List what stands beside the chosen state dict in its container and is not written."""
    dropped = []
    node = checkpoint.root
    for depth, step in enumerate(state_dict.path):
        for key, value in _items(node):
            name = ".".join((*state_dict.path[:depth], str(key)))
            if str(key) != step and name not in carried:
                dropped.append(Dropped(name, BESIDE, _nbytes(value)))
        node = node_at(node, (step,))
    left = unchosen(node, state_dict)
    return [*dropped, *(Dropped(key, "not among the chosen weights", _nbytes(value)) for key, value in left)]


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    """Give what lies in a mapping, in an object of a foreign class, or by its place in a list."""
    if isinstance(node, DictNode):
        return node.pairs
    return enumerate(node) if isinstance(node, list | tuple) else steps_below(node)


def unchosen(node: Any, state_dict: StateDict) -> list[tuple[str, Any]]:
    """List what lies in the same mapping as the chosen weights without being one of them (an EMA copy)."""
    chosen = set(map(id, state_dict.entries.values()))
    pairs = node.text_items().items() if isinstance(node, DictNode) else ()
    return [(key, value) for key, value in pairs if id(whole_tensor(value)) not in chosen]


def set_on(node: Any) -> list[Dropped]:
    """List what is set on the mapping of the chosen weights itself, but for torch's own ``_metadata``."""
    attributes = node.attributes if isinstance(node, DictNode) else None
    pairs = [] if attributes is None else attributes.pairs
    return [
        Dropped(f"__dict__.{key}", "an attribute of a mapping", _nbytes(value))
        for key, value in pairs
        if key != "_metadata"
    ]


def around(node: Any, state_dict: StateDict) -> Iterable[Dropped]:
    """List the pickled module that the weights were taken out of: its class, and the attributes that are no weights."""
    if isinstance(node, Stub):
        own = {id(value) for entry in state_dict.entries.values() for _, value in walk(entry)}
        others = [value for _, value in walk(node) if isinstance(value, TensorSpec) and id(value) not in own]
        name = ".".join(state_dict.path) or node.ref.name
        what = "module" if is_module(node) else "object"
        reason = f"a pickled {what}, {node.ref.full_name}: only its state dict is written"
        yield Dropped(name, reason, sum(value.nbytes for value in others))


def program_of(checkpoint: Checkpoint) -> Iterable[Dropped]:
    """List the code of a program, which is never written."""
    if any(finding.code == "program" for finding in checkpoint.findings):
        yield Dropped("program", "code: only its tensors are written")


def _nbytes(value: Any) -> int:
    """Sum the dense bytes of all tensors in a value, each once."""
    return sum(node.nbytes for _, node in walk(value) if isinstance(node, TensorSpec))
