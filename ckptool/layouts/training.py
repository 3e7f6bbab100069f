"""What stands beside the weights: how far the training was, how good, with which settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from ckptool.layouts.carried import carried_training
from ckptool.layouts.hyperparameters import read_hyper_parameters
from ckptool.layouts.producers import lookup
from ckptool.layouts.scalars import number
from ckptool.layouts.segments import (
    FLAT_LEAVES,
    PRIVATE_SEGMENTS,
    Names,
    without,
)
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.plans import Selection, StateDict
from ckptool.model.training import Fact, Training
from ckptool.model.values import DictNode, OpaqueTensor, TensorSpec

EPOCH_PATHS = (
    "epoch",
    "current_epoch",
    "meta.epoch",
    "extra_state.train_iterator.epoch",
    "state.timestamp.Timestamp.epoch",
    "state.timestamp.epoch",
)
STEP_PATHS = (
    "global_step",
    "global_steps",
    "step",
    "iteration",
    "iter",
    "iter_num",
    "meta.iter",
    "state.timestamp.Timestamp.batch",
    "state.timestamp.batch",
    "updates",
    "update",
    "optimization_step",
)
VERSION_PATHS = {
    "pytorch-lightning": "pytorch-lightning_version",
    "mmengine": "meta.mmengine_version",
    "mmcv": "meta.mmcv_version",
    "deepspeed": "ds_version",
    "torch": "torch_version",
    "composer": "state.metadata.composer_env_info.composer_version",
}
OPTIMIZER_PATHS = (
    "optimizer_states",
    "optimizer",
    "optimizer_state_dict",
    "optimizer_state",
    "last_optimizer_state",
    "opt",
    "optim",
    "optimizers",
    "state.optimizers",
)
METRIC_PLACES = ("metrics", "train_metrics", "val_metrics", "best_metrics", "results", "extra_state")

# The words that tell a score from other numbers (``best_val_loss``, ``acc1``, ``_best_ema`` of nnU-Net).
METRIC_WORDS = frozenset(
    {"acc", "acc1", "acc5", "prec1", "accuracy", "auc", "bleu", "best", "dice", "error", "f1", "fid", "fitness", "iou"}
    | {"loss", "map", "map50", "metric", "miou", "perplexity", "ppl", "precision", "psnr", "recall", "score", "ssim"}
    | {"wer", "cer", "top1", "top5", "mse", "mae", "rmse"}
)
NO_METRIC_WORDS = frozenset({"epoch", "step", "iter", "iteration", "scale", "scaler", "weight", "path"})

# What each torch optimizer alone keeps in its param_groups; the first row that fits. Source: torch/optim/*.py.
OPTIMIZER_SIGNS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("NAdam", {"momentum_decay": ...}),
    ("AdamW", {"betas": ..., "amsgrad": ..., "decoupled_weight_decay": True}),
    ("Adam", {"betas": ..., "amsgrad": ..., "decoupled_weight_decay": False}),
    ("Adam or AdamW", {"betas": ..., "amsgrad": ...}),
    ("RAdam", {"betas": ..., "decoupled_weight_decay": ...}),
    ("SGD", {"momentum": ..., "nesterov": ..., "dampening": ...}),
    ("RMSprop", {"alpha": ..., "centered": ...}),
    ("Adadelta", {"rho": ...}),
    ("Adagrad", {"lr_decay": ..., "initial_accumulator_value": ...}),
    ("ASGD", {"lambd": ..., "t0": ...}),
    ("Rprop", {"etas": ..., "step_sizes": ...}),
)

COMPILE_FLAGS = ("compile_model", "compile", "torch_compile", "torchcompile", "use_compile", "compiled")
EMA_FLAGS = ("use_ema", "model_ema", "ema")
STRATEGY_SEGMENTS = {
    "_fsdp_wrapped_module": "fsdp",
    "_fpw_module": "fsdp",
    "_dmp_wrapped_module": "torchrec",
}


def read_training(checkpoint: Checkpoint, selection: Selection) -> Training:
    """Gather what the container says about the training; nothing is guessed, each fact says where it stands.

    Scores are read out of tensors of one element; the weights are not read.
    """
    carried = carried_training(checkpoint.metadata)
    if carried is not None:
        return carried
    root = checkpoint.root
    settings, sources = read_hyper_parameters(root)
    optimizer_path, group = _param_group(root)
    keys = _keys(selection)
    return Training(
        epoch=_first_number(root, EPOCH_PATHS),
        global_step=_first_number(root, STEP_PATHS),
        metrics=_metrics(root),
        monitor=_monitor(root),
        mode=_mode(root),
        learning_rate=_learning_rate(root, optimizer_path, group),
        optimizer=_optimizer(optimizer_path, group),
        versions=_versions(root),
        compiled=_compiled(keys, settings, sources),
        strategy=_strategy(selection, keys, settings, sources),
        ema=_ema(selection, keys, settings, sources),
        hyper_parameters=settings,
        hyper_parameter_sources=sources,
    )


def _first_number(root: Any, paths: Sequence[str]) -> Fact | None:
    found = ((path, number(lookup(root, path))) for path in paths)
    return next((Fact(value, path) for path, value in found if value is not None), None)


def _versions(root: Any) -> dict[str, Fact]:
    found = {name: (path, lookup(root, path)) for name, path in VERSION_PATHS.items()}
    return {name: Fact(value, path) for name, (path, value) in found.items() if isinstance(value, str)}


# --- scores ---


def _model_checkpoints(root: Any) -> Iterator[tuple[str, DictNode]]:
    """Yield Lightning's ModelCheckpoint states, those that watch a metric first."""
    callbacks = lookup(root, "callbacks")
    states = callbacks.text_items().items() if isinstance(callbacks, DictNode) else ()
    found = [
        (f"callbacks.{name}", state)
        for name, state in states
        if isinstance(state, DictNode) and "best_model_score" in state
    ]
    yield from sorted(found, key=lambda entry: entry[1].get("monitor") is None)


