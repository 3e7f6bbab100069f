"""Where the stored values of a sparse tensor belong in the dense one, read from its indices and checked.

Source of the rules: aten/src/ATen/native/sparse/ValidateCompressedIndicesCommon.h and the checks of
``torch.sparse_coo_tensor``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptool.errors import UnreadableCheckpoint
from ckptool.model.values import OpaqueTensor, TensorSpec
from ckptool.operations.transforms import payload_of

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Cut the dense tensor into runs of ``length`` elements; ``places`` says which run each stored one fills."""

    length: int
    places: Array


_NO_RUNS = Runs(1, np.empty(0, np.int64))  # of a dense tensor without elements


def read_runs(tensor: OpaqueTensor, key: str) -> Runs:
    """Read the indices of a sparse tensor and hold them to its shape; they need not be sorted.

    :raises UnreadableCheckpoint: its parts do not fit each other, or an index lies outside its shape.
    """
    parts = dict(tensor.parts)
    shape = tensor.shape or ()
    payload_of(parts["values"], key=key)  # refuses a view of a few bytes that claims to be many
    read = _coo_runs if tensor.detail == "COO" else _compressed_runs
    runs = read(_Sparse(key, tensor.detail, shape, parts))
    # Where the dense tensor is empty, there is no place; what is stored is then empty, too.
    if len(runs.places) * runs.length != parts["values"].numel:
        raise contradiction(tensor.detail, key, "holds another number of values than of indices")
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
        codes = read_part(spec, self.key).view(f"<i{spec.dtype.itemsize}")
        return codes.reshape(spec.shape).astype(np.int64)

    def bad(self, what: str) -> UnreadableCheckpoint:
        """Say what contradicts what."""
        return contradiction(self.layout, self.key, what)


def contradiction(layout: str, key: str, what: str) -> UnreadableCheckpoint:
    """Give the refusal of a sparse tensor that contradicts itself."""
    return UnreadableCheckpoint(
        f'tensor "{key}" is sparse ({layout}) and {what}, against the rules of its layout; get the file again or leave '
        "it out with --exclude"
    )


def _coo_runs(sparse: _Sparse) -> Runs:
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
    return Runs(math.prod(dense), _places(indices, rows)) if math.prod(dense) else _NO_RUNS


def _compressed_runs(sparse: _Sparse) -> Runs:
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
    return Runs(length, places)


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


def read_part(spec: TensorSpec, key: str) -> Array:
    """Read all bytes of a dense part, row-major and little-endian."""
    chunks = [
        np.frombuffer(chunk, np.uint8).copy()
        for extent in payload_of(spec, key=key).extents
        for chunk in extent.source.stream(extent.offset, extent.nbytes)
    ]
    read: Array = np.concatenate(chunks) if chunks else np.empty(0, np.uint8)
    return read
