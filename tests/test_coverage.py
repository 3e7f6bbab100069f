"""How much of a model came out of a file is counted, judged, and answered with what would help."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from ckptool.errors import ChecksumMismatch, PlanRefused
from ckptool.loading.checked import load_checked
from ckptool.loading.coverage import coverage_checks, fold
from ckptool.model.loading import LoadReport
from ckptool.model.plans import KeyOptions
from ckptool.model.verification import Check, Thresholds, VerifyOptions

EXAMPLES = Path(__file__).parents[1] / "examples"


class Net(nn.Module):
    """Have parameters, statistics, a mask, an index table, and repeated blocks."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.bn = nn.BatchNorm1d(4)
        self.attn = nn.Module()
        self.attn.register_buffer("bias", torch.ones(1, 1, 4, 4).tril())
        self.register_buffer("position_ids", torch.arange(4))
        self.fc = nn.Linear(4, classes)


class Tied(nn.Module):
    """Use the embedding as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def saved(path: Path, changes: Mapping[str, Tensor | None] | None = None, prefix: str = "") -> Path:
    """Save a Net's weights with some entries replaced, added or (None) left out."""
    torch.manual_seed(1)
    state: dict[str, Tensor | None] = {**Net().state_dict(), **(changes or {})}
    torch.save({prefix + key: value for key, value in state.items() if value is not None}, path)
    return path


def judge(model: nn.Module, path: Path, **options: Any) -> tuple[Check, LoadReport]:
    asked = VerifyOptions(**options)
    report = load_checked(model, path, asked)
    coverage, meta = coverage_checks(report, asked)
    assert (coverage.id, meta.id, meta.status) == ("load.coverage", "load.meta", "pass")
    assert "\n" not in coverage.message
    assert coverage.evidence["coverage"] == report.coverage
    assert (coverage.advice != "") == (coverage.status != "pass")
    return coverage, report


NEW = torch.ones(2)
# changes, options, status, what the message says, what the advice says
CASES: dict[str, tuple[dict[str, Tensor | None], dict[str, Any], str, str, str]] = {
    "complete": ({}, {}, "pass", "15 of 15 tensors of the model loaded, 100 % of its elements", ""),
    "missing": (
        {"fc.weight": None, "fc.bias": None},
        {},
        "fail",
        '13 of 15 .* 86.6 % of its elements; 2 missing: they are as initialised: "fc.weight", "fc.bias"',
        "--allow-missing 'fc.weight'",
    ),
    "missing blocks": (
        {f"blocks.{index}.weight": None for index in range(3)},
        {},
        "fail",
        r'3 missing: they are as initialised: "blocks.\*.weight x 3"',
        r"--allow-missing 'blocks.\*.weight'",
    ),
    "missing, as allowed": (
        {"fc.weight": None, "fc.bias": None},
        {"allow_missing": ("fc.*",)},
        "pass",
        "2 missing or unknown as allowed",
        "",
    ),
    "missing, one of them allowed": (
        {"fc.weight": None, "fc.bias": None},
        {"allow_missing": ("fc.w*",)},
        "fail",
        '1 missing: they are as initialised: "fc.bias"',
        "fc.bias",
    ),
    "missing, within the threshold": (
        {"fc.bias": None},
        {"thresholds": Thresholds(coverage=0.9)},
        "warn",
        "1 missing",
        "--allow-missing",
    ),
    "missing, beyond the threshold": (
        {"fc.weight": None},
        {"thresholds": Thresholds(coverage=0.9)},
        "fail",
        "1 missing",
        "--allow-missing",
    ),
    "statistics missing": (
        {"bn.running_mean": None, "bn.running_var": None},
        {},
        "fail",
        "2 missing",
        "--allow-missing 'bn.running_mean'",
    ),
    "unexpected": (
        {"aux.weight": NEW},
        {},
        "fail",
        '1 in the file and unknown to the model: "aux.weight"',
        "--allow-unexpected 'aux.weight'",
    ),
    "unexpected, as allowed": (
        {"aux.weight": NEW},
        {"allow_unexpected": ("aux.*",)},
        "pass",
        "1 missing or unknown as allowed",
        "",
    ),
    "shape": (
        {"fc.weight": torch.ones(7, 4), "fc.bias": torch.ones(7)},
        {},
        "fail",
        r'2 of another shape or kind \(float32 \[7, 4\] instead of float32 \[3, 4\]\): "fc.weight", "fc.bias"',
        "--allow-missing 'fc.weight'",
    ),
    "shape, as allowed": (
        {"fc.weight": torch.ones(7, 4), "fc.bias": torch.ones(7)},
        {"allow_missing": ("fc.*",)},
        "pass",
        "2 missing or unknown as allowed",
        "",
    ),
    "kind": (
        {"fc.bias": torch.ones(3, dtype=torch.complex64)},
        {},
        "fail",
        r"complex64 \[3\] instead of float32 \[3\]",
        "--allow-missing",
    ),
    "renamed": (
        {"fc.weight": None, "fc.bias": None, "fc.1.weight": torch.ones(3, 4), "fc.1.bias": torch.ones(3)},
        {},
        "fail",
        r'every missing tensor has a single unknown one of its shape and last name \("fc.weight": "fc.1.weight"\)',
        "ckptool strip-prefixes --map FILE",
    ),
    "index table and mask missing": (
        {"position_ids": None, "attn.bias": None},
        {},
        "pass",
        "13 of 15 .* 100 % .*2 different without consequence",
        "",
    ),
    "index table and mask unknown": (
        {
            "h.0.attn.bias": torch.ones(1, 1, 4, 4),
            "h.0.attn.masked_bias": torch.tensor(-1e4),
            "e.position_ids": torch.arange(9),
            "fc.total_ops": torch.zeros(1),
        },
        {},
        "pass",
        "4 different without consequence",
        "",
    ),
    "a real bias called so": (
        {"h.0.attn.bias": torch.ones(4)},
        {},
        "fail",
        "1 in the file and unknown to the model",
        "--allow-unexpected",
    ),
    "longer mask": ({"attn.bias": torch.ones(1, 1, 8, 8)}, {}, "pass", "1 different without consequence", ""),
    "counter missing": ({"bn.num_batches_tracked": None}, {}, "pass", "14 of 15 .* 100 % .* 1 left at its start", ""),
    "cast": ({"fc.bias": torch.ones(3, dtype=torch.float16)}, {}, "pass", "1 cast to the dtype of the model", ""),
}


