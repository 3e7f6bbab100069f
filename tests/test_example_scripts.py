"""The examples do what they say: each is run as a user would run it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.commands import command_environment, ran

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DIGITS, WRONG, SCRIPT = (EXAMPLES / name for name in ("digits.ckpt", "digits_wrong_strip.pt", "train_digits.py"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return command_environment(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits_as_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory, script) -> Path:
    """Two epochs by the script itself; only compiling is left out, its wrapper is not."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers
        patch.setattr(sys, "argv", ["train_digits.py", "--out", str(out), "--epochs", "2", "--keep-all"])
        patch.setattr("torch._dynamo.config.disable", True)
        script.main()
    torch.use_deterministic_algorithms(False)  # the trainer asked for them, for good
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, script) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "photos"
    script.write_pictures(folder)
    assert len(list(folder.glob("[0-9]/*.png"))) == 360
    return folder


def test_training_leaves_what_is_shipped(trained):
    written, shipped = (torch.load(path, weights_only=True) for path in (trained / "digits.ckpt", DIGITS))
    assert list(written["state_dict"]) == list(shipped["state_dict"])
    assert written.keys() == shipped.keys()
    assert sorted(path.name for path in (trained / "epochs").iterdir()) == ["epoch=00.ckpt", "epoch=01.ckpt"]


def test_epochs_are_compared_and_drawn(trained, environment, tmp_path):
    page = tmp_path / "change.html"
    done = ran([EXAMPLES / "compare_epochs.sh", trained / "epochs", page], environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"best: {trained / 'epochs'}{os.sep}epoch=0")
    assert "result\tdifferent" in done.stdout
    assert "blocks" in page.read_text()


