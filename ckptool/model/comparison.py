"""What diff is asked for, and what it found: one frozen value per pair of checkpoints, ready for every report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ckptool.model.plans import KeyOptions, Note, Wrapper

Outcome = Literal["same", "close", "changed", "unknown"]
Side = Literal["a", "b", "both"]
Group = Literal["entry", "hyper_parameters", "training", "metadata", "config"]


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """Say what to compare: A is the base, B the other file, and every option is meant for both.

    ``exact_names`` compares the names as they stand in the files; without ``values`` only names, shapes and dtypes are
    compared, and no tensor is read. Two elements are the same within tolerance where
    ``|b - a| <= atol + rtol * |a|``. ``metadata`` asks for hyperparameters, training facts, text metadata and the
    ``config.json`` beside both files, ``tree`` for the sums by module.
    """

    weights: str = "main"
    keys: KeyOptions = field(default_factory=KeyOptions)
    exact_names: bool = False
    values: bool = True
    rtol: float = 0.0
    atol: float = 0.0
    metadata: bool = False
    tree: bool = False

    @property
    def is_exact(self) -> bool:
        """Tell whether only equal numbers are the same."""
        return not (self.rtol or self.atol)


class TensorName(NamedTuple):
    """Name a tensor that only one file has; ``dtype`` is empty and ``shape`` None where they are not known."""

    key: str
    dtype: str
    shape: tuple[int, ...] | None
    elements: int


class KindChange(NamedTuple):
    """Say that a tensor is of another shape, or a dense array in one file and none in the other.

    ``a`` and ``b`` describe both (``float32 64x3x7x7``); ``shape_a`` and ``shape_b`` are None where not known.
    """

    key: str
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    a: str
    b: str


class DTypeChange(NamedTuple):
    """Say that a tensor has another element type; ``same_values`` tells whether every number survived.

    None where the two types cannot be compared as numbers.
    """

    key: str
    a: str
    b: str
    same_values: bool | None


@dataclass(frozen=True, slots=True)
class ValueChange:
    """Tell how the bytes of one tensor differ, and what that means in numbers.

    ``outcome`` is ``same`` (equal numbers in other bytes: the sign of a zero, the bits of a NaN, another dtype),
    ``close`` (within the tolerances), ``changed``, or ``unknown`` (there is nothing to compare). Where there are no
    numbers, in other bytes of a type without them or in what is unknown, the numbers are None and ``detail`` says why.
    ``changed`` counts elements that are not equal, ``beyond`` those out of tolerance, ``broken`` unequal ones that are
    finite in one file at most. NaN equals NaN.

    ``max_abs`` and ``mean_abs`` are of ``|b - a|`` over all elements, ``max_rel`` of ``|b - a| / |a|`` (infinite where
    ``a`` is zero or infinite). An element that became, or was, infinite makes them infinite, NaN makes them NaN.
    ``max_abs`` of integers is an exact integer. ``change_norm`` and ``weight_norm`` are the Euclidean norms of
    ``b - a`` and of ``a`` over the elements that are finite in both; ``cosine`` is the cosine of the angle between
    ``a`` and ``b`` over these, and None where one of them is all zero or any element is broken.
    """

    key: str
    outcome: Outcome
    dtype_a: str
    dtype_b: str
    shape: tuple[int, ...] | None
    elements: int
    changed: int | None = None
    beyond: int | None = None
    broken: int | None = None
    max_abs: float | int | None = None
    mean_abs: float | None = None
    max_rel: float | None = None
    cosine: float | None = None
    change_norm: float | None = None
    weight_norm: float | None = None
    detail: str = ""

    @property
    def relative_change(self) -> float | None:
        """Give the norm of the change over the norm of the weight: NaN or infinite where elements broke."""
        if self.change_norm is None or self.weight_norm is None or self.max_abs is None:
            return None
        if not math.isfinite(self.max_abs):
            return float(self.max_abs)
        return ratio(self.change_norm, self.weight_norm)

    @property
    def is_counter(self) -> bool:
        """Tell whether it counts something, as ``num_batches_tracked`` does: it grows, where weights move."""
        return self.shape == () and self.dtype_a.lstrip("u").startswith("int")


def ratio(change: float, weight: float) -> float:
    """Relate a change to what it changed; infinite where there was nothing."""
    if weight:
        return change / weight
    return math.inf if change else 0.0


class Rename(NamedTuple):
    """Say that the tensor of one name in A has another name in B, with equal dtype, shape and bytes."""

    a: str
    b: str
    elements: int


class Ambiguity(NamedTuple):
    """List names only in A and names only in B that all hold the same tensor: which became which is open."""

    a: tuple[str, ...]
    b: tuple[str, ...]


class FactChange(NamedTuple):
    """Say that one plain value differs: ``path`` leads to it (``optim.betas[0]``).

    ``present`` says which files have it; ``before`` (A) and ``after`` (B) are plain values, None where there is none.
    ``group`` is ``entry`` for what stands among the tensors of the state dict itself, ``config`` for the
    ``config.json`` beside the files.
    """

    group: Group
    path: str
    present: Side
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """Sum up what happened below one module; ``[0-5]`` names equal neighbours of which nothing moved.

    ``moved`` counts tensors with other values, shape or dtype, ``only_in_a`` and ``only_in_b`` those of one file (a
    renamed tensor counts in both). ``tensors`` counts all names of both files. The norms and ``changed`` elements are
    sums over the tensors that were compared as numbers; counters are in no norm. ``key`` is the full name where one
    tensor ends here; ``broken`` counts elements as ``ValueChange`` does.
    """

    name: str
    tensors: int
    moved: int
    only_in_a: int
    only_in_b: int
    elements: int
    changed: int
    change_norm: float
    weight_norm: float
    key: str = ""
    broken: int = 0
    children: tuple[ModuleChange, ...] = ()

    @property
    def is_frozen(self) -> bool:
        """Tell whether nothing below differs."""
        return not (self.moved or self.only_in_a or self.only_in_b)

    @property
    def relative_change(self) -> float:
        """Relate the change to the weights that it changed."""
        return ratio(self.change_norm, self.weight_norm)


@dataclass(frozen=True, slots=True)
class Progressed:
    """Say how far a file was trained, as far as it tells."""

    epoch: int | None = None
    global_step: int | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Hold everything diff says about two checkpoints, A the base and B the other.

    ``names`` are all compared names in the order of A, ``identical`` of them are equal to the bit (0 where values are
    not compared). ``values`` lists the common tensors of one shape whose bytes or dtype differ, the most changed first.
    ``only_in_a`` and ``only_in_b`` do not hold what was ``renamed``. ``entries`` are differences among what is no
    tensor in the state dicts, ``metadata`` those in hyperparameters, training facts and text metadata, None unless
    asked for.
    ``wrappers_a`` and ``wrappers_b`` were taken off the names; ``format_a`` and ``format_b`` are ``Checkpoint.format``.
    """

    path_a: str
    path_b: str
    options: CompareOptions
    names: tuple[str, ...]
    identical: int
    only_in_a: tuple[TensorName, ...] = ()
    only_in_b: tuple[TensorName, ...] = ()
    shape: tuple[KindChange, ...] = ()
    dtype: tuple[DTypeChange, ...] = ()
    values: tuple[ValueChange, ...] = ()
    renamed: tuple[Rename, ...] = ()
    ambiguous: tuple[Ambiguity, ...] = ()
    entries: tuple[FactChange, ...] = ()
    metadata: tuple[FactChange, ...] | None = None
    wrappers_a: tuple[Wrapper, ...] = ()
    wrappers_b: tuple[Wrapper, ...] = ()
    notes: tuple[Note, ...] = ()
    tree: ModuleChange | None = None
    progress_a: Progressed = Progressed()
    progress_b: Progressed = Progressed()
    format_a: str = ""
    format_b: str = ""

    @property
    def changed(self) -> tuple[ValueChange, ...]:
        """List the tensors whose values are not the same, the most changed first."""
        return tuple(value for value in self.values if value.outcome == "changed")

    @property
    def unknown(self) -> tuple[ValueChange, ...]:
        """List the tensors of which nothing can be said: no values are stored, or the types share no numbers."""
        return tuple(value for value in self.values if value.outcome == "unknown")

    @property
    def by_key(self) -> Mapping[str, ValueChange]:
        """Map names to what happened to their values; a name in ``names`` that is missing here is identical."""
        return {value.key: value for value in self.values}

    @property
    def differs(self) -> bool:
        """Tell whether something that counts differs: with a tolerance, another dtype alone does not."""
        structure = (self.only_in_a, self.only_in_b, self.shape, self.renamed, self.entries, self.metadata)
        return any(structure) or bool(self.changed) or (bool(self.dtype) and self.options.is_exact)

    @property
    def same(self) -> bool:
        """Tell whether nothing that counts differs, and nothing is unknown."""
        return not self.differs and not self.unknown

    @property
    def name_map(self) -> Mapping[str, str]:
        """Map the renamed tensors' names in A to those in B, as ``--map`` reads it."""
        return {rename.a: rename.b for rename in self.renamed}


