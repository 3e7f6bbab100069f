"""The picture that ``diff --plot`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # its result types would slow every other command's start
    from ckptool.model.comparison import Comparison

SUFFIXES = (".svg", ".png", ".html")


def require_plot(path: Path) -> None:
    """Refuse a picture that could not be written, before anything is compared.

    :raises CkptoolError: the suffix names no picture, the file exists, or matplotlib is not installed.
    """
    from ckptool.writers.pictures import require_picture

    require_picture(path, SUFFIXES)


def write_plot(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Draw what was found and write it to a new file.

    :raises OutputRefused: the path exists by now, or the disk refuses.
    """
    from ckptool.reports.change_page import page
    from ckptool.reports.change_plot import draw_changes
    from ckptool.writers.pictures import render
    from ckptool.writers.saving import save

    drawing, kind = draw_changes(comparisons), path.suffix.lower().removeprefix(".")
    content = page(drawing, render(drawing.figure, "svg")).encode() if kind == "html" else render(drawing.figure, kind)
    save(path, lambda staged: staged.file.write(content))
