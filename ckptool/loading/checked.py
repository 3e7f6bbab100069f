"""Load what fits of a checkpoint into a model, and keep all that is to be said about the rest."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from ckptool.errors import PlanRefused
from ckptool.layouts.reference import describe, fits
from ckptool.layouts.segments import Names
from ckptool.loading.load import fill
from ckptool.loading.model_names import ModelNames, model_names, own_names
from ckptool.loading.outcome import share_filled
from ckptool.loading.placement import Placement, place
from ckptool.model.inspection import KeySummary, Safety
from ckptool.model.loading import LoadReport
from ckptool.model.plans import KeyMove, KeyOptions, Note
from ckptool.model.values import DictNode
from ckptool.model.verification import VerifyOptions
from ckptool.operations.advice import next_step, shell_quote
from ckptool.operations.opening import OpenedCheckpoint, open_path

WOULD_MATCH = "would-match"
STRIP_COMMAND = "strip-command"
CLEAN_COMMAND = "clean-command"
RENAMED = "renamed"

# What a model computes for itself, by the last segment of its name: index tables, masks, counters, the leavings of a
# profiler. Sources: timm (swin), transformers (BERT, GPT-2, rotary embeddings), thop/profile.py.
_COMPUTED = frozenset(
    {"num_batches_tracked", "position_ids", "token_type_ids", "inv_freq", "masked_bias", "relative_position_index"}
    | {"relative_coords_table", "attn_mask", "causal_mask", "total_ops", "total_params"}
)
_MASK_DIMENSIONS = 4  # the causal mask of GPT-2 is called ``attn.bias``, as are real biases


def load_checked(model: nn.Module, path: str | os.PathLike[str], options: VerifyOptions) -> LoadReport:
    """Load what fits, however little that is, and report what became of every tensor.

    The model's own names and shapes are the reference that the file's names are brought to; with ``as_is`` the two
    must agree by themselves, as in a plain ``load_state_dict``.

    :raises CkptoolError: the file cannot be read, its bytes are damaged, or which weights are meant is open.
    """
    with open_path(path) as opened:
        cleaned = OpenedCheckpoint(opened.checkpoint, options.weights, options.keys)
        view = _as_it_stands(cleaned) if options.as_is else cleaned
        names = own_names(model) if options.as_is else model_names(model)
        placement = place(view, names)
        if options.as_is:
            _forget_aliases(placement, view)
        report = fill(model, names, view, placement, accepts=lambda _report: True)
        notes = tuple(_remedies(report, model_names(model), cleaned)) if options.as_is else ()
        if not (report.matched or notes):
            notes = tuple(_deep_prefix(names, cleaned))
        moves = () if options.as_is else _told_by_model(placement, names, cleaned)
        notes += tuple(_notes(CLEAN_COMMAND, _command(placement, cleaned) if moves else None))
        ignored = tuple(_ignored(report, placement, names, {name for name, _ in model.named_parameters()}))
    return replace(
        report,
        coverage=share_filled(names, placement, {*report.defaulted, *ignored}),
        notes=(*report.notes, *notes, *_renamed(report, names, placement)),
        ignored=ignored,
        on_meta=_on_meta(model),
        renamed=moves,
    )


def _as_it_stands(view: OpenedCheckpoint) -> OpenedCheckpoint:
    keys = replace(view.keys, reference=None, prefix=None, keep_prefixes=True)
    return OpenedCheckpoint(view.checkpoint, view.weights, keys)


def _forget_aliases(placement: Placement, view: OpenedCheckpoint) -> None:
    """Take out what only the metadata of a safetensors file names: a plain loader does not look there."""
    root = view.checkpoint.root
    for name in view.checkpoint.metadata:
        if isinstance(root, DictNode) and name not in root:
            placement.tensors.pop(name, None)


def _on_meta(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta)


# --- what may be absent ---


def _ignored(report: LoadReport, placement: Placement, names: ModelNames, learnt: set[str]) -> Iterator[str]:
    """Yield the names that differ and hold nothing learnt; a parameter of the model always does."""
    for name in (*report.missing, *(item.name for item in report.mismatched), *report.unexpected):
        slot = names.slots.get(name)
        shape = placement.shapes.get(name) if slot is None else slot.shape
        if _is_computed(name, shape) and (slot is None or slot.key not in learnt):
            yield name


def _is_computed(name: str, shape: tuple[int, ...] | None) -> bool:
    parent, _, leaf = name.rpartition(".")
    is_mask = leaf == "bias" and parent.rpartition(".")[2] in ("attn", "attention") and shape is not None
    return leaf in _COMPUTED or (is_mask and shape is not None and len(shape) == _MASK_DIMENSIONS)


# --- what would help ---


def _remedies(report: LoadReport, clean: ModelNames, view: OpenedCheckpoint) -> Iterator[Note]:
    """Say what cleaning the names would bring, and the command that writes them so."""
    placement = place(view, clean)
    is_better = len(placement.tensors) > len(report.matched) and any(_moves(placement))
    if not is_better or not clean.are_own:
        return
    rule, count = placement.plan.rule, len(placement.tensors)
    found = Names(placement.plan.kept).private_segments()  # the rule would remove others, too
    removed = tuple(segment for segment in rule.removed if segment in found)
    way = "renaming as transformers does" if rule.mapping else describe(replace(rule, removed=removed))
    yield Note(WOULD_MATCH, f"{way} would match {count} of {len(clean.slots)} tensors")
    yield from _notes(STRIP_COMMAND, _command(placement, view))


def _told_by_model(placement: Placement, names: ModelNames, view: OpenedCheckpoint) -> tuple[KeyMove, ...]:
    """Give the keys that the model takes under other names, unless the file alone tells the same names."""
    is_told = names.are_own and not _plans_to(view, view.keys, placement.taken)
    return _moves(placement) if is_told else ()


def _moves(placement: Placement) -> tuple[KeyMove, ...]:
    return tuple(KeyMove(key, name) for key, name in placement.taken.items() if key != name)


def _command(placement: Placement, view: OpenedCheckpoint) -> str | None:
    """Give the command that writes the keys under the names that the model takes them under, if there is one."""
    rule = placement.plan.rule
    plain = KeyOptions(select=view.keys.select, keep=view.keys.keep)
    fronts = (None, ".".join(rule.leading)) if rule.leading else (None,)
    ways = [replace(plain, prefix=front, add_prefix=rule.prepended) for front in fronts]
    return next((_strip_command(view, keys) for keys in ways if _plans_to(view, keys, placement.taken)), None)


def _notes(code: str, text: str | None) -> Iterator[Note]:
    if text is not None:
        yield Note(code, text)


def _deep_prefix(names: ModelNames, view: OpenedCheckpoint) -> Iterator[Note]:
    """Look for a path, however deep, below which the model's own names lie."""
    found = Counter(
        key[:end]
        for key, tensor in view.state_dict.tensors.items()
        for end in (dot.start() for dot in re.finditer(r"\.", key))
        if (slot := names.slots.get(key[end + 1 :])) is not None and fits(tensor.shape, slot.shape)
    )
    for prefix, count in found.most_common(1):
        yield Note(WOULD_MATCH, f'stripping "{prefix}." would match {count} of {len(names.slots)} tensors')
        yield Note(STRIP_COMMAND, _strip_command(view, KeyOptions(select=view.keys.select, prefix=prefix)))


