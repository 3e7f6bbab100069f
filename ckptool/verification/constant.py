"""Does the answer depend on the input at all, and on each one of several inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ckptool.model.verification import Check
from ckptool.verification.device import Batch, evaluating
from ckptool.verification.outputs import Inputs, first_batch, run_batch
from ckptool.verification.statistics import are_probabilities, input_dependence, relative_difference, relative_range
from ckptool.verification.tasks.case import LOAD_ADVICE, Case, causes, corroborations, exonerations, join_words

_ID = "output.constant"
# Above this, float32 probabilities are too near to one to still differ.
_SATURATED = 1 - 1e-4
# An offset is part of the answer there: what does not move is no share of anything.
_ONLY_RANGE = ("regression", "detection")


def check_constant(case: Case, device: torch.device) -> Check:
    """Judge whether the answers depend on the inputs, and on each of several inputs."""
    evidence = _measure(case)
    if _are_the_same(case.inputs):
        found = {**evidence, "same_inputs": True}
        return Check(_ID, "inconclusive", "all inputs are the same, so the answers have to be", found, case.advice)
    if _is_constant(case, evidence):
        return _judge_constant(case, evidence)
    dead = _find_dead_inputs(case, first_batch(case.inputs, case.outputs), device)
    if dead:
        return _judge_dead(case, dead, evidence)
    return Check(_ID, "pass", f"the answers to {case.inputs.count} inputs depend on the input", evidence)


def _measure(case: Case) -> dict[str, float]:
    answers = case.outputs.judged.double().nan_to_num(0.0, 0.0, 0.0)  # what is -inf for every input is a mask
    numbers = {"relative_range": relative_range(answers)}
    if case.task in _ONLY_RANGE or not case.outputs.judged.is_floating_point():
        return numbers
    return numbers | {"input_dependence": input_dependence(answers)}


def _is_constant(case: Case, evidence: Mapping[str, float]) -> bool:
    if not case.outputs.judged.is_floating_point():  # classes: that all are the same one is for output.diverse
        return False
    limits = case.options.thresholds
    low = evidence.get("input_dependence", 1.0) < limits.dependence
    return low or evidence["relative_range"] <= limits.relative_range


def _judge_constant(case: Case, evidence: Mapping[str, float]) -> Check:
    seen = (
        f"{case.fed} get the same answer, though they are different (the answers differ by "
        f"{evidence['relative_range']:.2g} of the largest value)"
    )
    if case.outputs.detections and not case.outputs.judged.any():
        return Check(_ID, "skip", "no boxes were found in any input, which is usual for inputs that are not yours")
    if _is_saturated(case.outputs.judged) and not case.in_domain:
        message = f"{seen}: probabilities this near to one cannot differ.{exonerations(case)}"
        return Check(_ID, "inconclusive", message, evidence, case.advice)
    reasons = join_words(corroborations(case)) or causes(case, "likely causes are damaged layers or dead activations")
    return Check(_ID, "fail", f"{seen}: {reasons}.", evidence, LOAD_ADVICE)


def _is_saturated(answers: Tensor) -> bool:
    rows = answers.double().reshape(len(answers), -1)
    if rows.shape[1] == 1:
        return bool(((rows >= 0) & (rows <= 1) & ((rows - 0.5).abs() >= _SATURATED - 0.5)).all())
    return are_probabilities(rows) and bool((rows.amax(dim=1) >= _SATURATED).all())


def _judge_dead(case: Case, dead: list[str], evidence: Mapping[str, float]) -> Check:
    seen = f"the answers do not depend on the input {join_words(dead)}: shuffled among the rows, it changes nothing"
    found = {**evidence, "dead_inputs": dead}
    if case.in_domain or corroborations(case):
        return Check(_ID, "fail", f"{seen}; the layers behind it were lost, or never used it.", found, LOAD_ADVICE)
    return Check(_ID, "inconclusive", f"{seen}.{exonerations(case)}", found, case.advice)


def _are_the_same(inputs: Inputs) -> bool:
    first: dict[str, Tensor] | None = None
    for batch in inputs.batches():
        named = _named(batch)
        first = first or {name: tensor[:1] for name, tensor in named.items() if tensor.ndim}
        if any(not torch.equal(named[name], row.expand_as(named[name])) for name, row in first.items()):
            return False
    return True


def _find_dead_inputs(case: Case, batch: Batch, device: torch.device) -> list[str]:
    """Name the inputs, of several, that can be shuffled among the rows of a batch without any effect.

    An input that is the same in all rows (a mask of ones) has no effect to show, and is not named.
    """
    named = _named(batch)
    moving = [name for name, tensor in named.items() if tensor.ndim and not tensor.roll(1, 0).equal(tensor)]
    if len(named) < 2 or isinstance(batch, Tensor):
        return []
    with evaluating(case.model):
        before = run_batch(case.model, batch, device).judged
        changes = {name: _change(case.model, _rolled(batch, name), device, before) for name in moving}
    return [name for name, change in changes.items() if change <= case.options.thresholds.relative_range]


def _change(model: nn.Module, batch: Batch, device: torch.device, before: Tensor) -> float:
    return relative_difference(before, run_batch(model, batch, device).judged, before)


def _rolled(batch: Batch, name: str) -> Batch:
    named = {each: tensor.roll(1, 0) if each == name else tensor for each, tensor in _named(batch).items()}
    return named if isinstance(batch, Mapping) else list(named.values())


def _named(batch: Batch) -> dict[str, Tensor]:
    if isinstance(batch, Tensor):
        return {"input": batch}
    return dict(batch) if isinstance(batch, Mapping) else {str(index): each for index, each in enumerate(batch)}
