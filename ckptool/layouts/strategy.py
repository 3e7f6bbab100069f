"""How the weights came to be: under a compiler, with which strategy, averaged or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ckptool.layouts.segments import FLAT_LEAVES, PRIVATE_SEGMENTS, Names, without
from ckptool.model.plans import Selection, StateDict
from ckptool.model.training import Fact
from ckptool.model.values import DictNode, OpaqueTensor, TensorSpec

_COMPILE_FLAGS = ("compile_model", "compile", "torch_compile", "torchcompile", "use_compile", "compiled")
_EMA_FLAGS = ("use_ema", "model_ema", "ema")
_STRATEGY_SEGMENTS = {
    "_fsdp_wrapped_module": "fsdp",
    "_fpw_module": "fsdp",
    "_dmp_wrapped_module": "torchrec",
}
_STRATEGY_SETTINGS = ("strategy", "distributed_strategy")
_SHARDED = {"dtensor": "DTensor", "sharded": "ShardedTensor"}


@dataclass(frozen=True, slots=True)
class Evidence:
    """Hold what tells: the keys of the weights, and the settings with the places that they were read from."""

    selection: Selection
    keys: Names
    settings: DictNode
    sources: Sequence[str]


def gather_evidence(selection: Selection, settings: DictNode, sources: Sequence[str]) -> Evidence:
    """Take the keys of the chosen state dict, else of all."""
    chosen: Sequence[StateDict] = (selection.chosen,) if selection.chosen is not None else selection.candidates
    keys = Names(chain.from_iterable(state_dict.entries for state_dict in chosen))
    return Evidence(selection, keys, settings, sources)


def read_compiled(evidence: Evidence) -> Fact | None:
    """Say whether the model was compiled."""
    fact = _segment_fact(True, "_orig_mod", evidence.keys)
    return fact if fact is not None else _setting(_COMPILE_FLAGS, bool, evidence)


def read_strategy(evidence: Evidence) -> Fact | None:
    """Say over how many devices the model was trained, and in which way."""
    selection, keys = evidence.selection, evidence.keys
    if selection.producer.name.startswith("DeepSpeed"):
        return Fact("deepspeed", selection.producer.evidence)
    found = (_segment_fact(strategy, segment, keys) for segment, strategy in _STRATEGY_SEGMENTS.items())
    by_segment = next((fact for fact in found if fact is not None), None)
    return by_segment or _sharded(selection, keys) or _parallel(keys) or _setting(_STRATEGY_SETTINGS, str, evidence)


def read_ema(evidence: Evidence) -> Fact | None:
    """Say whether there are averaged weights."""
    averaged = next((state_dict for state_dict in evidence.selection.candidates if state_dict.role == "ema"), None)
    if averaged is not None:
        place = f'the state dict at "{averaged.name}"' if averaged.name else "the state dict"
        return Fact(True, f"{place} ({averaged.reason})" if averaged.reason else place)
    if "n_averaged" in evidence.keys:
        return Fact(True, 'the counter "n_averaged" of an AveragedModel')
    return _setting(_EMA_FLAGS, bool, evidence)


def _setting(names: Sequence[str], kind: type, evidence: Evidence) -> Fact | None:
    """Give the first setting with one of the names, at the top or one level below, if it is of that kind."""
    for source, node in _levels(evidence.settings, evidence.sources):
        for name in names:
            if name in node:
                value = node.get(name)
                return Fact(value, f"{source}.{name}") if isinstance(value, kind) else None
    return None


def _levels(settings: DictNode, sources: Sequence[str]) -> Iterator[tuple[str, DictNode]]:
    if sources:
        yield sources[0], settings
    for name, value in settings.text_items().items():
        if isinstance(value, DictNode):
            yield name if name in sources[1:] else f"{sources[0]}.{name}", value


def _segment_fact(value: Any, segment: str, keys: Names) -> Fact | None:
    count = keys.count_holding(segment)
    return Fact(value, f'"{segment}" is in {count} of {len(keys)} keys') if count else None


def _sharded(selection: Selection, keys: Names) -> Fact | None:
    if "flat_param" in keys.text and any(key.rpartition(".")[2] in FLAT_LEAVES for key in keys):
        return Fact("fsdp", "parameters are flattened")
    tensors = [value for state_dict in selection.candidates for value in state_dict.entries.values()]
    others = [value for value in tensors if type(value) is not TensorSpec]
    opaque = next((value for value in others if isinstance(value, OpaqueTensor) and value.kind in _SHARDED), None)
    return None if opaque is None else Fact("fsdp", f"tensors are stored as {_SHARDED[opaque.kind]}")


def _parallel(keys: Names) -> Fact | None:
    if "module" not in keys.text or "n_averaged" in keys:
        return None
    private = keys.private_segments()
    names = Names([without(key, tuple(PRIVATE_SEGMENTS)) for key in keys]) if private else keys
    if names.shared_root != "module":
        return None
    return Fact("ddp", f'every one of {len(keys)} keys lies below "module." (DataParallel or DDP)')
