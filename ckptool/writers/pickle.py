"""Pickle plain data and planned tensors, as protocol 2, without a single foreign name.

Every name that can occur is one that ``torch.load(weights_only=True)`` of torch 2.13 knows: the rebuild functions,
the storages, the dtypes and ``OrderedDict`` for tensors and state dicts, layouts and schemes for sparse and quantized
ones; ``Counter``, ``set``, ``complex`` and
``_codecs.encode`` (bytes) only where a value beside them is one. A frozenset becomes a set, because that loader has no
frozenset. Source: ``torch/_weights_only_unpickler.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ckptool.errors import OutputRefused
from ckptool.model.copies import Payload, PlannedOpaque, PlannedTensor
from ckptool.model.dtypes import DType
from ckptool.model.values import DictNode, GlobalRef, SetNode, Stub, row_major
from ckptool.writers.rebuilds import Call, Group, Name, rebuild

_PROTO_2, _STOP, _MARK = b"\x80\x02", b".", b"("
_NONE, _FALSE, _TRUE = b"N", b"\x89", b"\x88"
_EMPTY_LIST, _EMPTY_DICT, _EMPTY_TUPLE = b"]", b"}", b")"
_APPENDS, _SETITEM, _SETITEMS, _TUPLE, _TUPLE1, _TUPLE2 = b"e", b"s", b"u", b"t", b"\x85", b"\x86"
_REDUCE, _BUILD, _BINPERSID = b"R", b"b", b"Q"
_MAX_INT_BYTES = 255  # LONG1; the loader knows no longer integer
_HASHABLE = (type(None), bool, int, float, complex, str, bytes, DType)


@dataclass(frozen=True, slots=True)
class Pickled:
    """Hold the bytes of a pickle and the payloads it refers to, by their position."""

    data: bytes
    payloads: tuple[Payload, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Close:
    """Wait behind the parts of a container for their end: its last opcodes, and what it is remembered as."""

    code: bytes
    container: Any = None


def pickle_tree(root: Any) -> Pickled:
    """Pickle one value tree whose tensors are ``PlannedTensor``; the same tree always gives the same bytes.

    Nodes that occur more than once stay shared; tensors on one payload name one storage.

    :raises OutputRefused: it holds something else than plain data and planned tensors.
    """
    pickler = _Pickler()
    pickler.emit_all(root)
    return Pickled(bytes(pickler.out), tuple(pickler.payloads))


class _Pickler:
    """Emit opcodes depth first with a stack of its own, so that no nesting is too deep."""

    __slots__ = ("memo", "out", "payloads", "pending")

    def __init__(self) -> None:
        self.out = bytearray(_PROTO_2)
        self.memo: dict[str | int | tuple[str, str], int] = {}  # by text, identity of a container, global
        self.payloads: dict[Payload, str] = {}
        self.pending: list[Any] = []

    def emit_all(self, root: Any) -> None:
        self.pending.append(root)
        while self.pending:
            value = self.pending.pop()
            emit = _EMITTERS.get(type(value))
            if emit is None:
                raise _not_plain(value)
            emit(self, value)
        self.out += _STOP

    # --- what stays shared ---

    def recall(self, key: str | int | tuple[str, str]) -> bool:
        """Refer to what was emitted before, if it was."""
        index = self.memo.get(key)
        if index is None:
            return False
        self.out += b"h" + bytes((index,)) if index < 256 else b"j" + struct.pack("<I", index)
        return True

    def remember(self, key: str | int | tuple[str, str]) -> None:
        index = self.memo[key] = len(self.memo)
        self.out += b"q" + bytes((index,)) if index < 256 else b"r" + struct.pack("<I", index)

    # --- leaves ---

    def put_none(self, _: None) -> None:
        self.out += _NONE

    def put_truth(self, value: bool) -> None:
        self.out += _TRUE if value else _FALSE

    def put_integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.out += b"K" + bytes((value,))
        elif 0 <= value < 1 << 16:
            self.out += b"M" + struct.pack("<H", value)
        elif -(1 << 31) <= value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            self.put_long_integer(value)

    def put_long_integer(self, value: int) -> None:
        nbytes = value.bit_length() // 8 + 1
        if nbytes > _MAX_INT_BYTES:
            raise OutputRefused(f"an integer of {nbytes} bytes cannot be kept; write the weights without --keep-rest")
        self.out += b"\x8a" + bytes((nbytes,)) + value.to_bytes(nbytes, "little", signed=True)

    def put_real(self, value: float) -> None:
        self.out += b"G" + struct.pack(">d", value)

    def put_complex(self, value: complex) -> None:
        # Python 2's name for builtins, as pickle itself writes it in protocol 2; readers map it.
        self.put_named("__builtin__", "complex")
        self.put_real(value.real)
        self.put_real(value.imag)
        self.out += _TUPLE2 + _REDUCE

    def put_text(self, value: str) -> None:
        if not self.recall(value):
            self.put_fresh_text(value)
            self.remember(value)

    def put_fresh_text(self, value: str) -> None:
        data = value.encode("utf-8", "surrogatepass")
        self.out += b"X" + struct.pack("<I", len(data)) + data

    def put_octets(self, value: bytes) -> None:
        """Spell bytes as text, as pickle does: protocol 2 has no bytes."""
        self.put_named("_codecs", "encode")
        self.put_fresh_text(value.decode("latin1"))
        self.put_text("latin1")
        self.out += _TUPLE2 + _REDUCE

    def put_named(self, module: str, name: str) -> None:
        if not self.recall((module, name)):
            self.out += f"c{module}\n{name}\n".encode("ascii")
            self.remember((module, name))

    def put_dtype(self, value: DType) -> None:
        self.put_named("torch", value.name)

    # --- containers ---

    def push(self, parts: Sequence[Any], *ends: Any) -> None:
        self.pending.extend(reversed(ends))
        self.pending.extend(reversed(parts))

    def close(self, end: _Close) -> None:
        self.out += end.code
        if end.container is not None:
            self.remember(id(end.container))

    def put_list(self, value: list[Any]) -> None:
        if not self.recall(id(value)):
            self.out += _EMPTY_LIST
            self.remember(id(value))
            self.put_items(value, _APPENDS)

    def put_items(self, parts: Sequence[Any], code: bytes, *ends: Any) -> None:
        if parts:
            self.out += _MARK
            self.push(parts, _Close(code), *ends)
        else:
            self.push((), *ends)

    def put_tuple(self, value: tuple[Any, ...]) -> None:
        if not value:
            self.out += _EMPTY_TUPLE
        elif not self.recall(id(value)):
            self.out += _MARK
            self.push(value, _Close(_TUPLE, value))

    def put_set(self, value: SetNode) -> None:
        if self.recall(id(value)):
            return
        _require_hashable(value.items)
        self.put_named("__builtin__", "set")
        self.out += _EMPTY_LIST
        self.put_items(value.items, _APPENDS, _Close(_TUPLE1 + _REDUCE, value))

    def put_dict(self, value: DictNode) -> None:
        if self.recall(id(value)):
            return
        _require_hashable([key for key, _ in value.pairs])
        parts = [part for pair in value.pairs for part in pair]
        if value.type_name == "OrderedDict":
            self.put_named("collections", "OrderedDict")
            self.out += _EMPTY_TUPLE + _REDUCE
            self.remember(id(value))
            self.put_items(parts, _SETITEMS, *_key_metadata(value))
        elif value.type_name == "Counter":
            self.put_named("collections", "Counter")
            self.out += _EMPTY_DICT
            self.put_items(parts, _SETITEMS, _Close(_TUPLE1 + _REDUCE, value))
        else:
            self.out += _EMPTY_DICT
            self.remember(id(value))
            self.put_items(parts, _SETITEMS)

    # --- tensors ---

    def put_tensor(self, value: PlannedTensor) -> None:
        """Call torch's own rebuild function: (storage, offset, size, stride, requires_grad, hooks[, dtype])."""
        typed = value.dtype.storage is not None
        self.put_named("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.out += _MARK
        self.put_storage(value.payload)
        self.put_integer(0)
        self.put_sizes(value.shape)
        self.put_sizes(row_major(value.shape))
        self.out += _FALSE
        self.put_named("collections", "OrderedDict")
        self.out += _EMPTY_TUPLE + _REDUCE
        if not typed:
            self.put_dtype(value.dtype)
        self.out += _TUPLE + _REDUCE

    def put_storage(self, payload: Payload) -> None:
        """Refer to ``("storage", class, key, location, count)``: elements of a typed storage, else bytes."""
        self.out += _MARK
        self.put_text("storage")
        if payload.dtype.storage is not None:
            self.put_named("torch", payload.dtype.storage)
        else:
            self.put_named("torch.storage", "UntypedStorage")
        self.put_fresh_text(self.payloads.setdefault(payload, str(len(self.payloads))))
        self.put_text("cpu")
        self.put_integer(payload.numel if payload.dtype.storage is not None else payload.nbytes)
        self.out += _TUPLE + _BINPERSID

    def put_opaque(self, value: PlannedOpaque) -> None:
        if not self.recall(id(value)):
            self.push((rebuild(value),), _Close(b"", value))

    def put_call(self, value: Call) -> None:
        self.put_named(value.module, value.name)
        self.out += _MARK
        self.push(value.args, _Close(_TUPLE + _REDUCE))

    def put_group(self, value: Group) -> None:
        self.out += _MARK
        self.push(value.items, _Close(_TUPLE))

    def put_name(self, value: Name) -> None:
        self.put_named(value.module, value.name)

    def put_sizes(self, values: Sequence[int]) -> None:
        self.out += _MARK
        for value in values:
            self.put_integer(value)
        self.out += _TUPLE


_EMITTERS: dict[type, Callable[[_Pickler, Any], None]] = {
    type(None): _Pickler.put_none,
    bool: _Pickler.put_truth,
    int: _Pickler.put_integer,
    float: _Pickler.put_real,
    complex: _Pickler.put_complex,
    str: _Pickler.put_text,
    bytes: _Pickler.put_octets,
    list: _Pickler.put_list,
    tuple: _Pickler.put_tuple,
    SetNode: _Pickler.put_set,
    DictNode: _Pickler.put_dict,
    DType: _Pickler.put_dtype,
    PlannedTensor: _Pickler.put_tensor,
    PlannedOpaque: _Pickler.put_opaque,
    Payload: _Pickler.put_storage,
    Call: _Pickler.put_call,
    Group: _Pickler.put_group,
    Name: _Pickler.put_name,
    _Close: _Pickler.close,
}


def _key_metadata(node: DictNode) -> list[Any]:
    """Set ``_metadata`` onto a state dict as torch does; no other attribute is anyone's to set."""
    if node.attributes is None or "_metadata" not in node.attributes:
        return []
    return [_Close(_EMPTY_DICT), "_metadata", node.attributes.get("_metadata"), _Close(_SETITEM + _BUILD)]


def _require_hashable(keys: Sequence[Any]) -> None:
    pending, seen = list(keys), set[int]()
    while pending:
        key = pending.pop()
        if type(key) is tuple:
            pending.extend(key if id(key) not in seen else ())
            seen.add(id(key))
        elif type(key) not in _HASHABLE:
            raise OutputRefused(
                f"a mapping or set holds a {type(key).__name__} as a key, which no loader takes; "
                "write the weights without --keep-rest"
            )


def _not_plain(value: Any) -> OutputRefused:
    ref = value.ref if isinstance(value, Stub) else value
    what = ref.full_name if isinstance(ref, GlobalRef) else type(value).__name__
    return OutputRefused(f"{ascii(what)[1:-1]} is no plain data and is never written; leave it out with --foreign drop")
