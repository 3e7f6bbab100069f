"""Write figures of matplotlib, which is an extra: asked for early, loaded late, the same bytes for the same content."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ckptool.errors import CkptoolError, OutputRefused
from ckptool.writers.saving import require_new

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# No date, and names in an SVG that do not change.
_UNDATED: dict[str, dict[str, str | None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def require_picture(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a picture that could not be written; to be asked before the work that it is to show.

    :raises CkptoolError: the suffix names no picture, the file exists, or matplotlib is not installed.
    """
    if path.suffix.lower() not in suffixes:
        raise OutputRefused(f"{path}: the suffix names no picture; use {', '.join(suffixes)}")
    require_new(path)
    if find_spec("matplotlib") is None:
        raise CkptoolError(f"{path}: a picture needs matplotlib; pip install matplotlib")


def render(figure: Figure, kind: str) -> bytes:
    """Give the figure as a file of one kind (``png``, ``svg``, ``pdf``); the text of an SVG stays text."""
    from matplotlib import rc_context

    content = io.BytesIO()
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "ckptool", "svg.fonttype": "none"}):
        warnings.simplefilter("ignore", UserWarning)  # a letter that the font lacks becomes a box
        figure.savefig(content, format=kind, metadata=_UNDATED.get(kind))
    return content.getvalue()
