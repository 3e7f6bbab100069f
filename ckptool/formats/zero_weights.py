"""The arithmetic of DeepSpeed ZeRO: which stretches of the ranks' flat partitions make up each parameter.

Source: deepspeed/utils/zero_to_fp32.py of 0.19. In stages 1 and 2 the partitions of all ranks, one after the other, are
one vector for each parameter group, and the parameters lie in it one after the other. In stage 3 every parameter is
dealt out in equal parts, the last of them padded, and each rank keeps its parts one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptool.errors import IncompleteCheckpoint, UnreadableCheckpoint
from ckptool.formats.assembly import AssembledSource, Part
from ckptool.formats.shards import some
from ckptool.model.checkpoint import Checkpoint, Finding
from ckptool.model.values import DictNode, Storage, Stub, TensorSpec, row_major

Shapes = Mapping[str, tuple[int, ...]]
_SAVE_AGAIN = "save it again, or run DeepSpeed's zero_to_fp32.py and see what it says"


@dataclass(frozen=True, slots=True)
class RankFile:
    """Name one file of a rank, and what it holds."""

    name: str
    checkpoint: Checkpoint

    @property
    def root(self) -> DictNode:
        """Give its mapping.

        :raises UnreadableCheckpoint: it holds something else.
        """
        if not isinstance(self.checkpoint.root, DictNode):
            raise UnreadableCheckpoint(f"{self.name!r:.100} holds no mapping, as DeepSpeed's files do; get it again")
        return self.checkpoint.root

    @property
    def optimizer(self) -> DictNode:
        """Give the state of its optimizer.

        :raises UnreadableCheckpoint: it has none.
        """
        state = self.root.get("optimizer_state_dict")
        if not isinstance(state, DictNode) or "zero_stage" not in state:
            raise UnreadableCheckpoint(f"{self.name!r:.100} holds no optimizer of DeepSpeed ZeRO; get it again")
        return state


@dataclass(frozen=True, slots=True)
class Consolidated:
    """Hold the weights by name, in the order of the model, what they were cut from, and what is to be said."""

    weights: DictNode
    stage: int
    partitions: frozenset[Storage]
    findings: tuple[Finding, ...]


def consolidate(models: Mapping[int, RankFile], optimizers: Mapping[int, RankFile]) -> Consolidated:
    """Put the fp32 weights of all ranks together; both arguments are by rank.

    :raises IncompleteCheckpoint: the file of a rank is missing.
    :raises UnreadableCheckpoint: the partitions do not fit the shapes of the parameters.
    """
    stage = _stage(optimizers)
    world = _require_ranks(optimizers)
    if stage == 3:
        _require_all(models, world, "model_states")
    first = models[min(models)].root
    groups = _param_shapes(models[min(models)])
    flat = [_partitions(rank, stage) for rank in optimizers.values()]
    _require_equal_groups(flat, list(optimizers.values()), stage)
    shapes = {name: shape for group in groups for name, shape in group.items()}
    if sum(map(len, groups)) != len(shapes):
        raise UnreadableCheckpoint(f"a parameter is in two groups; {_SAVE_AGAIN}")
    paddings = optimizers[min(optimizers)].optimizer.get("param_alignment_paddings")
    stretches = dict(_deal(shapes, flat) if stage == 3 else _cut(groups, flat, paddings))
    trained = {name: _tensor(name, shapes[name], parts) for name, parts in stretches.items()}
    frozen = _frozen(models, stage)
    buffers = _buffers(first)
    found = {**buffers, **frozen, **trained}
    found |= {name: found[source] for name, source in _shared(first) if source in found}
    left = _left_in_model(first, found) if stage < 3 else {}
    found |= left
    ordered = _in_order_of(first.get("module"), found)
    weights = DictNode(list(ordered.items()), "OrderedDict")
    partitions = frozenset(spec.storage for rank in flat for spec in rank)
    return Consolidated(weights, stage, partitions, tuple(_findings(stage, world, found, left)))


# --- what the files say ---


def _integer(value: Any) -> int | None:
    """Read a number, or an enumeration's member, whose class is called with it."""
    if isinstance(value, Stub) and len(value.args) == 1:
        value = value.args[0]
    return value if type(value) is int else None


def _stage(optimizers: Mapping[int, RankFile]) -> int:
    stages = {_integer(rank.optimizer.get("zero_stage")) for rank in optimizers.values()}
    stage = stages.pop() if len(stages) == 1 else None
    if stage not in (1, 2, 3):
        raise UnreadableCheckpoint(
            "its files do not agree on a stage of ZeRO that there is; get them all from one save"
        )
    return stage


def _require_ranks(optimizers: Mapping[int, RankFile]) -> int:
    """Hold the files against the number of ranks that each of them states."""
    counts = {_count(rank) for rank in optimizers.values()}
    if len(counts) > 1:
        raise UnreadableCheckpoint(f"its files are of {sorted(counts)} ranks; take away those of another save")
    world = counts.pop()
    _require_all(optimizers, world, "optim_states")
    return world


