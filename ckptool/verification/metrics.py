"""Measure answers against labels, under the names that trainers' test scripts use; what is undefined is None."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TypeAlias

import torch
from torch import Tensor

from ckptool.errors import CkptoolError
from ckptool.model.verification import Check, Task, Thresholds
from ckptool.verification.compare import as_logits
from ckptool.verification.statistics import label_logits

CHECK = "accuracy"
MEASURED: frozenset[Task] = frozenset({"classification", "multilabel", "regression"})
_TOP = (1, 3, 5)
_AREAS = tuple(f"{name}_{average}" for name in ("roc_auc", "average_precision") for average in ("micro", "macro"))
# What a network that ends with an argmax leaves undefined: nothing ranks its other classes.
_RANKED = ("top_3_accuracy", "top_5_accuracy", *_AREAS)
# Hardly more than guessing: a tenth of the way from chance to all right, and no more than twice chance.
_ABOVE_CHANCE = 0.1
_TIMES_CHANCE = 2.0
_GIVE_LABELS = "give labelled inputs with --data DIR, or labels with --targets FILE"
_OTHER_ORDER = "see load.coverage; labels that count the classes in another order than the model look like this too"
_OTHER_SCALE = "see load.coverage; targets of another scale than in training look like this too"
_NO_CURVES = "roc_auc and average_precision are left out: pip install scikit-learn"

Metrics: TypeAlias = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class _Decisions:
    """Hold labels, decisions and scores as (inputs, classes): for each class, whether it is right, chosen, how likely.

    A row of answers that are not all finite chooses nothing. ``averaged`` are the classes that macro averages are over:
    as in scikit-learn, all labels, or the classes that occur.
    """

    true: Tensor
    chosen: Tensor
    scores: Tensor
    averaged: Tensor
    is_finite: bool


def measure(output: Tensor, labels: Tensor, task: Task) -> Metrics:
    """Measure outputs, one row per input, against labels: class numbers, 0/1 per label, or the numbers to be predicted.

    :raises CkptoolError: the labels do not fit the outputs.
    """
    if len(output) != len(labels):
        raise CkptoolError(
            f"{len(labels)} labels for {len(output)} inputs; give one for each, in the order of the inputs"
        )
    if task == "regression":
        return _measure_numbers(output.double(), labels.double())
    if task == "multilabel" or (labels.ndim == 2 and labels.shape[1] > 1):
        return _measure_labels(label_logits(output), labels)
    numbers = class_numbers(labels)
    found = _measure_classes(class_logits(output, task, numbers), numbers)
    return found if output.is_floating_point() else {**found, **dict.fromkeys(_RANKED)}


def class_logits(output: Tensor, task: Task, labels: Tensor) -> Tensor:
    """Give the logits of a classifier, (inputs, classes); class numbers have as many classes as they and the labels do.

    :raises CkptoolError: the output has no single class per input.
    """
    is_number = not output.is_floating_point() and output.numel() == len(labels)
    together = torch.cat([output.flatten(), labels]) if is_number else output
    logits = as_logits(together, task) if output.ndim <= 2 else None
    if logits is None:
        raise CkptoolError(
            f"the answers have the shape {list(output.shape)} ({task}), labels need one class per input; "
            "leave the labels out"
        )
    return logits[: len(output)]


def class_numbers(labels: Tensor) -> Tensor:
    """Give labels as whole numbers.

    :raises CkptoolError: they are none.
    """
    flat = labels.reshape(len(labels))
    numbers = flat.long()
    if flat.is_floating_point() and not bool((numbers == flat).all()):
        raise CkptoolError("the labels are no class numbers; say --task regression if they are values to be predicted")
    return numbers


def _measure_classes(logits: Tensor, labels: Tensor) -> Metrics:
    count = logits.shape[1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < count:
        raise CkptoolError(
            f"the labels go from {int(labels.min())} to {int(labels.max())}, the classes of the model from 0 to "
            f"{count - 1}; give the labels that it was trained with, or --class-names in its order"
        )
    finite = logits.isfinite().all(dim=1)
    numbers = torch.arange(count)
    true, chosen = labels[:, None] == numbers, (logits.argmax(dim=1)[:, None] == numbers) & finite[:, None]
    decisions = _Decisions(true, chosen, logits.softmax(dim=1), (true | chosen).any(dim=0), bool(finite.all()))
    return {
        "accuracy": _mean((true & chosen).any(dim=1)),
        "balanced_accuracy": _mean_of(_recall(decisions)[true.any(dim=0)]),
        **_rates(decisions),
        **{f"top_{k}_accuracy": _top(logits, labels, finite, k) for k in _TOP},
        **_curves(decisions),
    }


def _measure_labels(logits: Tensor, labels: Tensor) -> Metrics:
    if logits.shape != labels.shape or not bool(((labels == 0) | (labels == 1)).all()):
        raise CkptoolError(
            f"the labels have the shape {list(labels.shape)}, the answers {list(logits.shape)}; give several labels an "
            "input as a table of 0 and 1, a column for each"
        )
    finite = logits.isfinite().all(dim=1)
    true, chosen = labels == 1, (logits > 0) & finite[:, None]
    every = torch.ones(logits.shape[1], dtype=torch.bool)
    decisions = _Decisions(true, chosen, logits.sigmoid(), every, bool(finite.all()))
    right = (true == chosen).all(dim=1) & finite
    balanced = _mean_of(_balance(decisions))
    return {"accuracy": _mean(right), "balanced_accuracy": balanced, **_rates(decisions), **_curves(decisions)}


def _balance(decisions: _Decisions) -> Tensor:
    """Give what of each label's yes and of its no is answered right, on average, for labels that have both."""
    no = replace(decisions, true=~decisions.true, chosen=~decisions.chosen)
    both = decisions.true.any(dim=0) & no.true.any(dim=0)
    return ((_recall(decisions) + _recall(no)) / 2)[both]


