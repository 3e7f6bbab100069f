"""The verify command with models and inputs as people have them: whatever they answer, it ends in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.strict_json import strictly
from torch import nn

MODULE = """
import dataclasses
import sys

import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(x)


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    cache: object = None


def answering(make):
    class Odd(Plain):
        def forward(self, x):
            return make(self.fc(x))

    return Odd


class Ending(Plain):
    def forward(self, x):
        sys.exit(0)


class Printing(Plain):
    def forward(self, x):
        print("a line of its own")
        return self.fc(x)


class Refusing(Plain):
    def train(self, mode=True):
        raise RuntimeError("it has one mode")


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, one, other):
        return self.head((self.body(one.flatten(1)) - self.body(other.flatten(1))).abs())


class Lookup(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.table = nn.Embedding(64, width)
        self.head = nn.Linear(width, 64)

    def forward(self, input_ids):
        return self.head(self.table(input_ids))


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Linear(6, 256)
        self.more = nn.Linear(256, 64)
        self.fc = nn.Linear(64, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.more(torch.relu(self.features(x)))))


class Places(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x)


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x):
        return self.fc(x.mean(dim=(2, 3)))


bare = answering(lambda logits: logits)
dictionary = answering(lambda logits: {"loss": logits.sum(), "logits": logits})
pair = answering(lambda logits: (logits, None))
dataclass = answering(lambda logits: Answer(logits))
sparse = answering(lambda logits: logits.to_sparse())
half = answering(lambda logits: logits.half())
classes = answering(lambda logits: logits.argmax(dim=1))
nothing = answering(lambda logits: None)
words = answering(lambda logits: "five")
empty = answering(lambda logits: logits[:, :0])
one_number = answering(lambda logits: logits.mean())
imaginary = answering(lambda logits: logits * 1j)
nested = answering(lambda logits: ((logits,),))
softmax = answering(lambda logits: logits.softmax(dim=1))
sigmoids = answering(lambda logits: logits.sigmoid())
shaken = answering(lambda logits: logits + torch.randn_like(logits))
one_logit = answering(lambda logits: logits[:, 0])
one_sigmoid = answering(lambda logits: logits[:, 0].sigmoid())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the models, weights that tell the rows of ``rows.npz`` apart, and these."""
    place = tmp_path_factory.mktemp("odd")
    (place / "odd_models.py").write_text(MODULE)
    generator = torch.Generator().manual_seed(0)
    weights = {"fc.weight": torch.randn(5, 6, generator=generator), "fc.bias": torch.randn(5, generator=generator) / 9}
    torch.save(weights, place / "weights.pt")
    np.savez(place / "rows.npz", x=torch.randn(40, 6, generator=generator).numpy() * 2)
    return place


@pytest.fixture
def verify(run, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Run ``verify --json`` in the folder; give status and document."""
    monkeypatch.chdir(folder)

    def verify_path(*args: object) -> tuple[int, dict[str, Any]]:
        ran = run("verify", *args, "--device", "cpu", "--json")
        assert "Traceback" not in ran.err
        return ran.status, strictly(ran.out)

    return verify_path


def check(document: dict[str, Any], check_id: str) -> dict[str, Any]:
    return next(each for each in document["checks"] if each["id"] == check_id)


# --- what a forward may give ---


@pytest.mark.parametrize("name", ["bare", "dictionary", "pair", "dataclass", "sparse", "half", "classes"])
def test_answers_of_every_form_are_judged(verify, name):
    status, found = verify("weights.pt", "--model", f"odd_models.py:{name}", "--inputs", "rows.npz")
    assert (status, found["verdict"]) == (0, "pass")
    assert (found["predictions"]["task"], found["predictions"]["classes"]) == ("classification", 5)
    assert len(found["predictions"]["histogram"]) >= 4


