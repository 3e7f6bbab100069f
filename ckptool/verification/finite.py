"""Are the answers finite, and if not: which module was the first to give NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ckptool.model.verification import Check
from ckptool.verification.device import Batch, call_model, count_inputs, evaluating, move, take_inputs, tensors_of
from ckptool.verification.outputs import Inputs, Outputs

_ID = "output.finite"
_HALF = (torch.float16,)


def check_finite(model: nn.Module, inputs: Inputs, outputs: Outputs, device: torch.device) -> Check:
    """Judge whether every answer is finite; what is not gets its culprit named by running that batch once more."""
    counts = {name: int(bad.count_nonzero()) for name, bad in outputs.bad.items() if bad.any()}
    if not counts:
        names = ", ".join(outputs.tensors)
        return Check(_ID, "pass", f"all values of {names} are finite for all {inputs.count} inputs", {"bad_inputs": {}})
    bad = torch.stack(list(outputs.bad.values())).sum(dim=0)
    given = _unsound_inputs(inputs)
    if bool((given | (bad == 0)).all()):
        message = (
            f"{int(given.sum())} of {inputs.count} inputs hold NaN or infinity themselves, as do the answers to them"
        )
        return Check(
            _ID, "inconclusive", message, {"bad_inputs": counts, "given": int(given.sum())}, "give inputs without"
        )
    culprit = _first_culprit(model, _batch_with(inputs, bad, outputs.batch_size), device)
    seen = "; ".join(
        f"{count} of {inputs.count} inputs give NaN or infinity in {name}" for name, count in counts.items()
    )
    return Check(
        _ID,
        "fail",
        f"{seen}: {_explain(model, culprit)}",
        {"bad_inputs": counts, "module": culprit},
        "look at the values with: ckptool inspect PATH --stats",
    )


def _unsound_inputs(inputs: Inputs) -> Tensor:
    """Tell which inputs hold NaN or infinity."""
    return torch.cat([_not_finite_rows(batch) for batch in inputs.batches()])


def _not_finite_rows(batch: Batch) -> Tensor:
    count = count_inputs(batch)
    rows = [tensor.reshape(count, -1) for tensor in tensors_of(batch) if tensor.ndim and len(tensor) == count]
    return torch.stack([~row.isfinite().all(dim=1) for row in rows]).any(dim=0)


def _batch_with(inputs: Inputs, bad: Tensor, size: int) -> Batch:
    """Give the first batch, of ``size`` at most, with an input whose answer is not finite."""
    start = 0
    batch: Batch
    for batch in inputs.batches():
        stop = start + count_inputs(batch)
        if bad[start:stop].any():
            first = int(bad[start:stop].nonzero()[0])
            return take_inputs(batch, first // size * size, size)
        start = stop
    raise ValueError("the inputs are not those that the answers are to")


def _first_culprit(model: nn.Module, batch: Batch, device: torch.device) -> str | None:
    """Name the first module, in the order of the run, that makes NaN or infinity out of finite values."""
    found: list[str] = []

    def look(name: str, given: Any, answer: Any) -> None:
        if not found and not _all_finite(answer) and _all_finite(given):
            found.append(name)

    with evaluating(model), watching(model, look):
        call_model(model, move(batch, device))
    return found[0] if found else None


@contextmanager
def watching(model: nn.Module, look: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Call ``look`` with name, arguments and answer of every module that finishes, inner ones before outer ones.

    TorchScript runs without telling.
    """

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, given, answer: look(name, given, answer)

    open_modules = [pair for pair in model.named_modules() if not isinstance(pair[1], torch.jit.ScriptModule)]
    handles = [module.register_forward_hook(hook_of(name)) for name, module in open_modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _all_finite(value: Any) -> bool:
    """Tell whether no tensor within holds NaN or +inf; -inf is how masks are written."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or not bool((value.isnan() | value.isposinf()).any())
    if isinstance(value, dict):
        return all(_all_finite(each) for each in value.values())
    return not isinstance(value, list | tuple) or all(_all_finite(each) for each in value)


def _explain(model: nn.Module, culprit: str | None) -> str:
    if isinstance(model, torch.jit.ScriptModule):
        return "in which module cannot be told of a TorchScript program"
    if culprit is None:
        return "no module gives them on its own, so they arise between modules"
    module = model.get_submodule(culprit)
    place = f"the first module to give them is {culprit or 'the model itself'} ({type(module).__name__})"
    # Of a model whose parts cannot be told apart, all parts count.
    return f"{place}, {_reason(module, whole=not culprit)}"


def _reason(module: nn.Module, *, whole: bool) -> str:
    own = dict(module.named_parameters(recurse=whole)) | dict(module.named_buffers(recurse=whole))
    for name, tensor in own.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"whose {name} holds NaN or infinity"
    if (variance := own.get("running_var")) is not None and (variance < 0).any():
        return "whose running_var holds negative values"
    if any(tensor.dtype in _HALF for tensor in own.values()):
        return "whose values overflow in float16"
    return "whose own values are finite: what flows in is too large, or something is divided by zero"
