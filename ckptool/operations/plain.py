"""Turn a value tree into plain values that JSON can hold, whatever the file put into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ckptool.model.dtypes import DType
from ckptool.model.training import Fact
from ckptool.model.values import DictNode, GlobalRef, OpaqueTensor, SetNode, Stub, TensorSpec

# A shared node is shown at every place that holds it: the count keeps a small file from unfolding into a huge answer.
MAX_VALUES = 50_000
MAX_DEPTH = 64
_WIDEST_INT_BITS = 4096  # Python refuses to write larger ones in decimal by default


def to_plain(value: Any) -> Any:
    """Give mappings with text keys, lists, text, numbers, booleans and None for any value tree.

    What JSON has no word for becomes a mapping with one ``$`` key: ``$bytes`` (hex), ``$complex``, ``$int`` (hex,
    beyond 4,096 bits), ``$tensor`` (dtype, with ``shape``), ``$global`` (a name that is never looked up), ``$pairs``
    (a mapping with keys that are not text), ``$class`` (a foreign object beside its fields), ``$cut`` (the reason
    why the rest is missing). A foreign key that starts with ``$`` gets a second one. Numbers that are not finite become
    ``"NaN"``, ``"Infinity"``, ``"-Infinity"``.
    """
    return _Converter().convert(value, 0)


def plain_fact(fact: Fact) -> Fact:
    """Bring what a file states into plain values."""
    return Fact(to_plain(fact.value), fact.evidence)


def _float(value: float) -> Any:
    if math.isfinite(value):
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def _int(value: int) -> Any:
    return value if value.bit_length() <= _WIDEST_INT_BITS else {"$int": hex(value)}


def _tensor(value: TensorSpec | OpaqueTensor) -> Any:
    dtype = None if value.dtype is None else value.dtype.name
    return {"$tensor": dtype, "shape": None if value.shape is None else list(value.shape)}


_LEAVES: dict[type, Callable[[Any], Any]] = {
    type(None): lambda value: value,
    bool: lambda value: value,
    str: lambda value: value,
    int: _int,
    float: _float,
    complex: lambda value: {"$complex": [_float(value.real), _float(value.imag)]},
    bytes: lambda value: {"$bytes": value.hex()},
    DType: lambda value: f"torch.{value.name}",
    TensorSpec: _tensor,
    OpaqueTensor: _tensor,
    GlobalRef: lambda value: {"$global": value.full_name},
}


def _cut(reason: str) -> dict[str, str]:
    return {"$cut": reason}


@dataclass(slots=True)
class _Converter:
    """Count what has been shown, and know the nodes that are being shown right now (to see a cycle)."""

    left: int = MAX_VALUES
    open: set[int] = field(default_factory=set)

    def convert(self, value: Any, depth: int) -> Any:
        self.left -= 1
        leaf = _LEAVES.get(type(value))
        if leaf is not None:
            return leaf(value)
        if id(value) in self.open:
            return _cut("holds itself")
        if depth > MAX_DEPTH:
            return _cut(f"nested deeper than {MAX_DEPTH}")
        self.open.add(id(value))
        converted = self._container(value, depth + 1)
        self.open.discard(id(value))
        return converted

    def _container(self, value: Any, depth: int) -> Any:
        if isinstance(value, DictNode):
            return self._mapping(value.pairs, depth)
        if isinstance(value, Stub):
            return self._foreign(value, depth)
        items = value.items if isinstance(value, SetNode) else value
        return self._list(items, depth)

    def _list(self, items: Iterable[Any], depth: int) -> list[Any]:
        converted: list[Any] = []
        for item in items:
            if self.left <= 0:
                return [*converted, _cut(f"more than {MAX_VALUES:,} values")]
            converted.append(self.convert(item, depth))
        return converted

    def _mapping(self, pairs: list[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        keys = [_key(key) for key, _ in pairs]
        if None in keys or len(set(keys)) < len(keys):
            return {"$pairs": self._list((list(pair) for pair in pairs), depth)}
        converted: dict[str, Any] = {}
        for key, (_, child) in zip(keys, pairs, strict=True):
            if self.left <= 0:
                return {**converted, **_cut(f"more than {MAX_VALUES:,} values")}
            converted[str(key)] = self.convert(child, depth)
        return converted

    def _foreign(self, stub: Stub, depth: int) -> dict[str, Any]:
        shown: dict[str, Any] = {"$class": stub.ref.full_name}
        fields = stub.fields
        if fields is not None:
            shown |= self._mapping(fields.pairs, depth)
        elif stub.state is not None:
            shown["$state"] = self.convert(stub.state, depth)
        if stub.args:
            shown["$args"] = self._list(stub.args, depth)
        if isinstance(stub.kwargs, DictNode) and stub.kwargs.pairs:
            shown["$kwargs"] = self.convert(stub.kwargs, depth)
        if stub.items:
            shown["$items"] = self._list(stub.items, depth)
        if stub.pairs:
            shown["$mapping"] = self._mapping(stub.pairs, depth)
        return shown


def _key(key: Any) -> str | None:
    """Spell a key as text, or give None where there is no plain spelling."""
    if type(key) is str:
        return f"${key}" if key.startswith("$") else key
    return str(_int(key)) if type(key) in (int, bool) else None