LABELS = {
    "classes": lambda logits: logits.argmax(dim=1),
    "one": lambda logits: (logits[:, 0] > 0).long(),
    "marks": lambda logits: (logits > 0).long(),
    "numbers": lambda logits: logits,
}
# What a network that decides for itself leaves undefined.
UNRANKED = ("top_3", "top_5", "roc_auc", "average_precision")


@pytest.mark.parametrize(
    ("name", "plain", "labels"),
    [
        ("softmax", "bare", "classes"),
        ("classes", "bare", "classes"),
        ("one_sigmoid", "one_logit", "one"),
        ("sigmoids", "bare", "marks"),
    ],
)
def test_probabilities_and_classes_are_measured_as_the_logits_behind_them(
    verify, folder, tmp_path, name, plain, labels
):
    weights, rows = torch.load(folder / "weights.pt", weights_only=True), np.load(folder / "rows.npz")["x"]
    right = LABELS[labels](torch.from_numpy(rows) @ weights["fc.weight"].T + weights["fc.bias"])
    right[:6] = right[6:12]
    np.savez(tmp_path / "labelled.npz", x=rows, labels=right.numpy())
    inputs = ("--inputs", tmp_path / "labelled.npz")
    _, expected = verify("weights.pt", "--model", f"odd_models.py:{plain}", *inputs)
    status, found = verify("weights.pt", "--model", f"odd_models.py:{name}", *inputs)
    unranked = UNRANKED if name == "classes" else ()
    measured = {key: None if key.startswith(unranked) else value for key, value in expected["metrics"].items()}
    assert (status, found["metrics"]) == (0, pytest.approx(measured, abs=1e-6))
    assert found["metrics"]["accuracy"] > 0.8


def labelled(folder: Path, path: Path, labels: str) -> torch.Tensor:
    """Write the rows with labels as the sound weights answer them, and give their logits."""
    weights, rows = torch.load(folder / "weights.pt", weights_only=True), np.load(folder / "rows.npz")["x"]
    logits = torch.from_numpy(rows) @ weights["fc.weight"].T + weights["fc.bias"]
    np.savez(path, x=rows, labels=LABELS[labels](logits).numpy())
    return logits


# Damage that leaves answers which move with the input: labels that every answer misses show it.
MISSED = {
    "yes for no": ("marks", lambda state: {key: -tensor for key, tensor in state.items()}),
    "yes to everything": ("marks", lambda state: {**state, "fc.bias": state["fc.bias"] + 90}),
    "numbers upside down": ("numbers", lambda state: {key: -tensor for key, tensor in state.items()}),
    "numbers of another scale": ("numbers", lambda state: {key: 30 * tensor for key, tensor in state.items()}),
}


@pytest.mark.parametrize("name", MISSED)
def test_labels_of_several_and_targets_that_the_answers_miss_are_no_pass(verify, folder, tmp_path, name):
    labels, damage = MISSED[name]
    labelled(folder, tmp_path / "own.npz", labels)
    torch.save(damage(torch.load(folder / "weights.pt", weights_only=True)), tmp_path / "damaged.pt")
    asked = ("--model", "odd_models.py:bare", "--inputs", tmp_path / "own.npz")
    sound, _ = verify("weights.pt", *asked)
    status, found = verify(tmp_path / "damaged.pt", *asked)
    assert (sound, status, check(found, "accuracy")["status"]) == (0, 2, "inconclusive")


def test_labels_do_not_excuse_answers_whose_differences_were_damped(verify, folder, tmp_path):
    labelled(folder, tmp_path / "own.npz", "classes")
    state = torch.load(folder / "weights.pt", weights_only=True)
    for name, favour, expected in (("muted", 0.2, 1), ("only quiet", 0.0, 0)):
        bias = favour * torch.nn.functional.one_hot(torch.tensor(3), 5)
        torch.save({"fc.weight": state["fc.weight"] / 300, "fc.bias": bias}, tmp_path / f"{name}.pt")
        status, found = verify(
            tmp_path / f"{name}.pt", "--model", "odd_models.py:bare", "--inputs", tmp_path / "own.npz"
        )
        assert status == expected, check(found, "output.diverse")


