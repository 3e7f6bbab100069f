"""The right answers to some inputs, in the numbers of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckptool.errors import CkptoolError
from ckptool.verification.label_files import ClassNames, Labelled

_CLASS_NAMES = "give the classes in the model's order with --class-names"


@dataclass(frozen=True, slots=True)
class Labels:
    """Hold the right answers: class numbers (int64), or values where they are no classes (float32)."""

    values: Tensor
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def settle_labels(
    given: Sequence[Any] | Tensor, where: Path, class_names: ClassNames | None, classes: int | None
) -> Labels:
    """Turn what is written into class numbers below ``classes``, or into values where those are no classes.

    Names are looked up in ``class_names``; without those, they are numbered in the order of the alphabet.

    :raises CkptoolError: a label is no class of the model.
    """
    if isinstance(given, Tensor):
        return _settle_tensor(given, where, classes)
    numbers = class_names.numbers if class_names else {}
    unknown = next((str(label) for label in given if str(label) not in numbers), None)
    if unknown is None:
        return Labels(torch.tensor([numbers[str(label)] for label in given]))
    values = _as_numbers(given)
    if values is not None:
        return _settle_tensor(values, where, classes)
    if class_names is not None:
        raise CkptoolError(f"{where}: {unknown!a} is none of the {len(numbers)} class names; give those it uses")
    return _settle_names([str(label) for label in given], where, classes)


def settle_folders(labelled: Labelled, class_names: ClassNames | None, classes: int | None) -> Labels:
    """Turn class folders into class numbers, in the order of the alphabet as trainers' loaders do.

    Folders that are numbered and fewer than the model's classes are taken by their numbers.

    :raises CkptoolError: they are not the model's classes.
    """
    folders = sorted(set(labelled.labels))
    numbered = all(name.isdecimal() for name in folders)
    fewer = classes is not None and len(folders) < classes
    if class_names is not None or (numbered and fewer):
        return settle_labels(labelled.labels, labelled.where, class_names, classes)
    settled = _settle_names(list(labelled.labels), labelled.where, classes)
    if numbered and sorted(folders, key=int) != folders:
        note = f"the folders of {labelled.where} are taken in the order of the alphabet (10 before 2): {_CLASS_NAMES}"
        return Labels(settled.values, settled.class_names, (f"{note} if that is wrong",))
    return settled


def _settle_names(labels: list[str], where: Path, classes: int | None) -> Labels:
    names = sorted(set(labels))
    if classes is not None and classes > 1 and len(names) != classes:
        raise CkptoolError(f"{where}: has {len(names)} classes and the model answers {classes}; {_CLASS_NAMES}")
    return Labels(torch.tensor([names.index(label) for label in labels]), tuple(names))


def _as_numbers(labels: Sequence[Any]) -> Tensor | None:
    try:
        values = [float(label) for label in labels]
    except (TypeError, ValueError):
        return None
    if not all(math.isfinite(value) for value in values):
        return None
    whole = all(value.is_integer() for value in values)
    return torch.tensor([int(value) for value in values] if whole else values)


def _settle_tensor(values: Tensor, where: Path, classes: int | None) -> Labels:
    if values.is_floating_point() and bool((values == values.round()).all()):
        values = values.long() if values.ndim == 1 or _are_marks(values) else values
    if values.is_floating_point() or values.ndim > 1:
        return Labels(values.float() if values.is_floating_point() else values.long())
    values = values.long()
    limit = values.max() + 1 if classes is None else max(classes, 2)
    wrong = values[(values < 0) | (values >= limit)]
    if not len(wrong):
        return Labels(values)
    if classes == 1:  # a single number may be any quantity
        return Labels(values.float())
    raise CkptoolError(
        f"{where}: the label {int(wrong[0])} is no class (the model has {classes}, numbered from 0); {_CLASS_NAMES}"
    )


def _are_marks(values: Tensor) -> bool:
    return values.ndim > 1 and bool(((values == 0) | (values == 1)).all())


def as_classes(labels: Labels) -> Labels:
    """Give class numbers where each row marks exactly one of several classes with a 1."""
    rows = labels.values
    if rows.ndim != 2 or rows.shape[1] < 2 or not _are_marks(rows) or not bool((rows.sum(dim=1) == 1).all()):
        return labels
    return replace(labels, values=rows.argmax(dim=1))
