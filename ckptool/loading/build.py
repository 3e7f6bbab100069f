"""Build the model that ``--model`` names, with the sizes that the checkpoint's tensors have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ckptool.errors import CkptoolError
from ckptool.loading.archive import archive_kind, build_archive
from ckptool.loading.arguments import Recorded, read_recorded, recorded_arguments, required_arguments
from ckptool.loading.automatic import AUTOMATIC, automatic_model
from ckptool.loading.built import BuiltModel, InputHint, Modality, Preprocessing
from ckptool.loading.checked import load_checked
from ckptool.loading.code import code_factory
from ckptool.loading.coverage import coverage_checks
from ckptool.loading.factories import Factory, Size
from ckptool.loading.fit import Fit, fit, other_size
from ckptool.loading.hints import input_hint
from ckptool.loading.network import as_one, has_forward, inner_network, is_lightning, run_eagerly, unwrapped
from ckptool.loading.zoo import zoo_factory
from ckptool.model.verification import VerifyOptions
from ckptool.operations.opening import OpenedCheckpoint
from ckptool.operations.suggest import suggest

__all__ = [
    "BuiltModel",
    "InputHint",
    "Modality",
    "Preprocessing",
    "archive_kind",
    "build_archive",
    "build_model",
    "coverage_checks",
    "load_checked",
    "suggest",
]

_LONGEST_ARGUMENTS = 160  # characters in a description


def build_model(options: VerifyOptions, opened: OpenedCheckpoint) -> BuiltModel:
    """Find what ``--model`` names and settle what to build it with; nothing is loaded into it yet.

    Arguments that the user leaves open come from the recorded hyperparameters (all that a LightningModule takes, else
    those that the call cannot do without, or all where only they fit), then from the shapes in the file (number of
    classes, input channels).

    :raises CkptoolError: there is no such model, it cannot be built, or its code is not trusted.
    """
    text = options.model
    if text is None:
        raise CkptoolError(f"{opened.checkpoint.path}: no model to build; name one with --model")
    view = OpenedCheckpoint(opened.checkpoint, options.weights, options.keys)
    if text == AUTOMATIC:
        text = automatic_model(view)
    factory = zoo_factory(text, options.trust_code)
    if factory is None and Path(text).is_file() and not text.endswith(".py"):
        return build_archive(Path(text), trust_code=options.trust_code)
    return _build(factory or code_factory(text, options.app_dir), view, options)


def _build(factory: Factory, view: OpenedCheckpoint, options: VerifyOptions) -> BuiltModel:
    recorded = read_recorded(view)
    choice = _choose_arguments(factory, view, options, recorded)
    part = _part(choice.model, view)
    make = partial(_make, factory, choice.arguments, part, as_is=options.as_is)
    network = _finish(choice.model, part, as_is=options.as_is)
    return BuiltModel(
        description=_describe(factory, choice.arguments, part),
        make=make,
        preprocessing=factory.preprocessing(network),
        input_hint=input_hint(network),
        notes=_notes(choice.arguments, options.model_args, recorded),
    )


# --- what to build it with ---


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    arguments: Mapping[str, Any]
    model: nn.Module
    fit: Fit | None

    @property
    def score(self) -> tuple[int, int]:
        return (-1, 0) if self.fit is None else self.fit.score


def _choose_arguments(factory: Factory, view: OpenedCheckpoint, options: VerifyOptions, recorded: Recorded) -> _Choice:
    """Build with each set of arguments in question until one fits the file; else take what fits best."""
    best: _Choice | None = None
    failure: CkptoolError | None = None
    for arguments in _argument_sets(factory, options.model_args, recorded):
        try:
            choice = _fitted(factory, arguments, view, options)
        except CkptoolError as error:
            failure = failure or error
            continue
        best = choice if best is None or choice.score > best.score else best
        if best.fit is None or best.fit.report.is_exact:
            break
    if best is None:
        raise _explain(failure, recorded)
    return best


def _argument_sets(factory: Factory, given: Mapping[str, Any], recorded: Recorded) -> Iterator[dict[str, Any]]:
    if factory.parameters is None:
        yield dict(given)
        return
    every = {**recorded_arguments(factory.parameters, given, recorded), **given}
    required = {**required_arguments(factory.parameters, given, recorded), **given}
    if not factory.uses_recorded:
        yield required
    if factory.uses_recorded or set(every) != set(required):
        yield every


def _fitted(factory: Factory, arguments: dict[str, Any], view: OpenedCheckpoint, options: VerifyOptions) -> _Choice:
    """Build, look which sizes the file has, and build again with them where that fits better."""
    first = _attempt(factory, arguments, view, options)
    if first.fit is None or not first.fit.misfits:
        return first
    found = {
        size.argument: value
        for size in factory.sizes(first.model, arguments)
        if size.argument not in options.model_args and (value := _other_argument(size, first.fit)) is not None
    }
    if not found:
        return first
    second = _attempt(factory, {**arguments, **found}, view, options)
    return second if second.score > first.score else first


def _other_argument(size: Size, fit: Fit) -> int | None:
    wanted = other_size(fit.misfits, size.axis, size.value)
    return None if wanted is None else size.argument_for(wanted)


def _attempt(factory: Factory, arguments: Mapping[str, Any], view: OpenedCheckpoint, options: VerifyOptions) -> _Choice:
    model = factory.build(arguments, options.seed)
    return _Choice(arguments, model, fit(view, model))


def _explain(failure: CkptoolError | None, recorded: Recorded) -> CkptoolError:
    """Name the recorded objects that no constructor can be given, as one of them may be what is missing."""
    words = str(failure)
    lost = [f"{name} ({why})" for name, why in recorded.foreign.items() if f"'{name}'" in words]
    return CkptoolError(f"{words}; of the checkpoint's own {', '.join(lost)} cannot be used" if lost else words)


# --- which part of it runs ---


def _part(model: nn.Module, view: OpenedCheckpoint) -> str | None:
    """Name the network inside a LightningModule; None where the model is the network."""
    if not is_lightning(type(model)):
        return None

    def fits_fully(child: nn.Module) -> bool:
        found = fit(view, child)
        return found is not None and found.is_full

    part = inner_network(model, fits_fully)
    if part is None and not has_forward(model):
        names = " or ".join(name for name, _ in model.named_children()) or "none"
        raise CkptoolError(
            f"{type(model).__name__}: it has no forward, and which of its parts is the network ({names}) is open; "
            "name a function that gives the network with --model"
        )
    return part


def _make(factory: Factory, arguments: Mapping[str, Any], part: str | None, seed: int, *, as_is: bool) -> nn.Module:
    return _finish(factory.build(arguments, seed), part, as_is=as_is)


def _finish(model: nn.Module, part: str | None, *, as_is: bool) -> nn.Module:
    """Give what runs; under its own names where the file is taken as it is."""
    run_eagerly(model)
    if as_is:
        return model if part is None or has_forward(model) else as_one(model, part)
    return unwrapped(model if part is None else getattr(model, part))


# --- what to say about it ---


def _describe(factory: Factory, arguments: Mapping[str, Any], part: str | None) -> str:
    text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    shown = text if len(text) <= _LONGEST_ARGUMENTS else f"{text[:_LONGEST_ARGUMENTS]}..."
    return f"{factory.text}({shown})" + ("" if part is None else f".{part}")


def _notes(arguments: Mapping[str, Any], given: Mapping[str, Any], recorded: Recorded) -> tuple[str, ...]:
    own = [f"{name}={value!r}" for name, value in arguments.items() if name not in given]
    found = f"taken from the checkpoint: {', '.join(own)}"[:_LONGEST_ARGUMENTS] if own else ""
    lost = ", ".join(f"{name} ({why})" for name, why in recorded.foreign.items())
    return tuple(note for note in (found, f"recorded, but not usable: {lost}" if lost else "") if note)