def test_an_offset_that_no_bias_explains_is_not_put_down_to_one(verify, folder, tmp_path):
    state = torch.load(folder / "weights.pt", weights_only=True)
    spiked = {**state, "fc.bias": state["fc.bias"] + 90 * torch.nn.functional.one_hot(torch.tensor(2), 5)}
    torch.save(spiked, tmp_path / "spiked.pt")
    np.savez(tmp_path / "far.npz", x=np.load(folder / "rows.npz")["x"] + 90, labels=np.arange(40) % 5)
    for path, inputs, said in (
        (tmp_path / "spiked.pt", "rows.npz", "(fc.bias is 89.9 for class 2"),
        ("weights.pt", tmp_path / "far.npz", "that no bias of the last layer explains; likely causes are"),
    ):
        status, found = verify(path, "--model", "odd_models.py:bare", "--inputs", inputs)
        assert (status, check(found, "output.diverse")["status"]) == (1, "fail")
        assert said in check(found, "output.diverse")["message"]


def test_a_matrix_of_what_has_no_single_class_is_refused(verify, folder, tmp_path):
    for labels in ("marks", "numbers"):
        labelled(folder, tmp_path / f"{labels}.npz", labels)
        picture = ("--plot", tmp_path / "matrix.png")
        status, found = verify(
            "weights.pt", "--model", "odd_models.py:bare", "--inputs", tmp_path / f"{labels}.npz", *picture
        )
        assert status == 2
        assert "one class for each input" in found["error"]
        assert found["metrics"]


def test_whole_numbers_are_targets_of_a_model_that_answers_one_number(verify, folder, tmp_path):
    logits = labelled(folder, tmp_path / "own.npz", "one")[:, 0] * 9
    np.savez(tmp_path / "own.npz", x=np.load(folder / "rows.npz")["x"], labels=logits.round().long().numpy())
    status, found = verify("weights.pt", "--model", "odd_models.py:one_logit", "--inputs", tmp_path / "own.npz")
    assert (status, found["predictions"]["task"]) == (0, "regression")
    assert "r2" in found["metrics"]


def test_a_model_that_compares_two_pictures_is_not_given_the_same_one_twice(verify, tmp_path):
    torch.manual_seed(0)
    state = {"body.weight": torch.randn(8, 64), "body.bias": torch.randn(8), "head.weight": torch.randn(1, 8)}
    torch.save({**state, "head.bias": torch.zeros(1)}, tmp_path / "pairs.pt")
    shapes = ("--input-shape", "one=1,8,8", "--input-shape", "other=1,8,8")
    status, found = verify(tmp_path / "pairs.pt", "--model", "odd_models.py:Apart", *shapes)
    assert check(found, "output.constant")["status"] == "pass"
    assert status == 0


def test_probabilities_stand_side_by_side_as_they_are(verify, folder, tmp_path):
    weights, rows = torch.load(folder / "weights.pt", weights_only=True), np.load(folder / "rows.npz")["x"]
    torch.save({key: tensor.flip(0) for key, tensor in weights.items()}, tmp_path / "other.pt")
    asked = ("--model", "odd_models.py:one_sigmoid", "--task", "classification", "--inputs", "rows.npz")
    _, found = verify("weights.pt", tmp_path / "other.pt", *asked)
    first = (torch.from_numpy(rows) @ weights["fc.weight"].T + weights["fc.bias"])[:, 0].sigmoid()
    shown = [row["predictions"][0] for row in found["side_by_side"]["rows"]]
    assert [each["class"] for each in shown] == (first > 0.5).long().tolist()


