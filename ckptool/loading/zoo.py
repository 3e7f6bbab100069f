"""Models by the name that timm, torchvision or transformers know them under; nothing is ever downloaded."""

from __future__ import annotations

import copy
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ckptool.errors import CkptoolError
from ckptool.loading.built import Preprocessing
from ckptool.loading.factories import Factory, Size, parameters_of
from ckptool.loading.foreign import foreign_code
from ckptool.loading.torchvision import ensure_torchvision

_CLASS = re.compile(r"[A-Z]\w*(Model|For[A-Z]\w+|Head|Backbone)")
_TOKEN_DIMENSIONS = 3  # of a position embedding: 1, tokens, width


def zoo_factory(text: str, trust_code: bool) -> Factory | None:
    """Give the model of a zoo that the text names, or None where it names none (``timm:resnet50``).

    :raises CkptoolError: the zoo is not installed, or knows no such model.
    """
    zoo, colon, name = text.partition(":")
    if not colon or zoo not in _ZOOS:
        return None
    if not name:
        raise CkptoolError(f"--model {text}: no name after the colon; write {zoo}:{_EXAMPLES[zoo]}")
    return _ZOOS[zoo](text, name, trust_code)


def _import_zoo(text: str, name: str) -> ModuleType:
    # A model named by the user is built from code on this machine, never fetched.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    what = f"--model {text}: importing {name} failed"
    with foreign_code(what, f"install a {name} that goes with torch {torch.__version__}"):
        try:
            ensure_torchvision()
            return import_module(name)
        except ModuleNotFoundError as error:
            raise CkptoolError(f"{what} ({error}); run pip install {error.name or name}") from error


def _unknown(text: str, name: str, known: Iterable[str]) -> CkptoolError:
    close = difflib.get_close_matches(name, list(known), 3)
    return CkptoolError(f"--model {text}: no such model; {f'did you mean {_any_of(close)}' if close else 'check it'}")


def _any_of(names: list[str]) -> str:
    return " or ".join(names)


# --- timm ---


def _timm(text: str, name: str, _trust_code: bool) -> Factory:
    timm = _import_zoo(text, "timm")
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown(text, name, timm.list_models())

    def call(**arguments: Any) -> Any:
        return timm.create_model(name, pretrained=False, **arguments)

    return Factory(text, call, None, preprocessing=_timm_preprocessing, own_sizes=_timm_sizes)


def _timm_sizes(model: nn.Module) -> tuple[Size, ...]:
    configuration = _timm_configuration(model)
    found = (
        Size("num_classes", 0, getattr(model, "num_classes", None) or configuration.get("num_classes", 0)),
        Size("in_chans", 1, configuration.get("input_size", (3,))[0]),
        *_timm_image_size(model),
    )
    return tuple(size for size in found if size.value)


def _timm_image_size(model: nn.Module) -> tuple[Size, ...]:
    """Tell the image size by the number of position embeddings: one for each patch, and some for other tokens."""
    embedding, patches = getattr(model, "pos_embed", None), getattr(model, "patch_embed", None)
    grid, edge = getattr(patches, "num_patches", None), getattr(patches, "patch_size", None)
    if not isinstance(embedding, torch.Tensor) or embedding.dim() != _TOKEN_DIMENSIONS or not grid or not edge:
        return ()
    others, side = embedding.shape[1] - grid, edge[0]

    def image_size(tokens: int) -> int | None:
        edges = math.isqrt(max(tokens - others, 0))
        return edges * side if edges > 0 and edges * edges == tokens - others else None

    return (Size("img_size", 1, embedding.shape[1], image_size),)


def _timm_configuration(model: nn.Module) -> Mapping[str, Any]:
    found = getattr(model, "pretrained_cfg", None)
    return found if isinstance(found, Mapping) else {}


def _timm_preprocessing(model: nn.Module) -> Preprocessing:
    """Read how timm feeds it; a model with another number of channels gets the mean of the means."""
    resolved = import_module("timm.data").resolve_data_config({}, model=model)
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = resolved["input_size"][0] if first is None else first.in_channels
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or resolved["input_size"][1:]
    return Preprocessing(
        size=(size[0], size[1]),
        mean=_per_channel(resolved["mean"], channels),
        std=_per_channel(resolved["std"], channels),
        channels=channels,
        crop=float(resolved["crop_pct"]),
        interpolation=_interpolation(resolved["interpolation"]),
        source="timm's configuration",
    )


def _per_channel(values: Iterable[float], channels: int) -> tuple[float, ...]:
    given = tuple(float(value) for value in values)
    return given if len(given) == channels else (sum(given) / len(given),) * channels


def _interpolation(name: Any) -> str:
    return "bilinear" if "bilinear" in str(name).lower() or name in (2, None) else "bicubic"


# --- torchvision ---


def _torchvision(text: str, name: str, _trust_code: bool) -> Factory:
    models = _import_zoo(text, "torchvision").models
    if name not in models.list_models():
        raise _unknown(text, name, models.list_models())
    builder = models.get_model_builder(name)
    taken = parameters_of(builder) or {}
    silent = {argument: None for argument in ("weights", "weights_backbone") if argument in taken}

    def call(**arguments: Any) -> Any:
        return builder(**{**silent, **arguments})

    return Factory(
        text,
        call,
        None,
        preprocessing=lambda _model: _torchvision_preprocessing(models, name),
        own_sizes=lambda model: _torchvision_sizes(model, taken),
    )


