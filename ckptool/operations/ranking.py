"""Which of many checkpoints is the best: by one metric, in a direction that somebody stated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import PurePath

from ckptool.layouts.directions import better_direction
from ckptool.layouts.file_names import says_best
from ckptool.model.folder import FileRow, Mode, Ranking
from ckptool.model.training import Fact

_MAX_NAMED = 6
# Where Lightning's ModelCheckpoint keeps the score of its metric.
_CALLBACK_SCORES = (".current_score", ".best_model_score")
_TRAINING_PREFIXES = ("train", "training")


def rank(rows: Sequence[FileRow], metric: str | None = None, mode: Mode | None = None) -> Ranking:
    """Order rows by a metric: the one that is asked for, that the trainer monitored, or the only one there is.

    Where it or its direction is open, nothing is the best, and ``refusal`` says what would settle it. A score that is
    not finite ranks nothing, nor does a file without weights.
    """
    able = [row for row in rows if not row.error and row.has_weights]
    if not able:
        return Ranking(
            _unranked(rows), refusal="no file here can be read and holds weights; check which ones are meant"
        )
    chosen = _metric(able, metric)
    if isinstance(chosen, str):
        return Ranking(_unranked(rows), refusal=chosen)
    if chosen is None:
        return _by_name(rows, able)
    direction = _direction(able, chosen.value, mode)
    if isinstance(direction, str):
        return Ranking(_unranked(rows), metric=chosen, refusal=direction)
    return _ranked(rows, able, chosen, direction)


# --- by what ---


def _metric(able: Sequence[FileRow], asked: str | None) -> Fact | str | None:
    """Give the metric with the reason for it, or the sentence why there is none; None where no file has any."""
    names = list(dict.fromkeys(name for row in able for name in row.metrics))
    if asked is not None:
        return Fact(asked, "as asked") if asked in names else f"--metric {asked}: no file here has it; {_offer(names)}"
    monitors = {name for row in able for name in _monitors(row)}
    watched = [name for name in names if name in monitors]
    if len(watched) == 1:
        return Fact(watched[0], "monitored by the trainer")
    if watched:
        return f"the trainer monitored several metrics ({_listed(watched)}); say which one counts with --metric"
    return _only_one([name for name in names if not says_best(name)])


def _monitors(row: FileRow) -> Iterator[str]:
    """Yield what the trainer monitored; of several callbacks, each kept the score that it chose by."""
    if row.monitor is not None and isinstance(row.monitor.value, str):
        yield row.monitor.value
    for name, fact in row.metrics.items():
        if fact.evidence.endswith(_CALLBACK_SCORES) and not says_best(name):
            yield name


def _only_one(names: Sequence[str]) -> Fact | str | None:
    """Settle on the only metric, or on the only one that was not measured in training."""
    held_out = [name for name in names if not name.lower().startswith(_TRAINING_PREFIXES)]
    for few, reason in ((names, "the only metric here"), (held_out, "the only metric here that is not of training")):
        if len(few) == 1:
            return Fact(few[0], reason)
    return f"there are several metrics ({_listed(names)}); say which one counts with --metric" if names else None


def _offer(names: Sequence[str]) -> str:
    return f"choose one of {_listed(names)}" if names else "none of them has any metric"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _direction(able: Sequence[FileRow], metric: str, asked: Mode | None) -> Fact | str:
    if asked is not None:
        return Fact(asked, "as asked")
    watching = [row for row in able if row.monitor is not None and row.monitor.value == metric]
    said = [row.mode.value for row in watching if row.mode is not None]
    modes = [mode for mode in ("min", "max") if mode in said]
    if len(modes) > 1:
        return f"{metric}: the files disagree whether low or high is better; say it with --mode min or --mode max"
    if modes:
        return Fact(modes[0], "as the trainer had it")
    by_name = better_direction(metric)
    if by_name is None:
        return f"{metric}: its name does not tell whether low or high is better; say it with --mode min or --mode max"
    return Fact(by_name, "by the metric's name")


# --- the order ---


def _ranked(rows: Sequence[FileRow], able: Sequence[FileRow], metric: Fact, mode: Fact) -> Ranking:
    sign = 1 if mode.value == "min" else -1
    scored = [(score, row) for row in able if (score := _score_of(row, metric.value)) is not None]
    scored.sort(key=lambda pair: sign * pair[0])
    first = [row for _, same in groupby(scored, key=itemgetter(0)) for row in _in_order([row for _, row in same])]
    if not first:
        refusal = f"{metric.value}: no file here has a finite value of it; choose another one with --metric"
        return Ranking(_unranked(rows), metric=metric, mode=mode, refusal=refusal)
    taken = set(map(id, first))
    rest = _unranked([row for row in rows if id(row) not in taken])
    return Ranking((*first, *rest), len(first), metric, mode, first[0], _why(scored[0][0], scored, metric, mode))


def _score_of(row: FileRow, metric: str) -> float | None:
    """Give the finite value of a metric, or None."""
    fact = row.metrics.get(metric)
    if fact is None or type(fact.value) not in (int, float):
        return None
    try:
        score = float(fact.value)
    except OverflowError:
        return None
    return score if math.isfinite(score) else None


def _in_order(rows: Sequence[FileRow]) -> list[FileRow]:
    """Order equal scores: the first to reach one; trainers keep a score when they save later without a better one."""
    clocks = _clocks(rows)
    return sorted(
        rows, key=lambda row: (*[clock(row) for clock in clocks], not says_best(PurePath(row.path).name), row.path)
    )


def _clocks(rows: Sequence[FileRow]) -> list[Callable[[FileRow], float]]:
    """Give what tells earlier from later: all of the files must have it."""
    return [clock for clock in (_step, _epoch) if all(clock(row) != math.inf for row in rows)]


def _step(row: FileRow) -> float:
    return _count(row.global_step)


def _epoch(row: FileRow) -> float:
    return _count(row.epoch)


def _count(fact: Fact | None) -> float:
    return fact.value if fact is not None and type(fact.value) is int else math.inf


def _why(best: float, scored: Sequence[tuple[float, FileRow]], metric: Fact, mode: Fact) -> str:
    equal = [row for score, row in scored if score == best]
    counts = "the earliest counts" if _clocks(equal) else "none tells when, the first listed counts"
    extreme = "lowest" if mode.value == "min" else "highest"
    tied = f", as in {len(equal) - 1} more: {counts}" if equal[1:] else ""
    settled = f"{metric.evidence}; mode {mode.value} {mode.evidence}"
    return f"{extreme} {metric.value} of {len(scored)}, {best:.6g}{tied} ({settled})"


def _by_name(rows: Sequence[FileRow], able: Sequence[FileRow]) -> Ranking:
    """Believe a name that says "best" where no file has a score of its own."""
    named = [row for row in able if says_best(PurePath(row.path).name)]
    records = list(dict.fromkeys(name for row in able for name in row.metrics))
    if len(named) != 1:
        return Ranking(_unranked(rows), refusal=_nothing_to_go_by(records))
    others = _unranked([row for row in rows if row is not named[0]])
    return Ranking((named[0], *others), 1, best=named[0], reason="its name says so; no file has a score of its own")


def _nothing_to_go_by(records: Sequence[str]) -> str:
    if records:
        return f"{_listed(records)} is the best score so far, no file's own; rank by it with --metric all the same"
    return (
        "neither the files nor their names tell a metric; let the trainer record one (ModelCheckpoint(monitor=...)), or"
        " put it into the names (epoch=09-val_loss=0.38.ckpt)"
    )


def _unranked(rows: Sequence[FileRow]) -> tuple[FileRow, ...]:
    """Order by time, then by path; what cannot be read comes last."""
    return tuple(sorted(rows, key=lambda row: (bool(row.error), row.modified or 0.0, row.path)))
