"""Sparse tensors as the dense ones that they mean, computed while they are read, bit for bit as torch does.

Source of the rules on indices: aten/src/ATen/native/sparse/ValidateCompressedIndicesCommon.h and the checks of
``torch.sparse_coo_tensor``. Every stored value is added to a zero, in the order of the file: a negative zero becomes a
positive one, and of equal places the sum is rounded after each step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptool.errors import UnreadableCheckpoint, UnsupportedTensor
from ckptool.model.dtypes import BY_NAME, DType
from ckptool.model.values import OpaqueTensor, Storage, TensorSpec, row_major
from ckptool.operations.cast_kernels import cast_bytes, widen
from ckptool.operations.transforms import payload_of

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
    places = _read_runs(tensor, key).places
    if tensor.detail != "COO" and len(np.unique(places)) < len(places):
        raise _bad(tensor.detail, key, "names a place twice")


def check_sparse(tensor: OpaqueTensor, key: str) -> None:
    """Read the indices of a sparse tensor and hold them to its shape; they need not be sorted.

    :raises UnreadableCheckpoint: its parts do not fit each other, or an index lies outside its shape.
    """
    _read_runs(tensor, key)


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
        end = self.nbytes if nbytes is None else offset + nbytes
        if offset >= end:
            return
        runs = _read_runs(self.tensor, self.key)
        run_bytes = runs.length * self.dtype.itemsize
        values = _read(dict(self.tensor.parts)["values"], self.key).reshape(len(runs.places), run_bytes)
        order = np.argsort(runs.places, kind="stable")
        stored = _Stored(self.dtype, runs.length, runs.places[order], values, order)
        step = max(1, _PIECE_BYTES // run_bytes)
        for first in range(offset // run_bytes, -(-end // run_bytes), step):
            piece = stored.piece(first, min(step, self.nbytes // run_bytes - first))
            at = first * run_bytes
            yield piece.data[max(0, offset - at) : end - at]


@dataclass(frozen=True, slots=True, eq=False)
class _Runs:
    """Cut the dense tensor into runs of ``length`` elements; ``places`` says which run each stored one fills."""

    length: int
    places: Array


_NO_RUNS = _Runs(1, np.empty(0, np.int64))  # of a dense tensor without elements


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


# --- where the stored values belong ---


def _read_runs(tensor: OpaqueTensor, key: str) -> _Runs:
    parts = dict(tensor.parts)
    shape = tensor.shape or ()
    payload_of(parts["values"], key=key)  # refuses a view of a few bytes that claims to be many
    read = _coo_runs if tensor.detail == "COO" else _compressed_runs
    runs = read(_Sparse(key, tensor.detail, shape, parts))
    # Where the dense tensor is empty, there is no place; what is stored is then empty, too.
    if len(runs.places) * runs.length != parts["values"].numel:
        raise _bad(tensor.detail, key, "holds another number of values than of indices")
    return runs


@dataclass(frozen=True, slots=True, eq=False)
class _Sparse:
    key: str
    layout: str
    shape: tuple[int, ...]
    parts: dict[str, Any]

    def indices(self, name: str) -> Array:
        """Read one of the index tensors as int64.

        :raises UnreadableCheckpoint: it is none.
        """
        spec: TensorSpec = self.parts[name]
        if spec.dtype.name not in ("int64", "int32"):
            raise self.bad(f"has {name} of type {spec.dtype.name}")
        codes = _read(spec, self.key).view(f"<i{spec.dtype.itemsize}")
        return codes.reshape(spec.shape).astype(np.int64)

    def bad(self, what: str) -> UnreadableCheckpoint:
        """Say what contradicts what."""
        return _bad(self.layout, self.key, what)


def _bad(layout: str, key: str, what: str) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(
        f'tensor "{key}" is sparse ({layout}) and {what}, against the rules of its layout; get the file again or leave '
        "it out with --exclude"
    )


def _coo_runs(sparse: _Sparse) -> _Runs:
    """Read ``indices`` (sparse dimensions, stored); the values are (stored, dense dimensions)."""
    indices = sparse.indices("indices")
    values: TensorSpec = sparse.parts["values"]
    if indices.ndim != 2 or len(indices) > len(sparse.shape):
        raise sparse.bad("has indices of another shape")
    rows, dense = sparse.shape[: len(indices)], sparse.shape[len(indices) :]
    if values.shape != (indices.shape[1], *dense):
        raise sparse.bad("has values of another shape than its indices ask for")
    for index, size in zip(indices, rows, strict=True):
        _check_range(sparse, index, size)
    return _Runs(math.prod(dense), _places(indices, rows)) if math.prod(dense) else _NO_RUNS


def _compressed_runs(sparse: _Sparse) -> _Runs:
    """Read compressed and plain indices of (batch, ...); values are (batch, stored[, block], dense dimensions)."""
    compressed, plain, values = list(sparse.parts)[:3]
    bounds, others = sparse.indices(compressed), sparse.indices(plain)
    has_blocks = sparse.layout in ("BSR", "BSC")
    spec: TensorSpec = sparse.parts[values]
    batch_dims = bounds.ndim - 1
    first_dense = batch_dims + 1 + 2 * has_blocks
    batch, dense = sparse.shape[:batch_dims], sparse.shape[batch_dims + 2 :]
    fits = batch_dims >= 0 and len(sparse.shape) >= batch_dims + 2 and others.ndim == batch_dims + 1
    if not fits or spec.shape[:first_dense][: batch_dims + 1] != others.shape or spec.shape[first_dense:] != dense:
        raise sparse.bad("has values of another shape than its indices ask for")
    block = spec.shape[batch_dims + 1 : first_dense] if has_blocks else (1, 1)
    grid = _grid(sparse, sparse.shape[batch_dims : batch_dims + 2], block)
    by_columns = sparse.layout in ("CSC", "BSC")
    lines, crossing = grid[::-1] if by_columns else grid
    if bounds.shape != (*batch, lines + 1) or others.shape[:-1] != batch:
        raise sparse.bad(f"has {compressed} of another shape")
    batches, stored = math.prod(batch), others.shape[-1]
    line = _expand(sparse, bounds.reshape(batches, lines + 1), others.reshape(batches, stored), crossing)
    length = block[1] * math.prod(dense)
    if not length:
        return _NO_RUNS
    crossed = others.reshape(-1)
    row, column = (crossed, line) if by_columns else (line, crossed)
    which = np.repeat(np.arange(batches), stored)
    # A block is as many runs as it has rows, each as long as its columns and what is dense below them.
    rows = (row[:, None] * block[0] + np.arange(block[0])).reshape(-1)
    places = _places(
        np.stack([np.repeat(which, block[0]), rows, np.repeat(column, block[0])]),
        (batches, sparse.shape[batch_dims], grid[1]),
    )
    return _Runs(length, places)


def _grid(sparse: _Sparse, plane: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, int]:
    """Count the blocks of a matrix in both directions."""
    if any(size < 1 or whole % size for whole, size in zip(plane, block, strict=True)):
        raise sparse.bad("has blocks that do not fill its shape")
    return plane[0] // block[0], plane[1] // block[1]


def _expand(sparse: _Sparse, bounds: Array, others: Array, crossing: int) -> Array:
    """Give the line of every stored element; bounds are (batches, lines + 1), others (batches, stored)."""
    stored = others.shape[1]
    counts = np.diff(bounds, axis=1)
    if np.any(bounds[:, 0] != 0) or np.any(bounds[:, -1] != stored) or np.any(counts < 0) or np.any(counts > crossing):
        raise sparse.bad("has compressed indices that do not count its values")
    _check_range(sparse, others, crossing)
    lines = np.tile(np.arange(counts.shape[1]), len(counts))
    line: Array = np.repeat(lines, counts.reshape(-1))
    return line


def _check_range(sparse: _Sparse, indices: Array, size: int) -> None:
    if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise sparse.bad(f"has an index outside of its shape {list(sparse.shape)}")


def _places(indices: Array, sizes: Sequence[int]) -> Array:
    """Number the places of a row-major grid; the indices are (dimensions, stored)."""
    place = np.zeros(indices.shape[1], np.int64)
    for index, size in zip(indices, sizes, strict=True):
        place = place * size + index
    return place


def _read(spec: TensorSpec, key: str) -> Array:
    """Read all bytes of a dense part, row-major and little-endian."""
    chunks = [
        np.frombuffer(chunk, np.uint8).copy()
        for extent in payload_of(spec, key=key).extents
        for chunk in extent.source.stream(extent.offset, extent.nbytes)
    ]
    read: Array = np.concatenate(chunks) if chunks else np.empty(0, np.uint8)
    return read
