"""The loop of the pickle machine: where it stands, what it may read, what it may use up."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import compress, repeat
from operator import length_hint
from typing import Any, NamedTuple

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.pickle import limits
from ckptool.formats.pickle.reading import Malformed, Reading, Truncated

INT4 = struct.Struct("<i")
UINT2 = struct.Struct("<H")
UINT4 = struct.Struct("<I")
UINT8 = struct.Struct("<Q")
FLOAT8 = struct.Struct(">d")
unpack_uint4 = UINT4.unpack_from
_LONG_BINPUT, _BINPUT, _MEMOIZE, _BINGET, _BININT1 = b"rq\x94hK"
_TOO_LONG = f"has more than {limits.OPCODES} instructions"
_BYTE_OPERANDS = b"KhqUC\x80\x8a\x8c"  # opcodes with an operand or a length of one byte

Opcode = Callable[[int], int]


class Postponed(NamedTuple):
    """Hold values until somebody asks for one: they belong under consecutive memo indices from ``first`` on.

    ``values`` yields them all; ``is_remembered`` tells which of them a PUT follows.
    """

    first: int
    is_remembered: list[bool]
    values: Callable[[], Iterable[Any]]


class TruncatedPickle(UnreadableCheckpoint):
    """Refuse bytes that end before the pickle does; a container that holds more of them may try again."""


class Stopped(Exception):
    """Leave the loop with what STOP found; ``end`` is the offset behind it."""

    def __init__(self, value: Any, end: int) -> None:
        super().__init__()
        self.value = value
        self.end = end


class Engine:
    """Run one pickle, opcode by opcode, inside its bytes, its frames and its budget.

    The stack is one list per open MARK, as in ``pickle._Unpickler``, so that no opcode can reach below its mark.
    """

    def __init__(self, data: bytes, start: int, reading: Reading) -> None:
        self.data = data
        self.start = start
        self.end = min(len(data), start + limits.PICKLE_BYTES)
        self.limit = self.end  # the end of the open frame, or of the data
        self.is_framed = False
        self.position = start  # of the opcode that is executed, once the loop is left
        self.reading = reading
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self._postponed: list[Postponed] = []  # in the order of their indices
        self._postponed_end = 0
        self.executed = 0  # opcodes, those of the running batch not yet among them
        self._blocks = sys.getallocatedblocks()

    def run(self, opcodes: Mapping[int, Opcode]) -> Stopped:
        """Execute from ``start`` to STOP. An opcode gets the offset behind it and gives that behind its operand.

        :raises Malformed: the bytes are no pickle.
        """
        table = [opcodes.get(code, self._refuse) for code in range(256)]
        try:
            while self.executed < limits.OPCODES:
                self._run_batch(table)
                self._check_budget()
        except Stopped as stopped:
            self._check_budget()
            return stopped.with_traceback(None)  # which would keep the machine and all its memo alive
        raise Malformed(_TOO_LONG)

    def _run_batch(self, table: list[Opcode]) -> None:
        """Execute the next opcodes.

        Half of all opcodes of a state dict are spelled out here, because a call takes CPython longer than they do.
        """
        data, memo, position = self.data, self.memo, self.position
        steps = repeat(None, limits.BATCH)
        try:
            for _ in steps:
                if position >= self.limit:
                    self._leave_frame(position)
                opcode = data[position]
                if opcode == _LONG_BINPUT:
                    memo[unpack_uint4(data, position + 1)[0]] = self.stack[-1]
                    position += 5
                elif opcode == _BININT1:
                    self.stack.append(data[position + 1])
                    position += 2
                elif opcode == _BINGET and data[position + 1] in memo:
                    self.stack.append(memo[data[position + 1]])
                    position += 2
                elif opcode == _BINPUT:
                    memo[data[position + 1]] = self.stack[-1]
                    position += 2
                elif opcode == _MEMOIZE and not self._postponed:
                    memo[len(memo)] = self.stack[-1]
                    position += 1
                else:
                    position = table[opcode](position + 1)
        finally:
            self.position = position
            self.executed += limits.BATCH - length_hint(steps)

    def count(self, opcodes: int) -> None:
        """Count opcodes that are executed besides the one that the loop is at."""
        looked_at, self.executed = self.executed // limits.BATCH, self.executed + opcodes
        if self.executed // limits.BATCH != looked_at:
            self._check_budget()

    def fetch(self, index: int) -> Any:
        """Give what is remembered under an index."""
        if index not in self.memo:
            self.settle()
        if index not in self.memo:
            raise Malformed(f"asks for memo entry {index}, which was never set")
        return self.memo[index]

    def is_free(self, first: int, count: int) -> bool:
        """Tell whether nothing is remembered under any of ``count`` indices from ``first`` on."""
        if first < self._postponed_end:
            self.settle()
        if len(self.memo) > count:
            return self.memo.keys().isdisjoint(range(first, first + count))
        return not any(first <= index < first + count for index in self.memo)

    def postpone(self, values: Postponed) -> None:
        """Remember values under indices that are free, but only when somebody asks: for most nobody ever does."""
        self._postponed.append(values)
        self._postponed_end = values.first + sum(values.is_remembered)

    def settle(self) -> None:
        """Remember all that was postponed; what was put in its place since then stays."""
        for first, is_remembered, values in self._postponed:
            for index, value in enumerate(compress(values(), is_remembered), first):
                self.memo.setdefault(index, value)
        self._postponed.clear()
        self._postponed_end = 0

    def _leave_frame(self, position: int) -> None:
        """Check that no instruction crosses the end of its frame: CPython's two readers disagree there."""
        if position > self.limit:
            raise Malformed("has an instruction that crosses the end of its frame")
        if position >= self.end:
            raise Truncated
        self.limit, self.is_framed = self.end, False

    def _check_budget(self) -> None:
        """Refuse what takes more time or memory than any checkpoint needs."""
        if self.executed > limits.OPCODES:
            raise Malformed(_TOO_LONG)
        if len(self.stack) + sum(map(len, self.marked)) > limits.STACK_ITEMS:
            raise Malformed(f"holds more than {limits.STACK_ITEMS} values at once")
        if len(self.marked) > limits.OPEN_MARKS:
            raise Malformed(f"opens more than {limits.OPEN_MARKS} groups at once")
        if sys.getallocatedblocks() - self._blocks > limits.OBJECTS:
            raise Malformed(f"makes more than {limits.OBJECTS} objects")

    def _refuse(self, position: int) -> int:
        raise Malformed(f"has an unknown instruction 0x{self.data[position - 1]:02x}")

    def explain(self, error: Exception) -> UnreadableCheckpoint:
        """Turn what interrupted the loop into one sentence."""
        if self._is_short(error):
            return TruncatedPickle(
                f"{self.reading.label}: the pickle ends early, at byte {self.end}; "
                "the file was probably cut short, get it again"
            )
        problem = str(error) if isinstance(error, Malformed) else "takes more values than there are"
        return UnreadableCheckpoint(
            f"{self.reading.label}: the pickle {problem} (byte {self.position}); "
            "the file is damaged or crafted, get it again from a source you trust"
        )

    def _is_short(self, error: Exception) -> bool:
        if isinstance(error, IndexError):
            return self.position + 1 == self.end and self.data[self.position] in _BYTE_OPERANDS
        return isinstance(error, struct.error | Truncated)

    def where(self, position: int) -> str:
        """Name a place in this pickle for a report."""
        return f"{self.reading.label}@{position}"

    def read_line(self, position: int) -> tuple[bytes, int]:
        """Read an operand that ends with its line."""
        end = self.data.find(b"\n", position, self.end)
        if end < 0:
            raise Truncated
        return self.data[position:end], end + 1

    def read_sized(self, position: int, nbytes: int) -> tuple[bytes, int]:
        """Read an operand of known length, which is compared with what is left before anything is allocated."""
        end = position + nbytes
        if end > self.end:
            raise Truncated
        return self.data[position:end], end

    def read_counted(self, position: int, length: struct.Struct) -> tuple[bytes, int]:
        """Read an operand behind its own length."""
        (nbytes,) = length.unpack_from(self.data, position)
        if nbytes < 0:
            raise Malformed("has a value of negative length")
        return self.read_sized(position + length.size, nbytes)

    def pop_mark(self) -> list[Any]:
        """Give the values above the last MARK."""
        items = self.stack
        self.stack = self.marked.pop()
        return items
