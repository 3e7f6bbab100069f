"""How a network is built, from names and shapes alone: stacks of blocks, what they are, and how wide."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TypeVar

from ckptool.layouts.reference import Shape
from ckptool.model.inspection import Architecture, Stage, Structure, TensorRow
from ckptool.operations.architectures.stacks import Stack

T = TypeVar("T")
Shapes = Mapping[str, Shape]

TRANSFORMER, PERCEPTRON = "transformer block", "MLP block"
_CONVOLUTIONAL, _BASIC = "convolutional block", "BasicBlock"
_ATTENTION = re.compile(
    r"(^|[._])(q|kv|qk|q_?k_?v|in_proj_weight|[qkv]_?proj\w*|query\w*|wqkv|c_attn|selfattention|to_[qkv]|to_qkv|linear_[qk]"
    r"|[qk]_lin)($|[._])",
    re.IGNORECASE,
)
_QUERIES = re.compile(r"(^|[._])(q_?proj|query|to_q|q_lin|linear_q)($|[._])")
# Beside the signal's way through a block: shortcuts, squeeze-and-excitation, gates.
_ASIDE = re.compile(
    r"(^|\.)(downsample|shortcut|skip\w*|identity|conv_skip|conv_shortcut|se|se_module|squeeze\w*|attn|gate)($|\.)"
)
_SQUEEZE = re.compile(r"(^|(?<!mlp)\.)fc[12]\.weight$")  # of torchvision, where it is a convolution
# Tensors with one entry for each attention head: name, dimensions, and which of them counts the heads.
_HEAD_TABLES = (
    ("relative_position_bias_table", 2, 1),
    ("relative_attention_bias.weight", 2, 1),
    ("logit_scale", 3, 0),
    ("temperature", 3, 0),
)
_PLAIN_KINDS = {(3, 3): _BASIC, (1, 3, 1): "Bottleneck"}  # by the kernels of the convolutions in order
_NORMS = frozenset({"norm", "batch norm"})  # kinds of layers with a weight of one dimension
_LARGE_KERNEL = 5
_HEAD_NORM = re.compile(r"(^|\.)([qk]_(layer)?norm|query_norm|key_norm|norm_[qk])\.weight$")
_PATCHES = re.compile(r"(^|[._])(patch_?embed\w*|patch_?embedding\w*|conv_proj|patchify|conv1)($|[._])")
_POSITIONS = re.compile(
    r"(^|[._])(pos_embed\w*|pos_emb|pos_encoding|position(al)?_embeddings?|embed_positions|wpe)($|\.)"
)
_HIDDEN = re.compile(r"(^|\.)weight_hh(_l\d+)?$")  # a single cell has no number
_GATES = {4: "LSTM", 3: "GRU", 1: "RNN"}  # by how many weights of the hidden state are in one tensor
_LORA = re.compile(r"(^|\.)lora_(A|B|up|down|embedding_A|embedding_B)($|\.)")


def structure_of(rows: Sequence[TensorRow], found: Sequence[Stack], sketch: Architecture) -> Structure:
    """Describe a network by its tensors, the stacks that they make up, and what is known of its layers."""
    shapes = {row[0]: row[3] for row in rows if row[0] and row[3] is not None}
    stages = (*map(_stage, found), *_recurrent(shapes))
    patch, patch_size = _patches(shapes)
    tables = _position_tables(shapes)
    # The patches are added to their positions: both are of one width.
    of_patches = [name for name in tables if patch_size and (shapes[name] or ())[-1] == (shapes[patch] or ())[0]]
    image_table = max(of_patches, key=lambda name: _common(name, patch), default=None)
    positions = tables.pop(image_table) if image_table else None
    transformers = [stage for stage in stages if stage.kind in (TRANSFORMER, PERCEPTRON)]
    plain = sketch.layers if _are_all_known(shapes, sketch.layers) else {}
    return Structure(
        kind=_most_frequent(stages) if stages else _plain_kind(plain),
        stages=stages,
        depth=sum([stage.blocks for stage in stages]) or _plain_depth(plain) or None,
        width=_only({stage.width for stage in transformers}),
        heads=_only({stage.heads for stage in transformers} - {None}),
        patch_size=patch_size if positions else None,
        positions=positions,
        grid=_grid(positions) if positions else None,
        context=_context(tables) if sketch.vocabulary else None,
        lora_rank=_only(
            {min(shape[:2]) for name, shape in shapes.items() if shape and len(shape) > 1 and _LORA.search(name)}
        ),
    )


def _recurrent(shapes: Shapes) -> Iterator[Stage]:
    """List the recurrent networks, each with its layers. Source: torch/nn/modules/rnn.py, the names of the weights."""
    layers = [(name, shape) for name, shape in shapes.items() if shape and len(shape) == 2 and _HIDDEN.search(name)]
    for module, same in groupby(layers, key=lambda layer: layer[0].rpartition(".")[0]):
        widths = [shape for _, shape in same]
        kind = _GATES.get(widths[0][0] // widths[0][1] if widths[0][1] else 0, "")
        yield Stage(module, len(widths), kind, widths[0][1], None)


def _only(values: set[T]) -> T | None:
    """Give the one value that there is."""
    return next(iter(values)) if len(values) == 1 else None


def _most_frequent(stages: Sequence[Stage]) -> str | None:
    counts: Counter[str] = Counter()
    for stage in stages:
        counts[stage.kind] += stage.blocks
    return counts.most_common(1)[0][0] or None


def _are_all_known(shapes: Shapes, layers: Mapping[str, int]) -> bool:
    """Tell whether all weights belong to known layers: those of attention or of weight normalisation may not."""
    weights = sum(1 for name, shape in shapes.items() if shape and len(shape) > 1 and "weight" in name)
    return weights == sum([count for kind, count in layers.items() if kind not in _NORMS])


def _plain_kind(layers: Mapping[str, int]) -> str | None:
    if not layers:
        return None
    if any(kind.startswith("conv") for kind in layers):
        return "CNN"
    return "MLP" if layers.keys() <= {"linear", *_NORMS} else None


def _plain_depth(layers: Mapping[str, int]) -> int:
    return sum([count for kind, count in layers.items() if kind == "linear" or kind.startswith("conv")])


def _stage(stack: Stack) -> Stage:
    kind = _kind(stack.shapes)
    if kind == _BASIC and not any(map(_can_be_added, (stack.first, stack.shapes))):
        kind = _CONVOLUTIONAL
    is_flat = kind in (TRANSFORMER, PERCEPTRON)
    width = _norm_width(stack.shapes) if is_flat else _last_outputs(stack.shapes)
    # T5 keeps the biases of all blocks, one for each head, in the first of them.
    heads = _only({*_head_counts(stack.first), *_head_counts(stack.shapes)})
    return Stage(stack.name, stack.blocks, kind, width, heads)


def _kind(shapes: Shapes) -> str:
    """Name a block by the weights on the signal's way through it."""
    if any(map(_ATTENTION.search, shapes)):
        return TRANSFORMER
    ways = list(_ways(shapes))
    if any(len(shape) > 2 for shape in ways):
        return _convolutional_kind(ways)
    return PERCEPTRON if len(ways) > 1 else ""


