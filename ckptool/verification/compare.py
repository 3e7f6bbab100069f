"""Hold what two checkpoints of one model answer to the same inputs against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ckptool.errors import CkptoolError
from ckptool.model.verification import Check, SideBySide, Task, Thresholds
from ckptool.verification import statistics

CHECK = "agreement.outputs"
ELSEWHERE = "elsewhere"

# Where the classes are in an output, for tasks that have any.
_CLASS_AXIS: Mapping[Task, int] = {"classification": 1, "segmentation": 1, "language": -1}


@dataclass(frozen=True, slots=True)
class OutputAgreement:
    """Measure how two outputs agree.

    ``decisions`` counts rows that have a predicted class. ``flips`` has, for each row where that is another one, by
    how much their logit of their class exceeds that of ours, as a share of their largest (centred) logit.
    ``relative_error`` is ``|ours - theirs| / |theirs|`` over all values, ``mean_kl`` the mean divergence of our
    predicted distribution from theirs in nats, ``min_cosine`` the least cosine similarity of two rows. What the task
    does not have is None.
    """

    relative_error: float
    min_cosine: float
    largest_difference: float
    decisions: int | None = None
    flips: tuple[float, ...] = ()
    mean_kl: float | None = None

    @property
    def top_1(self) -> float | None:
        """Give the share of equal predictions."""
        return self.top_1_within(0.0)

    def top_1_within(self, error: float) -> float | None:
        """Give the share of predictions that are equal, or so nearly tied that an error of that size turns them."""
        clear = sum(flip > error for flip in self.flips)
        return 1 - clear / self.decisions if self.decisions else None

    def as_evidence(self) -> dict[str, float | None]:
        """Give the numbers under the names that reports use."""
        return {
            "top_1_agreement": self.top_1,
            "relative_error": self.relative_error,
            "mean_kl": self.mean_kl,
            "min_cosine": self.min_cosine,
            "max_abs_difference": self.largest_difference,
        }


def check_outputs(
    ours: Tensor, theirs: Tensor, *, task: Task, precision: str, thresholds: Thresholds, other: Path
) -> Check:
    """Compare the outputs, one row per input, with those of ``--against`` for the same inputs.

    ``precision`` is the dtype that the weights were rounded to (``float32``: none), or ``elsewhere`` for answers that
    were recorded on another device or with another torch: it says which thresholds hold.
    """
    if ours.shape != theirs.shape:
        message = f"the answers have the shape {list(ours.shape)}, those of {other} {list(theirs.shape)}"
        return Check(CHECK, "fail", message, {}, "give a checkpoint of the same model with --against")
    broken = _broken_rows(ours, theirs)
    if broken:
        message = f"{broken} of {len(ours)} answers hold NaN or Inf where those of {other} do not, or both hold NaN"
        return Check(CHECK, "fail", message, {"broken": broken}, "see output.finite for where they come from")
    return _judge(measure_agreement(ours, theirs, task), _limits(precision, thresholds), precision, other)


def _broken_rows(ours: Tensor, theirs: Tensor) -> int:
    """Count the rows that cannot be compared as numbers; a mask, infinite in both alike, can."""
    bad = ours.isnan() | theirs.isnan() | ((ours.isinf() | theirs.isinf()) & (ours != theirs))
    return int(bad.reshape(len(ours), -1).any(dim=1).sum()) if ours.numel() else 0


def _limits(precision: str, thresholds: Thresholds) -> tuple[float, float]:
    """Give the largest relative error and the least share of equal predictions."""
    name = "float8" if precision.startswith("float8") else precision
    limits: tuple[float, float] = getattr(thresholds, f"error_{name}"), getattr(thresholds, f"top_1_{name}")
    return limits


def _judge(found: OutputAgreement, limits: tuple[float, float], precision: str, other: Path) -> Check:
    error, top_1 = limits
    equal = found.top_1_within(error)
    evidence = {
        **found.as_evidence(),
        "top_1_without_ties": equal,
        "precision": precision,
        "allowed_error": error,
        "required_top_1": top_1,
    }
    agrees = found.relative_error <= error and (equal is None or equal >= top_1)
    if agrees:
        return Check(CHECK, "pass", f"the answers are those of {other}: {_numbers(found)}", evidence)
    required = f"{_kind(precision)} allows a relative error of {error:g}"
    required += f" and asks for {top_1:.0%} equal predictions" if equal is not None else ""
    message = f"the answers are not those of {other}: {_numbers(found)}, where {required}"
    return Check(CHECK, "fail", message, evidence, "see agreement.tensors for the tensors that differ")


def _kind(precision: str) -> str:
    return "another device or torch" if precision == ELSEWHERE else f"a difference in {precision}"


def _numbers(found: OutputAgreement) -> str:
    parts = (
        []
        if found.decisions is None
        else [f"{found.decisions - len(found.flips)} of {found.decisions} predictions equal"]
    )
    parts.append(f"relative error {found.relative_error:.2g}")
    parts += [] if found.mean_kl is None else [f"mean KL {found.mean_kl:.2g}"]
    return ", ".join([*parts, f"least cosine {found.min_cosine:.4f}"])


def measure_agreement(ours: Tensor, theirs: Tensor, task: Task) -> OutputAgreement:
    """Measure two outputs of one shape, one row per input, without NaN."""
    a, b = _without_masks(ours), _without_masks(theirs)
    rows = a.reshape(len(a), -1), b.reshape(len(b), -1)
    distance = (a - b).abs()
    found = OutputAgreement(
        relative_error=_ratio(float(distance.norm()), float(b.norm())),
        min_cosine=float(_cosine(*rows).min()) if a.numel() else 1.0,
        largest_difference=float(distance.max()) if a.numel() else 0.0,
    )
    both = as_logits(torch.cat([ours, theirs]), task)  # together: they are logits, or probabilities, on both sides
    return found if both is None else _with_decisions(found, *both.chunk(2))


def _with_decisions(found: OutputAgreement, logits: Tensor, reference: Tensor) -> OutputAgreement:
    return replace(
        found, decisions=len(logits), flips=_flips(logits, reference), mean_kl=_mean_divergence(logits, reference)
    )


def _flips(logits: Tensor, reference: Tensor) -> tuple[float, ...]:
    ours, theirs = logits.argmax(dim=1, keepdim=True), reference.argmax(dim=1, keepdim=True)
    ahead = (reference.gather(1, theirs) - reference.gather(1, ours)).squeeze(1)
    plain = _without_masks(reference)
    largest = (plain - plain.mean(dim=1, keepdim=True)).abs().amax(dim=1)
    shares = ahead / largest.clamp_min(torch.finfo(torch.float64).tiny)
    # A class that ours puts first and theirs ties with its own is no flip: argmax takes the first of equals.
    return tuple(float(share) for share in shares[ahead > 0])


def as_logits(output: Tensor, task: Task) -> Tensor | None:
    """Give the output as float64 logits of shape (decisions, classes); None for a task without classes.

    A single logit, as binary classifiers have it, becomes two with the same probabilities; probabilities, and class
    numbers, become logits.
    """
    axis = _CLASS_AXIS.get(task)
    if axis is None or output.ndim == 0:
        return None
    if not output.is_floating_point():
        return statistics.as_logits(output.flatten())
    wide = output.double().reshape(-1, 1) if output.ndim == 1 else output.double()
    rows = wide.movedim(axis, -1).reshape(-1, wide.shape[axis])
    return statistics.as_logits(statistics.both_classes(rows))


def _without_masks(output: Tensor) -> Tensor:
    wide = output.double()
    return wide.masked_fill(wide.isinf(), 0.0)


def _ratio(distance: float, size: float) -> float:
    if size:
        return distance / size
    return 0.0 if distance == 0 else float("inf")


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Give the cosine of each pair of rows; two rows of zeros point the same way."""
    lengths = a.norm(dim=1) * b.norm(dim=1)
    cosine = (a * b).sum(dim=1) / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where((a == b).all(dim=1), torch.ones_like(cosine), cosine)


