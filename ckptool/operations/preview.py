"""Guess the network from names and shapes alone, and say nothing where they do not tell."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from ckptool.layouts.segments import Names
from ckptool.model.inspection import Architecture, Layer, ModuleNode, TensorRow
from ckptool.operations.module_tree import MAX_DEPTH, is_number

# What a weight with so many dimensions belongs to, in torch.nn.
_KIND_BY_DIMENSIONS = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}
_LAYER_KINDS = frozenset({*_KIND_BY_DIMENSIONS.values(), "embedding"})
_EMBEDDING = re.compile(r"(^|[._])(emb|embed\w*|wte|wpe|word_embeddings|token_emb\w*)($|[._\d])|(^|[.])shared$")
_CLASSIFIER = frozenset(
    {"classifier", "cls", "fc", "head", "heads", "last_linear", "linear", "logits", "out", "output", "pred"}
    | {"prediction", "predictions", "score"}
)
_LANGUAGE_HEAD = frozenset({"lm_head", "embed_out", "output_projection"})
_TOKENS = re.compile(r"(^|[._])(word_embeddings?|embed_tokens|tok_embeddings|token_embeddings?|wte|shared)$")
_MAX_INPUT_CHANNELS = 16


def preview(rows: Sequence[TensorRow], in_order: bool) -> Architecture | None:
    """Describe the network that the tensors (clean names) come from, or None where none looks like a layer.

    ``in_order`` says that the rows come in the order of the modules; safetensors files sort them by name instead.
    """
    kinds, through = _layers(rows)
    if not through:
        return None
    first = _at_end(rows, through[0]) if in_order else _only(_unfed(through))
    last = _at_end(rows[::-1], through[-1]) if in_order else _only(_heads(through))
    return Architecture(
        layers=dict(Counter(kinds)),
        first=first,
        last=last,
        widths=tuple(dict.fromkeys(layer.outputs for layer in through[:-1])) if in_order else (),
        input_channels=first.inputs if first and _reads_channels(first, through) else None,
        classes=_classes(first, last, through, in_order),
        vocabulary=_vocabulary(through),
        blocks=tuple(_parts("", Names([row.key or "" for row in rows]), rows)[0]),
    )


def _layers(rows: Sequence[TensorRow]) -> tuple[list[str], list[Layer]]:
    """Give the kind that each weight suggests, and those layers that a signal is multiplied through."""
    shapes = {row[0]: row[3] for row in rows}
    kinds: list[str] = []
    through: list[Layer] = []
    for key, _, _, shape, _, _ in rows:
        if not key or not shape or key[-7:] not in (".weight", "weight"):
            continue
        module = key[:-7]
        if len(shape) == 1:
            kinds.append("batch norm" if f"{module}.running_mean" in shapes else "norm")
            continue
        bias = shapes.get(f"{module}.bias")
        is_embedding = len(shape) == 2 and bias is None and _is_embedding(module.lower())
        kind = "embedding" if is_embedding else _KIND_BY_DIMENSIONS.get(len(shape), "other")
        kinds.append(kind)
        if kind in _LAYER_KINDS:
            # Transposed convolutions, and linear layers of GPT-2, have their weights the other way round.
            is_turned = bias == (shape[1],) and shape[0] != shape[1]
            sizes = shape if is_embedding or is_turned else (shape[1], shape[0])
            through.append(Layer(module, kind, sizes[0], sizes[1], shape))
    return kinds, through


def _is_embedding(module: str) -> bool:
    # Looking for the letters first spares almost every layer the pattern.
    is_likely = "emb" in module or "wte" in module or "wpe" in module or "shared" in module
    return is_likely and _EMBEDDING.search(module) is not None


def _at_end(rows: Sequence[TensorRow], layer: Layer) -> Layer | None:
    """Give a layer where no weight of another kind, such as of an LSTM, stands before it in these tensors."""
    for row in rows:
        name = row.key or ""
        if name.removesuffix("weight").rstrip(".") == layer.name:
            return layer
        if "weight" in name and len(row.shape or ()) > 1:
            break
    return None


def _unfed(layers: list[Layer]) -> list[Layer]:
    """Find the layers whose input width nothing in the network puts out."""
    made = {layer.outputs for layer in layers}
    return [layer for layer in layers if layer.inputs not in made and (layer.kind == "linear" or layer.inputs > 1)]


def _heads(layers: list[Layer]) -> list[Layer]:
    return [layer for layer in layers if _is_named(layer, _CLASSIFIER | _LANGUAGE_HEAD)]


def _is_named(layer: Layer, names: frozenset[str]) -> bool:
    above, _, own = layer.name.rpartition(".")
    # The last layer of ``classifier = Sequential(...)`` is called ``classifier.6``.
    return own in names or (is_number(own) and above.rpartition(".")[2] in names)


def _only(layers: list[Layer]) -> Layer | None:
    return layers[0] if len(layers) == 1 else None


def _reads_channels(first: Layer, layers: list[Layer]) -> bool:
    """Tell whether the first layer reads channels; where the second fits its other side, both are transposed."""
    second = next((layer for layer in layers if layer is not first), first)
    is_turned = second.outputs == first.inputs and second.inputs != first.outputs and second.kind == first.kind
    return first.kind.startswith("conv") and first.inputs <= _MAX_INPUT_CHANNELS and not is_turned


def _classes(first: Layer | None, last: Layer | None, layers: list[Layer], in_order: bool) -> int | None:
    if last is None or last.kind == "embedding":
        return None
    if _is_named(last, _CLASSIFIER):
        return last.outputs
    # An unnamed last layer of a plain Sequential counts where its width goes nowhere else and is not the input's.
    above = {layer.name.rpartition(".")[0] for layer in layers}
    ends = in_order and last is not first and is_number(last.name.rpartition(".")[2]) and len(above) == 1
    used = {layer.inputs for layer in layers}
    return last.outputs if ends and last.kind == "linear" and last.outputs not in used else None


def _vocabulary(layers: list[Layer]) -> int | None:
    head = next((layer.outputs for layer in layers if _is_named(layer, _LANGUAGE_HEAD)), None)
    if head is not None:
        return head
    return next((layer.inputs for layer in layers if layer.kind == "embedding" and _TOKENS.search(layer.name)), None)


def _parts(name: str, rests: Names, rows: Sequence[TensorRow], depth: int = 0) -> tuple[list[ModuleNode], bool]:
    """List the parts below a module: a stack of numbered blocks is one part, and so is all that holds none.

    ``rests`` are the names of the tensors behind that of the module. The second value tells whether there is a stack.
    """
    if depth == MAX_DEPTH or "." not in rests.text:
        return ([_sum_up(name, 1, rows)] if name else [_sum_up(row.key or "", 1, [row]) for row in rows]), False
    segments = rests.roots
    is_stack = bool(name) and all(map(is_number, segments))
    if is_stack and len(segments) > 1:
        return [_sum_up(f"{name}.{_span(segments)}", len(segments), rows)], True
    found = [
        _parts(f"{name}.{segment}" if name else segment, *group, depth + 1)
        for segment, group in _group(rests, rows).items()
    ]
    holds_stack = any(below for _, below in found)
    parts = [part for below, _ in found for part in below]
    if is_stack:
        return [_join(f"{name}.{segments[0]}", parts)], holds_stack
    return (parts if holds_stack or not name else [_join(name, parts)]), holds_stack


def _group(rests: Names, rows: Sequence[TensorRow]) -> dict[str, tuple[Names, Sequence[TensorRow]]]:
    """Sort tensors by their next segment, which goes."""
    if rests.shared_root is not None:
        return {rests.shared_root: (rests.cut(rests.shared_root), rows)}
    groups: dict[str, tuple[list[str], list[TensorRow]]] = {}
    for rest, row in zip(rests, rows, strict=True):
        segment, _, behind = rest.partition(".")
        names, members = groups.get(segment) or groups.setdefault(segment, ([], []))
        names.append(behind)
        members.append(row)
    return {segment: (Names(names), members) for segment, (names, members) in groups.items()}


def _span(numbers: list[str]) -> str:
    """Write indices as one range where they are one, otherwise as a list."""
    values = [int(number) for number in numbers]
    if len(values) == 1:
        return numbers[0]
    if values == list(range(values[0], values[0] + len(values))):
        return f"[{values[0]}-{values[-1]}]"
    return f"[{','.join(numbers)}]"


def _sum_up(name: str, repeats: int, rows: Sequence[TensorRow]) -> ModuleNode:
    elements = sum([math.prod(row.shape) for row in rows if row.shape is not None])
    return ModuleNode(name, repeats, len(rows), elements, sum([row.nbytes for row in rows]))


def _join(name: str, parts: Sequence[ModuleNode]) -> ModuleNode:
    tensors, elements = sum([part.tensors for part in parts]), sum([part.elements for part in parts])
    return ModuleNode(name, 1, tensors, elements, sum([part.nbytes for part in parts]))
