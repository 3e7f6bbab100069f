"""What the parts of the pickle machine share while one pickle is read: its name, its findings, its budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckptool.formats.pickle import limits
from ckptool.model.checkpoint import Finding
from ckptool.model.dtypes import DType
from ckptool.model.values import GlobalRef, GlobalUse, Storage, Stub


class Malformed(Exception):
    """Interrupt the machine: it adds the record and the byte offset and raises the public error."""


class BareStorage(Exception):
    """Interrupt the look over the tree: it holds a storage that belongs to no tensor."""


class Truncated(Malformed):
    """Interrupt the machine where the bytes end before the pickle does."""


@dataclass(frozen=True, slots=True)
class StorageType:
    """Name a storage class of torch; ``dtype`` is None where it holds untyped bytes."""

    name: str
    dtype: DType | None


class PickledStorage(NamedTuple):
    """Answer a persistent id: where the bytes of a storage are, and how they are counted.

    ``dtype`` is the element type of a typed storage, None for an untyped one. ``offset`` and ``numel`` delimit the
    part that is meant, in elements of ``dtype`` (bytes for an untyped one); only the legacy format has offsets.
    """

    storage: Storage
    dtype: DType | None
    offset: int
    numel: int


LoadStorage = Callable[[tuple[Any, ...]], Any]
LoadStorages = Callable[
    [Sequence[StorageType], Sequence[str], Sequence[str], Sequence[int]], "list[PickledStorage] | None"
]
LoadNamed = Callable[[str], Any]
LoadBytes = Callable[[bytes], Any]

DYNAMIC = GlobalRef("<computed>", "<computed>", "dangerous")
_WORST_FIRST = {"dangerous": 0, "unknown": 1, "info": 2, "safe": 3}


class GlobalLog:
    """Collect what pickles name and what is odd about them; nothing that happens later removes an entry."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._uses: dict[tuple[str, str], GlobalUse] = {}
        self._noted: set[str] = set()

    def record(self, ref: GlobalRef, where: str, called: bool) -> None:
        """Add one use; the first place, the worst severity and any call are kept for each name."""
        key = (ref.module, ref.name)
        before = self._uses.get(key)
        if before is not None:
            ref = min(before.ref, ref, key=lambda one: _WORST_FIRST[one.severity])
            where, called = before.where, called or before.called
        self._uses[key] = GlobalUse(ref, where, called)

    def note(self, code: str, text: str) -> None:
        """Add a finding, the first of its kind only: a million odd strings are one fact."""
        if code not in self._noted:
            self._noted.add(code)
            self.findings.append(Finding(code, text))

    def uses(self) -> tuple[GlobalUse, ...]:
        """Give one entry for each name, in the order of first use."""
        return tuple(self._uses.values())


class Reading:
    """Accompany one pickle: ``label`` names it, ``log`` outlives it."""

    __slots__ = ("_copies_left", "label", "log", "stubs")

    def __init__(self, label: str, log: GlobalLog, nbytes: int) -> None:
        self.label = label
        self.log = log
        self.stubs: list[Stub] = []  # all that were ever made: what is thrown away has been called before
        self._copies_left = limits.COPIES + 2 * nbytes

    def note(self, code: str, text: str) -> None:
        """Record what is odd about this pickle."""
        self.log.note(code, f"{self.label}: {text}")

    def note_computed_call(self, where: str) -> None:
        """Record that something is called which has no name in the pickle."""
        self.log.record(DYNAMIC, where, called=True)
        self.note("computed-call", "calls what another call gave it")

    def charge(self, elements: int) -> None:
        """Count elements copied out of a value that a pickle may use any number of times."""
        self._copies_left -= elements
        if self._copies_left < 0:
            raise Malformed("expands far beyond its own size")

    def stub(self, ref: GlobalRef, args: tuple[Any, ...], kwargs: Any = None) -> Stub:
        """Keep a call as data."""
        self.charge(len(args))
        return self.keep(Stub(ref, args, kwargs))

    def keep(self, stub: Stub) -> Stub:
        """Remember a call until the end of the pickle."""
        self.stubs.append(stub)
        return stub

    def misfit(self, ref: GlobalRef, args: tuple[Any, ...]) -> Stub:
        """Keep the call of a known name with arguments that no writer gives it: data, and not to be trusted."""
        doubted = GlobalRef(ref.module, ref.name, "dangerous" if ref.severity == "dangerous" else "unknown")
        self.log.record(doubted, self.label, called=True)
        self.note("unexpected-arguments", f"calls {doubted.full_name} with arguments that torch does not write")
        return self.stub(doubted, args)


Handler = Callable[[Reading, GlobalRef, tuple[Any, ...]], Any]


class Draft:
    """Hold the place of a value that is complete only after BUILD; ``finish`` makes it from the state."""

    __slots__ = ("finish",)

    def __init__(self, finish: Callable[[Any], Any]) -> None:
        self.finish = finish