def _mean_divergence(logits: Tensor, reference: Tensor) -> float:
    """Give the mean KL(reference || logits) in nats; what neither considers possible adds nothing."""
    log_p, log_q = reference.log_softmax(dim=1), logits.log_softmax(dim=1)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
    return max(0.0, float(terms.sum(dim=1).mean())) if len(terms) else 0.0


def side_by_side(answers: Mapping[str, Tensor], names: Sequence[str], task: Task) -> SideBySide:
    """Set the answers of several checkpoints, by path, to the same inputs side by side; the first is the reference.

    :raises CkptoolError: their shapes differ.
    """
    first = next(iter(answers))
    for path, output in answers.items():
        if output.shape != answers[first].shape:
            raise CkptoolError(
                f"{path}: answers with the shape {list(output.shape)}, {first} with {list(answers[first].shape)}; "
                "give checkpoints of one model"
            )
    picked = [_predictions(output, task) for output in answers.values()]
    rows = tuple((name, tuple(each)) for name, *each in zip(names, *picked, strict=True)) if all(picked) else ()
    agreements = tuple(_agreement_with(answers[first], output, task) for output in answers.values())
    return SideBySide(tuple(answers), rows, agreements)


def _predictions(output: Tensor, task: Task) -> list[tuple[int, float]]:
    """Give class and probability for each input; nothing where an input has no single class."""
    logits = as_logits(output, task) if output.ndim <= 2 else None
    if logits is None:
        return []
    likeliest = logits.softmax(dim=1).max(dim=1)
    return [(int(index), float(value)) for value, index in zip(*likeliest, strict=True)]


def _agreement_with(reference: Tensor, output: Tensor, task: Task) -> Mapping[str, float | None]:
    if _broken_rows(output, reference):
        return dict.fromkeys(OutputAgreement(0.0, 0.0, 0.0).as_evidence())
    return measure_agreement(output, reference, task).as_evidence()
