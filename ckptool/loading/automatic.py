"""The model that a checkpoint's names and shapes, or the checkpoint itself, single out: ``--model auto``."""

from __future__ import annotations

from ckptool.errors import CkptoolError
from ckptool.model.inspection import ArchitectureMatch, TensorRow
from ckptool.operations.architectures.recognition import identify
from ckptool.operations.module_tree import grow
from ckptool.operations.opening import OpenedCheckpoint
from ckptool.operations.suggest import suggest

AUTOMATIC = "auto"
_MAX_NAMED = 4


def automatic_model(view: OpenedCheckpoint) -> str:
    """Give the one architecture that has the very same names and shapes, as text for ``--model``.

    Among several of them, the one that the checkpoint says it is.

    :raises CkptoolError: there is none, or nothing tells several apart; it names what to give instead.
    """
    rows = [TensorRow(name, name, "", tensor.shape, tensor.nbytes) for name, tensor in view.tensors.items()]
    match = identify(grow(rows), rows)
    recorded = suggest(view)
    exact = () if match is None or match.kind != "exact" else (match.name, *match.alternatives)
    if recorded in exact:
        return str(recorded)
    if match is not None and match.name is not None and len(exact) == 1:
        return match.name
    raise CkptoolError(f"{view.checkpoint.path}: --model {AUTOMATIC}: {_why(match, recorded)}")


def _why(match: ArchitectureMatch | None, recorded: str | None) -> str:
    """Say why nothing was chosen, and what to write."""
    if recorded is not None:
        return f"names and shapes do not settle it, but the checkpoint says what it is; give --model {recorded}"
    if match is None or match.name is None:
        return "no architecture of the index has its names and shapes; name its own code with --model FILE.py:Class"
    names = (match.name, *match.alternatives)
    ways = " or ".join(f"--model {name}" for name in names[:_MAX_NAMED])
    rest = f" ({len(names) - _MAX_NAMED} more: ckptool inspect --json)" if len(names) > _MAX_NAMED else ""
    if match.kind == "exact":
        return f"{len(names)} architectures have its names and shapes; give {ways}{rest}"
    return f"no architecture has all its names and shapes ({'; '.join(match.differences)}); give {ways}{rest}"
