"""Many checkpoints side by side, for programs: the fields of a JSON document, and tab-separated lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from ckptool.model.folder import FileRow, Ranking, Table
from ckptool.model.training import Fact
from ckptool.reports.inspect import with_evidence
from ckptool.reports.phrases import value_phrase
from ckptool.reports.text import row as line


def table_document(rows: Sequence[FileRow], documents: Sequence[Mapping[str, Any]], table: Table) -> dict[str, Any]:
    """Lay the answer out as the fields of a JSON object: ``rows`` as they were found, each beside its own document."""
    ranking = table.ranking
    ranks = {id(ranked): place for place, ranked in enumerate(ranking.rows[: ranking.ranked], 1)}
    return {
        "files": [
            {**document, **_fields(row), "rank": ranks.get(id(row)), **_verdict(row, ranking)}
            for row, document in zip(rows, documents, strict=True)
        ],
        "best": ranking.best and ranking.best.path,
        "metric": with_evidence(ranking.metric),
        "mode": with_evidence(ranking.mode),
        "reason": ranking.reason or None,
        "refusal": ranking.refusal or None,
        "skipped": dict(table.skipped),
    }


def _fields(row: FileRow) -> dict[str, Any]:
    return {
        "path": row.path,
        "file_bytes": row.nbytes,
        "modified": None if row.modified is None else time_text(row.modified),
        "kind": row.kind or None,
        "epoch": with_evidence(row.epoch),
        "global_step": with_evidence(row.global_step),
        "metrics": {name: with_evidence(fact) for name, fact in row.metrics.items()},
    }


def _verdict(row: FileRow, ranking: Ranking) -> dict[str, Any]:
    best = row is ranking.best
    return {"best": best, "reason": ranking.reason if best else None}


def time_text(seconds: float) -> str:
    """Write a time (seconds since 1970) as ISO 8601 in UTC; what no calendar holds as the seconds themselves."""
    try:
        return datetime.fromtimestamp(int(seconds), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return f"@{seconds:.0f}"


def table_lines(table: Table) -> Iterator[str]:
    """Yield a line per file, best first, each followed by its metrics; sizes in bytes, times in UTC."""
    ranking = table.ranking
    for row in ranking.rows:
        yield from _file(row, ranking)
    if ranking.metric is not None:
        mode = ranking.mode or Fact(None, "")
        yield line("ranked", ranking.metric.value, ranking.metric.evidence, mode.value, mode.evidence)
    if ranking.best is not None:
        yield line("best", ranking.best.path, ranking.reason)
    elif ranking.refusal:
        yield line("refusal", ranking.refusal)
    yield from (line("skipped", kind, count) for kind, count in sorted(table.skipped.items()))


def _file(row: FileRow, ranking: Ranking) -> Iterator[str]:
    if row.error:
        yield line("unreadable", row.path, row.error, row.verdict)
        return
    score = row.metrics.get(ranking.metric.value) if ranking.metric is not None else None
    facts = [None if fact is None else _exact(fact.value) for fact in (row.epoch, row.global_step, score)]
    modified = None if row.modified is None else time_text(row.modified)
    yield line(
        "file", "best" if row is ranking.best else None, row.path, row.kind, *facts, row.nbytes, modified, row.verdict
    )
    for name, fact in row.metrics.items():
        yield line("metric", row.path, name, _exact(fact.value), fact.evidence)


def _exact(value: Any) -> str:
    return repr(value) if isinstance(value, float) else value_phrase(value)
