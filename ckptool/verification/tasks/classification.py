"""One class for each input: does the class depend on the input at all."""

from __future__ import annotations

import torch
from torch import Tensor

from ckptool.model.verification import Check
from ckptool.verification import statistics
from ckptool.verification.outputs import Inputs, Outputs
from ckptool.verification.suspects import name_spike, name_suspects
from ckptool.verification.tasks.case import (
    LOAD_ADVICE,
    Case,
    Measured,
    causes,
    conclude,
    corroborations,
    exonerations,
    join_words,
    name_class,
    percent,
    too_few,
)

# With few classes, three times chance is nearly certain: flat is then what lies within this much of chance.
_FLAT_ABOVE_CHANCE = 0.2
_USUAL_INFORMATION = 0.2
# Labels speak for a model when they are so many standard deviations likelier than in random order, and as frequent
# as it says.
_LABEL_GAIN = 4.0
_UNRELATED_GAIN = 2.0
_CALIBRATED = 0.15
_MOST_LABELS = 0.5
# An honest network fits its labels best as it is; one whose signal was damped would do better with this much of it.
_LOUDER = 3.0


def as_classes(outputs: Outputs) -> Tensor:
    """Give the judged answers as logits or probabilities [rows, classes], or as classes [rows]."""
    answers = outputs.judged
    if not answers.is_floating_point():
        return answers.flatten()
    return statistics.both_classes(answers.reshape(len(answers), -1))


def measure(outputs: Outputs, _inputs: Inputs) -> Measured:
    """Measure how much the predicted class tells about the input."""
    answers = as_classes(outputs)
    probabilities = statistics.as_probabilities(answers)
    confidence, predicted = probabilities.max(dim=1)
    histogram = statistics.histogram(predicted)
    most = max(histogram.values())
    rows = len(probabilities)
    logits = statistics.as_logits(statistics.without_masked(answers))
    return Measured(
        {
            "mutual_information": statistics.mutual_information(probabilities),
            "input_dependence": statistics.input_dependence(logits),
            "share": most / rows,
            "share_at_least": statistics.share_bound(most, rows),
            "mean_confidence": confidence.mean().item(),
            "distinct_classes": float(len(histogram)),
            "spread": statistics.spread(logits),
            "information_without_offset": statistics.mutual_information(_without_offset(logits)),
        },
        probabilities.shape[1],
        histogram,
    )


def _without_offset(logits: Tensor) -> Tensor:
    """Give the probabilities once what all inputs share is taken off: a spike in the head's bias goes, no more."""
    return (logits.double() - logits.double().mean(dim=0)).softmax(dim=1)


def judge(case: Case, measured: Measured) -> Check:
    """Decide: told apart, collapsed, untrained, or not to be settled with these inputs."""
    numbers, limits = measured.statistics, case.options.thresholds
    few = too_few(case)
    if few:
        return conclude(case, "inconclusive", f"{few}: {describe(case, measured)}.", numbers, case.advice)
    low = numbers["mutual_information"] < limits.mutual_information
    if not low and (case.in_domain or numbers["share"] < limits.share):
        return _conclude_diverse(case, measured)
    if low and case.in_domain and _labels_agree(case):
        return conclude(case, "pass", f"{describe(case, measured)}, yet in line with the labels.", numbers)
    reasons = corroborations(case) if low else []
    if reasons:
        return conclude(case, "fail", f"{describe(case, measured)}: {join_words(reasons)}.", numbers, LOAD_ADVICE)
    if case.in_domain and (_is_one_class(case, measured) or _is_flat(case, measured)) and _is_proven(case, measured):
        message = f"{describe(case, measured)}: {_explain_collapse(case, measured)}.{exonerations(case)}"
        return conclude(case, "fail", message, numbers, _COLLAPSE_ADVICE)
    return conclude(case, "inconclusive", _doubt(case, measured), numbers, _doubt_advice(case))


