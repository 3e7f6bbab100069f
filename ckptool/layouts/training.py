"""What stands beside the weights: how far the training was, how good, with which settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptool.layouts.carried import carried_training
from ckptool.layouts.hyperparameters import read_hyper_parameters
from ckptool.layouts.producers import lookup
from ckptool.layouts.scalars import number
from ckptool.layouts.strategy import gather_evidence, read_compiled, read_ema, read_strategy
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.plans import Selection
from ckptool.model.training import Fact, Training
from ckptool.model.values import DictNode, TensorSpec

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
    evidence = gather_evidence(selection, settings, sources)
    return Training(
        epoch=_first_number(root, EPOCH_PATHS),
        global_step=_first_number(root, STEP_PATHS),
        metrics=_metrics(root),
        monitor=_monitor(root),
        mode=_mode(root),
        learning_rate=_learning_rate(root, optimizer_path, group),
        optimizer=_optimizer(optimizer_path, group),
        versions=_versions(root),
        compiled=read_compiled(evidence),
        strategy=read_strategy(evidence),
        ema=read_ema(evidence),
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
