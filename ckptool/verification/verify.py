"""Verify a checkpoint with its model: what loads, what the model answers, how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ckptool.errors import ChecksumMismatch, CkptoolError, UnreadableCheckpoint
from ckptool.formats import open_checkpoint
from ckptool.loading.build import BuiltModel, archive_kind, build_archive, build_model
from ckptool.loading.checked import load_checked
from ckptool.loading.coverage import coverage_checks
from ckptool.model.loading import LoadReport
from ckptool.model.sources import Progress
from ckptool.model.verification import (
    Check,
    Predictions,
    SideBySide,
    Task,
    Verification,
    VerifyOptions,
    verdict_of,
)
from ckptool.operations.agreement import CHECK as AGREEMENT
from ckptool.operations.agreement import check_digest, check_tensors, digest_of, stored_precision, view_other
from ckptool.operations.health import check_file
from ckptool.operations.opening import OpenedCheckpoint, open_path
from ckptool.operations.verify_file import is_wanted, unreadable, wanted
from ckptool.verification.bench import check_speed, measure_speed
from ckptool.verification.compare import ELSEWHERE, check_outputs, side_by_side
from ckptool.verification.device import choose_device, describe_device, move_model
from ckptool.verification.golden import Golden, read_golden, save_golden
from ckptool.verification.inputs import prepare_inputs
from ckptool.verification.judge import judge
from ckptool.verification.metrics import check_accuracy, class_logits, class_numbers, measure
from ckptool.verification.outputs import Inputs, Outputs, run_model
from ckptool.verification.plots import confusion, draw_confusion, require_plot
from ckptool.verification.saving import require_new
from ckptool.verification.tasks.case import Background


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Hold what one checkpoint answered to which inputs."""

    outputs: torch.Tensor
    names: Sequence[str]
    task: Task


@dataclass(slots=True)
class _Findings:
    """Gather the answer, step by step."""

    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    answers: Answers | None = None
    load: LoadReport | None = None
    predictions: Predictions | None = None
    metrics: Mapping[str, float | None] | None = None
    speed: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _Running:
    """Hold a model that is ready to answer, with the inputs it is given."""

    built: BuiltModel
    model: nn.Module
    device: torch.device
    inputs: Inputs
    outputs: Outputs


def verify_model(path: Path, options: VerifyOptions, progress: Progress) -> Verification:
    """Check the file, load it into the model that ``--model`` names, and judge what that answers.

    A TorchScript or ``.pt2`` archive is its own model, once ``--trust-code`` says that its program may run.

    :raises CkptoolError: the model cannot be built or run, or what it is to be fed cannot be read.
    """
    return verify_and_keep(path, options, progress)[0]


def verify_and_keep(path: Path, options: VerifyOptions, progress: Progress) -> tuple[Verification, Answers | None]:
    """Do as ``verify_model``, and give the answers too; None where there are none.

    :raises CkptoolError: as ``verify_model``.
    """
    findings = _Findings()
    _refuse_outputs(options)
    try:
        built = _check_and_build(path, options, findings, progress)
    except UnreadableCheckpoint as error:
        return unreadable(path, error, options), None
    device = choose_device(options.device)
    findings.notes += built.notes
    model = _loaded(built, path, options, findings)
    if model is not None:
        _judge(_run(built, move_model(model, device), device, options, findings), path, options, findings, progress)
    return _concluded(path, built, device, options, findings), findings.answers


def set_side_by_side(answers: Mapping[str, Answers]) -> SideBySide:
    """Set the answers of several checkpoints, by path, beside each other; the first is the reference.

    :raises CkptoolError: they were not given the same inputs, or answer in other shapes.
    """
    first = next(iter(answers.values()))
    other = next((path for path, each in answers.items() if tuple(each.names) != tuple(first.names)), None)
    if other is not None:
        raise CkptoolError(f"{other}: was given other inputs than {next(iter(answers))}; verify them with --inputs")
    return side_by_side({path: each.outputs for path, each in answers.items()}, first.names, first.task)


def _refuse_outputs(options: VerifyOptions) -> None:
    """Refuse what could not be written before the work begins."""
    if options.plot is not None:
        require_plot(options.plot)
    if options.save_golden is not None:
        require_new(options.save_golden)


def _concluded(
    path: Path, built: BuiltModel, device: torch.device, options: VerifyOptions, findings: _Findings
) -> Verification:
    checks = wanted(tuple(findings.checks), options)
    return Verification(
        path=str(path),
        verdict=verdict_of(checks),
        checks=checks,
        model=built.description,
        device=describe_device(device),
        load=findings.load,
        predictions=findings.predictions,
        metrics=findings.metrics,
        speed=findings.speed,
        notes=tuple(dict.fromkeys(findings.notes)),
        thresholds=options.thresholds,
    )


def _check_and_build(path: Path, options: VerifyOptions, findings: _Findings, progress: Progress) -> BuiltModel:
    if archive_kind(path) is not None:
        return build_archive(path, trust_code=options.trust_code)
    with open_checkpoint(path) as checkpoint:
        opened = OpenedCheckpoint(checkpoint, options.weights, options.keys)
        findings.checks += check_file(opened, options, progress)
        return build_model(options, opened)


def _loaded(built: BuiltModel, path: Path, options: VerifyOptions, findings: _Findings) -> nn.Module | None:
    """Build the model and load it; None where no values can be trusted to be its own."""
    model = built.make(options.seed)
    if built.is_archive:
        return model
    try:
        findings.load = load_checked(model, path, options)
    except ChecksumMismatch:
        return None  # the check "integrity" has said so
    findings.checks += coverage_checks(findings.load, options)
    return None if findings.load.on_meta else model