def _is_proven(case: Case, measured: Measured) -> bool:
    """Tell whether nothing but damage explains that the user's own inputs are not told apart.

    A cause in the weights does. Without one, sound networks look so on inputs of one kind or of a scale that is not
    theirs; labels of several kinds, or answers that hardly move, rule that out.
    """
    if _one_label(case):
        return False
    if name_suspects(case.model) or _spike(case, measured):
        return True
    if case.inputs.assumed_scale:
        return False
    gain = _label_gain(case)
    if gain is None:
        return _hardly_moves(case, measured)
    is_usual = not _is_one_class(case, measured) or _share_right(case) >= _MOST_LABELS
    return gain < _UNRELATED_GAIN or not is_usual


def _hardly_moves(case: Case, measured: Measured) -> bool:
    return measured.statistics["input_dependence"] < case.options.thresholds.collapsed_dependence


def _spike(case: Case, measured: Measured) -> str | None:
    """Name the bias that makes the leading class so; classes that are masked away have none."""
    answers, leading = as_classes(case.outputs), next(iter(measured.histogram))
    if answers.ndim < 2:
        return name_spike(case.model, measured.classes, leading)
    kept = answers.isfinite().all(dim=0)
    return name_spike(case.model, int(kept.sum()), int(kept[:leading].sum()))


def _conclude_diverse(case: Case, measured: Measured) -> Check:
    seen, gain = describe(case, measured), _label_gain(case)
    if gain is None or gain >= _UNRELATED_GAIN:
        return conclude(case, "pass", f"{seen}.", measured.statistics)
    message = f"{seen}, and the labels are no likelier under these answers than in random order."
    advice = "check that labels and classes are counted in the same order (--class-names), and the preprocessing"
    return conclude(case, "inconclusive", message, {**measured.statistics, "label_gain": gain}, advice)


_LIKELY_CAUSES = "likely causes are damaged layers, lost BatchNorm statistics or another preprocessing than in training"
_SCALE_ADVICE = "say how the pictures were scaled in training with --mean and --std"
_LABELS_ADVICE = "give labels with --data DIR or --targets FILE, or compare with the original: --against ORIGINAL"
_RARE_ADVICE = "give more inputs of the rarer classes, or compare with the original: --against ORIGINAL"
_COLLAPSE_ADVICE = "check mean and std (--mean, --std), then compare with the original: --against ORIGINAL"


def describe(case: Case, measured: Measured) -> str:
    """Say what was predicted, with numbers."""
    numbers, count = measured.statistics, case.inputs.count
    information = f"mutual information {numbers['mutual_information']:.3f}"
    if numbers["mutual_information"] < case.options.thresholds.mutual_information:
        information += f", usual >= {_USUAL_INFORMATION}"
    confidence = f"mean confidence {numbers['mean_confidence']:.3f}"
    index = next(iter(measured.histogram))
    if len(measured.histogram) == 1:
        return f"{count} of {case.fed} -> {name_class(case, index)} ({confidence}; {information})"
    return (
        f"{case.fed} -> {len(measured.histogram)} of {measured.classes} classes, "
        f"{name_class(case, index)} for {percent(numbers['share'])} of them ({confidence}; {information})"
    )


def _is_one_class(case: Case, measured: Measured) -> bool:
    return measured.statistics["share"] >= case.options.thresholds.share


def _is_flat(case: Case, measured: Measured) -> bool:
    """Tell whether the confidence is about that of a guess."""
    chance = 1 / (measured.classes or 1)
    flat = min(case.options.thresholds.flat_confidence * chance, chance + _FLAT_ABOVE_CHANCE)
    return measured.statistics["mean_confidence"] < flat


def _explain_collapse(case: Case, measured: Measured) -> str:
    spike = _spike(case, measured)
    if measured.statistics["information_without_offset"] >= _USUAL_INFORMATION:
        where = f"({spike})" if spike else f"that no bias of the last layer explains; {causes(case, _LIKELY_CAUSES)}"
        return f"it sees the differences, and one constant offset outweighs them {where}"
    return f"it does not tell its inputs apart; {causes(case, spike or _LIKELY_CAUSES)}"


