"""The state dict of a pickled ``nn.Module``, read from what its class carried: no class is imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckptool.errors import UnreadableCheckpoint
from ckptool.model.values import DictNode, OpaqueTensor, SetNode, Stub, TensorSpec

# Shared modules appear under every name, as in state_dict(): a small file could name them without end.
MAX_MODULES = 1_000_000
MAX_DEPTH = 256


def is_module(value: Any) -> bool:
    """Tell whether a stub stands for an ``nn.Module`` (or a compiled one)."""
    return isinstance(value, Stub) and (_is_plain_module(value) or compiled_inner(value) is not None)


def _is_plain_module(stub: Stub) -> bool:
    fields = stub.fields
    return fields is not None and "_modules" in fields and "_parameters" in fields


def compiled_inner(stub: Stub) -> Stub | None:
    """Give the module inside a pickled ``OptimizedModule``.

    Source: torch/_dynamo/eval_frame.py, ``OptimizedModule.__reduce__`` returns (class, (module, context)).
    """
    inner = stub.args[0] if stub.ref.name == "OptimizedModule" and stub.args else None
    return inner if isinstance(inner, Stub) and is_module(inner) else None


def module_entries(module: Stub) -> dict[str, Any]:
    """Give the parameters and persistent buffers under the names that ``state_dict()`` would give.

    :raises UnreadableCheckpoint: the modules nest without end.
    """
    entries: dict[str, Any] = {}
    stack: list[tuple[str, int, Stub]] = [("", 0, module)]
    visited = 0
    while stack:
        prefix, depth, stub = stack.pop()
        visited += 1
        if visited > MAX_MODULES or depth > MAX_DEPTH:
            raise UnreadableCheckpoint(
                f'the pickled module "{module.ref.full_name}" nests modules without end: save its state_dict() instead'
            )
        entries.update({prefix + name: value for name, value in _own_tensors(stub)})
        below = [(f"{prefix}{name}.", depth + 1, child) for name, child in _children(stub)]
        stack.extend(reversed(below))
    return entries


def _own_tensors(stub: Stub) -> Iterator[tuple[str, Any]]:
    fields = stub.fields or DictNode()
    hidden = _names(fields.get("_non_persistent_buffers_set"))
    for table in ("_parameters", "_buffers"):
        for name, value in _pairs(fields.get(table)):
            if isinstance(value, TensorSpec | OpaqueTensor) and not (table == "_buffers" and name in hidden):
                yield name, value


def _children(stub: Stub) -> Iterator[tuple[str, Stub]]:
    inner = compiled_inner(stub)
    if inner is not None:
        yield "_orig_mod", inner
        return
    fields = stub.fields or DictNode()
    for name, child in _pairs(fields.get("_modules")):
        if isinstance(child, Stub):
            yield name, child


def _pairs(table: Any) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in table.pairs if type(key) is str] if isinstance(table, DictNode) else []


def _names(value: Any) -> set[str]:
    return {item for item in value.items if type(item) is str} if isinstance(value, SetNode) else set()
