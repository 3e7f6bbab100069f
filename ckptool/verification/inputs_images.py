"""In which form a model wants its images, and images in it: the user's, sample photos, the structured battery."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Generator

from ckptool.errors import CkptoolError
from ckptool.verification.battery import draw_image, name_image
from ckptool.verification.images import IMAGENET_MEAN, IMAGENET_STD, ImageForm, Pictures
from ckptool.verification.input_set import Feeding
from ckptool.verification.photos import sample_photos
from ckptool.verification.rows import Drawn, Joined, Rows, Stacked
from ckptool.verification.sizes import USUAL, position_size, usual_sizes
from ckptool.verification.trial import ONLY, Settled

_CROP, _CROPPED_SIDE = 0.875, 128  # the usual 256 to 224; smaller images are used whole
PICTURE_CHANNELS = (1, 3, 4)

Size = tuple[int, int]


def _image_forms(feeding: Feeding, native: Size | None = None) -> Iterator[ImageForm]:
    """Give the forms to try, the likeliest first; ``native`` is the size that all of the user's pictures have."""
    channels, certain = _channels(feeding)
    seen: set[ImageForm] = set()
    for size in _sizes(feeding, native):
        for count in (channels,) if certain else (3, 1, 4):
            form = image_form(feeding, size, count)
            if form not in seen:
                seen.add(form)
                yield form


def _channels(feeding: Feeding) -> tuple[int, bool]:
    """Count the channels of an image, and say whether anything tells."""
    stated = feeding.built.preprocessing.channels if feeding.built.preprocessing else None
    given = max(len(feeding.options.mean or ()), len(feeding.options.std or ()))
    known = feeding.built.input_hint.channels or stated
    return known or max(given, 3), bool(known or given > 1)


def image_form(feeding: Feeding, size: Size, channels: int) -> ImageForm:
    """Give the form of a size: as the options say, else as the model's configuration does, else ImageNet's.

    :raises CkptoolError: ``--mean`` or ``--std`` is for another number of channels.
    """
    stated = feeding.built.preprocessing
    mean, std = (stated.mean, stated.std) if stated is not None else _usual_scale(channels)
    crop = stated.crop if stated is not None else _CROP if min(size) >= _CROPPED_SIDE else 1.0
    return ImageForm(
        size=size,
        mean=_per_channel("--mean", feeding.options.mean, mean, channels),
        std=_per_channel("--std", feeding.options.std, std, channels),
        crop=crop,
        interpolation=stated.interpolation if stated is not None else "bilinear",
    )


def _usual_scale(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Give the mean and deviation to take where nothing tells: ImageNet's for colours, none for a single channel."""
    if channels == 1:
        return (0.0,), (1.0,)
    more = max(channels - 3, 0)
    mean = IMAGENET_MEAN + (sum(IMAGENET_MEAN) / 3,) * more
    std = IMAGENET_STD + (sum(IMAGENET_STD) / 3,) * more
    return mean[:channels], std[:channels]


def _per_channel(
    option: str, given: tuple[float, ...] | None, usual: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    if given is None:
        return usual if len(usual) == channels else (sum(usual) / len(usual),) * channels
    if len(given) not in (1, channels):
        raise CkptoolError(f"{option}: has {len(given)} values for {channels} channels; give one for each, or one")
    return given * (channels // len(given))


def _sizes(feeding: Feeding, native: Size | None) -> Iterator[Size]:
    """Give the sizes to try: the one that is asked for, else those that something speaks for, else the usual ones."""
    asked = feeding.options.image_size
    if asked is not None:
        yield (asked, asked)
        return
    stated = feeding.built.preprocessing.size if feeding.built.preprocessing else None
    learned = position_size(feeding.model)
    known = (feeding.built.input_hint.size, (learned, learned) if learned else None, stated, native)
    yield from (size for size in known if size is not None)
    yield from ((side, side) for side in usual_sizes(feeding.model, partial(_run, feeding)))


def _run(feeding: Feeding) -> None:
    feeding.trial.answers({ONLY: Stacked(torch.rand(2, _channels(feeding)[0], USUAL[0], USUAL[0]))})


def settle_images(
    feeding: Feeding, make: Callable[[ImageForm], Rows], native: Size | None = None
) -> tuple[Settled, tuple[str, ...]]:
    """Find the form of images that goes through the model, and say which parts of it nobody stated.

    :raises CkptoolError: none does.
    """
    forms: dict[tuple[int, ...], ImageForm] = {}

    def variants() -> Iterator[Rows]:
        for form in _image_forms(feeding, native):
            forms.setdefault((form.channels, *form.size), form)
            yield Stacked(torch.rand(2, form.channels, *form.size, generator=Generator().manual_seed(0)))

    settled = feeding.trial.settle({ONLY: variants()})
    form = forms[tuple(settled.fields[ONLY].take([0]).shape[1:])]
    return replace(settled, fields={ONLY: make(form)}), _explain(feeding, form)


def _explain(feeding: Feeding, form: ImageForm) -> tuple[str, ...]:
    stated, options = feeding.built.preprocessing, feeding.options
    notes = []
    if options.image_size is None and (stated is None or stated.size != form.size):
        notes.append(f"images are {form.size[0]} x {form.size[1]}, which the model takes: --image-size changes it")
    if feeding.assumes_scale:
        scale = "values from 0 to 1" if form.channels == 1 else "ImageNet's mean and deviation"
        notes.append(f"images are scaled to {scale}, as nothing says otherwise: --mean and --std change it")
    return tuple(notes)


def battery(form: ImageForm, count: int, seed: int) -> Rows:
    """Give the structured battery in a form."""
    return Drawn(count, lambda place: form.normalise(draw_image(place, form.size, form.channels, seed)))


def sample_images(feeding: Feeding) -> tuple[Callable[[ImageForm], Rows], list[str], bool]:
    """Give what makes images of a form, their names, and whether sample photos are among them: up to half are."""
    count, seed = feeding.count, feeding.options.seed
    photos = sample_photos()[: count // 2] if _channels(feeding)[0] in PICTURE_CHANNELS else ()
    names = [*(path.name for path in photos), *(name_image(place) for place in range(count - len(photos)))]

    def make(form: ImageForm) -> Rows:
        drawn = battery(form, count - len(photos), seed)
        return Joined(Pictures(photos, form), drawn) if photos else drawn

    return make, names, bool(photos)
