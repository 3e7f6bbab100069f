"""A torchvision that was built for CUDA, beside a torch without it."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

import torch

# The registrations last as long as the library object does.
_stand_ins: list[torch.library.Library] = []
_MISSING = ("nms", "qnms")
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def ensure_torchvision() -> bool:
    """Import torchvision, also where its compiled part cannot be loaded, and tell whether that is so.

    The CUDA build beside a CPU torch fails to import as two of its operators are unknown, and takes timm, torchmetrics
    and transformers down with it; declaring them is enough, as nothing but detection models calls them. Does nothing
    where torchvision is absent or sound.

    :raises RuntimeError: torchvision is broken in another way.
    """
    if find_spec("torchvision") is None:
        return False
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if not is_missing_operator(error):
            raise
    else:
        return bool(_stand_ins)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in _MISSING:
        library.define(f"{operator}{_SIGNATURE}")  # type: ignore[no-untyped-call]
    _stand_ins.append(library)
    import_module("torchvision")
    return True


def is_missing_operator(error: BaseException) -> bool:
    """Tell whether an import failed because torchvision's compiled part is absent."""
    return "torchvision::" in str(error) and "does not exist" in str(error)
