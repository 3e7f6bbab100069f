"""Metrics against scikit-learn, their gate, and the picture of what was confused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ckptool.errors import CkptoolError
from ckptool.model.verification import Thresholds
from ckptool.verification.metrics import check_accuracy, measure
from ckptool.verification.plots import confusion, draw_confusion, require_plot

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the oracle")


def answers(rows: int, classes: int, seed: int = 0, skill: float = 1.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    logits = torch.randn(rows, classes, generator=generator)
    logits[torch.arange(rows), labels] += skill
    return logits, labels


def oracle(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute everything with scikit-learn alone."""
    metrics, classes = sklearn_metrics, list(range(logits.shape[1]))
    true, scores = labels.numpy(), logits.double().softmax(1).numpy()
    chosen = scores.argmax(1)
    found = {
        "accuracy": metrics.accuracy_score(true, chosen),
        "balanced_accuracy": metrics.balanced_accuracy_score(true, chosen),
    }
    for average in ("macro", "weighted"):
        values = metrics.precision_recall_fscore_support(true, chosen, average=average, zero_division=0)
        found |= {
            f"{name}_{average}": value for name, value in zip(("precision", "recall", "f1"), values, strict=False)
        }
    for k in (1, 3, 5):
        if k < len(classes):
            found[f"top_{k}_accuracy"] = metrics.top_k_accuracy_score(true, scores, k=k, labels=classes)
    one_hot = torch.nn.functional.one_hot(labels, len(classes)).numpy()
    for average in ("micro", "macro"):
        found[f"roc_auc_{average}"] = metrics.roc_auc_score(one_hot, scores, average=average)
        found[f"average_precision_{average}"] = metrics.average_precision_score(one_hot, scores, average=average)
    return found


NAMES = (
    *("accuracy", "balanced_accuracy", "precision_macro", "recall_macro", "f1_macro"),
    *("precision_weighted", "recall_weighted", "f1_weighted"),
    *("top_1_accuracy", "top_3_accuracy", "top_5_accuracy"),
    *("roc_auc_micro", "roc_auc_macro", "average_precision_micro", "average_precision_macro"),
)


@pytest.mark.parametrize(("rows", "classes", "seed"), [(400, 10, 0), (90, 6, 1), (333, 23, 2)])
def test_metrics_are_those_of_scikit_learn(rows, classes, seed):
    logits, labels = answers(rows, classes, seed)
    found = measure(logits, labels, "classification")
    assert tuple(found) == NAMES
    assert found == pytest.approx(oracle(logits, labels), abs=1e-12)


