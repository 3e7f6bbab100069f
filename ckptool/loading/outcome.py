"""What came of a placement: the report, and the sentence with which a load is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ckptool.layouts.reference import COUNTER
from ckptool.layouts.segments import quoted
from ckptool.loading.model_names import ModelNames
from ckptool.loading.placement import Placement
from ckptool.model.loading import LoadReport, Mismatch
from ckptool.operations.opening import OpenedCheckpoint


def contradictions(names: ModelNames, tensors: Mapping[str, Tensor]) -> dict[str, Mismatch]:
    """Find names that are one tensor in the model and have different values in the file."""
    first: dict[object, str] = {}
    found = {}
    for name in (name for name in names.slots if name in tensors):
        kept = first.setdefault(names.slots[name].identity, name)
        if kept != name and not _same_values(tensors[kept], tensors[name]):
            found[name] = Mismatch(name, f'one tensor with "{kept}"', "values of its own")
    return found


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)


def summarise(view: OpenedCheckpoint, names: ModelNames, placement: Placement) -> LoadReport:
    """Report a placement, before or after it is carried out."""
    found, mismatched = placement.tensors, placement.mismatched
    present = {names.slots[name].identity for name in found}
    absent = [name for name in names.slots if name not in found and name not in mismatched]
    tied = [name for name in absent if names.slots[name].identity in present]
    counted = any(key.rpartition(".")[2] == COUNTER for key in view.state_dict.entries)
    defaulted = [name for name in absent if name not in tied and name.rpartition(".")[2] == COUNTER and not counted]
    missing = [name for name in absent if name not in {*tied, *defaulted}]
    return LoadReport(
        source=view.checkpoint.path,
        state_dict=view.state_dict.name,
        certainty=placement.plan.certainty,
        matched=tuple(name for name in names.slots if name in found) + tuple(placement.values),
        tied=tuple(tied),
        defaulted=tuple(defaulted),
        missing=(*missing, *(name for name in names.values if name not in placement.values)),
        unexpected=tuple(placement.unexpected),
        mismatched=tuple(mismatched.values()),
        dropped=tuple(placement.dropped),
        casts=tuple(name for name in found if str(names.slots[name].tensor.dtype) != f"torch.{found[name].dtype.name}"),
        coverage=share_filled(names, placement),
        notes=view.selection.notes,
    )


def share_filled(names: ModelNames, placement: Placement, left_out: Collection[str] = ()) -> float:
    """Give the share of the model's elements that get values, from 0 to 1; each tensor counts once.

    A parameter that a lazy module has yet to make is as large as the file's. ``left_out`` names do not count.
    """
    elements: dict[object, int] = {}
    for name, slot in names.slots.items():
        if name not in left_out:
            lazy = placement.tensors[name].numel if slot.shape is None and name in placement.tensors else 0
            elements[slot.identity] = lazy if slot.shape is None else slot.tensor.numel()
    present = {names.slots[name].identity for name in placement.tensors}
    total = sum(elements.values())
    return sum(count for identity, count in elements.items() if identity in present) / total if total else 1.0


def explain(report: LoadReport) -> str:
    """Say in one sentence why a file does not fit a model, and what would."""
    if not report.matched:
        wrong = [f'"{item.name}" is {item.file} instead of {item.model}' for item in report.mismatched[:1]]
        closest = f" ({wrong[0]})" if wrong else f" (it asks for {quoted(report.missing)})" if report.missing else ""
        return (
            f"{report.source}: none of its tensors fits the model{closest}; nothing was loaded: is it the same model?"
        )
    parts = (
        _part(report.missing, "of the model's tensors are missing", ""),
        _part([item.name for item in report.mismatched], "do not fit", _first(report.mismatched)),
        _part(report.unexpected, "are unknown to the model", ""),
    )
    return (
        f"{report.source}: {', '.join(part for part in parts if part)}, {len(report.matched)} fit; nothing was loaded: "
        "give the file of the same model, or load what fits with strict=False"
    )


def _part(names: Sequence[str], what: str, example: str) -> str:
    return f"{len(names)} {what} ({quoted(names)}{example})" if names else ""


def _first(mismatched: Sequence[Mismatch]) -> str:
    return f"; the first is {mismatched[0].file} instead of {mismatched[0].model}" if mismatched else ""