@pytest.mark.parametrize("prefix", ["", "model._orig_mod.", "module."])
@pytest.mark.parametrize("case", CASES)
def test_every_difference_is_judged(tmp_path, case, prefix):
    changes, options, status, message, advice = CASES[case]
    path = saved(tmp_path / "net.pt", changes, prefix)
    check, _ = judge(Net(), path, **options)
    assert check.status == status
    assert re.search(message, check.message), check.message
    assert re.search(advice, check.advice), check.advice


@pytest.mark.parametrize("case", CASES)
def test_what_fits_is_loaded_and_the_rest_left_alone(tmp_path, case):
    changes, options, *_ = CASES[case]
    path = saved(tmp_path / "net.pt", changes)
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_checked(model, path, VerifyOptions(**options))
    stored = torch.load(path, weights_only=True)
    for key, value in model.state_dict().items():
        expected = stored[key].to(value.dtype) if key in report.matched else before[key]
        assert torch.equal(value, expected), key
    counted = [key for key in before if key not in {*report.ignored, *report.defaulted}]
    loaded = sum(before[key].numel() for key in counted if key in report.matched)
    assert report.coverage == pytest.approx(loaded / sum(before[key].numel() for key in counted))


def test_a_file_of_another_model_loads_nothing_and_fails(tmp_path):
    torch.save({"conv.weight": torch.ones(2, 2, 3, 3)}, tmp_path / "other.pt")
    model = Net()
    before = model.fc.weight.clone()
    check, report = judge(model, tmp_path / "other.pt")
    assert check.status == "fail"
    assert check.message.startswith("none of the model's 15 tensors is in the file: the model is as it was initialised")
    assert "--model" in check.advice
    assert report.coverage == 0
    assert torch.equal(model.fc.weight, before)


