"""A vector for each input: do different inputs point into different directions."""

from __future__ import annotations

from torch import Tensor

from ckptool.model.verification import Check, CheckStatus
from ckptool.verification import statistics
from ckptool.verification.outputs import Inputs, Outputs
from ckptool.verification.tasks.case import Case, Measured, conclude_told_apart


def measure(outputs: Outputs, _inputs: Inputs) -> Measured:
    """Measure how far the vectors spread."""
    vectors = _vectors(outputs.judged)
    return Measured(
        {
            "mean_cosine": statistics.mean_cosine(vectors),
            "input_dependence": statistics.input_dependence(vectors),
            "spread": statistics.spread(vectors),
        }
    )


def _vectors(answers: Tensor) -> Tensor:
    """Give one vector per input: the mean over the positions of a sequence."""
    return answers.double().mean(dim=1) if answers.ndim == 3 else answers.double().flatten(1)


def judge(case: Case, measured: Measured) -> Check:
    """Decide by the cosine of pairs and the input dependence."""
    numbers, limits = measured.statistics, case.options.thresholds
    seen = (
        f"{case.fed} -> vectors with a mean cosine of {numbers['mean_cosine']:.2f} "
        f"(input dependence {numbers['input_dependence']:.2g})"
    )
    unusual = (
        ", different inputs get nearly the same vector (a usual cosine is at most "
        f"{limits.cosine:g}, a usual dependence at least {limits.vector_dependence:g})"
    )
    spreads = numbers["mean_cosine"] <= limits.cosine and numbers["input_dependence"] >= limits.vector_dependence
    unsettled: CheckStatus = "warn" if case.in_domain else "inconclusive"
    return conclude_told_apart(case, numbers, seen, told_apart=spreads, unusual=unusual, unsettled=unsettled)
