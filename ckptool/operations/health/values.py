"""Judge the values: not finite, dead, far off, copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Any

from ckptool.layouts.segments import quoted
from ckptool.model.verification import Check, Thresholds
from ckptool.operations.health.roles import (
    Ends,
    begins_with_zero,
    is_mask,
    is_often_copied,
    is_trained,
    is_weight,
    leaf,
)
from ckptool.operations.health.survey import Measured

_LARGEST_WEIGHT = 1e4
_LEAST_GROUP = 5  # below, a median and its deviation say nothing
# Deviations of the logarithm of a norm that are usual between layers alike, and between any two layers.
_LEAST_DEVIATION = 0.2
_LEAST_DEVIATION_OF_ALL = 0.6
_ALONE = 0.95
_LEAST_FAVOUR = 5.0  # logits: odds of 150 to 1
_MAD_TO_STD = 1.4826
_LEAST_COPIED = 64


def check_finite(tensors: Sequence[Measured]) -> Check:
    """Look for NaN and infinity in every floating tensor; masks may hold infinities."""
    floating = [tensor for tensor in tensors if tensor.spec.dtype.kind in ("float", "complex") and tensor.statistics]
    if tensors and not any(tensor.spec.numel for tensor in tensors):
        message = "no tensor holds a single value, so there are no weights to judge"
        return Check("values.finite", "inconclusive", message, {}, "name the file with the weights")
    if not floating:
        return Check("values.finite", "skip", "there are no floating tensors to look at")
    bad = [tensor for tensor in floating if _is_bad(tensor)]
    evidence = {"tensors": len(floating), "not_finite": [_not_finite(tensor) for tensor in bad]}
    if not bad:
        return Check("values.finite", "pass", f"every value of {len(floating)} floating tensors is finite", evidence)
    first = bad[0]
    message = (
        f"{len(bad)} of {len(floating)} floating tensors hold NaN or infinity: {quoted([one.name for one in bad])} "
        f"({_amounts(first)} in the first); {_cause_of(bad)}"
    )
    return Check("values.finite", "fail", message, evidence, "take an earlier checkpoint, or save this one anew")


def _is_bad(tensor: Measured) -> bool:
    statistics = tensor.statistics
    return statistics is not None and (statistics.nan > 0 or (statistics.infinite > 0 and not is_mask(tensor)))


def _not_finite(tensor: Measured) -> dict[str, Any]:
    statistics = tensor.statistics
    counts = (statistics.nan, statistics.infinite, statistics.elements) if statistics else (0, 0, 0)
    return {"name": tensor.name, **dict(zip(("nan", "infinite", "elements"), counts, strict=True))}


def _amounts(tensor: Measured) -> str:
    found = _not_finite(tensor)
    return f"{found['nan']:,} NaN and {found['infinite']:,} infinite of {found['elements']:,}"


def _cause_of(bad: Iterable[Measured]) -> str:
    only_overflow = all(
        tensor.statistics is not None and not tensor.statistics.nan and tensor.spec.dtype.itemsize <= 2
        for tensor in bad
    )
    if only_overflow:
        return "a cast to a narrower type overflowed, most likely"
    return "training diverged before this was saved, most likely"


def check_dead(tensors: Sequence[Measured], ends: Ends, thresholds: Thresholds) -> Check:
    """Look for weights that are all zero or all the same, in the first and the last layer above all."""
    weights = [tensor for tensor in tensors if is_weight(tensor) and not begins_with_zero(tensor.name)]
    if not weights:
        return Check("values.dead", "skip", "there are no weights with two dimensions or more to look at")
    dead = [tensor for tensor in weights if is_constant(tensor)]
    share = sum(tensor.spec.numel for tensor in dead) / sum(tensor.spec.numel for tensor in weights)
    evidence = {
        "weights": len(weights),
        "dead": {tensor.name: _value(tensor) for tensor in dead},
        "share_of_parameters": share,
    }
    if not dead:
        return Check("values.dead", "pass", f"none of {len(weights)} weights is all zero or constant", evidence)
    named = ", ".join(f'"{tensor.name}" (all {_value(tensor):g})' for tensor in dead[:3])
    more = f" and {len(dead) - 3} more" if len(dead) > 3 else ""
    message = f"{len(dead)} of {len(weights)} weights hold one value throughout: {named}{more}"
    vital = [tensor.name for tensor in dead if ends.is_head(tensor) or ends.is_first(tensor)]
    if vital:
        message += f"; everything passes through {quoted(vital)}, so the outputs cannot tell inputs apart"
    advice = "compare with the model that was saved: these layers were not trained, or their values were lost"
    failed = bool(vital) or share >= thresholds.untrained_fail
    return Check("values.dead", "fail" if failed else "warn", message, evidence, advice)


def is_constant(tensor: Measured) -> bool:
    """Tell whether every element has the same finite value."""
    statistics = tensor.statistics
    return (
        statistics is not None
        and statistics.elements > 1
        and statistics.finite == statistics.elements
        and statistics.minimum == statistics.maximum
    )


def _value(tensor: Measured) -> float:
    return float(tensor.statistics.minimum or 0) if tensor.statistics is not None else math.nan


def check_outliers(tensors: Sequence[Measured], ends: Ends, thresholds: Thresholds) -> Check:
    """Compare the norm of every weight with its like and with all, its values with a bound, the head's biases."""
    weights = [tensor for tensor in tensors if is_weight(tensor) and 0 < _rms(tensor) < math.inf]
    if not weights:
        return Check("values.outliers", "skip", "there are no weights with two dimensions or more to look at")
    far = dict(_far(weights, _gain, _LEAST_DEVIATION_OF_ALL, thresholds.norm_outlier))
    for group in _alike(weights):
        far.update(_far(group, _rms, _LEAST_DEVIATION, thresholds.norm_outlier))
    huge = {one.name: top for one in tensors if is_trained(one) and (top := _magnitude(one)) > _LARGEST_WEIGHT}
    favoured = {one.name: top for one in tensors if ends.is_head(one, "bias") and (top := _favour(one)) > 0}
    evidence = {"weights": len(weights), "norms": far, "largest": huge, "favoured": favoured}
    reasons = [
        *([f"the norms of {quoted(list(far))} lie far from those of other layers"] if far else ()),
        *([f"{quoted(list(huge))} hold values beyond {_LARGEST_WEIGHT:g}"] if huge else ()),
        *(f'"{name}" favours one output by {top:.1f} whatever the input' for name, top in favoured.items()),
    ]
    if not reasons:
        message = f"the norms of {len(weights)} weights are of the usual size"
        return Check("values.outliers", "pass", message, evidence)
    return Check("values.outliers", "warn", "; ".join(reasons), evidence, "look at them with ckptool inspect --stats")


