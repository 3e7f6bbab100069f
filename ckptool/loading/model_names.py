"""The clean names of a model in memory: wrappers are known by their class, so a real child named ``module`` stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ckptool.errors import CkptoolError
from ckptool.loading.library_names import Conversion, library_names

# Class name to the child that it adds to every path. By name: importing torch._dynamo costs a second.
_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "_checkpoint_wrapped_module",
}


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Name one tensor of a model: ``key`` is its name in the model's own state dict."""

    key: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Give the shape, or None while a lazy module has not made its parameter."""
        return None if is_lazy(self.tensor) else tuple(self.tensor.shape)

    @property
    def identity(self) -> object:
        """Give equal values for two names of the very same elements."""
        tensor = self.tensor
        if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.numel() == 0:
            return id(tensor)
        start = tensor.untyped_storage().data_ptr()
        return tensor.device, tensor.dtype, start, tensor.storage_offset(), tensor.shape, tensor.stride()


@dataclass(frozen=True, slots=True, eq=False)
class ModelNames:
    """List a model's state dict by clean name: its tensors, and the own keys of what is no tensor.

    ``conversion`` gives, for a name in a file, the one that the model's library has for it today.
    """

    slots: Mapping[str, Slot]
    values: Mapping[str, str]
    conversion: Conversion | None = None

    @property
    def are_own(self) -> bool:
        """Tell whether the model itself has its tensors under these names: no wrapper is around it."""
        return all(name == slot.key for name, slot in self.slots.items())


def model_names(model: nn.Module) -> ModelNames:
    """Give the clean names of a model.

    :raises CkptoolError: tensors are on the meta device, where nothing can be loaded.
    """
    entries: dict[str, Any] = model.state_dict(keep_vars=True)
    names = _names(entries, {key: clean_name(model, key) for key in entries})
    return replace(names, conversion=library_names(model, frozenset(names.slots)))


def own_names(model: nn.Module) -> ModelNames:
    """Give a model's names as its own ``load_state_dict`` asks for them.

    :raises CkptoolError: tensors are on the meta device, where nothing can be loaded.
    """
    entries: dict[str, Any] = model.state_dict(keep_vars=True)
    return _names(entries, {key: key for key in entries})


def _names(entries: Mapping[str, Any], clean: Mapping[str, str]) -> ModelNames:
    if len(set(clean.values())) < len(clean):
        raise CkptoolError("the model: two tensors have one name once the wrappers are taken off; unwrap it first")
    slots = {clean[key]: Slot(key, entry) for key, entry in entries.items() if isinstance(entry, Tensor)}
    _refuse_meta(slots)
    return ModelNames(slots, {name: key for key, name in clean.items() if name not in slots})


def clean_name(model: nn.Module, key: str) -> str:
    """Take the wrappers of torch.compile, DataParallel, DDP and activation checkpointing out of a model's own key."""
    kept: list[str] = []
    module: nn.Module | None = model
    for segment in key.split("."):
        if module is None or segment != _wrapped_child(module):
            kept.append(segment)
        # TorchScript has a mapping of its own, which knows no ``get``.
        module = module._modules[segment] if module is not None and segment in module._modules else None
    return ".".join(kept)


def _wrapped_child(module: nn.Module) -> str | None:
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__)
    return next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)


def _refuse_meta(slots: Mapping[str, Slot]) -> None:
    empty = [name for name, slot in slots.items() if slot.tensor.is_meta]
    if empty:
        raise CkptoolError(
            f'the model: {len(empty)} of {len(slots)} tensors ("{empty[0]}") are on the meta device, without memory; '
            'call model.to_empty(device="cpu") first'
        )
