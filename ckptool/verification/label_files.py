"""Read labels as they are written: class folders, tables, files of targets, names of classes."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ckptool.errors import CkptoolError
from ckptool.verification.arrays import ARRAY_SUFFIXES, read_arrays
from ckptool.verification.images import find_pictures

_NAME_COLUMNS = ("name", "file", "filename", "file_name", "image", "image_id", "img", "path", "filepath", "id")
_LABEL_COLUMNS = ("label", "class", "target", "category", "y", "class_id", "label_id", "class_name", "labels")
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev"))
_SYNSET = re.compile(r"(n\d{8})[\s,]+(\S.*)")  # ImageNet's folders are named so
_LIMIT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Labelled:
    """Name pictures and what each shows, as it is written: a class name, or a number."""

    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    where: Path
    from_folders: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClassNames:
    """Hold the names of the classes in the model's order, and the number of each under all of its names."""

    names: tuple[str, ...]
    numbers: Mapping[str, int]


def read_class_names(path: Path) -> ClassNames:
    """Read the names of the classes in order: one a line, or JSON (a list, or names by number, or with id2label).

    A class may have several (``["n01440764", "tench"]``, or a line that begins with such a number); the last is shown.

    :raises CkptoolError: it cannot be read, or does not name classes 0, 1, 2 and so on.
    """
    text = _read_text(path)
    if path.suffix.lower() != ".json":
        return _class_names(path, [_split_line(line.strip()) for line in text.splitlines() if line.strip()])
    value = _parse_json(path, text)
    if isinstance(value, dict) and isinstance(value.get("id2label"), dict):
        value = value["id2label"]
    if isinstance(value, dict):
        value = [value.get(str(number)) for number in range(len(value))]
    items = value if isinstance(value, list) else []
    return _class_names(path, [item if isinstance(item, list) else [item] for item in items])


def _split_line(line: str) -> list[str]:
    synset = _SYNSET.match(line)
    return [synset[1], line, synset[2]] if synset else [line]


def _class_names(path: Path, classes: Sequence[Sequence[Any]]) -> ClassNames:
    if not classes or not all(names and all(isinstance(name, str) for name in names) for names in classes):
        raise CkptoolError(f'{path}: names no classes; give one name a line, or JSON such as ["cat", "dog"]')
    numbers: dict[str, int] = {}
    for number, names in enumerate(classes):
        for name in names:
            numbers.setdefault(name, number)
    return ClassNames(tuple(names[-1] for names in classes), numbers)


def read_labelled(folder: Path) -> Labelled:
    """Find labelled pictures: one folder per class, or pictures beside a CSV file of names and labels.

    :raises CkptoolError: there is neither, or the two do not go together.
    """
    tables = sorted(folder.glob("*.csv")) if folder.is_dir() else []
    if len(tables) > 1:
        named = ", ".join(path.name for path in tables[:3])
        raise CkptoolError(f"{folder}: holds several tables ({named}); leave the one with the labels")
    paths = find_pictures(folder)
    return _from_table(folder, tables[0], paths) if tables else _from_folders(folder, paths)


def _from_folders(folder: Path, paths: tuple[Path, ...]) -> Labelled:
    inside = [path.relative_to(folder).parts for path in paths]
    loose = [path for path, parts in zip(paths, inside, strict=True) if len(parts) == 1]
    if loose:
        raise CkptoolError(
            f"{folder}: {loose[0].name} lies in no class folder and no CSV file says what it shows; make one folder "
            "per class, or add a CSV file of name,label (or give --images, without labels)"
        )
    labels = tuple(parts[0] for parts in inside)
    if {label.lower() for label in labels} <= _SPLITS:
        raise CkptoolError(f"{folder}: holds splits, not classes; give one of them: {folder / labels[-1]}")
    return Labelled(paths, labels, folder, from_folders=True)


def _from_table(folder: Path, table: Path, paths: tuple[Path, ...]) -> Labelled:
    rows = _read_table(table)
    by_name = _by_any_name(folder, paths)
    headings = rows[0] if rows[0][0] not in by_name and any(name in by_name for name, _ in rows[1:2]) else None
    rows = rows if headings is None else rows[1:]
    strangers = [name for name, _ in rows if name not in by_name]
    if strangers:
        raise CkptoolError(
            f"{table}: {len(strangers)} of {len(rows)} rows name no picture in {folder}, such as {strangers[0]!a}; "
            "take them out, or add the pictures"
        )
    found = tuple(by_name[name] for name, _ in rows)
    left = len(set(paths) - set(found))
    notes = [f"{left} picture(s) in {folder} have no row in {table.name} and are left out"] if left else []
    notes += [] if headings is None else [f"the first row of {table.name} ({', '.join(headings)}) names its columns"]
    return Labelled(found, tuple(label for _, label in rows), table, notes=tuple(notes))


