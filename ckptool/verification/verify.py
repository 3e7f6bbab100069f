"""Verify a checkpoint with its model: what loads, what the model answers, how fast."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ckptool.errors import ChecksumMismatch, CkptoolError, UnreadableCheckpoint
from ckptool.formats import open_checkpoint
from ckptool.loading.build import BuiltModel, archive_kind, build_archive, build_model
from ckptool.loading.checked import load_checked
from ckptool.loading.coverage import coverage_checks, told_by_model
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
from ckptool.operations.health import check_file
from ckptool.operations.opening import OpenedCheckpoint
from ckptool.operations.verify_file import is_wanted, unreadable, wanted
from ckptool.verification.against import agreement_checks, golden_inputs, record_golden
from ckptool.verification.bench import check_speed, measure_speed
from ckptool.verification.compare import side_by_side
from ckptool.verification.device import choose_device, describe_device, move_model
from ckptool.verification.inputs import prepare_inputs
from ckptool.verification.judge import judge
from ckptool.verification.metrics import (
    MEASURED,
    check_accuracy,
    class_logits,
    class_numbers,
    measure,
    soften_untrained,
)
from ckptool.verification.outputs import Inputs, run_model
from ckptool.verification.plots import confusion, draw_confusion, require_plot
from ckptool.verification.running import Running
from ckptool.verification.tasks.case import Background
from ckptool.writers.saving import require_new


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Hold what one checkpoint answered to which inputs."""

    outputs: torch.Tensor
    names: Sequence[str]
    task: Task


@dataclass(slots=True)
class _Work:
    """Hold what is asked of one checkpoint, and gather what is found, step by step."""

    path: Path
    options: VerifyOptions
    device: torch.device
    progress: Progress
    built: BuiltModel | None = None
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    answers: Answers | None = None
    load: LoadReport | None = None
    predictions: Predictions | None = None
    metrics: Mapping[str, float | None] | None = None
    speed: Mapping[str, Any] | None = None
    error: str | None = None


def verify_model(path: Path, options: VerifyOptions, progress: Progress) -> Verification:
    """Check the file, load it into the model that ``--model`` names, and judge what that answers.

    A TorchScript or ``.pt2`` archive is its own model, once ``--trust-code`` says that its program may run. What stops
    all this once the file itself was checked is the answer's ``error``, beside those checks.

    :raises CkptoolError: the device, or what is to be written, is refused.
    """
    return verify_and_keep(path, options, progress)[0]


def verify_and_keep(path: Path, options: VerifyOptions, progress: Progress) -> tuple[Verification, Answers | None]:
    """Do as ``verify_model``, and give the answers too; None where there are none.

    :raises CkptoolError: as ``verify_model``.
    """
    work = _Work(path, options, choose_device(options.device), progress)
    _refuse_outputs(options)
    try:
        with redirect_stdout(sys.stderr):  # a model's code may print: stdout carries the answer only
            _check_file(work)
            _load_and_judge(work)
    except UnreadableCheckpoint as error:
        if not work.checks:
            return unreadable(path, error, options), None
        work.error = str(error)
    except CkptoolError as error:
        work.error = str(error)
    return _concluded(work), work.answers


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


def _concluded(work: _Work) -> Verification:
    """Sum up; checks that are not asked for are left out.

    :raises CkptoolError: that leaves none.
    """
    options = work.options
    checks = tuple(each for each in work.checks if is_wanted(each.id, options))
    return Verification(
        path=str(work.path),
        verdict=verdict_of(wanted(checks, options)) if work.error is None else "error",
        checks=checks,
        model=None if work.built is None else work.built.description,
        device=None if work.built is None else describe_device(work.device),
        load=work.load,
        predictions=work.predictions,
        metrics=work.metrics,
        speed=work.speed,
        notes=tuple(dict.fromkeys(work.notes)),
        error=work.error,
        thresholds=options.thresholds,
    )


def _check_file(work: _Work) -> None:
    """Check the file and find its model, which a program is itself: it needs no keys, and runs after these checks."""
    is_program = archive_kind(work.path) is not None
    with open_checkpoint(work.path) as checkpoint:
        opened = OpenedCheckpoint(checkpoint, work.options.weights, work.options.keys)
        checks = check_file(opened, work.options, work.progress)
        work.checks += (check for check in checks if not (is_program and check.id == "keys"))
        work.built = None if is_program else build_model(work.options, opened)
    if is_program:
        work.built = build_archive(work.path, trust_code=work.options.trust_code)


def _load_and_judge(work: _Work) -> None:
    assert work.built is not None
    work.notes += work.built.notes
    model = _loaded(work, work.built)
    if model is not None:
        _judge(_run(work, work.built, move_model(model, work.device)), work)


def _loaded(work: _Work, built: BuiltModel) -> nn.Module | None:
    """Build the model and load it; None where no values can be trusted to be its own."""
    model = built.make(work.options.seed)
    if archive_kind(work.path) is not None:
        return model
    try:
        work.load = load_checked(model, work.path, work.options)
    except ChecksumMismatch:
        return None  # the check "integrity" has said so
    checks = [told_by_model(each, work.load) for each in work.checks]
    work.checks = [*checks, *coverage_checks(work.load, work.options)]
    return None if work.load.on_meta else model


def _run(work: _Work, built: BuiltModel, model: nn.Module) -> Running:
    inputs: Inputs | None = golden_inputs(work.options)
    if inputs is None:
        prepared = inputs = prepare_inputs(work.options, built, model, work.device)
        work.notes += prepared.notes
    if work.options.plot is not None and inputs.labels is None:
        raise CkptoolError(f"--plot {work.options.plot}: a confusion matrix needs labels; give --data or --targets")
    outputs = run_model(model, inputs, work.device)
    work.notes += (note.text for note in outputs.notes)
    return Running(work.path, work.options, built, model, work.device, inputs, outputs)


def _judge(running: Running, work: _Work) -> None:
    options, inputs, answers = work.options, running.inputs, running.outputs.judged
    background = Background(running.built.make, work.load, _untrained_share(work.checks))
    checks, work.predictions = judge(running.model, inputs, running.outputs, options, running.device, background)
    work.checks += checks
    task = work.predictions.task
    work.answers = Answers(answers, inputs.names, task)
    if inputs.labels is not None and task in MEASURED:
        work.metrics = measure(answers, inputs.labels, task)
    if inputs.labels is not None or options.min_accuracy is not None:
        accuracy = check_accuracy(work.metrics, inputs.labels, options.min_accuracy, options.thresholds)
        work.checks = [*(soften_untrained(each, accuracy) for each in work.checks), accuracy]
    if options.against is not None:
        work.checks += agreement_checks(running, options.against, task, work.progress)
    if options.save_golden is not None:
        record_golden(running, options.save_golden, task)
    if options.bench and is_wanted("speed", options):
        work.speed = measure_speed(running.model, inputs, running.device)
        work.checks.append(check_speed(work.speed))
    if options.plot is not None and inputs.labels is not None:
        if task != "classification" or inputs.labels.numel() != len(inputs.labels):
            raise CkptoolError(
                f"--plot {options.plot}: a confusion matrix is of one class for each input, and the task is {task}; "
                "leave it out, or name another task with --task"
            )
        numbers = class_numbers(inputs.labels)
        counts = confusion(class_logits(answers, task, numbers), numbers)
        draw_confusion(options.plot, counts, running.built.description, inputs.class_names)


def _untrained_share(checks: list[Check]) -> float | None:
    found = next((check for check in checks if check.id == "values.untrained"), None)
    share = None if found is None else found.evidence.get("share_of_parameters")
    return share if isinstance(share, float) else None
