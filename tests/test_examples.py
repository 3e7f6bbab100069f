"""The shipped checkpoint is what Lightning writes, and the failure that the README tells of is real."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.digits import EXAMPLES, training_script

ROOT = Path(__file__).parents[1]
ACCURACY = 358 / 360


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return training_script()


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Any]:
    return torch.load(EXAMPLES / "digits.ckpt", weights_only=True)


def test_it_is_what_lightning_writes_for_a_compiled_model(checkpoint):
    assert {
        "state_dict",
        "loops",
        "callbacks",
        "optimizer_states",
        "lr_schedulers",
        "hyper_parameters",
        "pytorch-lightning_version",
    } <= checkpoint.keys()
    assert all(key.startswith("model._orig_mod.") for key in checkpoint["state_dict"])
    assert checkpoint["hyper_parameters"]["compile_model"] is True
    assert checkpoint["optimizer_states"][0]["state"]
    assert checkpoint["loops"]["fit_loop"]["epoch_progress"]["total"]["completed"] == checkpoint["epoch"]


def test_it_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in EXAMPLES.glob("digits*")) < 500_000


def test_lightning_itself_reads_it(script):
    model = script.DigitsClassifier.load_from_checkpoint(EXAMPLES / "digits.ckpt", map_location="cpu")
    assert script.evaluate(model.model._orig_mod)[0] == pytest.approx(ACCURACY)


def test_its_weights_have_the_accuracy_that_it_and_the_readme_state(script, checkpoint):
    weights = {key.removeprefix("model._orig_mod."): value for key, value in checkpoint["state_dict"].items()}
    net = script.DigitsNet()
    net.load_state_dict(weights)
    assert script.evaluate(net)[0] == pytest.approx(ACCURACY)
    (callback,) = checkpoint["callbacks"].values()
    assert callback["best_model_score"].item() == pytest.approx(ACCURACY)
    assert "358 of 360 validation images right, an accuracy of 0.9944" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("seed", range(5))
def test_the_wrong_clean_up_loads_nothing_and_predicts_one_class(script, checkpoint, seed):
    wrong = torch.load(EXAMPLES / "digits_wrong_strip.pt", weights_only=True)
    assert [f"model.{key}" for key in wrong] == list(checkpoint["state_dict"])
    torch.manual_seed(seed)
    net = script.DigitsNet()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.load_state_dict(wrong, strict=False)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    accuracy, counts = script.evaluate(net)
    assert accuracy < 0.15
    assert counts.max() > 0.8 * counts.sum()