def _can_be_added(shapes: Shapes) -> bool:
    """Tell whether what goes into a block can be added to what comes out: as it is, or through a shortcut."""
    ways = list(_ways(shapes))
    has_shortcut = any(shape and len(shape) > 1 and _ASIDE.search(name) for name, shape in shapes.items())
    return has_shortcut or ways[0][1] == ways[-1][0]


def _ways(shapes: Shapes) -> Iterator[tuple[int, ...]]:
    for name, shape in shapes.items():
        if shape and len(shape) > 1 and not _ASIDE.search(name) and not (len(shape) > 2 and _SQUEEZE.search(name)):
            yield shape


def _convolutional_kind(ways: Sequence[tuple[int, ...]]) -> str:
    kernels = [max(shape[2:], default=1) for shape in ways]
    depthwise = [place for place, shape in enumerate(ways) if kernels[place] > 1 and shape[1] == 1]
    if not depthwise:
        return _PLAIN_KINDS.get(tuple(kernels), _CONVOLUTIONAL)
    if len(ways) == 3 and len(depthwise) == 1:
        return _depthwise_kind(ways[depthwise[0]], [shape for shape in ways if shape is not ways[depthwise[0]]])
    is_separable = len(ways) == 2 * len(depthwise) and all(kernel > 1 for kernel in kernels[::2])
    return "depthwise separable" if is_separable else _CONVOLUTIONAL


