"""Which of the state dicts in a checkpoint is meant."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ckptool.layouts.aliases import with_aliases
from ckptool.layouts.candidates import UNKNOWN_NAME, find_state_dicts, is_optimizer_like, state_dict_at
from ckptool.layouts.composer import with_averages
from ckptool.layouts.inner import inner_candidates
from ckptool.layouts.peft import peft_note
from ckptool.layouts.producers import Layout, has, identify, layout_of, lookup
from ckptool.layouts.roots import LOSS_ENDINGS, LOSS_ROOTS
from ckptool.layouts.segments import Names, quoted
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.plans import Note, Selection, StateDict
from ckptool.model.values import DictNode, OpaqueTensor, Stub, TensorSpec, opaque_inside


def select(checkpoint: Checkpoint, weights: str = "main") -> Selection:
    """List the state dicts and choose one: ``main``, ``ema``, ``raw`` or the dotted path of one.

    What cannot be chosen is no error here: ``refusal`` says why.

    :raises UnreadableCheckpoint: a pickled module nests without end.
    """
    root, producer, layout = checkpoint.root, identify(checkpoint), layout_of(checkpoint.root)
    described = [with_aliases(state_dict, checkpoint.metadata) for state_dict in find_state_dicts(root, layout)]
    found = inner_candidates(with_averages(described, root), producer)
    refusal = _refuse_file(root, layout, found)
    if refusal is None:
        chosen, refusal = _choose(root, found, weights, layout)
    else:
        chosen = None
    if chosen is not None and chosen not in found:
        found.append(chosen)
    notes = (*_notes(chosen, found, weights), *_nameless_notes(root, chosen))
    return Selection(producer, tuple(found), chosen, notes, refusal)


# --- what no choice can settle ---


def _refuse_file(root: Any, layout: Layout | None, found: Sequence[StateDict]) -> Note | None:
    checks = (_zero3, _megatron_slices, _fsdp_shard)
    shard = next((note for check in checks if (note := check(root, layout, found)) is not None), None)
    return shard if shard is not None or found else _no_weights(root, layout)


def _zero3(root: Any, layout: Layout | None, found: Sequence[StateDict]) -> Note | None:
    """Recognise ZeRO stage 3: the tensors of ``module`` are placeholders for what ``param_shapes`` says."""
    if layout is None or layout.name != "DeepSpeed":
        return None
    shapes = _param_shapes(lookup(root, "param_shapes"))
    tensors = next((state_dict.tensors for state_dict in found if state_dict.path == ("module",)), {})
    empty = [key for key, shape in shapes.items() if key in tensors and tensors[key].shape != shape]
    if not empty:
        return None
    return Note(
        "sharded",
        f"{quoted(empty)}: only a placeholder, its values are in the ZeRO-3 files of all ranks; "
        "run zero_to_fp32.py in the checkpoint folder",
    )


def _param_shapes(value: Any) -> dict[str, tuple[int, ...]]:
    groups = value if isinstance(value, list | tuple) else [value]
    return {
        name: tuple(shape)
        for group in groups
        if isinstance(group, DictNode)
        for name, shape in group.text_items().items()
        if isinstance(shape, list | tuple)
    }


def _megatron_slices(root: Any, layout: Layout | None, found: Sequence[StateDict]) -> Note | None:
    if layout is None or layout.name != "Megatron-LM":
        return None
    sizes = [lookup(root, f"args.{name}_model_parallel_size") for name in ("tensor", "pipeline")]
    chunks = [name for state_dict in found if _CHUNK.fullmatch(name := state_dict.name)]
    if len(chunks) > 1 or any(type(size) is int and size > 1 for size in sizes):
        what = quoted([state_dict.name for state_dict in found]) if found else "this file of Megatron-LM"
        return Note(
            "sharded",
            f"{what}: only a slice of the model (pipeline or tensor parallel); merge it with Megatron's tools",
        )
    return None


_CHUNK = re.compile(r"model\d+")


def _fsdp_shard(root: Any, layout: Layout | None, found: Sequence[StateDict]) -> Note | None:
    if layout is not None and layout.name == "fairseq" and lookup(root, "fsdp_metadata") is not None:
        return Note("sharded", "fsdp_metadata says that this is one FSDP shard: consolidate the shards with fairseq")
    return None


def _no_weights(root: Any, layout: Layout | None) -> Note:
    if has(root, "shadow_params"):
        return Note("nameless", "shadow_params is a list of tensors without names: use the model saved beside it")
    if isinstance(root, list | tuple) and any(isinstance(item, TensorSpec | OpaqueTensor) for item in root):
        return Note("nameless", f"the file holds a list of {len(root)} tensors without names: save a state dict")
    what = next((name for test, name in _NO_WEIGHTS if test(root)), _root_type(root))
    return Note("no-weights", f"no model weights in this file, it holds {what}: name the file with the state dict")


_NO_WEIGHTS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda root: isinstance(root, TensorSpec | OpaqueTensor), "a bare tensor"),
    (lambda root: has(root, "optimizer_state_dict"), "an optimizer shard of DeepSpeed ZeRO (run zero_to_fp32.py)"),
    (lambda root: is_optimizer_like(root), "the state of an optimizer"),
    (lambda root: has(root, "optimizers") and has(root, "schedulers"), "a training state of BasicSR"),
    (lambda root: has(root, "_last_lr") or has(root, "base_lrs"), "the state of a learning rate scheduler"),
    (lambda root: has(root, "growth_factor"), "the state of a GradScaler"),
    (lambda root: has(root, "numpy") and has(root, "python"), "the states of random generators"),
    (
        lambda root: has(root, "program_attributes") or has(root, "program_constants"),
        "a program whose tensors are no parameters, as torch.jit.freeze and quantization leave it",
    ),
    (lambda root: has(root, "blobs"), "a Caffe2 model with names of its own (convert it with Detectron2)"),
    (lambda root: isinstance(root, DictNode) and not root.pairs, "an empty mapping"),
)


def _root_type(root: Any) -> str:
    if isinstance(root, Stub):
        return f"a pickled {root.ref.full_name}"
    if isinstance(root, DictNode):
        keys = quoted([str(key) for key, _ in root.pairs], 6)
        return f"a mapping with the keys {keys}, none of them a state dict"
    return f"a value of type {type(root).__name__}"


# --- the choice ---


def _choose(
    root: Any, found: list[StateDict], weights: str, layout: Layout | None
) -> tuple[StateDict | None, Note | None]:
    if weights == "main":
        return _choose_main(found, layout)
    if weights in ("ema", "raw"):
        return _choose_role(found, weights)
    named = next((state_dict for state_dict in found if state_dict.name == weights), None)
    named = named or state_dict_at(root, weights, layout)
    if named is not None:
        return named, None
    return None, Note("not-found", f'no state dict at "{weights}": --weights takes {_listing(found)}')


def _choose_role(found: list[StateDict], role: str) -> tuple[StateDict | None, Note | None]:
    wanted = [state_dict for state_dict in found if state_dict.role == role]
    if not wanted and role == "raw":
        wanted = [state_dict for state_dict in found if state_dict.role == "main"]
    if not wanted:
        return None, Note("not-found", f"no {role} weights in this file: --weights takes {_listing(found)}")
    return _the_one(wanted)


def _choose_main(found: list[StateDict], layout: Layout | None) -> tuple[StateDict | None, Note | None]:
    primary = next(iter(layout.roles), None) if layout is not None else None
    by_habit = [state_dict for state_dict in found if primary is not None and state_dict.name == primary]
    if by_habit:
        return by_habit[0], None
    mains = [state_dict for state_dict in found if state_dict.role == "main"]
    # Without a main one, a network of an unknown name (``classifier`` beside ``encoder``) is as good as a known one.
    others = [state_dict for state_dict in found if state_dict.role == "peer" and not _is_incidental(state_dict, mains)]
    averaged = [state_dict for state_dict in found if state_dict.role == "ema"]
    return _the_one([*mains, *others] or averaged or found)


def _is_incidental(state_dict: StateDict, mains: Sequence[StateDict]) -> bool:
    """Tell a mapping of an unknown name that a main state dict stands above, or whose name is that of a loss."""
    name = state_dict.path[-1].lower() if state_dict.path else ""
    is_loss = name in LOSS_ROOTS or name.endswith(LOSS_ENDINGS)
    return state_dict.reason == UNKNOWN_NAME and (bool(mains) or is_loss)


def _the_one(wanted: list[StateDict]) -> tuple[StateDict | None, Note | None]:
    if len(wanted) == 1:
        return wanted[0], None
    if len({state_dict.path for state_dict in wanted}) == 1:  # several copies in one, each below a root of its own
        roots = [root for state_dict in wanted for root in Names(state_dict.entries).roots]
        choices = " or ".join(f"--select {root}" for root in roots)
        text = f'{quoted(roots, 8)} are equal copies in "{wanted[0].name}": choose with {choices}, without --weights'
        return None, Note("choose", text)
    return None, Note("choose", f"several state dicts are equal candidates: choose with --weights {_listing(wanted)}")


def _listing(found: Sequence[StateDict]) -> str:
    return " or ".join(_summary(state_dict) for state_dict in found[:8]) or "nothing: there is none"


def _summary(state_dict: StateDict) -> str:
    tensors = state_dict.tensors
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    first = next(iter(tensors), "")
    count = "1 tensor" if len(tensors) == 1 else f"{len(tensors)} tensors"
    return f'{state_dict.name or "main"} ({count}, {nbytes} bytes, from "{first}")'


# --- what to say beside it ---


def _notes(chosen: StateDict | None, found: Sequence[StateDict], weights: str) -> list[Note]:
    if chosen is None:
        return []
    notes = []
    if chosen.role == "peer" and weights == "main":
        text = f'"{chosen.name}" is the only state dict; {chosen.reason}, it is taken for the model'
        notes.append(Note("name-assumed", text))
    if chosen.role == "ema" and weights == "main":
        notes.append(Note("ema-weights", f'"{chosen.name}" holds EMA weights ({chosen.reason})'))
    others = [state_dict for state_dict in found if state_dict is not chosen]
    beside = (_note_beside(state_dict, others) for state_dict in others if chosen.role != state_dict.role)
    adapter = peft_note(chosen.entries)
    return [*notes, *beside, *([adapter] if adapter else ()), *_unwritable_notes(chosen)]


def _unwritable_notes(chosen: StateDict) -> list[Note]:
    """Say which entries are no dense arrays, or hold some inside (``_packed_params`` of a quantized layer)."""
    found = [opaque_inside(value) for value in chosen.entries.values() if type(value) is not TensorSpec]
    counts = Counter(tensor.kind for tensor in found if tensor is not None)
    total = len(chosen.entries)
    notes = [Note("not-dense", f"{count} of {total} entries hold {_KINDS[kind]}") for kind, count in counts.items()]
    if chosen.unwrapped:
        text = (
            f"{len(chosen.unwrapped)} distributed tensors are whole on this rank: taken for the plain tensors they hold"
        )
        notes.append(Note("distributed-whole", text))
    return notes


_KINDS = {
    "sparse": "sparse tensors: a .pt file keeps them, --densify gives dense ones",
    "quantized": "quantized tensors: a .pt file keeps them, --dequantize gives float32",
    "nested": "nested tensors, which only a .pt file can keep",
    "meta": "meta tensors, which have a shape and no data",
    "dtensor": "one rank's part of a DTensor, which ckptool does not write",
    "sharded": "one rank's part of a ShardedTensor, which ckptool does not write",
    "subclass": "tensors of a subclass, which ckptool does not write",
    "packed": "tensors of a type that torch does not have, which ckptool does not write",
}


def _note_beside(other: StateDict, others: Sequence[StateDict]) -> Note:
    if other.role in ("ema", "raw"):
        single = sum(state_dict.role == other.role for state_dict in others) == 1
        option = other.role if single else other.name
        label = "EMA" if other.role == "ema" else "raw"
        return Note(f"{other.role}-present", f'{label} weights are also present at "{other.name}": --weights {option}')
    return Note("others-present", f'another state dict is at "{other.name}": --weights {other.name}')


def _nameless_notes(root: Any, chosen: StateDict | None) -> list[Note]:
    """Point at averaged weights that are stored as a list: without names they can be given to nobody."""
    if chosen is None:
        return []
    callbacks = lookup(root, "callbacks")
    lists = {"ema.shadow_params": lookup(root, "ema.shadow_params"), "shadow_params": lookup(root, "shadow_params")}
    if isinstance(callbacks, DictNode):
        lists |= {f"callbacks.{name}": lookup(state, "ema_weights") for name, state in callbacks.text_items().items()}
    return [
        Note("ema-nameless", f'"{path}" holds {len(value)} averaged tensors without names, which cannot be used')
        for path, value in lists.items()
        if isinstance(value, list | tuple) and value
    ]
