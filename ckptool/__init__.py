"""Inspect, diff, clean, convert and verify PyTorch checkpoints without running what they contain."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptool.loading.load import load_into, load_state_dict
    from ckptool.operations.opening import open_path as open  # noqa: A004

__version__ = "0.1.0"
__all__ = ["__version__", "load_into", "load_state_dict", "open"]

# Imported when first asked for: the command line never needs them, and two of them need torch.
_API = {
    "open": ("ckptool.operations.opening", "open_path"),
    "load_state_dict": ("ckptool.loading.load", "load_state_dict"),
    "load_into": ("ckptool.loading.load", "load_into"),
}


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _API[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
