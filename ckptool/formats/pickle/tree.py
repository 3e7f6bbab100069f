"""One look over the finished value tree: what no single opcode can see."""

from __future__ import annotations

import binascii
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from typing import Any

from ckptool.formats.pickle import limits
from ckptool.formats.pickle.reading import BareStorage, Draft, Malformed, PickledStorage, Reading
from ckptool.model.values import DictNode, OpaqueTensor, SetNode, Stub, children

_CONTAINERS = frozenset({list, tuple, DictNode, SetNode, OpaqueTensor, Stub, Draft})
_LOOKED_AT = _CONTAINERS | {str, bytes}
_PICKLE = re.compile(rb"\x80[\x01-\x05].*\.\s*\Z", re.DOTALL)
_ENCODED = re.compile(r"800[1-5]|gA[E-X]")  # hexadecimal digits or base64 of the PROTO opcode


def check_tree(root: Any, reading: Reading) -> None:
    """Refuse what nests too deeply, holds too much or is no mapping; note cycles and pickles inside pickles.

    Iterative and by identity: a node is visited once, however often it is shared.
    """
    if type(root) not in _CONTAINERS:
        return _check_leaves((root,), reading)
    heights: dict[int, int] = {}  # 0 while a node is open
    trail: list[tuple[int, Iterator[Any], list[int]]] = [_open(root, heights, reading)]
    while trail:
        identity, below, tallest = trail[-1]
        child = next(below, None)
        if child is None:
            trail.pop()
            heights[identity] = tallest[0] + 1
            if trail:
                _grow(trail[-1][2], heights[identity])
        elif (height := heights.get(id(child))) is None:
            if len(trail) >= limits.NESTING or len(heights) >= limits.NODES:
                raise Malformed(f"nests deeper than {limits.NESTING} or holds more than {limits.NODES} values")
            trail.append(_open(child, heights, reading))
        elif height == 0:
            if type(child) is not Stub:  # objects refer to their parents as a matter of course
                reading.note("cycle", "holds a value that contains itself")
        else:
            _grow(tallest, height)
    return None


def holds(roots: Iterable[Any], wanted: Collection[int]) -> bool:
    """Tell whether a value of one of these identities is anywhere among some values, or is one of them."""
    pending, seen = list(roots), set[int]()
    while pending:
        value = pending.pop()
        if id(value) in wanted:
            return True
        if type(value) in _CONTAINERS and id(value) not in seen:
            seen.add(id(value))
            pending.extend(child for _, child in children(value))
    return False


def _grow(tallest: list[int], height: int) -> None:
    tallest[0] = max(tallest[0], height)
    if height >= limits.NESTING:
        raise Malformed(f"nests deeper than {limits.NESTING}")


def _open(node: Any, heights: dict[int, int], reading: Reading) -> tuple[int, Iterator[Any], list[int]]:
    heights[id(node)] = 0
    values = _values(node, reading)
    kinds = set(map(type, values))
    if PickledStorage in kinds:
        raise BareStorage
    if kinds.isdisjoint(_LOOKED_AT):
        return id(node), iter(()), [0]
    if not kinds.isdisjoint((str, bytes)):
        _check_leaves(values, reading)
    return id(node), iter([value for value in values if type(value) in _CONTAINERS]), [0]


def _values(node: Any, reading: Reading) -> list[Any] | tuple[Any, ...]:
    """List what lies directly under a node."""
    if type(node) is list or type(node) is tuple:
        return node
    if type(node) is DictNode:
        _check_keys(node, reading)
        values = [value for _, value in node.pairs]
        values += [key for key, _ in node.pairs if type(key) is not str]
        return values if node.attributes is None else [*values, node.attributes]
    if type(node) is Stub:
        return [node.args, node.kwargs, node.state, *node.items, *chain.from_iterable(node.pairs)]
    if type(node) is SetNode:
        _check_hashable(node.items)
        return node.items
    if type(node) is OpaqueTensor:
        return [value for _, value in node.parts]
    raise Malformed("holds an array without its contents")


def _check_keys(node: DictNode, reading: Reading) -> None:
    """Refuse a mapping that two readers would take differently, or that is none."""
    keys = [key for key, _ in node.pairs]
    texts = [key for key in keys if type(key) is str]
    if len(set(texts)) != len(texts):
        raise Malformed(f"has the key {_repeated(texts)!a:.200} twice in one dictionary, which has two readings")
    if texts and max(map(len, texts)) > limits.KEY_CHARACTERS:
        raise Malformed(f"has a key of more than {limits.KEY_CHARACTERS} characters")
    if len(texts) != len(keys):
        if len(keys) - len(texts) > limits.NON_TEXT_KEYS:
            raise Malformed(f"has a dictionary with more than {limits.NON_TEXT_KEYS} keys that are no text")
        _check_hashable(keys)
        if any(type(key) is float and key != key for key in keys):
            reading.note("nan-key", "uses NaN, which equals nothing, as a dictionary key")


def _repeated(texts: list[str]) -> str:
    seen: set[str] = set()
    return next(text for text in texts if text in seen or seen.add(text))  # type: ignore[func-returns-value]


def _check_hashable(keys: list[Any]) -> None:
    """Refuse keys that Python could not hash, or not in this life: it visits a shared part at every place."""
    pending = [key for key in keys if type(key) in _CONTAINERS]
    for _ in range(limits.KEY_PARTS * (1 + len(keys) // 64)):
        if not pending:
            return
        part = pending.pop()
        kind = type(part)
        if kind is list or kind is DictNode or (kind is SetNode and part.type_name == "set"):
            raise Malformed("uses a list, a dictionary or a set as a key, which Python does not allow")
        pending.extend(part if kind is tuple else part.items if kind is SetNode else ())
    raise Malformed(f"has keys of more than {limits.KEY_PARTS} parts")


def _check_leaves(values: Iterable[Any], reading: Reading) -> None:
    """Note texts and bytes that are pickles themselves: some other program may load them."""
    for value in values:
        if (type(value) is bytes and _PICKLE.match(value)) or (type(value) is str and _is_encoded_pickle(value)):
            reading.note("nested-pickle", "holds bytes that are a pickle themselves")


def _is_encoded_pickle(text: str) -> bool:
    """Recognise a pickle written as hexadecimal digits or base64."""
    if len(text) < 8 or text[0] not in "8g" or not _ENCODED.match(text):
        return False
    decode = binascii.unhexlify if text[0] == "8" else binascii.a2b_base64
    try:
        return _PICKLE.match(decode(text)) is not None
    except ValueError:
        return False
