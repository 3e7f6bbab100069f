"""The bytes of a view, judged by torch."""

from __future__ import annotations

import io
import subprocess
import sys
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sources import FileBytes, MemoryBytes, dense, view

from ckptool.errors import ChecksumMismatch, UnreadableCheckpoint, UnsupportedTensor
from ckptool.model.copies import Payload
from ckptool.model.dtypes import BY_NAME
from ckptool.model.sources import CHUNK_BYTES
from ckptool.model.values import TensorSpec
from ckptool.operations import gather
from ckptool.operations.transforms import payload_of

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")

DTYPES = ["float64", "float32", "bfloat16", "float8_e5m2", "int64", "int16", "uint8", "uint32", "bool"]
DTYPES += ["complex32", "complex64", "complex128"]


def read(payload: Payload) -> bytes:
    chunks = []
    for extent in payload.extents:
        for chunk in extent.source.stream(extent.offset, extent.nbytes):
            assert 0 < len(chunk) <= CHUNK_BYTES
            chunks.append(bytes(chunk))
    data = b"".join(chunks)
    assert len(data) == payload.nbytes == payload.numel * payload.dtype.itemsize
    return data


def values(spec: TensorSpec) -> bytes:
    return read(payload_of(spec, key="weight"))


def raw(tensor: torch.Tensor) -> bytes:
    dense_copy = torch.empty(tensor.numel(), dtype=tensor.dtype)
    dense_copy.copy_(tensor.resolve_conj().resolve_neg().reshape(-1))
    return dense_copy.view(torch.uint8).numpy().tobytes()


@pytest.fixture
def in_file(tmp_path: Path) -> Iterator[Callable[..., FileBytes]]:
    """Make storages that lie in files, and close those."""
    with ExitStack() as stack:

        def make(data: bytes, **fields: int) -> FileBytes:
            source = FileBytes(tmp_path / f"{len(data)}-{fields.get('crc32')}", data, **fields)
            stack.callback(source.file.close)
            return source

        yield make


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Count the reads of large storages by their length in bytes."""
    counted: Counter[int] = Counter()
    read_into = gather._Storage.read_into

    def count(storage: gather._Storage, target: memoryview, place: int) -> None:
        counted[len(target)] += 1
        read_into(storage, target, place)

    monkeypatch.setattr(gather._Storage, "read_into", count)
    return counted


def random_bytes(nbytes: int, seed: int = 0) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).numpy().tobytes()


def random_elements(dtype: str, count: int) -> bytes:
    """Give bytes of elements that torch negates and copies by their bits.

    It writes a bool as 0 or 1, and it negates a complex number by subtraction: a NaN is quieted, 0 has no sign.
    """
    data = random_bytes(count * BY_NAME[dtype].itemsize)
    if dtype == "bool":
        return bytes(byte & 1 for byte in data)
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, dtype))
    return (
        torch.where(tensor == tensor, tensor, 1 + 1j if tensor.is_complex() else 1).view(torch.uint8).numpy().tobytes()
    )


def as_torch(spec: TensorSpec, data: bytes) -> torch.Tensor:
    """Have torch make the same view of the same bytes."""
    storage = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, spec.dtype.name))
    tensor = storage.as_strided(spec.shape, spec.stride, spec.offset)
    tensor = tensor.conj() if spec.conj else tensor
    return torch._neg_view(tensor) if spec.neg else tensor


def test_a_contiguous_view_is_a_range_of_its_storage() -> None:
    source = MemoryBytes(random_bytes(4000))
    payload = payload_of(view(source, "float32", (10, 20), (20, 1), 100), key="w")
    (extent,) = payload.extents
    assert (extent.source, extent.offset, extent.nbytes) == (source, 400, 800)


def test_nothing_loads_numpy_until_bytes_are_computed() -> None:
    code = """
import sys
sys.path.insert(0, "tests")
from support.sources import MemoryBytes, dense
from ckptool.operations.casts import CastTally
from ckptool.operations.transforms import payload_of
payload_of(dense(MemoryBytes(bytes(16)), "float32", 4), key="w")
assert "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


VIEWS = {
    "transposed": ((7, 5), (1, 7), 0),
    "stepped": ((4, 3), (18, 2), 1),
    "channels_last": ((2, 3, 4, 5), (60, 1, 15, 3), 0),
    "expanded": ((6, 4, 3), (0, 3, 1), 2),
    "expanded scalar": ((5, 5), (0, 0), 7),
    "overlapping": ((3, 2), (1, 1), 0),
    "sliding window": ((20, 5), (1, 3), 4),
    "huge stride of a size-1 dimension": ((1, 4), (10**9, 1), 3),
    "0-dim with an offset": ((), (), 9),
    "strides of a size-0 view": ((0, 3), (1, 7), 0),
    "permuted 4-d": ((3, 4, 2, 5), (10, 30, 5, 1), 0),
}


