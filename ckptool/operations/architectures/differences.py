"""What a network has otherwise than an architecture that it is close to, in plain words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from ckptool.layouts.reference import COUNTER, Shape
from ckptool.operations.architectures.index import Index
from ckptool.operations.architectures.matching import Candidate
from ckptool.operations.module_tree import Branch, is_number

_HEADS = frozenset({
    "classifier", "cls", "fc", "head", "heads", "last_linear", "linear", "logits", "out", "output", "pred",
    "prediction", "predictions", "score", "lm_head", "embed_out", "output_projection", "qa_outputs", "proj_head",
    "projector", "fc_norm", "head_dist", "heads_dist", "pre_logits", "classification_head", "aux_classifier",
    "AuxLogits", "aux1", "aux2",
})  # fmt: skip
_POOLER = "pooler."  # at the end of a transformer without a head; of no classes
_STEMS = frozenset({"conv1", "bn1", "conv_stem", "stem", "patch_embed"})
_POSITIONS = re.compile(r"pos(ition)?_?embed(ding)?s?")
_SHAPE_COST, _WRAPPER_COST = 0.5, 1.5  # of one tensor of another name
_SMALL = 4  # tensors of a last module that is a head whatever its name
_STEM_SHARE = 0.1  # of all tensors: a first module that has more is the network itself
_BESIDE = 12  # tensors beside the network that may be a head
_MAX_GROUPS = 6


@dataclass(slots=True)
class Difference:
    """List by path what is only in the architecture (``missing``), only in the file (``added``), or of two shapes.

    ``changed`` holds the architecture's shape, then the file's. ``prefix`` is what stands before every name.
    """

    prefix: str
    missing: dict[str, Shape] = field(default_factory=dict)
    added: dict[str, Shape] = field(default_factory=dict)
    changed: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    regions: dict[str, str] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        """Weigh what differs: a tensor of another name is more than one of another shape, less than a wrapper."""
        missing, added = Counter(map(_top, self.missing)), Counter(map(_top, self.added))
        # One that stands elsewhere in the same module is both missing and added.
        names = sum((missing | added).values())
        return names + _SHAPE_COST * len(self.changed) + _WRAPPER_COST * self.prefix.count(".")

    @property
    def is_at_the_ends(self) -> bool:
        """Tell whether all that differs is the head and the stem."""
        return all(self.regions[path] for path in self.paths())

    def paths(self) -> Iterator[str]:
        """List every path that differs."""
        yield from self.missing
        yield from self.added
        yield from self.changed


def difference(index: Index, candidate: Candidate, root: Branch) -> Difference:
    """Compare a network with a tree of the index, tensor by tensor."""
    wanted = {path: shape for path, shape in index.tensors(candidate.root) if not path.endswith(COUNTER)}
    prefix = "".join(f"{segment}." for segment in candidate.place.prefix)
    own = dict(_listed(root))
    inside = {name[len(prefix) :]: shape for name, shape in own.items() if name.startswith(prefix)}
    beside = {name: shape for name, shape in own.items() if not name.startswith(prefix)}
    found = Difference(prefix)
    found.missing = {path: shape for path, shape in wanted.items() if path not in inside}
    found.added = {path: shape for path, shape in inside.items() if path not in wanted}
    found.changed = {
        path: (shape, inside[path]) for path, shape in wanted.items() if path in inside and inside[path] != shape
    }
    regions = Regions(wanted)
    found.regions = {path: regions.of(path) for path in found.paths()}
    found.regions |= dict.fromkeys(beside, "head" if len(beside) <= _BESIDE else "")
    found.added |= beside
    return found


def _listed(branch: Branch, prefix: str = "") -> Iterator[tuple[str, Shape]]:
    for name, child in branch.below.items():
        if child.leaf is not None and name != COUNTER:
            yield prefix + name, child.leaf.shape
        yield from _listed(child, f"{prefix}{name}.")


class Regions:
    """Tell the head and the stem of an architecture from the network between them."""

    def __init__(self, wanted: Mapping[str, Shape]) -> None:
        tops = Counter(_top(path) for path in wanted)
        weights = [path for path, shape in wanted.items() if shape and len(shape) > 1 and path.endswith("weight")]
        self.heads, self.stem = _HEADS, ""
        if weights:
            first, last = weights[0], _top(weights[-1])
            is_small = tops[_top(first)] <= _STEM_SHARE * len(wanted)
            self.stem = _top(first) + "." if is_small else first.removesuffix("weight")
            self.heads = _HEADS | ({last} if tops[last] <= _SMALL else set())

    def of(self, path: str) -> str:
        """Give ``head``, ``stem``, ``positions`` or, for what lies between, nothing."""
        top = _top(path)
        if top in self.heads:
            return "head"
        if _POSITIONS.search(path):
            return "positions"
        return "stem" if top in _STEMS or (self.stem and path.startswith(self.stem)) else ""


def _top(path: str) -> str:
    return path.partition(".")[0]


def phrases(found: Difference) -> tuple[str, ...]:
    """Say what differs, a phrase for each part of the network."""
    said = [f'prefix: every name lies below "{found.prefix}"'] if found.prefix else []
    for region, say in _SPEAKERS.items():
        parts = list(say(_part(found, region)))
        said += [f"{region}: {', '.join(parts)}"] if parts else []
    return (*said, *_other(_part(found, "")))


def _part(found: Difference, region: str) -> Difference:
    def inside(table: Mapping[str, Shape]) -> dict[str, Shape]:
        return {path: shape for path, shape in table.items() if found.regions[path] == region}

    changed = {path: shapes for path, shapes in found.changed.items() if found.regions[path] == region}
    return Difference(found.prefix, inside(found.missing), inside(found.added), changed)


def _last_weight(shapes: Mapping[str, Shape]) -> tuple[str, tuple[int, ...]] | None:
    weights = [
        (path, shape)
        for path, shape in shapes.items()
        if shape and len(shape) > 1 and path.endswith("weight") and not path.startswith(_POOLER)
    ]
    return (weights[-1][0].removesuffix("weight").rstrip("."), weights[-1][1]) if weights else None


def _head(part: Difference) -> Iterator[str]:
    before = _last_weight(part.missing | {path: shapes[0] for path, shapes in part.changed.items()})
    after = _last_weight(part.added | {path: shapes[1] for path, shapes in part.changed.items()})
    if before and after:
        if before[1][0] != after[1][0]:
            yield f"{before[1][0]} -> {after[1][0]} {_outputs(after[1])}"
        if before[0] != after[0]:
            yield f'"{after[0]}" instead of "{before[0]}"'
        if before[1][1] != after[1][1]:
            yield f"{after[1][1]} instead of {before[1][1]} inputs"
    elif before:
        yield f'"{before[0]}" is missing'
    elif after:
        yield f'"{after[0]}" added, {after[1][0]} {_outputs(after[1])}'
    else:
        yield from _lists(part)


def _outputs(shape: tuple[int, ...]) -> str:
    """Name what a head puts out; the wide convolutions of a detector have outputs for each of several anchors."""
    return "outputs" if max(shape[2:], default=1) > 1 else "classes"


def _stem(part: Difference) -> Iterator[str]:
    for old, new in part.changed.values():
        if old and new and len(old) == len(new) and len(old) > 1:
            yield from _stem_sizes(old, new)
    yield from _lists(Difference("", part.missing, part.added))


def _stem_sizes(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[str]:
    if old[2:] != new[2:]:
        yield f"{'x'.join(map(str, new[2:]))} instead of {'x'.join(map(str, old[2:]))}"
    if old[1] != new[1]:
        yield f"{new[1]} instead of {old[1]} input channels" if old[2:] else f"width {new[1]} instead of {old[1]}"
    if old[0] != new[0]:
        yield f"{new[0]} instead of {old[0]} {'channels' if old[2:] else 'entries'}"


def _positions(part: Difference) -> Iterator[str]:
    for old, new in part.changed.values():
        sizes = [(one, other) for one, other in zip(old or (), new or (), strict=False) if one != other]
        if sizes:
            yield f"{sizes[0][1]} instead of {sizes[0][0]}"
    yield from _lists(Difference("", part.missing, part.added))


def _lists(part: Difference) -> Iterator[str]:
    for paths, what in ((part.missing, "missing"), (part.added, "added")):
        if paths:
            first = next(iter(paths))
            yield f'"{first}" {what}' if len(paths) == 1 else f'"{first}" and {len(paths) - 1} more {what}'


def _other(part: Difference) -> Iterator[str]:
    groups = [
        (module, f"{count} {'tensor' if count == 1 else 'tensors'} {what}")
        for paths, what in ((part.missing, "missing"), (part.added, "added"), (part.changed, "of another shape"))
        for module, count in _by_module(paths)
    ]
    yield from (f'"{module}": {what}' for module, what in groups[:_MAX_GROUPS])
    if len(groups) > _MAX_GROUPS:
        yield f"{len(groups) - _MAX_GROUPS} more modules differ"


def _by_module(paths: Collection[str]) -> Iterator[tuple[str, int]]:
    """Count paths by the shortest front that tells more than one module apart; blocks in a row are one."""
    modules = [path.rpartition(".")[0] or path for path in paths]
    fronts: list[str] = []
    for depth in (1, 2, 3):
        fronts = [".".join(module.split(".")[:depth]) for module in modules]
        if len(set(fronts)) > 1:
            break
    for _, same in groupby(sorted(Counter(fronts).items(), key=_by_number), key=_stack_of):
        blocks = list(same)
        names = [name for name, _ in blocks]
        span = names[0] if len(names) == 1 else f"{names[0]}-{names[-1].rpartition('.')[2]}"
        yield span, sum(count for _, count in blocks)


def _by_number(counted: tuple[str, int]) -> tuple[str, int]:
    above, _, own = counted[0].rpartition(".")
    return (above, int(own)) if is_number(own) else (counted[0], 0)


def _stack_of(counted: tuple[str, int]) -> tuple[str, bool]:
    above, _, own = counted[0].rpartition(".")
    return (above, True) if is_number(own) else (counted[0], False)


_SPEAKERS = {"stem": _stem, "positions": _positions, "head": _head}
