"""A class for each pixel or token: one class everywhere is worth a warning, since it may be the background."""

from __future__ import annotations

from torch import Tensor

from ckptool.model.verification import Check
from ckptool.verification import statistics
from ckptool.verification.outputs import Inputs, Outputs
from ckptool.verification.tasks.case import Case, Measured, conclude, corroborations, join_words, name_class, percent

_MOST_VALUES = 1 << 24


def flatten_places(answers: Tensor, class_dimension: int) -> Tensor:
    """Give [places of all inputs, classes], evenly thinned to what the statistics can hold in memory."""
    rows = answers.movedim(class_dimension, -1).flatten(0, -2)
    return rows[:: 1 + rows.numel() // _MOST_VALUES]


def measure(outputs: Outputs, _inputs: Inputs) -> Measured:
    """Measure how much the class tells about the place, over all inputs."""
    answers = outputs.judged
    rows = statistics.both_classes(flatten_places(answers, -1 if answers.ndim == 3 else 1))
    probabilities = statistics.as_probabilities(rows)
    histogram = statistics.histogram(probabilities.argmax(dim=1))
    return Measured(
        {
            "mutual_information": statistics.mutual_information(probabilities),
            "input_dependence": statistics.input_dependence(statistics.without_masked(rows)),
            "share": max(histogram.values()) / len(rows),
            "mean_confidence": probabilities.amax(dim=1).mean().item(),
            "spread": statistics.spread(statistics.without_masked(rows)),
        },
        probabilities.shape[1],
        histogram,
    )


def judge(case: Case, measured: Measured) -> Check:
    """Decide: untrained where something else says so as well, else a warning at most."""
    numbers, limits = measured.statistics, case.options.thresholds
    index = next(iter(measured.histogram))
    seen = (
        f"{case.fed} -> {len(measured.histogram)} of {measured.classes} classes, "
        f"{name_class(case, index)} in {percent(numbers['share'])} of all places (mutual information "
        f"{numbers['mutual_information']:.3f})"
    )
    if numbers["mutual_information"] >= limits.mutual_information and numbers["share"] < limits.share:
        return conclude(case, "pass", f"{seen}.", numbers)
    reasons = corroborations(case)
    if reasons:
        return conclude(case, "fail", f"{seen}: {join_words(reasons)}.", numbers, "see load.coverage")
    return conclude(case, "warn", f"{seen}; that may be the background.", numbers, case.advice)
