"""Numbers for each input: only a constant or an unexpected range can be told from outside."""

from __future__ import annotations

import torch

from ckptool.model.verification import Check
from ckptool.verification.outputs import Inputs, Outputs
from ckptool.verification.tasks.case import LOAD_ADVICE, Case, Measured, conclude, corroborations, join_words, percent


def measure(outputs: Outputs, _inputs: Inputs) -> Measured:
    """Measure where the numbers lie."""
    values = outputs.judged.double().flatten()
    quantiles = torch.quantile(_thin(values), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    return Measured(
        {
            "mean": values.mean().item(),
            "magnitude": values.square().mean().sqrt().item(),
            "std": values.std(correction=0).item(),
            "min": values.min().item(),
            "percentile_5": quantiles[0].item(),
            "median": quantiles[1].item(),
            "percentile_95": quantiles[2].item(),
            "max": values.max().item(),
        }
    )


def _thin(values: torch.Tensor) -> torch.Tensor:
    return values[:: 1 + len(values) // 1_000_000]  # torch.quantile takes 16 million at most


def judge(case: Case, measured: Measured) -> Check:
    """Decide by ``--expect-range`` where it is given, else by what else speaks for weights that were never trained."""
    numbers, expected = measured.statistics, case.options.expect_range
    seen = (
        f"{case.fed} -> {numbers['min']:.4g} to {numbers['max']:.4g}, mean "
        f"{numbers['mean']:.4g}, standard deviation {numbers['std']:.4g}"
    )
    if expected is not None:
        return _judge_range(case, measured, seen, expected)
    # That copies have the same scale is weak on its own: trained and fresh networks may well share it.
    reasons = corroborations(case)
    alike = case.fresh().alike is True
    if reasons and len(reasons) > alike:
        return conclude(case, "fail", f"{seen}: {join_words(reasons)}.", numbers, LOAD_ADVICE)
    if alike:
        return conclude(case, "warn", f"{seen}, the scale of freshly initialised copies.", numbers, _RANGE_ADVICE)
    return conclude(case, "pass", f"{seen}.", numbers)


_RANGE_ADVICE = "say what is right with --expect-range LOW:HIGH"


def _judge_range(case: Case, measured: Measured, seen: str, expected: tuple[float, float]) -> Check:
    low, high = expected
    values = case.outputs.judged
    share = ((values >= low) & (values <= high)).double().mean().item()
    numbers = {**measured.statistics, "share_in_range": share}
    said = f"{seen}; {percent(share)} of the values lie in the expected range from {low:g} to {high:g}"
    if share >= case.options.thresholds.share:
        return conclude(case, "pass", f"{said}.", numbers)
    if case.in_domain:
        advice = "check how inputs and targets were scaled in training, and what was loaded (load.coverage)"
        return conclude(case, "fail", f"{said}.", numbers, advice)
    return conclude(case, "inconclusive", f"{said}, and these inputs are not your data.", numbers, case.advice)