def _run(
    built: BuiltModel, model: nn.Module, device: torch.device, options: VerifyOptions, findings: _Findings
) -> _Running:
    inputs: Inputs | None = _golden_inputs(options)
    if inputs is None:
        prepared = inputs = prepare_inputs(options, built, model, device)
        findings.notes += prepared.notes
    if options.plot is not None and inputs.labels is None:
        raise CkptoolError(f"--plot {options.plot}: a confusion matrix needs labels; give --data or --targets")
    outputs = run_model(model, inputs, device)
    findings.notes += (note.text for note in outputs.notes)
    return _Running(built, model, device, inputs, outputs)


def _golden_inputs(options: VerifyOptions) -> Golden | None:
    """Read the inputs of a golden file; None where ``--against`` names none."""
    if options.against is None or archive_kind(options.against) is not None:
        return None
    golden = read_golden(options.against, options.batch_size)
    own = next((name for name in ("images", "inputs", "data") if getattr(options, name) is not None), None)
    if golden is not None and own is not None:
        raise CkptoolError(f"--{own}: {options.against} holds the inputs that it was recorded with; give one of them")
    return golden


def _judge(running: _Running, path: Path, options: VerifyOptions, findings: _Findings, progress: Progress) -> None:
    background = Background(running.built.make, findings.load, _untrained_share(findings.checks))
    checks, findings.predictions = judge(
        running.model, running.inputs, running.outputs, options, running.device, background
    )
    findings.checks += checks
    findings.answers = Answers(running.outputs.judged, running.inputs.names, findings.predictions.task)
    task, labels = findings.predictions.task, running.inputs.labels
    if labels is not None:
        findings.metrics = measure(running.outputs.judged, labels, task)
    if labels is not None or options.min_accuracy is not None:
        findings.checks.append(check_accuracy(findings.metrics, labels, options.min_accuracy, options.thresholds))
    if options.against is not None:
        findings.checks += _agreement(running, path, options, findings, progress)
    if options.save_golden is not None:
        _record(running, path, options, findings.predictions)
    if options.bench and is_wanted("speed", options):
        findings.speed = measure_speed(running.model, running.inputs, running.device)
        findings.checks.append(check_speed(findings.speed))
    if options.plot is not None and labels is not None:
        _draw(running, options.plot, labels, task)


def _untrained_share(checks: list[Check]) -> float | None:
    found = next((check for check in checks if check.id == "values.untrained"), None)
    share = None if found is None else found.evidence.get("share")
    return share if isinstance(share, float) else None


def _agreement(
    running: _Running, path: Path, options: VerifyOptions, findings: _Findings, progress: Progress
) -> list[Check]:
    """Compare tensors and answers with those of ``--against``, a checkpoint or a golden file."""
    assert options.against is not None
    assert findings.predictions is not None
    if isinstance(running.inputs, Golden):
        golden = running.inputs
        with open_path(path) as ours:
            view = OpenedCheckpoint(ours.checkpoint, options.weights, options.keys)
            tensors = check_digest(digest_of(view), golden.facts.get("digest"), golden.path)
            precision = golden.precision(
                running.device, stored_precision(view.tensors.values()), same_tensors=tensors.status == "pass"
            )
        theirs = golden.outputs
    else:
        tensors, precision = _compare_tensors(running, path, options.against, options, progress)
        theirs = _answers_of(options.against, running, options)
    ours_judged = running.outputs.judged
    outputs = check_outputs(
        ours_judged,
        theirs,
        task=findings.predictions.task,
        precision=precision,
        thresholds=options.thresholds,
        other=options.against,
    )
    return [tensors, outputs]


def _compare_tensors(
    running: _Running, path: Path, other: Path, options: VerifyOptions, progress: Progress
) -> tuple[Check, str]:
    """Compare the tensors of two checkpoints, and say by which thresholds their answers are to be judged.

    A program's own tensors are not compared: it may compute in another order than the model it was made from.
    """
    program = next((each for each in (path, other) if archive_kind(each) is not None), None)
    if running.built.is_archive or program is not None:
        message = f"{program or path} is a program: its tensors are not compared, its answers decide"
        return Check(AGREEMENT, "skip", message), ELSEWHERE
    with open_path(path) as ours, open_path(other) as original:
        view = OpenedCheckpoint(ours.checkpoint, options.weights, options.keys)
        tensors, agreement = check_tensors(view, view_other(original, options), options, progress)
    return tensors, agreement.precision


def _answers_of(path: Path, running: _Running, options: VerifyOptions) -> torch.Tensor:
    """Give the answers of another checkpoint of the same model, or of a program, to the same inputs."""
    if archive_kind(path) is not None:
        model = build_archive(path, trust_code=options.trust_code).make(options.seed)
    else:
        model = running.built.make(options.seed)
        with open_path(path) as opened:
            view = view_other(opened, options)
        load_checked(model, path, replace(options, as_is=False, weights=view.weights, keys=view.keys))
    return run_model(move_model(model, running.device), running.inputs, running.device).judged


def _record(running: _Running, path: Path, options: VerifyOptions, predictions: Predictions) -> None:
    assert options.save_golden is not None
    facts = {"task": predictions.task, "model": running.built.description, "seed": str(options.seed)}
    if not running.built.is_archive:
        with open_path(path) as opened:
            view = OpenedCheckpoint(opened.checkpoint, options.weights, options.keys)
            facts |= {"precision": stored_precision(view.tensors.values()), "digest": digest_of(view) or ""}
    save_golden(options.save_golden, running.inputs, running.outputs.judged, facts, running.device)


def _draw(running: _Running, path: Path, labels: torch.Tensor, task: Task) -> None:
    counts = confusion(class_logits(running.outputs.judged, task), class_numbers(labels))
    draw_confusion(path, counts, running.built.description, running.inputs.class_names)