def _count(rank: RankFile) -> int:
    value = rank.optimizer.get("partition_count")
    counts = [_integer(one) for one in (value if isinstance(value, list | tuple) else [value])]
    known = [count for count in counts if count is not None and count > 0]
    if not known or len(known) < len(counts):
        raise UnreadableCheckpoint(f"{rank.name!r:.100} does not say in how many partitions it is split; {_SAVE_AGAIN}")
    return max(known)


def _require_all(files: Mapping[int, RankFile], world: int, what: str) -> None:
    missing = [rank for rank in range(world) if rank not in files]
    if missing:
        names = some(f"zero_pp_rank_{rank}_mp_rank_00_{what}.pt" for rank in missing)
        raise IncompleteCheckpoint(f"{len(missing)} of {world} files are not there ({names}); get them, too")
    if len(files) > world:
        extra = some(file.name for rank, file in files.items() if rank >= world)
        raise UnreadableCheckpoint(f"{world} ranks saved it, and there is {extra}; take away what is of another save")


def _param_shapes(model: RankFile) -> list[dict[str, tuple[int, ...]]]:
    value = model.root.get("param_shapes")
    groups = value if isinstance(value, list | tuple) else [value]
    if not groups or not all(isinstance(group, DictNode) for group in groups):
        raise UnreadableCheckpoint(f"{model.name!r:.100} does not say the shapes of its parameters; {_SAVE_AGAIN}")
    return [_shapes(model, group) for group in groups]


def _shapes(model: RankFile, group: DictNode) -> dict[str, tuple[int, ...]]:
    shapes = group.text_items()
    if len(shapes) != len(group.pairs) or not all(map(_is_shape, shapes.values())):
        raise UnreadableCheckpoint(f"{model.name!r:.100} states what is no shape of a parameter; {_SAVE_AGAIN}")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _partitions(rank: RankFile, stage: int) -> list[TensorSpec]:
    name = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    found = rank.optimizer.get(name)
    if not isinstance(found, list | tuple) or not all(map(_is_flat, found)):
        raise UnreadableCheckpoint(f"{rank.name!r:.100} holds no flat partitions ({name}); {_SAVE_AGAIN}")
    return list(found)


def _is_flat(value: Any) -> bool:
    return isinstance(value, TensorSpec) and len(value.shape) == 1 and _is_plain(value)


def _is_plain(spec: TensorSpec) -> bool:
    return spec.is_contiguous and not (spec.conj or spec.neg or spec.storage.big_endian)


def _require_equal_groups(flat: Sequence[Sequence[TensorSpec]], ranks: Sequence[RankFile], stage: int) -> None:
    """Demand as many partitions of every rank; below stage 3 the last rank's may be shorter, without padding."""
    for groups, rank in zip(flat, ranks, strict=True):
        alike = [(one.dtype, one.numel if stage == 3 else 0) for one in groups]
        if alike != [(one.dtype, one.numel if stage == 3 else 0) for one in flat[0]]:
            raise UnreadableCheckpoint(f"{rank.name!r:.100} has other partitions than the first rank; {_SAVE_AGAIN}")


# --- the arithmetic ---

_Stretch = tuple[TensorSpec, int, int]  # a flat tensor, and the first element and the number of them in it