def _rms(tensor: Measured) -> float:
    statistics = tensor.statistics
    if statistics is None or statistics.mean is None or statistics.std is None:
        return 0.0
    return math.hypot(statistics.mean, statistics.std)


def _gain(tensor: Measured) -> float:
    """Give the norm of an average row: what it makes of inputs of size one, whatever the width."""
    return _rms(tensor) * math.sqrt(math.prod(tensor.spec.shape[1:]))


def _magnitude(tensor: Measured) -> float:
    """Give the largest finite magnitude, 0 where there is none."""
    statistics = tensor.statistics
    if statistics is None or statistics.minimum is None or statistics.maximum is None:
        return 0.0
    return max(abs(float(statistics.minimum)), abs(float(statistics.maximum)))


def _favour(bias: Measured) -> float:
    """Give by how much the largest of three biases or more exceeds the mean, where it does so alone; 0 otherwise.

    One value alone can lie at most sqrt(n - 1) standard deviations above the mean of all n.
    """
    statistics = bias.statistics
    if statistics is None or statistics.maximum is None or statistics.mean is None or statistics.std is None:
        return 0.0
    excess = float(statistics.maximum) - statistics.mean
    is_alone = excess >= _ALONE * statistics.std * math.sqrt(max(statistics.elements - 1, 0))
    return excess if statistics.elements > 2 and is_alone and excess > _LEAST_FAVOUR else 0.0


def _alike(weights: Iterable[Measured]) -> Iterable[list[Measured]]:
    """Group weights by kind (the last part of the name) and shape."""
    groups: dict[Any, list[Measured]] = {}
    for tensor in weights:
        groups.setdefault((leaf(tensor.name), tensor.spec.shape), []).append(tensor)
    return groups.values()


def _far(
    group: Sequence[Measured], norm: Callable[[Measured], float], least: float, limit: float
) -> Iterator[tuple[str, float]]:
    """Yield the robust z of the logarithm of each norm, for those beyond the limit; a small group has none."""
    if len(group) < _LEAST_GROUP:
        return
    logs = [math.log(norm(tensor)) for tensor in group]
    middle = median(logs)
    deviation = max(_MAD_TO_STD * median([abs(value - middle) for value in logs]), least)
    scores = [(tensor.name, (value - middle) / deviation) for tensor, value in zip(group, logs, strict=True)]
    yield from ((name, score) for name, score in scores if abs(score) > limit)


def _is_shift(tensor: Measured) -> bool:
    """Tell biases: two that are added to the same sum, as in a residual block and its shortcut, learn the same."""
    return leaf(tensor.name) == "bias" and len(tensor.spec.shape) == 1


def check_duplicates(tensors: Sequence[Measured]) -> Check:
    """Look for tensors with the same values that are no ties."""
    candidates = [
        tensor
        for tensor in tensors
        if is_trained(tensor)
        and tensor.spec.numel > _LEAST_COPIED
        and not is_constant(tensor)
        and not _is_shift(tensor)
    ]
    if not candidates:
        return Check("values.duplicates", "skip", f"there are no trained tensors of more than {_LEAST_COPIED} elements")
    groups: dict[Any, list[str]] = {}
    for tensor in candidates:
        same = (tensor.spec.dtype.name, tensor.spec.shape, tensor.crc32, tensor.statistics)
        groups.setdefault(same, []).append(tensor.name)
    copies = [names for names in groups.values() if len(names) > 1]
    odd = [names for names in copies if not any(map(is_often_copied, names))]
    evidence = {"tensors": len(candidates), "groups": copies}
    if odd:
        more = f", and so do {len(odd) - 1} more groups" if len(odd) > 1 else ""
        message = f"{quoted(odd[0])} hold the same values without being tied{more}"
        advice = "one of them may have been loaded in place of the other; compare with the model that was saved"
        return Check("values.duplicates", "warn", message, evidence, advice)
    if copies:
        message = f"{quoted(copies[0])} hold the same values, as tied embeddings do that are stored under each name"
        return Check("values.duplicates", "pass", message, evidence)
    return Check("values.duplicates", "pass", f"no two of {len(candidates)} tensors hold the same values", evidence)
