"""Build pickles opcode by opcode, the ones that no pickler writes above all."""

from __future__ import annotations

import struct
from typing import Any


class Pickle:
    """Collect opcodes; every method but ``stop`` gives the builder itself."""

    def __init__(self, protocol: int | None = 2) -> None:
        self.data = b"" if protocol is None else bytes([0x80, protocol])

    def raw(self, data: bytes) -> Pickle:
        """Add any bytes."""
        self.data += data
        return self

    def stop(self) -> bytes:
        """Add STOP and give the stream."""
        return self.data + b"."

    def mark(self) -> Pickle:
        return self.raw(b"(")

    def pop(self) -> Pickle:
        return self.raw(b"0")

    def dup(self) -> Pickle:
        return self.raw(b"2")

    def none(self) -> Pickle:
        return self.raw(b"N")

    def true(self) -> Pickle:
        return self.raw(b"\x88")

    def text(self, value: str) -> Pickle:
        data = value.encode("utf-8", "surrogatepass")
        return self.raw(b"X" + struct.pack("<I", len(data)) + data)

    def integer(self, value: int) -> Pickle:
        size = max(1, (value.bit_length() + 8) // 8)
        return self.raw(b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True))

    def python2_text(self, value: bytes) -> Pickle:
        return self.raw(b"U" + bytes([len(value)]) + value)

    def binbytes(self, value: bytes) -> Pickle:
        return self.raw(b"B" + struct.pack("<I", len(value)) + value)

    def frame(self, nbytes: int) -> Pickle:
        return self.raw(b"\x95" + struct.pack("<Q", nbytes))

    def put(self, index: int) -> Pickle:
        return self.raw(b"r" + struct.pack("<I", index))

    def get(self, index: int) -> Pickle:
        return self.raw(b"j" + struct.pack("<I", index))

    def name(self, module: str, name: str) -> Pickle:
        """Add a GLOBAL."""
        return self.raw(f"c{module}\n{name}\n".encode())

    def stack_name(self, module: str, name: str) -> Pickle:
        """Add a STACK_GLOBAL with its operands."""
        return self.text(module).text(name).raw(b"\x93")

    def value(self, value: Any) -> Pickle:
        """Add a plain value: None, bool, int, float, str, bytes, or a tuple, list or dict of such."""
        return _WRITERS[type(value)](self, value)

    def reduce(self) -> Pickle:
        return self.raw(b"R")

    def newobj(self) -> Pickle:
        return self.raw(b"\x81")

    def build(self) -> Pickle:
        return self.raw(b"b")

    def call(self, module: str, name: str, *args: Any) -> Pickle:
        """Add the call of a name with plain arguments."""
        return self.name(module, name).value(args).reduce()

    def storage(self, kind: str = "FloatStorage", key: Any = "0", numel: Any = 4, module: str = "torch") -> Pickle:
        """Add a persistent id as torch's zip format has it."""
        self.mark().text("storage").name(module, kind).value(key).text("cpu").value(numel)
        return self.raw(b"tQ")

    def tensor(
        self, offset: Any = 0, shape: Any = (4,), stride: Any = (1,), *rest: Any, numel: Any = 4, dtype: str = "Float"
    ) -> Pickle:
        """Add what ``_rebuild_tensor_v2`` is called with and the call; ``rest`` are further plain arguments."""
        self.name("torch._utils", "_rebuild_tensor_v2").mark().storage(f"{dtype}Storage", numel=numel)
        self.value(offset).value(shape).value(stride).raw(b"\x89").call("collections", "OrderedDict")
        for argument in rest:
            self.value(argument)
        return self.raw(b"tR")


def _write_all(pickle: Pickle, values: Any, end: bytes) -> Pickle:
    for value in values:
        pickle.value(value)
    return pickle.raw(end)


_WRITERS = {
    type(None): lambda pickle, _: pickle.none(),
    bool: lambda pickle, value: pickle.raw(b"\x88" if value else b"\x89"),
    int: Pickle.integer,
    float: lambda pickle, value: pickle.raw(b"G" + struct.pack(">d", value)),
    str: Pickle.text,
    bytes: Pickle.binbytes,
    tuple: lambda pickle, value: _write_all(pickle.mark(), value, b"t"),
    list: lambda pickle, value: _write_all(pickle.raw(b"](").raw(b""), value, b"e"),
    dict: lambda pickle, value: _write_all(pickle.raw(b"}("), [x for pair in value.items() for x in pair], b"u"),
}
