"""One rule, applied to any name of a model: its keys, its optimizer's parameter names, its module paths."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptool.layouts.segments import without, without_inner
from ckptool.model.plans import KeyPlan, KeyRule


def rename_key(plan: KeyPlan, key: str) -> str:
    """Give a parameter name as the plan would (``param_names``, optimizer state).

    A name that the plan does not reach (relative to an inner module, or of a module that goes) only loses the
    private segments.
    """
    target = _apply_rule(plan.rule, key)
    return without(key, plan.rule.removed) if target is None else target


def rename_module_path(plan: KeyPlan, path: str) -> str | None:
    """Give a module path (an entry of ``_metadata``) as the plan would; None for a module that goes.

    A wrapper and the module inside it may become one path: the later entry is the inner one, and counts.
    """
    # A path is treated as a key whose last segment is still to come.
    target = _apply_rule(plan.rule, f"{path}.*" if path else "*", mapped=False)
    return None if target is None else target.removesuffix("*").removesuffix(".")


def _apply_rule(rule: KeyRule, key: str, *, mapped: bool = True) -> str | None:
    """Give the target of a key, or None where the rule does not reach it or drops it."""
    if mapped and key in rule.mapping:
        return _added(rule, rule.mapping[key])
    clean = clean_name(rule, key)
    if clean is None:
        return None
    name = renamed(clean, rule.rename)
    return _added(rule, rule.mapping.get(name, name) if mapped else name)


def _added(rule: KeyRule, name: str | None) -> str | None:
    return None if name is None else rule.added + name


def clean_name(rule: KeyRule, key: str) -> str | None:
    """Give the clean name of a key, before what the user asked for; None where the rule does not reach it."""
    name = without(key, rule.removed) if rule.removed else key
    if rule.leading:
        path = ".".join(rule.leading) + "."
        if not name.startswith(path):
            return None
        name = name[len(path) :]
    if rule.inner:
        name = without_inner(name, rule.inner)
    return rule.prepended + name


def renamed(name: str, rename: Sequence[tuple[str, str]]) -> str:
    """Apply the substitutions in order."""
    for pattern, replacement in rename:
        name = re.sub(pattern, replacement, name)
    return name
