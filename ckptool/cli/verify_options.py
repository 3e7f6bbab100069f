"""What verify is asked: its options, and what they mean together."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ckptool.cli import options
from ckptool.errors import CkptoolError
from ckptool.model.gate import Settings
from ckptool.model.places import RemotePath
from ckptool.model.verification import Task, Thresholds, VerifyOptions

# Typer evaluates these on Python 3.10, too, where it wants Optional spelled out.
# ruff: noqa: UP045

_TASKS: dict[str, Task] = {
    task: task
    for task in ("classification", "multilabel", "regression", "language", "embedding", "segmentation", "detection")
}
# What has an effect without a model, or does no harm; silence about the rest would look like a pass.
_WITHOUT_MODEL = frozenset(
    {"weights", "keys", "as_is", "against", "manifest", "checks", "skip_checks", "thresholds", "seed"}
    | {"device", "batch_size"}
)
_SPELLED = {"model_args": "model-arg", "input_shapes": "input-shape"}


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model the weights belong to."""

    model: Annotated[
        Optional[str],
        typer.Option(
            "--model",
            help="package.module:factory, FILE.py:Class, timm:NAME, torchvision:NAME, transformers:DIR, an archive, "
            "or auto: what names and shapes tell.",
            metavar="MODEL",
        ),
    ] = None
    model_arg: Annotated[
        Optional[list[str]],
        typer.Option("--model-arg", help="Argument for it; JSON or plain text (repeatable).", metavar="K=V"),
    ] = None
    app_dir: Annotated[
        Optional[Path], typer.Option("--app-dir", help="Folder to import the module from.", metavar="DIR")
    ] = None
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Run the program in a TorchScript or .pt2 file.")] = (
        False
    )
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Clean nothing: judge the file as a plain loader meets it.")
    ] = False
    allow_missing: Annotated[
        Optional[list[str]],
        typer.Option("--allow-missing", help="Names of the model that may be missing (repeatable).", metavar="GLOB"),
    ] = None
    allow_unexpected: Annotated[
        Optional[list[str]],
        typer.Option("--allow-unexpected", help="Names that the file may have besides (repeatable).", metavar="GLOB"),
    ] = None


@dataclass(frozen=True, slots=True)
class InputOptions:
    """What the model is fed."""

    images: Annotated[
        Optional[Path],
        typer.Option("--images", help="Folder of your own images.", metavar="DIR", parser=options.as_file),
    ] = None
    inputs: Annotated[
        Optional[Path], typer.Option("--inputs", help="Arrays: .npz, .pt or .safetensors.", metavar="FILE")
    ] = None
    data: Annotated[
        Optional[Path],
        typer.Option(
            "--data",
            help="Labelled images: a folder per class, or a CSV beside them.",
            metavar="DIR",
            parser=options.as_file,
        ),
    ] = None
    targets: Annotated[
        Optional[Path], typer.Option("--targets", help="Labels of the inputs, in their order.", metavar="FILE")
    ] = None
    class_names: Annotated[
        Optional[Path], typer.Option("--class-names", help="One class name a line, or JSON.", metavar="FILE")
    ] = None
    input_shape: Annotated[
        Optional[list[str]],
        typer.Option("--input-shape", help="Shape of an input: image=3,224,224 (repeatable).", metavar="NAME=SHAPE"),
    ] = None
    image_size: Annotated[
        Optional[int], typer.Option("--image-size", help="Side of the images in pixels.", min=1, metavar="N")
    ] = None
    mean: Annotated[
        Optional[str], typer.Option("--mean", help="Mean per channel, of pixels from 0 to 1.", metavar="X,Y,Z")
    ] = None
    std: Annotated[Optional[str], typer.Option("--std", help="Standard deviation per channel.", metavar="X,Y,Z")] = None
    tokenizer: Annotated[
        Optional[Path], typer.Option("--tokenizer", help="Folder of a tokenizer, to read text with.", metavar="DIR")
    ] = None
    batch_size: Annotated[int, typer.Option("--batch-size", help="Inputs at a time.", min=1)] = 16
    num_samples: Annotated[
        Optional[int],
        typer.Option("--num-samples", help="Number of inputs: 48, or all of what is labelled.", min=1, metavar="N"),
    ] = None
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of whatever is random.", min=0, max=2**32 - 1, metavar="N")
    ] = 0
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda[:N] or mps.", metavar="DEVICE")] = "auto"


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """How the answers are judged."""

    task: Annotated[
        Optional[str], typer.Option("--task", help=f"What the model does: {', '.join(_TASKS)}.", metavar="TASK")
    ] = None
    expect_range: Annotated[
        Optional[str], typer.Option("--expect-range", help="Range of sound regression outputs.", metavar="LOW:HIGH")
    ] = None
    against: Annotated[
        Optional[Path],
        typer.Option("--against", help="The original, or a golden file.", metavar="OTHER", parser=options.as_place),
    ] = None
    manifest: Annotated[
        Optional[Path], typer.Option("--manifest", help="What convert wrote beside the file.", metavar="FILE")
    ] = None
    save_golden: Annotated[
        Optional[Path], typer.Option("--save-golden", help="Record inputs and outputs.", metavar="FILE")
    ] = None
    min_accuracy: Annotated[
        Optional[float], typer.Option("--min-accuracy", help="Fail below this accuracy.", min=0, max=1)
    ] = None
    bench: Annotated[bool, typer.Option("--bench", help="Measure the speed.")] = False
    top: Annotated[int, typer.Option("--top", help="Show the N likeliest classes of each input.", min=0)] = 0
    plot: Annotated[Optional[Path], typer.Option("--plot", help="Draw the confusion matrix.", metavar="FILE")] = None


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """Which reports are written, and where."""

    output: Annotated[
        Optional[list[str]],
        typer.Option(
            "--output",
            help="Report as text, json, junit, sarif, github or markdown; - is stdout (repeatable).",
            metavar="FORMAT=FILE",
        ),
    ] = None


