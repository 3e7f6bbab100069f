"""Judge the running statistics of batch normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ckptool.layouts.segments import quoted
from ckptool.model.results import TensorStatistics
from ckptool.model.verification import Check, CheckStatus
from ckptool.operations.health.roles import leaf, module_of
from ckptool.operations.health.survey import Measured

State = Literal["sound", "negative", "not finite", "zero", "lost", "fixed", "unused", "plain"]

_WORDS: Mapping[State, str] = {
    "negative": "a negative running variance",
    "not finite": "running statistics that are not finite",
    "zero": "a running variance of zero in every channel",
    "lost": "trained weights, but running statistics that were never updated (mean 0, variance 1 in every channel)",
    "fixed": "running statistics of mean 0 and variance 1 and no counter, as frozen layers have",
    "unused": "statistics and weights that were never updated, as if never run in training",
    "plain": "running statistics, but weights that were never trained (all 1, biases all 0)",
}
_FAILING: frozenset[State] = frozenset({"negative", "not finite", "zero", "lost"})


@dataclass(frozen=True, slots=True)
class _Layer:
    """Hold the statistics of the parts of one layer; None where a part is not in the file."""

    mean: TensorStatistics | None
    variance: TensorStatistics
    counter: TensorStatistics | None
    weight: TensorStatistics | None
    bias: TensorStatistics | None


def check_batchnorm(tensors: Sequence[Measured]) -> Check:
    """Look at every layer with a running variance: sound, lost, or never used."""
    layers = _layers(tensors)
    if not layers:
        return Check("values.batchnorm", "skip", "there is no batch normalisation with running statistics")
    found: dict[State, list[str]] = {}
    for name, layer in layers.items():
        found.setdefault(_state(layer), []).append(name)
    if "plain" in found and len(found["plain"]) < len(layers):  # of one layer it says nothing
        del found["plain"]
    found.pop("sound", None)
    evidence = {"layers": len(layers), **{state.replace(" ", "_"): names for state, names in found.items()}}
    if not found:
        return Check("values.batchnorm", "pass", f"the statistics of all layers ({len(layers)}) are sound", evidence)
    reasons = [
        f"{len(names)} of {len(layers)} layers have {_WORDS[state]}: {quoted(names)}" for state, names in found.items()
    ]
    return Check("values.batchnorm", _status(found, len(layers)), "; ".join(reasons), evidence, _ADVICE)


_ADVICE = "save the whole state_dict() after training, buffers included, or run training data through the model again"


def _status(found: Mapping[State, Sequence[str]], layers: int) -> CheckStatus:
    if found.keys() & _FAILING or len(found.get("unused", ())) == layers:
        return "fail"
    return "warn"


def _layers(tensors: Sequence[Measured]) -> dict[str, _Layer]:
    parts: dict[str, dict[str, TensorStatistics]] = {}
    for tensor in tensors:
        if tensor.statistics is not None and tensor.spec.numel:
            for name in tensor.names:
                parts.setdefault(module_of(name), {})[leaf(name)] = tensor.statistics
    return {
        module: _Layer(
            found.get("running_mean"),
            found["running_var"],
            found.get("num_batches_tracked"),
            found.get("weight"),
            found.get("bias"),
        )
        for module, found in parts.items()
        if "running_var" in found
    }


def _state(layer: _Layer) -> State:
    variance = layer.variance
    parts = (variance, layer.mean or variance)
    if any(part.finite < part.elements for part in parts):
        return "not finite"
    if variance.minimum is not None and variance.minimum < 0:
        return "negative"
    if _all(variance, 0):
        return "zero"
    if not _all(variance, 1) or (layer.mean is not None and not _all(layer.mean, 0)):
        return "sound" if layer.weight is None or _has_trained_weights(layer) else "plain"
    if layer.counter is None:
        return "fixed"
    was_counted = not _all(layer.counter, 0)
    return "lost" if was_counted or _has_trained_weights(layer) else "unused"


def _has_trained_weights(layer: _Layer) -> bool:
    return (layer.weight is not None and not _all(layer.weight, 1)) or (
        layer.bias is not None and not _all(layer.bias, 0)
    )


def _all(statistics: TensorStatistics, value: float) -> bool:
    return statistics.minimum == value == statistics.maximum and statistics.finite == statistics.elements
