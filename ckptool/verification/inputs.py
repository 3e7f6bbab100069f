"""What a model is fed: the user's own inputs, else images, text or numbers that are made up."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ckptool.errors import CkptoolError
from ckptool.loading.built import BuiltModel
from ckptool.model.verification import VerifyOptions
from ckptool.verification.input_set import Feeding, InputSet
from ckptool.verification.inputs_made import from_nothing
from ckptool.verification.inputs_own import from_data, from_file, from_images
from ckptool.verification.inputs_shapes import from_shapes

__all__ = ["InputSet", "prepare_inputs"]

_OWN: dict[str, Callable[[Feeding, Path], InputSet]] = {"inputs": from_file, "data": from_data, "images": from_images}


def prepare_inputs(options: VerifyOptions, built: BuiltModel, model: nn.Module, device: torch.device) -> InputSet:
    """Gather the inputs that the options name, or make some up, in a form that the model takes.

    The model is on ``device`` and is called with a few of them to find out; its modes are left as they were.

    :raises CkptoolError: they cannot be read, do not fit each other, or do not go through the model.
    """
    given = {name: path for name in _OWN if (path := getattr(options, name)) is not None}
    if len(given) > 1:
        raise CkptoolError(f"{' and '.join(f'--{name}' for name in given)}: each names the inputs; give one of them")
    _refuse_numbers(options)
    feeding = Feeding(options, built, model, device)
    if options.input_shapes and given.keys() <= {"images"}:
        return from_shapes(feeding)
    for name, path in given.items():
        return _OWN[name](feeding, path)
    if options.targets is not None:
        raise CkptoolError("--targets: are of no use without the inputs they belong to; give --images or --inputs")
    return from_nothing(feeding)


def _refuse_numbers(options: VerifyOptions) -> None:
    for name in ("num_samples", "batch_size", "image_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise CkptoolError(f"--{name.replace('_', '-')} {value}: is no number of anything; give at least 1")
    if not all(map(math.isfinite, (*(options.mean or ()), *(options.std or ())))):
        raise CkptoolError("--mean and --std: NaN and infinity are no scale of pictures; give numbers")
    if options.std is not None and min(options.std) <= 0:
        raise CkptoolError(f"--std: {min(options.std):g} is no deviation; give positive values")
