"""Turn a key plan into a copy plan: which bytes each target tensor is made of, which names share them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptool.errors import OutputRefused
from ckptool.layouts import node_at, packed_scales, rename_key, whole_tensor
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.conversion import ConvertOptions, Dropped, MadeDense, OutputKind, Tie
from ckptool.model.copies import CopyPlan, PlannedOpaque, PlannedTensor
from ckptool.model.dtypes import DType
from ckptool.model.plans import KeyPlan, Note, StateDict
from ckptool.model.values import DictNode, OpaqueTensor, Stub, TensorSpec, walk
from ckptool.operations import left_out
from ckptool.operations.clean_node import clean_node, mark_clean
from ckptool.operations.copy_notes import copy_notes, simplified_notes
from ckptool.operations.entries import refuse_unwritable
from ckptool.operations.facts import CarriedFacts
from ckptool.operations.opaque import OpaquePolicy
from ckptool.operations.rest import Rebuilder
from ckptool.operations.transforms import payload_of

if TYPE_CHECKING:  # NumPy is loaded where a cast is asked for, and nowhere else
    from ckptool.operations.casts import CastTally


Specs = Mapping[str, TensorSpec]
Change = Callable[[Specs, Mapping[str, OpaqueTensor]], tuple[Specs, tuple[Note, ...]]]


@dataclass(frozen=True, slots=True, eq=False)
class PlannedCopy:
    """Hold a copy plan, what it leaves out, and what its casts will have counted once it is written.

    ``specs`` are the source tensors by clean name, ``opaque`` those of them that are written as they are without being
    dense arrays, ``made_dense`` those that became dense. ``foreign`` are the dropped objects of foreign classes among
    ``dropped``, and ``module`` is what the state dict was taken out of, where that is a pickled module; ``flattened``
    are foreign objects of which the fields are kept.
    """

    plan: CopyPlan
    specs: Mapping[str, TensorSpec]
    dropped: tuple[Dropped, ...]
    foreign: tuple[Dropped, ...]
    flattened: tuple[str, ...]
    ties: tuple[Tie, ...]
    tallies: tuple[CastTally, ...]
    notes: tuple[Note, ...]
    opaque: Mapping[str, PlannedOpaque] = field(default_factory=dict)
    made_dense: tuple[MadeDense, ...] = ()
    module: tuple[Dropped, ...] = ()

    @property
    def nbytes(self) -> int:
        """Sum the bytes of the selected tensors, tied ones each time."""
        return sum(tensor.nbytes for tensors in (self.specs, self.opaque) for tensor in tensors.values())

    @property
    def payload_bytes(self) -> int:
        """Sum the bytes of the selected tensors, tied ones once."""
        dense = {tensor.payload for tensor in self.plan.tensors.values()}
        return sum(payload.nbytes for payload in dense) + sum(tensor.nbytes for tensor in self.opaque.values())


@dataclass(slots=True)
class _Placer:
    """Plan one tensor after the other; with ``share``, the same view under two names becomes one planned tensor."""

    share: bool
    policy: OpaquePolicy
    tallies: list[CastTally] = field(default_factory=list)
    _placed: dict[tuple[Any, ...], PlannedTensor] = field(default_factory=dict)

    def place(self, spec: TensorSpec, key: str, cast: DType | None = None) -> PlannedTensor:
        target = cast if cast is not None and spec.dtype.is_floating and spec.dtype != cast else None
        if not self.share or spec.numel == 0:
            return self._plan(spec, key, target)
        identity = (*spec.view_key, target)
        if identity not in self._placed:
            self._placed[identity] = self._plan(spec, key, target)
        return self._placed[identity]

    def place_any(self, tensor: TensorSpec | OpaqueTensor, key: str) -> PlannedTensor | PlannedOpaque:
        """Plan a tensor that is not among the selected ones, of any kind."""
        if isinstance(tensor, TensorSpec):
            return self.place(tensor, key)
        whole = whole_tensor(tensor)
        dense = whole if isinstance(whole, TensorSpec) else self.policy.dense(tensor, key)
        return self.policy.plan(tensor, key, self.place, None) if dense is None else self.place(dense, key)

    def _plan(self, spec: TensorSpec, key: str, target: DType | None) -> PlannedTensor:
        tally = self._tally(key, spec, target) if target is not None else None
        return PlannedTensor(target or spec.dtype, spec.shape, payload_of(spec, key=key, cast=target, tally=tally))

    def _tally(self, key: str, spec: TensorSpec, target: DType) -> CastTally:
        from ckptool.operations.casts import CastTally

        tally = CastTally(key, spec.dtype, target)
        self.tallies.append(tally)
        return tally


def plan_copy(
    checkpoint: Checkpoint,
    state_dict: StateDict,
    key_plan: KeyPlan,
    options: ConvertOptions,
    kind: OutputKind,
    facts: CarriedFacts,
    change: Change | None = None,
) -> PlannedCopy:
    """Plan the bytes of every tensor of the output, in the order of the input.

    ``facts`` is what a safetensors header can carry of the training. ``change`` puts others in the place of the
    tensors, and says what it did.

    :raises UnsupportedTensor: a selected tensor is not one dense array, or its view cannot be written out.
    :raises UnreadableCheckpoint: with ``keep_rest``, the rest cannot be rebuilt as plain data.
    """
    policy = OpaquePolicy(options.densify, options.dequantize, kind, options.foreign == "fields")
    placer = _Placer(options.ties == "keep", policy)
    refuse_unwritable(checkpoint.path, state_dict, key_plan.kept, policy)
    specs, opaque = _selected_tensors(state_dict, key_plan, policy)
    specs, changed = change(specs, opaque) if change is not None else (specs, ())
    scales = packed_scales(specs) if options.dtype is not None else ()
    uncast = {name for name in scales if specs[name].dtype.is_floating}
    tensors = {
        name: placer.place(spec, name, None if name in uncast else options.dtype) for name, spec in specs.items()
    }
    kept = {name: policy.plan(tensor, name, placer.place, options.dtype) for name, tensor in opaque.items()}
    rebuilder = Rebuilder(placer.place_any, lambda name: rename_key(key_plan, name), {}, options.foreign)
    if kind == "safetensors":
        plan = _plan_safetensors(checkpoint, options, tensors, facts)
        lost = left_out.without_tensors(state_dict, key_plan, tensors)
        lost += left_out.beside(checkpoint, state_dict, facts.places)
    else:
        root = clean_node(state_dict, key_plan, {**tensors, **kept}, rebuilder)
        if (options.keep_rest or options.in_place) and (key_plan.rule.leading or state_dict.is_clean):
            mark_clean(root)
        root, lost = _with_rest(checkpoint, state_dict, root, rebuilder, options)
        plan = CopyPlan(tensors, root)
    node = node_at(checkpoint.root, state_dict.path)
    lost = [*lost, *left_out.set_on(node), *left_out.program_of(checkpoint)]
    module = tuple(left_out.around(node, state_dict))
    return PlannedCopy(
        plan=plan,
        specs=specs,
        dropped=(*left_out.dropped_keys(state_dict, key_plan), *module, *lost, *rebuilder.dropped),
        foreign=tuple(rebuilder.dropped),
        flattened=tuple(rebuilder.flattened),
        ties=_ties(tensors, plan.aliases),
        tallies=tuple(placer.tallies),
        notes=(*changed, *copy_notes(specs, plan, uncast), *simplified_notes(rebuilder.simplified)),
        opaque=kept,
        made_dense=tuple(policy.made_dense),
        module=module,
    )


def _selected_tensors(
    state_dict: StateDict, key_plan: KeyPlan, policy: OpaquePolicy
) -> tuple[Specs, dict[str, OpaqueTensor]]:
    """Give the tensors by clean name: those that are dense or become so, and the others."""
    specs: dict[str, TensorSpec] = {}
    opaque: dict[str, OpaqueTensor] = {}
    for source, target in key_plan.kept.items():
        value = state_dict.entries[source]
        dense = policy.dense(value, target) if isinstance(value, OpaqueTensor) else value
        if isinstance(dense, TensorSpec):
            specs[target] = dense
        elif isinstance(value, OpaqueTensor):
            opaque[target] = value
    return specs, opaque


# --- safetensors ---


def _plan_safetensors(
    checkpoint: Checkpoint, options: ConvertOptions, tensors: dict[str, PlannedTensor], facts: CarriedFacts
) -> CopyPlan:
    aliases = _aliases(tensors, options.keys.reference or {})
    written = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    metadata = {"format": "pt", **(_carried(checkpoint) if options.metadata else {}), **facts.text, **aliases}
    return CopyPlan(written, None, metadata, aliases)


def _aliases(tensors: Mapping[str, PlannedTensor], preferred: Iterable[str]) -> dict[str, str]:
    """Choose one name for each payload: one that the reference has, else the first in the file.

    The first is the one that was defined first: an embedding before the head that is tied to it, as Hugging Face's
    loaders expect.
    """
    keepers: dict[int, str] = {}
    for name in sorted(tensors, key=set(preferred).__contains__, reverse=True):
        keepers.setdefault(id(tensors[name]), name)
    return {name: keepers[id(tensor)] for name, tensor in tensors.items() if keepers[id(tensor)] != name}


def _carried(checkpoint: Checkpoint) -> dict[str, str]:
    """Give the text metadata of a safetensors file without its alias entries: those are planned anew."""
    if not checkpoint.is_safetensors:
        return {}
    names = checkpoint.root.text_items()
    return {key: text for key, text in checkpoint.metadata.items() if key in names or text not in names}


# --- torch ---


def _with_rest(
    checkpoint: Checkpoint, state_dict: StateDict, clean: DictNode, rebuilder: Rebuilder, options: ConvertOptions
) -> tuple[Any, list[Dropped]]:
    if not (options.keep_rest or options.in_place):
        return clean, left_out.beside(checkpoint, state_dict, frozenset())
    node = node_at(checkpoint.root, state_dict.path)
    if left_out.unchosen(node, state_dict):
        raise OutputRefused(
            f"{checkpoint.path}: other weights lie in the same mapping as the chosen ones, which therefore cannot keep "
            "the rest of their container; write them without --keep-rest"
        )
    rebuilder.replaced[id(node)] = clean
    rebuilt = rebuilder.rebuild(checkpoint.root)
    _refuse_losing(checkpoint, state_dict, clean, rebuilt, options)
    return rebuilt, []


def _refuse_losing(
    checkpoint: Checkpoint, state_dict: StateDict, clean: DictNode, rebuilt: Any, options: ConvertOptions
) -> None:
    """Refuse to drop an object that the weights lie in.

    :raises OutputRefused: they are lost with it.
    """
    above = [node_at(checkpoint.root, state_dict.path[:depth]) for depth in range(len(state_dict.path))]
    around = next((node for node in above if isinstance(node, Stub)), None)
    if around is not None and not any(node is clean for _, node in walk(rebuilt)):
        fields = "keep its fields with --foreign fields, or " if options.foreign == "drop" else ""
        raise OutputRefused(
            f"{checkpoint.path}: the weights lie inside a pickled {around.ref.full_name}, which is not written; "
            f"{fields}write the weights alone into another file, without --keep-rest"
        )


def _ties(tensors: Mapping[str, PlannedTensor], aliases: Mapping[str, str]) -> tuple[Tie, ...]:
    keepers = {id(tensors[kept]): kept for kept in aliases.values()}
    ties = []
    for name, tensor in tensors.items():
        kept = keepers.setdefault(id(tensor), name)
        if kept != name:
            ties.append(Tie(name, kept, written=name not in aliases))
    return tuple(ties)