def _cut(
    groups: Sequence[Shapes], flat: Sequence[Sequence[TensorSpec]], paddings: Any
) -> Iterator[tuple[str, list[_Stretch]]]:
    """Cut the parameters of stages 1 and 2 out of the joined partitions of each group."""
    if len(groups) != len(flat[0]):
        raise UnreadableCheckpoint(
            f"it has {len(groups)} parameter groups and {len(flat[0])} partitions; {_SAVE_AGAIN}"
        )
    align = 2 * len(flat)
    for index, shapes in enumerate(groups):
        pieces = [rank[index] for rank in flat]
        gaps = _paddings(paddings, index, len(shapes))
        place = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            numel = math.prod(shape)
            yield name, list(_within(name, pieces, place, numel))
            place += numel + gap
        held = sum(piece.numel for piece in pieces)
        # What the tail is padded to depends on the optimizer that was alive; it is less than one unit of alignment.
        if -(-place // align) != -(-held // align):
            raise UnreadableCheckpoint(
                f"parameters of {place:,} elements do not fit partitions of {held:,}; {_SAVE_AGAIN}"
            )


def _paddings(value: Any, index: int, count: int) -> Sequence[int]:
    if value is None:
        return [0] * count
    found = value[index] if isinstance(value, list | tuple) and index < len(value) else None
    if (
        not isinstance(found, list | tuple)
        or len(found) != count
        or not all(type(gap) is int and gap >= 0 for gap in found)
    ):
        raise UnreadableCheckpoint(f"its param_alignment_paddings do not fit its parameters; {_SAVE_AGAIN}")
    return found


def _deal(shapes: Shapes, flat: Sequence[Sequence[TensorSpec]]) -> Iterator[tuple[str, list[_Stretch]]]:
    """Collect the parts of stage 3: each rank has as many elements of a parameter, and the last ones are padding."""
    world, place = len(flat), 0
    for name, shape in shapes.items():
        left, share = math.prod(shape), -(-math.prod(shape) // world)
        stretches: list[_Stretch] = []
        for groups in flat:
            stretches += _within(name, groups, place, min(share, left))
            left -= min(share, left)
        yield name, stretches
        place += share
    held = sum(group.numel for group in flat[0])
    if place != held:
        raise UnreadableCheckpoint(
            f"parameters of {place:,} elements a rank do not fit partitions of {held:,}; {_SAVE_AGAIN}"
        )


def _within(name: str, pieces: Sequence[TensorSpec], start: int, count: int) -> Iterator[_Stretch]:
    """Find ``count`` elements from ``start`` on in what the pieces hold one after the other."""
    for piece in pieces:
        taken = max(0, min(piece.numel - start, count))
        if taken and start < piece.numel:
            yield piece, start, taken
            count -= taken
        start = max(0, start - piece.numel)
    if count:
        raise UnreadableCheckpoint(f"the partitions end within {name!r:.100}; {_SAVE_AGAIN}")


def _tensor(name: str, shape: tuple[int, ...], stretches: Sequence[_Stretch]) -> TensorSpec:
    """Describe a tensor that is stretches of others, back to back."""
    dtype = stretches[0][0].dtype if stretches else None
    if dtype is None:
        raise UnreadableCheckpoint(f"the parameter {name!r:.100} has no elements; {_SAVE_AGAIN}")
    boxes, place = [], 0
    for spec, start, count in stretches:
        nbytes = count * dtype.itemsize
        boxes.append(Part((place,), (nbytes,), spec.storage.source, (spec.offset + start) * dtype.itemsize))
        place += nbytes
    label = f"{stretches[0][0].storage.source.label}: {name}"
    storage = Storage(name, AssembledSource(label, (place,), tuple(boxes)), place)
    return TensorSpec(dtype, shape, row_major(shape), 0, storage, is_parameter=True, requires_grad=True)


# --- what is not partitioned, or otherwise ---


def _mapping(root: DictNode, name: str) -> dict[str, Any]:
    value = root.get(name)
    return value.text_items() if isinstance(value, DictNode) else {}


def _frozen(models: Mapping[int, RankFile], stage: int) -> dict[str, TensorSpec]:
    """Give the parameters that were not trained: whole in stages 1 and 2, dealt out over the model files in stage 3."""
    ranks = [_mapping(rank.root, "frozen_param_fragments") for rank in models.values()]
    shapes = _mapping(models[min(models)].root, "frozen_param_shapes")
    frozen = {}
    for name, shape in shapes.items():
        kept = [fragments.get(name) for fragments in (ranks if stage == 3 else ranks[:1])]
        pieces = [piece for piece in kept if isinstance(piece, TensorSpec) and _is_plain(piece)]
        if not _is_shape(shape) or len(pieces) < len(kept):
            raise UnreadableCheckpoint(f"it holds no values of the frozen parameter {name!r:.100}; {_SAVE_AGAIN}")
        frozen[name] = _tensor(name, tuple(shape), list(_within(name, pieces, 0, math.prod(shape))))
    return frozen


def _buffers(root: DictNode) -> dict[str, TensorSpec]:
    names = root.get("buffer_names")
    listed = names if isinstance(names, list | tuple) else getattr(names, "items", ())
    wanted = {name for name in listed if type(name) is str}
    return {name: value for name, value in _mapping(root, "module").items() if name in wanted}


def _left_in_model(root: DictNode, found: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Give the parameters that no optimizer has: in stage 1 DeepSpeed says nothing else of frozen ones."""
    entries = _mapping(root, "module").items()
    return {name: value for name, value in entries if name not in found and isinstance(value, TensorSpec)}


def _shared(root: DictNode) -> Iterator[tuple[str, str]]:
    pairs = root.get("shared_params")
    for name, source in pairs.pairs if isinstance(pairs, DictNode) else ():
        if type(name) is str and type(source) is str:
            yield name, source


def _in_order_of(module: Any, found: dict[str, Any]) -> dict[str, Any]:
    order = module.text_items() if isinstance(module, DictNode) else {}
    return {name: found[name] for name in (*(name for name in order if name in found), *found)}


def _findings(stage: int, world: int, found: Mapping[str, Any], left: Mapping[str, Any]) -> Iterator[Finding]:
    text = f"the fp32 weights of {world} rank{'s' if world > 1 else ''} of ZeRO stage {stage} were put together"
    yield Finding("consolidated", text)
    if left:
        text = (
            f"no partition holds {some(left)} (not trained): taken as the model has them, which zero_to_fp32.py drops"
        )
        yield Finding("not-partitioned", text)
    dtypes = {value.dtype for value in found.values() if isinstance(value, TensorSpec) and value.dtype.is_floating}
    if len(dtypes) > 1:
        text = "what is not partitioned keeps its element type, which zero_to_fp32.py casts: --dtype float32 does, too"
        yield Finding("not-cast", text)