def test_a_share_below_all_never_reads_as_all(tmp_path):
    model = nn.Sequential(nn.Linear(1000, 100, bias=False), nn.Linear(1, 1, bias=False))
    torch.save({"0.weight": torch.ones(100, 1000)}, tmp_path / "net.pt")
    check, _ = judge(model, tmp_path / "net.pt")
    assert check.status == "fail"
    assert "99.9 % of its elements" in check.message


# --- as it stands ---


@pytest.mark.parametrize("name", ["digits.ckpt", "digits_wrong_strip.pt"])
def test_names_that_a_plain_loader_misses_fail_with_the_command_that_helps(tmp_path, run, name):
    import importlib.util

    spec = importlib.util.spec_from_file_location("train_digits_for_coverage", EXAMPLES / "train_digits.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path / name
    path.write_bytes((EXAMPLES / name).read_bytes())
    segment = "model._orig_mod." if name == "digits.ckpt" else "_orig_mod."
    check, report = judge(script.DigitsNet(), path, as_is=True)
    assert check.status == "fail"
    assert report.coverage == 0
    assert f'stripping "{segment}" would match 33 of 33 tensors' in check.message
    assert judge(script.DigitsNet(), path)[0].status == "pass"

    command = shlex.split(check.advice)
    assert command[:2] == ["ckptool", "strip-prefixes"]
    assert run(*command[1:]).status == 0
    clean, report = judge(script.DigitsNet(), Path(command[-1]), as_is=True)
    assert (clean.status, report.coverage) == ("pass", 1.0)


@pytest.mark.parametrize(
    ("old", "new"), [("", "net."), ("net.", ""), ("model._orig_mod.", "net."), ("a.b.", ""), ("module.", "module.net.")]
)
def test_the_command_works_for_any_prefix(tmp_path, run, old, new):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = Net()
            for name in reversed(new.split(".")[:-1]):
                inner, wrapped = nn.Module(), inner
                setattr(inner, name, wrapped)
            self.__dict__["_modules"] = inner._modules
            self.__dict__["_buffers"], self.__dict__["_parameters"] = inner._buffers, inner._parameters

    path = saved(tmp_path / "net.pt", prefix=old)
    check, _ = judge(Outer(), path, as_is=True)
    assert check.status == "fail"
    command = shlex.split(check.advice)
    assert run(*command[1:]).status == 0, command
    assert judge(Outer(), Path(command[-1]), as_is=True)[0].status == "pass"


@pytest.mark.parametrize("changes", [{}, {"fc.bias": None}, {"aux.w": NEW}, {"fc.bias": torch.ones(2)}])
def test_as_it_stands_is_as_torch_loads_it(tmp_path, changes):
    path = saved(tmp_path / "net.pt", changes)
    theirs = Net()
    try:
        theirs.load_state_dict(torch.load(path, weights_only=True))
    except RuntimeError:
        expected = "fail"
    else:
        expected = "pass"
    ours = Net()
    check, _ = judge(ours, path, as_is=True)
    assert check.status == expected
    if expected == "pass":
        assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())


def test_what_a_strict_loader_asks_for_is_a_warning(tmp_path):
    path = saved(tmp_path / "net.pt", {"position_ids": None})
    assert judge(Net(), path, as_is=True)[0].status == "warn"


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"format": "pt", "head.weight": "embed.weight"}])
def test_a_tied_name_counts_and_is_a_warning_as_it_stands(tmp_path, metadata):
    path = tmp_path / "tied.safetensors"
    safetensors.torch.save_file({"embed.weight": torch.ones(5, 3)}, path, metadata)
    assert judge(Tied(), path)[0].status == "pass"
    check, report = judge(Tied(), path, as_is=True)
    assert (check.status, report.tied, report.coverage) == ("warn", ("head.weight",), 1.0)
    assert check.advice.startswith("write every name with ckptool convert --ties copy")


def test_a_name_that_only_the_metadata_knows_is_missing_for_a_plain_loader(tmp_path):
    path = tmp_path / "tied.safetensors"
    safetensors.torch.save_file({"embed.weight": torch.ones(5, 3)}, path, {"head.weight": "embed.weight"})
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(5, 3))
    check, report = judge(untied, path, as_is=True)
    assert (check.status, report.missing) == ("fail", ("head.weight",))
    assert not untied.head.weight.any()


# --- parts of a file ---


