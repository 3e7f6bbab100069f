"""Where a model runs, and how inputs go through it: batch by batch, in smaller ones where memory runs out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ckptool.errors import CkptoolError
from ckptool.loading.foreign import foreign_code
from ckptool.model.plans import Note

Batch = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
Answer = TypeVar("Answer")

_DEVICE = re.compile(r"(cpu|cuda|mps)(?::(\d{1,4}))?")
_CHOICES = "auto, cpu, cuda, cuda:N or mps"
# cuBLAS and cuDNN report a failed allocation in words of their own, and MPS has no class for it.
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
_QUOTED_CHARACTERS = 300


def choose_device(text: str) -> torch.device:
    """Give the device that ``--device`` names; ``auto`` takes CUDA, then MPS, then the CPU.

    :raises CkptoolError: it is no device, or this machine does not have it.
    """
    if text == "auto":
        return torch.device(next(kind for kind, count in _counts().items() if count))
    named = _DEVICE.fullmatch(text)
    if named is None:
        raise CkptoolError(f"--device {text!a}: is no device; choose one of {_CHOICES}")
    kind, index = named[1], int(named[2] or 0)
    if index >= _counts()[kind]:
        raise CkptoolError(f"--device {text}: {_absence(kind)}; choose {_alternatives()}")
    return torch.device(kind, index) if kind == "cuda" else torch.device(kind)


def _counts() -> dict[str, int]:
    """Count the devices of each kind, in the order in which ``auto`` takes them."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"cuda": cuda, "mps": int(torch.backends.mps.is_available()), "cpu": 1}


def _absence(kind: str) -> str:
    count = _counts()[kind]
    if count:
        return f"this machine has {count} {kind} device(s), numbered from 0"
    built = kind != "cuda" or torch.version.cuda or torch.version.hip
    return f"no {kind} device is available" if built else f"torch {torch.__version__} is built without CUDA"


def _alternatives() -> str:
    return " or ".join(["auto", *(kind for kind, count in _counts().items() if count)])


