"""What is told about the values of a tensor, judged by torch in float64."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from support.sources import MemoryBytes, dense, view

from ckptool.errors import ChecksumMismatch, UnsupportedTensor
from ckptool.model.dtypes import BY_NAME
from ckptool.model.results import TensorStatistics
from ckptool.operations.statistics import tensor_statistics
from ckptool.operations.values import decode

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")

NUMERIC = [name for name, dtype in BY_NAME.items() if dtype.has_numbers]
REAL = [name for name in NUMERIC if BY_NAME[name].kind != "complex"]


def random_bytes(nbytes: int) -> bytes:
    return np.random.default_rng(7).integers(0, 256, nbytes, dtype="u1").tobytes()


def as_torch(data: bytes, dtype: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, dtype))


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def statistics_of(tensor: torch.Tensor) -> TensorStatistics:
    data = bytes_of(tensor)
    found = tensor_statistics(
        dense(MemoryBytes(data), str(tensor.dtype).removeprefix("torch."), *tensor.shape), key="w"
    )
    assert found is not None
    return found


def test_every_type_with_numbers_is_known() -> None:
    assert len(NUMERIC) == 21
    assert not BY_NAME["float4_e2m1fn_x2"].has_numbers


@pytest.mark.parametrize("dtype", NUMERIC)
def test_values_are_decoded_as_torch_reads_them(dtype: str) -> None:
    data = random_bytes(4096 * 16)
    expected = as_torch(data, dtype)
    if dtype == "complex32":
        expected = torch.view_as_complex(as_torch(data, "float16").float().view(-1, 2))
    elif BY_NAME[dtype].is_floating and expected.itemsize < 4:
        expected = expected.float()
    got = decode(memoryview(data), BY_NAME[dtype])
    np.testing.assert_array_equal(got, expected.numpy())


@pytest.mark.parametrize("dtype", REAL)
def test_random_bits_are_described_as_torch_does(dtype: str) -> None:
    size = BY_NAME[dtype].itemsize
    numbers = as_torch(random_bytes(200_003 * size), dtype)
    wide = (numbers.float() if numbers.is_floating_point() and size < 4 else numbers).double()
    if dtype == "float64":  # whose random bits have squares beyond every float64
        numbers = wide = torch.where(wide.abs() < 1e100, wide, torch.where(wide.abs() < 1e200, torch.inf, torch.nan))
    finite = wide[wide.isfinite()]
    found = statistics_of(numbers)
    assert (found.elements, found.nan, found.infinite) == (200_003, int(wide.isnan().sum()), int(wide.isinf().sum()))
    assert found.zeros == int((wide == 0).sum())
    assert (found.finite, found.finite_share) == (len(finite), len(finite) / 200_003)
    assert float(found.minimum) == float(finite.min())
    assert float(found.maximum) == float(finite.max())
    assert found.mean == pytest.approx(float(finite.mean()), rel=1e-9, abs=1e-12 * float(finite.abs().max()))
    assert found.std == pytest.approx(float(finite.std(correction=0)), rel=1e-9)


def test_a_small_spread_far_from_zero_is_not_lost() -> None:
    numbers = 1e8 + torch.randn(500_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = statistics_of(numbers)
    assert found.mean == pytest.approx(float(numbers.mean()), rel=1e-14)
    assert found.std == pytest.approx(float((numbers - 1e8).std(correction=0)), rel=1e-6)


def test_runs_of_different_means_are_merged() -> None:
    numbers = torch.cat([torch.zeros(70_000), torch.full((70_000,), 10.0), torch.full((60_000,), -3.0)])
    found = statistics_of(numbers)
    assert found.zeros == 70_000
    assert (found.mean, found.std) == pytest.approx((float(numbers.mean()), float(numbers.double().std(correction=0))))


def test_integers_keep_their_exact_extremes() -> None:
    found = statistics_of(torch.tensor([2**63 - 1, -(2**63), 0, 2**53 + 1]))
    assert (found.minimum, found.maximum, found.zeros) == (-(2**63), 2**63 - 1, 1)
    assert isinstance(found.maximum, int)
    largest = np.array([2**64 - 1, 2**64 - 2], "u8").tobytes()
    found = tensor_statistics(dense(MemoryBytes(largest), "uint64", 2), key="w")
    assert found is not None
    assert (found.minimum, found.maximum) == (2**64 - 2, 2**64 - 1)


def test_a_bool_is_zero_or_one_whatever_its_byte() -> None:
    found = tensor_statistics(dense(MemoryBytes(bytes([0, 1, 2, 255])), "bool", 4), key="w")
    assert found == TensorStatistics(4, 0, 0, 1, 0, 1, 0.75, math.sqrt(3) / 4)


def test_a_complex_number_counts_by_its_magnitude() -> None:
    numbers = torch.tensor([3 + 4j, -5 - 12j, 0j, complex(math.nan, 1), complex(math.inf, 0)], dtype=torch.complex64)
    found = statistics_of(numbers)
    assert found == TensorStatistics(5, 1, 1, 1, 0.0, 13.0, 6.0, pytest.approx(math.sqrt((36 + 1 + 49) / 3)))
    assert statistics_of(numbers.to(torch.complex128)) == found


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([], TensorStatistics(0, 0, 0, 0, None, None, None, None)),
        ([math.nan, math.inf, -math.inf], TensorStatistics(3, 1, 2, 0, None, None, None, None)),
        ([-0.0, 0.0], TensorStatistics(2, 0, 0, 2, 0.0, 0.0, 0.0, 0.0)),
        ([math.nan, 2.5], TensorStatistics(2, 1, 0, 0, 2.5, 2.5, 2.5, 0.0)),
    ],
)
def test_special_values_are_counted_and_left_out(numbers: list[float], expected: TensorStatistics) -> None:
    assert statistics_of(torch.tensor(numbers)) == expected


def test_one_huge_value_spoils_the_spread_and_nothing_else() -> None:
    found = statistics_of(torch.tensor([1e300, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert (found.minimum, found.maximum, found.mean) == (0.0, 1e300, 2.5e299)


def test_a_transposed_negated_view_is_described_as_it_is_meant() -> None:
    numbers = torch.arange(12.0)
    spec = view(MemoryBytes(bytes_of(numbers)), "float32", (3, 2), (1, 4), 1, neg=True)
    found = tensor_statistics(spec, key="w")
    expected = torch._neg_view(numbers.as_strided((3, 2), (1, 4), 1))
    assert found is not None
    assert (found.minimum, found.maximum) == (float(expected.min()), float(expected.max()))
    assert found.mean == pytest.approx(float(expected.mean()))


@pytest.mark.parametrize("dtype", ["bits8", "quint8", "float4_e2m1fn_x2"])
def test_what_has_no_numbers_has_no_statistics(dtype: str) -> None:
    assert tensor_statistics(dense(MemoryBytes(bytes(8)), dtype, 8), key="w") is None


def test_damaged_and_hostile_tensors_are_refused() -> None:
    damaged = MemoryBytes(bytes(400), crc32=zlib.crc32(bytes(400)) ^ 1)
    with pytest.raises(ChecksumMismatch):
        tensor_statistics(dense(damaged, "float32", 100), key="w")
    with pytest.raises(UnsupportedTensor):
        tensor_statistics(view(MemoryBytes(bytes(16)), "float32", (2**40,), (0,)), key="w")