@pytest.mark.parametrize(
    ("root", "status"),
    [
        ("criterion", "pass"),
        ("val_loss_fn", "pass"),
        ("ema_model", "pass"),
        ("n_averaged", "pass"),
        ("teacher", "warn"),
    ],
)
def test_what_lies_beside_the_model(tmp_path, root, status):
    state = {f"net.{key}": value for key, value in Net().state_dict().items()}
    name = root if root == "n_averaged" else f"{root}.weight"
    torch.save({**state, name: torch.ones(2)}, tmp_path / "net.pt")
    check, report = judge(Net(), tmp_path / "net.pt")
    assert (check.status, len(report.dropped)) == (status, 1)
    if status == "warn":
        assert f'1 in the file and outside of the part that is the model: "{root}.weight"' in check.message
        assert judge(Net(), tmp_path / "net.pt", allow_unexpected=("teacher.*",))[0].status == "pass"


def test_what_is_excluded_is_not_loaded(tmp_path):
    path = saved(tmp_path / "net.pt", prefix="model._orig_mod.")
    check, report = judge(Net(), path, keys=KeyOptions(exclude=("fc.*",)))
    assert (check.status, report.missing) == ("fail", ("fc.weight", "fc.bias"))
    assert judge(Net(), path, keys=KeyOptions(exclude=("fc.*",)), allow_missing=("fc.*",))[0].status == "pass"


def test_a_prefix_too_deep_to_be_a_wrapper_is_named(tmp_path, run):
    path = saved(tmp_path / "net.pt", prefix="a.b.c.d.")
    check, _ = judge(Net(), path)
    assert check.status == "fail"
    assert 'stripping "a.b.c.d." would match 15 of 15 tensors' in check.message
    command = shlex.split(check.advice)
    assert run(*command[1:]).status == 0
    assert judge(Net(), Path(command[-1]))[0].status == "pass"


def test_other_weights_are_judged_on_request(tmp_path):
    good, half = Net().state_dict(), {"fc.weight": torch.ones(3, 4), "fc.bias": torch.ones(3)}
    torch.save({"model": good, "model_ema": half}, tmp_path / "net.pt")
    assert judge(Net(), tmp_path / "net.pt")[0].status == "pass"
    assert judge(Net(), tmp_path / "net.pt", weights="ema")[0].status == "fail"


def test_two_equal_networks_must_be_chosen(tmp_path):
    state = Net().state_dict()
    both = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in state.items()}
    torch.save(both, tmp_path / "net.pt")
    with pytest.raises(PlanRefused, match="student"):
        judge(Net(), tmp_path / "net.pt")
    assert judge(Net(), tmp_path / "net.pt", keys=KeyOptions(select="teacher"))[0].status == "pass"


def test_damaged_bytes_are_never_loaded(tmp_path):
    path = saved(tmp_path / "net.pt")
    content = path.read_bytes()
    weight = bytes(torch.load(path, weights_only=True)["fc.weight"].numpy().tobytes())
    path.write_bytes(content.replace(weight, weight[:-1] + bytes([weight[-1] ^ 1])))
    model = Net()
    before = model.fc.weight.clone()
    with pytest.raises(ChecksumMismatch):
        judge(model, path)
    assert torch.equal(model.fc.weight, before)


def test_a_tensor_that_stays_on_meta_fails(tmp_path):
    class Lost(Net):
        def load_state_dict(self, *arguments: Any, **keywords: Any) -> Any:
            self.register_buffer("table", torch.empty(2, device="meta"), persistent=False)
            return super().load_state_dict(*arguments, **keywords)

    options = VerifyOptions()
    report = load_checked(Lost(), saved(tmp_path / "net.pt"), options)
    coverage, meta = coverage_checks(report, options)
    assert (coverage.status, meta.status) == ("pass", "fail")
    assert '1 tensors of the model are on the meta device, without memory: "table"' in meta.message


def test_names_are_folded_over_their_numbers():
    names = [*(f"layers.{layer}.mlp.{part}.weight" for layer in range(12) for part in (0, 2)), "0.bias", "fc1.weight"]
    assert fold(names) == {"layers.*.mlp.*.weight": 24, "*.bias": 1, "fc1.weight": 1}
