"""Two sets of weights inside one state dict, the second under flattened names."""

from __future__ import annotations

from collections.abc import Mapping

from ckptool.layouts.segments import Names

LITEMA_COUNTERS = frozenset({"model_ema.decay", "model_ema.num_updates"})


def underscored_twins(names: Names) -> dict[str, str]:
    """Map ``ema_a_b_weight`` to ``a.b.weight`` where every such key has exactly one twin; else empty.

    Source: mmcv/runner/hooks/ema.py, ``f"ema_{name.replace('.', '_')}"`` for every parameter.
    """
    flat = [name for name in _starting(names, "ema_") if "." not in name]
    return _matched(flat, {name: "ema_" + name.replace(".", "_") for name in names}) if flat else {}


def dotless_twins(names: Names) -> dict[str, str]:
    """Map ``model_ema.ab0weight`` to ``model.a.b.0.weight`` where every such key has exactly one twin; else empty.

    Source: ldm/modules/ema.py (LitEma), ``name.replace('.', '')`` for every trained parameter below ``model``; it
    cannot be turned back from the name alone.
    """
    flat = [name for name in _starting(names, "model_ema.") if name not in LITEMA_COUNTERS]
    below = {name: name.removeprefix("model.") for name in _starting(names, "model.")} if flat else {}
    return _matched(flat, {name: "model_ema." + tail.replace(".", "") for name, tail in below.items()})


def is_flattened(names: Names, root: str) -> bool:
    """Tell whether the copy below a root has no names of its own: no dot is left in any (``LitEma``)."""
    return root == "model_ema" and all(name.count(".") == 1 for name in _starting(names, "model_ema."))


def _starting(names: Names, front: str) -> list[str]:
    return [name for name in names if name.startswith(front)] if front in names.text else []


def _matched(flat: list[str], flattened: Mapping[str, str]) -> dict[str, str]:
    by_flat: dict[str, list[str]] = {}
    for name, flat_name in flattened.items():
        by_flat.setdefault(flat_name, []).append(name)
    twins = {name: by_flat.get(name, []) for name in flat}
    unique = all(len(names) == 1 for names in twins.values())
    return {name: names[0] for name, names in twins.items()} if unique else {}
