"""What a model is built with: what the user gives, then what the checkpoint recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any

import torch

from ckptool.layouts import read_training
from ckptool.layouts.hyperparameters import MAX_DEPTH
from ckptool.layouts.modules import is_module
from ckptool.layouts.producers import lookup
from ckptool.model.dtypes import find
from ckptool.model.values import DictNode, GlobalRef, SetNode, Stub
from ckptool.operations.opening import OpenedCheckpoint

CLASS_COUNTS = (
    *("num_classes", "n_classes", "nb_classes", "classes", "num_class", "n_class", "nclass", "nclasses"),
    *("num_labels", "n_labels", "class_count"),
)
CHANNEL_COUNTS = (
    *("in_chans", "in_channels", "input_channels", "n_channels", "num_channels", "channels", "in_ch", "chans"),
)
# What a required argument is built with first; the shapes in the file correct it.
FIRST_GUESSES = {**dict.fromkeys(CLASS_COUNTS, 10), **dict.fromkeys(CHANNEL_COUNTS, 3)}

# A constructor that downloads hides what the checkpoint brings.
_DOWNLOADS: Mapping[str, Any] = {
    **dict.fromkeys(("pretrained", "pretrained_backbone", "imagenet_pretrained", "use_pretrained"), False),
    **dict.fromkeys(("weights", "weights_backbone", "pretrained_weights", "pretrained_path"), None),
}
_WHOLE_CONFIGURATIONS = ("config", "cfg", "conf", "hparams", "args", "opt", "opts", "params", "configuration")


class Settings(dict[str, Any]):
    """Hold recorded settings, by item and by attribute: what a class wanted of its own kind of configuration."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the checkpoint recorded no setting {name!r}") from None


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """Hold the hyperparameters of a checkpoint as Python values.

    ``foreign`` are those that are objects of a class, by name: such a class is never imported. ``whole_name`` is the
    one argument that Lightning was given all of them as.
    """

    values: Settings = field(default_factory=Settings)
    foreign: Mapping[str, str] = field(default_factory=dict)
    whole_name: str = ""


def read_recorded(view: OpenedCheckpoint) -> Recorded:
    """Read what the checkpoint says its model was built with."""
    training = read_training(view.checkpoint, view.selection)
    named = {name: value for name, value in training.hyper_parameters.text_items().items() if not name.startswith("_")}
    networks = _networks(view.checkpoint.root, training.hyper_parameter_sources)
    reader = _Reader()
    converted = {name: reader.read(value, 0) for name, value in {**named, **networks}.items()}
    foreign = {name: value.why for name, value in converted.items() if isinstance(value, _Foreign)}
    values = Settings({name: value for name, value in converted.items() if name not in foreign})
    whole = lookup(view.checkpoint.root, "hparams_name")
    return Recorded(values, foreign, whole if isinstance(whole, str) else "")


def _networks(root: Any, sources: Iterable[str]) -> dict[str, Any]:
    """Find the modules among the hyperparameters: what is shown of them are their settings, which build nothing."""
    nodes = [node for source in sources if isinstance(node := lookup(root, source), DictNode)]
    return {name: value for node in nodes for name, value in node.text_items().items() if is_module(value)}


@dataclass(frozen=True, slots=True)
class _Foreign:
    """Stand for a value that only its own class could make."""

    why: str


class _Reader:
    """Turn a value tree, which may share nodes and hold cycles, into Python values."""

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}

    def read(self, value: Any, depth: int) -> Any:
        """Give the Python value, or a ``_Foreign`` in its place."""
        if isinstance(value, bool | int | float | complex | str | bytes | None):
            return value
        if id(value) not in self._known:
            self._known[id(value)] = _Foreign("it holds itself")
            self._known[id(value)] = self._convert(value, depth + 1)
        return self._known[id(value)]

    def _convert(self, value: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            return _Foreign("it nests without end")
        if isinstance(value, DictNode):
            return self._settings(value, depth)
        if isinstance(value, list | tuple):
            return self._items(value, type(value), depth)
        if isinstance(value, SetNode):
            return self._items(value.items, list, depth)
        if isinstance(value, Stub) and value.fields is not None and not is_module(value):
            return self._settings(value.fields, depth)
        return _named_dtype(value) or _Foreign(f"it is {_what(value)}")

    def _settings(self, node: DictNode, depth: int) -> Any:
        if "class_path" in node and "init_args" in node:
            return _Foreign(f"it names the class {node.get('class_path')}")
        converted = {key: self.read(child, depth) for key, child in node.text_items().items()}
        return Settings({key: child for key, child in converted.items() if not isinstance(child, _Foreign)})

    def _items(self, items: Iterable[Any], kind: Callable[[list[Any]], Any], depth: int) -> Any:
        converted = [self.read(child, depth) for child in items]
        return next((child for child in converted if isinstance(child, _Foreign)), None) or kind(converted)


def _named_dtype(value: Any) -> torch.dtype | None:
    dtype = find(value.name) if isinstance(value, GlobalRef) and value.module == "torch" else None
    return None if dtype is None else getattr(torch, dtype.name, None)


def _what(value: Any) -> str:
    if isinstance(value, Stub):
        return f"an object of class {value.ref.full_name}"
    return value.full_name if isinstance(value, GlobalRef) else f"a {type(value).__name__}"


def required_arguments(parameters: Mapping[str, Parameter], given: Mapping[str, Any], recorded: Recorded) -> Settings:
    """Give the arguments that the user leaves open and the call cannot do without, as far as they are known."""
    open_ones = [name for name, one in parameters.items() if _is_required(one) and name not in given]
    found = Settings({name: recorded.values[name] for name in open_ones if name in recorded.values})
    found.update({name: guess for name, guess in FIRST_GUESSES.items() if name in open_ones and name not in found})
    rest = [name for name in open_ones if name not in found]
    if len(rest) == 1 and recorded.values and rest[0] in _WHOLE_CONFIGURATIONS:
        found[rest[0]] = recorded.values
    return _without_downloads(parameters, found)


def recorded_arguments(parameters: Mapping[str, Parameter], given: Mapping[str, Any], recorded: Recorded) -> Settings:
    """Give every recorded hyperparameter that the call has an argument for; the user's own are left open."""
    if recorded.whole_name in parameters:
        found = Settings({recorded.whole_name: recorded.values})
    else:
        anything = any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values())
        found = Settings({name: value for name, value in recorded.values.items() if anything or name in parameters})
    required = required_arguments(parameters, {**given, **found}, recorded)
    merged = _without_downloads(parameters, Settings({**required, **found}))
    return Settings({name: value for name, value in merged.items() if name not in given})


def _is_required(parameter: Parameter) -> bool:
    wanted = parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return wanted and parameter.default is Parameter.empty


def _without_downloads(parameters: Mapping[str, Parameter], found: Settings) -> Settings:
    silent = {name: value for name, value in _DOWNLOADS.items() if name in found or _downloads(parameters.get(name))}
    return Settings({**found, **silent})


def _downloads(parameter: Parameter | None) -> bool:
    return parameter is not None and parameter.default is not Parameter.empty and bool(parameter.default)
