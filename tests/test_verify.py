"""The verify command: what it says of sound and of damaged checkpoints, what each option does, how it ends."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.strict_json import strictly

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DIGITS = EXAMPLES / "digits.ckpt"
WRONG_STRIP = EXAMPLES / "digits_wrong_strip.pt"

# The network of examples/train_digits.py without Lightning, whose import takes seconds.
NETS = """
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Digits(nn.Module):
    def __init__(self, widths=(16, 32), classes=10):
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        pairs = zip((widths[0], *widths), widths)
        self.blocks = nn.ModuleList(Block(a, b, 1 if index == 0 else 2) for index, (a, b) in enumerate(pairs))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = functional.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean(dim=(2, 3)))


class Raising(Digits):
    def forward(self, x):
        raise ValueError("cannot run")


class Value(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(x)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(7, 3)

    def forward(self, left, right):
        return self.fc(torch.cat([left, right], dim=1))


class NeedsWidth(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, 3)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the network, its clean weights, and digits that it was not trained with."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    folder = tmp_path_factory.mktemp("verify")
    (folder / "nets_of_verify.py").write_text(NETS)
    torch.save(clean_state(), folder / "clean.pt")
    digits = load_digits()
    _, chosen = train_test_split(range(len(digits.target)), test_size=360, stratify=digits.target, random_state=7)
    images, labels = (digits.images[chosen][:, None] / 16).astype(np.float32), digits.target[chosen]
    np.savez(folder / "digits.npz", image=images, labels=labels)
    np.savez(folder / "unlabelled.npz", image=images)
    np.savez(folder / "few.npz", image=images[:8])
    (folder / "targets.txt").write_text("\n".join(map(str, labels.tolist())))
    return folder


@pytest.fixture(scope="module")
def pictures(place: Path) -> Path:
    """Lay 60 digits out as one folder per class."""
    images = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    found = np.load(place / "digits.npz")
    folder = place / "pictures"
    for number, (image, label) in enumerate(zip(found["image"][:60], found["labels"][:60], strict=True)):
        below = folder / str(label)
        below.mkdir(parents=True, exist_ok=True)
        images.fromarray((image[0] * 255).round().astype(np.uint8)).save(below / f"{number:03}.png")
    return folder


def clean_state() -> dict[str, torch.Tensor]:
    saved = torch.load(DIGITS, weights_only=True)["state_dict"]
    return {name.removeprefix("model._orig_mod."): tensor for name, tensor in saved.items()}


@pytest.fixture
def verify(run, place: Path, monkeypatch: pytest.MonkeyPatch):
    """Run ``verify --json --device cpu`` in the folder and give exit status and document."""
    monkeypatch.chdir(place)

    def verify_paths(*args: object, model: str | None = "nets_of_verify.py:Digits") -> tuple[int, dict[str, Any]]:
        chosen = [] if model is None else ["--model", model]
        ran = run("verify", *args, *chosen, "--device", "cpu", "--json")
        assert ran.out, ran.err
        return ran.status, strictly(ran.out)

    return verify_paths


@pytest.fixture
def refusal(run, place: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command that is refused, and give the one sentence that it says."""
    monkeypatch.chdir(place)

    def refuse(*args: object, model: str | None = "nets_of_verify.py:Digits") -> str:
        ran = run("verify", *args, *([] if model is None else ["--model", model]), "--quiet")
        assert ran.status == 2, (ran.out, ran.err)
        assert ran.out == ""
        assert "Traceback" not in ran.err
        [line] = ran.err.splitlines()
        return line

    return refuse


def status_of(document: dict[str, Any], check_id: str) -> str:
    return check(document, check_id)["status"]


def check(document: dict[str, Any], check_id: str) -> dict[str, Any]:
    return next(each for each in document["checks"] if each["id"] == check_id)


def failed(document: dict[str, Any]) -> set[str]:
    return {each["id"] for each in document["checks"] if each["status"] == "fail"}


# --- the digits ---


def test_the_digits_pass_with_their_own_images(verify):
    status, found = verify(DIGITS, "--inputs", "digits.npz")
    assert (status, found["verdict"]) == (0, "pass")
    assert found["schema"] == "ckptool.verify/1"
    assert found["load"]["coverage"] == 1
    assert status_of(found, "keys") == "warn"
    assert "strip-prefixes" in check(found, "keys")["advice"]
    assert found["predictions"]["inputs"] == 360
    assert found["metrics"]["accuracy"] == pytest.approx(358 / 360)


def test_the_digits_pass_with_what_is_made_up(verify):
    status, found = verify(DIGITS)
    assert (status, found["verdict"]) == (0, "pass")
    assert found["predictions"]["kind"] != "in-domain"
    assert found["predictions"]["inputs"] == 48
    assert found["notes"]


def test_the_wrong_strip_fails_as_it_is_and_names_the_fix(verify):
    status, found = verify(WRONG_STRIP, "--inputs", "unlabelled.npz", "--as-is")
    assert (status, found["verdict"]) == (1, "fail")
    assert found["load"]["matched"] == 0
    assert "_orig_mod." in check(found, "load.coverage")["message"]
    assert "ckptool strip-prefixes" in check(found, "load.coverage")["advice"]
    assert "output.diverse" in failed(found)
    assert max(found["predictions"]["histogram"].values()) > 0.8 * found["predictions"]["inputs"]


def test_the_wrong_strip_passes_cleaned_with_a_warning(verify):
    status, found = verify(WRONG_STRIP, "--inputs", "unlabelled.npz")
    assert (status, found["verdict"]) == (0, "pass")
    assert status_of(found, "keys") == "warn"
    assert "ckptool strip-prefixes" in check(found, "keys")["advice"]


@pytest.mark.parametrize("front", ["net.", "model._orig_mod.", "a.module.b."])
def test_keys_that_the_model_alone_cleans_are_a_warning_that_names_the_command(verify, front, tmp_path, run):
    saved = torch.load(DIGITS, weights_only=True)["state_dict"]
    state = {front + name.removeprefix("model._orig_mod."): tensor for name, tensor in saved.items()}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "wrapped.pt")
    status, found = verify(tmp_path / "wrapped.pt", "--inputs", "unlabelled.npz")
    keys = check(found, "keys")
    assert (status, keys["status"], keys["evidence"]["renamed"]) == (0, "warn", len(state))
    assert keys["evidence"]["examples"][f"{front}stem.weight"] == "stem.weight"
    program, *words = shlex.split(keys["advice"])
    assert (program, run(*words).status) == ("ckptool", 0)
    status, found = verify(words[-1], "--inputs", "unlabelled.npz", "--as-is")
    assert (status, found["load"]["coverage"], status_of(found, "keys")) == (0, 1.0, "pass")
    status, found = verify(tmp_path / "wrapped.pt", "--inputs", "unlabelled.npz", "--as-is")
    assert f'; stripping "{front}" would match' in check(found, "load.coverage")["message"]


def statistics_lost(state: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        if name.endswith(("running_mean", "num_batches_tracked")):
            tensor.zero_()
        elif name.endswith("running_var"):
            tensor.fill_(1)


def never_trained(state: dict[str, torch.Tensor]) -> None:
    namespace: dict[str, Any] = {}
    exec(NETS, namespace)
    torch.manual_seed(3)
    state.update(namespace["Digits"]().state_dict())


def half_missing(state: dict[str, torch.Tensor]) -> None:
    for name in list(state)[::2]:
        del state[name]


DAMAGES = {
    "collapsed head": (lambda state: state["fc.weight"].zero_(), {"values.dead"}, "fc.weight"),
    "bias spike": (lambda state: state["fc.bias"].__setitem__(4, 60.0), {"output.diverse"}, "fc.bias"),
    "layer of NaN": (lambda state: state["blocks.0.conv1.weight"].fill_(math.nan), {"values.finite"}, "blocks.0.conv1"),
    "never trained": (never_trained, {"output.diverse"}, "freshly initialised"),
    "statistics lost": (statistics_lost, {"output.diverse"}, "BatchNorm"),
    "half missing": (half_missing, {"load.coverage"}, "missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_with_the_models_own_inputs_and_named(verify, tmp_path, name):
    damage, expected, cause = DAMAGES[name]
    state = clean_state()
    damage(state)
    torch.save(state, tmp_path / "damaged.pt")
    status, found = verify(tmp_path / "damaged.pt", "--inputs", "unlabelled.npz", "--num-samples", "64")
    assert (status, found["verdict"]) == (1, "fail")
    assert expected <= failed(found)
    said = [each["message"] for each in found["checks"] if each["status"] in ("fail", "warn")]
    assert any(cause in message for message in said), said
    synthetic, made_up = verify(tmp_path / "damaged.pt")
    assert synthetic in (1, 2)
    assert made_up["verdict"] in ("fail", "inconclusive")


def test_a_detector_of_a_rare_class_is_not_failed(verify, tmp_path, place):
    """Its head is cut out of the ten classes: ``it is a 7`` against the best of all others."""
    state = clean_state()
    weight, bias = state["fc.weight"], state["fc.bias"]
    others = [index for index in range(10) if index != 7]
    state["fc.weight"] = torch.stack([weight[others].mean(0) * 0, weight[7] - weight[others].mean(0)])
    state["fc.bias"] = torch.stack([bias[7] * 0, bias[7] - bias[others].mean() - 2])
    torch.save(state, tmp_path / "seven.pt")
    for inputs in ((), ("--inputs", "unlabelled.npz")):
        status, found = verify(tmp_path / "seven.pt", *inputs)
        assert status != 1, failed(found)
    found = np.load(place / "digits.npz")
    np.savez(tmp_path / "seven.npz", image=found["image"], labels=(found["labels"] == 7).astype(np.int64))
    status, found = verify(tmp_path / "seven.pt", "--inputs", tmp_path / "seven.npz")
    assert (status, found["verdict"]) == (0, "pass")
    assert found["metrics"]["accuracy"] > 0.95


def test_labels_that_the_answers_miss_altogether_are_no_pass(verify, tmp_path):
    state = clean_state()
    state["fc.weight"], state["fc.bias"] = state["fc.weight"].roll(1, 0), state["fc.bias"].roll(1, 0)
    torch.save(state, tmp_path / "rolled.pt")
    status, found = verify(tmp_path / "rolled.pt", "--inputs", "digits.npz", "--num-samples", "64")
    assert (status, status_of(found, "accuracy")) == (2, "inconclusive")
    assert verify(tmp_path / "rolled.pt", "--inputs", "unlabelled.npz", "--against", DIGITS)[0] == 1


def test_a_half_precision_copy_agrees_with_its_original(verify, run, tmp_path):
    assert run("convert", DIGITS, tmp_path / "half.safetensors", "--dtype", "float16").status == 0
    status, found = verify(tmp_path / "half.safetensors", "--inputs", "unlabelled.npz", "--against", DIGITS)
    assert (status, found["verdict"]) == (0, "pass")
    assert check(found, "agreement.tensors")["evidence"]["precision"] == "float16"
    assert check(found, "agreement.outputs")["evidence"]["top_1_agreement"] >= 0.99


# --- exit status ---


def test_the_exit_status_is_a_table(run, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    torch.save({"fc.weight": torch.full((4, 3), math.nan)}, tmp_path / "nan.pt")
    (tmp_path / "junk.pt").write_bytes(b"no checkpoint")
    (tmp_path / "evil.pt").write_bytes(evil_pickle(tmp_path))
    model = ("--model", "nets_of_verify.py:Digits", "--device", "cpu")
    table = [
        (0, "clean.pt",),
        (0, DIGITS),
        (1, DIGITS, "--fail-on", "warn"),
        (1, tmp_path / "nan.pt"),
        (0, tmp_path / "nan.pt", "--fail-on", "never"),
        (1, tmp_path / "evil.pt"),
        (2, tmp_path / "junk.pt"),
        (2, tmp_path / "junk.pt", "--fail-on", "never"),
        (2, tmp_path / "absent.pt"),
        (1, "clean.pt", tmp_path / "nan.pt"),
        (2, tmp_path / "nan.pt", tmp_path / "junk.pt", "clean.pt"),
        (2, "clean.pt", "--inputs", "few.npz", *model),
        (2, "clean.pt", "--inputs", "few.npz", "--fail-on", "never", *model),
        (2, "clean.pt", "--fail-on", "sometimes"),
        (2, "clean.pt", "--checks", "nonsense"),
        (2, "clean.pt", "--no-such-option"),
        (2,),
    ]  # fmt: skip
    found = [(run("verify", *args, "--quiet").status, *args) for _, *args in table]
    assert found == table
    assert not (tmp_path / "ran").exists()


def evil_pickle(folder: Path) -> bytes:
    import io
    import zipfile

    written = io.BytesIO()
    command = f"touch {folder / 'ran'}".encode()
    body = b"\x80\x02cposix\nsystem\nX" + len(command).to_bytes(4, "little") + command + b"\x85R."
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("evil/data.pkl", body)
        archive.writestr("evil/version", "3\n")
    return written.getvalue()


def test_without_a_model_torch_is_not_loaded(place):
    script = (
        "import sys; from ckptool.cli import main; status = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules else status)"
    )
    command = [sys.executable, "-c", script, "verify", place / "clean.pt", "--against", DIGITS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "agreement.tensors\tpass" in done.stdout


# --- what each option does ---


def test_without_torch_the_file_is_judged_and_a_model_refused(place):
    program = (
        "import sys; sys.modules['torch'] = None; from ckptool.cli import main; "
        "print(main(['verify', 'clean.pt', '--quiet']), main(['verify', 'clean.pt', '--model', 'x:y', '--quiet']))"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=place, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["0", "2"]
    [line] = ran.stderr.splitlines()
    assert "needs PyTorch; pip install torch" in line


def test_only_the_checks_that_are_asked_for(verify):
    assert [each["id"] for each in verify(DIGITS, "--checks", "keys", model=None)[1]["checks"]] == ["keys"]
    values = verify(DIGITS, "--checks", "values", model=None)[1]["checks"]
    assert {each["id"].partition(".")[0] for each in values} == {"values"}
    rest = verify(DIGITS, "--skip-checks", "values", "--skip-checks", "keys", model=None)[1]["checks"]
    assert [each["id"] for each in rest] == ["integrity", "safety"]


def test_missing_and_unexpected_tensors_can_be_allowed(verify, tmp_path):
    state = clean_state()
    del state["fc.bias"]
    torch.save({**state, "extra.weight": torch.randn(3, 3)}, tmp_path / "other.pt")
    for options, status in (
        ((), 1),
        (("--allow-missing", "fc.*"), 1),
        (("--allow-unexpected", "extra.*"), 1),
        (("--allow-missing", "fc.*", "--allow-unexpected", "extra.*"), 0),
    ):
        assert verify(tmp_path / "other.pt", "--inputs", "unlabelled.npz", *options)[0] == status, options


def test_arguments_of_the_model(verify, refusal):
    status, found = verify("clean.pt", "--model-arg", "classes=4")
    assert status == 1
    assert found["load"]["mismatched"][0]["name"].startswith("fc.")
    assert verify("clean.pt", "--model-arg", "classes=10", "--model-arg", "widths=[16, 32]")[0] == 0
    assert "--model-arg classes: write it as name=value" in refusal("clean.pt", "--model-arg", "classes")


def test_a_module_is_imported_from_the_folder_that_is_named(verify, refusal, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nets_of_verify" in refusal(place / "clean.pt", model="nets_of_verify:Digits")
    status, _ = verify(place / "clean.pt", "--app-dir", place, model="nets_of_verify:Digits")
    assert status == 0


def test_a_program_runs_when_it_is_trusted(verify, refusal, tmp_path):
    namespace: dict[str, Any] = {}
    exec(NETS, namespace)
    model = namespace["Digits"]()
    model.load_state_dict(clean_state())
    torch.jit.trace(model.eval(), torch.rand(2, 1, 8, 8)).save(tmp_path / "traced.pt")
    assert "--trust-code" in refusal(tmp_path / "traced.pt", "--model", tmp_path / "traced.pt", model=None)
    status, found = verify(tmp_path / "traced.pt", "--trust-code", "--inputs", "digits.npz", model=None)
    assert (status, found["verdict"]) == (0, "pass")
    assert found["metrics"]["accuracy"] == pytest.approx(358 / 360)
    status, found = verify(
        "clean.pt", "--trust-code", "--inputs", "unlabelled.npz", "--against", tmp_path / "traced.pt"
    )
    assert (status, status_of(found, "agreement.tensors"), status_of(found, "agreement.outputs")) == (0, "skip", "pass")


def test_labelled_pictures(verify, pictures, tmp_path):
    status, found = verify("clean.pt", "--data", pictures, "--plot", tmp_path / "confusion.svg", "--top", "5")
    assert status == 0
    assert (found["predictions"]["kind"], found["predictions"]["inputs"]) == ("in-domain", 60)
    assert found["metrics"]["accuracy"] > 0.95
    assert (tmp_path / "confusion.svg").read_text().startswith("<?xml")
    [first, *_] = found["predictions"]["top"]
    assert len(first["predictions"]) == 5
    assert first["predictions"][0]["probability"] >= first["predictions"][1]["probability"]
    assert sum(each["probability"] for each in first["predictions"]) <= 1 + 1e-6


def test_pictures_without_labels_and_their_targets(verify, pictures, tmp_path):
    found = verify("clean.pt", "--images", pictures)[1]
    assert (found["predictions"]["kind"], found["predictions"]["inputs"], found["metrics"]) == ("in-domain", 48, None)
    rows = [(path.relative_to(pictures).as_posix(), path.parent.name) for path in sorted(pictures.rglob("*.png"))]
    with (tmp_path / "targets.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *rows])
    found = verify("clean.pt", "--images", pictures, "--targets", tmp_path / "targets.csv")[1]
    assert found["metrics"]["accuracy"] > 0.95


def test_targets_class_names_and_a_least_accuracy(verify, tmp_path):
    names = [f"digit {number}" for number in range(10)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    given = ("clean.pt", "--inputs", "unlabelled.npz", "--targets", "targets.txt", "--min-accuracy")
    status, found = verify(*given, "0.9", "--num-samples", "64", "--class-names", tmp_path / "names.txt", "--top", "10")
    assert (status, status_of(found, "accuracy")) == (0, "pass")
    [first, *_] = found["predictions"]["top"]
    assert {each["name"] for each in first["predictions"]} == set(names)
    assert sum(each["probability"] for each in first["predictions"]) == pytest.approx(1)
    status, found = verify(*given, "0.999")
    assert (status, failed(found)) == (1, {"accuracy"})
    status, found = verify("clean.pt", "--inputs", "few.npz", "--min-accuracy", "0.5", "--threshold", "least_inputs=4")
    assert (status, status_of(found, "accuracy")) == (2, "inconclusive")


def test_how_many_inputs_in_which_batches_from_which_seed(verify):
    found = verify("clean.pt", "--num-samples", "40")[1]
    assert found["predictions"]["inputs"] == 40
    other = verify("clean.pt", "--num-samples", "40", "--seed", "5")[1]
    assert found["predictions"]["statistics"] != other["predictions"]["statistics"]
    assert verify("clean.pt", "--num-samples", "40")[1]["predictions"] == found["predictions"]
    assert verify("clean.pt", "--bench", "--batch-size", "4", "--num-samples", "40")[1]["speed"]["batch_size"] == 4


def test_size_and_scale_of_pictures(verify):
    plain = verify("clean.pt", "--image-size", "8")[1]["predictions"]["statistics"]
    for options in (("--image-size", "12"), ("--image-size", "8", "--mean", "0.5", "--std", "0.25")):
        assert verify("clean.pt", *options)[1]["predictions"]["statistics"] != plain


def test_shapes_of_inputs(verify, refusal, tmp_path):
    torch.manual_seed(0)
    torch.save({"fc.weight": torch.randn(3, 7) * 3, "fc.bias": torch.zeros(3)}, tmp_path / "two.pt")
    shapes = ("--input-shape", "left=4", "--input-shape", "right=3")
    found = verify(tmp_path / "two.pt", *shapes, model="nets_of_verify.py:Two")[1]
    assert found["predictions"]["classes"] == 3
    for size in ("a", "0", "4,0,8", "\u00b2"):
        said = refusal(tmp_path / "two.pt", "--input-shape", f"left={size}", model="nets_of_verify.py:Two")
        assert "write a shape as" in said


def test_the_task_and_the_range_that_is_expected(verify, tmp_path):
    torch.manual_seed(0)
    torch.save({"fc.weight": torch.randn(1, 4), "fc.bias": torch.tensor([100.0])}, tmp_path / "value.pt")
    np.savez(tmp_path / "rows.npz", x=np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32))
    given = (tmp_path / "value.pt", "--inputs", tmp_path / "rows.npz", "--task", "regression")
    model = "nets_of_verify.py:Value"
    status, found = verify(*given, "--expect-range", "80:120", model=model)
    assert (status, found["predictions"]["task"]) == (0, "regression")
    status, found = verify(*given, "--expect-range", "0:1", model=model)
    assert (status, failed(found)) == (1, {"output.diverse"})
    assert verify("clean.pt", "--task", "multilabel")[1]["predictions"]["task"] == "multilabel"
    status, found = verify("clean.pt", "--expect-range", "0:1")
    assert (status, found["error"].partition(":")[0]) == (2, "--expect-range")


def test_thresholds_are_options_and_are_named(verify):
    status, found = verify("clean.pt", "--threshold", "mutual_information=0.99", "--threshold", "least_inputs=20")
    assert found["thresholds"]["mutual_information"] == 0.99
    assert (status, status_of(found, "output.diverse")) == (2, "inconclusive")


def test_golden_answers_make_a_round_trip(verify, refusal, tmp_path):
    golden = tmp_path / "golden.safetensors"
    assert verify("clean.pt", "--inputs", "unlabelled.npz", "--num-samples", "40", "--save-golden", golden)[0] == 0
    status, found = verify(DIGITS, "--against", golden)
    assert (status, status_of(found, "agreement.outputs")) == (0, "pass")
    assert status_of(found, "agreement.tensors") == "pass"
    assert found["predictions"]["inputs"] == 40
    state = clean_state()
    state["blocks.1.conv2.weight"].neg_()
    torch.save(state, tmp_path / "flipped.pt")
    status, found = verify(tmp_path / "flipped.pt", "--against", golden)
    assert (status, failed(found)) == (1, {"agreement.outputs"})
    assert "exists already" in refusal("clean.pt", "--save-golden", golden)
    assert "--inputs" in refusal("clean.pt", "--against", golden, "--inputs", "digits.npz")


def test_the_tensors_of_another_file_are_compared_without_a_model(verify, tmp_path):
    state = clean_state()
    state["fc.weight"][0, 0] += 1
    torch.save(state, tmp_path / "changed.pt")
    assert verify("clean.pt", "--against", DIGITS, model=None)[0] == 0
    status, found = verify(tmp_path / "changed.pt", "--against", DIGITS, model=None)
    assert (status, failed(found)) == (1, {"agreement.tensors"})
    assert "fc.weight" in check(found, "agreement.tensors")["message"]


def test_speed_has_the_names_of_test_scripts(verify):
    speed = verify("clean.pt", "--bench")[1]["speed"]
    for name in ("avg", "std", "min", "max", "median"):
        assert speed[f"{name}_time_per_sample_ms"] >= 0
    assert speed["samples_tested"] > 0
    assert speed["throughput_samples_per_sec"] > 0
    assert speed["device"].startswith("cpu")
    assert verify("clean.pt")[1]["speed"] is None


def test_weights_and_subtrees_are_chosen(verify, tmp_path):
    broken = {
        name: torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor
        for name, tensor in clean_state().items()
    }
    torch.save({"state_dict": broken, "state_dict_ema": clean_state()}, tmp_path / "two.pt")
    assert verify(tmp_path / "two.pt", "--inputs", "unlabelled.npz")[0] == 1
    assert verify(tmp_path / "two.pt", "--inputs", "unlabelled.npz", "--weights", "ema")[0] == 0
    networks = {
        f"{part}.{name}": tensor
        for part, state in (("student", clean_state()), ("teacher", broken))
        for name, tensor in state.items()
    }
    torch.save(networks, tmp_path / "pair.pt")
    assert verify(tmp_path / "pair.pt", "--inputs", "unlabelled.npz", "--select", "student")[0] == 0


# --- several checkpoints ---


def test_several_checkpoints_stand_side_by_side(verify, run, tmp_path):
    state = clean_state()
    state["fc.weight"], state["fc.bias"] = state["fc.weight"].roll(1, 0), state["fc.bias"].roll(1, 0)
    torch.save(state, tmp_path / "rolled.pt")
    status, found = verify(
        "clean.pt", DIGITS, tmp_path / "rolled.pt", "--inputs", "unlabelled.npz", "--num-samples", "40"
    )
    assert status == 0
    assert [each["path"] for each in found["files"]] == found["side_by_side"]["paths"]
    assert [each["top_1_agreement"] for each in found["side_by_side"]["agreements"]] == [1, 1, 0]
    [first, *_] = found["side_by_side"]["rows"]
    classes = [each["class"] for each in first["predictions"]]
    assert classes[1:] == [classes[0], (classes[0] + 1) % 10]
    model = ("--model", "nets_of_verify.py:Digits", "--device", "cpu", "--inputs", "few.npz")
    plain = run("verify", "clean.pt", tmp_path / "rolled.pt", *model).out.splitlines()
    assert f"side-by-side\t\tclean.pt\t{tmp_path / 'rolled.pt'}" in plain
    assert sum(line.startswith("answer\t") for line in plain) == 8
    drawn = run("verify", "clean.pt", tmp_path / "rolled.pt", *model, "--color", "always").out
    assert "8 of 8 inputs are answered differently" in drawn


def test_answers_that_are_no_numbers_stand_side_by_side_too(verify, run, tmp_path):
    state = clean_state()
    state["fc.bias"].fill_(math.nan)
    torch.save(state, tmp_path / "nan.pt")
    given = ("clean.pt", tmp_path / "nan.pt", "--inputs", "few.npz")
    status, found = verify(*given)
    assert (status, found["side_by_side"]["agreements"][1]["top_1_agreement"]) == (2, None)
    model = ("--model", "nets_of_verify.py:Digits", "--device", "cpu", "--color", "always")
    drawn = run("verify", *given, *model).out
    assert "NaN" in drawn
    assert "nan%" not in drawn


def test_what_cannot_stand_side_by_side_is_left_out_with_its_reason(run, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    ran = run("verify", "clean.pt", tmp_path / "junk.pt", "--model", "nets_of_verify.py:Digits", "--json")
    found = strictly(ran.out)
    assert ran.status == 2
    assert [each["verdict"] for each in found["files"]] == ["pass", "error"]
    assert found["side_by_side"] is None
    assert found["files"][1]["error"] in ran.err


# --- bad input ---

REFUSED = {
    "no such module": (("clean.pt",), "absent_module:Net", "absent_module"),
    "no such class": (("clean.pt",), "nets_of_verify.py:Absent", "Absent"),
    "no such file": (("clean.pt",), "absent.py:Net", "absent.py"),
    "wrong argument": (("clean.pt", "--model-arg", "depth=3"), "nets_of_verify.py:Digits", "depth"),
    "argument left out": (("clean.pt",), "nets_of_verify.py:NeedsWidth", "width"),
    "forward raises": (("clean.pt", "--inputs", "digits.npz"), "nets_of_verify.py:Raising", "cannot run"),
    "undecodable picture": (("clean.pt", "--images", "broken"), "nets_of_verify.py:Digits", "cannot be decoded"),
    "no pictures": (("clean.pt", "--images", "empty"), "nets_of_verify.py:Digits", "holds no picture"),
    "absent inputs": (("clean.pt", "--inputs", "absent.npz"), "nets_of_verify.py:Digits", "absent.npz"),
    "labels too few": (
        ("clean.pt", "--inputs", "few.npz", "--targets", "targets.txt"), "nets_of_verify.py:Digits", "360"
    ),
    "labels of other classes": (
        ("clean.pt", "--inputs", "few.npz", "--targets", "eleven.txt"), "nets_of_verify.py:Digits", "11"
    ),
    "two sources of inputs": (
        ("clean.pt", "--inputs", "few.npz", "--images", "broken"), "nets_of_verify.py:Digits", "--inputs"
    ),
    "plot without labels": (
        ("clean.pt", "--inputs", "few.npz", "--plot", "new.svg"), "nets_of_verify.py:Digits", "labels"
    ),
    "plot of no kind": (("clean.pt", "--plot", "new.txt"), "nets_of_verify.py:Digits", "suffix"),
    "golden of several": (
        ("clean.pt", "clean.pt", "--save-golden", "g.safetensors"), "nets_of_verify.py:Digits", "one PATH"
    ),
    "no such device": (("clean.pt", "--device", "tpu"), "nets_of_verify.py:Digits", "tpu"),
    "no such task": (("clean.pt", "--task", "dreaming"), "nets_of_verify.py:Digits", "dreaming"),
    "no such threshold": (("clean.pt", "--threshold", "luck=1"), "nets_of_verify.py:Digits", "luck"),
    "threshold without number": (("clean.pt", "--threshold", "share=x"), "nets_of_verify.py:Digits", "share=x"),
    "range upside down": (("clean.pt", "--expect-range", "3:1"), "nets_of_verify.py:Digits", "3:1"),
    "mean of words": (("clean.pt", "--mean", "grey"), "nets_of_verify.py:Digits", "--mean"),
    "no such check": (("clean.pt", "--checks", "luck"), None, "luck"),
    "no check left": (("clean.pt", "--checks", "output"), None, "--model"),
    "inputs without a model": (("clean.pt", "--inputs", "digits.npz"), None, "--inputs"),
    "speed without a model": (("clean.pt", "--bench"), None, "--bench"),
    "accuracy without a model": (("clean.pt", "--min-accuracy", "0.9"), None, "--min-accuracy"),
    "absent original": (("clean.pt", "--against", "absent.pt"), None, "absent.pt"),
    "absent tokenizer": (("clean.pt", "--tokenizer", "absent"), None, "--tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_sentence(refusal, place, name):
    (place / "broken").mkdir(exist_ok=True)
    (place / "broken" / "a.png").write_bytes(b"\x89PNG no more")
    (place / "empty").mkdir(exist_ok=True)
    (place / "eleven.txt").write_text("\n".join(["11"] * 8))
    args, model, culprit = REFUSED[name]
    assert culprit in refusal(*args, model=model)


def test_a_refusal_is_a_document_too(verify):
    status, found = verify("clean.pt", model="nets_of_verify.py:Absent")
    assert (status, found["verdict"]) == (2, "error")
    assert "Absent" in found["error"]


def test_what_the_file_itself_told_stands_beside_the_refusal(verify, tmp_path):
    class Command:
        def __reduce__(self):
            import os

            return os.system, ("true",)

    torch.save({"state_dict": clean_state(), "callback": Command()}, tmp_path / "hostile.pt")
    status, found = verify(tmp_path / "hostile.pt", model="nets_of_verify.py:Raising")
    assert (status, found["verdict"]) == (2, "error")
    assert "cannot run" in found["error"]
    assert failed(found) == {"safety"}


# --- the report ---

FIELDS = {
    *("schema", "path", "verdict", "checks", "model", "device", "load", "predictions", "metrics", "speed"),
    *("suggestion", "notes", "error", "thresholds"),
}


@pytest.mark.parametrize("args", [(), ("--inputs", "digits.npz", "--bench", "--top", "3")])
def test_the_document_has_its_fields(verify, args):
    found = verify("clean.pt", *args, model="nets_of_verify.py:Digits" if args else None)[1]
    assert found.keys() == FIELDS
    of_check = {"id", "code", "status", "message", "evidence", "advice", "allowed"}
    assert all(each.keys() == of_check for each in found["checks"])


def test_numbers_that_json_cannot_say_are_said(verify, tmp_path):
    state = clean_state()
    state["fc.bias"].fill_(math.inf)
    torch.save(state, tmp_path / "inf.pt")
    status, found = verify(tmp_path / "inf.pt", "--inputs", "digits.npz", "--num-samples", "40")
    assert (status, "output.finite" in failed(found)) == (1, True)


def test_the_suggestion_is_what_the_file_recorded(run):
    ran = run("verify", DIGITS, "--json")
    assert "suggestion" in json.loads(ran.out)


@pytest.mark.parametrize("width", [80, 120])
def test_the_view_fits_the_terminal_and_says_the_worst_first(run, place, monkeypatch, width):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    given = (
        "--model",
        "nets_of_verify.py:Digits",
        "--inputs",
        "digits.npz",
        "--as-is",
        "--device",
        "cpu",
        "--num-samples",
        "64",
    )
    drawn = run("verify", WRONG_STRIP, *given, "--color", "always").out
    plain = [strip_colour(line) for line in drawn.splitlines()]
    assert max(map(len, plain)) <= width
    assert "FAIL" in plain[1]
    assert plain[3].startswith("FAIL  load.coverage")
    order = [line[:4].strip() for line in plain if line[:4].strip() in ("FAIL", "open", "warn", "ok", "skip")]
    assert order == sorted(order, key=["FAIL", "open", "warn", "ok", "skip"].index)


def strip_colour(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand")
def test_the_answers_of_the_gpu_are_those_of_the_cpu(run, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    given = ("verify", "clean.pt", "--model", "nets_of_verify.py:Digits", "--inputs", "digits.npz", "--json")
    golden = tmp_path / "golden.safetensors"
    assert run(*given, "--device", "cpu", "--save-golden", golden).status == 0
    found = strictly(
        run("verify", "clean.pt", "--model", "nets_of_verify.py:Digits", "--against", golden, "--json").out
    )
    assert found["device"].startswith("cuda:0")
    assert found["verdict"] == "pass"
