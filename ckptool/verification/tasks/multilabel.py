"""Any number of labels for each input: does any of them depend on the input."""

from __future__ import annotations

from ckptool.model.verification import Check
from ckptool.verification import statistics
from ckptool.verification.outputs import Inputs, Outputs
from ckptool.verification.tasks.case import Case, Measured, conclude_told_apart, percent

# A label is constant when its logit moves by less than this much of what the logits measure.
_CONSTANT = 1e-2


def measure(outputs: Outputs, _inputs: Inputs) -> Measured:
    """Measure how many labels move with the input."""
    logits = statistics.label_logits(outputs.judged.reshape(len(outputs.judged), -1))
    scale = max(logits.square().mean().sqrt().item(), 1e-30)
    deviations = logits.std(dim=0, correction=0)
    positive = (logits > 0).sum(dim=0)
    counts = {index: count for index, count in enumerate(positive.tolist()) if count}
    return Measured(
        {
            "input_dependence": statistics.input_dependence(logits),
            "constant_labels": (deviations < _CONSTANT * scale).double().mean().item(),
            "labels_per_input": (logits > 0).double().sum(dim=1).mean().item(),
            "spread": statistics.spread(logits),
        },
        logits.shape[1],
        dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))),
    )


def judge(case: Case, measured: Measured) -> Check:
    """Decide by the share of labels that never move; that all are below a half is usual and says nothing."""
    numbers, limits = measured.statistics, case.options.thresholds
    seen = (
        f"{case.fed} -> {numbers['labels_per_input']:.3g} of {measured.classes} "
        f"labels each ({percent(numbers['constant_labels'])} of the labels never move; input dependence "
        f"{numbers['input_dependence']:.3g})"
    )
    told_apart = numbers["constant_labels"] < limits.share
    return conclude_told_apart(case, numbers, seen, told_apart=told_apart, unsettled="inconclusive")