def read_options(
    choice: options.ChoiceOptions,
    model: ModelOptions,
    inputs: InputOptions,
    judging: JudgeOptions,
    settings: Settings,
) -> VerifyOptions:
    """Gather what was asked.

    :raises CkptoolError: an option is not written as it is read, or names a file that cannot be read.
    """
    return VerifyOptions(
        weights=choice.weights,
        keys=options.key_options(choice),
        model=model.model,
        model_args={name: _value(text) for name, text in options.pairs("--model-arg", model.model_arg).items()},
        app_dir=model.app_dir,
        trust_code=model.trust_code,
        as_is=model.as_is,
        images=inputs.images,
        inputs=inputs.inputs,
        data=inputs.data,
        input_shapes={name: _shape(text) for name, text in options.pairs("--input-shape", inputs.input_shape).items()},
        image_size=inputs.image_size,
        mean=_numbers("--mean", inputs.mean, ","),
        std=_numbers("--std", inputs.std, ","),
        batch_size=inputs.batch_size,
        num_samples=inputs.num_samples,
        class_names=inputs.class_names,
        targets=inputs.targets,
        tokenizer=inputs.tokenizer,
        task=None if judging.task is None else options.one_of("--task", judging.task, _TASKS),
        expect_range=_range(judging.expect_range),
        seed=inputs.seed,
        against=judging.against,
        manifest=judging.manifest,
        save_golden=judging.save_golden,
        allow_missing=tuple(model.allow_missing or ()),
        allow_unexpected=tuple(model.allow_unexpected or ()),
        min_accuracy=judging.min_accuracy,
        checks=settings.checks,
        skip_checks=settings.skip_checks,
        device=inputs.device,
        bench=judging.bench,
        plot=judging.plot,
        top=judging.top,
        thresholds=replace(Thresholds(), **settings.thresholds),
    )


def refuse_unfit(paths: list[Path], asked: VerifyOptions) -> None:
    """Refuse options that would be of no effect, or that several checkpoints cannot share.

    :raises CkptoolError: there is one.
    """
    elsewhere = next((path for path in paths if isinstance(path, RemotePath)), None)
    if asked.trust_code and elsewhere is not None:
        raise CkptoolError(f"{elsewhere}: --trust-code runs programs on this disk only; download it first")
    if asked.model is None and not asked.trust_code:
        given = (
            field.name for field in fields(asked) if getattr(asked, field.name) != getattr(VerifyOptions(), field.name)
        )
        idle = next((name for name in given if name not in _WITHOUT_MODEL), None)
        if idle is not None:
            option = _SPELLED.get(idle, idle.replace("_", "-"))
            raise CkptoolError(
                f"--{option}: is of no use without a model; name it with --model, or run a program with --trust-code"
            )
    single = (("--save-golden", asked.save_golden), ("--plot", asked.plot), ("--manifest", asked.manifest))
    for option, target in single:
        if target is not None and len(paths) > 1:
            raise CkptoolError(f"{option} {target}: is of one checkpoint; give one PATH")


def _value(text: str) -> Any:
    """Read JSON, and what is none as the text that it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.replace("x", ",").strip("[]()").split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise CkptoolError(f"--input-shape {text}: write a shape as 3,224,224")
    return tuple(int(size) for size in sizes)


def _numbers(option: str, text: str | None, separator: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(separator))
    except ValueError as error:
        raise CkptoolError(f"{option} {text}: write numbers with {separator!r} between them") from error


def _range(text: str | None) -> tuple[float, float] | None:
    bounds = _numbers("--expect-range", text, ":")
    if bounds is None:
        return None
    if len(bounds) != 2 or not bounds[0] <= bounds[1]:
        raise CkptoolError(f"--expect-range {text}: write it as low:high")
    return bounds[0], bounds[1]
