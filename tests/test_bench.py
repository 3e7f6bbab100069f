"""Devices, batches that do not fit, and times; CUDA is tested where there is one."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ckptool.errors import CkptoolError
from ckptool.verification.bench import Effort, _quantile, check_speed, count_flops, measure_speed
from ckptool.verification.compare import measure_agreement
from ckptool.verification.device import (
    call_model,
    choose_device,
    count_inputs,
    describe_batch,
    describe_device,
    evaluating,
    move_model,
    run_batches,
    take_inputs,
)

CPU = torch.device("cpu")
QUICK = Effort(runs=5, seconds=0.0, warmup_runs=2, warmup_seconds=0.0)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device at hand")
# The names that trainers' test scripts use.
PROMISED = (
    *("samples_tested", "avg_time_per_sample_ms", "std_time_per_sample_ms", "min_time_per_sample_ms"),
    *("max_time_per_sample_ms", "median_time_per_sample_ms", "throughput_samples_per_sec", "device"),
)


@dataclass
class Fed:
    batch: Any
    kind: str = "synthetic"
    modality: str = "image"
    labels: None = None
    class_names: None = None
    assumed_scale: bool = False

    @property
    def count(self) -> int:
        return count_inputs(self.batch)

    @property
    def names(self) -> list[str]:
        return [str(index) for index in range(self.count)]

    def batches(self) -> Iterator[Any]:
        yield self.batch


class Small(nn.Module):
    """Run out of memory with more than ``room`` inputs, as CUDA says it."""

    def __init__(self, room: int, error: type[Exception] = torch.cuda.OutOfMemoryError) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.room, self.error, self.sizes = room, error, []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.fc(x)


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))


# --- devices ---


@pytest.mark.parametrize(
    "text", ["gpu", "cuda:", "cuda:-1", "CUDA", "cpu:1", "cuda:99", "mps:3", "", "meta", "cuda:7x"]
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(text):
    with pytest.raises(CkptoolError, match=r"choose .*cpu") as refused:
        choose_device(text)
    assert str(refused.value).startswith("--device ")


def test_auto_takes_what_there_is():
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto").type == expected
    assert choose_device("cpu") == CPU
    assert describe_device(CPU) == f"cpu ({torch.get_num_threads()} threads)"


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(2, True, "cuda"), (0, True, "mps"), (0, False, "cpu"), (1, False, "cuda")]
)
def test_auto_takes_cuda_then_mps_then_the_cpu(cuda, mps, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto").type == expected
    if cuda:
        assert choose_device(f"cuda:{cuda - 1}").index == cuda - 1
        with pytest.raises(CkptoolError, match=rf"has {cuda} cuda device\(s\)"):
            choose_device(f"cuda:{cuda}")


# --- batches ---


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, RuntimeError], ids=["CUDA", "MPS"])
def test_a_batch_that_does_not_fit_is_halved_for_good(error):
    model, first, second = Small(3, error), torch.randn(16, 3), torch.randn(5, 3)
    answers = run_batches(model, [first, second], CPU, lambda output: output)
    assert model.sizes[:4] == [16, 8, 4, 2]
    assert max(model.sizes[4:]) == 2
    assert torch.equal(torch.cat(answers.parts), torch.cat([model.fc(x) for x in torch.cat([first, second]).split(2)]))
    assert answers.batch_size == 2
    assert answers.notes[0].code == "smaller-batch"
    assert "--batch-size 2" in answers.notes[0].text


def test_what_fits_is_answered_at_once_and_without_a_note():
    model = Small(16)
    answers = run_batches(model, [torch.randn(16, 3), torch.randn(4, 3)], CPU, lambda output: output)
    assert (model.sizes, answers.batch_size, answers.notes) == ([16, 4], 16, ())


def test_one_input_that_does_not_fit_is_one_sentence():
    with pytest.raises(CkptoolError, match="one input alone does not fit"):
        run_batches(Small(0), [torch.randn(4, 3)], CPU, lambda output: output)
    with pytest.raises(CkptoolError, match="one input alone does not fit"):
        measure_speed(Small(0), Fed(torch.randn(4, 3)), CPU, QUICK)


def test_a_model_that_does_not_fit_is_one_sentence():
    class Huge(nn.Module):
        def to(self, *_args: Any) -> nn.Module:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(CkptoolError, match="does not fit into the memory of cuda:1; use --device cpu"):
        move_model(Huge(), torch.device("cuda:1"))


class Strange(Exception):
    """An error of somebody else's."""


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, Strange, AssertionError, NotImplementedError])
def test_a_forward_that_raises_is_one_sentence(error):
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error("line one\nline two " + "x" * 2000)

    with pytest.raises(CkptoolError) as refused:
        run_batches(Raises(), [torch.randn(2, 3, 8, 8)], CPU, lambda output: output)
    message = str(refused.value)
    assert f"raised {error.__name__}" in message
    assert "float32 [2, 3, 8, 8]" in message
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("batch", "described"),
    [
        (torch.zeros(4, 2), "float32 [4, 2]"),
        ({"a": torch.zeros(4, 2), "b": torch.zeros(4, dtype=torch.int64)}, "a float32 [4, 2], b int64 [4]"),
        ([torch.zeros(4, 2), torch.zeros(1)], "float32 [4, 2], float32 [1]"),
    ],
)
def test_batches_of_every_form_are_passed_and_cut(batch, described):
    class Echo(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args or kwargs

    assert (count_inputs(batch), describe_batch(batch)) == (4, described)
    assert count_inputs(take_inputs(batch, 1, 2)) == 2
    given = call_model(Echo(), batch)
    assert isinstance(given, dict) == isinstance(batch, dict)


def test_what_is_the_same_for_all_inputs_is_not_cut():
    cut = take_inputs({"x": torch.arange(6), "scale": torch.tensor(2.0), "table": torch.zeros(9)}, 2, 3)
    assert cut["x"].tolist() == [2, 3, 4]
    assert cut["scale"].ndim == 0
    assert cut["table"].shape == (9,)


def test_modes_are_restored():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()))
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert torch.is_inference_mode_enabled()
    assert [module.training for module in model.modules()] == [True, True, False, False, False]


