"""How much one pickle may ask for. Every honest file stays far below; a hostile one is refused in linear time."""

from __future__ import annotations

PICKLE_BYTES = 512 << 20  # about 150 bytes a tensor: millions of tensors
OPCODES = 50_000_000
BATCH = 250_000  # opcodes between two looks at the budget
STACK_ITEMS = 10_000_000
OPEN_MARKS = 10_000
OBJECTS = 30_000_000  # blocks of memory that the interpreter may hold for it
COPIES = 1_000_000  # elements copied from values that are used again and again, beyond twice the pickle's size
INTEGER_BYTES = 64
DIGITS = 160  # as many as 64 bytes can need
TEXT_CHARACTERS = 64 << 20
KEY_CHARACTERS = 4_096
KEY_PARTS = 1_024  # of a tuple, repeated ones each time
NAME_CHARACTERS = 256
NESTING = 256
NODES = 5_000_000
NON_TEXT_KEYS = 1_000_000
EXTENT = 2**63 - 1  # the largest size, stride, offset or length in bytes
