"""Judge what a model answers: finite, depending on the input, telling inputs apart, and the same every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from ckptool.errors import CkptoolError
from ckptool.model.verification import Check, Predictions, Task, VerifyOptions
from ckptool.verification import statistics
from ckptool.verification.constant import check_constant
from ckptool.verification.finite import check_finite
from ckptool.verification.fresh import compare_with_fresh
from ckptool.verification.outputs import Inputs, Outputs, first_batch, run_model
from ckptool.verification.stability import check_stability
from ckptool.verification.tasks import classification, embedding, language, multilabel, regression, segmentation
from ckptool.verification.tasks.case import ID, Background, Case, FreshCopies, Measured
from ckptool.verification.tasks.find import find_task, reads_left_to_right

# How many dimensions answers have at least and at most, for the tasks that look at places.
_DIMENSIONS: Mapping[Task, tuple[int, int]] = {"language": (3, 3), "segmentation": (3, 5)}
_SKIPPED_WHEN_BAD = ("output.constant", "output.diverse", "output.determinism", "output.batch")


@dataclass(frozen=True, slots=True)
class _Judge:
    """Measure the answers of one task, and decide by the numbers."""

    measure: Callable[[Outputs, Inputs], Measured]
    judge: Callable[[Case, Measured], Check]


_JUDGES: Mapping[Task, _Judge] = {
    "classification": _Judge(classification.measure, classification.judge),
    "multilabel": _Judge(multilabel.measure, multilabel.judge),
    "regression": _Judge(regression.measure, regression.judge),
    "language": _Judge(language.measure, language.judge),
    "embedding": _Judge(embedding.measure, embedding.judge),
    "segmentation": _Judge(segmentation.measure, segmentation.judge),
}


def judge(
    model: nn.Module,
    inputs: Inputs,
    outputs: Outputs,
    options: VerifyOptions,
    device: torch.device,
    background: Background | None = None,
) -> tuple[tuple[Check, ...], Predictions]:
    """Judge the ``outputs`` that ``run_model`` got from a model on ``device``.

    ``background`` is what else is known of the model; fresh copies are built only where the answers are suspicious.

    :raises CkptoolError: the model does not take its inputs a second time, or ``--task`` or ``--expect-range`` do not
        fit its answers.
    """
    task = options.task or find_task(model, inputs, outputs, device)
    _require_form(task, outputs, options)
    finite = check_finite(model, inputs, outputs, device)
    if finite.status != "pass":
        skipped = (Check(name, "skip", "the answers are not finite") for name in _SKIPPED_WHEN_BAD)
        return (finite, *skipped), Predictions(task, inputs.count, inputs.kind, None)
    steps = _JUDGES.get(task)
    measured = steps.measure(outputs, inputs) if steps else Measured({})
    causal = task == "language" and reads_left_to_right(model, first_batch(inputs, outputs), device)
    background = background or Background()
    fresh = cache(lambda: _measure_fresh(steps, measured, inputs, options, device, background))
    case = Case(task, model, inputs, outputs, options, background, causal, fresh)
    constant = check_constant(case, device)
    diverse = _judge_diversity(steps, case, measured, constant)
    if fresh.cache_info().currsize:
        diverse = replace(diverse, evidence={**diverse.evidence, "fresh_copies": _show_fresh(fresh())})
    stability = check_stability(model, first_batch(inputs, outputs), device)
    return (finite, constant, diverse, *stability), _predictions(case, measured)


def _require_form(task: Task, outputs: Outputs, options: VerifyOptions) -> None:
    if options.expect_range is not None and task != "regression":
        raise CkptoolError(
            f"--expect-range: judges numbers, and the task is {task}; say --task regression, or leave it out"
        )
    least, most = _DIMENSIONS.get(task, (0, 99))
    answers = outputs.judged
    if not least <= answers.ndim <= most or (least and not answers.is_floating_point()):
        raise CkptoolError(
            f"--task {task}: does not fit answers of the shape {list(answers.shape)} ({outputs.main}); "
            "leave it out, or name another task"
        )


def _show_fresh(copies: FreshCopies) -> Mapping[str, object]:
    return {"alike": copies.alike, "statistics": list(copies.statistics), "reason": copies.reason}


def _judge_diversity(steps: _Judge | None, case: Case, measured: Measured, constant: Check) -> Check:
    if steps is None:
        return Check(ID, "skip", f"of {case.task} models only finite and constant answers are judged")
    if constant.evidence.get("same_inputs"):
        return Check(ID, "inconclusive", "all inputs are the same (output.constant)", measured.statistics, case.advice)
    if constant.status == "fail" and not constant.evidence.get("dead_inputs"):
        return Check(ID, "skip", "the answers do not depend on the input at all (output.constant)", measured.statistics)
    return steps.judge(case, measured)


def _measure_fresh(
    steps: _Judge | None,
    measured: Measured,
    inputs: Inputs,
    options: VerifyOptions,
    device: torch.device,
    background: Background,
) -> FreshCopies:
    make = background.make
    if make is None or steps is None:
        return FreshCopies(None, reason="there is nothing to build a fresh copy from")

    def measure(model: nn.Module) -> Measured:
        return steps.measure(run_model(model, inputs, device), inputs)

    return compare_with_fresh(make, measure, measured, options.seed, device)


def _predictions(case: Case, measured: Measured) -> Predictions:
    top = case.options.top
    return Predictions(
        task=case.task,
        inputs=case.inputs.count,
        kind=case.inputs.kind,
        classes=measured.classes,
        histogram=measured.histogram,
        statistics=measured.statistics,
        top=likeliest(case.outputs, case.inputs, top) if top and case.task == "classification" else (),
    )


def likeliest(
    outputs: Outputs, inputs: Inputs, count: int
) -> tuple[tuple[str, tuple[tuple[int, str, float], ...]], ...]:
    """Give for each input its name and the ``count`` likeliest classes: number, name, probability."""
    probabilities = statistics.as_probabilities(classification.as_classes(outputs))
    found = probabilities.topk(min(count, probabilities.shape[1]))
    names = inputs.class_names or ()
    return tuple(
        (name, tuple((index, names[index] if index < len(names) else str(index), share) for index, share in pairs))
        for name, pairs in zip(inputs.names, _pairs(found.indices, found.values), strict=True)
    )


def _pairs(indices: Tensor, values: Tensor) -> Iterator[Iterator[tuple[int, float]]]:
    for row, shares in zip(indices.tolist(), values.tolist(), strict=True):
        yield zip(row, shares, strict=True)