def _measure_numbers(output: Tensor, targets: Tensor) -> Metrics:
    if output.numel() != targets.numel():
        raise CkptoolError(
            f"the targets have the shape {list(targets.shape)}, the answers {list(output.shape)}; "
            "give one target for each value"
        )
    error = output.reshape(-1) - targets.reshape(-1)
    spread = float((targets - targets.mean(dim=0)).square().sum())
    unexplained = float(error.square().sum())
    return {
        "mean_absolute_error": _mean_of(error.abs()),
        "root_mean_squared_error": _defined(math.sqrt(unexplained / len(error)) if len(error) else math.nan),
        "r2": _defined(1 - unexplained / spread) if spread else None,
    }


def _mean(flags: Tensor) -> float | None:
    return _mean_of(flags.double())


def _mean_of(values: Tensor) -> float | None:
    return _defined(float(values.mean())) if values.numel() else None


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _top(logits: Tensor, labels: Tensor, finite: Tensor, k: int) -> float | None:
    """Give the share of inputs whose class is among the ``k`` likeliest; None for a model without that many."""
    if logits.shape[1] < k:
        return None
    found = (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1)
    return _mean(found & finite)


def _recall(decisions: _Decisions) -> Tensor:
    return _share((decisions.true & decisions.chosen).sum(dim=0), decisions.true.sum(dim=0))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Divide; nothing of nothing is 0, as in scikit-learn."""
    return part.double() / whole.double().clamp_min(1)


def _rates(decisions: _Decisions) -> dict[str, float | None]:
    """Average precision, recall and F1: each class alike (macro), or by its labels (weighted)."""
    right, true = (decisions.true & decisions.chosen).sum(dim=0), decisions.true.sum(dim=0)
    chosen = decisions.chosen.sum(dim=0)
    rates = {
        "precision": _share(right, chosen),
        "recall": _share(right, true),
        "f1": _share(2 * right, true + chosen),
    }
    macro = {f"{name}_macro": _mean_of(values[decisions.averaged]) for name, values in rates.items()}
    total = int(true.sum())
    weighted = {
        f"{name}_weighted": float((values * true).sum()) / total if total else None for name, values in rates.items()
    }
    return {**macro, **weighted}


def _curves(decisions: _Decisions) -> dict[str, float | None]:
    """Give the areas below the curves, one class against the rest; macro is over the classes that have both."""
    both = decisions.true.any(dim=0) & ~decisions.true.all(dim=0)
    if not decisions.is_finite or not bool(both.any()) or find_spec("sklearn") is None:
        return dict.fromkeys(_AREAS)
    from sklearn.metrics import average_precision_score, roc_auc_score  # takes a second and more

    true, scores = decisions.true.numpy(), decisions.scores.numpy()
    kept = both.numpy()
    areas = (
        score(true[:, columns], scores[:, columns], average=average)
        for score in (roc_auc_score, average_precision_score)
        for average, columns in (("micro", slice(None)), ("macro", kept))
    )
    return {name: _defined(float(area)) for name, area in zip(_AREAS, areas, strict=True)}


def check_accuracy(
    metrics: Metrics | None, labels: Tensor | None, least: float | None, thresholds: Thresholds
) -> Check:
    """Hold the accuracy against ``--min-accuracy``; without it, only one like that of chance is no pass."""
    accuracy = None if metrics is None else metrics.get("accuracy")
    if metrics is None or labels is None or accuracy is None:
        return _check_numbers(metrics or {}, labels, thresholds) if least is None else _unmeasured(labels, least)
    chance = _chance(metrics, labels, thresholds)
    evidence = {"accuracy": accuracy, "inputs": len(labels), "min_accuracy": least, "chance": chance}
    message = f"{accuracy:.1%} of {len(labels)} labelled inputs are answered right"
    if least is not None and accuracy < least:
        return Check(CHECK, "fail", f"{message}, less than the {least:.1%} asked for", evidence, _OTHER_ORDER)
    balanced = metrics.get("balanced_accuracy")
    if chance is not None and balanced is not None and balanced <= _near(chance):
        message = f"{message}, and {balanced:.1%} of each class: hardly more than guessing ({chance:.1%})"
        return Check(CHECK, "inconclusive" if least is None else "warn", message, evidence, _OTHER_ORDER)
    return Check(CHECK, "pass", message, evidence, "" if find_spec("sklearn") else _NO_CURVES)


def _check_numbers(metrics: Metrics, labels: Tensor | None, thresholds: Thresholds) -> Check:
    """Hold predicted numbers against the least that any network has to reach: to be nearer than one number for all."""
    explained = metrics.get("r2")
    if labels is None or explained is None or explained > 0 or len(labels) < thresholds.least_inputs:
        return _unmeasured(labels, None)
    message = f"the answers are no nearer to the {len(labels)} targets than one number for all would be"
    evidence = {"r2": explained, "inputs": len(labels)}
    return Check(CHECK, "inconclusive", f"{message} (R2 {explained:.3g})", evidence, _OTHER_SCALE)


def soften_untrained(check: Check, accuracy: Check) -> Check:
    """Let a network that knows its labels keep random layers: known once an accuracy was asked for, else left open."""
    if check.id != "values.untrained" or check.status != "fail" or accuracy.status != "pass":
        return check
    message = f"{check.message}; yet {accuracy.message}"
    if accuracy.evidence["min_accuracy"] is not None:
        return replace(check, status="warn", message=message, advice="")
    advice = "if random layers are meant, say which accuracy proves it with --min-accuracy"
    return replace(check, status="inconclusive", message=message, advice=advice)


def _near(chance: float) -> float:
    return min(_TIMES_CHANCE * chance, chance + _ABOVE_CHANCE * (1 - chance))


def _chance(metrics: Metrics, labels: Tensor, thresholds: Thresholds) -> float | None:
    """Give the balanced accuracy of guessing; None where too little was tested to tell."""
    if metrics.get("balanced_accuracy") is None or len(labels) < thresholds.least_inputs:
        return None
    classes = len(set(labels.reshape(-1).tolist()))
    return 1 / classes if classes > 1 else None


def _unmeasured(labels: Tensor | None, least: float | None) -> Check:
    """Say that there is no accuracy: a gate that cannot be tested is not passed."""
    reason = "there are no labels" if labels is None else "such answers have no accuracy"
    if least is None:
        return Check(CHECK, "skip", f"{reason}, so none is measured", {}, _GIVE_LABELS)
    return Check(CHECK, "inconclusive", f"{reason}, so --min-accuracy {least:g} cannot be tested", {}, _GIVE_LABELS)
