"""Turn a key plan into a copy plan: which bytes each target tensor is made of, which names share them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptool.errors import OutputRefused
from ckptool.layouts import node_at, packed_scales, rename_key, rename_module_path, whole_tensor
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.conversion import BESIDE, ConvertOptions, Dropped, MadeDense, OutputKind, Tie
from ckptool.model.copies import CopyPlan, PlannedOpaque, PlannedTensor
from ckptool.model.dtypes import DType
from ckptool.model.plans import CLEAN_MARK, KeyPlan, Note, StateDict
from ckptool.model.values import DictNode, OpaqueTensor, Stub, TensorSpec, walk
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
        return self.place(tensor, key) if isinstance(tensor, TensorSpec) else self.place_opaque(tensor, key)

    def place_opaque(self, tensor: OpaqueTensor, key: str, cast: DType | None = None) -> PlannedTensor | PlannedOpaque:
        whole = whole_tensor(tensor)
        dense = whole if isinstance(whole, TensorSpec) else self.policy.dense(tensor, key)
        return self.policy.plan(tensor, key, self.place, cast) if dense is None else self.place(dense, key, cast)

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
    policy = OpaquePolicy(options.densify, options.dequantize, kind)
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
        lost = [*_not_tensors(state_dict, key_plan, tensors), *_beside(checkpoint, state_dict, facts.places)]
    else:
        root = _clean_node(state_dict, key_plan, {**tensors, **kept}, rebuilder)
        if (options.keep_rest or options.in_place) and (key_plan.rule.leading or state_dict.is_clean):
            _mark_clean(root)
        root, lost = _with_rest(checkpoint, state_dict, root, rebuilder, options)
        plan = CopyPlan(tensors, root)
    keys = [Dropped(move.source, move.reason, _nbytes(state_dict.entries[move.source])) for move in key_plan.dropped]
    node = node_at(checkpoint.root, state_dict.path)
    lost = [*lost, *_attributes(node), *_program(checkpoint)]
    module = tuple(_around(node, state_dict))
    return PlannedCopy(
        plan=plan,
        specs=specs,
        dropped=(*keys, *module, *lost, *rebuilder.dropped),
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


def _not_tensors(state_dict: StateDict, key_plan: KeyPlan, tensors: Mapping[str, Any]) -> list[Dropped]:
    return [
        Dropped(source, "not a tensor: a safetensors file holds tensors only")
        for source, target in key_plan.kept.items()
        if target not in tensors and not _says_nothing(state_dict.entries[source])
    ]


def _says_nothing(value: Any) -> bool:
    """Tell whether a value is empty, as ``get_extra_state`` of many modules returns it."""
    return value is None or value == b"" or (isinstance(value, DictNode | list | tuple) and len(value) == 0)


# --- torch ---


def _clean_node(state_dict: StateDict, key_plan: KeyPlan, tensors: Mapping[str, Any], rebuilder: Rebuilder) -> DictNode:
    """Build the state dict under its clean keys, with what is no tensor in it and with torch's ``_metadata``."""
    node = DictNode(type_name="OrderedDict")
    for source, target in key_plan.kept.items():
        losses = len(rebuilder.dropped)
        value = tensors[target] if target in tensors else rebuilder.rebuild(state_dict.entries[source], target)
        if len(rebuilder.dropped) == losses or value is not None:
            node.pairs.append((target, value))
    if isinstance(state_dict.key_metadata, DictNode):
        metadata = rebuilder.rebuild(state_dict.key_metadata, "_metadata")
        node.attributes = DictNode([("_metadata", _renamed_modules(metadata, key_plan))])
    return node


def _mark_clean(node: DictNode) -> None:
    """Say in ``_metadata`` that these names are clean, for the next time that the container is looked at."""
    metadata = node.attributes.get("_metadata") if node.attributes is not None else DictNode(type_name="OrderedDict")
    others = [(path, entry) for path, entry in metadata.pairs if path != ""]
    entry = metadata.get("")
    kept = [pair for pair in entry.pairs if pair[0] != CLEAN_MARK] if isinstance(entry, DictNode) else []
    root = DictNode([*kept, (CLEAN_MARK, True)])
    node.attributes = DictNode([("_metadata", DictNode([("", root), *others], "OrderedDict"))])