def _plans_to(view: OpenedCheckpoint, keys: KeyOptions, wanted: dict[str, str]) -> bool:
    try:
        return wanted.items() <= view.plan_for(keys).kept.items()
    except PlanRefused:
        return False


def _strip_command(view: OpenedCheckpoint, keys: KeyOptions) -> str:
    step = next_step(view.checkpoint, view.selection, KeySummary(already_clean=False), Safety("clean", ()))
    chosen = {
        "--weights": view.weights if view.weights != "main" else "",
        "--select": keys.select,
        "--prefix": keys.prefix,
        "--add-prefix": keys.add_prefix,
    }
    words = "".join(f" {option} {shell_quote(value)}" for option, value in chosen.items() if value)
    return step.command.replace("ckptool strip-prefixes", f"ckptool strip-prefixes{words}", 1)


def _renamed(report: LoadReport, names: ModelNames, placement: Placement) -> Iterator[Note]:
    """Point at tensors that seem to have got other names: each missing one has a single unknown one of its shape."""
    pairs = {}
    for name in report.missing:
        slot = names.slots.get(name)
        leaf = name.rpartition(".")[2]
        alike = [
            other
            for other in report.unexpected
            if slot is not None and placement.shapes.get(other) == slot.shape and other.rpartition(".")[2] == leaf
        ]
        if len(alike) != 1 or alike[0] in pairs:
            return
        pairs[alike[0]] = name
    if pairs:
        old, new = next(iter(pairs.items()))
        text = f'every missing tensor has a single unknown one of its shape and last name ("{new}": "{old}")'
        yield Note(RENAMED, text)
