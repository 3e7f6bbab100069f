"""What a model seems to want as its input, by its first layer and its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ckptool.loading.built import InputHint, Modality

_LENGTHS = ("max_position_embeddings", "n_positions", "block_size", "max_seq_len", "context_length")
_MAIN_INPUTS: Mapping[str, Modality] = {"input_ids": "tokens", "pixel_values": "image"}


def input_hint(model: nn.Module) -> InputHint:
    """Look at the first layer that has weights, at a transformers configuration, and at what ``forward`` asks for."""
    configuration = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None) if configuration is not None else None
    names = _required_inputs(model)
    kind, facts = _by_first_layer(model)
    kind = _MAIN_INPUTS.get(main or "", kind) if isinstance(main, str) else kind
    size = _pair(getattr(configuration, "image_size", None))
    length = next((value for name in _LENGTHS if _is_count(value := getattr(configuration, name, None))), None)
    vocabulary = getattr(configuration, "vocab_size", None)
    return InputHint(
        modality="multi" if len(names) > 1 else kind,
        channels=facts.get("channels"),
        size=size,
        features=facts.get("features"),
        vocabulary=vocabulary if _is_count(vocabulary) else facts.get("vocabulary"),
        length=length,
        names=names,
        main=main if isinstance(main, str) else None,
    )


def _required_inputs(model: nn.Module) -> tuple[str, ...]:
    """Name the inputs that ``forward`` cannot do without; empty where it does not tell."""
    schema = getattr(model.forward, "schema", None)
    if schema is not None:  # of TorchScript, which begins with the module itself
        return tuple(one.name for one in schema.arguments[1:] if not one.has_default_value())
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(one.name for one in parameters if one.kind in kinds and one.default is inspect.Parameter.empty)


def _by_first_layer(model: nn.Module) -> tuple[Modality | None, dict[str, int]]:
    for module in model.modules():
        # A module of TorchScript has no class of its own, and keeps the name of the one that it was made from.
        name = getattr(module, "original_name", None)
        for layer, modality, fact, axis in _FIRST_LAYERS:
            weight = getattr(module, "weight", None) if isinstance(module, layer) or name == layer.__name__ else None
            if isinstance(weight, nn.Parameter | torch.Tensor) and not is_lazy(weight):
                return modality, {fact: weight.shape[axis]}
    return None, {}


# The kind of a layer, what it works on, what the axis of its weight counts.
_FIRST_LAYERS: tuple[tuple[type[nn.Module], Modality, str, int], ...] = (
    (nn.Conv2d, "image", "channels", 1),
    (nn.Embedding, "tokens", "vocabulary", 0),
    (nn.Linear, "tabular", "features", 1),
    (nn.Conv1d, "signal", "channels", 1),
    (nn.Conv3d, "volume", "channels", 1),
)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _pair(value: Any) -> tuple[int, int] | None:
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    return (sides[0], sides[1]) if len(sides) == 2 and all(_is_count(side) for side in sides) else None
