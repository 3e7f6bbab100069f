"""Say what a tensor is for, from its name, shape and type alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckptool.operations.health.survey import Measured

# Buffers of torch.nn, torch.ao, transformers and timm: computed or counted, never trained.
_BUFFERS = frozenset(
    {"running_mean", "running_var", "num_batches_tracked", "position_ids", "token_type_ids", "inv_freq"}
    | {"original_inv_freq", "freqs_cis", "cos_cached", "sin_cached", "relative_position_index", "relative_coords_table"}
    | {"scale", "zero_point", "min_val", "max_val", "absmax", "quant_map", "fake_quant_enabled", "observer_enabled"}
    | {"embed_positions", "pos_emb_sin", "_float_tensor", "pixel_mean", "pixel_std", "total_ops", "total_params"}
)
# The causal mask that GPT-2 and its like keep beside the weights is called "bias"; "masked_bias" is what it puts in.
_MASK = re.compile(r"(^|[._])(\w*mask\w*|attn\.bias|attention\.bias)$", re.IGNORECASE)
# Observers of torch.ao begin with an empty range, from inf to -inf.
_OBSERVER_RANGE = frozenset({"min_val", "max_val"})
# What training methods begin with at zero, so that nothing changes at first.
_ZERO_AT_FIRST = re.compile(
    r"(^|[._])(lora_(embedding_)?B|zero_convs?|lokr_w2\w*|hada_w2_\w+|oft_\w+|mask_token)($|\.)"
)
# Adapters keep one random half as it was drawn.
_RANDOM_FOR_GOOD = re.compile(r"(^|[._])(lora_(embedding_)?A|random_projection|projection_matrix)($|\.)")
_EMBEDDING_OR_HEAD = re.compile(r"(^|[._])(\w*emb\w*|wte|shared|lm_head|decoder|output_projection|proj_out)($|\.)")


@dataclass(frozen=True, slots=True)
class Ends:
    """Name the layer that takes the inputs and the one that gives classes or words; None where nothing tells."""

    first: str | None
    head: str | None

    def is_first(self, tensor: Measured) -> bool:
        """Tell whether it is the weight of the first layer."""
        return f"{self.first}.weight" in tensor.names

    def is_head(self, tensor: Measured, part: str = "weight") -> bool:
        """Tell whether it is the weight (or another part) of the last layer."""
        return f"{self.head}.{part}" in tensor.names


def leaf(name: str) -> str:
    """Give the last segment of a name."""
    return name.rpartition(".")[2]


def module_of(name: str) -> str:
    """Give everything before the last segment of a name."""
    return name.rpartition(".")[0]


def is_mask(tensor: Measured) -> bool:
    """Tell whether infinity may be a value: a mask that is added to attention, or a range that is still empty."""
    return leaf(tensor.name) in _OBSERVER_RANGE or (
        _MASK.search(tensor.name) is not None and (len(tensor.spec.shape) != 1 or leaf(tensor.name) != "bias")
    )


def is_trained(tensor: Measured) -> bool:
    """Tell whether an optimizer would have set it: a floating tensor that is no well-known buffer."""
    if not tensor.spec.dtype.is_floating or not tensor.spec.numel:
        return False
    return leaf(tensor.name) not in _BUFFERS and not is_mask(tensor)


def is_weight(tensor: Measured) -> bool:
    """Tell whether it is a trained tensor with at least two dimensions of more than one element, or a linear layer."""
    shape = tensor.spec.shape
    wide = sum(length > 1 for length in shape)
    is_linear = len(shape) == 2 and leaf(tensor.name) == "weight"
    return is_trained(tensor) and (wide >= 2 or (wide == 1 and is_linear))


def begins_with_zero(name: str) -> bool:
    """Tell whether zero is what a training method begins with."""
    return _ZERO_AT_FIRST.search(name) is not None


def stays_random(name: str) -> bool:
    """Tell whether a method leaves it as it was drawn."""
    return _RANDOM_FOR_GOOD.search(name) is not None


def is_often_copied(name: str) -> bool:
    """Tell whether it is one of those that networks tie, and files may hold once for each name."""
    return _EMBEDDING_OR_HEAD.search(name) is not None
