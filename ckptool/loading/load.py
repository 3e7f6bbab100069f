"""Load a checkpoint under clean names: as a dict of tensors, or into a model."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor, nn

from ckptool.errors import CkptoolError
from ckptool.loading.foreign import foreign_code
from ckptool.loading.materialise import check_bytes, materialise
from ckptool.loading.model_names import ModelNames, model_names
from ckptool.loading.outcome import contradictions, explain, summarise
from ckptool.loading.placement import Placement, place
from ckptool.model.loading import LoadReport
from ckptool.operations.entries import refuse_unwritable
from ckptool.operations.opaque import OpaquePolicy
from ckptool.operations.opening import OpenedCheckpoint, open_path


def load_state_dict(
    path: str | os.PathLike[str],
    *,
    weights: str = "main",
    select: str | None = None,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Give the tensors of a checkpoint on the CPU under clean names, in file order; nothing in the file is run.

    ``weights`` is ``main``, ``ema``, ``raw`` or a path in the container; ``select`` keeps a subtree of the keys,
    ``include`` and ``exclude`` are globs over clean names. Tensors are memory-mapped where the container allows:
    writing to one never changes the file, and a mapped tensor's checksum is not checked (``load_into`` checks it).
    Tied tensors share their memory. What is no tensor is left out; what holds tensors inside is refused.

    :raises CkptoolError: the file cannot be read, or which weights are meant is open.
    """
    with open_path(path) as opened:
        view = opened.select(weights, select=select, include=include, exclude=exclude)
        refuse_unwritable(view.checkpoint.path, view.state_dict, view.plan.kept, OpaquePolicy())
        return materialise(view.checkpoint.path, view.tensors)


def load_into(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    weights: str = "main",
    select: str | None = None,
) -> LoadReport:
    """Load a checkpoint into a model, whatever wraps either of them, and report what became of every tensor.

    The model may be plain, compiled as a whole or in regions, in DataParallel or in DistributedDataParallel: its own
    clean names are the reference that the file's names are brought to. A tied tensor counts as present under all its
    names. With ``strict`` the two must have the same tensors; without it what fits is loaded, as long as anything
    does. The checksums of the file are checked first; a refused load leaves the model as it was.

    :raises CkptoolError: the file cannot be read or does not fit.
    """
    names = model_names(model)
    with open_path(path) as opened:
        view = opened.select(weights, select=select)

        def accepts(report: LoadReport) -> bool:
            return bool(report.matched) and (report.is_exact or not strict)

        return fill(model, names, view, place(view, names), accepts=accepts)


def fill(
    model: nn.Module,
    names: ModelNames,
    view: OpenedCheckpoint,
    placement: Placement,
    *,
    accepts: Callable[[LoadReport], bool],
) -> LoadReport:
    """Carry a placement out, if what comes of it is accepted; what contradicts itself is taken out of it.

    :raises CkptoolError: it is not accepted, bytes are damaged, or the model's own code refuses.
    """
    tensors = materialise(view.checkpoint.path, placement.tensors)
    for name, mismatch in contradictions(names, tensors).items():
        placement.mismatched[name] = mismatch
        del placement.tensors[name], tensors[name]
    report = summarise(view, names, placement)
    if not accepts(report):
        raise CkptoolError(explain(report))
    check_bytes(placement.tensors.values())
    state = {names.slots[name].key: tensor for name, tensor in tensors.items()}
    _copy(model, state | {names.values[name]: value for name, value in placement.values.items()}, report)
    return report


def _copy(model: nn.Module, state: dict[str, object], report: LoadReport) -> None:
    what = f"{report.source}: the model's own load_state_dict refused"
    with foreign_code(what, "load it with the version of the code that it was trained with"):
        model.load_state_dict(state, strict=False)
