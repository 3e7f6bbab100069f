"""A model that can be built as often as asked for, and what is known about the inputs it wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

Modality = Literal["image", "tokens", "tabular", "signal", "volume", "multi"]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Say how an image becomes an input: ``size`` is (height, width) in pixels, ``mean`` and ``std`` per channel.

    Values are of pixels from 0 to 1. ``crop`` is the share of the shorter side that the centre crop keeps;
    ``interpolation`` is ``bilinear`` or ``bicubic``. ``source`` names where all this was read.
    """

    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int
    crop: float = 1.0
    interpolation: str = "bilinear"
    source: str = ""


@dataclass(frozen=True, slots=True)
class InputHint:
    """Say what a model seems to want; None where it does not tell.

    ``channels`` and ``size`` (height, width) are of images, ``features`` of a table's row, ``vocabulary`` counts token
    ids, ``length`` is that of the longest sequence. ``names`` are the inputs that ``forward`` cannot do without;
    ``main`` is the one that a transformers model is fed by keyword.
    """

    modality: Modality | None = None
    channels: int | None = None
    size: tuple[int, int] | None = None
    features: int | None = None
    vocabulary: int | None = None
    length: int | None = None
    names: tuple[str, ...] = ()
    main: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BuiltModel:
    """Build one model as often as asked for: ``make(seed)`` gives a fresh one, on the CPU, ready to be called.

    Of a program (TorchScript, ``.pt2``) every ``make`` gives the same values; ``example_inputs`` and
    ``example_keywords`` are what an exported one was traced with.
    """

    description: str
    make: Callable[[int], nn.Module]
    preprocessing: Preprocessing | None = None
    input_hint: InputHint = field(default_factory=InputHint)
    example_inputs: tuple[Any, ...] | None = None
    example_keywords: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
