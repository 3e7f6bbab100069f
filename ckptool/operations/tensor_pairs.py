"""Compare tensors of two checkpoints pair by pair: bytes first, numbers where the bytes differ, on every core."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptool.model.comparison import KindChange, Outcome, ValueChange
from ckptool.model.copies import Payload
from ckptool.model.sources import Progress
from ckptool.model.values import OpaqueTensor, TensorSpec
from ckptool.operations.nested import values_differ
from ckptool.operations.pairing import dtype_name, kind_text
from ckptool.operations.parallel import available_cores
from ckptool.operations.runs import element_runs, same_bytes
from ckptool.operations.tables import Tensor, elements_of
from ckptool.operations.transforms import payload_of

if TYPE_CHECKING:
    from ckptool.operations.differences import DifferenceTally

_PART_ELEMENTS = 1 << 22  # of a tensor that is too large for one thread
_MAX_THREADS = 8  # each holds a few MB
# What one thread takes at a time: many small tensors would only make threads wait for each other.
_BATCH_BYTES = 8 << 20


class Pair(NamedTuple):
    """Hold the two tensors of one name."""

    key: str
    a: Tensor
    b: Tensor


Finding = ValueChange | KindChange | None


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Two numbers are the same where ``|b - a| <= atol + rtol * |a|``."""

    rtol: float = 0.0
    atol: float = 0.0


def compare_pairs(pairs: Sequence[Pair], tolerance: Tolerance, progress: Progress) -> list[Finding]:
    """Compare every pair; None where both are equal to the bit. Tied tensors are read once.

    :raises UnsupportedTensor: a tensor expands far beyond its storage.
    :raises UnreadableCheckpoint: bytes cannot be read, or do not match their checksum.
    """
    distinct = {_identity(pair): pair for pair in reversed(pairs)}
    largest_first = sorted(distinct.values(), key=lambda pair: -pair.a.nbytes)
    progress.start("comparing", sum(pair.a.nbytes for pair in largest_first))
    work = _Work(tolerance, _Shared(progress))
    found = dict(zip(map(_identity, largest_first), work.compare_all(largest_first), strict=True))
    return [_under(pair.key, found[_identity(pair)]) for pair in pairs]


def compare_kinds(pairs: Sequence[Pair]) -> list[Finding]:
    """Compare kinds and shapes alone: None where they agree, for each pair; nothing is read."""
    return [None if _kind(pair.a) == _kind(pair.b) else _kind_change(pair) for pair in pairs]


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    if isinstance(tensor, TensorSpec):
        return (tensor.shape,)
    return tensor.kind, tensor.detail, tensor.dtype, tensor.shape


def _identity(pair: Pair) -> Any:
    if isinstance(pair.a, TensorSpec) and isinstance(pair.b, TensorSpec):
        return pair.a.view_key, pair.b.view_key
    return pair.key


def _under(key: str, finding: Finding) -> Finding:
    if isinstance(finding, ValueChange):
        return finding if finding.key == key else replace(finding, key=key)
    return finding if finding is None else finding._replace(key=key)


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
    nbytes = 0
    for pair in pairs:
        batch.append(pair)
        nbytes += pair.a.nbytes
        if nbytes >= _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


class _Stopped(Exception):
    """Leave a thread whose answer nobody waits for any more."""


