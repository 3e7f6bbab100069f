"""The digest is a function of names, dtypes, shapes and values, and of nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from support.sources import MemoryBytes, dense, view

from ckptool.errors import UnsupportedTensor
from ckptool.model.values import TensorSpec
from ckptool.operations.digest import digest

DATA = np.arange(24, dtype="f4").tobytes()


def tensors(**changed: TensorSpec) -> dict[str, TensorSpec]:
    return {"a": dense(MemoryBytes(DATA), "float32", 4, 6), "b": dense(MemoryBytes(b"\x01\x00"), "bool", 2), **changed}


def test_the_digest_is_what_its_definition_says() -> None:
    first = hashlib.sha256(b"float32 4,6\n" + DATA).hexdigest()
    second = hashlib.sha256(b"bool 2\n\x01\x00").hexdigest()
    scalar = hashlib.sha256(b"int64 \n" + bytes(8)).hexdigest()
    lines = f"{first} 1 a\n{second} 1 b\n{scalar} 3 \N{SNOWMAN}\n"
    found = digest(tensors(**{"\N{SNOWMAN}": dense(MemoryBytes(bytes(8)), "int64")}))
    assert found == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def test_nothing_at_all_has_a_digest() -> None:
    assert digest({}) == f"sha256:{hashlib.sha256(b'').hexdigest()}"


TRANSPOSED = np.arange(24, dtype="f4").reshape(4, 6).T.tobytes()
BIG_ENDIAN = np.arange(24, dtype=">f4").tobytes()
NEGATED = (-np.arange(24, dtype="f4")).tobytes()
SAME = {
    "other chunks": dense(MemoryBytes(DATA, chunk=3), "float32", 4, 6),
    "part of a larger storage": view(MemoryBytes(b"slack---" + DATA), "float32", (4, 6), (6, 1), 2),
    "column-major": view(MemoryBytes(TRANSPOSED), "float32", (4, 6), (1, 4)),
    "big-endian": dense(MemoryBytes(BIG_ENDIAN), "float32", 4, 6, big_endian=True),
    "negated": dense(MemoryBytes(NEGATED), "float32", 4, 6, neg=True),
}


@pytest.mark.parametrize("spec", SAME.values(), ids=SAME)
def test_the_same_values_give_the_same_digest_however_they_lie(spec: TensorSpec) -> None:
    assert digest(tensors(a=spec)) == digest(tensors())


OTHER = {
    "dtype": dense(MemoryBytes(DATA), "int32", 4, 6),
    "shape": dense(MemoryBytes(DATA), "float32", 6, 4),
    "rank": dense(MemoryBytes(DATA), "float32", 24),
    "one bit": dense(MemoryBytes(DATA[:-1] + b"\x40"), "float32", 4, 6),
    "zero with a sign": dense(MemoryBytes(b"\0\0\0\x80" + DATA[4:]), "float32", 4, 6),
}


@pytest.mark.parametrize("spec", OTHER.values(), ids=OTHER)
def test_another_type_shape_or_bit_gives_another_digest(spec: TensorSpec) -> None:
    assert digest(tensors(a=spec)) != digest(tensors())


def test_names_count_and_their_order_does_not() -> None:
    assert digest(dict(reversed(tensors().items()))) == digest(tensors())
    swapped = {"b": tensors()["a"], "a": tensors()["b"]}
    assert digest(swapped) != digest(tensors())
    assert digest({"a": tensors()["a"]}) != digest(tensors())


def test_a_tied_name_counts_as_a_copy_under_it_does() -> None:
    shared = dense(MemoryBytes(DATA), "float32", 4, 6)
    tied = digest({"head": shared, "embedding": shared})
    assert digest({"head": shared, "embedding": dense(MemoryBytes(DATA), "float32", 4, 6)}) == tied


def test_tied_names_are_read_once() -> None:
    class Counted(MemoryBytes):
        passes = 0

        def stream(self, offset: int = 0, nbytes: int | None = None):
            Counted.passes += 1
            return super().stream(offset, nbytes)

    shared = dense(Counted(DATA), "float32", 4, 6)
    digest({"a": shared, "b": shared, "c": shared})
    assert Counted.passes == 1


def test_a_name_that_is_no_text_has_a_digest_too() -> None:
    assert digest({"\ud800": tensors()["a"]}) != digest({"\udc00": tensors()["a"]})


def test_an_expansion_is_refused() -> None:
    with pytest.raises(UnsupportedTensor, match='tensor "a" is a view that repeats'):
        digest({"a": view(MemoryBytes(bytes(16)), "float32", (2**40,), (0,))})
