"""Long lists for a terminal, formatted by hand: 50,000 lines cost what 100 rows of a rich table do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from ckptool.model.inspection import ModuleNode, TensorRow
from ckptool.reports.canvas import Canvas
from ckptool.reports.text import count_text, plural, safe_text, shape_text, shorten, size_text

_LONGEST_NAME = 200


def tensor_listing(tensors: Sequence[TensorRow], canvas: Canvas) -> str:
    """List every tensor in aligned columns; a name that is too wide stands alone, its columns below it."""
    with_values = any(tensor.statistics is not None for tensor in tensors)
    columns = _value_cells if with_values else _plain_cells
    cells = [(_name(tensor), columns(tensor)) for tensor in tensors]
    titles = _VALUE_TITLES if with_values else _PLAIN_TITLES
    lines = [*_aligned([("name", titles), *cells], canvas), _totals(tensors)]
    return "\n".join(lines) + "\n"


_PLAIN_TITLES = ("dtype", "shape", "size")
_VALUE_TITLES = ("shape", "min", "max", "mean", "std", "zeros", "")


def _name(tensor: TensorRow) -> str:
    name = safe_text(shorten(tensor.key or tensor.source_key, _LONGEST_NAME))
    return name if tensor.key is not None else f"{name} (dropped)"


def _plain_cells(tensor: TensorRow) -> tuple[str, ...]:
    return safe_text(tensor.dtype), shape_text(tensor.shape), size_text(tensor.nbytes)


def _value_cells(tensor: TensorRow) -> tuple[str, ...]:
    found = tensor.statistics
    if found is None:
        return shape_text(tensor.shape), "", "", "", "", "", "not read"
    extremes = [_number(value) for value in (found.minimum, found.maximum, found.mean, found.std)]
    return shape_text(tensor.shape), *extremes, _share(found.zeros, found.elements), _warning(tensor)


def _number(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _share(count: int, total: int) -> str:
    return f"{count / total:.0%}" if count else "0"


def _warning(tensor: TensorRow) -> str:
    found = tensor.statistics
    if found is None or not found.elements:
        return ""
    bad = [f"{count:,} {name}" for count, name in ((found.nan, "NaN"), (found.infinite, "inf")) if count]
    if found.zeros == found.elements:
        bad.append("all zero")
    return ", ".join(bad)


def _aligned(rows: Sequence[tuple[str, tuple[str, ...]]], canvas: Canvas) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in rows), strict=True)]
    sides = "<<>" if len(widths) == len(_PLAIN_TITLES) else "<>>>>><"
    taken = sum(widths) + 2 * len(widths)
    room = max(canvas.width - taken, 20)
    measure = _cell_width()
    wide = [measure(name) for name, _ in rows]
    column = max((width for width in wide if width <= room), default=room)
    for index, ((name, cells), width) in enumerate(zip(rows, wide, strict=True)):
        tail = "".join([f"  {cell:{side}{n}}" for cell, side, n in zip(cells, sides, widths, strict=True)]).rstrip()
        if width > column:
            yield f"{name}\n{'':{column}}{canvas.paint(tail, 'dim')}"
        else:
            yield canvas.paint(name, "bold" if index == 0 else "") + " " * (column - width) + canvas.paint(tail, "dim")


def _cell_width() -> Callable[[str], int]:
    from rich.cells import cell_len

    return lambda text: len(text) if text.isascii() else cell_len(text)


def _totals(tensors: Sequence[TensorRow]) -> str:
    nbytes = sum(tensor.nbytes for tensor in tensors)
    text = f"{plural(len(tensors), 'tensor')}, {size_text(nbytes)}"
    read = [tensor.statistics for tensor in tensors if tensor.statistics is not None]
    if read:
        bad = sum(1 for found in read if found.nan or found.infinite)
        text += f"; {plural(bad, 'tensor')} with NaN or inf" if bad else "; all values finite"
    return text


def tree_listing(root: ModuleNode, canvas: Canvas) -> str:
    """Draw the modules as a tree; equal neighbours are one line, and so is a module that holds tensors only."""
    return "\n".join(_branch(root, "", "", canvas)) + "\n"


def _branch(node: ModuleNode, lead: str, below: str, canvas: Canvas) -> Iterator[str]:
    name = safe_text(shorten(node.name or "(model)", _LONGEST_NAME))
    repeated = f" ({node.repeats} times)" if node.repeats > 1 else ""
    only_tensors = all(map(_is_leaf, node.children))
    contents = _tensors_text(node) if only_tensors else _sum_text(node)
    yield canvas.paint(lead, "dim") + canvas.paint(name + repeated, "bold") + "  " + canvas.paint(contents, "dim")
    if only_tensors:
        return
    for branch in canvas.branches(node.children, below):
        yield from _branch(*branch, canvas)


def _is_leaf(node: ModuleNode) -> bool:
    return bool(node.dtype) and not node.children


def _tensors_text(node: ModuleNode) -> str:
    """List the tensors of one module, names with the same dtype and shape together."""
    parts = [_leaf_text(node)] if node.dtype else []
    for _, group in groupby(node.children, key=_leaf_text):
        leaves = list(group)
        names = ", ".join([safe_text(shorten(leaf.name, _LONGEST_NAME)) for leaf in leaves])
        parts.append(f"{names} {_leaf_text(leaves[0])}")
    return "; ".join([size_text(node.nbytes), *parts])


def _leaf_text(node: ModuleNode) -> str:
    return f"{safe_text(node.dtype)} {shape_text(node.shape)}"


def _sum_text(node: ModuleNode) -> str:
    own = f"; {_leaf_text(node)}" if node.dtype else ""
    return f"{size_text(node.nbytes)}; {plural(node.tensors, 'tensor')}, {count_text(node.elements)} elements{own}"