def _renamed_modules(metadata: DictNode, key_plan: KeyPlan) -> DictNode:
    """Bring the module paths of ``_metadata`` to clean names; where keys were mapped one by one, by their moves."""
    moved = _moved_modules(key_plan) if key_plan.rule.mapping else None
    renamed = {
        target: entry
        for path, entry in metadata.text_items().items()
        if (target := rename_module_path(key_plan, path) if moved is None else moved.get(path)) is not None
    }
    return DictNode(list(renamed.items()), "OrderedDict")


def _moved_modules(key_plan: KeyPlan) -> dict[str, str]:
    """Tell from the keys below each module where it went: ``model.fc`` to ``fc``, if only its front changed."""
    moved: dict[str, str] = {}
    for source, target in key_plan.kept.items():
        steps, target_steps = source.split("."), target.split(".")
        while steps and target_steps and steps.pop() == target_steps.pop():
            moved[".".join(steps)] = ".".join(target_steps)
    return moved


def _with_rest(
    checkpoint: Checkpoint, state_dict: StateDict, clean: DictNode, rebuilder: Rebuilder, options: ConvertOptions
) -> tuple[Any, list[Dropped]]:
    if not (options.keep_rest or options.in_place):
        return clean, _beside(checkpoint, state_dict, frozenset())
    node = node_at(checkpoint.root, state_dict.path)
    if _unchosen(node, state_dict):
        raise OutputRefused(
            f"{checkpoint.path}: other weights lie in the same mapping as the chosen ones, which therefore cannot keep "
            "the rest of their container; write them without --keep-rest"
        )
    rebuilder.replaced[id(node)] = clean
    return rebuilder.rebuild(checkpoint.root), []


# --- what both tell ---


def _beside(checkpoint: Checkpoint, state_dict: StateDict, carried: frozenset[str]) -> list[Dropped]:
    """List what stands beside the chosen state dict in its container and is not written."""
    dropped = []
    node = checkpoint.root
    for depth, step in enumerate(state_dict.path):
        if not isinstance(node, DictNode):
            break
        for key, value in node.pairs:
            name = ".".join((*state_dict.path[:depth], str(key)))
            if key != step and name not in carried:
                dropped.append(Dropped(name, BESIDE, _nbytes(value)))
        node = node_at(node, (step,))
    unchosen = _unchosen(node, state_dict)
    return [*dropped, *(Dropped(key, "not among the chosen weights", _nbytes(value)) for key, value in unchosen)]


def _unchosen(node: Any, state_dict: StateDict) -> list[tuple[str, Any]]:
    """List what lies in the same mapping as the chosen weights without being one of them (an EMA copy)."""
    chosen = set(map(id, state_dict.entries.values()))
    pairs = node.text_items().items() if isinstance(node, DictNode) else ()
    return [(key, value) for key, value in pairs if id(whole_tensor(value)) not in chosen]


def _attributes(node: Any) -> list[Dropped]:
    """List what is set on the mapping of the chosen weights itself, but for torch's own ``_metadata``."""
    attributes = node.attributes if isinstance(node, DictNode) else None
    pairs = [] if attributes is None else attributes.pairs
    return [
        Dropped(f"__dict__.{key}", "an attribute of a mapping", _nbytes(value))
        for key, value in pairs
        if key != "_metadata"
    ]


def _around(node: Any, state_dict: StateDict) -> Iterable[Dropped]:
    """List the pickled module that the weights were taken out of: its class, and the attributes that are no weights."""
    if isinstance(node, Stub):
        own = {id(value) for entry in state_dict.entries.values() for _, value in walk(entry)}
        others = [value for _, value in walk(node) if isinstance(value, TensorSpec) and id(value) not in own]
        name = ".".join(state_dict.path) or node.ref.name
        reason = f"a pickled module, {node.ref.full_name}: only its state dict is written"
        yield Dropped(name, reason, sum(value.nbytes for value in others))


def _program(checkpoint: Checkpoint) -> Iterable[Dropped]:
    """List the code of a program, which is never written."""
    if any(finding.code == "program" for finding in checkpoint.findings):
        yield Dropped("program", "code: only its tensors are written")


def _nbytes(value: Any) -> int:
    """Sum the dense bytes of all tensors in a value, each once."""
    return sum(node.nbytes for _, node in walk(value) if isinstance(node, TensorSpec))


def _ties(tensors: Mapping[str, PlannedTensor], aliases: Mapping[str, str]) -> tuple[Tie, ...]:
    keepers = {id(tensors[kept]): kept for kept in aliases.values()}
    ties = []
    for name, tensor in tensors.items():
        kept = keepers.setdefault(id(tensor), name)
        if kept != name:
            ties.append(Tie(name, kept, written=name not in aliases))
    return tuple(ties)
