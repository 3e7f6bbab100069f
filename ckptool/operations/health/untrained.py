"""Judge which weights look as an initialiser left them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ckptool.layouts.segments import quoted
from ckptool.model.verification import Check, CheckStatus, Thresholds
from ckptool.operations.health.fingerprint import Fingerprint
from ckptool.operations.health.roles import is_trained, stays_random
from ckptool.operations.health.survey import Measured
from ckptool.operations.health.values import magnitude

# torch draws the weights of Linear and Conv from U(-b, b) with b = 1 / sqrt(fan_in) (torch.nn.Linear.reset_parameters).
_DEFAULT_INIT = (0.9, 1.004)  # the largest of many draws, and what a cast to bfloat16 adds to it


def check_untrained(tensors: Sequence[Measured], thresholds: Thresholds) -> Check:
    """Weigh the matrices that still are what an initialiser drew against all trained parameters."""
    trained = [tensor for tensor in tensors if is_trained(tensor)]
    judged = [
        (tensor, tensor.fingerprint) for tensor in trained if tensor.fingerprint and not stays_random(tensor.name)
    ]
    if not judged:
        return Check("values.untrained", "skip", "no floating weight is wide enough to be judged (16 x 32 or more)")
    found = [_row(tensor, print_) for tensor, print_ in judged if print_.init is not None]
    share = sum(row["elements"] for row in found) / sum(tensor.spec.numel for tensor in trained)
    evidence = {"judged": len(judged), "share_of_parameters": share, "untrained": found}
    if not found:
        return Check("values.untrained", "pass", f"all {len(judged)} matrices show training", evidence)
    status = _status(share, thresholds)
    return Check("values.untrained", status, _message(found, len(judged), share, status), evidence, _ADVICE[status])


_ADVICE: dict[CheckStatus, str] = {
    "pass": "",
    "warn": "check with --model that every layer of yours is in the file",
    "fail": "look for the trained checkpoint: ckptool inspect shows epoch and step of this one",
}


def _status(share: float, thresholds: Thresholds) -> CheckStatus:
    if share >= thresholds.untrained_fail:
        return "fail"
    return "warn" if share >= thresholds.untrained_warn else "pass"


def _message(found: Sequence[dict[str, Any]], judged: int, share: float, status: CheckStatus) -> str:
    counted = f"{len(found)} of {judged} matrices ({share:.1%} of the parameters) look never trained"
    causes = {
        "pass": "unused layers, most likely",
        "warn": "unused layers, or layers whose values were not loaded before this was saved",
        "fail": "the weights were not loaded, or saved before training",
    }
    default = sum(row["origin"] == _TORCH_DEFAULT for row in found)
    origin = f", {default} of them as {_TORCH_DEFAULT}" if default else ""
    return f"{counted}{origin}: {quoted([row['name'] for row in found])}; {causes[status]}"


_TORCH_DEFAULT = "torch's default init"


def _row(tensor: Measured, found: Fingerprint) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "elements": tensor.spec.numel,
        "init": found.init,
        "origin": _origin(tensor, found),
        "edge": found.edge,
        "kurtosis": found.kurtosis,
        "std": found.std,
    }


def _origin(tensor: Measured, found: Fingerprint) -> str:
    fan_in = math.prod(tensor.spec.shape[1:])
    least, most = _DEFAULT_INIT
    is_default = found.init == "uniform" and least < magnitude(tensor) * math.sqrt(fan_in) <= most
    return _TORCH_DEFAULT if is_default else f"{found.init} draws"
