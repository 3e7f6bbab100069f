"""A model's inputs once they are settled, and what all makers of inputs look at to settle them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ckptool.errors import CkptoolError
from ckptool.loading.built import BuiltModel, Modality
from ckptool.model.verification import VerifyOptions
from ckptool.verification.device import Batch
from ckptool.verification.label_files import ClassNames, read_class_names
from ckptool.verification.labels import Labels
from ckptool.verification.rows import Rows
from ckptool.verification.trial import Settled, Trial, compose, float_type

Kind = Literal["in-domain", "sample photos", "sample text", "synthetic"]

# From 32 on, the mutual information of a sound network keeps clear of that of a collapsed one.
_USUAL_COUNT = 48


@dataclass(frozen=True, slots=True, eq=False)
class InputSet:
    """Hold what a model is fed; rows are read or drawn when a batch is asked for.

    ``fields`` are the model's arguments by name; the first ``count`` rows of each are the inputs. ``labels`` are class
    numbers (int64), values (float32), or a row of 0 and 1 for each input. With ``fixed_batch`` the model takes
    batches of ``batch_size`` inputs only. ``assumed_scale`` says that nothing states how pictures are scaled.
    """

    fields: Mapping[str, Rows]
    kind: Kind
    modality: Modality
    names: tuple[str, ...]
    dtype: torch.dtype
    batch_size: int
    fixed_batch: bool = False
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    assumed_scale: bool = False

    @property
    def count(self) -> int:
        """Count the inputs."""
        return len(self.names)

    def batches(self) -> Iterator[Batch]:
        """Give all inputs on the CPU in batches, the same ones every time.

        :raises CkptoolError: a picture cannot be decoded.
        """
        for start in range(0, self.count, self.batch_size):
            yield self.take(range(start, min(start + self.batch_size, self.count)))

    def take(self, places: Sequence[int]) -> Batch:
        """Give some inputs as one batch.

        :raises CkptoolError: a picture cannot be decoded.
        """
        return compose(self.fields, places, self.dtype)


@dataclass(frozen=True, slots=True)
class Feeding:
    """Hold what is asked for, and the model with what is known of it."""

    options: VerifyOptions
    built: BuiltModel
    model: nn.Module
    device: torch.device

    @property
    def assumes_scale(self) -> bool:
        """Tell whether nothing says how the values of pictures are scaled."""
        return self.built.preprocessing is None and (self.options.mean is None or self.options.std is None)

    @property
    def trial(self) -> Trial:
        """Try inputs on the model."""
        examples = self.examples.values()
        return Trial(self.model, self.device, len(next(iter(examples))) if examples else None)

    @property
    def count(self) -> int:
        """Count the inputs that are made up."""
        return self.options.num_samples or _USUAL_COUNT

    @property
    def examples(self) -> dict[str, Tensor]:
        """Name the tensors that an exported program was traced with; those by position are numbered."""
        given = {str(place): value for place, value in enumerate(self.built.example_inputs or ())}
        return {
            name: value
            for name, value in {**given, **self.built.example_keywords}.items()
            if isinstance(value, Tensor) and value.ndim
        }

    @property
    def class_names(self) -> ClassNames | None:
        """Read the names of the classes, where the user gave some."""
        return read_class_names(self.options.class_names) if self.options.class_names else None

    def choose(self, count: int, *, labelled: bool) -> list[int]:
        """Choose from the user's inputs, evenly spread: those of one class often lie side by side."""
        chosen = min(count, self.options.num_samples or (count if labelled else _USUAL_COUNT))
        return [place * count // chosen for place in range(chosen)]

    def finish(
        self,
        settled: Settled,
        kind: Kind,
        modality: Modality,
        names: Sequence[str],
        labels: Labels | None = None,
        notes: Sequence[str] = (),
    ) -> InputSet:
        """Put a set together from what went through the model.

        :raises CkptoolError: there are fewer inputs than the model takes at once.
        """
        found = InputSet(
            fields=settled.fields,
            kind=kind,
            modality=modality,
            names=tuple(names),
            dtype=float_type(self.model),
            batch_size=settled.batch or self.options.batch_size,
            fixed_batch=settled.batch is not None,
            labels=labels.values if labels else None,
            class_names=self._names_of_classes(settled.classes, labels),
            notes=(*notes, *(labels.notes if labels else ())),
        )
        return _in_whole_batches(found) if found.fixed_batch else found

    def _names_of_classes(self, classes: int | None, labels: Labels | None) -> tuple[str, ...] | None:
        """Take the names that the user gave, else those of the folders, else those in a transformers configuration."""
        named = self.class_names
        given = named.names if named else None
        if given and classes is not None and classes > 1 and len(given) != classes:
            raise CkptoolError(
                f"{self.options.class_names}: names {len(given)} classes of {classes}; name those of the model"
            )
        return given or (labels.class_names if labels else None) or hub_names(self.model)


def _in_whole_batches(inputs: InputSet) -> InputSet:
    count = inputs.count // inputs.batch_size * inputs.batch_size
    if not count:
        raise CkptoolError(
            f"the model: takes batches of {inputs.batch_size} inputs and there are {inputs.count}; give more"
        )
    labels = None if inputs.labels is None else inputs.labels[:count]
    note = f"the model takes batches of {inputs.batch_size} inputs only"
    return replace(inputs, names=inputs.names[:count], labels=labels, notes=(*inputs.notes, note))


def hub_names(model: nn.Module) -> tuple[str, ...] | None:
    """Read the names of the classes in a transformers configuration, unless they only number them."""
    table: Any = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(table, dict) or not table:
        return None
    names = [table.get(number) for number in range(len(table))]
    known = tuple(name for name in names if isinstance(name, str) and not name.startswith("LABEL_"))
    return known if len(known) == len(names) else None
