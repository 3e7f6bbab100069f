"""Run a model over its inputs and take its answers apart: one row per input, on the CPU, in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ckptool.errors import CkptoolError
from ckptool.model.plans import Note
from ckptool.verification.device import Batch, call_model, count_inputs, move, run_batches, take_inputs

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
_SEED = 0


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

    @property
    def assumed_scale(self) -> bool:
        """Tell whether mean and deviation of pictures are what is usual, for lack of anything that states them."""

    def batches(self) -> Iterator[Any]:
        """Give the inputs in batches, the same ones every time."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Hold what a model answered, float32 or integers on the CPU, row ``i`` for input ``i``.

    ``tensors`` has every output by name, in the model's order (``output`` for a bare tensor, ``0``, ``1`` ... in a
    tuple); ``main`` names the one that is judged. Of sequences only ``positions`` are kept, evenly spread, of pictures
    a grid of pixels. ``bad`` counts, by output, the values of each input that are NaN or infinite,
    kept or not; what is -inf in the same places for every input is a mask. ``detections`` tells that the model
    answered with a list of boxes for each input: ``tensors`` then sums each list up. ``batch_size`` counts the inputs
    that were answered at once, and are known to fit into memory.
    """

    tensors: Mapping[str, Tensor]
    main: str
    bad: Mapping[str, Tensor]
    batch_size: int
    positions: tuple[int, ...] | None = None
    detections: bool = False
    notes: tuple[Note, ...] = ()

    @property
    def judged(self) -> Tensor:
        """Give the output that is judged."""
        return self.tensors[self.main]

    @property
    def is_finite(self) -> bool:
        """Tell whether every value of every output was finite (or a mask)."""
        return not any(bool(counts.any()) for counts in self.bad.values())


# What one batch gave: the outputs and the counts of bad values by name, the positions kept, detections or not.
_Part: TypeAlias = tuple[dict[str, Tensor], dict[str, Tensor], tuple[int, ...] | None, bool]


def run_model(model: nn.Module, inputs: Inputs, device: torch.device) -> Outputs:
    """Give a model's answers to all inputs, in ``eval()`` and ``inference_mode``; the model is on ``device`` already.

    :raises CkptoolError: the forward raises, one input does not fit into memory, or no output has a row per input.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_SEED)  # what is random in a forward is drawn alike for two models that are compared
        answers = run_batches(model, inputs.batches(), device, _take_apart)
    return _join(answers.parts, inputs.count, model, answers.batch_size, answers.notes)


def run_batch(model: nn.Module, batch: Batch, device: torch.device) -> Outputs:
    """Give a model's answers to one batch; the model is evaluating already.

    :raises CkptoolError: the forward raises, or no output has a row per input.
    """
    part = move(_take_apart(call_model(model, move(batch, device))), torch.device("cpu"))
    return _join((part,), count_inputs(batch), model, count_inputs(batch))


def _take_apart(answer: Any) -> _Part:
    detections = _is_detections(answer)
    found = _summed_up(answer) if detections else _named(answer)
    found = {name: tensor for name, tensor in found.items() if tensor.ndim and (tensor.numel() or not len(tensor))}
    thinned = {name: _thinned(tensor) for name, tensor in found.items()}
    positions = next((positions for _, positions in thinned.values() if positions), None)
    tensors = {name: _plain(tensor) for name, (tensor, _) in thinned.items()}
    return tensors, {name: _count_bad(tensor) for name, tensor in found.items()}, positions, detections


def first_batch(inputs: Inputs, outputs: Outputs) -> Batch:
    """Give the first inputs, as many as are known to fit into memory."""
    return take_inputs(next(iter(inputs.batches())), 0, outputs.batch_size)


def _join(
    parts: Sequence[_Part], count: int, model: nn.Module, batch_size: int, notes: tuple[Note, ...] = ()
) -> Outputs:
    tensors = _rows([part[0] for part in parts], count, model)
    if not tensors:
        raise CkptoolError(
            f"{type(model).__name__}: nothing in its answer is a tensor with a row for each input; "
            "wrap it into a module whose forward gives one, and name that with --model"
        )
    bad = _rows([{name: part[1][name] for name in tensors} for part in parts], count, model)
    main = next((name for name in _MAIN_NAMES if name in tensors), next(iter(tensors)))
    return Outputs(tensors, main, bad, batch_size, parts[0][2], any(part[3] for part in parts), notes)


def _rows(parts: Sequence[Mapping[str, Tensor]], count: int, model: nn.Module) -> dict[str, Tensor]:
    """Join what every part has, as far as that gives a row for each input."""
    names = [name for name in parts[0] if all(name in part for part in parts)] if parts else []
    fitting = [name for name in names if sum(len(part[name]) for part in parts) == count]
    try:
        return {name: torch.cat([part[name] for part in parts]) for name in fitting}
    except RuntimeError as error:
        raise CkptoolError(
            f"{type(model).__name__}: its answers differ in shape between batches ({error}); give it one at a time "
            "with --batch-size 1"
        ) from error


def _named(answer: Any) -> dict[str, Tensor]:
    """Name the tensors of an answer; what lies deeper (caches, hidden states) is no answer."""
    if isinstance(answer, Tensor):
        entries: Any = [(_BARE, answer)]
    elif isinstance(answer, Mapping):
        entries = answer.items()
    elif isinstance(answer, list | tuple):
        names = getattr(answer, "_fields", range(len(answer)))
        entries = zip(names, answer, strict=True)
    elif dataclasses.is_dataclass(answer):
        entries = ((each.name, getattr(answer, each.name)) for each in dataclasses.fields(answer))
    else:
        return {}
    return {str(name): _dense(value) for name, value in entries if isinstance(value, Tensor) and _is_plain(value)}


def _is_plain(tensor: Tensor) -> bool:
    return not (tensor.is_complex() or tensor.is_nested or tensor.is_meta)


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _is_detections(answer: Any) -> bool:
    return isinstance(answer, list | tuple) and bool(answer) and all(isinstance(each, Mapping) for each in answer)


def _summed_up(answer: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Give, by name, for each picture how many boxes (scores, labels ...) there are and their mean."""
    names = [name for name in answer[0] if all(isinstance(each.get(name), Tensor) for each in answer)]
    return {name: torch.stack([_count_and_mean(each[name]) for each in answer]) for name in names}


def _count_and_mean(values: Tensor) -> Tensor:
    mean = values.float().mean() if values.numel() else torch.zeros((), device=values.device)
    return torch.stack([torch.tensor(float(len(values) if values.ndim else 1), device=values.device), mean])


def _count_bad(tensor: Tensor) -> Tensor:
    """Count the NaN and infinite values of each row; -inf in the same places of all rows is a mask."""
    if not tensor.is_floating_point():
        return torch.zeros(len(tensor), dtype=torch.int64, device=tensor.device)
    flat = tensor.reshape(len(tensor), -1)
    masked = flat.isneginf().all(dim=0)
    finite = flat.isfinite() | (masked & ~masked.all())
    return (~finite).sum(dim=1)


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
    """Give float32 or int64 in memory of its own: a view would hold all that was thinned out."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64, copy=True)