def describe_device(device: torch.device) -> str:
    """Name a device as a report does: ``cuda:0 (NVIDIA H200)``, ``cpu (2 threads)``."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return f"cuda:{index} ({torch.cuda.get_device_name(index)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def move_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Bring a model to a device.

    :raises CkptoolError: it does not fit into the memory there.
    """
    with foreign_code(f"the model: cannot be brought to {device}", "use --device cpu"):
        try:
            return model.to(device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise CkptoolError(f"the model: does not fit into the memory of {device}; use --device cpu") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an accelerator ran out of memory."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode and record no gradients; the modes are restored on leaving."""
    trained = [module for module in model.modules() if module.training]
    # An exported program has one mode and refuses to be asked.
    remedy = "name a model that can be evaluated with --model"
    with foreign_code(f"{type(model).__name__}: its eval() failed", remedy), suppress(NotImplementedError):
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in trained:
            module.training = True


@dataclass(frozen=True, slots=True)
class Answers(Generic[Answer]):
    """Hold what a model answered, on the CPU, in the order of the inputs.

    A part answers one batch, or less where memory ran out: ``batch_size`` is then what was left of it, and ``notes``
    say so.
    """

    parts: tuple[Answer, ...]
    batch_size: int
    notes: tuple[Note, ...] = ()


def run_batches(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, extract: Callable[[Any], Answer]
) -> Answers[Answer]:
    """Run a model that is on ``device`` over batches, and keep of each answer what ``extract`` takes out of it.

    A tensor is passed as the one argument, a mapping as keyword arguments, a sequence as positional ones. Where memory
    runs out the batch is halved, for the rest of the run too.

    :raises CkptoolError: the model raises, or one input alone does not fit.
    """
    runner = _Runner(model, device, extract)
    parts: list[Answer] = []
    with evaluating(model):
        for batch in batches:
            parts.extend(runner.answer(batch))
    return Answers(tuple(parts), runner.largest, runner.notes)


class _Runner(Generic[Answer]):
    """Remember how many inputs at once the device has memory for."""

    def __init__(self, model: nn.Module, device: torch.device, extract: Callable[[Any], Answer]) -> None:
        self._model, self._device, self._extract = model, device, extract
        self._limit: int | None = None
        self._asked = 0
        self.largest = 0

    def answer(self, batch: Batch) -> Iterator[Answer]:
        """Answer one batch, in as many pieces as it takes."""
        count, start = count_inputs(batch), 0
        self._asked = max(self._asked, count)
        while start < count:
            size = min(count - start, self._limit or count)
            found = self._try(batch if size == count else take_inputs(batch, start, size))
            if found is None:
                self._shrink(size)
                continue
            self.largest = max(self.largest, size)
            yield found[0]
            start += size

    def _try(self, batch: Batch) -> tuple[Answer] | None:
        """Answer a piece; None where memory runs out (by then the error, and what it holds alive, is gone)."""
        try:
            output = call_model(self._model, move(batch, self._device))
            return (move(self._extract(output), torch.device("cpu")),)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _shrink(self, size: int) -> None:
        if size == 1:
            raise CkptoolError(
                f"the model: one input alone does not fit into the memory of {self._device}; use --device cpu"
            )
        self._limit, self.largest = size // 2, 0
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def notes(self) -> tuple[Note, ...]:
        """Say what became of the batch size."""
        return () if self._limit is None else (halved_note(self._device, self._asked, self._limit),)


def halved_note(device: torch.device, asked: int, left: int) -> Note:
    """Say what became of a batch size."""
    text = f"{device} ran out of memory with {asked} inputs at once; the batch size is now {left}"
    return Note("smaller-batch", f"{text}: --batch-size {left} asks for that at once")


def call_model(model: nn.Module, batch: Batch) -> Any:
    """Call a model with one batch that is on its device.

    :raises CkptoolError: it raises anything but an error about memory.
    """
    try:
        if isinstance(batch, Tensor):
            return model(batch)
        return model(**batch) if isinstance(batch, Mapping) else model(*batch)
    except (Exception, SystemExit) as error:  # somebody else's code: it may raise anything
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:_QUOTED_CHARACTERS]
        raise CkptoolError(
            f"the model: its forward raised {type(error).__name__} ({said}) for {describe_batch(batch)}; give inputs "
            "that it takes with --inputs, --image-size or --input-shape"
        ) from error


def describe_batch(batch: Batch) -> str:
    """Name the types and shapes of a batch: ``float32 [16, 3, 224, 224]``."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
    if isinstance(batch, Mapping):
        return ", ".join(f"{name} {describe_batch(value)}" for name, value in batch.items())
    return ", ".join(describe_batch(value) for value in batch)


def count_inputs(batch: Batch) -> int:
    """Count the inputs of a batch: the first dimension of its first tensor."""
    first = next(iter(tensors_of(batch)), None)
    return 0 if first is None else first.shape[0] if first.ndim else 1


def take_inputs(batch: Batch, start: int, size: int) -> Batch:
    """Give ``size`` inputs of a batch from ``start`` on; a tensor that is the same for all inputs stays whole."""
    count = count_inputs(batch)

    def cut(tensor: Tensor) -> Tensor:
        return tensor[start : start + size] if tensor.ndim and tensor.shape[0] == count else tensor

    if isinstance(batch, Tensor):
        return cut(batch)
    if isinstance(batch, Mapping):
        return {name: cut(value) for name, value in batch.items()}
    return [cut(value) for value in batch]


def tensors_of(batch: Batch) -> Iterable[Tensor]:
    """List the tensors of a batch."""
    if isinstance(batch, Tensor):
        return (batch,)
    return batch.values() if isinstance(batch, Mapping) else batch


def move(value: Any, device: torch.device) -> Any:
    """Bring the tensors of nested mappings, lists and tuples to a device; everything else stays as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: move(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [move(part, device) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value