@pytest.mark.parametrize(("arguments", "said"), [((), "usage: "), (("{tmp}/none", "x.html"), "none")])
def test_comparing_says_what_is_missing(environment, tmp_path, arguments, said):
    command = [EXAMPLES / "compare_epochs.sh", *(text.format(tmp=tmp_path) for text in arguments)]
    done = ran(command, environment, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr


def test_what_diff_cannot_answer_is_no_difference(trained, environment, tmp_path):
    done = ran([EXAMPLES / "compare_epochs.sh", trained / "epochs", tmp_path / "change.txt"], environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "change.txt: the suffix names no picture" in done.stderr


def test_the_wrong_names_are_proven_repaired_and_proven(pictures, environment, tmp_path):
    command = [EXAMPLES / "repair.sh", WRONG, tmp_path / "fixed.pt", f"{SCRIPT}:DigitsNet", pictures, "0.99"]
    done = ran(command, environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("verdict")] == [
        "verdict\tfail",
        "verdict\tpass",
    ]
    fixed = torch.load(tmp_path / "fixed.pt", weights_only=True)
    assert list(fixed)[:2] == ["stem.weight", "bn.weight"]


def test_the_last_epochs_are_averaged_and_judged(trained, pictures, environment, tmp_path):
    command = [EXAMPLES / "average.sh", trained / "epochs", tmp_path / "mean.pt", f"{SCRIPT}:DigitsNet", pictures]
    done = ran(command, environment, cwd=tmp_path)
    assert "verdict\t" in done.stdout, done.stderr
    one, two = (torch.load(trained / "epochs" / f"epoch=0{epoch}.ckpt", weights_only=True) for epoch in (0, 1))
    name = "model._orig_mod.fc.weight"
    mean = torch.load(tmp_path / "mean.pt", weights_only=True)["fc.weight"]
    assert torch.equal(mean, (one["state_dict"][name] + two["state_dict"][name]) / 2)


def test_what_is_sound_is_not_repaired(pictures, environment, tmp_path):
    weights = torch.load(DIGITS, weights_only=True)["state_dict"]
    torch.save({key.removeprefix("model._orig_mod."): value for key, value in weights.items()}, tmp_path / "sound.pt")
    command = [EXAMPLES / "repair.sh", tmp_path / "sound.pt", tmp_path / "out.pt", f"{SCRIPT}:DigitsNet", pictures]
    done = ran(command, environment, cwd=tmp_path)
    assert (done.returncode, (tmp_path / "out.pt").exists()) == (2, False)
    assert "there is nothing to repair" in done.stderr


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder with a sound file, a wrapped one, one that asks for code, and a broken one under an odd name."""
    tree = tmp_path / "tree"
    (tree / "deep er").mkdir(parents=True)
    torch.save({"fc.weight": torch.ones(2, 2)}, tree / "sound.pt")
    torch.save({"module.fc.weight": torch.ones(2, 2)}, tree / "deep er" / "wrapped\n.pt")
    torch.save({"fc.weight": torch.ones(2, 2), "hook": _Hook()}, tree / "hook.pth")
    (tree / "cut.ckpt").write_bytes(DIGITS.read_bytes()[:1000])
    return tree


class _Hook:
    def __reduce__(self):
        return os.system, ("true",)


def test_an_audit_names_every_finding_and_what_it_could_not_read(tree, environment, tmp_path):
    done = ran([EXAMPLES / "audit.sh", tree, "2"], environment, cwd=tmp_path)
    findings = sorted(line.split("\t")[:2] for line in done.stdout.splitlines())
    assert findings == [
        ["dangerous", f"{tree}/hook.pth"],
        ["unreadable", f"{tree}/cut.ckpt"],
        ["wrapped", f"{tree}/deep er/wrapped\\n.pt"],
    ]
    assert done.returncode == 2
    assert "4 checkpoints, 3 findings" in done.stderr


def test_an_audit_that_found_not_all_folders_is_no_clean_one(environment, tmp_path):
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "sound.pt")
    commands = tmp_path / "commands"
    commands.mkdir()
    # As where a folder may not be entered: it lists the rest, and its status is 1.
    (commands / "find").write_text(f'#!/bin/sh\n{shutil.which("find")} "$@"\nexit 1\n')
    (commands / "find").chmod(0o755)
    odd = {**environment, "PATH": f"{commands}{os.pathsep}{environment['PATH']}"}
    done = ran([EXAMPLES / "audit.sh", tmp_path], odd, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "1 checkpoints, 0 findings" in done.stderr


def test_an_audit_says_no_and_says_yes(tree, environment, tmp_path):
    (tree / "cut.ckpt").unlink()
    assert ran([EXAMPLES / "audit.sh", tree], environment, cwd=tmp_path).returncode == 1
    (tree / "hook.pth").unlink()
    (tree / "deep er" / "wrapped\n.pt").unlink()
    done = ran([EXAMPLES / "audit.sh", tree], environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")


# What the demo is given: a wrapped state dict beside an object whose class is gone by the time that it is read.
WITH_CONFIG = """
import sys, types, torch
module = sys.modules["my_training"] = types.ModuleType("my_training")
exec("class TrainingConfig:\\n    pass", module.__dict__)
config = module.TrainingConfig()
config.widths, config.classes, config.lr = [16, 32], 10, 0.005
state_dict = torch.load(sys.argv[1], weights_only=True)["state_dict"]
torch.save({"state_dict": state_dict, "config": config}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def with_config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "best.pt"
    subprocess.run([sys.executable, "-c", WITH_CONFIG, DIGITS, path], check=True)
    return path


@pytest.fixture(scope="module")
def address(with_config, environment) -> Iterator[str]:
    command = [sys.executable, EXAMPLES / "web_demo.py", with_config, "--port", "0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as demo:
        try:
            yield demo.stdout.readline().strip()
        finally:
            demo.terminate()


def test_torch_cannot_load_what_the_demo_serves(with_config):
    with pytest.raises(Exception, match="TrainingConfig"):
        torch.load(with_config, weights_only=True)
    with pytest.raises(ModuleNotFoundError, match="my_training"):
        torch.load(with_config, weights_only=False)


def test_the_demo_tells_digits_apart(address):
    from sklearn.datasets import load_digits

    digits = load_digits()
    answers = [_post(address, json.dumps(image.tolist())) for image in digits.images[:20]]
    right = [answer["digit"] == label for answer, label in zip(answers, digits.target[:20].tolist(), strict=True)]
    assert sum(right) >= 19


@pytest.mark.parametrize("body", ["[[1, 2]]", "no json", "", '{"a": 1}'])
def test_the_demo_survives_what_is_no_image(address, body):
    with pytest.raises(urllib.error.HTTPError) as refused:
        _post(address, body)
    assert refused.value.code == 400
    refused.value.close()


def _post(address: str, body: str) -> dict[str, object]:
    with urllib.request.urlopen(urllib.request.Request(address, body.encode()), timeout=30) as answer:
        return json.load(answer)
