"""Every state dict of a checkpoint, wherever it lies; the tensors of optimizers are never taken for weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from ckptool.layouts.distributed import whole_tensors
from ckptool.layouts.modules import is_module, module_entries
from ckptool.layouts.producers import Layout
from ckptool.model.dtypes import DType
from ckptool.model.plans import CLEAN_MARK, Role, StateDict
from ckptool.model.values import DictNode, OpaqueTensor, Stub, TensorSpec

_TENSORS = (TensorSpec, OpaqueTensor)
MAX_DEPTH = 4
MAX_LIST = 64  # longer lists hold steps or shapes, not models

# "program_": the readers of programs put what is no part of the state dict under such names.
SKIPPED_STARTS = ("opt", "lr_sched", "sched", "scaler", "rng", "loops", "message_hub", "amp", "callbacks", "program_")
SKIPPED_PARTS = ("optim", "scheduler", "rng_state", "metrics")
SKIPPED_NAMES = frozenset(
    {"hyper_parameters", "datamodule_hyper_parameters", "hparams", "args", "config", "cfg", "random_states"}
)

NAME_ENDINGS = ("_state_dict", "_statedict", "_state", "_weights", "_params")
MAIN_NAMES = frozenset({"state_dict", "model", "net", "network", "params", "weights", "weight", "pipeline"})
EMA_WORDS = frozenset({"ema", "averaged", "average", "avg", "swa"})
# Callbacks that keep a copy of the weights say so in their name; StochasticWeightAveraging is one of Lightning's own.
AVERAGING_PARTS = ("ema", "averag")
PEER_NAMES = frozenset(
    {"student", "teacher", "g", "d", "g_ema", "generator", "discriminator", "encoder", "decoder", "netg", "netd"}
)
PEER_STARTS = ("network_fn", "network_fine", "model0", "model1", "model2", "model3")
UNKNOWN_NAME = "its name is not a usual one"


def find_state_dicts(root: Any, layout: Layout | None) -> list[StateDict]:
    """List the state dicts, in file order; those inside objects of foreign classes only where there are no others."""
    found = [_described(path, value, layout) for path, value in _walk(root)]
    found = found or [_described(path, value, layout) for path, value in _walk(root, into_objects=True)]
    return [state_dict for state_dict in found if state_dict.entries]  # a pickled activation has none


def state_dict_at(root: Any, path: str, layout: Layout | None) -> StateDict | None:
    """Give the state dict at a dotted path that the user names, or None."""
    found = _resolve(root, path)
    if found is None:
        return None
    steps, value = found
    mapping = _as_mapping(value)
    holds_tensors = mapping is not None and any(_is_tensor(child) for _, child in mapping.pairs)
    return _described(steps, value, layout) if holds_tensors or is_module(value) else None


def node_at(root: Any, path: tuple[str, ...]) -> Any:
    """Follow the steps of a ``StateDict`` from the root; None where they lead nowhere."""
    for step in path:
        root = dict(steps_below(root)).get(step)
    return root


def _resolve(root: Any, path: str) -> tuple[tuple[str, ...], Any] | None:
    if not path:
        return (), root
    for step, child in steps_below(root):
        if path == step or path.startswith(f"{step}."):
            below = _resolve(child, path[len(step) + 1 :])
            if below is not None:
                return (step, *below[0]), below[1]
    return None


def steps_below(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what lies directly in a mapping, a list or an object of a foreign class, each with its step in a path."""
    if isinstance(value, DictNode):
        yield from ((key, child) for key, child in value.pairs if type(key) is str)
        numbered = [(str(key), child) for key, child in value.pairs if type(key) is int]  # one network for each fold
        yield from ((step, child) for step, child in numbered[:MAX_LIST] if step not in value)
    elif isinstance(value, list | tuple):
        yield from ((str(index), child) for index, child in enumerate(value[:MAX_LIST]))
    elif isinstance(value, Stub):
        parts = [dict(steps_below(part)) for part in (value.args, value.fields, _as_mapping(value))]
        yield from {step: child for part in parts for step, child in part.items()}.items()


def _as_mapping(value: Any) -> DictNode | None:
    """Give a mapping, also one of a class of its own (``EasyDict``)."""
    if isinstance(value, Stub) and value.pairs:
        return DictNode(value.pairs)
    return value if isinstance(value, DictNode) else None


