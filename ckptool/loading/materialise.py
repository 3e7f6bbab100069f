"""Turn described tensors into torch tensors on the CPU: mapped where the file holds their very bytes, else read."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ckptool.errors import UnreadableCheckpoint, UnsupportedTensor
from ckptool.model.sources import ByteSource, FileRange
from ckptool.model.values import OpaqueTensor, Storage, TensorSpec

# What compiled kernels may count on; torch's own zip records begin at multiples of 64.
_ALIGNMENT_BYTES = 8


def materialise(path: Path, tensors: Mapping[str, TensorSpec | OpaqueTensor]) -> dict[str, torch.Tensor]:
    """Give each described tensor of the file as a CPU tensor, with its strides; shared storages stay shared.

    Bytes that lie in the file as they are (not compressed, little-endian) are memory-mapped, privately: a tensor may
    be written to, the file never changes, and it must not be truncated while the tensor lives. Mapped bytes are not
    read here, so their checksum is not looked at; ``check_bytes`` does that.

    :raises UnsupportedTensor: a tensor is not dense, or this torch has no such dtype.
    :raises UnreadableCheckpoint: bytes that had to be read are not those that were written.
    """
    try:
        specs = {name: _dense(name, tensor) for name, tensor in tensors.items()}
        units = _swap_units(specs)
        maps = _map_files(_mappable(storage) for storage in units)
    except (UnreadableCheckpoint, UnsupportedTensor) as error:
        raise type(error)(f"{path}: {error}") from error
    storages = {storage: _fill(storage, unit, maps) for storage, unit in units.items()}
    return {name: _view(spec, storages[spec.storage]) for name, spec in specs.items()}


def check_bytes(tensors: Iterable[TensorSpec | OpaqueTensor]) -> None:
    """Read every storage below the tensors that has a checksum once, without keeping it.

    :raises ChecksumMismatch: bytes are not those that were written.
    """
    for storage in {tensor.storage: None for tensor in tensors if isinstance(tensor, TensorSpec)}:
        if storage.source.crc32 is not None:
            for _ in storage.source.stream():
                pass


def _dense(name: str, tensor: TensorSpec | OpaqueTensor) -> TensorSpec:
    if isinstance(tensor, OpaqueTensor):
        raise UnsupportedTensor(
            f'tensor "{name}" is {tensor.kind} ({tensor.detail}), not one dense array: leave it out with exclude'
        )
    if tensor.dtype.kind == "quantized" or not hasattr(torch, tensor.dtype.name):
        raise UnsupportedTensor(
            f'tensor "{name}" is of dtype {tensor.dtype.name}, which torch {torch.__version__} cannot load as a dense '
            "tensor: leave it out with exclude"
        )
    return tensor


def _swap_units(specs: Mapping[str, TensorSpec]) -> dict[Storage, int]:
    """Give for each storage how many bytes are to be reversed together; 1 for little-endian ones."""
    units: dict[Storage, int] = {}
    for name, spec in specs.items():
        unit = spec.dtype.swap_size if spec.storage.big_endian else 1
        if units.setdefault(spec.storage, unit) != unit:
            raise UnsupportedTensor(
                f'tensor "{name}" shares big-endian bytes with one of another element size: leave one out with exclude'
            )
    return units


def _mappable(storage: Storage) -> FileRange | None:
    place = storage.source.file_range
    if place is None or place.nbytes == 0 or storage.big_endian or place.offset % _ALIGNMENT_BYTES:
        return None
    return place


class _FileMap:
    """Map the stretch of one file that holds some ranges, copy-on-write."""

    def __init__(self, fd: int, ranges: list[FileRange]) -> None:
        first = min(place.offset for place in ranges)
        self._start = first - first % mmap.ALLOCATIONGRANULARITY
        end = max(place.offset + place.nbytes for place in ranges)
        self._map = mmap.mmap(fd, end - self._start, access=mmap.ACCESS_COPY, offset=self._start)

    def storage(self, place: FileRange) -> torch.UntypedStorage:
        """Give one range as a storage; the mapping lives as long as it."""
        offset = place.offset - self._start
        return torch.frombuffer(self._map, dtype=torch.uint8, count=place.nbytes, offset=offset).untyped_storage()


def _map_files(ranges: Iterable[FileRange | None]) -> dict[int, _FileMap]:
    by_file: dict[int, list[FileRange]] = {}
    for place in ranges:
        if place is not None:
            by_file.setdefault(place.fd, []).append(place)
    try:
        return {fd: _FileMap(fd, places) for fd, places in by_file.items()}
    except (OSError, ValueError) as error:  # ValueError: the file is shorter than it was when it was opened
        raise UnreadableCheckpoint(f"it cannot be memory-mapped ({error}): open it again") from error


def _fill(storage: Storage, unit: int, maps: Mapping[int, _FileMap]) -> torch.UntypedStorage:
    place = _mappable(storage)
    if place is not None:
        return maps[place.fd].storage(place)
    data = _read(storage.source)
    content = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return (content if unit == 1 else _swapped(content, unit)).untyped_storage()


def _read(source: ByteSource) -> bytearray:
    data = bytearray()
    for chunk in source.stream():
        data += chunk
    return data


def _swapped(content: torch.Tensor, unit: int) -> torch.Tensor:
    whole = content.numel() // unit * unit
    return content[:whole].view(-1, unit).flip(1).contiguous()


def _view(spec: TensorSpec, storage: torch.UntypedStorage) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype.name)
    tensor = torch.empty(0, dtype=dtype).set_(storage, spec.offset, spec.shape, spec.stride)
    if spec.conj:
        tensor = tensor.conj()
    return torch._neg_view(tensor) if spec.neg else tensor
