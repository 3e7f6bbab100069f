"""The mean of the same tensor in several checkpoints, computed while it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ckptool.formats.sources import cut
from ckptool.model.dtypes import BY_NAME, DType
from ckptool.model.sources import range_end
from ckptool.model.values import TensorSpec
from ckptool.operations.cast_kernels import Array, cast_bytes, widen
from ckptool.operations.computed import ComputedSource

_PARTS = {"complex64": "<f4", "complex128": "<f8"}
_WIDE = {4: BY_NAME["float32"], 8: BY_NAME["float64"]}


@dataclass(frozen=True, slots=True, eq=False)
class MeanSource:
    """Give the mean of views of one shape and element type, row-major, as elements of ``target`` (see ``ByteSource``).

    The sum is taken in float32, in the order of the views (of float64 ones in float64), and divided once.
    """

    specs: tuple[TensorSpec, ...]
    target: DType
    crc32: None = None
    file_range: None = None

    @property
    def label(self) -> str:
        """Name the place of the first."""
        return self.specs[0].storage.source.label

    @property
    def nbytes(self) -> int:
        """Give the length in bytes."""
        return self.specs[0].numel * self.target.itemsize

    def stream(self, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes from ``offset`` on, as ``ByteSource.stream`` says."""
        end = range_end(self, offset, nbytes)
        return cut(self._means(), offset, end - offset) if end > offset else iter(())

    def _means(self) -> Iterator[memoryview]:
        dtype = self.specs[0].dtype
        streams = [ComputedSource(spec, dtype).stream() for spec in self.specs]
        for pieces in zip(*streams, strict=True):  # of one element type, so all are cut at the same places
            yield self._mean([np.frombuffer(piece, np.uint8) for piece in pieces], dtype).data

    def _mean(self, pieces: list[Array], dtype: DType) -> Array:
        with np.errstate(all="ignore"):
            total = _values(pieces[0], dtype).copy()
            for piece in pieces[1:]:
                total += _values(piece, dtype)
            total /= total.dtype.type(len(pieces))
        data = total.view(np.uint8)
        wide = _WIDE[total.dtype.itemsize]
        return data if dtype.kind == "complex" or self.target == wide else cast_bytes(data, wide, self.target)


def _values(piece: Array, dtype: DType) -> Array:
    return piece.view(_PARTS[dtype.name]) if dtype.kind == "complex" else widen(piece, dtype)