def test_classes_that_no_label_has_do_not_count():
    """scikit-learn averages over the classes among labels and predictions; so is it here."""
    logits, labels = answers(200, 8)
    labels[labels >= 5] = 0
    logits[:, 7] = -50  # neither a label nor ever predicted
    found = measure(logits, labels, "classification")
    chosen, true = logits.argmax(1).numpy(), labels.numpy()
    for average in ("macro", "weighted"):
        values = sklearn_metrics.precision_recall_fscore_support(true, chosen, average=average, zero_division=0)
        expected = dict(zip(("precision", "recall", "f1"), values, strict=False))
        assert {name: found[f"{name}_{average}"] for name in expected} == pytest.approx(expected)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert found["balanced_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(true, chosen))
    one_hot, scores = labels[:, None] == torch.arange(5), logits.double().softmax(1)[:, :5]
    assert found["roc_auc_macro"] == pytest.approx(sklearn_metrics.roc_auc_score(one_hot.numpy(), scores.numpy()))


@pytest.mark.parametrize(("classes", "undefined"), [(2, {3, 5}), (3, {5}), (4, {5}), (5, set())])
def test_a_model_with_few_classes_has_no_top_5(classes, undefined):
    found = measure(*answers(60, classes), "classification")
    assert {k for k in (1, 3, 5) if found[f"top_{k}_accuracy"] is None} == undefined


def test_two_classes_have_the_area_of_the_second():
    logits, labels = answers(150, 2)
    score = (logits[:, 1] - logits[:, 0]).numpy()
    found = measure(logits, labels, "classification")
    assert found["roc_auc_macro"] == pytest.approx(sklearn_metrics.roc_auc_score(labels.numpy(), score))


@pytest.mark.parametrize("shape", [(150, 1), (150,)])
def test_a_single_logit_is_a_binary_classifier(shape):
    logits, labels = answers(150, 2)
    one = (logits[:, 1] - logits[:, 0]).reshape(shape)
    found = measure(one, labels, "classification")
    assert found == pytest.approx(measure(logits, labels, "classification"), abs=1e-6)


@pytest.mark.parametrize("labels", [torch.zeros(40), torch.zeros(40, 1, dtype=torch.int64)], ids=["one", "column"])
def test_a_single_class_among_the_labels_leaves_macro_areas_undefined(labels):
    found = measure(answers(40, 3)[0], labels, "classification")
    assert found["roc_auc_macro"] is None
    assert found["average_precision_macro"] is None
    assert found["accuracy"] is not None
    json.dumps(found, allow_nan=False)


def test_answers_that_are_not_finite_are_wrong():
    logits, labels = answers(50, 4, skill=50)
    assert measure(logits, labels, "classification")["accuracy"] == 1.0
    logits[:10] = torch.nan
    found = measure(logits, labels, "classification")
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["top_3_accuracy"] == pytest.approx(0.8)
    assert found["roc_auc_micro"] is None
    json.dumps(found, allow_nan=False)


def test_no_inputs_have_no_metrics():
    found = measure(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "classification")
    assert set(found.values()) == {None}


def test_several_labels_per_input():
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 2, (120, 4), generator=generator)
    logits = torch.randn(120, 4, generator=generator) + labels
    found = measure(logits, labels, "multilabel")
    true, chosen = labels.numpy(), (logits > 0).numpy()
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(true, chosen))
    for average in ("macro", "weighted"):
        assert found[f"f1_{average}"] == pytest.approx(sklearn_metrics.f1_score(true, chosen, average=average))
    for average in ("micro", "macro"):
        expected = sklearn_metrics.roc_auc_score(true, logits.numpy(), average=average)
        assert found[f"roc_auc_{average}"] == pytest.approx(expected)


def test_predicted_numbers_are_measured_as_numbers():
    targets = torch.arange(50.0)
    output = (targets + torch.randn(50, generator=torch.Generator().manual_seed(0))).unsqueeze(1)
    found = measure(output, targets, "regression")
    pair = targets.double().numpy(), output.squeeze(1).double().numpy()
    assert found["mean_absolute_error"] == pytest.approx(sklearn_metrics.mean_absolute_error(*pair))
    assert found["root_mean_squared_error"] == pytest.approx(sklearn_metrics.root_mean_squared_error(*pair))
    assert found["r2"] == pytest.approx(sklearn_metrics.r2_score(*pair), abs=1e-9)
    assert measure(output, torch.ones(50), "regression")["r2"] is None
    assert measure(output.fill_(torch.nan), targets, "regression")["mean_absolute_error"] is None


WRONG = {
    "another count": (torch.zeros(5, 3), torch.zeros(4), "classification", "4 labels for 5 inputs"),
    "too large": (torch.zeros(5, 3), torch.full((5,), 3), "classification", "from 3 to 3, the classes of the model"),
    "negative": (torch.zeros(5, 3), torch.full((5,), -1), "classification", "from -1 to -1"),
    "no class numbers": (torch.zeros(5, 3), torch.full((5,), 0.5), "classification", "no class numbers"),
    "segmentation": (torch.zeros(5, 3, 4, 4), torch.zeros(5), "segmentation", "one class per input"),
    "an embedding": (torch.zeros(5, 3), torch.zeros(5), "embedding", "one class per input"),
    "other columns": (torch.zeros(5, 3), torch.zeros(5, 4), "multilabel", "a column for each"),
    "no flags": (torch.zeros(5, 3), torch.full((5, 3), 2), "multilabel", "0 and 1"),
    "other targets": (torch.zeros(5, 3), torch.zeros(5, 2), "regression", "one target for each value"),
}


@pytest.mark.parametrize("name", WRONG)
def test_labels_that_do_not_fit_are_refused_in_one_sentence(name):
    output, labels, task, words = WRONG[name]
    with pytest.raises(CkptoolError, match=words):
        measure(output, labels, task)