def _walk(root: Any, *, into_objects: bool = False) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield what looks like a state dict; a mapping that holds one is a container and no state dict itself."""
    seen: set[int] = set()
    stack: list[tuple[tuple[str, ...], Any]] = [((), root)]
    while stack:
        path, value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        mapping = _as_mapping(value) if into_objects else value
        if is_module(value) or (_is_weights_like(mapping) and not _holds_state_dict(mapping)):
            yield path, value
        elif len(path) < MAX_DEPTH and not is_optimizer_like(value) and (into_objects or type(value) is not Stub):
            below = [((*path, step), child) for step, child in steps_below(value) if _is_entered(path, step, child)]
            stack.extend(reversed(below))


def _is_entered(path: tuple[str, ...], step: str, child: Any) -> bool:
    if not isinstance(child, DictNode | list | tuple | Stub) or (isinstance(child, list) and len(child) > MAX_LIST):
        return False
    name = step.lower()
    if path and path[0].lower().startswith("callbacks"):
        return any(word in part.lower() for part in (*path[1:], step) for word in AVERAGING_PARTS)
    return name == "callbacks" or not _is_skipped(name)


def _is_skipped(name: str) -> bool:
    """Tell whether a lower-case key names training state that may hold tensors, but no weights."""
    in_table = name in SKIPPED_NAMES or name.startswith(SKIPPED_STARTS)
    return in_table or any(part in name for part in SKIPPED_PARTS)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, _TENSORS)


def is_optimizer_like(value: Any) -> bool:
    """Tell an optimizer's state (or a ZeRO shard of it) by its keys, whatever name it stands under."""
    if not isinstance(value, DictNode):
        return False
    return ("state" in value and "param_groups" in value) or ("zero_stage" in value and "partition_count" in value)


def _is_weights_like(value: Any) -> TypeGuard[DictNode]:
    """Tell a state dict: text keys, at least half of the values tensors, and not only counters or random states."""
    if not isinstance(value, DictNode) or is_optimizer_like(value):
        return False
    tensors = [pair for pair in value.pairs if type(pair[1]) is TensorSpec or _is_tensor(pair[1])]
    if not tensors or set(map(type, [key for key, _ in value.pairs])) != {str}:
        return False
    judged = len(value.pairs)
    if judged > len(tensors):  # where all are tensors, they are enough
        judged -= sum([_says_nothing(key, child) for key, child in value.pairs])
    return 2 * len(tensors) >= judged and not all(_is_side_value(key, child) for key, child in tensors)


def _says_nothing(key: str, value: Any) -> bool:
    return value is None or type(value) in (bytes, str, DType) or key.endswith("_extra_state")


def _is_side_value(key: str, value: TensorSpec | OpaqueTensor) -> bool:
    """Tell a counter, a score or a generator's state (a row of bytes) from a weight."""
    is_row_of_bytes = value.dtype is not None and value.dtype.name == "uint8" and len(value.shape or ()) == 1
    return "." not in key and (value.shape == () or is_row_of_bytes)


def _holds_state_dict(value: DictNode) -> bool:
    """Tell a container from a state dict with a few tensors inside one of its entries."""
    others = [pair for pair in value.pairs if type(pair[1]) is not TensorSpec and type(pair[0]) is str]
    own = len(value) - len(others)
    return any(_is_nested(key, child, own) for key, child in others if not key.endswith("_extra_state"))


def _is_nested(key: str, child: Any, own: int) -> bool:
    """Tell a state dict of its own: by its name, or because it has as many tensors as what stands beside it."""
    if not is_module(child) and not _is_weights_like(child):
        return False
    entries = module_entries(child) if is_module(child) else child.text_items()
    tensors = sum(map(_is_tensor, entries.values()))
    is_named = "." not in key and _role_of((key,), None)[1] != UNKNOWN_NAME
    return tensors > 0 and (is_named or tensors >= own)


def _described(path: tuple[str, ...], value: Any, layout: Layout | None) -> StateDict:
    role, reason = _role_of(path, layout)
    if is_module(value):
        what = f"the parameters and buffers of a pickled {value.ref.full_name}"
        return StateDict(path, role, module_entries(value), f"{reason}, {what}" if reason else what)
    mapping = _as_mapping(value) or DictNode()
    metadata = _key_metadata(mapping)
    entries = mapping.text_items()
    whole = whole_tensors(entries)
    joined = () if whole is entries else tuple(key for key, child in whole.items() if child is not entries[key])
    return StateDict(path, role, whole, reason, metadata, _is_marked_clean(metadata), joined)


def _is_marked_clean(metadata: Any) -> bool:
    root = metadata.get("") if isinstance(metadata, DictNode) else None
    return isinstance(root, DictNode) and root.get(CLEAN_MARK) is True


def _key_metadata(value: DictNode) -> Any:
    return value.attributes.get("_metadata") if value.attributes is not None else None


def _role_of(path: tuple[str, ...], layout: Layout | None) -> tuple[Role, str]:
    """Say what the state dict at a path is: by the producer's habit, else by its name."""
    overrides: Mapping[str, Role] = layout.roles if layout is not None else {}
    if ".".join(path) in overrides:
        assert layout is not None
        return overrides[".".join(path)], f"{layout.name} keeps them so"
    names = [_core_name(step) for step in path]
    if any(name in PEER_NAMES or name.startswith(PEER_STARTS) for name in names):
        return "peer", "one of several networks"
    if any(EMA_WORDS.intersection(name.split("_")) for name in names):
        return "ema", "its name says so"
    if not path or names[-1] in MAIN_NAMES or (names[-1] == "module" and layout and layout.name == "DeepSpeed"):
        return "main", ""
    return "peer", UNKNOWN_NAME


def _core_name(step: str) -> str:
    name = step.lower().replace("-", "_")
    ending = next((ending for ending in NAME_ENDINGS if name.endswith(ending)), "")
    return name.removesuffix(ending)
