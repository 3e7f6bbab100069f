"""Read every byte once: what the values of the tensors are, and whether all storages match their checksums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ckptool.errors import UnreadableCheckpoint, UnsupportedTensor
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.checksums import crc32
from ckptool.model.copies import Payload
from ckptool.model.results import TensorStatistics
from ckptool.model.sources import Progress, has_checksum
from ckptool.model.values import OpaqueTensor, Storage, TensorSpec
from ckptool.operations.health.fingerprint import Fingerprint, Sampler
from ckptool.operations.runs import element_runs
from ckptool.operations.statistics import StatisticsTally
from ckptool.operations.transforms import payload_of
from ckptool.operations.values import decode


@dataclass(frozen=True, slots=True)
class Measured:
    """Describe one tensor under all its ``names``; ``statistics`` is None for a type without numbers.

    ``crc32`` is that of its bytes, row-major. ``fingerprint`` is None where the tensor is no matrix of a floating type
    with at least 16 bits, too narrow, constant or not finite.
    """

    names: tuple[str, ...]
    spec: TensorSpec
    statistics: TensorStatistics | None
    crc32: int
    fingerprint: Fingerprint | None

    @property
    def name(self) -> str:
        """Give the first name."""
        return self.names[0]


@dataclass(frozen=True, slots=True)
class Fault:
    """Name a storage that could not be read as it was written, the tensors in it, and the reason."""

    place: str
    tensors: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Survey:
    """Hold what one pass over the bytes found.

    ``unread`` maps tensors that were left out to the reason, ``valueless`` names those without any values in the file.
    ``checked`` and ``unchecked`` count storages with and without a stored checksum.
    """

    tensors: tuple[Measured, ...]
    faults: tuple[Fault, ...]
    unread: Mapping[str, str]
    valueless: tuple[str, ...]
    checked: int
    unchecked: int


@dataclass(slots=True)
class _Pass:
    """Collect what has been read so far."""

    progress: Progress
    measured: list[Measured] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    reasons: dict[Storage, str] = field(default_factory=dict)
    lost: dict[Storage, list[str]] = field(default_factory=dict)
    seen: set[Storage] = field(default_factory=set)

    def read(self, names: tuple[str, ...], spec: TensorSpec) -> None:
        """Measure one tensor; a damaged storage is not read again for the next one."""
        storage = spec.storage
        if storage not in self.reasons:
            try:
                self.measured.append(self._measure(names, spec))
                if spec.numel:
                    self.seen.add(storage)
            except UnreadableCheckpoint as error:
                self.reasons[storage] = str(error)
            except UnsupportedTensor as error:
                self.unread.update(dict.fromkeys(names, str(error)))
        if storage in self.reasons:
            self.lost.setdefault(storage, []).extend(names)

    def check(self, storage: Storage) -> None:
        """Read a storage that no measured tensor needed, for its checksum alone."""
        if storage in self.seen or storage in self.reasons or not _is_proven(storage):
            return
        try:
            for chunk in storage.source.stream():
                self.progress.advance(len(chunk))
        except UnreadableCheckpoint as error:
            self.reasons[storage] = str(error)

    def _measure(self, names: tuple[str, ...], spec: TensorSpec) -> Measured:
        payload = payload_of(spec, key=names[0])
        tally = StatisticsTally() if spec.dtype.has_numbers else None
        sampler = Sampler.of(spec.shape) if spec.dtype.is_floating and spec.dtype.itemsize > 1 else None
        checksum = 0
        for run in self._runs(payload):
            checksum = crc32(run, checksum)
            if tally is not None:
                values = decode(run, spec.dtype)
                tally.add(values)
                if sampler is not None:
                    sampler.add(values)
        statistics = tally.result() if tally is not None else None
        return Measured(names, spec, statistics, checksum, _fingerprint(sampler, statistics))

    def _runs(self, payload: Payload) -> Iterator[memoryview]:
        for run in element_runs(payload):
            self.progress.advance(len(run))
            yield run


def _is_proven(storage: Storage) -> bool:
    """Tell whether reading a storage finds damage; one that cannot even be looked at is told by reading it."""
    try:
        return has_checksum(storage.source)
    except UnreadableCheckpoint:
        return True


def _fingerprint(sampler: Sampler | None, statistics: TensorStatistics | None) -> Fingerprint | None:
    is_finite = statistics is not None and statistics.finite == statistics.elements
    return sampler.result() if sampler is not None and is_finite else None


def survey(checkpoint: Checkpoint, tensors: Mapping[str, Any], progress: Progress) -> Survey:
    """Read the tensors, and every other record that has a checksum; damage is noted, and the rest goes on.

    ``tensors`` are those that are judged, by the name under which they are told.
    """
    views, valueless = _views(tensors)
    work = _Pass(progress)
    storages = dict.fromkeys((*checkpoint.storages, *(spec.storage for spec, _ in views)))
    records = storages | dict.fromkeys(checkpoint.others)
    progress.start("reading values", _bytes_to_read(records, views))
    with np.errstate(all="ignore"):
        for spec, names in views:
            work.read(tuple(names), spec)
    for record in records:
        work.check(record)
    stored = [storage for storage in storages if storage.nbytes]
    checked = sum(map(_is_proven, stored))
    faults = tuple(
        Fault(storage.source.label, tuple(work.lost.get(storage, ())), reason)
        for storage, reason in work.reasons.items()
    )
    return Survey(tuple(work.measured), faults, work.unread, valueless, checked, len(stored) - checked)


def _bytes_to_read(storages: Mapping[Storage, None], views: list[tuple[TensorSpec, list[str]]]) -> int:
    shown = {spec.storage for spec, _ in views}
    rest = (storage for storage in storages if storage not in shown and _is_proven(storage))
    return sum(spec.nbytes for spec, _ in views) + sum(storage.nbytes for storage in rest)


def _views(tensors: Mapping[str, Any]) -> tuple[list[tuple[TensorSpec, list[str]]], tuple[str, ...]]:
    """List every distinct view with its names, the dense parts of other tensors included; and tensors without values.

    They come in the order of the file, where it has one, so that it is read in one sweep.
    """
    found: dict[Any, tuple[TensorSpec, list[str]]] = {}
    valueless: list[str] = []
    for name, spec in _dense_parts(tensors.items(), valueless):
        found.setdefault(spec.view_key if spec.numel else name, (spec, []))[1].append(name)
    return sorted(found.values(), key=lambda view: _place(view[0])), tuple(valueless)


def _dense_parts(tensors: Any, valueless: list[str]) -> Iterator[tuple[str, TensorSpec]]:
    for name, tensor in tensors:
        if isinstance(tensor, TensorSpec):
            yield name, tensor
        elif isinstance(tensor, OpaqueTensor) and tensor.kind == "meta":
            valueless.append(name)
        elif isinstance(tensor, OpaqueTensor):
            yield from _dense_parts(((f"{name}.{part}", value) for part, value in tensor.parts), valueless)


def _place(spec: TensorSpec) -> tuple[int, int]:
    place = spec.storage.source.file_range
    return (place.fd, place.offset + spec.offset * spec.dtype.itemsize) if place is not None else (-1, 0)
