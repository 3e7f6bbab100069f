"""Casts between floating types, bit by bit against torch's ``.to``."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.sources import MemoryBytes, dense

from ckptool.model.dtypes import BY_NAME
from ckptool.model.results import CastLoss
from ckptool.operations.casts import CastTally
from ckptool.operations.transforms import payload_of

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = [name for name, dtype in BY_NAME.items() if dtype.is_floating]
NARROW = [name for name in FLOATS if BY_NAME[name].itemsize <= 2]
PAIRS = [(source, target) for source in FLOATS for target in FLOATS if source != target]


def values_of(name: str) -> np.ndarray:
    """Give every value of a narrow type as float64, ascending."""
    codes = np.arange(1 << 8 * BY_NAME[name].itemsize, dtype=f"u{BY_NAME[name].itemsize}")
    wide = torch.from_numpy(codes).view(getattr(torch, name)).float().double().numpy()
    return np.unique(wide[np.isfinite(wide)])


def edges() -> np.ndarray:
    """Give, as float64, every value of every narrow type, every tie between two, and ties beyond the last."""
    found = []
    for name in NARROW:
        values = values_of(name)
        step = values[-1] - values[-2]
        found += [values, -values, (values[1:] + values[:-1]) / 2, values[-1] + step * np.array([0.5, 1, 1.5, 2])]
    return np.unique(np.concatenate([*found, [np.inf, -np.inf, np.nan, -0.0, 5e-324, 1.7e308]]))


def float32_bits() -> np.ndarray:
    with np.errstate(over="ignore"):
        near = edges().astype("f4").view("u4")
    random = np.random.default_rng(0).integers(0, 1 << 32, 1_000_000, dtype="u4")
    return np.concatenate([random, near, near + np.uint32(1), near - np.uint32(1)])


def float64_bits() -> np.ndarray:
    """Include what lies next to a tie of float32: rounding twice and rounding once differ there."""
    generator = np.random.default_rng(1)
    near = edges().view("u8")
    random = generator.integers(0, 1 << 64, 500_000, dtype="u8")
    usual = (generator.standard_normal(500_000) * 10.0 ** generator.integers(-9, 6, 500_000)).view("u8")
    shifts = [np.uint64(shift) for shift in (1, 1 << 28, (1 << 28) - 1, (1 << 28) + 1)]
    return np.concatenate(
        [random, usual, near, *(near + shift for shift in shifts), *(near - shift for shift in shifts)]
    )


BITS = {"float64": float64_bits, "float32": float32_bits}


def stored(name: str) -> bytes:
    size = BY_NAME[name].itemsize
    return (BITS[name]() if name in BITS else np.arange(1 << 8 * size, dtype=f"u{size}")).tobytes()


SOURCES = {name: stored(name) for name in FLOATS}


def cast(data: bytes, source: str, target: str, tally: CastTally | None = None) -> bytes:
    spec = dense(MemoryBytes(data, chunk=700_001), source, len(data) // BY_NAME[source].itemsize)
    (extent,) = payload_of(spec, key="w", cast=BY_NAME[target], tally=tally).extents
    return b"".join(bytes(chunk) for chunk in extent.source.stream(extent.offset, extent.nbytes))


def torch_cast(data: bytes, source: str, target: str) -> bytes:
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, source))
    return tensor.to(getattr(torch, target)).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_cast_is_bit_equal_to_torch(source: str, target: str) -> None:
    data = SOURCES[source]
    got = np.frombuffer(cast(data, source, target), f"u{BY_NAME[target].itemsize}")
    expected = np.frombuffer(torch_cast(data, source, target), f"u{BY_NAME[target].itemsize}")
    wrong = np.flatnonzero(got != expected)
    before = np.frombuffer(data, f"u{BY_NAME[source].itemsize}")
    assert len(got) == len(expected)
    assert not len(wrong), [(hex(before[i]), hex(expected[i]), hex(got[i])) for i in wrong[:5]]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 33, 100])
def test_the_nan_of_a_short_float64_is_torchs_too(count: int) -> None:
    data = np.full(count, np.nan).tobytes()
    assert cast(data, "float64", "bfloat16") == torch_cast(data, "float64", "bfloat16")


def test_any_part_of_a_cast_is_that_part_of_the_whole() -> None:
    data = np.where(np.arange(300_000) % 7 == 0, np.nan, np.arange(300_000.0)).tobytes()
    whole = torch_cast(data, "float64", "bfloat16")
    (extent,) = payload_of(dense(MemoryBytes(data), "float64", 300_000), key="w", cast=BY_NAME["bfloat16"]).extents
    for offset, nbytes in ((0, 3), (1, 1), (131_072 * 2 - 1, 2), (500_001, 99_999), (599_990, 10), (600_000, 0)):
        assert b"".join(map(bytes, extent.source.stream(offset, nbytes))) == whole[offset : offset + nbytes]


def expected_loss(data: bytes, source: str, target: str) -> CastLoss:
    """Count by the definitions, in float64, over what torch gives."""
    old = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, source))
    new = old.to(getattr(torch, target))
    before, after = (tensor.float().double() if tensor.itemsize < 4 else tensor.double() for tensor in (old, new))
    overflowed = before.isfinite() & ~after.isfinite()
    largest = 448.0 if target == "float8_e4m3fn" else math.inf
    saturated = (before.abs() > largest + 16) & after.isfinite() & ~after.isnan()
    underflowed = (before != 0) & (after == 0)
    kept = before.isfinite() & after.isfinite() & (before != 0) & ~saturated & ~underflowed
    errors = ((after - before).abs() / before.abs())[kept]
    counts = (int(mask.sum()) for mask in (overflowed, saturated, underflowed))
    return CastLoss("w", source, target, len(before), *counts, float(errors.max()) if len(errors) else 0.0)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_loss_is_what_torchs_result_shows(source: str, target: str) -> None:
    tally = CastTally("w", BY_NAME[source], BY_NAME[target])
    cast(SOURCES[source], source, target, tally)
    expected = expected_loss(SOURCES[source], source, target)
    relative = expected.largest_relative_error
    assert tally.loss.largest_relative_error == pytest.approx(relative, rel=1e-6)
    assert tally.loss == CastLoss(
        "w",
        source,
        target,
        expected.elements,
        expected.overflowed,
        expected.saturated,
        expected.underflowed,
        tally.loss.largest_relative_error,
    )


def test_the_loss_of_a_few_values_by_hand() -> None:
    numbers = np.array([1.0, 70000.0, -70000.0, 1e-9, 0.0, -0.0, np.inf, np.nan, 2049.0], "f4")
    tally = CastTally("layer.weight", BY_NAME["float32"], BY_NAME["float16"])
    cast(numbers.tobytes(), "float32", "float16", tally)
    assert tally.loss == CastLoss("layer.weight", "float32", "float16", 9, 2, 0, 1, pytest.approx(1 / 2049))
    saturating = CastTally("w", BY_NAME["float32"], BY_NAME["float8_e4m3fn"])
    cast(np.array([448.0, 464.0, 465.0, -1e9, np.inf], "f4").tobytes(), "float32", "float8_e4m3fn", saturating)
    assert (saturating.loss.saturated, saturating.loss.overflowed) == (3, 0)


def test_a_second_pass_counts_anew_and_a_partial_one_not_at_all() -> None:
    data = np.full(100, 1e9, "f4").tobytes()
    tally = CastTally("w", BY_NAME["float32"], BY_NAME["float16"])
    (extent,) = payload_of(
        dense(MemoryBytes(data), "float32", 100), key="w", cast=BY_NAME["float16"], tally=tally
    ).extents
    assert tally.loss.elements == 0
    for _ in range(2):
        list(extent.source.stream())
        assert (tally.loss.elements, tally.loss.overflowed) == (100, 100)
    list(extent.source.stream(0, 50))
    assert tally.loss.elements == 100