def _torchvision_sizes(model: nn.Module, taken: Mapping[str, Parameter]) -> tuple[Size, ...]:
    """Take the last layer's width for the number of classes."""
    if "kwargs" not in taken and "num_classes" not in taken:
        return ()
    heads = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return (Size("num_classes", 0, heads[-1].weight.shape[0]),) if heads else ()


def _torchvision_preprocessing(models: ModuleType, name: str) -> Preprocessing | None:
    weights = models.get_model_weights(name)
    if not len(weights):
        return None
    transforms = next(iter(weights)).transforms() if not hasattr(weights, "DEFAULT") else weights.DEFAULT.transforms()
    crop = getattr(transforms, "crop_size", None)
    if not crop or not hasattr(transforms, "mean"):
        return None
    height, width = (crop[0], crop[-1])
    return Preprocessing(
        size=(height, width),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        channels=len(transforms.mean),
        crop=min(1.0, height / transforms.resize_size[0]),
        interpolation=_interpolation(transforms.interpolation.value),
        source="torchvision's weights",
    )


# --- transformers ---


def _transformers(text: str, name: str, trust_code: bool) -> Factory:
    folder = Path(name)
    if _CLASS.fullmatch(name) and not folder.exists():
        return _transformers_at_defaults(text, name)
    if not (folder / "config.json").is_file():
        raise CkptoolError(f"--model {text}: there is no {folder / 'config.json'}; name the folder that it lies in")
    library = _import_zoo(text, "transformers")
    library.logging.set_verbosity_error()
    remedy = "check the file, or allow its own code with --trust-code"
    with foreign_code(f"--model {text}: reading its config.json failed", remedy):
        configuration = library.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_code
        )
        kind = _transformers_class(text, library, configuration, folder, trust_code)

    def call(**arguments: Any) -> Any:
        own = copy.deepcopy(configuration)
        for key, value in arguments.items():
            setattr(own, key, value)
        return kind(own)

    return Factory(
        text,
        call,
        None,
        preprocessing=lambda _model: _hub_preprocessing(folder),
        own_sizes=lambda model: (Size("num_labels", 0, getattr(model, "config", configuration).num_labels),),
    )


def _transformers_at_defaults(text: str, name: str) -> Factory:
    """Give a class of transformers as its configuration is where nothing is set."""
    library = _import_zoo(text, "transformers")
    kind = getattr(library, name, None)
    own = getattr(kind, "config_class", None)
    if kind is None or own is None:
        raise CkptoolError(f"--model {text}: transformers {library.__version__} has no such model; check the name")
    configuration = own()
    return Factory(
        text,
        lambda **arguments: kind(own(**arguments)),
        None,
        own_sizes=lambda model: (Size("num_labels", 0, getattr(model, "config", configuration).num_labels),),
    )


def _transformers_class(text: str, library: ModuleType, configuration: Any, folder: Path, trust_code: bool) -> Any:
    """Give the class that the configuration says the weights are of."""
    name = next(iter(configuration.architectures or ()), None)
    own = getattr(configuration, "auto_map", None) or {}
    if trust_code and name is not None:
        own_class = next((place for place in own.values() if str(place).rpartition(".")[2] == name), None)
        if own_class is not None:
            loader = import_module("transformers.dynamic_module_utils").get_class_from_dynamic_module
            return loader(own_class, str(folder), local_files_only=True)
    if name is None:
        return library.AutoModel.from_config
    if not hasattr(library, name):
        raise CkptoolError(
            f"--model {text}: transformers {library.__version__} has no {name}; install a version that has it"
            + ("" if trust_code or not own else ", or allow the folder's own code with --trust-code")
        )
    return getattr(library, name)


def _hub_preprocessing(folder: Path) -> Preprocessing | None:
    """Read a ``preprocessor_config.json``; None where there is none, or none for images."""
    try:
        facts = json.loads((folder / "preprocessor_config.json").read_bytes())
    except (OSError, ValueError):
        return None
    size = _hub_size(facts) if isinstance(facts, Mapping) else None
    if size is None:
        return None
    normalises = facts.get("do_normalize", True)
    mean = _numbers(facts.get("image_mean")) if normalises else None
    std = _numbers(facts.get("image_std")) if normalises else None
    mean, std = mean or (0.0, 0.0, 0.0), std or (1.0, 1.0, 1.0)
    interpolation = _interpolation(facts.get("resample"))
    return Preprocessing(size, mean, std, len(mean), 1.0, interpolation, "preprocessor_config.json")


def _hub_size(facts: Mapping[str, Any]) -> tuple[int, int] | None:
    for name in ("crop_size", "size"):
        found = facts.get(name)
        if isinstance(found, Mapping):
            edge = found.get("shortest_edge")
            found = (found.get("height", edge), found.get("width", edge))
        pair = tuple(found) if isinstance(found, list | tuple) else (found, found)
        if len(pair) == 2 and all(type(side) is int and side > 0 for side in pair):
            return pair
    return None


def _numbers(value: Any) -> tuple[float, ...] | None:
    values = value if isinstance(value, list) and value else ()
    return tuple(float(one) for one in values) if all(isinstance(one, int | float) for one in values) else None


_ZOOS: Mapping[str, Callable[[str, str, bool], Factory]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}
_EXAMPLES = {"timm": "resnet50", "torchvision": "resnet50", "transformers": "FOLDER"}
