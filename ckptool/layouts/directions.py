"""Whether a metric is better low or high, as far as its name tells."""

from __future__ import annotations

import re
from typing import Literal

_LOW = frozenset(
    {"loss", "error", "err", "perplexity", "ppl", "nll", "wer", "cer", "fid", "kid", "mse", "mae", "rmse", "mape"}
    | {"bpb", "bpc", "eer", "lpips", "crossentropy", "rmsle", "hter", "epe", "divergence"}
)
_HIGH = frozenset(
    {"acc", "accuracy", "auc", "auroc", "auprc", "f1", "fbeta", "bleu", "rouge", "rougel", "meteor", "dice", "iou"}
    | {"miou", "map", "prec", "precision", "recall", "sensitivity", "specificity", "psnr", "ssim", "top", "fitness"}
    | {"r2", "mcc", "kappa", "ndcg", "mrr", "pearson", "spearman", "spearmanr", "pearsonr"}
)
_LOW_ENDING, _HIGH_ENDING = ("loss", "error"), ("accuracy", "acc")
# What turns a direction round (``neg_mean_squared_error``).
_TURNS = frozenset({"neg", "negative", "minus", "inverse", "inv"})


def better_direction(metric: str) -> Literal["min", "max"] | None:
    """Give ``min`` or ``max``; None where the name says neither, or both."""
    words = _words(metric)
    low, high = any(map(_is_low, words)), any(map(_is_high, words))
    if low == high or not _TURNS.isdisjoint(words):
        return None
    return "min" if low else "max"


def _words(metric: str) -> list[str]:
    """Split a name at its marks; ``f1`` and ``r2`` stay whole, ``acc1`` and ``top5`` lose their number."""
    parts = re.split(r"[^a-z0-9]+", metric.lower())
    return [part if part in _HIGH or part in _LOW else part.rstrip("0123456789") for part in parts if part]


def _is_low(word: str) -> bool:
    return word in _LOW or word.endswith(_LOW_ENDING)


def _is_high(word: str) -> bool:
    return word in _HIGH or word.endswith(_HIGH_ENDING)
