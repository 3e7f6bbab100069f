"""Views of storages, every bound checked in Python integers; and what all of torch's rebuild functions ask."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ckptool.formats.pickle import limits
from ckptool.formats.pickle.reading import Malformed, PickledStorage, Reading
from ckptool.model.dtypes import BY_NAME, PER_BYTE, DType
from ckptool.model.values import MOST_DIMENSIONS, DictNode, TensorSpec

BYTES = BY_NAME["uint8"]


class StorageView(TensorSpec):
    """Stand for a storage in a tree that also holds storages without tensors: all its elements."""

    __slots__ = ()


def view_storage(found: PickledStorage) -> StorageView:
    """Describe a storage as a tensor of all its elements; rebuild functions take it as the storage that it is."""
    return StorageView(found.dtype or BYTES, (found.numel,), (1,), found.offset, found.storage)


_STORAGES = (PickledStorage, StorageView)
_EXTENT = limits.EXTENT


def check_view(storage: Any, dtype: Any, offset: Any, shape: Any, stride: Any) -> int:
    """Check that a view lies inside its storage; give its absolute offset in elements.

    A dimension of size 1 ignores its stride, and a view without elements lies everywhere: as in torch.
    """
    if type(storage) not in _STORAGES or type(dtype) is not DType:
        raise Malformed("rebuilds a tensor from something that is no storage or no element type")
    if type(offset) is not int or type(shape) is not tuple or type(stride) is not tuple:
        raise Malformed("rebuilds a tensor with an offset or a shape that is none")
    return place(storage, dtype, offset, _measure(shape, stride))


def _measure(shape: tuple[Any, ...], stride: tuple[Any, ...]) -> tuple[int, int]:
    """Give the distance from the first element to the last, and the number of elements."""
    if len(shape) != len(stride) or len(shape) > MOST_DIMENSIONS:
        raise Malformed(f"rebuilds a tensor with {len(shape)} sizes and {len(stride)} strides")
    span, numel = 0, 1
    for size, step in zip(shape, stride, strict=True):
        if type(size) is not int or type(step) is not int or not 0 <= size <= _EXTENT >= step >= 0:
            raise Malformed("rebuilds a tensor with an impossible size or stride")
        span += (size - 1) * step
        numel *= size
    return span, numel


# Only for sizes that are known to be integers: to the cache, True is 1 and so is 1.0.
measure_integers = lru_cache(4096)(_measure)


def place(storage: PickledStorage, dtype: DType, offset: int, measures: tuple[int, int]) -> int:
    """Check that elements lie inside their storage; give the absolute offset of the first, in elements.

    ``measures`` are the distance from the first to the last, and how many there are.
    """
    span, numel = measures
    if not 0 <= offset <= _EXTENT or numel * dtype.itemsize > _EXTENT:
        raise Malformed("rebuilds a tensor of more bytes than can be addressed")
    held, last = storage.numel, offset + span
    if dtype is not storage.dtype:
        held, last = held * (storage.dtype or BYTES).itemsize, (last + 1) * dtype.itemsize - 1
    if numel and last >= held * PER_BYTE.get(dtype.name, 1):
        raise Malformed("rebuilds a tensor that reaches beyond its storage")
    return offset if storage.offset == 0 else offset + _first_element(storage, dtype)


def _first_element(storage: PickledStorage, dtype: DType) -> int:
    """Count in elements of ``dtype`` where a part of a legacy storage begins."""
    start, remainder = divmod(storage.offset * (storage.dtype or BYTES).itemsize, dtype.itemsize)
    if remainder:
        raise Malformed("rebuilds a tensor that begins inside an element")
    return start


def dtype_of(storage: Any) -> Any:
    """Give the element type of a storage; torch counts an untyped one in bytes."""
    return storage.dtype or BYTES if type(storage) in _STORAGES else None


def check_hooks(reading: Reading, hooks: Any) -> None:
    """Note functions that torch would set on a tensor."""
    if hooks is not None and not (type(hooks) is DictNode and not hooks.pairs):
        reading.note("backward-hooks", "a tensor carries functions to be called during training; they are dropped")


def arguments(args: tuple[Any, ...], least: int, most: int) -> tuple[Any, ...]:
    """Give as many arguments as a function can have, None for those that are missing.

    :raises Malformed: these are too few or too many.
    """
    if not least <= len(args) <= most:
        raise Malformed(f"rebuilds a tensor from {len(args)} arguments")
    return args + (None,) * (most - len(args))
