"""Pictures as tensors: found, decoded, brought to a size, normalised."""

from __future__ import annotations

import math
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ckptool.errors import CkptoolError

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif")
)
# What Pillow raises for a file that is damaged, of another kind, or too large to be honest.
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, OverflowError)
_CACHE_BYTES = 512 << 20
# Of ImageNet's training images, as torchvision and timm have it.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class ImageForm:
    """Say what pictures a model wants: ``size`` is (height, width), mean and std have one value per channel.

    ``crop`` is the share of the resized picture that is cut out; ``interpolation`` is ``bilinear`` or ``bicubic``.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0
    interpolation: str = "bilinear"

    @property
    def channels(self) -> int:
        """Count the channels."""
        return len(self.mean)

    def normalise(self, images: Tensor) -> Tensor:
        """Bring values from 0 to 1, shape (..., channels, height, width), to the model's scale."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (images - mean[:, None, None]) / std[:, None, None]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Give pictures in a form, decoded when they are asked for; some of them are kept for the next time."""

    paths: tuple[Path, ...]
    form: ImageForm
    _kept: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, places: Sequence[int]) -> Tensor:
        """Give some of them, shape (len(places), channels, height, width).

        :raises CkptoolError: one cannot be decoded, or has not got the channels.
        """
        return torch.stack([self._one(place) for place in places])

    def _one(self, place: int) -> Tensor:
        kept = self._kept.get(place)
        if kept is None:
            kept = self.form.normalise(read_picture(self.paths[place], self.form))
            if len(self._kept) < self._room:
                self._kept[place] = kept
        return kept

    @cached_property
    def _room(self) -> int:
        return _CACHE_BYTES // (4 * self.form.channels * math.prod(self.form.size))


def find_pictures(folder: Path) -> tuple[Path, ...]:
    """List the pictures in a folder at any depth, in the order of their names; what is hidden is left out.

    :raises CkptoolError: there is none, or it cannot be read.
    """
    try:
        files = sorted(path for path in _walk(folder) if path.is_file())
    except OSError as error:
        raise CkptoolError(f"{folder}: cannot be read ({error.strerror}); give a folder of pictures") from error
    found = tuple(path for path in files if path.suffix.lower() in _SUFFIXES)
    # Data sets whose files are named by a hash have no suffix.
    found = found or tuple(path for path in files if not path.suffix and _is_picture(path))
    if not found:
        there = f"{len(files)} other file(s), such as {files[0].name!a}" if files else "it is empty"
        raise CkptoolError(f"{folder}: holds no picture ({there}); give a folder of jpg, png, webp or bmp files")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        folder.stat()
        yield folder
        return
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):  # data sets are often folders of links
        seen.add(os.path.realpath(root))
        shown = sorted(name for name in folders if not name.startswith((".", "__")))
        folders[:] = [name for name in shown if os.path.realpath(Path(root, name)) not in seen]
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _is_picture(path: Path) -> bool:
    try:
        _size(path)
    except CkptoolError:
        return False
    return True


def common_size(paths: Sequence[Path]) -> tuple[int, int] | None:
    """Give the (height, width) that all pictures have; None where they differ.

    :raises CkptoolError: one is no picture.
    """
    sizes = {_size(path) for path in paths}
    return sizes.pop() if len(sizes) == 1 else None


def _size(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        return image.height, image.width


def _opened(path: Path) -> Image:
    try:
        from PIL import Image
    except ImportError as error:
        raise CkptoolError(f"{path}: pictures need Pillow; pip install pillow") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a large picture is decoded all the same; far too large ones are refused
            return Image.open(path)
    except (*_UNDECODABLE, Image.DecompressionBombError) as error:
        raise _undecodable(path, error) from error


def _undecodable(path: Path, error: Exception) -> CkptoolError:
    why = "no known kind of picture" if type(error).__name__ == "UnidentifiedImageError" else str(error)
    return CkptoolError(f"{path}: cannot be decoded ({why}); replace it or take it out of the folder")


def read_picture(path: Path, form: ImageForm) -> Tensor:
    """Give a picture with values from 0 to 1, shape (channels, height, width), resized and cropped around its middle.

    One channel is luminance, four are colour and opacity, three drop the opacity, as trainers' loaders do.

    :raises CkptoolError: it cannot be decoded, or has not got so many channels.
    """
    if form.channels not in _MODES:
        raise CkptoolError(
            f"{path}: a picture gives 1, 3 or 4 channels and the model takes {form.channels}; give arrays with --inputs"
        )
    try:
        with _opened(path) as image, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = np.asarray(_fitted(_converted(image, _MODES[form.channels]), form))
    except _UNDECODABLE as error:
        raise _undecodable(path, error) from error
    values = torch.from_numpy(pixels.astype(np.float32) / 255)
    return values.reshape(*form.size, form.channels).permute(2, 0, 1).contiguous()


_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def _converted(image: Image, mode: str) -> Image:
    """Bring any picture to eight bits per channel; more bits are scaled, where Pillow would clip them."""
    if image.mode.startswith(("I", "F")):
        image = _scaled(image)
    elif image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _scaled(image: Image) -> Image:
    from PIL import Image as Images

    values = np.asarray(image).astype(np.float64)
    top = next((top for top in (1, 255, 65535) if values.max() <= top), values.max())
    if image.mode.startswith("I"):
        top = max(top, 65535)
    return Images.fromarray((values.clip(0) / top * 255).round().astype(np.uint8))


def _fitted(image: Image, form: ImageForm) -> Image:
    """Resize the picture until it covers the size and what the crop takes off, and cut out its middle."""
    from PIL.Image import Resampling

    height, width = form.size
    if (image.height, image.width) == form.size:
        return image
    scale = max(height / form.crop / image.height, width / form.crop / image.width)
    resized = max(height, round(image.height * scale)), max(width, round(image.width * scale))
    image = image.resize((resized[1], resized[0]), Resampling[form.interpolation.upper()])
    top, left = (resized[0] - height) // 2, (resized[1] - width) // 2
    return image.crop((left, top, left + width, top + height))
