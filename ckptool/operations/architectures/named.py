"""The names and shapes of an architecture that the user names."""

from __future__ import annotations

from difflib import get_close_matches

from ckptool.errors import CkptoolError
from ckptool.layouts.reference import Shape
from ckptool.operations.architectures.differences import Regions
from ckptool.operations.architectures.index import load_index


def names_of(full_name: str) -> dict[str, Shape]:
    """Give the names and shapes of an architecture (``timm:resnet50``); those of its head have any shape (None).

    :raises CkptoolError: the index does not have it.
    """
    index = load_index()
    entry = index.find(full_name)
    if entry is None:
        close = get_close_matches(full_name, [entry.full_name for entry in index.entries], 3)
        hint = f"did you mean {' or '.join(close)}" if close else "give a checkpoint, or a list of its names"
        raise CkptoolError(f"{full_name}: no such architecture in the index; {hint}")
    shapes = dict(index.tensors(entry.root))
    regions = Regions(shapes)
    return {name: None if regions.of(name) == "head" else shape for name, shape in shapes.items()}
