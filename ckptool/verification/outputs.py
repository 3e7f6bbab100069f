"""Run a model over its inputs and take its answers apart: one row per input, on the CPU, in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ckptool.errors import CkptoolError

# One input per row of every tensor: passed as it is, by keyword (mapping) or by position (sequence).
Batch: TypeAlias = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
# Which of several named outputs is judged, the first that is there; else the first one.
_MAIN_NAMES = (
    *("logits", "prediction_logits", "out", "output", "preds", "predictions", "logits_per_image"),
    *("sentence_embedding", "image_embeds", "text_embeds", "pooler_output", "last_hidden_state"),
)
# What is kept of answers that have more than one value per class: so many positions of a sequence, so many pixels a
# side. 48 answers of a language model with 150,000 tokens are then half a gigabyte, not ten.
_POSITIONS = 16
_PIXELS = 64
_BARE = "output"


class Inputs(Protocol):
    """Say what a model is fed: ``kind`` is ``in-domain``, ``sample photos`` or ``synthetic``."""

    @property
    def kind(self) -> str:
        """Name where the inputs come from."""

    @property
    def count(self) -> int:
        """Count the inputs."""

    @property
    def names(self) -> Sequence[str]:
        """Name each input."""

    @property
    def labels(self) -> Tensor | None:
        """Give the right answers, one row per input."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """Name the classes."""

    @property
    def modality(self) -> str:
        """Say what the inputs are: image, tokens, tabular, multi."""

    def batches(self) -> Iterator[Any]:
        """Give the inputs in batches, the same ones every time."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Hold what a model answered, float32 or integers on the CPU, row ``i`` for input ``i``.

    ``tensors`` has every output by name, in the model's order (``output`` for a bare tensor, ``0``, ``1`` ... in a
    tuple); ``main`` names the one that is judged. Of sequences only ``positions`` are kept, evenly spread, of pictures
    a grid of at most 64 x 64 pixels. ``bad`` counts, by output, the values of each input that are NaN or infinite,
    kept or not; what is -inf in the same places for every input is a mask. ``detections`` tells that the model
    answered with a list of boxes for each input: ``tensors`` then sums each list up.
    """

    tensors: Mapping[str, Tensor]
    main: str
    bad: Mapping[str, Tensor]
    positions: tuple[int, ...] | None = None
    detections: bool = False
    notes: tuple[str, ...] = ()

    @property
    def judged(self) -> Tensor:
        """Give the output that is judged."""
        return self.tensors[self.main]

    @property
    def is_finite(self) -> bool:
        """Tell whether every value of every output was finite (or a mask)."""
        return not any(bool(counts.any()) for counts in self.bad.values())


@dataclass(slots=True)
class _Answers:
    """Collect the answers to some batches."""

    tensors: dict[str, list[Tensor]] = field(default_factory=dict)
    bad: dict[str, list[Tensor]] = field(default_factory=dict)
    positions: tuple[int, ...] | None = None
    detections: bool = False
    notes: list[str] = field(default_factory=list)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into ``eval()`` and ``inference_mode``, and every module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    # A module out of torch.export has its mode built in, and says so.
    with suppress(NotImplementedError):
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def rows_of(batch: Batch) -> int:
    """Count the inputs in a batch."""
    return len(next(iter(tensors_of(batch).values())))


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """Give the tensors of a batch by name; by position where they have none."""
    if isinstance(batch, Tensor):
        return {"input": batch}
    if isinstance(batch, Mapping):
        return dict(batch)
    return {str(index): tensor for index, tensor in enumerate(batch)}


def with_tensors(batch: Batch, tensors: Mapping[str, Tensor]) -> Batch:
    """Give a batch of the same form with other tensors, as ``tensors_of`` names them."""
    if isinstance(batch, Tensor):
        return tensors["input"]
    if isinstance(batch, Mapping):
        return dict(tensors)
    return tuple(tensors.values())


def take_rows(batch: Batch, start: int, stop: int) -> Batch:
    """Give some inputs of a batch as a batch."""
    return with_tensors(batch, {name: tensor[start:stop] for name, tensor in tensors_of(batch).items()})


def move(batch: Batch, device: torch.device) -> Batch:
    """Give a batch on a device."""
    return with_tensors(batch, {name: tensor.to(device) for name, tensor in tensors_of(batch).items()})


def call(model: nn.Module, batch: Batch) -> Any:
    """Give what a model answers to a batch, as it stands.

    :raises CkptoolError: its forward raised; running out of memory on an accelerator is left to the caller.
    """
    try:
        if isinstance(batch, Tensor):
            return model(batch)
        return model(**batch) if isinstance(batch, Mapping) else model(*batch)
    except torch.OutOfMemoryError:
        raise
    # The forward is the user's own code, which may raise anything at all.
    except Exception as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors_of(batch).items())
        first = (str(error).strip().splitlines() or [""])[0][:300]
        raise CkptoolError(
            f"{type(model).__name__}: its forward raised {type(error).__name__}: {first} (on {shapes}); feed it what "
            "it takes with --inputs, --input-shape or --image-size"
        ) from error


def run_batches(model: nn.Module, inputs: Inputs, device: torch.device) -> Outputs:
    """Give a model's answers to all inputs, in ``eval()`` and ``inference_mode``; the model is on ``device`` already.

    A batch that does not fit into an accelerator's memory is halved until it does, and so are those after it; a note
    says so.

    :raises CkptoolError: the forward raises, or not one output has a row per input.
    """
    answers = _Answers()
    with evaluating(model):
        largest: int | None = None
        for batch in inputs.batches():
            largest = _run_in_parts(model, batch, device, largest, answers)
    return _joined(answers, model)


def run_batch(model: nn.Module, batch: Batch, device: torch.device) -> Outputs:
    """Give a model's answers to one batch; the model is evaluating already.

    :raises CkptoolError: the forward raises, or not one output has a row per input.
    """
    answers = _Answers()
    _collect(answers, call(model, move(batch, device)), rows_of(batch))
    return _joined(answers, model)


def _run_in_parts(
    model: nn.Module, batch: Batch, device: torch.device, largest: int | None, answers: _Answers
) -> int | None:
    """Run a batch in parts of at most ``largest`` rows; give the size that fits from now on."""
    rows, start = rows_of(batch), 0
    while start < rows:
        size = min(largest or rows, rows - start)
        try:
            answer = call(model, move(take_rows(batch, start, start + size), device))
        except torch.OutOfMemoryError as error:
            largest = _halved(size, device, answers, error)
            continue
        _collect(answers, answer, size)
        start += size
    return largest


def _halved(size: int, device: torch.device, answers: _Answers, error: Exception) -> int:
    if size == 1:
        raise CkptoolError(f"{device} has not enough memory for a single input; take --device cpu") from error
    torch.cuda.empty_cache()
    answers.notes.append(f"{device} ran out of memory with {size} inputs at once: took {size // 2}")
    return size // 2


def _collect(answers: _Answers, answer: Any, rows: int) -> None:
    answers.detections = answers.detections or _is_detections(answer)
    found = _summed_up(answer) if _is_detections(answer) else _named(answer)
    for name, tensor in found.items():
        if tensor.ndim and len(tensor) == rows:
            answers.bad.setdefault(name, []).append(_count_bad(tensor))
            kept, positions = _thinned(tensor)
            answers.tensors.setdefault(name, []).append(_plain(kept))
            answers.positions = positions or answers.positions


def _joined(answers: _Answers, model: nn.Module) -> Outputs:
    if not answers.tensors:
        raise CkptoolError(
            f"{type(model).__name__}: nothing in its answer is a tensor with a row for each input; "
            "wrap it into a module whose forward gives one, and name that with --model"
        )
    try:
        tensors = {name: torch.cat(parts) for name, parts in answers.tensors.items()}
    except RuntimeError as error:
        raise CkptoolError(f"{type(model).__name__}: its answers differ in shape between batches ({error})") from error
    main = next((name for name in _MAIN_NAMES if name in tensors), next(iter(tensors)))
    bad = {name: torch.cat(parts) for name, parts in answers.bad.items()}
    return Outputs(tensors, main, bad, answers.positions, answers.detections, tuple(answers.notes))


def _named(answer: Any) -> dict[str, Tensor]:
    """Name the tensors of an answer; what lies deeper (caches, hidden states) is no answer."""
    if isinstance(answer, Tensor):
        return {_BARE: answer}
    if isinstance(answer, Mapping):
        entries: Any = answer.items()
    elif isinstance(answer, list | tuple):
        names = getattr(answer, "_fields", range(len(answer)))
        entries = zip(names, answer, strict=True)
    elif dataclasses.is_dataclass(answer):
        entries = ((each.name, getattr(answer, each.name)) for each in dataclasses.fields(answer))
    else:
        return {}
    return {str(name): value for name, value in entries if isinstance(value, Tensor)}


def _is_detections(answer: Any) -> bool:
    return isinstance(answer, list | tuple) and bool(answer) and all(isinstance(each, Mapping) for each in answer)


def _summed_up(answer: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Give, by name, for each picture how many boxes (scores, labels ...) there are and their mean."""
    names = [name for name, value in answer[0].items() if isinstance(value, Tensor)]
    return {name: torch.stack([_count_and_mean(each[name]) for each in answer]) for name in names}


