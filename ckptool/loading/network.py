"""The part of a built object that maps inputs to outputs: without compilation, out of a LightningModule."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
_PARALLEL = "torch.nn.parallel.data_parallel.DataParallel"
_LIGHTNING = frozenset({"lightning", "pytorch_lightning"})


def is_lightning(kind: type) -> bool:
    """Tell whether a class is a LightningModule, of either package."""
    return any(_is_lightning_base(base) for base in kind.__mro__)


def has_forward(model: nn.Module) -> bool:
    """Tell whether a module says itself how it is called."""
    owner = next(base for base in type(model).__mro__ if "forward" in vars(base))
    return owner is not nn.Module and not _is_lightning_base(owner)


def _is_lightning_base(kind: type) -> bool:
    return kind.__name__ == "LightningModule" and kind.__module__.partition(".")[0] in _LIGHTNING


def run_eagerly(model: nn.Module) -> nn.Module:
    """Take the compilers out of a model, and leave its names as they are: compiling takes longer than verifying."""
    for module in model.modules():
        module._compiled_call_impl = None
        inner = _compiled_inner(module)
        if inner is not None:
            module.forward = inner.__call__
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """Give what torch.compile and DataParallel were put around."""
    while True:
        inner = _compiled_inner(model) or (model._modules["module"] if _class_name(model) == _PARALLEL else None)
        if inner is None:
            return model
        model = inner


def _compiled_inner(module: nn.Module) -> nn.Module | None:
    return module._modules["_orig_mod"] if _class_name(module) == _COMPILED else None


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def inner_network(model: nn.Module, fits_fully: Callable[[nn.Module], bool]) -> str | None:
    """Name the attribute of a LightningModule that is its network; None where it is the whole.

    That is the child that the file fills without a rest, else the one that has all parameters.
    """
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    full = [name for name, child in children.items() if fits_fully(unwrapped(child))]
    whole = {id(parameter) for parameter in model.parameters()}
    full = full or [name for name, child in children.items() if {id(item) for item in child.parameters()} == whole]
    return full[0] if len(full) == 1 else None


def as_one(model: nn.Module, name: str) -> nn.Module:
    """Let a LightningModule that cannot be called itself be called as its network; its names stay its own."""
    network: nn.Module = getattr(model, name)
    model.forward = network.__call__
    return model
