"""Freshly initialised copies of a model: a model that answers as they do has learnt nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ckptool.errors import CkptoolError
from ckptool.verification.device import move_model
from ckptool.verification.tasks.case import FreshCopies, Measured

_COPIES = 3
_MOST_PARAMETERS = 1_000_000_000
# How far outside of the copies' range a number may lie and still be theirs: by this much, or by this factor.
_ABSOLUTE = {"mutual_information": 0.02, "mean_cosine": 0.05}
_FACTORS = {"input_dependence": 2.0, "spread": 1.5, "magnitude": 3.0, "std": 3.0, "cross_entropy": 1.1}
_TINY = 1e-12

Measure = Callable[[nn.Module], Measured]


def compare_with_fresh(
    make: Callable[[int], nn.Module], measure: Measure, measured: Measured, seed: int, device: torch.device
) -> FreshCopies:
    """Measure three copies, built under different seeds, as the model was measured.

    Nothing is compared where the constructor gives every copy the same weights, or above a billion parameters.
    """
    try:
        refusal = _refuse(make, seed)
        if refusal:
            return FreshCopies(None, reason=refusal)
        # One after the other: each is gone before the next is built.
        numbers = tuple(measure(move_model(make(seed + 1 + each), device)).statistics for each in range(_COPIES))
    except CkptoolError as error:
        return FreshCopies(None, reason=str(error))
    if not all(math.isfinite(value) for each in numbers for value in each.values()):
        return FreshCopies(None, reason="freshly initialised copies do not give finite answers")
    return FreshCopies(_is_alike(measured.statistics, numbers), numbers)


def _refuse(make: Callable[[int], nn.Module], seed: int) -> str | None:
    first = make(seed + 1)
    if sum(parameter.numel() for parameter in first.parameters()) > _MOST_PARAMETERS:
        return "a model of this size is not built three times more"
    pairs = zip(first.parameters(), make(seed + 2).parameters(), strict=False)
    if all(torch.equal(one, other) for one, other in pairs):
        return "its constructor gives the same weights under every seed"
    return None


def _is_alike(own: Mapping[str, float], copies: tuple[Mapping[str, float], ...]) -> bool:
    """Tell whether each number that is compared lies where those of the copies lie."""
    compared = [name for name in (*_ABSOLUTE, *_FACTORS) if name in own]
    return bool(compared) and all(_is_among(name, own[name], [copy[name] for copy in copies]) for name in compared)


def _is_among(name: str, value: float, others: list[float]) -> bool:
    if name in _ABSOLUTE:
        return min(others) - _ABSOLUTE[name] <= value <= max(others) + _ABSOLUTE[name]
    factor = _FACTORS[name]
    return min(others) / factor - _TINY <= value <= max(others) * factor + _TINY
