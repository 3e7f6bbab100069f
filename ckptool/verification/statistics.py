"""The numbers that tell a model which answers from one that has collapsed; tensors in, plain floats out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

_CONFIDENCE_LEVEL = 0.95
_BISECTIONS = 60
_SHUFFLES = 200
_MOST_CLASSES = 10_000


def as_probabilities(answers: Tensor) -> Tensor:
    """Give the probability of each class, float64 [rows, classes], whatever form the answers have.

    Logits [rows, classes] go through a softmax, probabilities stay as they are, integers [rows] are classes already.
    """
    if not answers.is_floating_point():
        return torch.nn.functional.one_hot(*_as_numbers(answers)).double()
    answers = answers.double()
    return answers if are_probabilities(answers) else answers.softmax(dim=-1)


def _as_numbers(classes: Tensor) -> tuple[Tensor, int]:
    """Give classes that can be counted from 0 on, and their number; what is no class number is numbered anew."""
    if int(classes.min()) < 0 or int(classes.max()) >= _MOST_CLASSES:
        classes = classes.unique(return_inverse=True)[1]  # type: ignore[no-untyped-call]
    return classes, max(2, int(classes.max()) + 1)


def as_logits(answers: Tensor) -> Tensor:
    """Give float64 values whose softmax are the probabilities, in the same forms as ``as_probabilities``."""
    if answers.is_floating_point() and not are_probabilities(answers):
        return answers.double()
    return as_probabilities(answers).clamp_min(1e-12).log()


def are_probabilities(answers: Tensor) -> bool:
    """Tell whether every row is a distribution: nothing negative, a sum of one. One with NaN says nothing."""
    known = answers[~answers.isnan().any(dim=-1)]
    return bool((known >= 0).all()) and bool(((known.sum(dim=-1) - 1).abs() < 1e-3).all())


def both_classes(rows: Tensor) -> Tensor:
    """Give the one logit, or probability, of a model of two classes, [rows, 1], for both; other rows stay as they are.

    A network ends with the sigmoid or without it: all values from 0 to 1 are probabilities.
    """
    if rows.shape[1] != 1:
        return rows
    return torch.cat((1 - rows if _are_shares(rows) else torch.zeros_like(rows), rows), dim=1)


def label_logits(answers: Tensor) -> Tensor:
    """Give float64 logits of labels that each hold or not: of logits, or of probabilities."""
    answers = answers.double()
    return answers.clamp(1e-7, 1 - 1e-7).logit() if _are_shares(answers) else answers


def _are_shares(answers: Tensor) -> bool:
    return bool((((answers >= 0) & (answers <= 1)) | answers.isnan()).all())


def without_masked(answers: Tensor) -> Tensor:
    """Leave the classes out, [rows, classes], whose logit is -inf: they have a probability of 0, and no spread."""
    return answers[:, answers.isfinite().all(dim=0)] if answers.is_floating_point() else answers


def entropy(probabilities: Tensor) -> Tensor:
    """Give the entropy of each row, in nats."""
    entropies: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return entropies


def mutual_information(probabilities: Tensor) -> float:
    """Give what the class tells about the input, [rows, classes], from 0 (nothing) to 1.

    H(mean p) - mean H(p), over the logarithm of the most that so many rows and classes allow.
    """
    most = min(len(probabilities), probabilities.shape[-1])
    if most < 2:
        return 0.0
    gained = entropy(probabilities.mean(dim=0)) - entropy(probabilities).mean()
    return max(0.0, gained.item() / math.log(most))


def input_dependence(answers: Tensor) -> float:
    """Give the share of the answers' energy that depends on the input, [rows, values], from 0 to 1.

    Each row is centred first, since a softmax does not see what all of its logits share; a single value is not.
    """
    values = _as_rows(answers)
    if values.shape[1] > 1:
        values = values - values.mean(dim=1, keepdim=True)
    energy = values.square().sum()
    return 0.0 if energy == 0 else ((values - values.mean(dim=0)).square().sum() / energy).item()


def _as_rows(answers: Tensor) -> Tensor:
    return answers.double().reshape(len(answers), -1)


def spread(answers: Tensor) -> float:
    """Give the root mean square of the answers, [rows, values], each row centred where it has several values."""
    values = _as_rows(answers)
    if values.shape[1] > 1:
        values = values - values.mean(dim=1, keepdim=True)
    return values.square().mean().sqrt().item()


def relative_range(answers: Tensor) -> float:
    """Give how far the answers to two inputs are apart at most, relative to the largest of all values."""
    values = _as_rows(answers)
    largest = values.abs().max()
    return 0.0 if largest == 0 else ((values.amax(dim=0) - values.amin(dim=0)).max() / largest).item()


def relative_difference(one: Tensor, other: Tensor, scale: Tensor) -> float:
    """Give the largest difference between answers to the same inputs, relative to the largest finite one in ``scale``.

    The same NaN or infinity on both sides is no difference; on one side it is an infinite one.
    """
    alike = (one == other) | (one.isnan() & other.isnan())
    largest = scale.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    difference = (one.double() - other.double()).abs().nan_to_num(math.inf).masked_fill(alike, 0.0).max().item()
    return 0.0 if difference == 0 else difference / max(largest, 1e-30)


def mean_cosine(answers: Tensor) -> float:
    """Give the mean cosine similarity of the answers to two different inputs, [rows, values]."""
    directions = torch.nn.functional.normalize(_as_rows(answers), dim=1)
    rows = len(directions)
    if rows < 2:
        return 1.0
    # The squared length of the sum is the sum over all pairs, each row with itself included.
    return ((directions.sum(dim=0).square().sum() - directions.square().sum()) / (rows * (rows - 1))).item()


def histogram(classes: Tensor) -> dict[int, int]:
    """Count how often each class was predicted, the most frequent first."""
    return dict(sorted(Counter(classes.flatten().tolist()).items(), key=lambda pair: (-pair[1], pair[0])))


def share_bound(count: int, total: int) -> float:
    """Give the share that is at least so large with a confidence of 95 %, having seen ``count`` of ``total``.

    The lower bound of Clopper and Pearson.
    """
    if count == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_low = _at_least(count, total, middle) < 1 - _CONFIDENCE_LEVEL
        low, high = (middle, high) if too_low else (low, middle)
    return low


def _at_least(count: int, total: int, share: float) -> float:
    """Give the probability of ``count`` or more hits in ``total``."""
    logs = [_log_binomial(hits, total, share) for hits in range(count, total + 1)]
    return math.fsum(math.exp(each) for each in logs)


def _log_binomial(hits: int, total: int, share: float) -> float:
    ways = math.lgamma(total + 1) - math.lgamma(hits + 1) - math.lgamma(total - hits + 1)
    return ways + hits * _log(share) + (total - hits) * _log(1 - share)


def _log(value: float) -> float:
    return math.log(max(value, 1e-300))


def label_gain(probabilities: Tensor, labels: Tensor) -> float:
    """Tell by how many standard deviations the labels are likelier than the same labels in random order.

    About 0 for a model that knows nothing of its input, however well it knows which class is frequent.
    """
    logs = probabilities.clamp_min(1e-12).log()
    generator = torch.Generator().manual_seed(0)
    orders: Sequence[Tensor] = [torch.randperm(len(labels), generator=generator) for _ in range(_SHUFFLES)]
    shuffled = torch.stack([_log_likelihood(logs, labels[order]) for order in orders])
    spread = shuffled.std().item()
    return 0.0 if spread == 0 else (_log_likelihood(logs, labels) - shuffled.mean()).item() / spread


def _log_likelihood(logs: Tensor, labels: Tensor) -> Tensor:
    return logs.gather(1, labels.long().unsqueeze(1)).mean()
