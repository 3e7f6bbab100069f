"""What a checkpoint itself says about the model that it belongs to, as text for ``--model``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ckptool.formats.file import is_folder
from ckptool.layouts.hyperparameters import plain_config
from ckptool.layouts.modules import compiled_inner, is_module
from ckptool.layouts.producers import lookup
from ckptool.model.values import DictNode, Stub
from ckptool.operations.opening import OpenedCheckpoint

_ZOO_NAME = re.compile(r"^[a-z][a-z0-9_.]{2,80}$")
_CLASS_PATH = re.compile(r"^[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+$")
_LARGEST_CONFIG = 1 << 20  # bytes


def suggest(opened: OpenedCheckpoint) -> str | None:
    """Give what to write after ``--model``, or None where the checkpoint does not say; nothing is imported.

    In this order: the class that a pickled module or Lightning's command line recorded, the architecture that timm,
    torchvision's scripts or nanoGPT recorded, a ``config.json`` beside the file.
    """
    found = (source(opened) for source in _SOURCES)
    return next((text for text in found if text is not None), None)


def _pickled_module(opened: OpenedCheckpoint) -> str | None:
    root = opened.checkpoint.root
    places = (root, *(lookup(root, name) for name in ("model", "net", "network", "ema")))
    stub = next((value for value in places if is_module(value)), None)
    if not isinstance(stub, Stub):
        return None
    stub = compiled_inner(stub) or stub
    return f"{stub.ref.module}:{stub.ref.name}"


def _lightning_class(opened: OpenedCheckpoint) -> str | None:
    """Read what LightningCLI keeps. Source: lightning/pytorch/cli.py, ``_class_path`` in the hyperparameters."""
    path = lookup(opened.checkpoint.root, "hyper_parameters._class_path")
    if not isinstance(path, str) or _CLASS_PATH.match(path) is None:
        return None
    return ":".join(path.rsplit(".", 1))


def _recorded_architecture(opened: OpenedCheckpoint) -> str | None:
    root = opened.checkpoint.root
    for producer, zoo, paths in _ARCHITECTURES:
        if opened.selection.producer.name == producer:
            found = (plain_config(lookup(root, path)) for path in paths)
            arguments = plain_config(lookup(root, "args"))
            named = arguments.get("model") if isinstance(arguments, DictNode) else None
            name = next((name for name in (*found, named) if isinstance(name, str) and _ZOO_NAME.match(name)), None)
            return None if name is None else f"{zoo}:{name}"
    return None


# Who writes it, whose names they are, and where. Sources: timm/utils/checkpoint_saver.py (arch, args.model),
# torchvision references/classification/train.py (args.model), pytorch/examples imagenet/main.py (arch).
_ARCHITECTURES = (
    ("timm", "timm", ("arch",)),
    ("torchvision references", "torchvision", ()),
    ("MoCo or ImageNet example", "torchvision", ("arch",)),
)


def _nanogpt(opened: OpenedCheckpoint) -> str | None:
    return "model.py:GPT" if opened.selection.producer.name == "nanoGPT" else None


def _config_beside(opened: OpenedCheckpoint) -> str | None:
    path = opened.checkpoint.path
    folder = path if is_folder(path) else path.parent
    facts = read_config(folder / "config.json") or {}
    name = facts.get("architecture")
    if isinstance(name, str) and _ZOO_NAME.match(name):
        return f"timm:{name}"
    return f"transformers:{folder}" if "model_type" in facts or "architectures" in facts else None


def read_config(path: Path) -> Mapping[str, Any] | None:
    """Read the ``config.json`` beside a checkpoint; None where it is no JSON object that can be read."""
    try:
        facts = json.loads(path.read_bytes()) if path.stat().st_size <= _LARGEST_CONFIG else None
    except (OSError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, Mapping) else None


_SOURCES: tuple[Callable[[OpenedCheckpoint], str | None], ...] = (
    _pickled_module,
    _lightning_class,
    _recorded_architecture,
    _nanogpt,
    _config_beside,
)
