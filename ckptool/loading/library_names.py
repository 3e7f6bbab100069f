"""The names that transformers gives to what older versions of it, and the Hub's files, call otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from importlib import import_module

from torch import nn

from ckptool.loading.foreign import foreign_code

Conversion = Callable[[str], str]


def library_names(model: nn.Module, own: Collection[str]) -> Conversion | None:
    """Give the renaming that ``from_pretrained`` does for a model; None for one that transformers does not rename.

    Since its version 5 the names in memory are not those in the files that it writes. What it computes while loading
    (fused experts) is not done here. Source: transformers/conversion_mapping.py, core_model_loading.py.
    """
    if "transformers" not in sys.modules or not _is_pretrained(type(model)):
        return None
    with foreign_code(f"{type(model).__name__}: asking transformers for its names failed", "update transformers"):
        try:
            mapping = import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
            loading = import_module("transformers.core_model_loading")
        except (ImportError, AttributeError):  # before version 5 the names were one
            return None
        renamings = [step for step in mapping if isinstance(step, loading.WeightRenaming)]
    prefix, known = getattr(model, "base_model_prefix", None), dict.fromkeys(own)

    def convert(name: str) -> str:
        renamed: str = loading.rename_source_key(name, renamings, [], prefix, known)[0]
        return renamed

    return convert


def _is_pretrained(kind: type) -> bool:
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.") for base in kind.__mro__
    )
