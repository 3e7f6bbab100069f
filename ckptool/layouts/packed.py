"""Scales that mean nothing in another element type: those of bitsandbytes, beside the codes that they scale.

Source: bitsandbytes/nn/modules.py (``Linear8bitLt._save_to_state_dict``) and functional.py (``QuantState.as_dict``).
"""

from __future__ import annotations

from collections.abc import Collection

_STATE = ".quant_state.bitsandbytes__"
_SCALES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def packed_scales(keys: Collection[str]) -> frozenset[str]:
    """Give the keys of the scales that their kernels read as they were written."""
    packed = {key.partition(_STATE)[0] for key in keys if _STATE in key}
    four_bits = (f"{weight}.{name}" for weight in packed for name in _SCALES)
    eight_bits = (f"{key.removesuffix('weight_format')}SCB" for key in keys if key.endswith("weight_format"))
    return frozenset(name for name in (*four_bits, *eight_bits) if name in keys)
