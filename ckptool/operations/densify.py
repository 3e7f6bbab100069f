"""Sparse tensors as the dense ones that they mean, computed while they are read, bit for bit as torch does.

Every stored value is added to a zero, in the order of the file: a negative zero becomes a
positive one, and of equal places the sum is rounded after each step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptool.errors import UnsupportedTensor
from ckptool.model.dtypes import BY_NAME, DType
from ckptool.model.sources import range_end
from ckptool.model.values import OpaqueTensor, Storage, TensorSpec, row_major
from ckptool.operations.cast_kernels import cast_bytes, widen
from ckptool.operations.sparse_places import contradiction, read_part, read_runs

Array = NDArray[Any]

# The element types that torch can add up on a CPU, and so densify.
_SUMMED = frozenset(
    {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}
    | {"complex64", "complex128"}
)
_PIECE_BYTES = 1 << 20
_LARGEST_BYTES = 2**63 - 1


def densify(tensor: OpaqueTensor, key: str) -> TensorSpec:
    """Describe the dense tensor that a sparse one means; its indices are read and checked here, its values later.

    :raises UnsupportedTensor: torch cannot densify its element type, or its size cannot be addressed.
    :raises UnreadableCheckpoint: its parts do not fit each other, or an index lies outside its shape.
    """
    dtype, shape = tensor.dtype, tensor.shape
    if dtype is None or shape is None or dtype.name not in _SUMMED:
        name = "of no known type" if dtype is None else dtype.name
        raise UnsupportedTensor(
            f'tensor "{key}" is sparse and {name}, which torch cannot make dense; leave it out with --exclude'
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > _LARGEST_BYTES:
        raise UnsupportedTensor(f'tensor "{key}" is too large to be dense; leave it out with --exclude')
    _refuse_repeated(tensor, key)
    source = DensifiedSource(tensor, key, dtype, nbytes)
    return TensorSpec(dtype, shape, row_major(shape), 0, Storage("densified", source, nbytes))


def _refuse_repeated(tensor: OpaqueTensor, key: str) -> None:
    """Only COO tensors may name a place twice: it then holds the sum."""
    places = read_runs(tensor, key).places
    if tensor.detail != "COO" and len(np.unique(places)) < len(places):
        raise contradiction(tensor.detail, key, "names a place twice")


@dataclass(frozen=True, slots=True, eq=False)
class DensifiedSource:
    """Give the row-major little-endian elements of the dense tensor (see ``ByteSource``).

    Private memory holds the indices and values while they are streamed, and one piece of the dense tensor.
    """

    tensor: OpaqueTensor
    key: str
    dtype: DType
    nbytes: int
    crc32: None = None
    file_range: None = None

    @property
    def label(self) -> str:
        """Name the place of the stored values."""
        values: TensorSpec = dict(self.tensor.parts)["values"]
        return values.storage.source.label

    def stream(self, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes from ``offset`` on, as ``ByteSource.stream`` says."""
        end = range_end(self, offset, nbytes)
        if offset >= end:
            return
        runs = read_runs(self.tensor, self.key)
        run_bytes = runs.length * self.dtype.itemsize
        values = read_part(dict(self.tensor.parts)["values"], self.key).reshape(len(runs.places), run_bytes)
        order = np.argsort(runs.places, kind="stable")
        stored = _Stored(self.dtype, runs.length, runs.places[order], values, order)
        step = max(1, _PIECE_BYTES // run_bytes)
        for first in range(offset // run_bytes, -(-end // run_bytes), step):
            piece = stored.piece(first, min(step, self.nbytes // run_bytes - first))
            at = first * run_bytes
            yield piece.data[max(0, offset - at) : end - at]


@dataclass(frozen=True, slots=True, eq=False)
class _Stored:
    """Hold the stored runs sorted by their place; ``order`` says which row of ``values`` each is."""

    dtype: DType
    length: int
    places: Array
    values: Array
    order: Array

    def piece(self, first: int, count: int) -> Array:
        """Give ``count`` runs from the given one on, as bytes."""
        start, end = np.searchsorted(self.places, (first, first + count))
        places = self.places[start:end] - first
        values = self.values[self.order[start:end]]
        add = _add_bfloat16 if self.dtype.name == "bfloat16" else _add_numbers
        return add(self.dtype, count * self.length, self.length, places, values)


def _add_numbers(dtype: DType, numel: int, length: int, places: Array, values: Array) -> Array:
    dense = np.zeros((numel // length, length), dtype.numpy)
    with np.errstate(all="ignore"):
        numbers = values != 0 if dtype.kind == "bool" else values.view(dense.dtype)
        if np.any(places[1:] == places[:-1]):
            np.add.at(dense, places, numbers)
        else:
            dense[places] += numbers
    octets: Array = dense.reshape(-1).view(np.uint8)
    return octets


def _add_bfloat16(dtype: DType, numel: int, length: int, places: Array, values: Array) -> Array:
    """Add in float32 and round after each step: of equal places, one each time."""
    dense = np.zeros((numel // length, length * dtype.itemsize), np.uint8)
    starts = np.searchsorted(places, places)  # where the runs of the same place begin
    rank = np.arange(len(places)) - starts
    by_rank = np.argsort(rank, kind="stable")
    bounds = np.searchsorted(rank[by_rank], np.arange(int(rank.max(initial=-1)) + 2))
    for start, end in itertools.pairwise(bounds):
        chosen = by_rank[start:end]
        with np.errstate(all="ignore"):
            total = widen(dense[places[chosen]].reshape(-1), dtype) + widen(values[chosen].reshape(-1), dtype)
        dense[places[chosen]] = cast_bytes(total.view(np.uint8), BY_NAME["float32"], dtype).reshape(len(chosen), -1)
    return dense.reshape(-1)
