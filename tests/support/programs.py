"""Make pickles that are programs: the stack and the memo are simulated, so that every opcode finds what it takes.

``draw`` picks numbers, so that any source of choices can be the author: hypothesis, a seed, or a fuzzer's bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Kind = str  # what lies on the stack: "text", "int", "value", "tuple", "list", "dict", "set", "name", "object", "tensor"

NAMES = (
    ("collections", "OrderedDict"), ("__builtin__", "set"), ("torch", "Size"), ("torch", "float16"),
    ("torch", "FloatStorage"), ("torch._utils", "_rebuild_tensor_v2"), ("_codecs", "encode"), ("os", "system"),
    ("builtins", "eval"), ("builtins", "complex"), ("my.module", "Config"), ("argparse", "Namespace"),
    ("copyreg", "__newobj__"),
)  # fmt: skip
SAFE_NAMES = NAMES[:6]
STORAGES = (4, 0, 7)  # 32-bit floats under the keys "0", "1" and "2"
TEXTS = ("a", "weight", "", "layer.0.bias", "\u00e9", "latin1", "x" * 300)
INTEGERS = (0, 1, -1, 4, 255, 256, 65_535, 2**31 - 1, -(2**31), 2**63, 2**100)
_SCALARS = ("text", "int", "value")
_KEYS = ("text", "int")
_ANY = (*_SCALARS, "tuple", "list", "dict", "set", "name", "object", "tensor")


Dialect = Literal["any", "plain", "torch"]  # plain: without names; torch: what its own safe reader understands


class Draw(Protocol):
    """Choose a number from 0 up to, not including, ``count``."""

    def __call__(self, count: int) -> int: ...


@dataclass
class Program:
    """Write one program; ``stack`` holds the kinds of what it would have pushed so far, a list for each open MARK."""

    draw: Draw
    protocol: int
    dialect: Dialect
    data: bytearray = field(default_factory=bytearray)
    stack: list[Kind] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: list[Kind] = field(default_factory=list)

    def choose(self, values: Sequence[object]) -> object:
        return values[self.draw(len(values))]

    def push(self, data: bytes, kind: Kind) -> None:
        self.data += data
        self.stack.append(kind)

    def has(self, *kinds: Sequence[Kind]) -> bool:
        """Tell whether the top of the stack, above the last MARK, is of these kinds, the last on top."""
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - floor < len(kinds):
            return False
        top = self.stack[len(self.stack) - len(kinds) :]
        return all(kind in wanted for kind, wanted in zip(top, kinds, strict=True))

    def above(self) -> list[Kind]:
        return self.stack[self.marks[-1] :] if self.marks else []


def _text(program: Program) -> None:
    text = str(program.choose(TEXTS)).encode()
    if program.protocol >= 4 and len(text) < 256 and program.draw(2):
        program.push(b"\x8c" + bytes([len(text)]) + text, "text")
    elif program.protocol == 0:
        program.push(b"V" + text.decode().encode("raw_unicode_escape") + b"\n", "text")
    else:
        program.push(b"X" + struct.pack("<I", len(text)) + text, "text")


def _integer(program: Program) -> None:
    value = int(str(program.choose(INTEGERS)))
    if program.protocol == 0:
        program.push(f"L{value}L\n".encode(), "int")
    elif 0 <= value < 256:
        program.push(b"K" + bytes([value]), "int")
    elif -(2**31) <= value < 2**31:
        program.push(b"J" + struct.pack("<i", value), "int")
    else:
        size = (value.bit_length() + 8) // 8
        program.push(b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True), "int")


def _constant(program: Program) -> None:
    values = (b"N", b"G" + struct.pack(">d", -0.0), b"I01\n", b"F2.5\n")
    program.push(values[program.draw(2 if program.dialect == "torch" else 4)], "value")


def _empty(program: Program) -> None:
    data, kind = ((b"]", "list"), (b"}", "dict"), (b")", "tuple"), (b"\x8f", "set"))[
        program.draw(4 if program.protocol >= 4 else 3)
    ]
    program.push(data, kind)


def _mark(program: Program) -> None:
    if len(program.marks) < 8:
        program.data += b"("
        program.marks.append(len(program.stack))


def _close(program: Program) -> None:
    """End the open group in one of the ways that fit what is in it."""
    items = program.above()
    is_pairs = len(items) % 2 == 0 and all(kind in _KEYS for kind in items[::2])
    is_torch = program.dialect == "torch"
    ways: list[tuple[bytes, Kind | None]] = (
        [(b"t", "tuple")] if is_torch else [(b"t", "tuple"), (b"l", "list"), (b"1", None)]
    )
    below = program.stack[program.marks[-1] - 1] if program.marks[-1] else ""
    if is_pairs and not is_torch:
        ways.append((b"d", "dict"))
    if is_pairs and below == "dict":
        ways.append((b"u", None))
    if below == "list":
        ways.append((b"e", None))
    if below == "set" and all(kind in _KEYS for kind in items):
        ways.append((b"\x90", None))
    if items and items[0] == "name" and not is_torch:
        ways.append((b"o", "object"))
    opcode, kind = ways[program.draw(len(ways))]
    del program.stack[program.marks.pop() :]
    program.data += opcode
    if kind is not None:
        program.stack.append(kind)


def _combine(count: int, opcode: bytes) -> Callable[[Program], None]:
    def combine(program: Program) -> None:
        del program.stack[-count:]
        program.push(opcode, "tuple")

    return combine


def _set_item(program: Program) -> None:
    del program.stack[-2:]
    program.data += b"s"


def _append(program: Program) -> None:
    program.stack.pop()
    program.data += b"a"


def _name(program: Program) -> None:
    names = SAFE_NAMES if program.dialect == "torch" else NAMES
    module, name = names[program.draw(len(names))]
    if program.protocol >= 4 and program.draw(2):
        operands = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
        program.push(operands + b"\x93", "name")
    else:
        program.push(f"c{module}\n{name}\n".encode(), "name")


def _call(program: Program) -> None:
    del program.stack[-2:]
    program.push(b"\x81" if program.protocol >= 2 and program.draw(2) else b"R", "object")


def _build(program: Program) -> None:
    program.stack.pop()
    program.data += b"b"


def _pop(program: Program) -> None:
    program.stack.pop()
    program.data += b"0"


def _duplicate(program: Program) -> None:
    program.push(b"2", program.stack[-1])


def _remember(program: Program) -> None:
    index = len(program.memo)
    program.memo.append(program.stack[-1])
    if program.protocol >= 4 and program.draw(2):
        program.data += b"\x94"
    else:
        program.data += b"r" + struct.pack("<I", index) if program.protocol else f"p{index}\n".encode()


def _recall(program: Program) -> None:
    index = program.draw(len(program.memo))
    program.push(b"j" + struct.pack("<I", index) if program.protocol else f"g{index}\n".encode(), program.memo[index])


def _storage(program: Program) -> None:
    key = program.draw(len(STORAGES))
    numel = STORAGES[key]
    program.data += b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00%dX\x03\x00\x00\x00cpuK%ctQ" % (
        key,
        numel,
    )
    program.stack.append("storage")


def _tensor(program: Program) -> None:
    offset, size, stride = (program.draw(3), program.draw(5), program.draw(3))
    program.data += b"ctorch._utils\n_rebuild_tensor_v2\n("
    _storage(program)
    program.stack.pop()
    program.data += b"K%cK%c\x85K%c\x85\x89ccollections\nOrderedDict\n)RtR" % (offset, size, stride)
    program.stack.append("tensor")


# What may come next: the least protocol, when it fits, and what it does.
_ACTIONS: tuple[tuple[int, Callable[[Program], bool], Callable[[Program], None]], ...] = (
    (0, lambda p: True, _text),
    (0, lambda p: True, _integer),
    (0, lambda p: True, _constant),
    (1, lambda p: True, _empty),
    (0, lambda p: True, _mark),
    (0, lambda p: bool(p.marks), _close),
    (2, lambda p: p.has(_ANY), _combine(1, b"\x85")),
    (2, lambda p: p.has(_ANY, _ANY), _combine(2, b"\x86")),
    (2, lambda p: p.has(_ANY, _ANY, _ANY), _combine(3, b"\x87")),
    (0, lambda p: p.has(("dict",), _KEYS, _ANY), _set_item),
    (0, lambda p: p.has(("list",), _ANY), _append),
    (0, lambda p: True, _name),
    (0, lambda p: p.has(("name",), ("tuple",)), _call),
    (0, lambda p: p.has(("object",), ("dict",)), _build),
    (0, lambda p: p.has(_ANY), _pop),
    (0, lambda p: p.has(_ANY), _duplicate),
    (0, lambda p: p.has(_ANY), _remember),
    (0, lambda p: bool(p.memo), _recall),
    (2, lambda p: True, _tensor),
)
_UNSPOKEN: dict[Dialect, tuple[Callable[[Program], None], ...]] = {
    "any": (),
    "plain": (_name, _tensor),
    "torch": (_pop, _duplicate),
}


def write_program(draw: Draw, steps: int, dialect: Dialect = "any") -> bytes:
    """Write a program of so many steps that leaves exactly one value."""
    protocol = 2 if dialect == "torch" else draw(6)
    program = Program(draw, protocol, dialect)
    if protocol >= 2:
        program.data += bytes([0x80, protocol])
    actions = [(fits, act) for least, fits, act in _ACTIONS if protocol >= least and act not in _UNSPOKEN[dialect]]
    for _ in range(steps):
        fitting = [act for fits, act in actions if fits(program)]
        fitting[draw(len(fitting))](program)
    while program.marks:
        _close(program)
    if not program.stack:
        _constant(program)
    while len(program.stack) > 1:
        if protocol >= 2 and (dialect == "torch" or draw(4)):
            _combine(2, b"\x86")(program)
        else:
            _pop(program)
    return bytes(program.data + b".")


BOUNDARIES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
OPCODES = b"(.012FIJKLMNPQRSTUVXabcdeghijloprstu}])" + bytes([*range(0x80, 0x99), 0x42, 0x43])


def mutate(data: bytes, draw: Draw) -> bytes:
    """Damage a program as a fuzzer, or an attacker, would."""
    damaged = bytearray(data)
    for _ in range(1 + draw(3)):
        at, length = draw(len(damaged) + 1), 1 + draw(8)
        match draw(7):
            case 0:
                damaged[at : at + 1] = bytes([draw(256)])
            case 1:
                damaged[at : at + 1] = OPCODES[(chosen := draw(len(OPCODES))) : chosen + 1]
            case 2:
                del damaged[at : at + length]
            case 3:
                damaged[at : at + 4] = struct.pack("<I", BOUNDARIES[draw(len(BOUNDARIES))])
            case 4:
                source = draw(len(damaged) + 1)
                damaged[at:at] = damaged[source : source + length * 4]
            case 5:
                damaged[at:] = b""
            case _:
                damaged[at : at + 1] = bytes([damaged[at] ^ (1 << draw(8))]) if at < len(damaged) else b"."
    return bytes(damaged)
