"""What in a loaded model looks like the cause of bad answers: zero weights, statistics of layers that never ran."""

from __future__ import annotations

from torch import Tensor, nn

_NAMED = 3
_SPIKE = 5.0  # logits: a class that starts so far ahead of the others has a hundred times their probability


def name_suspects(model: nn.Module) -> list[str]:
    """Say what looks wrong in the weights of a model, the widest damage first; nothing where nothing does."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    variances = {name: tensor for name, tensor in named.items() if name.endswith("running_var")}
    flat = [name.rpartition(".")[0] for name, variance in variances.items() if _is_zero(variance)]
    unused = [name.rpartition(".")[0] for name, variance in variances.items() if _never_ran(name, variance, named)]
    matrices = {name: tensor for name, tensor in named.items() if tensor.ndim > 1 and tensor.is_floating_point()}
    zero = [name for name, tensor in matrices.items() if _is_zero(tensor)]
    found = [
        (unused, "BatchNorm statistics as of a layer that never ran in {} ({} of {} such layers)", len(variances)),
        (flat, "running_var zero throughout in {} ({} of {} such layers)", len(variances)),
        (zero, "all values zero in {} ({} of {} matrices)", len(matrices)),
    ]
    return [text.format(_name_some(names), len(names), total) for names, text, total in found if names]


def name_spike(model: nn.Module, classes: int | None, leading: int) -> str | None:
    """Name the bias that puts one class far ahead of all others, whatever the input."""
    for name, tensor in model.named_parameters():
        if tensor.ndim == 1 and len(tensor) == classes and _is_ahead(tensor, leading):
            return f"{name} is {tensor[leading].item():.3g} for class {leading}, {tensor.median().item():.3g} for most"
    return None


def _is_ahead(values: Tensor, leading: int) -> bool:
    return int(values.argmax()) == leading and (values[leading] - values.median()).item() >= _SPIKE


def _never_ran(name: str, variance: Tensor, named: dict[str, Tensor]) -> bool:
    mean = named.get(f"{name.removesuffix('running_var')}running_mean")
    return mean is not None and _is_zero(mean) and bool((variance == 1).all())


def _is_zero(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and not tensor.is_meta and not bool(tensor.any())


def _name_some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
