"""What a training was configured with: plain mappings out of the objects that configuration libraries pickle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckptool.layouts.modules import is_module
from ckptool.layouts.producers import lookup
from ckptool.model.values import DictNode, Stub

SOURCES = (
    "hyper_parameters",
    "hparams",
    "hyperparameters",
    "module_arguments",
    "model_args",
    "train_args",
    "init_args",
    "cfg",
    "args",
    "config",
    "datamodule_hyper_parameters",
)

MAX_DEPTH = 128
_MISSING = object()  # what an unwrapper gives where the object is not built as expected; None may be its content


def read_hyper_parameters(root: Any) -> tuple[DictNode, tuple[str, ...]]:
    """Give the hyperparameters and the places they stand at; the first place gives the names.

    An object of a foreign class keeps its own: it stands under the name of its place.
    """
    found = [(source, plain_config(lookup(root, source))) for source in SOURCES]
    settings = [(source, value) for source, value in found if _has_settings(value)]
    if not settings:
        return DictNode(), ()
    (first, value), *others = settings
    base = value if isinstance(value, DictNode) else DictNode([(first, value)])
    beside = [(source, value) for source, value in others if source not in base]
    return DictNode([*base.pairs, *beside]), (first, *(source for source, _ in beside))


def _has_settings(value: Any) -> bool:
    mapping = value.fields if isinstance(value, Stub) else value
    return isinstance(mapping, DictNode) and len(mapping) > 0


def plain_config(value: Any) -> Any:
    """Turn known configuration objects into mappings, lists and text; anything else stays as it is."""
    return _plain(value, {}, 0)


def _plain(value: Any, known: dict[int, tuple[Any, Any]], depth: int) -> Any:
    """Convert a tree that may share nodes and hold cycles: a node is entered before its children are.

    ``known`` keeps each node beside what it became: an identity is only its own while the object lives.
    """
    if id(value) in known:
        return known[id(value)][1]
    if depth > MAX_DEPTH or not isinstance(value, Stub | DictNode | list | tuple):
        return value
    if isinstance(value, tuple):
        # It can hold itself only by way of a list or a mapping, which is entered first.
        known[id(value)] = value, tuple(_plain(child, known, depth + 1) for child in value)
    elif isinstance(value, Stub):
        inner = _unwrap(value)
        if inner is value:
            return value
        # A box that holds itself has no content to show.
        known[id(value)] = value, None
        known[id(value)] = value, _plain(inner, known, depth + 1)
    elif isinstance(value, DictNode):
        node = DictNode(type_name=value.type_name)
        known[id(value)] = value, node
        node.pairs.extend((key, _plain(child, known, depth + 1)) for key, child in value.pairs)
    else:
        items: list[Any] = []
        known[id(value)] = value, items
        items.extend(_plain(child, known, depth + 1) for child in value)
    return known[id(value)][1]


def _unwrap(stub: Stub) -> Any:
    if is_module(stub):
        return _settings_of(stub)
    unwrapper = _UNWRAPPERS.get((stub.ref.module.partition(".")[0], stub.ref.name))
    found = unwrapper(stub) if unwrapper is not None else _MISSING
    return stub if found is _MISSING else found


def _settings_of(module: Stub) -> Stub:
    """Give a pickled ``nn.Module`` without its parameters, modules and hooks: a network is no setting."""
    fields = module.fields
    if fields is None or "_modules" not in fields:
        return module
    own = [(key, value) for key, value in fields.text_items().items() if not key.startswith("_") and key != "training"]
    return Stub(module.ref, state=DictNode(own))


def _fields(stub: Stub) -> Any:
    return _MISSING if stub.fields is None else stub.fields


def _pairs(stub: Stub) -> Any:
    return DictNode(list(stub.pairs)) if stub.pairs else _fields(stub)


def _field(name: str) -> Callable[[Stub], Any]:
    def unwrap(stub: Stub) -> Any:
        return stub.fields.get(name) if stub.fields is not None and name in stub.fields else _MISSING

    return unwrap


def _path_text(stub: Stub) -> Any:
    parts = [part for part in stub.args if isinstance(part, str)]
    if not parts or len(parts) != len(stub.args):
        return _MISSING
    separator = "\\" if "Windows" in stub.ref.name else "/"
    root = parts[0].endswith(separator)
    return parts[0] + separator.join(parts[1:]) if root else separator.join(parts)


# By the first part of the module and the class. Sources: argparse, types, pathlib; omegaconf/base.py (a container
# keeps its nodes in _content, a node its value in _val); lightning/fabric/utilities/data.py; yacs, easydict, addict,
# munch, mmengine/config (mappings with attribute access).
_UNWRAPPERS: dict[tuple[str, str], Callable[[Stub], Any]] = {
    ("argparse", "Namespace"): _fields,
    ("types", "SimpleNamespace"): _fields,
    **{("omegaconf", name): _field("_content") for name in ("DictConfig", "ListConfig", "UnionNode")},
    **{
        ("omegaconf", name): _field("_val")
        for name in ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode", "EnumNode", "PathNode")
    },
    **{("pathlib", name): _path_text for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
    **dict.fromkeys(
        (
            ("lightning", "AttributeDict"),
            ("lightning_fabric", "AttributeDict"),
            ("pytorch_lightning", "AttributeDict"),
            ("yacs", "CfgNode"),
            ("easydict", "EasyDict"),
            ("addict", "Dict"),
            ("munch", "Munch"),
            ("mmengine", "ConfigDict"),
            ("mmcv", "ConfigDict"),
        ),
        _pairs,
    ),
}
