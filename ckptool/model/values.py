"""What a checkpoint holds once it is read as data: tensors described, plain values, stubs for the rest.

A value is one of: None, bool, int, float, complex, str, bytes, list, tuple, ``DictNode``, ``SetNode``, ``DType``,
``TensorSpec``, ``OpaqueTensor``, ``GlobalRef``, ``Stub``. Trees may share nodes and may hold cycles: walk them with
``walk``, never by plain recursion.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ckptool.model.dtypes import DType
from ckptool.model.sources import ByteSource

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: bool) -> Any:
        return lambda decorator: decorator


Severity = Literal["safe", "info", "unknown", "dangerous"]
Kind = TypeVar("Kind")

MOST_DIMENSIONS = 64  # of a tensor: NumPy makes none with more, and torch reduces none


@dataclass_transform(frozen_default=True, eq_default=False)
def _frozen_when_checked(kind: type[Kind]) -> type[Kind]:
    """Make a dataclass that the type checker alone keeps frozen: while it runs, that would triple its cost.

    For what a checkpoint holds by the ten thousand; its identity is what makes it equal.
    """
    return dataclass(slots=True, eq=False)(kind)


@_frozen_when_checked
class Storage:
    """Describe the bytes that one or more tensors are views of; two tensors are tied by the identity of this.

    ``nbytes`` is what the container holds for it. ``location`` is where it lived when it was saved (``cuda:7``): a
    fact to show, never obeyed.
    """

    key: str
    source: ByteSource
    nbytes: int
    location: str = "cpu"
    big_endian: bool = False


@functools.lru_cache(maxsize=4096)  # a network has many tensors, and few shapes
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give the strides of a contiguous tensor as torch computes them, in elements."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()


@_frozen_when_checked
class TensorSpec:
    """Describe one dense tensor as a view of its storage.

    ``offset`` and ``stride`` count elements, as in torch. ``conj`` and ``neg`` are torch's lazy bits: the bytes are
    those before conjugation or negation. Already checked: the view lies inside its storage.
    """

    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: Storage
    conj: bool = False
    neg: bool = False
    requires_grad: bool = False
    is_parameter: bool = False
    is_numpy: bool = False

    @property
    def numel(self) -> int:
        """Count the elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Give the dense size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Tell whether the elements lie row-major without gaps (dimensions of size 1 have no say)."""
        if self.stride == row_major(self.shape):
            return True
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size == 0:
                return True
            if size != 1:
                if stride != expected:
                    return False
                expected *= size
        return True

    @property
    def view_key(self) -> tuple[Any, ...]:
        """Identify the very same values: two specs with equal keys are one tensor under two names."""
        return (
            id(self.storage), self.dtype.name, self.offset, self.shape, self.stride, self.conj, self.neg,
        )  # fmt: skip


def stored_bytes(spec: TensorSpec) -> int:
    """Give the size of a part in bytes as stored: packed quantized codes take less than a byte each."""
    return min(spec.nbytes, spec.storage.nbytes) if spec.dtype.kind == "quantized" else spec.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class OpaqueTensor:
    """Describe a tensor that is not one dense array: listed by inspect, named when it is refused.

    ``kind`` is ``sparse``, ``quantized``, ``nested``, ``meta``, ``subclass``, ``dtensor``, ``sharded``;
    ``detail`` says more in a word or two (``COO``, the class name). ``parts`` are the values it is made of, by
    name.
    """

    kind: str
    detail: str
    dtype: DType | None
    shape: tuple[int, ...] | None
    parts: tuple[tuple[str, Any], ...] = ()

    @property
    def nbytes(self) -> int:
        """Sum the dense parts in bytes."""
        dense = sum(stored_bytes(part) for _, part in self.parts if isinstance(part, TensorSpec))
        return dense + sum(part.nbytes for _, part in self.parts if isinstance(part, OpaqueTensor))


class DictNode:
    """Hold a pickled mapping as pairs: no foreign key is ever hashed, order is kept, attributes stay data.

    ``type_name`` is ``dict``, ``OrderedDict``, ``defaultdict`` or ``Counter``; ``attributes`` is what a pickle
    BUILDs onto it (``_metadata`` of a state dict). Text keys can be looked up; they are unique, the reader
    sees to it.
    """

    __slots__ = ("_index", "_indexed", "attributes", "pairs", "type_name")

    def __init__(self, pairs: list[tuple[Any, Any]] | None = None, type_name: str = "dict") -> None:
        self.pairs: list[tuple[Any, Any]] = [] if pairs is None else pairs
        self.type_name = type_name
        self.attributes: DictNode | None = None
        self._index: dict[str, Any] = {}
        self._indexed = 0  # how many pairs the index has seen: keys that are no text are not in it

    def _by_text(self) -> dict[str, Any]:
        if self._indexed != len(self.pairs):
            self._indexed = len(self.pairs)
            self._index = {key: value for key, value in self.pairs if type(key) is str}
        return self._index

    def get(self, key: str, default: Any = None) -> Any:
        """Look a text key up."""
        return self._by_text().get(key, default)

    def text_items(self) -> dict[str, Any]:
        """Give the pairs whose key is text, in file order."""
        return dict(self._by_text())

    def __contains__(self, key: str) -> bool:
        return key in self._by_text()

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        return f"DictNode({self.type_name}, {len(self.pairs)} pairs)"


class SetNode:
    """Hold a pickled set or frozenset as a list: no foreign value is ever hashed."""

    __slots__ = ("items", "type_name")

    def __init__(self, items: list[Any], type_name: str = "set") -> None:
        self.items = items
        self.type_name = type_name


@dataclass(frozen=True, slots=True)
class GlobalRef:
    """Name something that a pickle refers to and that is never looked up: ``module`` and ``name`` as written."""

    module: str
    name: str
    severity: Severity

    @property
    def full_name(self) -> str:
        """Join the two for display."""
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Stub:
    """Stand in for an object of a class that is never imported; keeps what the class carried.

    ``args`` and ``kwargs`` are what the constructor or function would have been called with, ``state`` what
    BUILD would have set, ``items`` and ``pairs`` what would have been appended or set.
    """

    ref: GlobalRef
    args: tuple[Any, ...] = ()
    kwargs: Any = None
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def fields(self) -> DictNode | None:
        """Give the instance attributes where the state is a mapping (or the usual pair of dict and slots)."""
        if isinstance(self.state, DictNode):
            return self.state
        if isinstance(self.state, tuple) and len(self.state) == 2:
            dicts = [part for part in self.state if isinstance(part, DictNode)]
            if dicts and all(part is None or isinstance(part, DictNode) for part in self.state):
                return DictNode([pair for part in dicts for pair in part.pairs])
        return None


@dataclass(frozen=True, slots=True)
class GlobalUse:
    """Record that a pickle names a global: where (record, byte offset of the first use), and whether it is called."""

    ref: GlobalRef
    where: str
    called: bool


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values directly under one, each with the step that leads there (``.name`` or ``[3]``)."""
    if isinstance(value, DictNode):
        for key, child in value.pairs:
            yield (f".{key}" if type(key) is str else f"[{key!r}]" if type(key) is int else "[?]"), child
            if type(key) not in (str, int):
                yield "[key]", key
        if value.attributes is not None:
            yield ".__dict__", value.attributes
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield f"[{index}]", child
    elif isinstance(value, SetNode):
        for index, child in enumerate(value.items):
            yield f"{{{index}}}", child
    elif isinstance(value, OpaqueTensor):
        for name, child in value.parts:
            yield f".{name}", child
    elif isinstance(value, Stub):
        for index, child in enumerate(value.args):
            yield f"({index})", child
        if value.kwargs is not None:
            yield "(**)", value.kwargs
        fields = value.fields
        if fields is not None:
            yield from children(fields)
        elif value.state is not None:
            yield ".__state__", value.state
        for index, child in enumerate(value.items):
            yield f"[{index}]", child
        for key, child in value.pairs:
            yield f"[{key!r}]" if isinstance(key, str | int) else "[?]", child


_CONTAINERS = (DictNode, list, tuple, SetNode, OpaqueTensor, Stub)


def opaque_inside(value: Any) -> OpaqueTensor | None:
    """Give the value itself or the first one inside it that is a tensor but no dense array (a quantized layer's)."""
    if isinstance(value, TensorSpec):
        return None
    return next((node for _, node in walk(value) if isinstance(node, OpaqueTensor)), None)


def walk(root: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every distinct node under ``root`` once, parents first, in file order, with the steps that lead there.

    Iterative and by identity: shared nodes and cycles cost nothing. Plain leaves (numbers, text) are not yielded.
    """
    seen: set[int] = set()
    stack: list[tuple[tuple[str, ...], Any]] = [((), root)]
    while stack:
        path, value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield path, value
        if isinstance(value, _CONTAINERS):
            below = [
                ((*path, step), child)
                for step, child in children(value)
                if isinstance(child, (*_CONTAINERS, TensorSpec, GlobalRef))
            ]
            stack.extend(reversed(below))
