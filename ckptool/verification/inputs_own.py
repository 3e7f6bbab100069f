"""The user's own inputs: pictures, labelled or not, and arrays in a file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ckptool.errors import CkptoolError
from ckptool.loading.built import Modality
from ckptool.verification.arrays import read_arrays
from ckptool.verification.images import Pictures, common_size, find_pictures
from ckptool.verification.input_set import Feeding, InputSet, hub_names
from ckptool.verification.inputs_images import image_form, settle_images
from ckptool.verification.label_files import ClassNames, Labelled, read_labelled, read_targets
from ckptool.verification.labels import Labels, as_classes, settle_folders, settle_labels
from ckptool.verification.rows import Rows, Stacked
from ckptool.verification.trial import Settled, name_arguments

_NATIVE_SIDE = 96  # data sets of small images are used as they are; larger pictures are resized
_LABEL_NAMES = ("labels", "label", "targets", "target", "y")
_CHANNELS = (1, 3, 4)
_BYTE = 255

Layout = Callable[[Tensor], Tensor]


def from_images(feeding: Feeding, folder: Path) -> InputSet:
    """Feed the pictures of a folder, with the targets of ``--targets`` where there are some."""
    paths = find_pictures(folder)
    targets = _targets(feeding, [_name(path, folder) for path in paths])
    places = feeding.choose(len(paths), labelled=targets is not None)
    chosen = tuple(paths[place] for place in places)
    settled, notes = _settle_pictures(feeding, chosen)
    labels = _settle_targets(feeding, targets, places, settled)
    found = feeding.finish(settled, "in-domain", "image", [_name(path, folder) for path in chosen], labels, notes)
    return replace(found, assumed_scale=feeding.assumes_scale)


def from_data(feeding: Feeding, folder: Path) -> InputSet:
    """Feed labelled pictures: one folder per class, or a table beside them."""
    if feeding.options.targets is not None:
        raise CkptoolError(f"--targets: {folder} has labels of its own; give the pictures with --images")
    found = read_labelled(folder)
    places = feeding.choose(len(found.paths), labelled=True)
    chosen = tuple(found.paths[place] for place in places)
    settled, notes = _settle_pictures(feeding, chosen)
    labels = _settle_labelled(feeding, found, settled.classes, places)
    names = [_name(path, folder) for path in chosen]
    given = feeding.finish(settled, "in-domain", "image", names, labels, (*notes, *found.notes))
    return replace(given, assumed_scale=feeding.assumes_scale)


def _name(path: Path, folder: Path) -> str:
    return path.name if path == folder else path.relative_to(folder).as_posix()


def _settle_pictures(feeding: Feeding, paths: tuple[Path, ...]) -> tuple[Settled, tuple[str, ...]]:
    native = common_size(paths)
    small = native if native and max(native) <= _NATIVE_SIDE else None
    Pictures(paths, image_form(feeding, (8, 8), 3)).take([0])  # a picture that is none is not the model's fault
    return settle_images(feeding, lambda form: Pictures(paths, form), small)


def _settle_labelled(feeding: Feeding, found: Labelled, classes: int | None, places: Sequence[int]) -> Labels:
    """Settle all labels, those of inputs that were not chosen included: they say which classes there are."""
    names = feeding.class_names or _hub_classes(feeding, found.labels)
    settle = settle_folders(found, names, classes) if found.from_folders else None
    settled = settle or settle_labels(found.labels, found.where, names, classes)
    return Labels(settled.values[list(places)], settled.class_names, settled.notes)


def _hub_classes(feeding: Feeding, labels: Sequence[str]) -> ClassNames | None:
    """Take the classes of a transformers configuration where the labels are named like them."""
    names = hub_names(feeding.model)
    if names is None or not set(labels) <= set(names):
        return None
    return ClassNames(names, {name: number for number, name in enumerate(names)})


def _targets(feeding: Feeding, names: Sequence[str]) -> Sequence[object] | Tensor | None:
    return None if feeding.options.targets is None else read_targets(feeding.options.targets, names)


def _settle_targets(
    feeding: Feeding, targets: Sequence[object] | Tensor | None, places: Sequence[int], settled: Settled
) -> Labels | None:
    where = feeding.options.targets or feeding.options.inputs
    if targets is None or where is None:
        return None
    labels = settle_labels(targets, where, feeding.class_names, settled.classes)
    labels = labels if feeding.options.task == "multilabel" else as_classes(labels)
    return Labels(labels.values[list(places)], labels.class_names, labels.notes)


def from_file(feeding: Feeding, path: Path) -> InputSet:
    """Feed the arrays of a file as they are, one row per input; one called ``labels`` holds the right answers.

    Bytes are pictures, scaled like those; whole numbers become fractions where the model wants them.
    """
    arrays = read_arrays(path)
    own_labels = _take_labels(arrays)
    count = _count_rows(feeding, path, arrays)
    names = [str(place) for place in range(count)]
    targets = _targets(feeding, names)
    targets = own_labels if targets is None else targets
    if targets is not None and len(targets) != count:
        raise CkptoolError(f"{path}: has {len(targets)} labels for {count} inputs; give one for each")
    places = feeding.choose(count, labelled=targets is not None)
    arguments = name_arguments(feeding.model, arrays, str(path))
    chosen = {arguments[name]: _rows(array, count, places) for name, array in arrays.items()}
    settled = feeding.trial.settle({name: _variants(feeding, array) for name, array in chosen.items()})
    labels = _settle_targets(feeding, targets, places, settled)
    found = feeding.finish(settled, "in-domain", _modality(chosen), [names[place] for place in places], labels)
    return replace(found, assumed_scale=feeding.assumes_scale and any(map(_are_pixels, chosen.values())))


def _take_labels(arrays: dict[str, Tensor]) -> Tensor | None:
    """Take the array out that holds the right answers."""
    name = next((name for name in _LABEL_NAMES if name in arrays), None)
    return arrays.pop(name) if name is not None and len(arrays) > 1 else None


def _count_rows(feeding: Feeding, path: Path, arrays: Mapping[str, Tensor]) -> int:
    """Count the inputs; a single image without a dimension for its row is one.

    :raises CkptoolError: the arrays differ.
    """
    counts = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(counts) > 1 or 0 in counts:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise CkptoolError(f"{path}: the arrays do not have one row for each input ({shapes}); save them so")
    [array, *others] = arrays.values()
    alone = not others and array.ndim == 3 and array.shape[0] == feeding.built.input_hint.channels
    return 1 if alone and array.shape[1] > 1 else counts.pop()


def _rows(array: Tensor, count: int, places: Sequence[int]) -> Tensor:
    return (array if len(array) == count else array.unsqueeze(0))[list(places)]


def _modality(arrays: Mapping[str, Tensor]) -> Modality:
    if len(arrays) > 1:
        return "multi"
    [array] = arrays.values()
    if array.ndim >= 4 or array.dtype == torch.uint8:
        return "image"
    return "tabular" if array.is_floating_point() else "tokens"


def _variants(feeding: Feeding, array: Tensor) -> Iterator[Rows]:
    """Give the ways in which an array may be meant, the plainest first."""
    layouts: list[Layout] = [_same]
    if array.ndim == 4 and array.shape[-1] in _CHANNELS:
        layouts.insert(0 if array.shape[1] not in _CHANNELS else 1, _channels_first)
    if array.ndim == 3:
        layouts.append(_one_channel)
    if _are_pixels(array):
        yield from (Stacked(array, _scaled(feeding, layout)) for layout in layouts)
    numbers = array.float() if array.dtype in (torch.uint8, torch.bool) else array
    types = (numbers.long(), numbers.float()) if _is_whole(numbers) else (numbers,)
    for typed, layout in itertools.product(types, layouts):
        yield Stacked(typed, layout if not typed.is_floating_point() else _rescaled(feeding, layout))


def _is_whole(array: Tensor) -> bool:
    return not (array.is_floating_point() or array.is_complex())


def _are_pixels(array: Tensor) -> bool:
    """Tell bytes of pictures, also those that were kept in a wider type."""
    if array.dtype == torch.uint8:
        return array.ndim >= 3
    return _is_whole(array) and array.ndim >= 4 and int(array.min()) >= 0 and 1 < int(array.max()) <= _BYTE


def _same(rows: Tensor) -> Tensor:
    return rows


def _channels_first(rows: Tensor) -> Tensor:
    return rows.permute(0, 3, 1, 2).contiguous()


def _one_channel(rows: Tensor) -> Tensor:
    return rows.unsqueeze(1)


def _scaled(feeding: Feeding, layout: Layout) -> Layout:
    """Scale bytes to the model's values, as those of pictures."""

    def scale(rows: Tensor) -> Tensor:
        images = layout(rows).float() / 255
        channels = images.shape[1] if images.ndim == 4 else 1
        return image_form(feeding, (1, 1), channels).normalise(images)

    return scale


def _rescaled(feeding: Feeding, layout: Layout) -> Layout:
    """Leave fractions as they are, unless ``--mean`` or ``--std`` says that they are to be scaled."""
    options = feeding.options
    if options.mean is None and options.std is None:
        return layout

    def scale(rows: Tensor) -> Tensor:
        images = layout(rows)
        if images.ndim != 4:
            return images
        mean, std = (list(part) if part else [usual] for part, usual in ((options.mean, 0.0), (options.std, 1.0)))
        return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    return scale