# --- times ---


def test_times_have_the_promised_names_and_make_sense():
    inputs = Fed(torch.randn(4, 3, 8, 8))
    speed = measure_speed(conv_net(), inputs, CPU, QUICK)
    assert set(PROMISED) <= speed.keys()
    assert (speed["samples_tested"], speed["runs"], speed["batch_size"], speed["device"]) == (20, 5, 4, "cpu")
    assert speed["warmup_runs"] == 2
    ordered = [speed[f"{name}_time_per_sample_ms"] for name in ("min", "median", "p95", "p99", "max")]
    assert ordered == sorted(ordered)
    assert ordered[0] > 0
    assert speed["throughput_samples_per_sec"] == pytest.approx(1000 / speed["avg_time_per_sample_ms"])
    assert speed["avg_time_per_batch_ms"] == pytest.approx(4 * speed["avg_time_per_sample_ms"])
    assert speed["parameters"] == sum(parameter.numel() for parameter in conv_net().parameters())
    json.dumps(speed, allow_nan=False)


def test_times_are_those_that_pass(monkeypatch):
    """With a clock that is known: runs of 8, 12, 8, 12, 8 ms, two inputs each."""
    ticks = iter(
        t * 1_000_000
        for start, length in ((0, 8), (9, 12), (30, 8), (40, 12), (60, 8))
        for t in (start, start + length)
    )
    monkeypatch.setattr("ckptool.verification.bench.time.perf_counter_ns", lambda: next(ticks))
    speed = measure_speed(Small(9), Fed(torch.randn(2, 3)), CPU, QUICK)
    times = [4.0, 6.0, 4.0, 6.0, 4.0]
    assert speed["avg_time_per_sample_ms"] == pytest.approx(statistics.fmean(times))
    assert speed["std_time_per_sample_ms"] == pytest.approx(statistics.pstdev(times))
    assert (speed["min_time_per_sample_ms"], speed["max_time_per_sample_ms"]) == (4.0, 6.0)
    assert speed["median_time_per_sample_ms"] == 4.0
    assert not speed["is_stable"]
    assert "vary" in check_speed(speed).message


