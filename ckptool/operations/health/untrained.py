"""Judge which weights look as an initialiser left them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ckptool.layouts.segments import quoted
from ckptool.model.verification import Check, CheckStatus, Thresholds
from ckptool.operations.health.fingerprint import BY_NAME, Fingerprint
from ckptool.operations.health.roles import Ends, is_trained, stays_random
from ckptool.operations.health.survey import Measured

_TORCH_DEFAULT = "torch's default init"
# The largest of n draws from U(-b, b) misses b by more than 14 / n of it once in a thousand times.
_MISSED_BOUND = 14.0
_SURE_ELEMENTS = 1000
# What rounding to a type can add to a value, relative to it.
_ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
_LEAST_ROUNDING = 2.0**-22
_UNIT_MARGIN = 0.1  # torch.nn.Embedding draws from N(0, 1), and no other layer does


def check_untrained(tensors: Sequence[Measured], ends: Ends, thresholds: Thresholds) -> Check:
    """Weigh what still is as an initialiser drew it against all trained parameters; the ends of the network count."""
    trained = [tensor for tensor in tensors if is_trained(tensor)]
    judged = [(one, one.fingerprint) for one in trained if one.fingerprint and not stays_random(one.name)]
    if not judged:
        return Check(
            "values.untrained", "skip", "no weight is a matrix of a floating type that is wide enough to judge"
        )
    rows = [(tensor, _row(tensor, fingerprint)) for tensor, fingerprint in judged]
    found = [row for _, row in rows if row is not None]
    share = sum(row["elements"] for row in found) / sum(tensor.spec.numel for tensor in trained)
    evidence = {"judged": len(judged), "share_of_parameters": share, "untrained": found}
    if not found:
        message = f"none of {len(judged)} weights looks as an initialiser leaves it"
        return Check("values.untrained", "pass", message, evidence)
    vital = [row["name"] for tensor, row in rows if row is not None and _is_vital(tensor, row, ends)]
    status = "fail" if vital else _status(share, thresholds)
    cause = f"everything passes through {quoted(vital)}" if vital else _CAUSES[status]
    return Check("values.untrained", status, f"{_count(found, len(judged), share)}; {cause}", evidence, _ADVICE[status])


def _is_vital(tensor: Measured, row: dict[str, Any], ends: Ends) -> bool:
    """Tell whether no output can be right: the last layer is untrained, or the first one still as torch draws it.

    Other draws in a first layer can be meant (methods freeze a random one), and in a small one a little training moves
    no value across the bound. A head that is tied to an embedding, or drawn as one, is one: the rows of tokens that
    never occur stay as they are.
    """
    is_sure = row["init"] == _TORCH_DEFAULT and tensor.spec.numel >= _SURE_ELEMENTS
    is_embedding = len(tensor.names) > 1 or abs(row["std"] - 1) < _UNIT_MARGIN
    return (ends.is_head(tensor) and not is_embedding) or (ends.is_first(tensor) and is_sure)


_ADVICE: dict[CheckStatus, str] = {
    "pass": "",
    "warn": "check with --model that every layer of yours is in the file",
    "fail": "look for the trained checkpoint: ckptool inspect shows epoch and step of this one; if layers are meant to "
    "be random, leave this out with --skip-checks values.untrained",
}


def _status(share: float, thresholds: Thresholds) -> CheckStatus:
    if share >= thresholds.untrained_fail:
        return "fail"
    return "warn" if share >= thresholds.untrained_warn else "pass"


_CAUSES: dict[CheckStatus, str] = {
    "pass": "unused layers, most likely",
    "warn": "unused layers, or layers whose values were not loaded before this was saved",
    "fail": "the weights were not loaded, or saved before training",
}


def _count(found: Sequence[dict[str, Any]], judged: int, share: float) -> str:
    default = sum(row["init"] == _TORCH_DEFAULT for row in found)
    origin = f", {default} of them as {_TORCH_DEFAULT} draws it" if default else ""
    named = quoted([row["name"] for row in found])
    return f"{len(found)} of {judged} weights ({share:.1%} of the parameters) look never trained{origin}: {named}"


def _row(tensor: Measured, found: Fingerprint) -> dict[str, Any] | None:
    """Give the evidence that a weight was never trained, or None."""
    statistics = tensor.statistics
    if statistics is None or statistics.minimum is None or statistics.maximum is None:
        return None
    ends = (-float(statistics.minimum), float(statistics.maximum))
    rounding = _ROUNDING.get(tensor.spec.dtype.name, _LEAST_ROUNDING)
    init = _TORCH_DEFAULT if _is_torch_default(tensor, found, ends, rounding) else found.init
    limit = BY_NAME[found.init].largest(tensor.spec.numel) if found.init else math.inf
    if init is None or max(ends) > limit * (statistics.std or 0) * (1 + rounding):
        return None
    numbers = {"edge": found.edge, "kurtosis": found.kurtosis, "std": found.std}
    return {"name": tensor.name, "elements": tensor.spec.numel, "init": init, **numbers}


def _is_torch_default(tensor: Measured, found: Fingerprint, ends: tuple[float, float], rounding: float) -> bool:
    """Tell whether the values fill U(-b, b) with b = 1 / sqrt(fan_in) exactly, as those of Linear and Conv do at first.

    Source: reset_parameters of torch.nn.Linear and torch.nn.Conv2d (kaiming_uniform_ with a = sqrt(5)).
    """
    bound = 1 / math.sqrt(math.prod(tensor.spec.shape[1:]))
    least = 1 - _MISSED_BOUND / tensor.spec.numel - rounding
    return found.drawn == "uniform" and all(least <= end / bound <= 1 + rounding for end in ends)