def _by_any_name(folder: Path, paths: Sequence[Path]) -> dict[str, Path]:
    """Find a picture by its path in the folder, its name, or its name without suffix; what is twofold is left out."""
    found: dict[str, Path] = {}
    doubtful: set[str] = set()
    for path in paths:
        inside = path.relative_to(folder)
        for name in {inside.as_posix(), inside.with_suffix("").as_posix(), path.name, path.stem}:
            if found.setdefault(name, path) != path:
                doubtful.add(name)
    return {name: path for name, path in found.items() if name not in doubtful or len(Path(name).parts) > 1}


def _read_table(path: Path) -> list[tuple[str, str]]:
    """Read the columns of names and labels, by their headings or else the first two."""
    text = _read_text(path)
    rows = [row for row in csv.reader(text.splitlines(), delimiter=_delimiter(text)) if any(row)]
    if not rows:
        raise CkptoolError(f"{path}: is empty; give rows of name,label")
    heading = [cell.strip().lower() for cell in rows[0]]
    name, label = _column(heading, _NAME_COLUMNS), _column(heading, _LABEL_COLUMNS)
    if label is not None:
        rows = rows[1:]
        name = name if name is not None else 0
    elif len(heading) != 2:
        raise CkptoolError(f"{path}: has {len(heading)} columns and none is named label; name it so in the first row")
    else:
        name, label = 0, 1
    if not rows:
        raise CkptoolError(f"{path}: has headings and no rows; give rows of name,label")
    short = next((row for row in rows if len(row) <= max(name, label)), None)
    if short is not None:
        raise CkptoolError(f"{path}: the row {','.join(short)!a} has no label; give every row a name and a label")
    return [(row[name].strip(), row[label].strip()) for row in rows]


def _delimiter(text: str) -> str:
    first = text.lstrip().partition("\n")[0]
    return max(",;\t", key=first.count)


def _column(heading: Sequence[str], wanted: Sequence[str]) -> int | None:
    return next((heading.index(name) for name in wanted if name in heading), None)


def read_targets(path: Path, names: Sequence[str]) -> list[Any] | Tensor:
    """Give one target per input, in their order: lines, a CSV of name,label, a JSON list or mapping, or an array.

    :raises CkptoolError: there are not as many as inputs, or one has none.
    """
    suffix = path.suffix.lower()
    if suffix in ARRAY_SUFFIXES:
        return _fitting(path, _single_array(path), names)
    text = _read_text(path)
    if suffix == ".json":
        value = _parse_json(path, text)
    elif suffix == ".csv":
        value = _table_or_lines(path, names)
    else:
        value = [line.strip() for line in text.splitlines() if line.strip()]
    return _fitting(path, _in_order(path, value, names) if isinstance(value, dict) else value, names)


def _single_array(path: Path) -> Tensor:
    arrays = read_arrays(path)
    if len(arrays) != 1:
        raise CkptoolError(f"{path}: holds {len(arrays)} arrays; give one, of the targets")
    return next(iter(arrays.values()))


def _table_or_lines(path: Path, names: Sequence[str]) -> Any:
    """Read a table as labels by name, or in the order of the inputs where it does not name them."""
    columns = {line.count(_delimiter(line)) for line in _read_text(path).splitlines() if line.strip()}
    if columns == {0}:
        lines = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
        return lines[1:] if lines and lines[0].lower() in _LABEL_COLUMNS else lines
    rows = _read_table(path)
    by_name = dict(rows)
    if any(name in by_name or Path(name).name in by_name or Path(name).stem in by_name for name in names):
        return by_name
    return [label for _, label in rows]


def _in_order(path: Path, by_name: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    found: list[Any] = []
    for name in names:
        key = next((key for key in (name, Path(name).name, Path(name).stem) if key in by_name), None)
        if key is None:
            raise CkptoolError(f"{path}: has no target for {name!a}; add it")
        found.append(by_name[key])
    return found


def _fitting(path: Path, targets: Any, names: Sequence[str]) -> list[Any] | Tensor:
    if not isinstance(targets, list | Tensor) or (isinstance(targets, Tensor) and not targets.ndim):
        raise CkptoolError(f"{path}: is no list of targets; give one for each input")
    if len(targets) != len(names):
        raise CkptoolError(f"{path}: has {len(targets)} targets for {len(names)} inputs; give one for each")
    return targets


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise CkptoolError(f"{path}: has more than {_LIMIT_BYTES >> 20} MiB; give a smaller table")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CkptoolError(f"{path}: cannot be read ({error.strerror}); give another file") from error
    except UnicodeDecodeError as error:
        raise CkptoolError(f"{path}: is not UTF-8 text; save it as such") from error


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CkptoolError(f"{path}: is not valid JSON ({error}); correct it") from error