@pytest.mark.parametrize("name", ["nothing", "words", "empty", "one_number", "imaginary", "nested"])
def test_what_is_no_answer_is_refused(verify, name):
    status, found = verify("weights.pt", "--model", f"odd_models.py:{name}", "--inputs", "rows.npz")
    assert (status, found["verdict"], found["predictions"]) == (2, "error", None)
    assert "nothing in its answer is a tensor with a row for each input" in found["error"]


def test_a_forward_that_ends_the_program_is_no_pass(verify):
    status, found = verify("weights.pt", "--model", "odd_models.py:Ending", "--inputs", "rows.npz")
    assert (status, found["verdict"]) == (2, "error")
    assert "SystemExit" in found["error"]


def test_what_a_model_prints_is_not_the_answer(run, folder, monkeypatch):
    monkeypatch.chdir(folder)
    ran = run("verify", "weights.pt", "--model", "odd_models.py:Printing", "--inputs", "rows.npz", "--json")
    assert (ran.status, strictly(ran.out)["verdict"]) == (0, "pass")
    assert "a line of its own" in ran.err


def test_a_model_that_cannot_be_evaluated_is_refused(verify):
    status, found = verify("weights.pt", "--model", "odd_models.py:Refusing", "--inputs", "rows.npz")
    assert (status, found["verdict"]) == (2, "error")
    assert "it has one mode" in found["error"]


# --- programs ---


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(6, 5))
    path = folder / "program.pt"
    torch.jit.trace(model.eval(), torch.rand(2, 6)).save(path)
    return path


def test_weights_are_loaded_into_a_program_that_is_named_as_their_model(verify, program, tmp_path):
    spiked = torch.load("weights.pt", weights_only=True)
    spiked["fc.bias"][3] = 80
    torch.save(spiked, tmp_path / "spiked.pt")
    trusted = ("--model", program, "--trust-code", "--inputs", "rows.npz")
    status, found = verify("weights.pt", *trusted)
    assert (status, check(found, "load.coverage")["status"]) == (0, "pass")
    status, found = verify(tmp_path / "spiked.pt", *trusted)
    assert (status, check(found, "output.diverse")["status"]) == (1, "fail")
    assert verify("weights.pt", *trusted, "--against", tmp_path / "spiked.pt")[0] == 1


def test_a_program_is_compared_with_golden_answers_and_with_weights(verify, program, tmp_path):
    golden = tmp_path / "golden.safetensors"
    trusted = ("--trust-code", "--inputs", "rows.npz")
    assert verify(program, *trusted, "--save-golden", golden)[0] == 0
    status, found = verify(program, "--trust-code", "--against", golden)
    assert (status, check(found, "agreement.outputs")["status"]) == (0, "pass")
    status, found = verify(program, *trusted, "--against", "weights.pt")
    assert (status, check(found, "agreement.outputs")["status"]) == (1, "fail")


# --- golden files ---


def test_what_a_forward_draws_is_no_difference_to_the_original(verify, folder, tmp_path):
    asked = ("--model", "odd_models.py:shaken")
    status, found = verify("weights.pt", *asked, "--inputs", "rows.npz", "--against", "weights.pt")
    assert (status, check(found, "output.determinism")["status"]) == (0, "warn")
    golden = tmp_path / "golden.safetensors"
    verify("weights.pt", *asked, "--inputs", "rows.npz", "--save-golden", golden)
    assert verify("weights.pt", *asked, "--against", golden)[0] == 0
    torch.save({"fc.weight": torch.randn(5, 6), "fc.bias": torch.zeros(5)}, tmp_path / "other.pt")
    assert verify(tmp_path / "other.pt", *asked, "--inputs", "rows.npz", "--against", "weights.pt")[0] == 1


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x, *, scale):
        return self.fc(x) * scale[:, None]