def _monitor(root: Any) -> Fact | None:
    found = ((path, state.get("monitor")) for path, state in _model_checkpoints(root))
    return next((Fact(name, path) for path, name in found if isinstance(name, str)), None)


def _mode(root: Any) -> Fact | None:
    """Read ``min`` or ``max`` out of the name under which Lightning keeps the callback's state."""
    for path, _ in _model_checkpoints(root):
        mode = next((mode for mode in ("min", "max") if f"'mode': '{mode}'" in path), None)
        if mode is not None:
            return Fact(mode, path)
    return None


def _metrics(root: Any) -> dict[str, Fact]:
    facts = dict(_callback_metrics(root))
    for place, name, value in _named_values(root):
        is_one = type(value) is not TensorSpec or math.prod(value.shape) == 1  # cheaper to know than what a name says
        score = number(value) if is_one and _is_metric_name(name) else None
        if score is not None:
            facts.setdefault(name, Fact(score, f"{place}.{name}".lstrip(".")))
    return facts


def _callback_metrics(root: Any) -> Iterator[tuple[str, Fact]]:
    for path, state in _model_checkpoints(root):
        monitor = state.get("monitor")
        best, current = number(state.get("best_model_score")), number(state.get("current_score"))
        if isinstance(monitor, str) and best is not None:
            own = best if current is None else current
            yield monitor, Fact(own, f"{path}.{'best_model_score' if current is None else 'current_score'}")
            yield f"best_{monitor}", Fact(best, f"{path}.best_model_score")