def _count_and_mean(values: Tensor) -> Tensor:
    mean = values.float().mean() if values.numel() else torch.zeros((), device=values.device)
    return torch.stack([torch.tensor(float(len(values)), device=values.device), mean])


def _count_bad(tensor: Tensor) -> Tensor:
    """Count the NaN and infinite values of each row; -inf in the same places of all rows is a mask."""
    if not tensor.is_floating_point():
        return torch.zeros(len(tensor), dtype=torch.int64)
    flat = tensor.reshape(len(tensor), -1)
    masked = flat.isneginf().all(dim=0)
    finite = flat.isfinite() | (masked & ~masked.all())
    return (~finite).sum(dim=1).cpu()


def _thinned(tensor: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """Keep some positions of a long sequence, some pixels of a large picture."""
    if tensor.ndim == 3 and tensor.shape[1] > _POSITIONS:
        positions = tuple(round(step * (tensor.shape[1] - 1) / (_POSITIONS - 1)) for step in range(_POSITIONS))
        return tensor[:, list(positions)], positions
    if tensor.ndim == 3:
        return tensor, tuple(range(tensor.shape[1]))
    if tensor.ndim == 4 and max(tensor.shape[2:]) > _PIXELS:
        steps = [max(1, size // _PIXELS) for size in tensor.shape[2:]]
        return tensor[:, :, :: steps[0], :: steps[1]], None
    return tensor, None


def _plain(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).flatten(-2)
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else torch.int64).clone()