class _Shared:
    """Count bytes from several threads, and stop them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self.stopped = False

    def start(self, label: str, total_bytes: int) -> None:
        """Begin one task."""
        self._progress.start(label, total_bytes)

    def advance(self, nbytes: int) -> None:
        """Count bytes, or leave."""
        if self.stopped:
            raise _Stopped
        with self._lock:
            self._progress.advance(nbytes)


@dataclass(frozen=True, slots=True)
class _Work:
    tolerance: Tolerance
    progress: _Shared

    def compare_all(self, pairs: Sequence[Pair]) -> list[Finding]:
        total = sum(pair.a.nbytes for pair in pairs)
        threads = min(available_cores(), _MAX_THREADS, total // max(_BATCH_BYTES, 1))
        if threads < 2:
            return self._compare_batch(pairs)
        with ThreadPoolExecutor(threads) as pool:
            try:
                return self._compare_with(pool, pairs, total // (2 * threads))
            except BaseException:
                self.progress.stopped = True
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _compare_with(self, pool: Executor, pairs: Sequence[Pair], share: int) -> list[Finding]:
        """Let the threads take whole tensors, and parts of those that are more than ``share`` bytes."""
        large = {pair.key for pair in pairs if pair.a.nbytes > share and _is_divisible(pair)}
        found = {pair.key: self._compare_in_parts(pool, pair) for pair in pairs if pair.key in large}
        batches = list(_batches(pair for pair in pairs if pair.key not in large))
        for batch, findings in zip(batches, pool.map(self._compare_batch, batches), strict=True):
            found.update(zip((pair.key for pair in batch), findings, strict=True))
        return [found[pair.key] for pair in pairs]

    def _compare_batch(self, pairs: Sequence[Pair]) -> list[Finding]:
        return [self.compare(pair) for pair in pairs]

    def _compare_in_parts(self, pool: Executor, pair: Pair) -> Finding:
        list(pool.map(_check_source, (pair.a, pair.b)))
        parts = list(_parts(pair))
        tallies = list(pool.map(lambda part: self._count(*part), parts))
        if not any(tallies):
            return None
        equal = [part for part, tally in zip(parts, tallies, strict=True) if tally is None]
        tallies += pool.map(lambda part: self._measure(*part), equal)
        first, *others = (tally for tally in tallies if tally is not None)
        for tally in others:
            first.merge(tally)
        return _describe(pair, first)

    def compare(self, pair: Pair) -> Finding:
        if isinstance(pair.a, TensorSpec) and isinstance(pair.b, TensorSpec):
            if pair.a.shape != pair.b.shape:
                return _kind_change(pair)
            return self._compare_dense(pair.key, pair.a, pair.b)
        if isinstance(pair.a, TensorSpec) or isinstance(pair.b, TensorSpec):
            return _kind_change(pair)
        return self._compare_opaque(pair.key, pair.a, pair.b)

    def _compare_dense(self, key: str, a: TensorSpec, b: TensorSpec) -> Finding:
        if a.dtype.has_numbers and b.dtype.has_numbers:
            tally = self._count(key, a, b)
            return None if tally is None else _describe(Pair(key, a, b), tally)
        one, other = payload_of(a, key=key), payload_of(b, key=key)
        if a.dtype == b.dtype and same_bytes(one, other, self.progress):
            return None
        return self._without_numbers(key, a, one, other)

    def _count(self, key: str, a: TensorSpec, b: TensorSpec) -> DifferenceTally | None:
        """Count differences; None where all bytes are equal."""
        if a.dtype == b.dtype and same_bytes(payload_of(a, key=key), payload_of(b, key=key), self.progress):
            return None
        return self._measure(key, a, b)

    def _measure(self, key: str, a: TensorSpec, b: TensorSpec) -> DifferenceTally:
        from ckptool.operations.differences import DifferenceTally, measure  # NumPy, which equal files do without

        tally = DifferenceTally(self.tolerance.rtol, self.tolerance.atol)
        measure(payload_of(a, key=key), payload_of(b, key=key), tally, self.progress)
        return tally

    def _without_numbers(self, key: str, a: TensorSpec, one: Payload, other: Payload) -> ValueChange:
        for payload in (one, other):  # to the end: their checksums decide whether the bytes are to be trusted
            for _ in element_runs(payload):
                pass
        names = one.dtype.name, other.dtype.name
        if names[0] == names[1]:
            return ValueChange(key, "changed", *names, a.shape, a.numel, detail=f"other bytes of {names[0]}")
        return ValueChange(key, "unknown", *names, a.shape, a.numel, detail=f"{' and '.join(names)} share no numbers")

    def _compare_opaque(self, key: str, a: OpaqueTensor, b: OpaqueTensor) -> Finding:
        if _kind(a) != _kind(b):
            return _kind_change(Pair(key, a, b))
        describe = partial(
            ValueChange, key, dtype_a=dtype_name(a), dtype_b=dtype_name(b), shape=a.shape, elements=elements_of(a.shape)
        )
        if a.kind == "meta":
            return describe(outcome="unknown", detail="no values are stored")
        if values_differ(a, b, self.progress):
            return describe(outcome="changed", detail=f"other parts of {kind_text(a)}")
        return None


def _describe(pair: Pair, tally: DifferenceTally) -> ValueChange:
    outcome: Outcome = "changed" if tally.beyond else "close" if tally.changed else "same"
    return ValueChange(
        key=pair.key,
        outcome=outcome,
        dtype_a=dtype_name(pair.a),
        dtype_b=dtype_name(pair.b),
        shape=pair.a.shape,
        elements=elements_of(pair.a.shape),
        changed=tally.changed,
        beyond=tally.beyond,
        broken=tally.broken,
        max_abs=tally.overall(tally.largest),
        mean_abs=tally.mean,
        max_rel=float(tally.overall(tally.largest_rel)),
        cosine=tally.cosine,
        change_norm=tally.change_norm,
        weight_norm=tally.weight_norm,
    )


def _is_divisible(pair: Pair) -> bool:
    """Tell whether parts of both tensors can be read for what they are worth: ranges of a file, and numbers."""
    return pair.a.shape == pair.b.shape and all(map(_lies_in_a_row, (pair.a, pair.b)))


def _lies_in_a_row(tensor: Tensor) -> bool:
    if not isinstance(tensor, TensorSpec):
        return False
    return tensor.is_contiguous and tensor.storage.source.file_range is not None and tensor.dtype.has_numbers


def _parts(pair: Pair) -> Iterator[tuple[str, TensorSpec, TensorSpec]]:
    """Cut two tensors that lie in a row into flat pieces of the same elements."""
    assert isinstance(pair.a, TensorSpec)
    assert isinstance(pair.b, TensorSpec)
    for first in range(0, pair.a.numel, _PART_ELEMENTS):
        shape = (min(_PART_ELEMENTS, pair.a.numel - first),)
        ours, theirs = (
            replace(tensor, shape=shape, stride=(1,), offset=tensor.offset + first) for tensor in (pair.a, pair.b)
        )
        yield pair.key, ours, theirs


def _check_source(tensor: Tensor) -> None:
    """Have a source check its checksum, which it does once, before it gives parts."""
    assert isinstance(tensor, TensorSpec)
    for _ in tensor.storage.source.stream(0, 1):
        pass


def _kind_change(pair: Pair) -> KindChange:
    return KindChange(pair.key, pair.a.shape, pair.b.shape, kind_text(pair.a), kind_text(pair.b))