@pytest.mark.parametrize("shape_stride_offset", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_is_gathered_as_torch_sees_it(
    dtype: str, shape_stride_offset: tuple[tuple[int, ...], tuple[int, ...], int]
) -> None:
    data = random_elements(dtype, 120)
    spec = view(MemoryBytes(data), dtype, *shape_stride_offset)
    assert values(spec) == raw(as_torch(spec, data))


FLIPS = [(name, False, True) for name in DTYPES if name not in ("float8_e5m2", "uint32", "bool")]
FLIPS += [(name, conj, neg) for name in ("complex64", "complex128") for conj in (True, False) for neg in (True, False)]


@pytest.mark.parametrize(("dtype", "conj", "neg"), FLIPS)
def test_lazy_bits_are_applied(dtype: str, conj: bool, neg: bool) -> None:
    data = random_elements(dtype, 60)
    for shape, stride in (((60,), (1,)), ((5, 12), (1, 5))):
        spec = view(MemoryBytes(data), dtype, shape, stride, conj=conj, neg=neg)
        assert values(spec) == raw(as_torch(spec, data))


def test_the_imaginary_part_of_a_conjugate_is_a_negated_stepped_view() -> None:
    numbers = torch.randn(6, 4, dtype=torch.complex64)
    imaginary = numbers.conj().imag
    assert imaginary.is_neg()
    source = MemoryBytes(raw(numbers))
    spec = view(source, "float32", (6, 4), imaginary.stride(), imaginary.storage_offset(), neg=True)
    assert values(spec) == raw(imaginary)


@pytest.mark.parametrize("dtype", DTYPES)
def test_big_endian_bytes_are_swapped_number_by_number(dtype: str) -> None:
    data = random_elements(dtype, 40)
    size = BY_NAME[dtype].swap_size
    swapped = b"".join(data[start : start + size][::-1] for start in range(0, len(data), size))
    spec = view(MemoryBytes(swapped), dtype, (8, 5), (1, 8), big_endian=True)
    assert values(spec) == raw(as_torch(spec, data))
    assert values(dense(MemoryBytes(swapped), dtype, 40, big_endian=True)) == data


def test_everything_at_once_is_gathered_swapped_conjugated_and_negated() -> None:
    data = random_elements("complex64", 48)
    swapped = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, 4).flip(1).numpy().tobytes()
    spec = view(MemoryBytes(swapped), "complex64", (6, 8), (1, 6), big_endian=True, conj=True, neg=True)
    assert values(spec) == raw(as_torch(spec, data))


def test_a_transposed_big_endian_negated_tensor_is_cast() -> None:
    numbers = torch.randn(30, 20)
    swapped = numbers.view(torch.uint8).view(-1, 4).flip(1).numpy().tobytes()
    spec = view(MemoryBytes(swapped), "float32", (20, 30), (1, 20), big_endian=True, neg=True)
    payload = payload_of(spec, key="w", cast=BY_NAME["bfloat16"])
    assert payload.dtype.name == "bfloat16"
    assert read(payload) == raw((-numbers.t()).bfloat16())


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64", "float4_e2m1fn_x2"])
def test_a_cast_leaves_what_is_no_floating_tensor(dtype: str) -> None:
    data = random_bytes(8 * BY_NAME[dtype].itemsize)
    payload = payload_of(dense(MemoryBytes(data), dtype, 8), key="w", cast=BY_NAME["float16"])
    assert (payload.dtype.name, read(payload)) == (dtype, data)


@st.composite
def strided(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    rank = draw(st.integers(1, 5))
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank)))
    stride = tuple(draw(st.lists(st.integers(0, 60), min_size=rank, max_size=rank)))
    return shape, stride, draw(st.integers(0, 50))


def small_blocks(monkeypatch: pytest.MonkeyPatch, gap: int) -> None:
    monkeypatch.setattr(gather, "BLOCK_BYTES", 256)
    monkeypatch.setattr(gather, "_TILE_BYTES", 64)
    monkeypatch.setattr(gather, "_GAP_BYTES", gap)


@pytest.mark.parametrize("has_range", [True, False], ids=["file", "computed"])
@pytest.mark.parametrize("gap", [0, 16, 1 << 20])
def test_large_views_are_gathered_block_by_block(
    in_file: Callable[..., FileBytes], monkeypatch: pytest.MonkeyPatch, gap: int, has_range: bool
) -> None:
    small_blocks(monkeypatch, gap)
    data = random_bytes(5000)
    source = in_file(data, lead=77) if has_range else MemoryBytes(data)

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(strided(), st.sampled_from(["uint8", "int16", "float32"]), st.data())
    def agree(geometry: tuple[tuple[int, ...], tuple[int, ...], int], dtype: str, choice: st.DataObject) -> None:
        shape, stride, offset = geometry
        spec = view(source, dtype, shape, stride, offset)
        end = offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if end * spec.dtype.itemsize > len(data):
            return
        expected = raw(as_torch(spec, data))
        assert values(spec) == expected
        if not spec.is_contiguous:
            start = choice.draw(st.integers(0, len(expected)))
            length = choice.draw(st.integers(0, len(expected) - start))
            (extent,) = payload_of(spec, key="w").extents
            assert b"".join(map(bytes, extent.source.stream(start, length))) == expected[start : start + length]

    agree()


