"""The opcodes that make plain values: numbers, text, containers, and what is remembered of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckptool.formats.pickle import literals
from ckptool.formats.pickle.engine import FLOAT8, INT4, UINT2, UINT4, UINT8, Engine, unpack_uint4
from ckptool.formats.pickle.reading import Malformed, Truncated
from ckptool.model.values import DictNode, SetNode, Stub

# The hottest opcodes call these without looking them up.
_unpack_int4 = INT4.unpack_from


class ValueMachine(Engine):
    """Execute what needs no name and calls nothing."""

    # Numbers and constants

    def _push_none(self, position: int) -> int:
        self.stack.append(None)
        return position

    def _push_true(self, position: int) -> int:
        self.stack.append(True)
        return position

    def _push_false(self, position: int) -> int:
        self.stack.append(False)
        return position

    def _int(self, position: int) -> int:
        line, position = self.read_line(position)
        self.stack.append(literals.read_integer(line))
        return position

    def _binint(self, position: int) -> int:
        self.stack.append(_unpack_int4(self.data, position)[0])
        return position + 4

    def _binint2(self, position: int) -> int:
        self.stack.append(UINT2.unpack_from(self.data, position)[0])
        return position + 2

    def _long(self, position: int) -> int:
        line, position = self.read_line(position)
        self.stack.append(literals.read_long(line))
        return position

    def _long1(self, position: int) -> int:
        data, position = self.read_sized(position + 1, self.data[position])
        self.stack.append(literals.read_bytes_integer(data))
        return position

    def _long4(self, position: int) -> int:
        data, position = self.read_counted(position, INT4)
        self.stack.append(literals.read_bytes_integer(data))
        return position

    def _float(self, position: int) -> int:
        line, position = self.read_line(position)
        self.stack.append(literals.read_float(line))
        return position

    def _binfloat(self, position: int) -> int:
        self.stack.append(FLOAT8.unpack_from(self.data, position)[0])
        return position + 8

    # Text and bytes

    def _string(self, position: int) -> int:
        line, position = self.read_line(position)
        self.stack.append(literals.read_quoted_text(line))
        return position

    def _binstring(self, position: int) -> int:
        data, position = self.read_counted(position, INT4)
        self.stack.append(literals.read_python2_text(data))
        return position

    def _short_binstring(self, position: int) -> int:
        data, position = self.read_sized(position + 1, self.data[position])
        self.stack.append(literals.read_python2_text(data))
        return position

    def _unicode(self, position: int) -> int:
        line, position = self.read_line(position)
        self.stack.append(literals.read_escaped_text(line))
        return position

    def _binunicode(self, position: int) -> int:
        end: int = position + 4 + unpack_uint4(self.data, position)[0]
        if end > self.end:
            raise Truncated
        self.stack.append(literals.read_text(self.data[position + 4 : end], self.reading))
        return end

    def _short_binunicode(self, position: int) -> int:
        data, position = self.read_sized(position + 1, self.data[position])
        self.stack.append(literals.read_text(data, self.reading))
        return position

    def _binunicode8(self, position: int) -> int:
        data, position = self.read_counted(position, UINT8)
        self.stack.append(literals.read_text(data, self.reading))
        return position

    def _binbytes(self, position: int) -> int:
        data, position = self.read_counted(position, UINT4)
        self.stack.append(data)
        return position

    def _short_binbytes(self, position: int) -> int:
        data, position = self.read_sized(position + 1, self.data[position])
        self.stack.append(data)
        return position

    def _binbytes8(self, position: int) -> int:
        data, position = self.read_counted(position, UINT8)
        self.stack.append(data)
        return position

    # Lists, tuples, dictionaries, sets

    def _empty_list(self, position: int) -> int:
        self.stack.append([])
        return position

    def _list(self, position: int) -> int:
        items = self.pop_mark()
        self.stack.append(items)
        return position

    def _append(self, position: int) -> int:
        item = self.stack.pop()
        self._extend([item])
        return position

    def _appends(self, position: int) -> int:
        self._extend(self.pop_mark())
        return position

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is Stub:
            target.items.extend(items)
        else:
            raise Malformed("appends to something that is no list")

    def _empty_tuple(self, position: int) -> int:
        self.stack.append(())
        return position

    def _tuple(self, position: int) -> int:
        items = self.pop_mark()
        self.stack.append(tuple(items))
        return position

    def _tuple1(self, position: int) -> int:
        stack = self.stack
        stack[-1] = (stack[-1],)
        return position

    def _tuple2(self, position: int) -> int:
        stack = self.stack
        second = stack.pop()
        stack[-1] = (stack[-1], second)
        return position

    def _tuple3(self, position: int) -> int:
        stack = self.stack
        third, second = stack.pop(), stack.pop()
        stack[-1] = (stack[-1], second, third)
        return position

    def _empty_dict(self, position: int) -> int:
        self.stack.append(DictNode())
        return position

    def _dict(self, position: int) -> int:
        pairs = _pair(self.pop_mark())
        self.stack.append(DictNode(pairs))
        return position

    def _setitem(self, position: int) -> int:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([(key, value)])
        return position

    def _setitems(self, position: int) -> int:
        self._update(_pair(self.pop_mark()))
        return position

    def _update(self, pairs: list[tuple[Any, Any]]) -> None:
        target = self.stack[-1]
        if type(target) is not DictNode and type(target) is not Stub:
            raise Malformed("sets an item of something that is no dictionary")
        target.pairs.extend(pairs)

    def _empty_set(self, position: int) -> int:
        self.stack.append(SetNode([]))
        return position

    def _additems(self, position: int) -> int:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) is Stub or (type(target) is SetNode and target.type_name == "set"):
            target.items.extend(items)
            return position
        raise Malformed("adds to something that is no set")

    def _frozenset(self, position: int) -> int:
        items = self.pop_mark()
        self.stack.append(SetNode(items, "frozenset"))
        return position

    # Memo

    def _put(self, position: int) -> int:
        line, position = self.read_line(position)
        self.memo[literals.read_index(line)] = self.stack[-1]
        return position

    def _memoize(self, position: int) -> int:
        self.settle()
        self.memo[len(self.memo)] = self.stack[-1]
        return position

    def _fetch(self, index: int) -> None:
        self.stack.append(self.fetch(index))

    def _get(self, position: int) -> int:
        line, position = self.read_line(position)
        self._fetch(literals.read_index(line))
        return position

    def _binget(self, position: int) -> int:
        self._fetch(self.data[position])
        return position + 1

    def _long_binget(self, position: int) -> int:
        self._fetch(unpack_uint4(self.data, position)[0])
        return position + 4


def _pair(items: list[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise Malformed("has a dictionary key without its value")
    return list(zip(items[::2], items[1::2], strict=True))


VALUE_OPCODES: dict[int, Callable[[ValueMachine, int], int]] = {
    ord("N"): ValueMachine._push_none, 0x88: ValueMachine._push_true, 0x89: ValueMachine._push_false,
    ord("I"): ValueMachine._int, ord("J"): ValueMachine._binint, ord("M"): ValueMachine._binint2,
    ord("L"): ValueMachine._long, 0x8A: ValueMachine._long1, 0x8B: ValueMachine._long4, ord("F"): ValueMachine._float,
    ord("G"): ValueMachine._binfloat, ord("S"): ValueMachine._string, ord("T"): ValueMachine._binstring,
    ord("U"): ValueMachine._short_binstring, ord("V"): ValueMachine._unicode, ord("X"): ValueMachine._binunicode,
    0x8C: ValueMachine._short_binunicode, 0x8D: ValueMachine._binunicode8, ord("B"): ValueMachine._binbytes,
    ord("C"): ValueMachine._short_binbytes, 0x8E: ValueMachine._binbytes8, 0x96: ValueMachine._binbytes8,
    ord("]"): ValueMachine._empty_list, ord("l"): ValueMachine._list, ord("a"): ValueMachine._append,
    ord("e"): ValueMachine._appends, ord(")"): ValueMachine._empty_tuple, ord("t"): ValueMachine._tuple,
    0x85: ValueMachine._tuple1, 0x86: ValueMachine._tuple2, 0x87: ValueMachine._tuple3,
    ord("}"): ValueMachine._empty_dict, ord("d"): ValueMachine._dict, ord("s"): ValueMachine._setitem,
    ord("u"): ValueMachine._setitems, 0x8F: ValueMachine._empty_set, 0x90: ValueMachine._additems,
    0x91: ValueMachine._frozenset, ord("p"): ValueMachine._put, 0x94: ValueMachine._memoize,
    ord("g"): ValueMachine._get, ord("h"): ValueMachine._binget, ord("j"): ValueMachine._long_binget,
}  # fmt: skip