def test_without_scikit_learn_the_rest_is_measured(monkeypatch):
    monkeypatch.setattr("ckptool.verification.metrics.find_spec", lambda name: None)
    logits, labels = answers(60, 4, skill=4)
    found = measure(logits, labels, "classification")
    assert {name for name, value in found.items() if value is None} == {
        "top_5_accuracy", "roc_auc_micro", "roc_auc_macro", "average_precision_micro", "average_precision_macro",
    }  # fmt: skip
    check = check_accuracy(found, labels, None, Thresholds())
    assert "scikit-learn" in check.advice


# --- the gate ---


def gate(skill: float, least: float | None, rows: int = 60, classes: int = 4):
    logits, labels = answers(rows, classes, skill=skill)
    return check_accuracy(measure(logits, labels, "classification"), labels, least, Thresholds())


@pytest.mark.parametrize(
    ("skill", "least", "rows", "status"),
    [
        (20.0, None, 60, "pass"),
        (20.0, 1.0, 60, "pass"),
        (1.0, 0.9, 60, "fail"),
        (1.0, None, 60, "pass"),
        (-20.0, None, 60, "inconclusive"),
        (-20.0, 0.0, 60, "warn"),
        (-20.0, None, 8, "pass"),  # too few to tell from chance
        (-20.0, 0.5, 8, "fail"),
    ],
)
def test_the_gate(skill, least, rows, status):
    check = gate(skill, least, rows)
    assert (check.id, check.status) == ("accuracy", status), check.message
    json.dumps(check.evidence, allow_nan=False)


def test_a_gate_without_labels_is_not_passed():
    assert check_accuracy(None, None, None, Thresholds()).status == "skip"
    check = check_accuracy(None, None, 0.9, Thresholds())
    assert check.status == "inconclusive"
    assert "--data" in check.advice
    numbers = measure(torch.zeros(5), torch.zeros(5), "regression")
    assert check_accuracy(numbers, torch.zeros(5), 0.9, Thresholds()).status == "inconclusive"


def test_a_sound_detector_of_a_rare_class_is_no_guess():
    labels = torch.tensor([0] * 90 + [1] * 10)
    logits = torch.nn.functional.one_hot(labels, 2).float()
    logits[99] = torch.tensor([1.0, 0.0])
    assert check_accuracy(measure(logits, labels, "classification"), labels, None, Thresholds()).status == "pass"
    always_no = torch.tensor([[1.0, 0.0]]).repeat(100, 1)
    found = check_accuracy(measure(always_no, labels, "classification"), labels, None, Thresholds())
    assert found.status == "inconclusive"


# --- the picture ---


def test_confusion_counts_as_scikit_learn_does():
    logits, labels = answers(200, 6)
    expected = sklearn_metrics.confusion_matrix(labels.numpy(), logits.argmax(1).numpy(), labels=range(6))
    assert confusion(logits, labels).tolist() == expected.tolist()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_picture_is_the_same_every_time(suffix, tmp_path):
    pytest.importorskip("matplotlib", reason="the picture is drawn by matplotlib")
    names = ["cat", "a $name$ with mathematics", "\u732b", "\x1b[31mred"]
    for name in ("a", "b"):
        draw_confusion(tmp_path / f"{name}{suffix}", confusion(*answers(80, 4)), "80 inputs", names)
    first = (tmp_path / f"a{suffix}").read_bytes()
    assert first == (tmp_path / f"b{suffix}").read_bytes()
    assert first.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])


@pytest.mark.parametrize("classes", [1, 30, 200])
def test_any_number_of_classes_is_drawn(classes, tmp_path):
    pytest.importorskip("matplotlib", reason="the picture is drawn by matplotlib")
    draw_confusion(tmp_path / "c.png", torch.eye(classes, dtype=torch.int64), "all right", ["one name"])
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_a_picture_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "there.png").write_bytes(b"kept")
    refused = {tmp_path / "there.png": "exists already", tmp_path / "plot.jpg": "names no picture"}
    for path, words in refused.items():
        with pytest.raises(CkptoolError, match=words):
            require_plot(path)
    assert (tmp_path / "there.png").read_bytes() == b"kept"
    monkeypatch.setattr("ckptool.writers.pictures.find_spec", lambda name: None)
    with pytest.raises(CkptoolError, match="pip install matplotlib"):
        require_plot(tmp_path / "new.png")


def test_heavy_libraries_wait_until_they_are_needed():
    code = "import sys, ckptool.verification.metrics, ckptool.verification.plots; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"sklearn", "matplotlib"}.isdisjoint(loaded)
