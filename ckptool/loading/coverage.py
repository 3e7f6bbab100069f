"""Judge how much of a model came out of a file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptool.layouts.reference import LEFT_OVER
from ckptool.layouts.roots import EMA_ROOTS, LOSS_ENDINGS, LOSS_ROOTS, SIDE_KEYS
from ckptool.layouts.segments import Names, any_glob, quoted, without
from ckptool.loading.checked import CLEAN_COMMAND, RENAMED, STRIP_COMMAND, WOULD_MATCH
from ckptool.model.loading import LoadReport
from ckptool.model.verification import Check, CheckStatus, VerifyOptions

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_MOST_PATTERNS = 20  # in the evidence
_SHOWN = 3  # in a message
_SIDE_ROOTS = LOSS_ROOTS.union(EMA_ROOTS, *(side.names for side in SIDE_KEYS))


def coverage_checks(report: LoadReport, options: VerifyOptions) -> tuple[Check, ...]:
    """Judge a load: is all of the model in the file, is anything else, has every tensor memory."""
    return (_check_coverage(report, options), _check_meta(report))


def told_by_model(check: Check, report: LoadReport) -> Check:
    """Judge the keys by the names of the model, where a command is known that gives them and the file alone does not.

    ``check`` is what the file alone says of them.
    """
    command = next((note.text for note in report.notes if note.code == CLEAN_COMMAND), None)
    if check.id != "keys" or command is None:
        return check
    first = report.renamed[0]
    message = (
        f'{len(report.renamed)} keys are not the model\'s own: "{first.source}" should be "{first.target}" (cleaned '
        "here; a plain load_state_dict would not match them)"
    )
    examples = {move.source: move.target for move in report.renamed[:_SHOWN]}
    evidence = {**check.evidence, "renamed": len(report.renamed), "examples": examples}
    return Check("keys", "warn", message, evidence, command)


@dataclass(frozen=True, slots=True)
class _Gaps:
    """Hold the names that are held against a file, after what is ignored and what the user allows."""

    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    unexpected: tuple[str, ...]
    outside: tuple[str, ...]
    allowed: int


def _gaps(report: LoadReport, options: VerifyOptions) -> _Gaps:
    mismatched = tuple(item.name for item in report.mismatched)
    absent, unknown = (*report.missing, *mismatched), report.unexpected
    may_be_missing, may_be_unexpected = any_glob(options.allow_missing), any_glob(options.allow_unexpected)
    allowed = set(filter(may_be_missing, absent)) | set(filter(may_be_unexpected, (*unknown, *mismatched)))
    excused = allowed | set(report.ignored)
    outside = [move.source for move in report.dropped if move.reason == LEFT_OVER]
    return _Gaps(
        missing=_without(report.missing, excused),
        mismatched=_without(mismatched, excused),
        unexpected=_without(unknown, excused),
        outside=tuple(name for name in outside if not _is_side_part(name) and not may_be_unexpected(name)),
        allowed=len(allowed),
    )


def _without(names: Iterable[str], excused: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in excused)


def _is_side_part(name: str) -> bool:
    """Tell whether a key lies below a loss, a metric or an average: no loader of the network wants it."""
    root = without(name, Names([name]).private_segments()).partition(".")[0]
    return root in _SIDE_ROOTS or root.endswith(LOSS_ENDINGS)


def _check_coverage(report: LoadReport, options: VerifyOptions) -> Check:
    gaps = _gaps(report, options)
    status = _status(report, gaps, options)
    parts = [_summary(report), *_complaints(report, gaps), *(_remarks(report, gaps, options) if report.matched else ())]
    notes = {note.code: note.text for note in report.notes}
    if status != "pass":
        parts += [notes[code] for code in (WOULD_MATCH, RENAMED) if code in notes]
    return Check(
        "load.coverage", status, "; ".join(parts), _evidence(report, gaps), _advice(report, gaps, status, options)
    )


def _status(report: LoadReport, gaps: _Gaps, options: VerifyOptions) -> CheckStatus:
    is_short = bool(gaps.missing or gaps.mismatched)
    if not report.matched or gaps.unexpected or (is_short and report.coverage < options.thresholds.coverage):
        return "fail"
    return "warn" if is_short or gaps.outside or (options.as_is and _is_strictly_short(report)) else "pass"


def _is_strictly_short(report: LoadReport) -> bool:
    """Tell whether a strict ``load_state_dict`` would complain all the same."""
    return bool(report.tied or report.ignored)


def _summary(report: LoadReport) -> str:
    loaded = len(report.matched) + len(report.tied)
    total = loaded + len(report.defaulted) + len(report.missing) + len(report.mismatched)
    if not report.matched:
        return f"none of the model's {total} tensors is in the file: the model is as it was initialised"
    return f"{loaded} of {total} tensors of the model loaded, {_percent(report.coverage)} of its elements"


def _percent(share: float) -> str:
    """Write a share so that less than all never reads as all."""
    text = f"{100 * share:.1f}"
    return "100 %" if share >= 1 else f"{'99.9' if text == '100.0' else text} %"


def _complaints(report: LoadReport, gaps: _Gaps) -> list[str]:
    shapes = {item.name: f"{item.file} instead of {item.model}" for item in report.mismatched}
    first = next((f" ({shapes[name]})" for name in gaps.mismatched), "")
    parts = (
        _part(gaps.missing, "missing: they are as initialised") if report.matched else "",
        _part(gaps.mismatched, f"of another shape or kind{first}"),
        _part(gaps.unexpected, "in the file and unknown to the model"),
        _part(gaps.outside, "in the file and outside of the part that is the model"),
    )
    return [part for part in parts if part]


def _part(names: tuple[str, ...], what: str) -> str:
    counts = fold(names)
    shown = [pattern if count == 1 else f"{pattern} x {count}" for pattern, count in counts.items()][:_SHOWN]
    left = len(names) - sum(list(counts.values())[:_SHOWN])
    more = f" and {left} more" if left else ""
    return f"{len(names)} {what}: {quoted(shown)}{more}" if names else ""


def _remarks(report: LoadReport, gaps: _Gaps, options: VerifyOptions) -> list[str]:
    absent = ", which a strict load_state_dict would not accept" if options.as_is else ""
    parts = (
        (len(report.tied), f"present as another name of the same tensor{absent}"),
        (len(report.defaulted), "left at its start: a counter that the file is too old to have"),
        (len(report.ignored), f"different without consequence (they hold nothing learnt){absent}"),
        (len(report.casts), "cast to the dtype of the model"),
        (gaps.allowed, "missing or unknown as allowed"),
    )
    return [f"{count} {what}" for count, what in parts if count]


def _advice(report: LoadReport, gaps: _Gaps, status: CheckStatus, options: VerifyOptions) -> str:
    notes = {note.code: note.text for note in report.notes}
    if status == "pass":
        return ""
    if STRIP_COMMAND in notes:
        return notes[STRIP_COMMAND]
    if not report.matched:
        return "name the model that the file was saved from with --model, or other weights with --weights"
    if options.as_is and not (gaps.missing or gaps.mismatched or gaps.unexpected or gaps.outside):
        wanted = "write every name with ckptool convert --ties copy, or " if report.tied else ""
        return f"{wanted}let those who load it use strict=False"
    if RENAMED in notes:
        return "give the names with ckptool strip-prefixes --map FILE"
    allow = {
        "--allow-missing": (*gaps.missing, *gaps.mismatched),
        "--allow-unexpected": (*gaps.unexpected, *gaps.outside),
    }
    meant = " ".join(f"{option} '{next(iter(fold(names)))}'" for option, names in allow.items() if names)
    return f"check that --model is the model that was trained; if the difference is meant, {meant}" if meant else ""


def _evidence(report: LoadReport, gaps: _Gaps) -> Mapping[str, Any]:
    return {
        "coverage": report.coverage,
        "matched": len(report.matched),
        "missing": _folded(report.missing),
        "unexpected": _folded(report.unexpected),
        "mismatched": [{"name": item.name, "model": item.model, "file": item.file} for item in report.mismatched],
        "tied": list(report.tied),
        "defaulted": len(report.defaulted),
        "ignored": _folded(report.ignored),
        "allowed": gaps.allowed,
        "outside": _folded(gaps.outside),
        "casts": len(report.casts),
        "certainty": report.certainty,
        "state_dict": report.state_dict,
    }


def _folded(names: tuple[str, ...]) -> dict[str, int]:
    return dict(fold(names).most_common(_MOST_PATTERNS))


def fold(names: Iterable[str]) -> Counter[str]:
    """Group names that differ in their numbers alone (``layers.*.attn.weight``), and count them."""
    return Counter(_NUMBER.sub("*", name) for name in names)


def _check_meta(report: LoadReport) -> Check:
    if not report.on_meta:
        return Check("load.meta", "pass", "every tensor of the model has memory")
    message = f"{len(report.on_meta)} tensors of the model are on the meta device, without memory"
    advice = "build the model on the CPU: its output would be made up"
    return Check("load.meta", "fail", f"{message}: {quoted(report.on_meta)}", {"tensors": list(report.on_meta)}, advice)
