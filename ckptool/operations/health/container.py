"""Judge the container: checksums, what its pickle names, and the keys of its state dict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ckptool.errors import PlanRefused
from ckptool.formats.shards import INDEX_CONTRADICTIONS
from ckptool.layouts.segments import quoted
from ckptool.model.checkpoint import Checkpoint, Finding
from ckptool.model.inspection import KeySummary
from ckptool.model.plans import KeyMove, KeyPlan
from ckptool.model.values import GlobalUse, Severity
from ckptool.model.verification import Check, VerifyOptions
from ckptool.operations.advice import next_step, shell_quote
from ckptool.operations.describe import judge
from ckptool.operations.health.survey import Fault, Survey
from ckptool.operations.opening import OpenedCheckpoint

_MAX_LISTED = 3

# Oddities of a container on which readers stumble, and those that carry more than tensors.
_ODD_CONTAINER = frozenset(
    {"compressed", "no-index", "no-version", "symlink-record", "trailing-bytes", "unlisted-bytes"}
)
_FOREIGN_CONTENT = frozenset({"extra-code", "extra-pickle", "nested-pickle", "program"})


def check_integrity(checkpoint: Checkpoint, survey: Survey) -> Check:
    """Tell whether every storage is what was written, as far as the file can prove it."""
    evidence = _integrity_evidence(checkpoint, survey)
    again = "get the file again, and compare its checksum with the one at its source"
    if survey.faults:
        return Check("integrity", "fail", _faulty(survey.faults), evidence, again)
    if survey.valueless:
        message = f"the file holds no values for {quoted(survey.valueless)}, saved while on the meta device"
        return Check("integrity", "fail", message, evidence, "save the model after its weights are read")
    wrong = [finding.text for finding in checkpoint.findings if finding.code in INDEX_CONTRADICTIONS]
    if wrong:
        return Check("integrity", "fail", "; ".join(wrong), evidence, "get index and shards again, from one place")
    part = [finding.text for finding in checkpoint.findings if finding.code == "one-shard"]
    if part:
        return Check("integrity", "warn", part[0], evidence, "verify the folder or the index instead")
    odd = [finding for finding in checkpoint.findings if finding.code in _ODD_CONTAINER]
    if odd or survey.unread:
        reasons = [*(finding.text for finding in odd), *dict.fromkeys(survey.unread.values())]
        return Check("integrity", "warn", "; ".join(reasons), evidence, "write it anew with ckptool convert")
    return Check("integrity", "pass", _sound(survey), evidence)


def _integrity_evidence(checkpoint: Checkpoint, survey: Survey) -> dict[str, Any]:
    return {
        "storages_checked": survey.checked,
        "storages_without_checksum": survey.unchecked,
        "faults": [
            {"record": fault.place, "tensors": list(fault.tensors), "reason": fault.reason} for fault in survey.faults
        ],
        "without_values": list(survey.valueless),
        "unread": dict(survey.unread),
        "findings": [finding.code for finding in checkpoint.findings],
    }


def _faulty(faults: Sequence[Fault]) -> str:
    shown = "; ".join(_fault(fault) for fault in faults[:_MAX_LISTED])
    more = f"; and {len(faults) - _MAX_LISTED} more" if len(faults) > _MAX_LISTED else ""
    return f"not everything can be read as it was written: {shown}{more}"


def _fault(fault: Fault) -> str:
    return f"{fault.reason} (in it: {quoted(fault.tensors)})" if fault.tensors else fault.reason


def _sound(survey: Survey) -> str:
    if not survey.checked and not survey.unchecked:
        return "sizes and offsets agree; no tensor holds any bytes"
    if not survey.checked:
        return "sizes and offsets agree; no checksum is stored, so damage inside the values would go unnoticed"
    rest = f"; {survey.unchecked} more have none" if survey.unchecked else ""
    return f"every stored checksum matches ({survey.checked} storages){rest}"


def check_safety(globals_used: Sequence[GlobalUse], findings: Iterable[Finding] = ()) -> Check:
    """Judge what the pickle names; also the ``globals`` of a file that could not be read to its end."""
    verdict = judge(globals_used).verdict
    foreign = [finding for finding in findings if finding.code in _FOREIGN_CONTENT]
    evidence = {
        "globals": [
            {"name": use.ref.full_name, "severity": use.ref.severity, "where": use.where, "called": use.called}
            for use in globals_used
        ],
        "findings": [finding.code for finding in foreign],
    }
    if verdict == "dangerous":
        message = f"the pickle names what can run commands: {_places(globals_used, 'dangerous')}"
        return Check("safety", "fail", message, evidence, "do not load it with torch.load(weights_only=False)")
    if verdict == "unknown" or foreign:
        named = _places(globals_used, "unknown")
        reasons = [f"the pickle names unknown classes: {named}"] if named else []
        message = "; ".join([*reasons, *(finding.text for finding in foreign)])
        run = "; to have it run and judged, where you trust it, add --trust-code" if _is_program(foreign) else ""
        return Check(
            "safety", "warn", message, evidence, f"leave {'it' if run else 'them'} behind with ckptool convert{run}"
        )
    return Check("safety", "pass", "nothing in the file can run code when it is loaded", evidence)


def _is_program(findings: Iterable[Finding]) -> bool:
    return any(finding.code == "program" for finding in findings)


def _places(uses: Sequence[GlobalUse], severity: Severity) -> str:
    found = [f"{use.ref.full_name} ({use.where})" for use in uses if use.ref.severity == severity]
    more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
    return ", ".join(found[:_MAX_LISTED]) + more


def check_keys(opened: OpenedCheckpoint, options: VerifyOptions) -> Check:
    """Tell whether the keys are those of the model itself; ``opened`` cleans them."""
    try:
        plan = opened.plan
    except PlanRefused as refusal:
        advice = "choose with --weights or --select; ckptool inspect lists what is there"
        return Check("keys", "inconclusive", str(refusal), {"refusal": refusal.code}, advice)
    renamed = [move for move in plan.moves if move.target not in (None, move.source)]
    evidence = {
        "keys": len(plan.moves),
        "renamed": len(renamed),
        "dropped": [move.source for move in plan.dropped],
        "certainty": plan.certainty,
        "wrappers": [
            {"name": wrapper.name, "segment": wrapper.segment, "count": wrapper.count, "of": wrapper.of}
            for wrapper in plan.wrappers
        ],
        "examples": {move.source: move.target for move in renamed[:_MAX_LISTED]},
    }
    if not renamed and not plan.dropped:
        return Check("keys", "pass", f"all {len(plan.moves)} keys are clean", evidence)
    taken = "taken as they are" if options.as_is else "cleaned here; a plain load_state_dict would not match them"
    message = f"{' and '.join(_unclean(plan, renamed))} ({taken})"
    return Check("keys", "warn", message, evidence, _strip_command(opened, options))


def _unclean(plan: KeyPlan, renamed: Sequence[KeyMove]) -> Iterable[str]:
    if renamed:
        example = f'"{renamed[0].source}" should be "{renamed[0].target}"'
        yield f"{len(renamed)} of {len(plan.moves)} keys carry {_wrappers(plan)}: {example}"
    if plan.dropped:
        yield f"{len(plan.dropped)} keys are no part of the model: {quoted([move.source for move in plan.dropped])}"


def _wrappers(plan: KeyPlan) -> str:
    named = [f'"{wrapper.segment}" of {wrapper.name}' for wrapper in plan.wrappers]
    sure = " (assumed)" if plan.certainty == "assumed" else ""
    return (" and ".join(named) or "names that are not the model's own") + sure


def _strip_command(opened: OpenedCheckpoint, options: VerifyOptions) -> str:
    summary = KeySummary(already_clean=False)
    step = next_step(opened.checkpoint, opened.selection, summary, judge(opened.checkpoint.globals))
    chosen = {"--weights": options.weights if options.weights != "main" else None, "--select": options.keys.select}
    words = "".join(f" {option} {shell_quote(value)}" for option, value in chosen.items() if value)
    return step.command.replace("ckptool strip-prefixes", f"ckptool strip-prefixes{words}", 1)
