"""Build the mapping of a state dict under its clean keys, as torch.save writes it."""

from __future__ import annotations

from collections.abc import Mapping

from ckptool.layouts import rename_module_path
from ckptool.model.copies import PlannedOpaque, PlannedTensor
from ckptool.model.plans import CLEAN_MARK, KeyPlan, StateDict
from ckptool.model.values import DictNode
from ckptool.operations.rest import Rebuilder


def clean_node(
    state_dict: StateDict,
    key_plan: KeyPlan,
    tensors: Mapping[str, PlannedTensor | PlannedOpaque],
    rebuilder: Rebuilder,
) -> DictNode:
    """Build the state dict under its clean keys, with what is no tensor in it and with torch's ``_metadata``."""
    node = DictNode(type_name="OrderedDict")
    for source, target in key_plan.kept.items():
        losses = len(rebuilder.dropped)
        value = tensors[target] if target in tensors else rebuilder.rebuild(state_dict.entries[source], target)
        if len(rebuilder.dropped) == losses or value is not None:
            node.pairs.append((target, value))
    if isinstance(state_dict.key_metadata, DictNode):
        metadata = rebuilder.rebuild(state_dict.key_metadata, "_metadata")
        node.attributes = DictNode([("_metadata", _renamed_modules(metadata, key_plan))])
    return node


def mark_clean(node: DictNode) -> None:
    """Say in ``_metadata`` that these names are clean, for the next time that the container is looked at."""
    metadata = node.attributes.get("_metadata") if node.attributes is not None else DictNode(type_name="OrderedDict")
    others = [(path, entry) for path, entry in metadata.pairs if path != ""]
    entry = metadata.get("")
    kept = [pair for pair in entry.pairs if pair[0] != CLEAN_MARK] if isinstance(entry, DictNode) else []
    root = DictNode([*kept, (CLEAN_MARK, True)])
    node.attributes = DictNode([("_metadata", DictNode([("", root), *others], "OrderedDict"))])


def _renamed_modules(metadata: DictNode, key_plan: KeyPlan) -> DictNode:
    """Bring the module paths of ``_metadata`` to clean names; where keys were mapped one by one, by their moves."""
    moved = _moved_modules(key_plan) if key_plan.rule.mapping else None
    renamed = {
        target: entry
        for path, entry in metadata.text_items().items()
        if (target := rename_module_path(key_plan, path) if moved is None else moved.get(path)) is not None
    }
    return DictNode(list(renamed.items()), "OrderedDict")


def _moved_modules(key_plan: KeyPlan) -> dict[str, str]:
    """Tell from the keys below each module where it went: ``model.fc`` to ``fc``, if only its front changed."""
    moved: dict[str, str] = {}
    for source, target in key_plan.kept.items():
        steps, target_steps = source.split("."), target.split(".")
        while steps and target_steps and steps.pop() == target_steps.pop():
            moved[".".join(steps)] = ".".join(target_steps)
    return moved
