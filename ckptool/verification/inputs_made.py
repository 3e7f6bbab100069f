"""Inputs that are made up for what the model seems to want: images, token ids, rows of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from ckptool.errors import CkptoolError
from ckptool.loading.built import Modality
from ckptool.verification.input_set import Feeding, InputSet, Kind
from ckptool.verification.inputs_images import battery, image_form, sample_images, settle_images
from ckptool.verification.inputs_shapes import Shape, like_examples, noise, numbered
from ckptool.verification.rows import Rows, Stacked
from ckptool.verification.sizes import USUAL, position_size
from ckptool.verification.texts import random_ids, text_windows
from ckptool.verification.trial import ONLY, Settled, arguments_of

_TEXT_LENGTHS = (32, 16, 8, 64, 128, 256, 512)
_SIGNAL_LENGTHS = (16000, 4096, 1024, 256, 128, 64, 32)
_VOLUMES = ((16, 112, 112), (8, 64, 64), (32, 32, 32), (64, 64, 64))
_ROW_LENGTHS = (16, 32, 64)  # of sequences of feature vectors
_LEAST_SIDE = 8  # of images that a network flattens itself
_DECODER, _PIXELS = "decoder_input_ids", "pixel_values"


def from_nothing(feeding: Feeding) -> InputSet:
    """Make inputs up of the kind that the model seems to want.

    :raises CkptoolError: nothing of that kind goes through it.
    """
    if feeding.examples:
        return like_examples(feeding)
    hint = feeding.built.input_hint
    if feeding.options.tokenizer is not None:
        return _tokens(feeding)
    if hint.modality == "multi":
        named = " ".join(f"--input-shape {name}=..." for name in hint.names[:4])
        raise CkptoolError(
            f"the model: its forward wants {len(hint.names)} inputs ({', '.join(hint.names)}); say their shapes with "
            f"{named}, or give --inputs FILE with arrays of these names"
        )
    return _MAKERS[hint.modality or ("tabular" if _sequence_features(feeding) else "image")](feeding)


def _images(feeding: Feeding) -> InputSet:
    make, names, with_photos = sample_images(feeding)
    settled, notes = settle_images(feeding, make)
    return feeding.finish(settled, "sample photos" if with_photos else "synthetic", "image", names, notes=notes)


def _tokens(feeding: Feeding) -> InputSet:
    tokenizer, hint = feeding.options.tokenizer, feeding.built.input_hint
    lengths = dict.fromkeys(min(length, hint.length or length) for length in _TEXT_LENGTHS)
    make = _random_tokens if tokenizer is None else partial(_text_tokens, tokenizer)
    settled = _settle_tokens(feeding, partial(make, feeding), list(lengths))
    kind: Kind = "synthetic" if tokenizer is None else "sample text"
    modality: Modality = "multi" if _PIXELS in settled.fields else "tokens"
    return feeding.finish(settled, kind, modality, numbered("text" if tokenizer else "tokens", feeding.count))


def _random_tokens(feeding: Feeding, length: int) -> Rows:
    vocabulary = feeding.built.input_hint.vocabulary
    if vocabulary is None:
        raise CkptoolError("the model: nothing tells how many tokens it knows; give token ids with --inputs FILE")
    return Stacked(random_ids(feeding.count, (length,), vocabulary, feeding.options.seed))


def _text_tokens(tokenizer: Path, feeding: Feeding, length: int) -> Rows:
    windows = text_windows(tokenizer, feeding.count, length)
    vocabulary = feeding.built.input_hint.vocabulary
    if vocabulary is not None and int(windows.max()) >= vocabulary:
        raise CkptoolError(
            f"{tokenizer}: makes ids up to {int(windows.max())}, the model knows {vocabulary}; give its own tokenizer"
        )
    return Stacked(windows)


def _settle_tokens(feeding: Feeding, make: Callable[[int], Rows], lengths: Sequence[int]) -> Settled:
    """Pass the tokens, and to a model with a decoder the same ones there, to one that also sees an image."""
    main = feeding.built.input_hint.main or ONLY
    try:
        return feeding.trial.settle({main: map(make, lengths)})
    except CkptoolError:
        more = [name for name in (_DECODER, _PIXELS) if name in arguments_of(feeding.model)]
        if not more:
            raise
    tokens = make(lengths[0])
    beside = tokens if more[0] == _DECODER else _seen_images(feeding)
    return feeding.trial.settle({main: [tokens], more[0]: [beside]})


def _seen_images(feeding: Feeding) -> Rows:
    side = position_size(feeding.model) or USUAL[0]
    return sample_images(feeding)[0](image_form(feeding, (side, side), 3))


def _tabular(feeding: Feeding) -> InputSet:
    features, stepwise = feeding.built.input_hint.features, _sequence_features(feeding)
    if features is None and stepwise is None:
        raise CkptoolError("the model: nothing tells how many numbers it takes; say so with --input-shape name=N")
    square = _as_image(feeding, features) if features and not stepwise else None
    rows: list[Shape] = [(features,)] if features else []
    sequences = [(length, width) for width in (stepwise, features) if width for length in _ROW_LENGTHS]
    return square or _numbers(feeding, "tabular", [*rows, *sequences])


def _sequence_features(feeding: Feeding) -> int | None:
    """Count the numbers that a recurrent network takes at each step."""
    return next((module.input_size for module in feeding.model.modules() if isinstance(module, nn.RNNBase)), None)


def _as_image(feeding: Feeding, features: int) -> InputSet | None:
    """Give images to a network that flattens them itself; None where it takes none."""
    for channels in (1, 3):
        side = math.isqrt(features // channels)
        if side >= _LEAST_SIDE and side * side * channels == features:
            hint = replace(feeding.built.input_hint, channels=channels, size=(side, side))
            as_image = replace(feeding, built=replace(feeding.built, input_hint=hint))
            form = image_form(as_image, (side, side), channels)
            with suppress(CkptoolError):
                feeding.trial.answers({ONLY: battery(form, feeding.trial.rows, 0)})
                return _images(as_image)
    return None


def _signal(feeding: Feeding) -> InputSet:
    channels = feeding.built.input_hint.channels or 1
    shapes: list[Shape] = [(channels, length) for length in _SIGNAL_LENGTHS]
    return _numbers(feeding, "signal", [*shapes, *((length,) for length in _SIGNAL_LENGTHS if channels == 1)])


def _volume(feeding: Feeding) -> InputSet:
    channels = feeding.built.input_hint.channels or 1
    return _numbers(feeding, "volume", [(channels, *sides) for sides in _VOLUMES])


def _numbers(feeding: Feeding, modality: Modality, shapes: Sequence[Shape]) -> InputSet:
    settled = feeding.trial.settle({ONLY: (noise(feeding, shape) for shape in shapes)})
    return feeding.finish(settled, "synthetic", modality, numbered("row", feeding.count))


_MAKERS: dict[str, Callable[[Feeding], InputSet]] = {
    "image": _images,
    "tokens": _tokens,
    "tabular": _tabular,
    "signal": _signal,
    "volume": _volume,
}
