"""What torch's pickler writes for the tensors of a state dict, read a thousand at a time.

Each takes 25 opcodes, the same ones always, and in Python an opcode costs a call. So the opcodes of one tensor are
matched as a whole, and those of many are looked at by column: most columns hold one value, and the rest is work for
the built-in functions. Whatever is not exactly this, or does not come out well, is left to the loop, which starts over
at the same opcode: until everything is found to be in order, nothing has been changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, repeat
from struct import pack
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptool.errors import CkptoolError
from ckptool.formats.pickle.engine import Postponed
from ckptool.formats.pickle.reading import Malformed, StorageType
from ckptool.formats.pickle.tensors import rebuild_views
from ckptool.model.values import DictNode, TensorSpec

if TYPE_CHECKING:
    from ckptool.formats.pickle.machine import Machine

_FEWEST_ROWS = 3  # fewer take longer by column
_MOST_ROWS = 1000  # as many as CPython's pickler writes between two MARKs

_INTEGER = rb"(?:K.|M..|J....)"
_PUT = rb"r(....)"
_GET = rb"(h.|j....)"
_TEXT = rb"X(.)\0\0\0([0-9a-z:]{1,64})" + _PUT
_SIZES = rb"(\)|%(n)b\x85|%(n)b{2}\x86|%(n)b{3}\x87|\(%(n)b{1,64}t)(?:%(put)b)?" % {b"n": _INTEGER, b"put": _PUT}
# torch/_utils.py: _rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks), with the storage's
# persistent id ("storage", class, key, location, elements); then the next key and what is called for it. Every opcode
# tells its own length, so there is one way to match; only a text could also end earlier, and its length is compared.
_ROW = re.compile(
    b"".join((
        rb"\(\(", _GET, _GET, _TEXT, rb"(?:", _GET, b"|", _TEXT, rb")(", _INTEGER, b")t", _PUT, b"Q",
        b"(", _INTEGER, b")", _SIZES, _SIZES, rb"([\x88\x89])", _GET, rb"\)R", _PUT, b"t", _PUT, b"R", _PUT,
        rb"(?:(?:", _GET, rb"|X(.)\0\0\0(.{1,255}?)", _PUT, b")", _GET, rb"(?=\(\())?",
    )),
    re.DOTALL,
)  # fmt: skip
_NUMBER = re.compile(_INTEGER, re.DOTALL)
_TRUE = b"\x88"
_ROW_OPCODES = 16  # beside its PUTs, its sizes and what follows it


class _Columns(NamedTuple):
    """Hold the groups of ``_ROW`` by column; the last five describe the key that follows."""

    word: tuple[bytes, ...]
    kind: tuple[bytes, ...]
    name_length: tuple[bytes, ...]
    name: tuple[bytes, ...]
    name_put: tuple[bytes, ...]
    place: tuple[bytes, ...]
    place_length: tuple[bytes, ...]
    place_text: tuple[bytes, ...]
    place_put: tuple[bytes, ...]
    numel: tuple[bytes, ...]
    identifier_put: tuple[bytes, ...]
    offset: tuple[bytes, ...]
    shape: tuple[bytes, ...]
    shape_put: tuple[bytes, ...]
    stride: tuple[bytes, ...]
    stride_put: tuple[bytes, ...]
    requires_grad: tuple[bytes, ...]
    hooks: tuple[bytes, ...]
    hooks_put: tuple[bytes, ...]
    arguments_put: tuple[bytes, ...]
    tensor_put: tuple[bytes, ...]
    key: tuple[bytes, ...]
    key_length: tuple[bytes, ...]
    key_text: tuple[bytes, ...]
    key_put: tuple[bytes, ...]
    caller: tuple[bytes, ...]


class _Irregular(Exception):
    """Leave the rows to the loop."""


def read_tensors(machine: Machine, position: int) -> int | None:
    """Read rows of tensors; give the offset behind them, or None where nothing was done.

    ``position`` is that of the first MARK, and ``_rebuild_tensor_v2`` is on top of the stack.
    """
    if machine.is_framed or position < machine.loop_until or machine.load_storage is None:
        return None
    rows, end = _match_rows(machine.data, position, machine.end)
    machine.loop_until = end  # no row is looked at twice
    if len(rows) < _FEWEST_ROWS:
        return None
    columns = _Columns(*zip(*rows, strict=True))
    try:
        opcodes = _execute(machine, columns)
    except (_Irregular, KeyError, UnicodeDecodeError, Malformed, CkptoolError):
        return None  # the loop will find the same, and say where
    machine.count(opcodes - 1)  # the loop counts one itself
    return end


def _match_rows(data: bytes, position: int, limit: int) -> tuple[list[tuple[bytes, ...]], int]:
    rows: list[tuple[bytes, ...]] = []
    for _ in range(_MOST_ROWS):
        found = _ROW.match(data, position, limit)
        if found is None:
            break
        rows.append(found.groups(b""))
        position = found.end()
        if not rows[-1][-1]:
            break
    return rows, position


def _execute(machine: Machine, columns: _Columns) -> int:
    """Do what the opcodes say; only the last lines change anything. Give their number."""
    known = _look_up(machine, columns)
    _check_lengths(columns)
    puts = _list_puts(columns)
    first = _check_indices(machine, b"".join(puts))
    group = _make_group(machine, columns, known)
    is_remembered = list(map(bool, puts))
    machine.postpone(Postponed(first, is_remembered, group.remembered))
    machine.stack[-1:] = chain.from_iterable(zip(group.tensors, group.keys, strict=True))
    if columns.caller[-1]:
        machine.stack.append(known[columns.caller[-1]])
    else:
        machine.stack.pop()  # no key follows the last row
    return _count_opcodes(columns, sum(is_remembered))


def _look_up(machine: Machine, columns: _Columns) -> dict[bytes, Any]:
    """Give what each GET gets, and check that it is what it has to be."""
    words, hooks, callers = set(columns.word), set(columns.hooks), set(columns.caller[:-1])
    others = {*columns.kind, *columns.place, *columns.key, columns.caller[-1]} - {b""}
    known = {opcode: machine.fetch(_index(opcode)) for opcode in words | hooks | callers | others}
    if (
        any(known[opcode] != "storage" for opcode in words)
        or any(known[opcode] is not machine.hooks_call for opcode in hooks)
        or any(known[opcode] is not machine.tensor_call for opcode in callers)
    ):
        raise _Irregular
    return known


def _check_lengths(columns: _Columns) -> None:
    """Check that every text ends where its length says."""
    for lengths, texts in (
        (columns.name_length, columns.name),
        (columns.place_length, columns.place_text),
        (columns.key_length, columns.key_text),
    ):
        if b"".join(lengths) != bytes(filter(None, map(len, texts))):
            raise _Irregular


def _list_puts(columns: _Columns) -> list[bytes]:
    """List the operands of all PUTs in order, and nothing where a value is not remembered."""
    in_order = (
        columns.name_put, columns.place_put, columns.identifier_put, columns.shape_put, columns.stride_put,
        columns.hooks_put, columns.arguments_put, columns.tensor_put, columns.key_put,
    )  # fmt: skip
    return list(chain.from_iterable(zip(*in_order, strict=True)))


def _check_indices(machine: Machine, puts: bytes) -> int:
    """Check that the rows remember their values under new indices, one after the other; give the first."""
    first = int.from_bytes(puts[:4], "little")
    count = len(puts) // 4
    ramp, ones = _ramp(count)
    # All of them compared at once, as one long integer.
    if first + count > 1 << 32 or int.from_bytes(puts, "little") != ramp + first * ones:
        raise _Irregular
    if not machine.is_free(first, count):
        raise _Irregular  # a row could ask for what it has itself put there
    return first


@lru_cache(16)
def _ramp(count: int) -> tuple[int, int]:
    """Give the four-byte integers 0, 1, 2 ... in one integer, and as many ones."""
    ramp = pack(f"<{count}I", *range(count))
    return int.from_bytes(ramp, "little"), int.from_bytes(b"\1\0\0\0" * count, "little")


class _Group(NamedTuple):
    """Hold the values of the rows by column."""

    words: list[Any]
    kinds: list[Any]
    names: list[str]
    places: list[Any]
    numels: list[int]
    storages: list[Any]
    offsets: list[int]
    shapes: list[tuple[int, ...]]
    strides: list[tuple[int, ...]]
    flags: list[bool]
    tensors: list[TensorSpec]
    keys: list[Any]

    def remembered(self) -> Iterator[Any]:
        """Yield every value that may be remembered, in the order of the PUTs; a mapping of hooks is always empty."""
        hooks = [DictNode(type_name="OrderedDict") for _ in self.tensors]
        identifiers = zip(self.words, self.kinds, self.names, self.places, self.numels, strict=True)
        arguments = zip(self.storages, self.offsets, self.shapes, self.strides, self.flags, hooks, strict=True)
        columns = (self.names, self.places, identifiers, self.shapes, self.strides, hooks, arguments, self.tensors)
        return chain.from_iterable(zip(*columns, self.keys, strict=True))


def _make_group(machine: Machine, columns: _Columns, known: dict[bytes, Any]) -> _Group:
    words = [known[opcode] for opcode in columns.word]
    kinds = [known[opcode] for opcode in columns.kind]
    types = [machine.storage_types[id(kind)] for kind in kinds]
    names = list(map(bytes.decode, columns.name))
    places = _values(columns.place, columns.place_text, known)
    numels = _first_numbers(columns.numel)
    storages = _load(machine, types, names, places, numels)
    offsets = _first_numbers(columns.offset)
    shapes, strides = list(map(_read_numbers, columns.shape)), list(map(_read_numbers, columns.stride))
    flags = [opcode == _TRUE for opcode in columns.requires_grad]
    tensors = rebuild_views(storages, offsets, shapes, strides, flags)
    keys = _values(columns.key, columns.key_text, known)
    return _Group(words, kinds, names, places, numels, storages, offsets, shapes, strides, flags, tensors, keys)


def _load(
    machine: Machine, types: list[StorageType], names: list[str], places: list[Any], numels: list[int]
) -> list[Any]:
    """Load the storages, at once where they are all new and each place is text."""
    if machine.load_storages is not None and set(map(type, places)) == {str}:
        found = machine.load_storages(types, names, places, numels)
        if found is not None:
            return found
    if machine.load_storage is None:
        raise _Irregular
    return list(map(machine.load_storage, zip(repeat("storage"), types, names, places, numels)))


def _values(gets: tuple[bytes, ...], texts: tuple[bytes, ...], known: dict[bytes, Any]) -> list[Any]:
    return [known[get] if get else text.decode() for get, text in zip(gets, texts, strict=True)]


def _first_numbers(operands: tuple[bytes, ...]) -> list[int]:
    return [numbers[0] for numbers in map(_read_numbers, operands)]


def _count_opcodes(columns: _Columns, puts: int) -> int:
    sizes = sum(map(_count_sizes, columns.shape)) + sum(map(_count_sizes, columns.stride))
    following = 2 * (len(columns.caller) - columns.caller.count(b""))
    return _ROW_OPCODES * len(columns.word) + puts + sizes + following


# A state dict repeats its shapes, and a pickle its references.


@lru_cache(1024)
def _index(opcode: bytes) -> int:
    return int.from_bytes(opcode[1:], "little")


@lru_cache(4096)
def _read_numbers(opcodes: bytes) -> tuple[int, ...]:
    return tuple([int.from_bytes(one[1:], "little", signed=one[:1] == b"J") for one in _NUMBER.findall(opcodes)])


@lru_cache(4096)
def _count_sizes(opcodes: bytes) -> int:
    return len(_read_numbers(opcodes)) + 1 + opcodes.startswith(b"(")