def _depthwise_kind(depthwise: tuple[int, ...], others: Sequence[tuple[int, ...]]) -> str:
    """Tell by where the signal is widest; a file may be sorted by name, so the order does not tell."""
    channels, widest = depthwise[0], max(shape[0] for shape in others)
    if widest > channels and max(depthwise[2:]) >= _LARGE_KERNEL:
        return "ConvNeXt block"
    return "inverted residual" if widest == channels else _CONVOLUTIONAL


def _norm_width(shapes: Shapes) -> int | None:
    shapes = {name: shape for name, shape in shapes.items() if not _LORA.search(name)}
    norms = [
        shape[0]
        for name, shape in shapes.items()
        if shape and len(shape) == 1 and name.endswith("weight") and not _HEAD_NORM.search(name)
    ]
    inputs = [shape[1] for shape in shapes.values() if shape and len(shape) == 2]
    counted = Counter(norms or inputs).most_common(1)
    return counted[0][0] if counted else None


def _last_outputs(shapes: Shapes) -> int | None:
    return next((shape[0] for shape in reversed(list(_ways(shapes)))), None)


def _head_counts(shapes: Shapes) -> Iterator[int]:
    """Count the attention heads where some tensor has one entry for each, or the size of one."""
    for name, shape in shapes.items():
        if not shape:
            continue
        yield from (
            shape[axis]
            for ending, dimensions, axis in _HEAD_TABLES
            if len(shape) == dimensions and name.endswith(ending)
        )
        if len(shape) == 1 and shape[0] > 1 and _HEAD_NORM.search(name):
            yield from _by_head_size(shapes, shape[0])


def _by_head_size(shapes: Shapes, size: int) -> Iterator[int]:
    """Divide the outputs of the queries by the size of a head."""
    for name, shape in shapes.items():
        is_joined = "qkv" in name.lower() or "in_proj" in name
        if shape and len(shape) == 2 and (is_joined or _QUERIES.search(name)):
            heads, rest = divmod(shape[0], 3 * size if is_joined else size)
            if not rest:
                yield heads


def _patches(shapes: Shapes) -> tuple[str, tuple[int, ...] | None]:
    """Find the layer that cuts an image into patches, and its kernel; one with an odd edge overlaps, and tells none."""
    found = {
        name: shape[2:]
        for name, shape in shapes.items()
        if shape and len(shape) == 4 and name.endswith(".weight") and _PATCHES.search(name.removesuffix(".weight"))
    }
    kernel = _only(set(found.values()))
    return (next(iter(found)), kernel) if kernel and not any(edge % 2 for edge in kernel) else ("", None)


def _position_tables(shapes: Shapes) -> dict[str, int]:
    return {
        name: shape[-2]
        for name, shape in shapes.items()
        if shape and (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)) and _POSITIONS.search(name)
    }


def _common(one: str, other: str) -> int:
    """Count the segments that two names begin with alike."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next((place for place, (left, right) in enumerate(pairs) if left != right), 0)


def _context(tables: Mapping[str, int]) -> int | None:
    """Take the positions of what writes text, where something else reads."""
    writers = [name for name in tables if "decoder" in name]
    return tables[(writers or list(tables))[0]] if tables else None


def _grid(positions: int) -> int | None:
    """Give the edge of the square that positions make up, one or two further tokens aside."""
    edges = {others: math.isqrt(positions - others) for others in range(min(3, positions))}
    return next((edge for others, edge in edges.items() if edge and edge * edge == positions - others), None)
