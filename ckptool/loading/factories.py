"""What can be called for a model, and what calling it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

import torch
from torch import nn

from ckptool.errors import CkptoolError
from ckptool.loading.arguments import CHANNEL_COUNTS, CLASS_COUNTS
from ckptool.loading.built import Preprocessing
from ckptool.loading.foreign import foreign_code
from ckptool.loading.network import is_lightning


def _itself(size: int) -> int | None:
    return size


@dataclass(frozen=True, slots=True)
class Size:
    """Name an argument that sets one dimension of some tensors: which axis, and its value in the model at hand.

    ``argument_for`` gives the argument with which the dimension becomes another; None where none does.
    """

    argument: str
    axis: int
    value: int
    argument_for: Callable[[int], int | None] = _itself


def _no_preprocessing(_model: nn.Module) -> Preprocessing | None:
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Factory:
    """Hold what ``--model`` names: ``call`` takes keywords and gives a model.

    ``parameters`` are None where anything may be given. ``uses_recorded`` says that the hyperparameters of the
    checkpoint are meant for it. ``sizes`` tells the arguments with which it can be fitted to the file's shapes, given
    a model and what it was built with.
    """

    text: str
    call: Callable[..., Any]
    parameters: Mapping[str, Parameter] | None
    uses_recorded: bool = False
    preprocessing: Callable[[nn.Module], Preprocessing | None] = _no_preprocessing
    own_sizes: Callable[[nn.Module], tuple[Size, ...]] | None = None

    def sizes(self, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[Size, ...]:
        """Give the number of classes and of input channels, and the arguments that set them."""
        if self.own_sizes is not None:
            return self.own_sizes(model)
        found = (
            Size(name, axis, arguments.get(name, parameter.default))
            for axis, names in ((0, CLASS_COUNTS), (1, CHANNEL_COUNTS))
            for name, parameter in (self.parameters or {}).items()
            if name in names
        )
        return tuple(size for size in found if type(size.value) is int)

    def build(self, arguments: Mapping[str, Any], seed: int) -> nn.Module:
        """Call it under a seed; the generator of the caller is left as it was.

        :raises CkptoolError: the arguments do not fit, it raised, or what it gave is no model in memory.
        """
        self._check(arguments)
        remedy = "give other arguments with --model-arg NAME=VALUE"
        with foreign_code(f"--model {self.text}: building it failed", remedy), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.call(**arguments)
            if is_lightning(type(model)):
                model.configure_model()
        return _in_memory(self.text, model)

    def _check(self, arguments: Mapping[str, Any]) -> None:
        if self.parameters is None:
            return
        try:
            inspect.Signature(list(self.parameters.values())).bind(**arguments)
        except TypeError as error:
            taken = ", ".join(self.parameters) or "no arguments"
            raise CkptoolError(
                f"--model {self.text}: {error} (it takes {taken}); give NAME=VALUE with --model-arg"
            ) from error


def parameters_of(call: Callable[..., Any]) -> Mapping[str, Parameter] | None:
    """Give the arguments of something callable; None where it does not tell."""
    try:
        return dict(inspect.signature(call).parameters)
    except (TypeError, ValueError):
        return None


def _in_memory(text: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise CkptoolError(
            f"--model {text}: it gives a {type(model).__name__}, no torch.nn.Module; name a function that gives the "
            "model alone"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = next((name for name, tensor in tensors if tensor.is_meta), None)
    if empty is not None:
        raise CkptoolError(
            f'--model {text}: "{empty}" is on the meta device, without memory; build the model on the CPU'
        )
    return model