def test_a_large_transpose_takes_flat_memory_and_few_reads(
    in_file: Callable[..., FileBytes], monkeypatch: pytest.MonkeyPatch, reads: Counter[int]
) -> None:
    matrix = torch.arange(3000 * 4000, dtype=torch.int32).view(3000, 4000)
    source = in_file(raw(matrix))
    source.data = source.data[:1]  # what follows reads the file alone
    monkeypatch.setattr(gather, "BLOCK_BYTES", 4 << 20)
    checksum = 0
    tracemalloc.start()
    (extent,) = payload_of(view(source, "int32", (4000, 3000), (1, 4000)), key="w").extents
    for chunk in extent.source.stream():
        checksum = zlib.crc32(chunk, checksum)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert checksum == zlib.crc32(raw(matrix.t()))
    assert peak < 11 << 20  # the block, a tile, and a few chunks on their way
    assert sum(length * count for length, count in reads.items()) == extent.nbytes  # no byte is read twice
    assert reads.total() < 60_000


def test_a_stepped_view_is_read_in_stretches_not_by_element(
    in_file: Callable[..., FileBytes], monkeypatch: pytest.MonkeyPatch, reads: Counter[int]
) -> None:
    small_blocks(monkeypatch, 4096)
    data = random_bytes(40_000)
    assert values(view(in_file(data), "uint8", (10_000,), (4,))) == data[::4]
    assert reads.total() <= 40_000 // 32


@pytest.mark.parametrize("small", [True, False], ids=["indexed", "blocks"])
def test_a_gathered_view_checks_the_checksum_of_its_storage(
    in_file: Callable[..., FileBytes], monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    if not small:
        small_blocks(monkeypatch, 0)
    data = random_bytes(4000)
    sound, damaged = in_file(data, crc32=zlib.crc32(data)), in_file(data, crc32=zlib.crc32(data) ^ 1)
    geometry = ("float32", (10, 10), (1, 10), 500)
    assert values(view(sound, *geometry)) == raw(as_torch(view(sound, *geometry), data))
    with pytest.raises(ChecksumMismatch):
        values(view(damaged, *geometry))


def test_a_file_that_shrinks_is_one_sentence(
    in_file: Callable[..., FileBytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch, 0)
    source = in_file(random_bytes(4000))
    source.truncate(2000)
    with pytest.raises(UnreadableCheckpoint, match=r"^memory: the file ended early; get the file again$"):
        values(view(source, "float32", (40, 25), (1, 40)))


def test_a_full_folder_for_temporary_files_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 0)
    full = io.FileIO("/dev/full", "wb")
    monkeypatch.setattr(gather.tempfile, "TemporaryFile", lambda buffering: full)
    with pytest.raises(UnreadableCheckpoint, match=r"cannot be copied to .* set TMPDIR to a folder"):
        values(view(MemoryBytes(random_bytes(40_000)), "float32", (100, 100), (1, 100)))


def test_a_range_outside_a_computed_source_is_refused() -> None:
    (extent,) = payload_of(view(MemoryBytes(bytes(100)), "uint8", (5, 4), (1, 5)), key="w").extents
    with pytest.raises(UnreadableCheckpoint, match="lie outside its 20"):
        list(extent.source.stream(10, 11))


def test_the_expansion_of_a_few_bytes_into_terabytes_is_refused() -> None:
    spec = view(MemoryBytes(bytes(16)), "float32", (2**50,), (0,))
    with pytest.raises(UnsupportedTensor, match=r'^tensor "w" .* 16 stored bytes up to 4503599627370496; .*exclude$'):
        payload_of(spec, key="w")


@pytest.mark.parametrize(
    ("stored", "dense_bytes", "is_refused"),
    [
        (16, 64 << 20, False),
        (16, (64 << 20) + 4, True),
        (32 << 20, 128 << 20, False),
        (32 << 20, (128 << 20) + 4, True),
    ],
)
def test_the_limit_of_an_expansion(stored: int, dense_bytes: int, is_refused: bool) -> None:
    source = MemoryBytes(b"")
    source.nbytes = stored
    spec = view(source, "float32", (dense_bytes // 4,), (0,))
    if is_refused:
        with pytest.raises(UnsupportedTensor):
            payload_of(spec, key="w")
    else:
        assert payload_of(spec, key="w").nbytes == dense_bytes


@pytest.mark.parametrize("dtype", ["bool", "uint16", "float8_e4m3fn", "float8_e4m3fnuz", "bits8"])
def test_a_negation_that_torch_has_not_is_refused(dtype: str) -> None:
    with pytest.raises(UnsupportedTensor, match=f'tensor "w" is marked as negated, which {dtype} cannot be'):
        payload_of(dense(MemoryBytes(bytes(8)), dtype, 4, neg=True), key="w")


def test_a_cast_to_what_is_no_floating_type_is_refused() -> None:
    with pytest.raises(UnsupportedTensor, match='tensor "w" cannot be cast to int8'):
        payload_of(dense(MemoryBytes(bytes(8)), "float32", 2), key="w", cast=BY_NAME["int8"])
