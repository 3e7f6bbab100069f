"""Hold a model against its original: another checkpoint, a program, or the golden file that recorded its answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ckptool.errors import CkptoolError
from ckptool.loading.build import archive_kind, build_archive
from ckptool.loading.checked import load_checked
from ckptool.model.sources import Progress
from ckptool.model.verification import Check, Task, VerifyOptions
from ckptool.operations.agreement import CHECK as AGREEMENT
from ckptool.operations.agreement import check_digest, check_tensors, digest_of, stored_precision, view_other
from ckptool.operations.opening import open_path
from ckptool.verification.compare import ELSEWHERE, check_outputs
from ckptool.verification.device import move_model
from ckptool.verification.golden import Golden, read_golden, save_golden
from ckptool.verification.outputs import run_model
from ckptool.verification.running import Running


def golden_inputs(options: VerifyOptions) -> Golden | None:
    """Read the inputs of a golden file; None where ``--against`` names none.

    :raises CkptoolError: it cannot be read, or there are other inputs besides.
    """
    if options.against is None or archive_kind(options.against) is not None:
        return None
    golden = read_golden(options.against, options.batch_size)
    own = next((name for name in ("images", "inputs", "data") if getattr(options, name) is not None), None)
    if golden is not None and own is not None:
        raise CkptoolError(f"--{own}: {options.against} holds the inputs that it was recorded with; give one of them")
    return golden


def agreement_checks(running: Running, other: Path, task: Task, progress: Progress) -> tuple[Check, Check]:
    """Compare tensors and answers with those of ``--against``, a checkpoint or a golden file.

    :raises CkptoolError: the other file cannot be read, loaded or run.
    """
    compare = _with_golden if isinstance(running.inputs, Golden) else _with_checkpoint
    tensors, theirs, precision = compare(running, other, progress)
    thresholds = running.options.thresholds
    return tensors, check_outputs(
        running.outputs.judged, theirs, task=task, precision=precision, thresholds=thresholds, other=other
    )


def _with_golden(running: Running, _other: Path, _progress: Progress) -> tuple[Check, Tensor, str]:
    golden = running.inputs
    assert isinstance(golden, Golden)
    if running.is_program:
        message = f"{running.path} is a program: its tensors are not compared, its answers decide"
        return Check(AGREEMENT, "skip", message), golden.outputs, ELSEWHERE
    with running.viewed() as view:
        tensors = check_digest(digest_of(view), golden.facts.get("digest"), golden.path)
        stored = stored_precision(view.tensors.values())
    precision = golden.precision(running.device, stored, same_tensors=tensors.status == "pass")
    return tensors, golden.outputs, precision


def _with_checkpoint(running: Running, other: Path, progress: Progress) -> tuple[Check, Tensor, str]:
    tensors, precision = _compare_tensors(running, other, progress)
    return tensors, _answers_of(other, running), precision


def _compare_tensors(running: Running, other: Path, progress: Progress) -> tuple[Check, str]:
    """Compare the tensors of two checkpoints, and say by which thresholds their answers are to be judged.

    A program's own tensors are not compared: it may compute in another order than the model it was made from.
    """
    program = next((each for each in (running.path, other) if archive_kind(each) is not None), None)
    if program is not None:
        message = f"{program} is a program: its tensors are not compared, its answers decide"
        return Check(AGREEMENT, "skip", message), ELSEWHERE
    with running.viewed() as view, open_path(other) as original:
        tensors, agreement = check_tensors(view, view_other(original, running.options), running.options, progress)
    return tensors, agreement.precision


def _answers_of(path: Path, running: Running) -> Tensor:
    """Give the answers of another checkpoint of the same model, or of a program, to the same inputs."""
    options = running.options
    if archive_kind(path) is not None:
        model = build_archive(path, trust_code=options.trust_code).make(options.seed)
    else:
        model = running.built.make(options.seed)
        with open_path(path) as opened:
            view = view_other(opened, options)
        load_checked(model, path, replace(options, as_is=False, weights=view.weights, keys=view.keys))
    return run_model(move_model(model, running.device), running.inputs, running.device).judged


def record_golden(running: Running, target: Path, task: Task) -> None:
    """Write inputs and answers, with what tells whether the same weights are asked again.

    :raises OutputRefused: it cannot be written.
    """
    facts = {"task": task, "model": running.built.description, "seed": str(running.options.seed)}
    if not running.is_program:
        with running.viewed() as view:
            facts |= {"precision": stored_precision(view.tensors.values()), "digest": digest_of(view) or ""}
    save_golden(target, running.inputs, running.outputs.judged, facts, running.device)
