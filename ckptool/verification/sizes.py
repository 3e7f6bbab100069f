"""In which size a model wants its images, and how many channels, where nothing says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ckptool.errors import CkptoolError

# What networks are usually trained with, most of them first; then what is rare.
USUAL = (224, 32, 28, 64, 96, 299, 384, 8)
RARE = (
    *(16, 20, 24, 36, 40, 48, 56, 72, 80, 84, 100, 112, 120, 128, 144, 150, 160, 176, 192, 200, 208, 227, 240, 256),
    *(260, 288, 300, 320, 331, 336, 380, 416, 448, 456, 480, 512, 518, 528, 600, 640),
)
_LARGE, _SMALL = 224, 32
_SMALL_STRIDE = 8  # of networks for small images: those for large ones halve them at least four times
_POSITION_NAMES = ("pos_embed", "pos_embedding", "position_embeddings", "positional_embedding", "position_embedding")
_EXTRA_TOKENS = (1, 0, 2, 5)  # class token; none; distilled; four registers


def position_size(model: nn.Module) -> int | None:
    """Read the side of a square image off the positions that a vision transformer has learned; None for others."""
    patch = next((_patch_of(module) for module in model.modules() if _patch_of(module)), None)
    if patch is None:
        return None
    for name, parameter in model.named_parameters():
        parts = name.removesuffix(".weight").split(".")
        if parts[-1] in _POSITION_NAMES and 2 <= parameter.ndim <= 3:
            side = _side_of(parameter.shape[-2])
            if side:
                return side * patch
    return None


def _patch_of(module: nn.Module) -> int | None:
    """Give the side of the patches that a convolution cuts an image into."""
    if not isinstance(module, nn.Conv2d) or module.kernel_size != module.stride or module.stride[0] < 2:
        return None
    return module.stride[0] if module.stride[0] == module.stride[1] else None


def _side_of(positions: int) -> int | None:
    sides = (math.isqrt(positions - extra) for extra in _EXTRA_TOKENS if positions > extra)
    return next((side for side, extra in zip(sides, _EXTRA_TOKENS, strict=False) if side**2 == positions - extra), None)


def usual_sizes(model: nn.Module, run: Callable[[], Any]) -> Iterator[int]:
    """Give the sizes to try; a network that takes any size and hardly shrinks it was made for small images.

    ``run`` calls the model with images of the first size; it may raise ``CkptoolError``.
    """
    yield from (*((_SMALL,) if _shrinks_little(model, run) else ()), *USUAL, *RARE)


def _shrinks_little(model: nn.Module, run: Callable[[], Any]) -> bool:
    sides: list[int] = []

    def watch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
            sides.append(min(output.shape[2:]))

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_hook(watch).remove)
        try:
            run()
        except CkptoolError:
            return False
    return bool(sides) and _LARGE / min(sides) <= _SMALL_STRIDE