def _named_values(root: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield (place, name, value) from the places where trainers keep scores: the root and a few mappings in it."""
    for place in ("", *METRIC_PLACES):
        node = lookup(root, place) if place else root
        if isinstance(node, DictNode):
            yield from ((place, name, value) for name, value in node.text_items().items())


def _is_metric_name(name: str) -> bool:
    words = set(name.lower().replace("/", "_").replace("-", "_").replace(".", "_").split("_"))
    return bool(words & METRIC_WORDS) and not words & NO_METRIC_WORDS


# --- optimizer ---


def _param_group(root: Any) -> tuple[str, DictNode | None]:
    """Give the first parameter group of the first optimizer, and where it stands."""
    for path in OPTIMIZER_PATHS:
        for place, state in _optimizer_states(path, lookup(root, path)):
            groups = state.get("param_groups") if isinstance(state, DictNode) else None
            if isinstance(groups, list | tuple) and groups and isinstance(groups[0], DictNode):
                return f"{place}.param_groups.0", groups[0]
    return "", None


def _optimizer_states(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield path, value
    if isinstance(value, list | tuple):
        yield from ((f"{path}.{index}", item) for index, item in enumerate(value[:4]))
    elif isinstance(value, DictNode):
        yield from ((f"{path}.{name}", item) for name, item in list(value.text_items().items())[:4])


def _learning_rate(root: Any, path: str, group: DictNode | None) -> Fact | None:
    rate = number(group.get("lr")) if group is not None else None
    if rate is not None:
        return Fact(rate, f"{path}.lr")
    schedulers = lookup(root, "lr_schedulers")
    first = schedulers[0] if isinstance(schedulers, list) and schedulers else lookup(root, "lr_scheduler")
    rates = lookup(first, "_last_lr")
    rate = number(rates[0]) if isinstance(rates, list) and rates else None
    return None if rate is None else Fact(rate, "the learning rate scheduler's _last_lr")


def _optimizer(path: str, group: DictNode | None) -> Fact | None:
    if group is None:
        return None
    for name, signs in OPTIMIZER_SIGNS:
        if all(sign in group and (wanted is ... or group.get(sign) is wanted) for sign, wanted in signs.items()):
            return Fact(name, f"{path} has {', '.join(signs)}")
    return None


# --- compiled, strategy, ema ---


def _flag(names: Sequence[str], settings: DictNode, sources: Sequence[str]) -> Fact | None:
    """Give the first setting with one of the names, at the top or one level below."""
    for source, node in _levels(settings, sources):
        for name in names:
            if name in node:
                return Fact(node.get(name), f"{source}.{name}")
    return None


def _levels(settings: DictNode, sources: Sequence[str]) -> Iterator[tuple[str, DictNode]]:
    if sources:
        yield sources[0], settings
    for name, value in settings.text_items().items():
        if isinstance(value, DictNode):
            yield name if name in sources[1:] else f"{sources[0]}.{name}", value


def _bool_flag(names: Sequence[str], settings: DictNode, sources: Sequence[str]) -> Fact | None:
    fact = _flag(names, settings, sources)
    return fact if fact is not None and isinstance(fact.value, bool) else None


def _keys(selection: Selection) -> Names:
    """Give the keys to look for evidence in: those of the chosen state dict, else all."""
    chosen: Sequence[StateDict] = (selection.chosen,) if selection.chosen is not None else selection.candidates
    return Names(chain.from_iterable(state_dict.entries for state_dict in chosen))


def _segment_fact(value: Any, segment: str, keys: Names) -> Fact | None:
    count = keys.count_holding(segment)
    return Fact(value, f'"{segment}" is in {count} of {len(keys)} keys') if count else None


def _compiled(keys: Names, settings: DictNode, sources: Sequence[str]) -> Fact | None:
    fact = _segment_fact(True, "_orig_mod", keys)
    return fact if fact is not None else _bool_flag(COMPILE_FLAGS, settings, sources)


def _strategy(selection: Selection, keys: Names, settings: DictNode, sources: Sequence[str]) -> Fact | None:
    if selection.producer.name.startswith("DeepSpeed"):
        return Fact("deepspeed", selection.producer.evidence)
    found = (_segment_fact(strategy, segment, keys) for segment, strategy in STRATEGY_SEGMENTS.items())
    by_segment = next((fact for fact in found if fact is not None), None)
    return by_segment or _sharded(selection, keys) or _parallel(keys) or _named_strategy(settings, sources)


def _sharded(selection: Selection, keys: Names) -> Fact | None:
    if "flat_param" in keys.text and any(key.rpartition(".")[2] in FLAT_LEAVES for key in keys):
        return Fact("fsdp", "parameters are flattened")
    tensors = [value for state_dict in selection.candidates for value in state_dict.entries.values()]
    others = [value for value in tensors if type(value) is not TensorSpec]
    opaque = next((value for value in others if isinstance(value, OpaqueTensor) and value.kind in _SHARDED), None)
    return None if opaque is None else Fact("fsdp", f"tensors are stored as {_SHARDED[opaque.kind]}")


_SHARDED = {"dtensor": "DTensor", "sharded": "ShardedTensor"}


def _parallel(keys: Names) -> Fact | None:
    if "module" not in keys.text or "n_averaged" in keys:
        return None
    private = keys.private_segments()
    names = Names([without(key, tuple(PRIVATE_SEGMENTS)) for key in keys]) if private else keys
    if names.shared_root != "module":
        return None
    return Fact("ddp", f'every one of {len(keys)} keys lies below "module." (DataParallel or DDP)')


def _named_strategy(settings: DictNode, sources: Sequence[str]) -> Fact | None:
    fact = _flag(("strategy", "distributed_strategy"), settings, sources)
    return fact if fact is not None and isinstance(fact.value, str) else None


def _ema(selection: Selection, keys: Names, settings: DictNode, sources: Sequence[str]) -> Fact | None:
    averaged = next((state_dict for state_dict in selection.candidates if state_dict.role == "ema"), None)
    if averaged is not None:
        place = f'the state dict at "{averaged.name}"' if averaged.name else "the state dict"
        return Fact(True, f"{place} ({averaged.reason})" if averaged.reason else place)
    if "n_averaged" in keys:
        return Fact(True, 'the counter "n_averaged" of an AveragedModel')
    return _bool_flag(EMA_FLAGS, settings, sources)