@pytest.mark.parametrize("traced", [2, 4])
def test_an_exported_program_takes_named_arrays_and_its_own_batch_only(verify, tmp_path, traced):
    rows = torch.randn(40, 6)
    by_place, by_name = nn.Linear(6, 5), Pair()
    for name, model, keywords in (("place", by_place, {}), ("name", by_name, {"scale": torch.ones(traced)})):
        program = torch.export.export(model, (rows[:traced],), keywords)
        torch.export.save(program, tmp_path / f"{name}.pt2")
    np.savez(tmp_path / "place.npz", input=rows.numpy())
    np.savez(tmp_path / "name.npz", x=rows.numpy(), scale=np.linspace(1, 2, 40))
    for name, model in (("place", by_place(rows)), ("name", by_name(rows, scale=torch.linspace(1, 2, 40)))):
        inputs = ("--inputs", tmp_path / f"{name}.npz", "--skip-checks", "values", "--num-samples", "40")
        status, found = verify(tmp_path / f"{name}.pt2", "--trust-code", *inputs)
        assert (status, found["error"]) == (0, None)
        assert f"the model takes batches of {traced} inputs only" in found["notes"]
        counted = model.argmax(dim=1).bincount(minlength=5).tolist()
        assert [found["predictions"]["histogram"].get(str(each), 0) for each in range(5)] == counted


def test_a_golden_file_that_is_damaged_convicts_nobody(verify, tmp_path):
    model = ("--model", "odd_models.py:Plain")
    golden = tmp_path / "golden.safetensors"
    assert verify("weights.pt", *model, "--inputs", "rows.npz", "--save-golden", golden)[0] == 0
    content = bytearray(golden.read_bytes())
    content[-2] ^= 0x40
    golden.write_bytes(content)
    status, found = verify("weights.pt", *model, "--against", golden)
    assert (status, found["verdict"]) == (2, "error")
    assert "is not what was recorded" in found["error"]


def test_without_a_model_another_digest_than_the_golden_one_is_left_open(verify, tmp_path):
    golden = tmp_path / "golden.safetensors"
    model = ("--model", "odd_models.py:Plain", "--inputs", "rows.npz")
    assert verify("weights.pt", *model, "--save-golden", golden)[0] == 0
    assert verify("weights.pt", "--against", golden)[0] == 0
    changed = torch.load("weights.pt", weights_only=True)
    changed["fc.bias"][0] += 1e-3
    torch.save(changed, tmp_path / "changed.pt")
    status, found = verify(tmp_path / "changed.pt", "--against", golden)
    assert (status, check(found, "agreement.tensors")["status"]) == (2, "inconclusive")
    assert "--model" in check(found, "agreement.tensors")["advice"]


# --- damage ---


@pytest.fixture
def flipped(folder: Path, tmp_path: Path) -> Path:
    """Flip a bit in a stored tensor of a copy."""
    content = bytearray((folder / "weights.pt").read_bytes())
    begin = content.index(torch.load(folder / "weights.pt", weights_only=True)["fc.weight"].numpy().tobytes())
    content[begin + 7] ^= 0x10
    (tmp_path / "flipped.pt").write_bytes(content)
    return tmp_path / "flipped.pt"


def test_bytes_that_belie_their_checksum_are_never_run(verify, flipped):
    status, found = verify(flipped, "--model", "odd_models.py:Plain", "--inputs", "rows.npz")
    assert (status, found["verdict"], found["predictions"]) == (1, "fail", None)
    assert check(found, "integrity")["status"] == "fail"
    assert {each["id"].partition(".")[0] for each in found["checks"]}.isdisjoint({"load", "output"})


def test_an_original_that_belies_its_checksum_is_no_reference(verify, flipped):
    status, found = verify("weights.pt", "--model", "odd_models.py:Plain", "--inputs", "rows.npz", "--against", flipped)
    assert (status, found["verdict"]) == (2, "error")
    assert "checksum" in found["error"]


def test_a_file_without_a_single_value_is_not_sound(verify, tmp_path):
    torch.save({"fc.weight": torch.zeros(0, 6)}, tmp_path / "hollow.pt")
    status, found = verify(tmp_path / "hollow.pt")
    assert (status, found["verdict"]) == (2, "inconclusive")


