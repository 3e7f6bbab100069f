"""Draw what verify measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ckptool.verification.metrics import class_numbers
from ckptool.writers.pictures import render, require_picture
from ckptool.writers.saving import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")
_MOST_NUMBERS = 20  # classes: with more, a count no longer fits into its cell
_MOST_NAMES = 60
_NAME_CHARACTERS = 18


def require_plot(path: Path) -> None:
    """Refuse a picture that could not be written; to be asked before the work that it is to show.

    :raises CkptoolError: the suffix names no picture, the file exists, or matplotlib is not installed.
    """
    require_picture(path, SUFFIXES)


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Count predictions by label: row ``i``, column ``j`` is how many inputs of class ``i`` were taken for ``j``."""
    classes = logits.shape[1]
    return (
        (class_numbers(labels) * classes + logits.argmax(dim=1)).bincount(minlength=classes**2).view(classes, classes)
    )


def draw_confusion(path: Path, counts: Tensor, title: str, class_names: Sequence[str] | None = None) -> None:
    """Draw a confusion matrix, each row in shares of its label, and write it to a new file.

    :raises CkptoolError: as ``require_plot``, or the disk refuses.
    """
    require_plot(path)
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    classes = len(counts)
    side = min(3.5 + 0.45 * classes, 11.0)
    figure = Figure(figsize=(side + 1.0, side), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    shares = counts.double() / counts.sum(dim=1, keepdim=True).clamp_min(1)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the label's inputs")
    axes.set_title(title, parse_math=False)
    _label_axes(axes, classes, class_names)
    if classes <= _MOST_NUMBERS:
        _write_counts(axes, counts, shares)
    picture = render(figure, path.suffix.lower().removeprefix("."))
    save(path, lambda staged: staged.file.write(picture))


def _label_axes(axes: Axes, classes: int, class_names: Sequence[str] | None) -> None:
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if classes > _MOST_NAMES:
        return
    names = [_short(name) for name in (class_names or range(classes))][:classes]
    names += [str(number) for number in range(len(names), classes)]
    upright = max(map(len, names)) <= 3
    axes.set_xticks(range(classes), names, rotation=0 if upright else 90, parse_math=False)
    axes.set_yticks(range(classes), names, parse_math=False)


def _short(name: object) -> str:
    text = "".join(character if character.isprintable() else "?" for character in str(name))
    return text if len(text) <= _NAME_CHARACTERS else f"{text[: _NAME_CHARACTERS - 1]}…"


def _write_counts(axes: Axes, counts: Tensor, shares: Tensor) -> None:
    for row, numbers in enumerate(counts.tolist()):
        for column, count in enumerate(numbers):
            if count:
                color = "white" if float(shares[row, column]) > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
