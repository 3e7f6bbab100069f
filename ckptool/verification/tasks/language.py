"""The next token: is text likelier to the model than a guess, and does it depend on what came before."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ckptool.model.verification import Check
from ckptool.verification import statistics
from ckptool.verification.device import Batch
from ckptool.verification.outputs import Inputs, Outputs
from ckptool.verification.tasks.case import (
    LOAD_ADVICE,
    Case,
    Measured,
    conclude,
    conclude_told_apart,
    corroborations,
    exonerations,
    join_words,
)
from ckptool.verification.tasks.segmentation import flatten_places

_SYNTHETIC = "synthetic"
_TOKEN_NAMES = ("decoder_input_ids", "input_ids", "tokens", "idx", "ids")
_MASK = "attention_mask"


def tokens_of(batch: Batch) -> Tensor | None:
    """Give the token ids among the inputs of a batch, [rows, positions]."""
    if isinstance(batch, Tensor):
        named: Mapping[str, Tensor] = {"input": batch}
    else:
        named = batch if isinstance(batch, Mapping) else {str(index): each for index, each in enumerate(batch)}
    whole = {name: each for name, each in named.items() if each.ndim == 2 and not each.is_floating_point()}
    name = next((name for name in _TOKEN_NAMES if name in whole), next(iter(whole), None))
    return None if name is None else whole[name]


def measure(outputs: Outputs, inputs: Inputs) -> Measured:
    """Measure what the logits at each position tell about the place, and about the token that comes next there."""
    rows = flatten_places(outputs.judged, -1)
    probabilities = statistics.as_probabilities(rows)
    histogram = statistics.histogram(probabilities.argmax(dim=1))
    numbers = {
        "mutual_information": statistics.mutual_information(probabilities),
        "input_dependence": statistics.input_dependence(statistics.without_masked(rows)),
        "mean_confidence": probabilities.amax(dim=1).mean().item(),
        "distinct_tokens": float(len(histogram)),
        "spread": statistics.spread(statistics.without_masked(rows)),
    }
    return Measured(numbers | _measure_next(outputs, inputs), rows.shape[1], histogram)


def _measure_next(outputs: Outputs, inputs: Inputs) -> dict[str, float]:
    """Measure the cross-entropy of the next token, in nats, and how often the model just repeats the last one."""
    pairs = _tokens_and_mask(inputs)
    if pairs is None or outputs.positions is None:
        return {}
    tokens, mask = pairs
    kept = [(index, place) for index, place in enumerate(outputs.positions) if place + 1 < tokens.shape[1]]
    if not kept or outputs.judged.shape[2] <= int(tokens.max()):
        return {}
    logits = outputs.judged[:, [index for index, _ in kept]]
    here, following = (tokens[:, [place + step for _, place in kept]] for step in (0, 1))
    real = mask[:, [place + 1 for _, place in kept]]
    losses = logits.logsumexp(dim=-1) - logits.gather(-1, following.unsqueeze(-1)).squeeze(-1)
    return {
        "cross_entropy": losses[real].double().mean().item(),
        "guess_entropy": math.log(logits.shape[-1]),
        "echo": (logits.argmax(dim=-1) == here)[real].double().mean().item(),
    }


def _tokens_and_mask(inputs: Inputs) -> tuple[Tensor, Tensor] | None:
    """Give the tokens of all inputs and which of them are text, not padding; None where there are none."""
    tokens, masks = [], []
    for batch in inputs.batches():
        found = tokens_of(batch)
        if found is None:
            return None
        mask = batch.get(_MASK) if isinstance(batch, Mapping) else None
        tokens.append(found.cpu().long())
        masks.append(torch.ones_like(tokens[-1], dtype=torch.bool) if mask is None else mask.cpu().bool())
    same = len({each.shape[1] for each in (*tokens, *masks)}) == 1
    return (torch.cat(tokens), torch.cat(masks)) if same and all(each.any() for each in masks) else None


def judge(case: Case, measured: Measured) -> Check:
    """Decide by the likelihood of text where there is text and the model reads from left to right."""
    if case.causal and case.inputs.kind != _SYNTHETIC and "cross_entropy" in measured.statistics:
        return _judge_text(case, measured)
    return _judge_random(case, measured)


def _judge_text(case: Case, measured: Measured) -> Check:
    numbers, limits = measured.statistics, case.options.thresholds
    share = numbers["cross_entropy"] / numbers["guess_entropy"]
    seen = (
        f"text costs {numbers['cross_entropy']:.2f} nats a token, {share:.0%} of a blind guess "
        f"(ln {measured.classes} = {numbers['guess_entropy']:.2f}); {numbers['echo']:.0%} of its answers repeat "
        "the last token"
    )
    if share < limits.cross_entropy_warn and numbers["echo"] < limits.echo:
        return conclude(case, "pass", f"{seen}.", numbers)
    if share < limits.cross_entropy_fail and numbers["echo"] < limits.echo:
        advice = "if it was trained on other text than English, confirm with --inputs FILE"
        return conclude(case, "warn", f"{seen}: hardly more than a guess.{exonerations(case)}", numbers, advice)
    reasons = corroborations(case) or ["layers that were not loaded, or another tokenizer, look like this"]
    return conclude(case, "fail", f"{seen}: {join_words(reasons)}.", numbers, LOAD_ADVICE)


def _judge_random(case: Case, measured: Measured) -> Check:
    numbers, limits = measured.statistics, case.options.thresholds
    seen = (
        f"{case.fed} -> {numbers['distinct_tokens']:.0f} of {measured.classes} "
        f"tokens (mean confidence {numbers['mean_confidence']:.3g}; mutual information "
        f"{numbers['mutual_information']:.3f})"
    )
    told_apart = numbers["mutual_information"] >= limits.mutual_information
    return conclude_told_apart(case, numbers, seen, told_apart=told_apart, unsettled="inconclusive")