# --- inputs ---


def test_inputs_that_are_no_numbers_convict_nobody(verify, folder, tmp_path):
    rows = np.load(folder / "rows.npz")["x"]
    rows[::3] = np.nan
    np.savez(tmp_path / "gaps.npz", x=rows)
    status, found = verify("weights.pt", "--model", "odd_models.py:Plain", "--inputs", tmp_path / "gaps.npz")
    assert (status, check(found, "output.finite")["status"]) == (2, "inconclusive")
    assert "14 of 40 inputs hold NaN" in check(found, "output.finite")["message"]


@pytest.mark.parametrize("kind", [np.int64, np.float32])
def test_labels_may_be_marks_in_columns(verify, folder, tmp_path, kind):
    rows = np.load(folder / "rows.npz")["x"]
    weights = torch.load("weights.pt", weights_only=True)
    right = (torch.tensor(rows) @ weights["fc.weight"].T + weights["fc.bias"]).argmax(dim=1)
    np.savez(tmp_path / "marked.npz", x=rows, labels=np.eye(5)[right.numpy()].astype(kind))
    asked = ("weights.pt", "--model", "odd_models.py:Plain", "--inputs", tmp_path / "marked.npz")
    status, found = verify(*asked)
    assert (status, found["predictions"]["task"], found["metrics"]["accuracy"]) == (0, "classification", 1.0)
    status, found = verify(*asked, "--task", "multilabel")
    assert found["predictions"]["task"] == "multilabel"
    assert found["metrics"]["recall_macro"] is not None


def test_bytes_of_pictures_in_a_wider_type_are_pictures(verify, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 4))
    torch.save({"fc.weight": torch.randn(5, 3) * 9, "fc.bias": torch.zeros(5)}, tmp_path / "pixels.pt")
    statistics = []
    for kind in (np.uint8, np.int32, np.int64):
        np.savez(tmp_path / "pixels.npz", x=images.astype(kind))
        asked = ("--model", "odd_models.py:Pixels", "--inputs", tmp_path / "pixels.npz")
        statistics.append(verify(tmp_path / "pixels.pt", *asked)[1]["predictions"]["statistics"])
    assert statistics[0] == statistics[1] == statistics[2]


