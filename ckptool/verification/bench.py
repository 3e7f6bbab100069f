"""Time a model: how long one input takes, in batches of one size, without moving it to the device."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ckptool.errors import CkptoolError
from ckptool.model.plans import Note
from ckptool.model.verification import Check
from ckptool.verification.device import (
    Batch,
    call_model,
    count_inputs,
    describe_device,
    evaluating,
    halved_note,
    is_out_of_memory,
    move,
    take_inputs,
)
from ckptool.verification.outputs import Inputs

CHECK = "speed"
_EVENT: Any = torch.cuda.Event  # torch does not type it
_UNSTABLE = 0.10  # share of the median that lies between the quartiles


@dataclass(frozen=True, slots=True)
class Effort:
    """Say how long to measure: at least ``runs`` runs and ``seconds`` seconds, but ``most_seconds`` end it.

    ``warmup_runs`` and ``warmup_seconds`` go before, both at least; an accelerator chooses its kernels in them.
    """

    runs: int = 30
    seconds: float = 2.0
    most_seconds: float = 20.0
    least_runs: int = 5
    warmup_runs: int = 3
    warmup_seconds: float = 0.5


ACCELERATOR = Effort(warmup_runs=10)


@dataclass(frozen=True, slots=True)
class Timing:
    """Hold what was measured: ``milliseconds`` per batch, run by run; ``peak_bytes`` of memory."""

    milliseconds: tuple[float, ...]
    batch_size: int
    warmup_runs: int
    peak_bytes: int | None
    notes: tuple[Note, ...] = ()


def measure_speed(
    model: nn.Module, inputs: Inputs, device: torch.device, effort: Effort | None = None
) -> dict[str, Any]:
    """Time a model that is on ``device`` with the first batch, again and again; it is halved where memory runs out.

    Times per sample are those of a batch divided by its size. ``flops_per_sample`` counts two for each multiplication
    with its addition, in matrix products, convolutions and attention only; None where torch cannot count. On CUDA,
    ``peak_memory_bytes`` is what torch allocated; on a CPU it is by how much the process grew, which is None where it
    did not or where that cannot be asked.

    :raises CkptoolError: the model raises, or one input alone does not fit.
    """
    effort = effort or (Effort() if device.type == "cpu" else ACCELERATOR)
    batch: Batch = next(inputs.batches())
    with evaluating(model):
        timing = _time(model, move(batch, device), device, effort)
    flops = count_flops(model, move(take_inputs(batch, 0, 1), device))
    return {**_per_sample(timing), **_circumstances(model, timing, device), "flops_per_sample": flops}


def _time(model: nn.Module, batch: Batch, device: torch.device, effort: Effort) -> Timing:
    """Measure with the largest batch, the given one or a half of it and so on, for which there is memory."""
    asked = size = count_inputs(batch)
    while True:
        timing = _try(model, take_inputs(batch, 0, size), device, effort)
        if timing is not None:
            return timing if size == asked else replace(timing, notes=(halved_note(device, asked, size),))
        if size == 1:
            raise CkptoolError(f"the model: one input alone does not fit into the memory of {device}; use --device cpu")
        size //= 2


def _try(model: nn.Module, batch: Batch, device: torch.device, effort: Effort) -> Timing | None:
    """Measure with one batch; None where memory runs out."""

    def run() -> None:
        call_model(model, batch)

    try:
        with _peak_memory(device) as peak:
            warmup_runs = _warm_up(run, device, effort)
            milliseconds = _CLOCKS.get(device.type, _time_and_wait)(run, device, effort)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return Timing(milliseconds, count_inputs(batch), warmup_runs, peak())


def _warm_up(run: Callable[[], None], device: torch.device, effort: Effort) -> int:
    start, runs = time.perf_counter(), 0
    while runs < effort.warmup_runs or time.perf_counter() - start < effort.warmup_seconds:
        run()
        _wait_for(device)
        runs += 1
        if time.perf_counter() - start > effort.most_seconds:
            break
    return runs


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _wanted(effort: Effort) -> Iterator[int]:
    """Count runs until enough was measured."""
    start, runs = time.perf_counter(), 0
    while True:
        passed = time.perf_counter() - start
        if runs >= effort.runs and passed >= effort.seconds:
            return
        if runs >= effort.least_runs and passed >= effort.most_seconds:
            return
        yield runs
        runs += 1


def _time_and_wait(run: Callable[[], None], device: torch.device, effort: Effort) -> tuple[float, ...]:
    times = []
    for _ in _wanted(effort):
        start = time.perf_counter_ns()
        run()
        _wait_for(device)
        times.append((time.perf_counter_ns() - start) / 1e6)
    return tuple(times)


def _time_by_events(run: Callable[[], None], device: torch.device, effort: Effort) -> tuple[float, ...]:
    """Let the device note the times itself: what the host does in between is not counted."""
    times = []
    with torch.cuda.device(device):
        for _ in _wanted(effort):
            start, end = _EVENT(enable_timing=True), _EVENT(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return tuple(times)


_CLOCKS = {"cuda": _time_by_events}


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Measure the peak of memory in the block; the callable gives it in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    before = _largest_resident_bytes()

    def grown() -> int | None:
        after = _largest_resident_bytes()
        return None if before is None or after is None or after <= before else after - before

    yield grown


def _largest_resident_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # macOS counts bytes, Linux KiB


def count_flops(model: nn.Module, batch: Batch) -> int | None:
    """Count the operations for one batch; None where the model hides them from torch (an archive) or cannot run so."""
    # The fused encoder layer is one operation that the counter does not know.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), FlopCounterMode(display=False) as counter:
            call_model(model, batch)
        return int(counter.get_total_flops()) or None
    except (CkptoolError, RuntimeError):
        return None
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _per_sample(timing: Timing) -> dict[str, Any]:
    times = [time / timing.batch_size for time in timing.milliseconds]
    mean = statistics.fmean(times)
    return {
        "samples_tested": len(times) * timing.batch_size,
        "avg_time_per_sample_ms": mean,
        "std_time_per_sample_ms": statistics.pstdev(times),
        "min_time_per_sample_ms": min(times),
        "max_time_per_sample_ms": max(times),
        "median_time_per_sample_ms": statistics.median(times),
        "p95_time_per_sample_ms": _quantile(times, 0.95),
        "p99_time_per_sample_ms": _quantile(times, 0.99),
        "throughput_samples_per_sec": 1000 / mean if mean else None,
        "is_stable": _quantile(times, 0.75) - _quantile(times, 0.25) <= _UNSTABLE * statistics.median(times),
    }


def _quantile(times: list[float], share: float) -> float:
    """Interpolate between the two nearest of the sorted times."""
    ordered = sorted(times)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _circumstances(model: nn.Module, timing: Timing, device: torch.device) -> dict[str, Any]:
    parameters = list(model.parameters())
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in parameters}
    return {
        "device": str(device),
        "device_name": describe_device(device),
        "batch_size": timing.batch_size,
        "avg_time_per_batch_ms": statistics.fmean(timing.milliseconds),
        "runs": len(timing.milliseconds),
        "warmup_runs": timing.warmup_runs,
        "cuda_events": device.type == "cuda",
        "threads": torch.get_num_threads(),
        "dtype": ", ".join(sorted(dtypes)),
        "torch": torch.__version__,
        "peak_memory_bytes": timing.peak_bytes,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "notes": [note.text for note in timing.notes],
    }


def check_speed(speed: Mapping[str, Any]) -> Check:
    """State the times; they are no gate."""
    message = (
        f"{speed['avg_time_per_sample_ms']:.3g} ms per sample in batches of {speed['batch_size']} on "
        f"{speed['device_name']}, {speed['throughput_samples_per_sec']:.4g} samples per second"
    )
    if not speed["is_stable"]:
        message += "; the times vary by more than a tenth: is something else running?"
    return Check(CHECK, "pass", message, {"runs": speed["runs"], "is_stable": speed["is_stable"]})
