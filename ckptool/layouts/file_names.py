"""What the name of a checkpoint says about it: epoch, step, scores."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ckptool.layouts.training import METRIC_WORDS
from ckptool.model.training import Fact, Training

NAME_EVIDENCE = "from the file's name"

_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|nan|inf)"
# ``epoch=09-val_loss=0.38.ckpt``: Lightning's template, which many copy.
_PAIR = re.compile(rf"([A-Za-z][\w/@]*)=({_NUMBER})(?![0-9A-Za-z]|,\d)")  # 0,25 is no 0
_SCORE_WORDS = "|".join(sorted(METRIC_WORDS - {"best", "map", "metric", "score"}, key=len, reverse=True))
# ``val_acc_0.91``, ``loss0.35``: a score is a decimal fraction; a whole number could count anything.
_SCORE = re.compile(
    rf"(?<![a-z0-9])((?:(?:train|val|valid|validation|test|eval|dev)[_-]?)?(?:{_SCORE_WORDS}))(?:[_-]|(?<!\d))(\d+\.\d+)(?!\d)",
    re.IGNORECASE,
)
_EPOCH = re.compile(r"(?<![a-z])(?:epochs?|ep)[_-]?(\d+)(?!\d|\.\d)", re.IGNORECASE)
_STEP = re.compile(
    r"(?<![a-z])(?:global[_-]?step|steps?|iter|iters|iteration|checkpoint-)[_-]?(\d+)(?!\d|\.\d)", re.IGNORECASE
)
_EPOCH_NAMES, _STEP_NAMES = (
    frozenset({"epoch", "epochs", "ep"}),
    frozenset({"step", "steps", "iter", "iters", "iteration"}),
)
# Settings that people write into a name, too.
_SETTINGS = frozenset({"lr", "seed", "wd", "bs", "batch", "fold", "v", "version", "rank", "size", "width"})
_LONGEST = 255  # bytes: what file systems take; a longer name comes from elsewhere


def read_name(name: str) -> Training:
    """Read the facts that stand in the last part of a path; each says that it comes from there."""
    name = name[:_LONGEST]
    pairs = dict(_pairs(name))
    scores = pairs or dict(_scores(name))
    return Training(
        epoch=_counted(pairs, _EPOCH_NAMES) or _matched(_EPOCH, name),
        global_step=_counted(pairs, _STEP_NAMES) or _matched(_STEP, name),
        metrics={key: Fact(value, NAME_EVIDENCE) for key, value in scores.items() if not _is_count_or_setting(key)},
    )


def says_best(name: str) -> bool:
    """Tell whether a name calls its file the best (``model_best.pth.tar``), or a score the best so far."""
    return "best" in re.split(r"[^a-z]+", name.lower())


def _pairs(name: str) -> Iterator[tuple[str, float]]:
    for match in _PAIR.finditer(name):
        yield match[1].lstrip("_"), _number(match[2])


def _scores(name: str) -> Iterator[tuple[str, float]]:
    for match in _SCORE.finditer(name):
        yield match[1], _number(match[2])


def _number(text: str) -> float | int:
    return int(text) if text.isdigit() else float(text)


def _is_count_or_setting(key: str) -> bool:
    return _last_word(key) in _EPOCH_NAMES | _STEP_NAMES | _SETTINGS


def _last_word(key: str) -> str:
    return key.lower().rpartition("_")[2]


def _counted(pairs: Mapping[str, float | int], names: frozenset[str]) -> Fact | None:
    counts = (value for key, value in pairs.items() if _last_word(key) in names)
    return next((Fact(count, NAME_EVIDENCE) for count in counts if isinstance(count, int)), None)


def _matched(pattern: re.Pattern[str], name: str) -> Fact | None:
    match = pattern.search(name)
    return None if match is None else Fact(int(match[1]), NAME_EVIDENCE)