def test_pictures_of_an_assumed_scale_convict_only_what_the_weights_show(verify, tmp_path):
    images = np.random.default_rng(0).integers(80, 124, (40, 3, 4, 4)).astype(np.uint8)
    np.savez(tmp_path / "pixels.npz", x=images, labels=np.arange(40) % 5)
    asked = ("--model", "odd_models.py:Pixels", "--inputs", tmp_path / "pixels.npz")
    weights = {"fc.weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), "fc.bias": torch.zeros(5)}
    stated = ("--mean", "0", "--std", "1")
    for bias, scale, expected in ((0, (), "inconclusive"), (0, stated, "fail"), (60, (), "fail")):
        weights["fc.bias"][2] = bias
        torch.save(weights, tmp_path / "pixels.pt")
        found = check(verify(tmp_path / "pixels.pt", *asked, *scale)[1], "output.diverse")
        assert (found["status"], "--mean" in found["advice"]) == (expected, True)


@pytest.fixture
def random_features(folder, tmp_path) -> Path:
    """Fit the head of random features to the classes that ``weights.pt`` gives."""
    from sklearn.linear_model import LogisticRegression

    rows, weights = np.load(folder / "rows.npz")["x"], torch.load(folder / "weights.pt", weights_only=True)
    right = (torch.tensor(rows) @ weights["fc.weight"].T + weights["fc.bias"]).argmax(dim=1).numpy()
    torch.manual_seed(0)
    one, two = nn.Linear(6, 256), nn.Linear(256, 64)
    with torch.no_grad():
        features = two(one(torch.tensor(rows)).relu()).relu().numpy()
    head = LogisticRegression(C=100, max_iter=1000).fit(features, right)
    kept = {f"features.{name}": tensor for name, tensor in one.state_dict().items()}
    kept |= {f"more.{name}": tensor for name, tensor in two.state_dict().items()}
    kept |= {"fc.weight": torch.tensor(head.coef_).float(), "fc.bias": torch.tensor(head.intercept_).float()}
    torch.save(kept, tmp_path / "frozen.pt")
    np.savez(tmp_path / "labelled.npz", x=rows, labels=right)
    return tmp_path


def test_random_layers_are_settled_by_an_accuracy_that_is_asked_for(verify, random_features):
    pytest.importorskip("sklearn", reason="the head is fitted with scikit-learn")
    asked = (random_features / "frozen.pt", "--model", "odd_models.py:Frozen")
    labelled = (*asked, "--inputs", random_features / "labelled.npz")
    for options, status, expected in (
        ((*asked, "--inputs", "rows.npz"), 1, "fail"),
        (labelled, 2, "inconclusive"),
        ((*labelled, "--min-accuracy", "0.8"), 0, "warn"),
    ):
        found = verify(*options)
        assert (found[0], check(found[1], "values.untrained")["status"]) == (status, expected), options
    assert verify(*asked, "--inputs", "rows.npz", "--skip-checks", "values.untrained")[0] == 0


def test_a_share_of_fresh_weights_speaks_against_a_model_that_tells_nothing_apart(verify, random_features):
    weights = torch.load(random_features / "frozen.pt", weights_only=True)
    weights["fc.weight"] *= 1e-3
    torch.save(weights, random_features / "frozen.pt")
    asked = (random_features / "frozen.pt", "--model", "odd_models.py:Frozen", "--inputs", "rows.npz")
    found = check(verify(*asked)[1], "output.diverse")
    assert (found["status"], "look never trained" in found["message"]) == ("fail", True)


def test_labels_that_a_task_has_no_accuracy_for_are_left_out(verify, tmp_path):
    images = np.random.default_rng(0).random((40, 3, 4, 4)).astype(np.float32)
    np.savez(tmp_path / "places.npz", x=images, labels=np.zeros((40, 4, 4), np.int64))
    weight = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 9
    torch.save({"conv.weight": weight, "conv.bias": torch.zeros(4)}, tmp_path / "places.pt")
    asked = ("--model", "odd_models.py:Places", "--inputs", tmp_path / "places.npz")
    status, found = verify(tmp_path / "places.pt", *asked)
    assert (status, found["predictions"]["task"], found["metrics"]) == (0, "segmentation", None)
    assert check(found, "accuracy")["status"] == "skip"
    assert verify(tmp_path / "places.pt", *asked, "--min-accuracy", "0.5")[0] == 2


def test_an_embedding_that_is_the_head_too_may_keep_the_rows_of_tokens_that_never_occur(verify, tmp_path):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(64, 64, generator=generator)
    body = torch.randn(640, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    body = body + 3 * torch.outer(torch.randn(640, generator=generator), torch.randn(64, generator=generator))
    state = {"tok.weight": table, "body.weight": body / 9, "head.weight": table}
    torch.save(state, tmp_path / "tied.pt")
    assert verify(tmp_path / "tied.pt")[0] == 0
    state["head.weight"] = torch.randn(64, 64, generator=generator) / 8
    torch.save(state, tmp_path / "lost.pt")
    assert check(verify(tmp_path / "lost.pt")[1], "values.untrained")["status"] == "fail"


TABLES = {
    "headings of other words": ("Datei,Klasse", range(40), 0, "names its columns"),
    "headings and no rows": ("image,label", [], 2, "headings and no rows"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_labels(verify, tmp_path, name):
    pictures = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    heading, numbers, expected, said = TABLES[name]
    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    colours = generator.integers(0, 256, (40, 1, 1, 3)).astype(np.uint8)
    for number in range(40):
        pictures.fromarray(np.tile(colours[number], (4, 4, 1))).save(tmp_path / "pictures" / f"{number}.png")
    torch.save({"fc.weight": torch.randn(5, 3) * 9, "fc.bias": torch.zeros(5)}, tmp_path / "pixels.pt")
    rows = "".join(f"{number}.png,{number % 5}\n" for number in numbers)
    (tmp_path / "pictures" / "labels.csv").write_text(f"{heading}\n{rows}")
    asked = ("--model", "odd_models.py:Pixels", "--data", tmp_path / "pictures", "--skip-checks", "accuracy")
    status, found = verify(tmp_path / "pixels.pt", *asked, "--skip-checks", "output.diverse")
    assert status == expected
    assert said in json.dumps([found["notes"], found["error"]])


# --- text ---


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Path:
    """Give the folder of a tokenizer that knows 64 words and letters."""
    library = pytest.importorskip("tokenizers", reason="a tokenizer is made with tokenizers")
    from ckptool.verification.texts import TEXT

    model = library.Tokenizer(library.models.BPE(unk_token="[UNK]"))
    model.pre_tokenizer = library.pre_tokenizers.Whitespace()
    trainer = library.trainers.BpeTrainer(vocab_size=64, special_tokens=["[UNK]"], show_progress=False)
    model.train_from_iterator([TEXT], trainer)
    place = folder / "tokenizer"
    place.mkdir()
    model.save(str(place / "tokenizer.json"))
    return place


def bigrams(tokenizer: Path) -> dict[str, torch.Tensor]:
    """Give the weights of a model that knows how often one token follows another in the built-in text."""
    from ckptool.verification.texts import TEXT, encode

    ids = torch.tensor(encode(tokenizer, TEXT))
    counts = torch.full((64, 64), 0.05).index_put((ids[:-1], ids[1:]), torch.tensor(1.0), accumulate=True)
    logits = (counts / counts.sum(dim=1, keepdim=True)).log()
    return {"table.weight": torch.eye(64) * 3, "head.weight": logits.T / 3, "head.bias": torch.zeros(64)}


def test_a_language_model_is_judged_by_text_where_there_is_a_tokenizer(verify, tokenizer, tmp_path):
    torch.save(bigrams(tokenizer), tmp_path / "bigrams.pt")
    asked = ("--model", "odd_models.py:Lookup", "--model-arg", "width=64", "--tokenizer", tokenizer)
    status, found = verify(tmp_path / "bigrams.pt", *asked)
    assert (status, found["predictions"]["kind"]) == (0, "sample text")
    assert (
        found["predictions"]["statistics"]["cross_entropy"] < 0.7 * found["predictions"]["statistics"]["guess_entropy"]
    )
    shuffled = bigrams(tokenizer)
    shuffled["head.weight"] = shuffled["head.weight"][torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    torch.save(shuffled, tmp_path / "shuffled.pt")
    status, found = verify(tmp_path / "shuffled.pt", *asked)
    assert (status, check(found, "output.diverse")["status"]) == (1, "fail")
    assert verify(tmp_path / "shuffled.pt", *asked[:-2])[0] == 0  # random tokens cannot tell


def test_a_tokenizer_of_another_model_is_refused(verify, tokenizer, tmp_path):
    torch.save({"table.weight": torch.randn(9, 4), "head.weight": torch.randn(9, 4)}, tmp_path / "small.pt")
    (tmp_path / "small_model.py").write_text(
        "from torch import nn\n\n\nclass Small(nn.Sequential):\n    def __init__(self):\n        super().__init__()\n"
        "        self.table = nn.Embedding(9, 4)\n        self.head = nn.Linear(4, 9, bias=False)\n"
    )
    status, found = verify(
        tmp_path / "small.pt", "--model", tmp_path / "small_model.py:Small", "--tokenizer", tokenizer
    )
    assert (status, found["verdict"]) == (2, "error")
    assert "the model knows 9; give its own tokenizer" in found["error"]