def test_quantiles_are_those_of_torch():
    times = torch.rand(37, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for share in (0.25, 0.75, 0.95, 0.99, 1.0):
        assert _quantile(times.tolist(), share) == pytest.approx(float(times.quantile(share)))


def test_effort_ends_after_its_time():
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            import time

            time.sleep(0.01)
            return x

    speed = measure_speed(Slow(), Fed(torch.zeros(1, 2)), CPU, Effort(most_seconds=0.05, warmup_seconds=0.0))
    assert 5 <= speed["runs"] < 30
    longer = measure_speed(
        Slow(), Fed(torch.zeros(1, 2)), CPU, Effort(runs=2, seconds=0.1, warmup_runs=1, warmup_seconds=0)
    )
    assert longer["runs"] > 2


def test_a_batch_that_does_not_fit_is_timed_in_halves():
    speed = measure_speed(Small(3), Fed(torch.randn(16, 3)), CPU, QUICK)
    assert (speed["batch_size"], speed["samples_tested"]) == (2, 10)
    assert "ran out of memory with 16 inputs" in speed["notes"][0]


def test_the_model_is_timed_as_it_is_deployed():
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[tuple[bool, bool]] = set()

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add((self.training, torch.is_grad_enabled()))
            return x

    model = Asks().train()
    measure_speed(model, Fed(torch.zeros(2, 2)), CPU, QUICK)
    assert model.seen == {(False, False)}
    assert model.training


FLOPS = {
    # Two for each multiplication with its addition.
    "linear": (nn.Linear(30, 20), torch.zeros(1, 30), 2 * 30 * 20),
    "convolution": (nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8), 2 * 8 * 6 * 6 * 3 * 9),
    "fused encoder": (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.zeros(2, 5, 16), 40960),
    "nothing to count": (nn.ReLU(), torch.zeros(1, 3), None),
    "a forward that raises": (nn.Linear(30, 20), torch.zeros(1, 31), None),
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops(name):
    model, batch, expected = FLOPS[name]
    assert count_flops(model.eval(), batch) == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_check_states_the_times():
    speed = measure_speed(conv_net(), Fed(torch.randn(4, 3, 8, 8)), CPU, QUICK)
    check = check_speed(speed)
    assert (check.id, check.status) == ("speed", "pass")
    assert "batches of 4 on cpu" in check.message


# --- CUDA ---


@needs_cuda
def test_cuda_answers_as_the_cpu_does():
    device = choose_device("cuda")
    model, batch = conv_net(), torch.randn(16, 3, 8, 8)
    (ours,) = run_batches(move_model(model, device), [batch], device, lambda output: output).parts
    (theirs,) = run_batches(model.to(CPU), [batch], CPU, lambda output: output).parts
    assert ours.device == CPU
    assert measure_agreement(ours, theirs, "classification").relative_error < 1e-2


@needs_cuda
def test_cuda_is_timed_by_its_own_events():
    device = choose_device("auto")
    speed = measure_speed(conv_net().to(device), Fed(torch.randn(16, 3, 8, 8)), device)
    assert speed["cuda_events"]
    assert speed["device"].startswith("cuda")
    assert speed["peak_memory_bytes"] > 0
    assert speed["warmup_runs"] >= 10
    assert set(PROMISED) <= speed.keys()


@needs_cuda
def test_cuda_out_of_memory_halves_the_batch():
    class Hungry(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            free, _ = torch.cuda.mem_get_info()
            torch.empty(len(x) * free // 5, dtype=torch.uint8, device=x.device)
            return x

    device = choose_device("cuda")
    answers = run_batches(Hungry().to(device), [torch.arange(16.0).unsqueeze(1)], device, lambda output: output)
    assert torch.cat(answers.parts).squeeze(1).tolist() == list(range(16))
    assert answers.notes[0].code == "smaller-batch"
