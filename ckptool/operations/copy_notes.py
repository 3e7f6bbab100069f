"""What is worth saying about a copy: names left out, views that overlap, bytes left behind."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ckptool.layouts.segments import quoted
from ckptool.model.copies import CopyPlan
from ckptool.model.plans import Note
from ckptool.model.values import Storage, TensorSpec


def copy_notes(specs: Mapping[str, TensorSpec], plan: CopyPlan, uncast: Collection[str]) -> Iterable[Note]:
    """Say what a plan changes beside names; ``uncast`` are the tensors that a cast leaves as they are."""
    if uncast:
        yield Note("scales-uncast", f"{len(uncast)} scale(s) of bitsandbytes keep their type: its kernels ask for it")
    arrays = sum([spec.is_numpy for spec in specs.values()])
    if 0 < arrays < len(specs):  # where all are arrays, nobody expects tensors
        yield Note("numpy-arrays", f"{arrays} NumPy array(s) are written as tensors")
    if plan.aliases:
        yield Note(
            "ties-aliased",
            f"{len(plan.aliases)} tied name(s) stand in the metadata instead of being written twice; "
            "for a loader that insists on every key, add --ties copy",
        )
    by_storage: dict[Storage, dict[tuple[Any, ...], tuple[str, TensorSpec]]] = {}
    for name, spec in specs.items():
        if spec.numel:
            by_storage.setdefault(spec.storage, {}).setdefault(spec.view_key, (name, spec))
    for storage, views in by_storage.items():
        yield from _storage_notes(storage, sorted(views.values(), key=lambda view: _span(view[1])))


def simplified_notes(simplified: Mapping[str, Sequence[str]]) -> Iterable[Note]:
    """Say where a plainer value stands for one that no loader takes: ``simplified`` has the places, by what is done."""
    for how, places in simplified.items():
        yield Note("simplified", f"{how}: {quoted(places)}")


def _storage_notes(storage: Storage, views: list[tuple[str, TensorSpec]]) -> Iterable[Note]:
    covered_to = covered = 0
    previous = ""
    for name, spec in views:
        start, end = _span(spec)
        if start < covered_to:
            text = f'"{previous}" and "{name}" overlap in one storage: each gets bytes of its own'
            yield Note("overlap-cloned", text)
        covered += max(0, end - max(start, covered_to))
        if end > covered_to:
            covered_to, previous = end, name
    if covered < storage.nbytes:
        text = (
            f"storage {storage.key} holds {storage.nbytes - covered} bytes that no selected tensor shows: not written"
        )
        yield Note("slack-left", text)


def _span(spec: TensorSpec) -> tuple[int, int]:
    """Give the first byte of a view and the one after its last, within its storage."""
    reach = sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride, strict=True))
    size = spec.dtype.itemsize
    return spec.offset * size, (spec.offset + reach + 1) * size
