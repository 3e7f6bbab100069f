"""The command that answers whether a checkpoint is sound."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckptool.cli import Status, options, worst
from ckptool.cli.app import command
from ckptool.cli.report_files import Answer, report_targets, write_reports
from ckptool.cli.terminal import Terminal, complain, detect, remark
from ckptool.cli.verify_gate import GateOptions, gate_of, settle, status_of
from ckptool.cli.verify_options import (
    InputOptions,
    JudgeOptions,
    ModelOptions,
    ReportOptions,
    read_options,
    refuse_unfit,
)
from ckptool.errors import CkptoolError
from ckptool.model.gate import Settings
from ckptool.model.verification import SideBySide, Verification, VerifyOptions

if TYPE_CHECKING:
    from ckptool.verification import Answers

_NEEDED = {"torch": "PyTorch", "numpy": "NumPy"}


@command(
    "verify",
    "Prove that the weights load and the model works.",
    "ckptool verify weights.pt --model train.py:Net --data photos/",
)
def verify(
    paths: options.Paths,
    choice: options.ChoiceOptions,
    model: ModelOptions,
    inputs: InputOptions,
    judging: JudgeOptions,
    gating: GateOptions,
    reporting: ReportOptions,
    view: options.AnswerOptions,
) -> Status:
    """Prove that the weights load and that the model tells inputs apart.

    Without --model: file integrity, pickle safety, clean keys, and values that no trained network has. With it: what
    loads, and what the model answers. 0 sound, 1 a check failed, 2 not settled.
    """
    terminal = detect(view.color, view.quiet)
    targets = report_targets(reporting.output or (), paths, json=view.json)
    settings = settle(gating)
    asked = read_options(choice, model, inputs, judging, settings)
    refuse_unfit(paths, asked)
    answers: list[Verification] = []
    kept: dict[str, Answers] = {}
    for path in paths:
        answer = _accept(_verify_one(path, asked, view, kept), settings)
        answers.append(answer)
        if answer.error is not None and not (_says_so(answer) and terminal.is_terminal and not view.quiet):
            complain(answer.error)
    gate = gate_of(settings)
    write_reports(targets, Answer(answers, _beside(kept, terminal), gate), terminal)
    return worst(*(status_of(answer, gate) for answer in answers))


def _accept(answer: Verification, settings: Settings) -> Verification:
    """Apply what the settings file allows, and say whose settings these are."""
    if settings.allow:
        from ckptool.operations.allow import allow

        answer = allow(answer, settings.allow)
    if settings.path is None:
        return answer
    return replace(answer, notes=(*answer.notes, f"settings were read from {settings.path}"))


def _says_so(answer: Verification) -> bool:
    """Tell whether a check says why there is no answer."""
    return any(check.message == answer.error for check in answer.checks)


def _verify_one(
    path: Path, asked: VerifyOptions, view: options.AnswerOptions, kept: dict[str, Answers]
) -> Verification:
    """Verify one checkpoint; what it answered is added to ``kept``."""
    from ckptool.reports.progress import ProgressBar

    try:
        with ProgressBar(quiet=view.quiet) as progress:
            if asked.model is None and not asked.trust_code:
                from ckptool.operations.verify_file import verify_file

                return verify_file(path, asked, progress)
            from ckptool.verification import verify_and_keep

            gc.enable()  # models are large, and some hold themselves

            verification, answers = verify_and_keep(path, asked, progress)
    except CkptoolError as error:
        return Verification(str(path), "error", (), error=str(error), thresholds=asked.thresholds)
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        reason = f"--model: building and running one needs {_NEEDED[error.name]}; pip install {error.name}"
        return Verification(str(path), "error", (), error=reason, thresholds=asked.thresholds)
    if answers is not None:
        kept[str(path)] = answers
    return verification


def _beside(kept: dict[str, Answers], terminal: Terminal) -> SideBySide | None:
    """Set the answers of several checkpoints side by side, where that can be done."""
    if len(kept) < 2:
        return None
    from ckptool.verification import set_side_by_side

    try:
        return set_side_by_side(kept)
    except CkptoolError as error:
        remark(str(error), terminal)
        return None