def _doubt(case: Case, measured: Measured) -> str:
    seen = describe(case, measured)
    if case.in_domain and _one_label(case):
        return (
            f"{seen}: nearly all labels are of that class too, so there is nothing to tell apart.{exonerations(case)}"
        )
    if case.in_domain and case.inputs.assumed_scale:
        return (
            f"{seen}: damage, or another scale of the pictures than in training, which is assumed.{exonerations(case)}"
        )
    if case.in_domain:
        kinds = "inputs that are all of one kind" if _labels_of(case) is None else "a class too rare among the labels"
        return f"{seen}: damage, or {kinds}.{exonerations(case)}"
    alike = "a detector of a rare class" if _is_one_class(case, measured) else "a model of something else"
    return f"{seen}. These inputs are not your data: {alike} can look like this.{exonerations(case)}"


def _doubt_advice(case: Case) -> str:
    if not case.in_domain:
        return case.advice
    if _one_label(case):
        return "give inputs of other classes too"
    if case.inputs.assumed_scale:
        return _SCALE_ADVICE
    return _LABELS_ADVICE if _labels_of(case) is None else _RARE_ADVICE


def _labels_of(case: Case) -> Tensor | None:
    labels = case.inputs.labels
    return None if labels is None or labels.is_floating_point() or labels.ndim != 1 else labels


def _one_label(case: Case) -> bool:
    """Tell whether the labels themselves are nearly all of one class, which is also the one predicted."""
    labels = _labels_of(case)
    if labels is None:
        return False
    label, count = next(iter(statistics.histogram(labels).items()))
    agreed = (_predicted(case) == label).double().mean().item()
    return min(count / len(labels), agreed) >= case.options.thresholds.share


def _predicted(case: Case) -> Tensor:
    return statistics.as_probabilities(as_classes(case.outputs)).argmax(dim=1)


def _share_right(case: Case) -> float:
    """Give the share of the labels that are predicted."""
    labels = _labels_of(case)
    return 0.0 if labels is None else (_predicted(case) == labels).double().mean().item()


def _labels_agree(case: Case) -> bool:
    """Tell whether labels follow the probabilities, and are as frequent as these say: honest about a vague world."""
    labels, gain = _labels_of(case), _label_gain(case)
    if labels is None or gain is None:
        return False
    said = statistics.as_probabilities(as_classes(case.outputs)).mean(dim=0)
    found = torch.nn.functional.one_hot(labels.long(), len(said)).double().mean(dim=0)
    agree = gain >= _LABEL_GAIN and (said - found).abs().max().item() <= _CALIBRATED
    return agree and not (_share_right(case) < _MOST_LABELS and _is_muted(case, labels))


def _is_muted(case: Case, labels: Tensor) -> bool:
    """Tell whether one class leads everywhere, though labels fit larger differences between the answers better."""
    logits = statistics.as_logits(as_classes(case.outputs))
    if len(set(logits.argmax(dim=1).tolist())) > 1:
        return False
    shared = logits.mean(dim=0)
    louder = shared + _LOUDER * (logits - shared)
    one, other = (torch.nn.functional.cross_entropy(each, labels.long()).item() for each in (louder, logits))
    return one < other


def _label_gain(case: Case) -> float | None:
    """Give by how much the labels follow the answers; None without labels, or where these are all the same."""
    labels = _labels_of(case)
    probabilities = statistics.as_probabilities(as_classes(case.outputs))
    if labels is None:
        return None
    found = set(labels.tolist())
    return (
        statistics.label_gain(probabilities, labels) if len(found) > 1 and _are_classes(found, probabilities) else None
    )


def _are_classes(labels: set[int], probabilities: Tensor) -> bool:
    return min(labels) >= 0 and max(labels) < probabilities.shape[1]
