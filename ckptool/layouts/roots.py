"""What the first segment of a whole group of keys means: a wrapper, a network, an EMA copy, a loss or a metric."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ckptool.errors import PlanRefused
from ckptool.layouts.draft import Draft
from ckptool.layouts.segments import quoted, under
from ckptool.layouts.twins import is_flattened, underscored_twins

# Networks that lie side by side as equals: nobody but the user can say which one is meant.
PEER_ROOTS = (
    frozenset({"ema_model", "online_model"}),
    frozenset({"student", "teacher"}),
    frozenset({"encoder_q", "encoder_k"}),
)

# Copies of the weights that a training module keeps beside ``model``.
EMA_ROOTS = frozenset({"ema_model", "model_ema", "ema", "averaged_model"})

# Who keeps the network as its attribute ``model``, by the family of the container.
CONTAINER_MODULES = {"lightning": "LightningModule", "composer": "ComposerModel"}

LOSS_ROOTS = frozenset({"criterion", "criterions", "loss", "losses", "loss_fn", "loss_func", "metric", "metrics"})
LOSS_ENDINGS = ("_criterion", "_loss", "_loss_fn", "_metric", "_metrics")

# The state names of torchmetrics: some only occur there, the others are ordinary words that go along with them.
METRIC_STATES = frozenset(
    {"tp", "fp", "tn", "fn", "confmat", "correct", "mean_value", "sum_value", "max_value", "min_value", "measures"}
    | {"preds", "target", "min_target", "max_target", "sum_error", "sum_abs_error", "sum_squared_error"}
)
METRIC_COMPANIONS = METRIC_STATES | {"total", "weight", "value", "num_outputs", "n_total", "_update_count"}

SIDE_REASON = "a counter of the averaged wrapper, no weight of the model"


@dataclass(frozen=True, slots=True)
class SideKeys:
    """Say which counters an averaging wrapper leaves at the root, beside keys that all lie below one wrapper.

    Sources: torch/optim/swa_utils.py (AveragedModel), mmengine/model/averaged_model.py, ema_pytorch.py.
    """

    names: frozenset[str]
    wrappers: frozenset[str]


SIDE_KEYS = (
    SideKeys(frozenset({"n_averaged", "steps"}), frozenset({"module"})),
    SideKeys(frozenset({"initted", "step"}), frozenset({"ema_model", "online_model"})),
)


def take_side_keys(draft: Draft, keep: Iterable[str]) -> frozenset[str]:
    """Drop the counters of an averaging wrapper and say which there were."""
    for side in SIDE_KEYS:
        others = set(draft.roots) - side.names
        if len(others) < len(draft.roots) and others and others <= side.wrappers.difference(keep):
            sources = [source for source, name in draft.names.items() if name in side.names]
            found = frozenset(draft.names[source] for source in sources)
            draft.drop(sources, SIDE_REASON)
            return found
    return frozenset()


def strip_roots(draft: Draft, keep: Iterable[str]) -> None:
    """Take wrappers off the front where a whole group of keys and its container bear witness to them.

    :raises PlanRefused: several networks lie side by side.
    """
    kept = frozenset(keep)
    side = take_side_keys(draft, kept)
    _drop_underscored_twins(draft)
    _unwrap_average(draft, side, kept)
    inner = take_side_keys(draft, kept)  # those of an averaging wrapper that is an attribute of the trainer itself
    if inner:
        _unwrap_average(draft, inner, kept)
    _strip_module(draft, side | inner, kept)
    _strip_container_model(draft, kept)
    _note_what_is_left(draft, kept)


def _unwrap_average(draft: Draft, side: frozenset[str], kept: frozenset[str]) -> None:
    """Leave the averaged copy alone, without its root."""
    _drop_online_copy(draft, side)
    _refuse_peers(draft)
    _strip_ema_root(draft, side, kept)


def _refuse_peers(draft: Draft) -> None:
    """Refuse where networks lie side by side as equals."""
    for peers in PEER_ROOTS:
        if peers.issubset(draft.roots):
            raise PlanRefused("choose", _choose_message(draft, draft.roots))


def _choose_message(draft: Draft, roots: Iterable[str]) -> str:
    front = "".join(f"{segment}." for segment in draft.rule.leading)
    groups = sorted(roots)
    choices = " or ".join(f"--select {front}{root}" for root in groups if draft.is_group(root))
    return f"{quoted(groups, 8)} lie side by side in one state dict: choose with {choices}, or --keep-prefixes"


def _drop_online_copy(draft: Draft, side: frozenset[str]) -> None:
    """Drop the raw weights beside an average that was asked for as one.

    Source: ema_pytorch.py, ``EMA(include_online_model=True)`` registers both.
    """
    if side and draft.state_dict.role == "ema" and {"ema_model", "online_model"} == set(draft.roots):
        draft.drop(list(draft.below("online_model")), "the raw copy beside the average: --select online_model")


def _drop_underscored_twins(draft: Draft) -> None:
    """Drop the ``ema_a_b_weight`` buffers of mmcv 1.x, each of which is a copy of an ``a.b.weight`` that stays."""
    twins = underscored_twins(draft.listing)
    if twins:
        sources = [source for source, name in draft.names.items() if name in twins]
        draft.drop(sources, "the other half of the averaged weights (mmcv): --weights raw")
        draft.is_ema = True
        if draft.state_dict.role != "ema":
            draft.note("ema-twins", f"{len(sources)} keys ema_* are raw weights, the other keys are EMA: --weights raw")


def _strip_ema_root(draft: Draft, side: frozenset[str], kept: frozenset[str]) -> None:
    """Strip the root of an EMA copy where its counters, or its role in the file, bear witness to it."""
    root = draft.shared_root
    if root not in EMA_ROOTS or root in kept:
        return
    if side or (draft.state_dict.role == "ema" and not is_flattened(draft.listing, root)):
        _strip_root(draft, root, "EMA copy", certain=True)
        _label_ema(draft, f'the weights below "{root}" are an EMA copy')


def _label_ema(draft: Draft, text: str) -> None:
    draft.is_ema = True
    draft.note("ema-weights", text)


def _strip_root(draft: Draft, root: str, name: str, *, certain: bool = False) -> None:
    draft.found(name, root, len(draft.names), "certain" if certain else "assumed")
    draft.strip(root)
    draft.rule = replace(draft.rule, leading=(*draft.rule.leading, root))
    if not certain:
        draft.certainty = "assumed"


def _strip_module(draft: Draft, side: frozenset[str], kept: frozenset[str]) -> None:
    """Strip ``module`` where every key lies below it: once, and once more where an average was wrapped as well."""
    if "module" in kept:
        return
    _strip_assumed_module(draft, "AveragedModel" if "n_averaged" in side else "DataParallel/DDP")
    if "n_averaged" in side:
        _label_ema(draft, 'the counter "n_averaged" says that these weights are an average (AveragedModel)')
        _strip_assumed_module(draft, "DataParallel/DDP")
    _refuse_peers(draft)


def _strip_assumed_module(draft: Draft, name: str) -> None:
    if draft.shared_root == "module":
        draft.note("module-assumed", f'"module." on every key is taken for a wrapper ({name}): --keep module keeps it')
        _strip_root(draft, "module", name)


def _strip_container_model(draft: Draft, kept: frozenset[str]) -> None:
    """Strip ``model`` in the file of a trainer that puts the network there, with losses, metrics and EMA copies.

    :raises PlanRefused: another network lies beside it.
    """
    if not draft.container or "model" in kept or not draft.is_group("model"):
        return
    if draft.is_group("model.diffusion_model"):
        draft.note("latent-diffusion", '"model." belongs to the names of a latent diffusion model and stays')
        return
    owner = CONTAINER_MODULES[draft.container]
    if draft.shared_root == "model":
        what = f'"model." on every key is taken for the attribute of a {owner}: --keep model keeps it'
        draft.note("model-by-container", what)
    else:
        _drop_training_roots(draft)
    _strip_root(draft, "model", owner)
    _refuse_peers(draft)


def _drop_training_roots(draft: Draft) -> None:
    """Drop the losses, metrics and EMA copies beside ``model``.

    :raises PlanRefused: another network lies beside it.
    """
    roots = draft.roots
    reasons = {root: _root_reason(draft, root) for root in roots if root != "model"}
    if not all(reasons.values()):
        raise PlanRefused("choose", _choose_message(draft, [root for root in roots if not reasons.get(root)]))
    for root, reason in reasons.items():
        sources = [source for source, name in draft.names.items() if name == root or under(name, root)]
        draft.drop(sources, reason)
    groups = "|".join(sorted(roots))
    draft.note(f"mixed-roots:{groups}", f'"model." is the network; dropped beside it: {quoted(list(reasons), 8)}')


def _root_reason(draft: Draft, root: str) -> str:
    """Say why the keys below a root are no part of the network; empty where they may be one."""
    if root in EMA_ROOTS:
        return f"an EMA copy of the weights: --select {root}"
    if root in LOSS_ROOTS or root.endswith(LOSS_ENDINGS):
        return "a loss or metric of the training, not of the model"
    if _is_metric_state(draft.below(root)):
        return "the state of a metric (torchmetrics), not of the model"
    return ""


def _is_metric_state(keys: Iterable[str]) -> bool:
    """Tell whether all keys end in state names of torchmetrics, at least one in a name used nowhere else."""
    leaves = {key.rpartition(".")[2] for key in keys}
    return bool(leaves & METRIC_STATES) and leaves <= METRIC_COMPANIONS


def _note_what_is_left(draft: Draft, kept: frozenset[str]) -> None:
    """Say which first segments look like a wrapper but had to stay."""
    root = draft.shared_root
    if root == "module" and root not in kept:
        path = ".".join((*draft.rule.leading, root))
        draft.note("still-module", f'"module." is still on every key: --prefix {path} takes it off as well')
    elif draft.is_group("module") and root != "module" and "module" not in kept:
        below = len(list(draft.below("module")))
        text = f'"module." is on {below} of {len(draft.names)} keys and stays: --like FILE would settle it'
        draft.note("module-on-some-left", text)
    elif draft.container and not draft.rule.leading:
        _note_single_network(draft, kept)


def _note_single_network(draft: Draft, kept: frozenset[str]) -> None:
    """Point at the one root that is no loss, metric or EMA copy: most likely the network's attribute in its trainer."""
    networks = [root for root in draft.roots if not _root_reason(draft, root)]
    if len(networks) != 1 or not draft.is_group(networks[0]) or networks[0] in kept:
        return
    root = networks[0]
    if root == draft.shared_root:
        draft.note("single-root-left", f'every key lies below "{root}.": --prefix {root} takes it off')
    else:
        others = quoted([other for other in draft.roots if other != root])
        text = f'the network seems to be "{root}.", beside {others}: --select {root} takes it alone, without the prefix'
        draft.note("single-root-left", text)
