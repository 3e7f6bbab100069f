"""Names that a safetensors file keeps in its metadata, because it cannot hold a tied tensor twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckptool.model.plans import StateDict


def with_aliases(state_dict: StateDict, metadata: Mapping[str, str]) -> StateDict:
    """Count the names in the metadata as present: the same tensor under another name.

    Source: ``metadata[removed_name] = kept_name`` in ``save_model``, safetensors/torch.py.
    """
    if not metadata or state_dict.path:
        return state_dict
    tensors = state_dict.tensors
    aliases = {name: tensors[kept] for name, kept in metadata.items() if kept in tensors and name not in tensors}
    return replace(state_dict, entries={**state_dict.entries, **aliases}) if aliases else state_dict
