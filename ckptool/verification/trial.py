"""Find out by trying what a model takes: a few rows of each variant, until one goes through."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ckptool.errors import CkptoolError
from ckptool.verification.device import Batch, evaluating, is_out_of_memory
from ckptool.verification.outputs import Outputs, run_batch
from ckptool.verification.rows import Rows

ONLY = ""  # the name of an argument that is passed by itself
_REST = "**"
_TRIED_ROWS = 2  # one row hides that a model mixes up rows and channels
_FAULTS = (AttributeError, ImportError, LookupError, NameError, NotImplementedError, TypeError)
_SURE_AFTER = 4
_MOST_COMBINATIONS = 64


@dataclass(frozen=True, slots=True)
class Settled:
    """Hold inputs that went through the model, by argument, what it answered, and in batches of how many rows.

    ``batch`` is None where any number does.
    """

    fields: Mapping[str, Rows]
    outputs: Outputs
    batch: int | None = None

    @property
    def classes(self) -> int | None:
        """Count the classes, where the answer to one input is a row of numbers; a single number is one."""
        answers = self.outputs.judged
        if answers.ndim == 1 and answers.is_floating_point():
            return 1
        return answers.shape[1] if answers.ndim == 2 else None


@dataclass(frozen=True, slots=True)
class Trial:
    """Try inputs on a model that is on ``device``; ``example_rows`` counts those that a program was exported with."""

    model: nn.Module
    device: torch.device
    example_rows: int | None = None
    rows: int = _TRIED_ROWS

    def answers(self, fields: Mapping[str, Rows]) -> Outputs:
        """Call the model with the first rows.

        :raises CkptoolError: it does not take them.
        """
        count = min(len(rows) for rows in fields.values())
        places = [place % count for place in range(self.rows)]
        batch = compose(fields, places, float_type(self.model))
        try:
            with evaluating(self.model):
                return run_batch(self.model, batch, self.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise CkptoolError(f"{self.device}: has not enough memory for two inputs; take --device cpu") from error

    def settle(self, variants: Mapping[str, Iterable[Rows]]) -> Settled:
        """Give the first combination of variants that the model takes.

        :raises CkptoolError: it takes none; the message is about the first.
        """
        first: dict[str, Rows] | None = None
        failure: CkptoolError | None = None
        causes: list[BaseException | None] = []
        for fields in _combinations(variants):
            first = first or fields
            try:
                return Settled(fields, self.answers(fields), self._only_batch(fields))
            except CkptoolError as error:
                failure = failure or error
                causes.append(error.__cause__)
                if _is_at_fault(causes):
                    break
        if first is None or failure is None:
            raise CkptoolError("the model: nothing is known of its inputs; give some with --inputs or --input-shape")
        return self._in_fixed_batches(first, failure)

    def _only_batch(self, fields: dict[str, Rows]) -> int | None:
        """Give the batch that a program was exported with, where it happens to be the one tried and no other goes."""
        if self.example_rows != self.rows:
            return None
        try:
            replace(self, rows=self.rows + 1).answers(fields)
        except CkptoolError:
            return self.rows
        return None

    def _in_fixed_batches(self, fields: dict[str, Rows], failure: CkptoolError) -> Settled:
        """Try the batch that a program was exported with, then single rows."""
        for rows in (self.example_rows, 1):
            if rows is not None and rows != self.rows:
                try:
                    return Settled(fields, replace(self, rows=rows).answers(fields), rows)
                except CkptoolError:
                    continue
        raise failure


def _is_at_fault(causes: Sequence[BaseException | None]) -> bool:
    """Tell whether the forward fails whatever it is fed: with the same words, and words that are not about shapes."""
    last = causes[-_SURE_AFTER:]
    alike = len({f"{type(cause)} {cause}" for cause in last}) == 1
    return alike and len(last) == _SURE_AFTER and isinstance(last[0], _FAULTS)


def _combinations(variants: Mapping[str, Iterable[Rows]]) -> Iterator[dict[str, Rows]]:
    """Yield one variant of each, those first in which the fewest are not the first."""
    if len(variants) == 1:
        [(name, choices)] = variants.items()
        yield from ({name: rows} for rows in choices)
        return
    lists = [list(choices) for choices in variants.values()]
    places = itertools.islice(itertools.product(*(range(len(choices)) for choices in lists)), 4096)
    for chosen in sorted(places, key=sum)[:_MOST_COMBINATIONS]:
        picked = [choices[place] for choices, place in zip(lists, chosen, strict=True)]
        yield dict(zip(variants, picked, strict=True))


def compose(fields: Mapping[str, Rows], places: Sequence[int], dtype: torch.dtype) -> Batch:
    """Make a batch of some rows: a bare tensor, by position where the names are numbers, else by keyword."""
    tensors = {name: _typed(rows.take(places), dtype) for name, rows in fields.items()}
    if tensors.keys() == {ONLY}:
        return tensors[ONLY]
    return tuple(tensors.values()) if all(name.isdecimal() for name in tensors) else tensors


def _typed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def float_type(model: nn.Module) -> torch.dtype:
    """Give the type of the model's numbers: that of its first floating parameter."""
    return next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)


def name_arguments(model: nn.Module, names: Iterable[str], where: str) -> dict[str, str]:
    """Say under which name each input is passed: itself, its place, or ``ONLY``.

    :raises CkptoolError: the model's forward has no argument of that name.
    """
    known = arguments_of(model)
    names = list(names)
    if len(names) == 1:
        return {names[0]: names[0] if names[0] in known else ONLY}
    strange = [name for name in names if known and _REST not in known and name not in known]
    if all(name.isdecimal() for name in names) or not strange:
        return {name: name for name in names}
    raise CkptoolError(
        f"{where}: {strange[0]!a} is no argument of the model's forward({', '.join(known)}); name the inputs so"
    )


def arguments_of(model: nn.Module) -> tuple[str, ...]:
    """Name the arguments of forward, ``**`` where it takes any more; empty where it does not tell."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(_REST if one.kind is inspect.Parameter.VAR_KEYWORD else one.name for one in parameters)
