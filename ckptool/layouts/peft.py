"""Adapters of PEFT: their names are their own, and stay as they are.

Source: peft, ``utils/save_and_load.py``: a saved adapter has ``base_model.model.PATH.lora_A.weight``, without the name
of the adapter; the state dict of the whole model has it, and the layers that it wraps below ``base_layer``.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from ckptool.model.plans import Note

_ROOT = "base_model.model."
_ADAPTER = re.compile(r"\.(lora|ia3|oft|boft|vera|hada|lokr|vblora|randlora)_")
_WHOLE = (".base_layer.", ".original_module.", ".modules_to_save.")


def peft_note(keys: Collection[str]) -> Note | None:
    """Name an adapter of PEFT, or a model with one inside, by its keys; None for any other."""
    if _ROOT not in next(iter(keys), ""):  # one look tells nearly every file
        return None
    listed = list(keys)
    kinds = sorted({match[1] for key in listed if (match := _ADAPTER.search(key))})
    if not kinds:
        return None
    is_whole = any(part in key for key in listed for part in _WHOLE)
    what = "a model with a PEFT adapter in it" if is_whole else "a PEFT adapter, without its model"
    remedy = "merge_and_unload of PEFT makes plain weights of it" if is_whole else "PeftModel.from_pretrained loads it"
    return Note("peft", f"this is {what} ({', '.join(kinds)}): its names stay as they are; {remedy}")
