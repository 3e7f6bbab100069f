"""What verify found, for programs: as a JSON document and as tab-separated lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ckptool.model.loading import LoadReport
from ckptool.model.verification import Check, Predictions, SideBySide, Verification
from ckptool.reports.json import to_json
from ckptool.reports.text import row

SCHEMA = "ckptool.verify/1"


def answer(verifications: Sequence[Verification], beside: SideBySide | None) -> str:
    """Write the JSON document: the fields of one verification, or several under ``files`` and ``side_by_side``."""
    documents = [document(verification) for verification in verifications]
    if len(documents) == 1:
        return to_json({"schema": SCHEMA, **documents[0]})
    return to_json({"schema": SCHEMA, "files": documents, "side_by_side": beside and _beside(beside)})


def _beside(beside: SideBySide) -> dict[str, Any]:
    return {
        "paths": list(beside.paths),
        "agreements": [dict(agreement) for agreement in beside.agreements],
        "rows": [
            {
                "input": name,
                "predictions": [{"class": index, "probability": probability} for index, probability in found],
            }
            for name, found in beside.rows
        ],
    }


def document(verification: Verification) -> dict[str, Any]:
    """Lay one verification out as the fields of a JSON object; the names are stable."""
    return {
        "path": verification.path,
        "verdict": verification.verdict,
        "checks": [_check(check) for check in verification.checks],
        "model": verification.model,
        "device": verification.device,
        "load": verification.load and _load(verification.load),
        "predictions": verification.predictions and _predictions(verification.predictions),
        "metrics": verification.metrics and dict(verification.metrics),
        "speed": verification.speed and dict(verification.speed),
        "suggestion": verification.suggestion,
        "notes": list(verification.notes),
        "error": verification.error,
        "thresholds": asdict(verification.thresholds),
    }


def _check(check: Check) -> dict[str, Any]:
    return {
        "id": check.id,
        "code": check.code,
        "status": check.status,
        "message": check.message,
        "evidence": dict(check.evidence),
        "advice": check.advice or None,
        "allowed": check.allowed or None,
    }


def _load(report: LoadReport) -> dict[str, Any]:
    return {
        "state_dict": report.state_dict,
        "certainty": report.certainty,
        "coverage": report.coverage,
        "matched": len(report.matched),
        "tied": list(report.tied),
        "defaulted": list(report.defaulted),
        "missing": list(report.missing),
        "unexpected": list(report.unexpected),
        "mismatched": [asdict(mismatch) for mismatch in report.mismatched],
        "dropped": [{"name": move.source, "reason": move.reason} for move in report.dropped],
        "casts": list(report.casts),
        "notes": [asdict(note) for note in report.notes],
    }


def _predictions(predictions: Predictions) -> dict[str, Any]:
    return {
        "task": predictions.task,
        "inputs": predictions.inputs,
        "kind": predictions.kind,
        "classes": predictions.classes,
        "histogram": {str(index): count for index, count in predictions.histogram.items()},
        "statistics": dict(predictions.statistics),
        "top": [
            {
                "input": name,
                "predictions": [
                    {"class": index, "name": class_name, "probability": probability}
                    for index, class_name, probability in ranked
                ],
            }
            for name, ranked in predictions.top
        ],
    }


def all_lines(verifications: Sequence[Verification], beside: SideBySide | None) -> Iterator[str]:
    """Yield every line of all verifications, then what sets them side by side."""
    for verification in verifications:
        yield from lines(verification)
    if beside is not None:
        yield from _beside_lines(beside)


def _beside_lines(beside: SideBySide) -> Iterator[str]:
    yield row("side-by-side", "", *beside.paths)
    for name in beside.agreements[0]:
        yield row("agreement", name, *(_cell(agreement[name]) for agreement in beside.agreements))
    for name, found in beside.rows:
        yield row("answer", name, *(f"{index}:{probability:.6f}" for index, probability in found))


def lines(verification: Verification) -> Iterator[str]:
    """Yield every line of one verification, the kind of each in its first cell; nothing cut."""
    yield row("path", verification.path)
    yield row("verdict", verification.verdict)
    for check in verification.checks:
        yield row("check", check.id, check.status, check.message, check.advice, check.code, check.allowed)
    if verification.model is not None:
        yield row("model", verification.model, verification.device)
    if verification.load is not None:
        yield from _load_lines(verification.load)
    if verification.predictions is not None:
        yield from _prediction_lines(verification.predictions)
    yield from _numbers("metric", verification.metrics)
    yield from _numbers("speed", verification.speed)
    if verification.suggestion is not None:
        yield row("suggestion", verification.suggestion)
    yield from (row("note", note) for note in verification.notes)
    if verification.error is not None:
        yield row("error", verification.error)


def _load_lines(report: LoadReport) -> Iterator[str]:
    yield row("load", "coverage", f"{report.coverage:.6f}")
    yield row("load", "matched", len(report.matched))
    for kind in ("missing", "unexpected"):
        yield from (row("load", kind, name) for name in getattr(report, kind))
    yield from (row("load", "mismatched", item.name, item.model, item.file) for item in report.mismatched)


def _prediction_lines(predictions: Predictions) -> Iterator[str]:
    yield row("predictions", predictions.task, predictions.inputs, predictions.kind, predictions.classes)
    yield from (row("class", index, count) for index, count in predictions.histogram.items())
    yield from _numbers("statistic", predictions.statistics)
    for name, ranked in predictions.top:
        yield from (row("top", name, index, class_name, f"{chance:.6f}") for index, class_name, chance in ranked)


def _numbers(kind: str, values: Mapping[str, Any] | None) -> Iterator[str]:
    for name, value in (values or {}).items():
        yield row(kind, name, _cell(value))


def _cell(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
