"""How well a model fits a file, and which sizes would make it fit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ckptool.errors import CkptoolError, PlanRefused
from ckptool.loading.model_names import model_names
from ckptool.loading.outcome import summarise
from ckptool.loading.placement import place
from ckptool.model.loading import LoadReport
from ckptool.operations.opening import OpenedCheckpoint


@dataclass(frozen=True, slots=True)
class Misfit:
    """Give the shapes of one tensor: in the model and in the file."""

    model: tuple[int, ...]
    file: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """Sum up what a file and a model have in common; ``misfits`` are tensors of one name and two shapes."""

    report: LoadReport
    misfits: tuple[Misfit, ...]

    @property
    def is_full(self) -> bool:
        """Tell whether the file fills the model and nothing is left over."""
        return self.report.is_exact and not self.report.dropped

    @property
    def score(self) -> tuple[int, int]:
        """Order fits: the higher the better."""
        report = self.report
        return len(report.matched), -len(report.missing) - len(report.mismatched) - len(report.unexpected)


def fit(view: OpenedCheckpoint, model: nn.Module) -> Fit | None:
    """Compare names and shapes; None where the weights or their names are not settled."""
    try:
        names = model_names(model)
        placement = place(view, names)
    except (PlanRefused, CkptoolError):
        return None
    misfits = [(names.slots[name].shape, placement.shapes.get(name)) for name in placement.mismatched]
    found = tuple(Misfit(model, file) for model, file in misfits if model is not None and file is not None)
    return Fit(summarise(view, names, placement), found)


def other_size(misfits: tuple[Misfit, ...], axis: int, size: int) -> int | None:
    """Give the one size that the file has along an axis wherever the model has ``size``; None without agreement.

    Only tensors that differ nowhere else count.
    """
    found = {
        misfit.file[axis]
        for misfit in misfits
        if len(misfit.model) == len(misfit.file) > axis
        and misfit.model[axis] == size != misfit.file[axis]
        and _without(misfit.model, axis) == _without(misfit.file, axis)
    }
    return found.pop() if len(found) == 1 else None


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]