@dataclass(frozen=True, slots=True)
class Drift:
    """Sum up one of several comparisons with the same base: one row of ``diff BASE A B C``.

    ``same`` is None where it could not be told. ``moved`` counts tensors with changed values, of ``tensors`` common
    ones; ``structure`` counts names, shapes and
    dtypes that differ. ``max_abs`` is the largest over all tensors and ``most_changed`` the tensor with the largest
    relative change; ``relative_change`` is the norm of all changes over that of the weights which they changed,
    ``cosine`` the mean over changed tensors weighted by elements (None where there is none). Sizes are of weights:
    counters are in ``moved`` only. ``error`` says why there is no answer.
    """

    path: str
    same: bool | None
    tensors: int = 0
    moved: int = 0
    structure: int = 0
    max_abs: float | int = 0.0
    relative_change: float = 0.0
    cosine: float | None = None
    most_changed: str | None = None
    progress: Progressed = Progressed()
    error: str | None = None


def drift_of(comparison: Comparison) -> Drift:
    """Sum up a comparison in one row."""
    moved = comparison.changed
    measured = [value for value in moved if value.max_abs is not None and not value.is_counter]
    return Drift(
        path=comparison.path_b,
        same=None if comparison.unknown and not comparison.differs else comparison.same,
        tensors=len(comparison.names),
        moved=len(moved),
        structure=sum(map(len, (comparison.only_in_a, comparison.only_in_b, comparison.shape, comparison.dtype)))
        + len(comparison.renamed),
        max_abs=max((value.max_abs for value in measured if value.max_abs is not None), key=severity, default=0.0),
        relative_change=_relative_change(measured),
        cosine=_mean_cosine(measured),
        most_changed=moved[0].key if moved else None,
        progress=comparison.progress_b,
    )


def severity(number: float | int | None) -> tuple[int, float | int]:
    """Order numbers of a change: what is unknown or NaN is worst, then infinity, then the larger one."""
    if number is None or number != number:
        return 1, 0
    return 0, number


def _relative_change(measured: list[ValueChange]) -> float:
    broken = [value.max_abs for value in measured if value.max_abs is not None and not math.isfinite(value.max_abs)]
    if broken:
        return float(max(broken, key=severity))
    change = math.hypot(*(value.change_norm or 0.0 for value in measured))
    return ratio(change, math.hypot(*(value.weight_norm or 0.0 for value in measured)))


def _mean_cosine(measured: list[ValueChange]) -> float | None:
    known = [(value.cosine, value.elements) for value in measured if value.cosine is not None]
    total = sum(elements for _, elements in known)
    return sum(cosine * elements for cosine, elements in known) / total if total else None
