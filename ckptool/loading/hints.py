"""What a model seems to want as its input, by its first layer and its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ckptool.loading.built import InputHint, Modality

_LENGTHS = ("max_position_embeddings", "n_positions", "block_size", "max_seq_len", "context_length")
_MAIN_INPUTS: Mapping[str, Modality] = {"input_ids": "tokens", "pixel_values": "image"}


def input_hint(model: nn.Module) -> InputHint:
    """Look at the first layer that has weights, at a transformers configuration, and at what ``forward`` asks for."""
    configuration = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None) if configuration is not None else None
    names = required_inputs(model)
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


def required_inputs(model: nn.Module) -> tuple[str, ...]:
    """Name the inputs that ``forward`` cannot do without; empty where it does not tell."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(one.name for one in parameters if one.kind in kinds and one.default is inspect.Parameter.empty)


def _by_first_layer(model: nn.Module) -> tuple[Modality | None, dict[str, int]]:
    for module in model.modules():
        for layer, modality, fact, attribute in _FIRST_LAYERS:
            if isinstance(module, layer):
                value = getattr(module, attribute)
                return modality, {fact: value} if _is_count(value) else {}
    return None, {}


_FIRST_LAYERS: tuple[tuple[type[nn.Module], Modality, str, str], ...] = (
    (nn.Conv2d, "image", "channels", "in_channels"),
    (nn.Embedding, "tokens", "vocabulary", "num_embeddings"),
    (nn.Linear, "tabular", "features", "in_features"),
    (nn.Conv1d, "signal", "channels", "in_channels"),
    (nn.Conv3d, "volume", "channels", "in_channels"),
)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _pair(value: Any) -> tuple[int, int] | None:
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    return (sides[0], sides[1]) if len(sides) == 2 and all(_is_count(side) for side in sides) else None
