"""Keep a container around its cleaned state dict: everything plain stays, nothing foreign is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ckptool.errors import UnreadableCheckpoint
from ckptool.model.conversion import Dropped
from ckptool.model.copies import PlannedOpaque, PlannedTensor
from ckptool.model.dtypes import DType
from ckptool.model.values import DictNode, GlobalRef, OpaqueTensor, SetNode, Stub, TensorSpec

MAX_DEPTH = 256
_PLAIN = (bool, int, float, complex, str, bytes, DType)
_KEYS = (type(None), *_PLAIN)
# MultiStepLR keeps its milestones in a Counter.
_WRITABLE = {"OrderedDict": "OrderedDict", "Counter": "Counter"}
_GONE = object()  # what stands for a value that is dropped, until its container leaves it out


@dataclass(slots=True)
class Rebuilder:
    """Rebuild a value tree with planned tensors and without foreign objects; ``dropped`` lists what went,
    ``flattened`` the places of foreign objects of which the fields were kept, ``simplified`` by kind the places of what
    no loader takes and a plainer value stands for.

    ``place`` plans one tensor; ``replaced`` maps the identity of a node to what takes its place (the clean state dict);
    ``rename`` gives the clean spelling of a parameter name.
    """

    place: Callable[[TensorSpec | OpaqueTensor, str], PlannedTensor | PlannedOpaque]
    rename: Callable[[str], str]
    replaced: dict[int, Any]
    foreign: Literal["drop", "fields"] = "drop"
    dropped: list[Dropped] = field(default_factory=list)
    flattened: list[str] = field(default_factory=list)
    simplified: dict[str, list[str]] = field(default_factory=dict)
    _done: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    _open: set[int] = field(default_factory=set)

    def rebuild(self, value: Any, path: str = "") -> Any:
        """Rebuild one tree.

        :raises UnsupportedTensor: it holds a tensor that cannot be written.
        :raises UnreadableCheckpoint: it is nested too deeply, or holds itself.
        """
        built = self._build(value, path, 0)
        return None if built is _GONE else built

    def _build(self, value: Any, path: str, depth: int) -> Any:
        if id(value) in self.replaced:
            return self.replaced[id(value)]
        if value is None or type(value) in _PLAIN:
            return value
        if isinstance(value, TensorSpec | OpaqueTensor):
            if isinstance(value, TensorSpec) and value.is_numpy:
                self._simplify("a NumPy array becomes a tensor", path)
            return self.place(value, path)
        if id(value) not in self._done:
            self._enter(value, path, depth)
            # The node is kept beside what it became: an identity is only its own while the object lives.
            self._done[id(value)] = (value, self._container(value, path, depth + 1))
            self._open.discard(id(value))
        elif self._done[id(value)][1] is _GONE:  # a foreign object that stands here, too
            self._container(value, path, depth + 1)
        return self._done[id(value)][1]

    def _enter(self, value: Any, path: str, depth: int) -> None:
        if id(value) in self._open or depth > MAX_DEPTH:
            problem = "holds itself" if id(value) in self._open else f"is nested deeper than {MAX_DEPTH}"
            raise UnreadableCheckpoint(f"{path} {problem}: write the weights alone, without --keep-rest")
        self._open.add(id(value))

    def _simplify(self, how: str, path: str) -> None:
        self.simplified.setdefault(how, []).append(path)

    def _container(self, value: Any, path: str, depth: int) -> Any:
        if isinstance(value, DictNode):
            return self._dict(value, path, depth)
        if isinstance(value, SetNode):
            if value.type_name == "frozenset":
                self._simplify("a frozenset becomes a set", path)
            return SetNode(self._set_items(value, path), value.type_name)
        if isinstance(value, list):
            return self._items(value, path, depth)
        if isinstance(value, tuple):
            return tuple(self._items(value, path, depth))
        return self._foreign(value, path, depth)

    def _dict(self, node: DictNode, path: str, depth: int) -> DictNode:
        pairs = self._optimizer_pairs(node) if "state" in node and "param_groups" in node else node.pairs
        built = DictNode(type_name=_WRITABLE.get(node.type_name, "dict"))
        if built.type_name != node.type_name:
            self._simplify(f"a {node.type_name} becomes a dict", path)
        for key, child in pairs:
            below = f"{path}.{_spelt(key)}" if path else _spelt(key)
            value = _GONE
            if _is_key(key):
                value = self._build(child, below, depth)
            else:
                self.dropped.append(Dropped(below, "its key is no plain value"))
            if value is not _GONE:
                built.pairs.append((key, value))
        if node.attributes is not None:
            built.attributes = self._attributes(node.attributes, path, depth)
        return built

    def _attributes(self, attributes: DictNode, path: str, depth: int) -> DictNode | None:
        """Keep torch's ``_metadata`` of a state dict that lies beside the chosen one; nothing else can be set again."""
        kept = [pair for pair in attributes.pairs if pair[0] == "_metadata"]
        others = [key for key, _ in attributes.pairs if key != "_metadata"]
        self.dropped += [Dropped(f"{path}.__dict__.{key}", "an attribute of a mapping") for key in others]
        return self._dict(DictNode(kept), f"{path}.__dict__", depth) if kept else None

    def _set_items(self, node: SetNode, path: str) -> list[Any]:
        for index, item in enumerate(node.items):
            if not _is_key(item):
                self.dropped.append(Dropped(f"{path}{{{index}}}", "an item of a set that is no plain value"))
        return [item for item in node.items if _is_key(item)]

    def _items(self, items: list[Any] | tuple[Any, ...], path: str, depth: int) -> list[Any]:
        built = [self._build(child, f"{path}[{index}]", depth) for index, child in enumerate(items)]
        # A dropped item leaves None behind, so that its neighbours keep their places.
        return [None if child is _GONE else child for child in built]

    def _foreign(self, value: Stub | GlobalRef, path: str, depth: int) -> Any:
        ref = value if isinstance(value, GlobalRef) else value.ref
        if self.foreign == "fields" and isinstance(value, Stub):
            fields = value.fields or (DictNode(value.pairs) if value.pairs else None)
            if fields is not None:
                self.flattened.append(path)
                return self._dict(fields, path, depth)
            if value.items:
                self.flattened.append(path)
                return self._items(value.items, path, depth)
        self.dropped.append(Dropped(path, f"object of a foreign class, {ref.full_name}"))
        return _GONE

    def _optimizer_pairs(self, node: DictNode) -> list[tuple[Any, Any]]:
        """Rename the parameters in an optimizer state that is keyed by name, and in its param_groups."""
        return [
            (key, self._renamed_state(child) if key == "state" else self._renamed_groups(child))
            if key in ("state", "param_groups")
            else (key, child)
            for key, child in node.pairs
        ]

    def _renamed_state(self, state: Any) -> Any:
        if not isinstance(state, DictNode):
            return state
        return DictNode([(self._renamed(key), child) for key, child in state.pairs], state.type_name)

    def _renamed_groups(self, groups: Any) -> Any:
        if not isinstance(groups, list) or not all(isinstance(group, DictNode) for group in groups):
            return groups
        return [
            DictNode(
                [
                    (key, [self._renamed(name) for name in child])
                    if key in ("params", "param_names") and isinstance(child, list)
                    else (key, child)
                    for key, child in group.pairs
                ],
                group.type_name,
            )
            for group in groups
        ]

    def _renamed(self, name: Any) -> Any:
        return self.rename(name) if type(name) is str else name


def _is_key(value: Any) -> bool:
    """Tell whether a loader can take a value as a key: a plain one, or a tuple of some (the reader keeps it small)."""
    return all(map(_is_key, value)) if type(value) is tuple else type(value) in _KEYS


def _spelt(key: Any) -> str:
    return key if type(key) is str else repr(key) if _is_key(key) else f"<{type(key).__name__}>"
