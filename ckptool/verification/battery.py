"""Structured images without data: dead leaves, 1/f noise, gratings.

Plain noise says nothing: sound networks answer it with one class. These have edges, occlusion and the spectrum of
natural images, and sound networks tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

_LEAVES = 120  # enough to cover the canvas several times over
_LEAST_RADIUS, _LARGEST_RADIUS = 0.04, 0.45  # of the shorter side
_LEAST_PIXELS = 1.5  # what is smaller than this is noise and no shape
_SHORTEST_WAVE = 3  # pixels

Size = tuple[int, int]


def draw_image(place: int, size: Size, channels: int, seed: int) -> Tensor:
    """Draw the image at a place of the battery, shape (channels, height, width), values from 0 to 1.

    Half of all places are dead leaves, a quarter coloured 1/f noise, a quarter gratings and other regular patterns.
    """
    image = _DRAW[_ORDER[place % len(_ORDER)]](size, _generator(seed, place))
    return _recolour(image, channels, _generator(seed + 1, place))


def name_image(place: int) -> str:
    """Name the image at a place of the battery: ``dead leaves 1``."""
    return f"{_ORDER[place % len(_ORDER)]} {place + 1}"


def power_noise(shape: tuple[int, ...], exponent: float, generator: Generator) -> Tensor:
    """Give noise whose power falls with frequency to the given exponent, over all dimensions; mean 0, deviation 1."""
    if math.prod(shape) == 1:
        return torch.zeros(shape)
    spectrum = torch.fft.fftn(torch.randn(shape, generator=generator))
    squares = [torch.fft.fftfreq(length).square() for length in shape]
    frequency = torch.stack(torch.meshgrid(*squares, indexing="ij")).sum(0).sqrt()
    frequency.view(-1)[0] = 1 / max(shape)
    noise = torch.fft.ifftn(spectrum / frequency**exponent).real
    scaled: Tensor = (noise - noise.mean()) / noise.std().clamp_min(1e-12)
    return scaled


def _generator(seed: int, place: int) -> Generator:
    return Generator().manual_seed((seed * 1_000_003 + place) % (1 << 63))


def _uniform(generator: Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _colour(generator: Generator) -> Tensor:
    """Give a colour whose channels go together, as most colours do; shape (3, 1, 1)."""
    light = _uniform(generator, -0.1, 1.1)
    return (light + 0.25 * torch.randn(3, 1, 1, generator=generator)).clamp(0, 1)


def _grid(size: Size) -> tuple[Tensor, Tensor]:
    """Give the coordinates of the pixels in units of the shorter side, the middle at 0."""
    height, width = size
    shorter = min(size)
    rows = (torch.arange(height) - (height - 1) / 2) / shorter
    columns = (torch.arange(width) - (width - 1) / 2) / shorter
    return rows[:, None].expand(height, width), columns[None, :].expand(height, width)


def _draw_leaves(size: Size, generator: Generator) -> Tensor:
    """Let ellipses, rectangles and triangles fall on each other; sizes follow a power law, as objects at all depths."""
    image = _colour(generator).expand(3, *size).clone()
    rows, columns = _grid(size)
    reach = [side / min(size) / 2 for side in size]
    least = min(max(_LEAST_RADIUS, _LEAST_PIXELS / min(size)), _LARGEST_RADIUS)
    for _ in range(_LEAVES):
        row, column = (_uniform(generator, -side, side) for side in reach)
        radius = least / math.sqrt(1 - _uniform(generator, 0, 1 - (least / _LARGEST_RADIUS) ** 2))
        down, right = _window(rows, columns, (row, column), radius)
        around = (rows[down, right] - row, columns[down, right] - column)
        _drop_leaf(image[:, down, right], *around, radius, generator)
    return image


def _window(rows: Tensor, columns: Tensor, centre: tuple[float, float], radius: float) -> tuple[slice, slice]:
    """Cut out the pixels that a shape can touch."""
    spans = []
    for places, middle in zip((rows[:, 0], columns[0]), centre, strict=True):
        inside = ((places - middle).abs() <= 1.5 * radius).nonzero().flatten()
        spans.append(slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0))
    return spans[0], spans[1]


def _drop_leaf(canvas: Tensor, rows: Tensor, columns: Tensor, radius: float, generator: Generator) -> None:
    angle, stretch = _uniform(generator, 0, math.pi), _uniform(generator, 0.5, 1)
    across = (rows * math.cos(angle) + columns * math.sin(angle)) / radius
    along = (columns * math.cos(angle) - rows * math.sin(angle)) / (radius * stretch)
    shape = _SHAPES[int(_uniform(generator, 0, len(_SHAPES) - 1e-6))](across, along)
    fill = _colour(generator).expand(3, *rows.shape)
    if _uniform(generator) < 0.3:
        fill = torch.where((_uniform(generator, 1, 6) * across).remainder(2) < 1, fill, _colour(generator))
    canvas.copy_(torch.where(shape, fill, canvas))


_SHAPES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda across, along: across.square() + along.square() <= 1,
    lambda across, along: torch.maximum(across.abs(), along.abs()) <= 0.9,
    lambda across, along: (across.abs() <= 1) & (along.abs() <= (1 - across) / 2),
)


def _draw_noise(size: Size, generator: Generator) -> Tensor:
    """Give coloured noise: the same field in all channels, and a weaker one in each."""
    exponent = _uniform(generator, 0.5, 2.5)
    shared = power_noise(size, exponent, generator)
    own = torch.stack([power_noise(size, exponent, generator) for _ in range(3)])
    return (_colour(generator) * 0.4 + 0.3 + 0.2 * shared + 0.1 * own).clamp(0, 1)


def _draw_pattern(size: Size, generator: Generator) -> Tensor:
    """Mix two colours along a grating, a checkerboard, rings or a slope."""
    rows, columns = _grid(size)
    angle, phase = _uniform(generator, 0, math.pi), _uniform(generator, 0, math.tau)
    pace = math.tau * min(2 ** _uniform(generator, 0.5, 4), min(size) / _SHORTEST_WAVE)
    across = rows * math.cos(angle) + columns * math.sin(angle)
    along = columns * math.cos(angle) - rows * math.sin(angle)
    wave = _PATTERNS[int(_uniform(generator, 0, len(_PATTERNS) - 1e-6))](pace * across + phase, pace * along)
    share = (wave + 1) / 2
    return share * _colour(generator) + (1 - share) * _colour(generator)


_PATTERNS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda across, along: torch.sin(across),
    lambda across, along: torch.sign(torch.sin(across) * torch.sin(along)),
    lambda across, along: torch.sin(torch.hypot(across, along)),
    lambda across, along: torch.tanh(across / math.tau),
)

_DRAW: dict[str, Callable[[Size, Generator], Tensor]] = {
    "dead leaves": _draw_leaves,
    "1/f noise": _draw_noise,
    "pattern": _draw_pattern,
}
_ORDER = ("dead leaves", "1/f noise", "dead leaves", "pattern")


def _recolour(image: Tensor, channels: int, generator: Generator) -> Tensor:
    """Turn red, green and blue into as many channels as are asked for: one is their mean, others are mixed."""
    if channels == 1:
        return image.mean(0, keepdim=True)
    if channels <= 3:
        return image[:channels]
    weights = torch.rand(channels - 3, 3, generator=generator)
    mixed = torch.einsum("cr,rhw->chw", weights / weights.sum(1, keepdim=True), image)
    return torch.cat((image, mixed)).clamp(0, 1)
