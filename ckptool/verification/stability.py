"""Does the same input get the same answer: a second time, and alone instead of among others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ckptool.errors import CkptoolError
from ckptool.model.verification import Check
from ckptool.verification.device import Batch, count_inputs, evaluating, take_inputs
from ckptool.verification.outputs import run_batch
from ckptool.verification.statistics import relative_difference

# Kernels sum in another order for another number of rows: what float32 loses by that, and what half precision
# does, or an accelerator's convolutions, which round float32 to 10 bits (TF32).
_TOLERANCE = 1e-4
_HALF_TOLERANCE = 2e-2
_LEAST_BYTES = 4
_PARTS = 3


def check_stability(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Check, Check]:
    """Judge determinism (two runs are equal) and batch invariance (a row alone is the row among others)."""
    with evaluating(model):
        unruly = [name for name, module in model.named_modules() if name and module.training]
        first, second = (run_batch(model, batch, device).tensors for _ in range(2))
        determinism = _check_determinism(first, second, _tolerance_of(model, device), unruly)
        if determinism.status != "pass":
            skipped = Check(
                "output.batch", "skip", "the answers differ from run to run, so there is nothing to compare"
            )
            return determinism, skipped
        return determinism, _check_batch(model, batch, device, first, unruly)


def _check_determinism(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], tolerance: float, unruly: list[str]
) -> Check:
    difference = _largest_difference(first, second)
    evidence = {"relative_difference": difference, "tolerance": tolerance, "still_training": unruly}
    if difference <= tolerance:
        return Check("output.determinism", "pass", "two runs over the same inputs give the same answers", evidence)
    cause = f"; {_name_some(unruly)} stay in training mode" if unruly else "; something in its forward is random"
    return Check(
        "output.determinism",
        "warn",
        f"two runs over the same inputs differ by {difference:.2g} of the largest value{cause}",
        evidence,
        "call dropout with training=self.training, and do not override train() or eval()",
    )


def _check_batch(
    model: nn.Module, batch: Batch, device: torch.device, together: Mapping[str, Tensor], unruly: list[str]
) -> Check:
    # BatchNorm in training mode refuses a single input, and takes two.
    sizes = [size for size in (1, 2) if size < count_inputs(batch)]
    refusal = "the batches have a single input"
    for size in sizes:
        try:
            difference = _difference_in_parts(model, batch, size, device, together)
        except CkptoolError as error:
            refusal = f"the model takes no smaller batch: {error}"
            continue
        return _judge_batch(difference, _tolerance_of(model, device), unruly)
    return Check("output.batch", "skip", refusal)


def _difference_in_parts(
    model: nn.Module, batch: Batch, size: int, device: torch.device, together: Mapping[str, Tensor]
) -> float:
    """Give by how much the answers to a few small parts of a batch differ from those in the whole."""
    starts = {round(step * (count_inputs(batch) - size) / (_PARTS - 1)) for step in range(_PARTS)}
    differences = []
    for start in sorted(starts):
        alone = run_batch(model, take_inputs(batch, start, size), device).tensors
        whole = {name: tensor[start : start + size] for name, tensor in together.items()}
        differences.append(_largest_difference(whole, alone, together))
    return max(differences)


def _judge_batch(difference: float, tolerance: float, unruly: list[str]) -> Check:
    evidence = {"relative_difference": difference, "tolerance": tolerance, "still_training": unruly}
    if difference <= tolerance:
        return Check("output.batch", "pass", "an input alone gets the answer that it gets in a batch", evidence)
    cause = f"{_name_some(unruly)} stay in training mode" if unruly else "likely a BatchNorm that uses batch statistics"
    return Check(
        "output.batch",
        "warn",
        f"an input alone gets another answer than in a batch, by {difference:.2g} of the largest value: {cause}",
        evidence,
        "let BatchNorm track running statistics and follow eval(); until then answers depend on what is beside them",
    )


def _largest_difference(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], scale: Mapping[str, Tensor] | None = None
) -> float:
    shared = [name for name in one if name in other and one[name].shape == other[name].shape]
    return max((relative_difference(one[name], other[name], (scale or one)[name]) for name in shared), default=0.0)


def _tolerance_of(model: nn.Module, device: torch.device) -> float:
    sizes = [parameter.element_size() for parameter in model.parameters() if parameter.is_floating_point()]
    exact = device.type == "cpu" and min(sizes, default=_LEAST_BYTES) >= _LEAST_BYTES
    return _TOLERANCE if exact else _HALF_TOLERANCE


def _name_some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
