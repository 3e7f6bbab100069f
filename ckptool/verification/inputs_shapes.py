"""Inputs of stated shapes: those of ``--input-shape``, or those that an exported program was traced with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from ckptool.errors import CkptoolError
from ckptool.loading.built import Modality
from ckptool.verification.battery import power_noise
from ckptool.verification.images import Pictures, find_pictures
from ckptool.verification.input_set import Feeding, InputSet, Kind
from ckptool.verification.inputs_images import PICTURE_CHANNELS, image_form, sample_images
from ckptool.verification.rows import Drawn, Rows, Stacked, Turned
from ckptool.verification.texts import random_ids
from ckptool.verification.trial import Settled, name_arguments

_IDS = re.compile(r"(^|_)(ids?|tokens?|idx|index|indices)$")
_MASK = re.compile(r"mask$")
_LEAST_SIDE = 4  # of what is taken for an image

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Images:
    """Hold the images of one argument, with a name for each, and where they come from."""

    rows: Rows
    names: Sequence[str]
    kind: Kind


def from_shapes(feeding: Feeding) -> InputSet:
    """Make inputs up of the shapes of ``--input-shape``, one row each or with a first dimension of 1.

    One that looks like an image gets images: those of ``--images`` where that is given.

    :raises CkptoolError: they do not go through the model.
    """
    shapes = feeding.options.input_shapes
    try:
        return _settle(feeding, shapes)
    except CkptoolError:
        if not all(len(shape) > 1 and shape[0] == 1 for shape in shapes.values()):
            raise
        with suppress(CkptoolError):
            return _settle(feeding, {name: shape[1:] for name, shape in shapes.items()})
        raise


def _settle(feeding: Feeding, shapes: Mapping[str, Shape]) -> InputSet:
    arguments = name_arguments(feeding.model, shapes, "--input-shape")
    images = _apart({name: _images(feeding, shape) for name, shape in shapes.items() if _is_image(name, shape)})
    variants = {
        arguments[name]: [images[name].rows] if name in images else _guesses(feeding, name, shape, place)
        for place, (name, shape) in enumerate(shapes.items())
    }
    return _finish(feeding, feeding.trial.settle(variants), list(images.values()))


def _is_image(name: str, shape: Shape) -> bool:
    return len(shape) == 3 and shape[0] in PICTURE_CHANNELS and min(shape[1:]) >= _LEAST_SIDE and not _IDS.search(name)


def _images(feeding: Feeding, shape: Shape) -> _Images:
    form = image_form(feeding, (shape[1], shape[2]), shape[0])
    folder = feeding.options.images
    if folder is not None:
        paths = find_pictures(folder)
        paths = tuple(paths[place] for place in feeding.choose(len(paths), labelled=False))
        return _Images(Pictures(paths, form), [path.name for path in paths], "in-domain")
    make, names, with_photos = sample_images(feeding)
    return _Images(make(form), names, "sample photos" if with_photos else "synthetic")


def _apart(images: Mapping[str, _Images]) -> dict[str, _Images]:
    """Give each argument another image in the same row: a network that compares two would see the same one twice."""
    return {name: replace(each, rows=Turned(each.rows, by)) for by, (name, each) in enumerate(images.items())}


def _guesses(feeding: Feeding, name: str, shape: Shape, argument: int) -> list[Rows]:
    """Give what the name speaks for, then what else it may be: numbers, or token ids."""
    if _MASK.search(name):
        return [Stacked(torch.ones(feeding.count, *shape, dtype=torch.int64)), noise(feeding, shape, argument)]
    ids = Stacked(random_ids(feeding.count, shape, _vocabulary(feeding), feeding.options.seed + argument))
    numbers = noise(feeding, shape, argument)
    return [ids, numbers] if _IDS.search(name) else [numbers, ids]


def _vocabulary(feeding: Feeding) -> int:
    """Count the ids that every table of the model has: one that is out of range ends a CUDA process."""
    sizes = [module.num_embeddings for module in feeding.model.modules() if isinstance(module, nn.Embedding)]
    return feeding.built.input_hint.vocabulary or min(sizes, default=2)


def like_examples(feeding: Feeding) -> InputSet:
    """Make inputs up that look like those that an exported program was traced with.

    :raises CkptoolError: they do not go through the model.
    """
    examples = feeding.examples
    arguments = name_arguments(feeding.model, examples, "the model")
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in examples.items() if tensor.is_floating_point()}
    images = _apart({name: _images(feeding, shape) for name, shape in shapes.items() if _is_image(name, shape)})
    variants = {
        arguments[name]: [images[name].rows if name in images else _like(feeding, tensor, place)]
        for place, (name, tensor) in enumerate(examples.items())
    }
    return _finish(feeding, feeding.trial.settle(variants), list(images.values()))


def _like(feeding: Feeding, example: Tensor, argument: int) -> Rows:
    """Draw numbers as large as those of an example, or ids as large as its largest."""
    shape = tuple(example.shape[1:])
    if not example.is_floating_point():
        top = int(example.max()) + 1 if example.numel() else 1
        return Stacked(random_ids(feeding.count, shape, max(top, 1), feeding.options.seed).to(example.dtype))
    values = example.float()
    deviation = float(values.std()) if values.numel() > 1 else 1.0
    return noise(feeding, shape, argument, float(values.mean()), deviation)


def _finish(feeding: Feeding, settled: Settled, images: Sequence[_Images]) -> InputSet:
    """Name the inputs after their images, where there are some; what is only half real is no in-domain input."""
    count = min(len(rows) for rows in settled.fields.values())
    several = len(settled.fields) > 1
    if not images:
        modality: Modality = "multi" if several else _modality(settled)
        return feeding.finish(settled, "synthetic", modality, numbered("row", count))
    kind = "sample photos" if several and images[0].kind == "in-domain" else images[0].kind
    return feeding.finish(settled, kind, "multi" if several else "image", images[0].names[:count])


def _modality(settled: Settled) -> Modality:
    [rows] = settled.fields.values()
    return "tabular" if rows.take([0]).is_floating_point() else "tokens"


def noise(feeding: Feeding, shape: Shape, argument: int = 0, mean: float = 0.0, deviation: float = 1.0) -> Rows:
    """Draw numbers: independent ones for a row, with more dimensions smooth ones, as signals are."""

    def draw(place: int) -> Tensor:
        generator = Generator().manual_seed((feeding.options.seed * 1009 + argument) * 1_000_003 + place)
        values = power_noise(shape, 1.0, generator) if len(shape) > 1 else torch.randn(shape, generator=generator)
        return mean + deviation * values

    return Drawn(feeding.count, draw)


def numbered(word: str, count: int) -> list[str]:
    """Name inputs that have no name."""
    return [f"{word} {place + 1}" for place in range(count)]
