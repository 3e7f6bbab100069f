"""Decisions as data: which state dict is meant, and what its keys become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ckptool.model.values import OpaqueTensor, TensorSpec

Role = Literal["main", "ema", "raw", "peer"]
_TENSORS = (TensorSpec, OpaqueTensor)
Certainty = Literal["certain", "assumed", "reference", "explicit"]


@dataclass(frozen=True, slots=True)
class Note:
    """Say one thing about a decision: a stable ``code`` and one sentence."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Producer:
    """Name what wrote the file, with the evidence (the keys or texts that gave it away).

    ``container`` is the family that the key rules ask for: ``lightning``, ``composer`` or empty.
    """

    name: str
    version: str | None = None
    evidence: str = ""
    container: str = ""


# Stands in the root's entry of ``_metadata`` where a container was kept around clean keys: there, its trainer's habit
# of putting the network below ``model`` is no evidence any more. ``load_state_dict`` reads that entry's version only.
CLEAN_MARK = "ckptool_clean"


@dataclass(frozen=True, slots=True, eq=False)
class StateDict:
    """Point at one state dict of a checkpoint.

    ``path`` is the steps from the root (empty: the root itself). ``entries`` are all its pairs in file order,
    tensors and the rest; ``key_metadata`` is torch's ``_metadata`` attribute, where it is kept. ``is_clean`` says that
    ckptool brought the names to clean ones before (``CLEAN_MARK``). ``unwrapped`` are the keys of distributed tensors
    that are whole on this rank, and stand here as the plain tensors that they are.
    """

    path: tuple[str, ...]
    role: Role
    entries: Mapping[str, Any]
    reason: str = ""
    key_metadata: Any = None
    is_clean: bool = False
    unwrapped: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Join the path with dots; empty for the root."""
        return ".".join(self.path)

    @property
    def tensors(self) -> dict[str, TensorSpec | OpaqueTensor]:
        """Give the entries that are tensors."""
        if set(map(type, self.entries.values())).issubset(_TENSORS):
            return dict(self.entries)
        return {key: value for key, value in self.entries.items() if isinstance(value, _TENSORS)}


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """List the state dicts of a checkpoint and say which one is meant.

    ``chosen`` is None where there is none or several are equal; ``refusal`` then is the sentence (and code)
    with which an operation that needs one refuses.
    """

    producer: Producer
    candidates: tuple[StateDict, ...]
    chosen: StateDict | None
    notes: tuple[Note, ...] = ()
    refusal: Note | None = None


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """Say what the user asked of the keys; the default lets the evidence decide.

    ``reference`` maps the names to be reached to their shapes (None: only the name is known). ``select`` keeps
    a subtree; ``prefix`` is stripped from every key; ``keep`` protects path segments; ``keep_prefixes`` leaves
    all keys as they are. ``include`` and ``exclude`` are globs over clean names. ``rename`` holds (pattern,
    replacement) pairs for ``re.sub``, ``mapping`` source to target names (None drops), ``add_prefix`` is put
    before every clean name, in that order, last.
    """

    reference: Mapping[str, tuple[int, ...] | None] | None = None
    select: str | None = None
    prefix: str | None = None
    keep: tuple[str, ...] = ()
    keep_prefixes: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    mapping: Mapping[str, str | None] | None = None
    rename: tuple[tuple[str, str], ...] = ()
    add_prefix: str = ""


class KeyMove(NamedTuple):
    """Map one source key to its target, or to None with the reason for which it is dropped.

    A named tuple, because 50,000 of them have to cost next to nothing.
    """

    source: str
    target: str | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Wrapper:
    """Name a wrapper found in the keys: who adds it, the segment, on how many of how many keys, how sure."""

    name: str
    segment: str
    count: int
    of: int
    certainty: Certainty


@dataclass(frozen=True, slots=True)
class KeyRule:
    """Say what a plan does to any name of that model: its own keys, optimizer state and module paths alike.

    In this order: ``removed`` segments (a dotted one is a run of segments) go at any depth, ``leading`` ones from
    the front, ``inner`` ones from behind the front, ``prepended`` text is put before. What the user asked for
    follows: ``rename`` and ``mapping`` as in ``KeyOptions``, ``added`` text before everything.
    """

    removed: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    prepended: str = ""
    rename: tuple[tuple[str, str], ...] = ()
    mapping: Mapping[str, str | None] = field(default_factory=dict)
    added: str = ""


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """Say for every key of a state dict what it becomes: the one plan that is printed, dry-run and executed.

    ``moves`` are in file order, one for every entry (tensors and the rest); ``rule`` is what they have in common.
    """

    moves: tuple[KeyMove, ...]
    certainty: Certainty = "certain"
    wrappers: tuple[Wrapper, ...] = ()
    notes: tuple[Note, ...] = ()
    is_ema: bool = False
    rule: KeyRule = field(default_factory=KeyRule)

    @property
    def already_clean(self) -> bool:
        """Tell whether every key stays as it is."""
        return all(move.source == move.target for move in self.moves)

    @property
    def kept(self) -> dict[str, str]:
        """Map source keys to target keys, without the dropped ones."""
        return {move.source: move.target for move in self.moves if move.target is not None}

    @property
    def dropped(self) -> tuple[KeyMove, ...]:
        """List the keys that go, each with its reason."""
        return tuple(move for move in self.moves if move.target is None)
