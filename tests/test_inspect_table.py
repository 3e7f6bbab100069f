"""A folder of checkpoints through the command line: every file gets a row, and the best one is the best."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ran
from safetensors.torch import save_file
from support.crafted import Command
from support.strict_json import strictly

from ckptool.formats.bystanders import name_bystander
from ckptool.layouts.directions import better_direction
from ckptool.layouts.file_names import read_name
from ckptool.reports.folder import time_text

Run = Callable[..., Ran]

WEIGHTS = {"fc.weight": torch.ones(2, 3)}
CALLBACK = "ModelCheckpoint{{'monitor': '{monitor}', 'mode': '{mode}', 'every_n_train_steps': 0}}"


def save(path: Path, **extra: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": WEIGHTS, **extra}, path)
    return path


def lightning(path: Path, epoch: int, score: float, monitor: str = "val_loss", mode: str = "min") -> Path:
    """Save what Lightning saves, as far as a table reads it."""
    state = {"monitor": monitor, "best_model_score": torch.tensor(score), "current_score": torch.tensor(score)}
    callbacks = {CALLBACK.format(monitor=monitor, mode=mode): state}
    counts = {"epoch": epoch, "global_step": 10 * epoch, "pytorch-lightning_version": "2.6.6"}
    return save(path, **counts, callbacks=callbacks)


def table(run: Run, *args: object, status: int = 0) -> dict[str, Any]:
    ran = run("inspect", "--json", *args)
    assert ran.status == status, ran.err
    return strictly(ran.out)


def best(run: Run, *args: object) -> str:
    ran = run("inspect", "--best", *args)
    assert (ran.status, ran.err) == (0, "")
    return Path(ran.out.removesuffix("\n")).name


def refusal(run: Run, *args: object) -> str:
    ran = run("inspect", *args)
    assert (ran.status, ran.out) == (2, "")
    return ran.err


# What the files state, and what their names do.


@pytest.mark.parametrize(
    ("scores", "mode", "expected"),
    [
        ([0.5, 0.25, 0.4], "min", "1.ckpt"),
        ([0.5, 0.25, 0.4], "max", "0.ckpt"),
        ([0.25, 0.5, 0.25], "min", "0.ckpt"),
        ([math.nan, 0.5, 0.75], "min", "1.ckpt"),
        ([0.5, -math.inf, 0.75], "min", "0.ckpt"),
        ([math.nan, 0.5, math.inf], "max", "1.ckpt"),
    ],
)
def test_the_callback_s_own_metric_and_mode_rank(
    scores: list[float], mode: str, expected: str, run: Run, tmp_path: Path
) -> None:
    for index, score in enumerate(scores):
        lightning(tmp_path / f"{index}.ckpt", index, score, mode=mode)
    assert best(run, tmp_path) == expected
    found = table(run, tmp_path)
    assert found["best"] == str(tmp_path / expected)
    assert (found["metric"]["value"], found["mode"]["value"]) == ("val_loss", mode)
    flagged = [entry for entry in found["files"] if entry["best"]]
    assert [(Path(entry["path"]).name, entry["rank"]) for entry in flagged] == [(expected, 1)]
    assert flagged[0]["reason"] == found["reason"]
    unranked = {entry["path"] for entry in found["files"] if entry["rank"] is None}
    assert unranked == {
        str(tmp_path / f"{index}.ckpt") for index, score in enumerate(scores) if not math.isfinite(score)
    }


def test_lightning_s_own_files_are_ranked(run: Run, tmp_path: Path) -> None:
    import lightning as pl

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.fc(batch[0]).sum()

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("score", [0.1, 0.9, 0.4, 0.2][self.current_epoch])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(2, 2)))
    saving = pl.pytorch.callbacks.ModelCheckpoint(
        tmp_path, "{epoch}-{score:.2f}", monitor="score", mode="max", save_top_k=2, save_last=True
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=4, callbacks=[saving], num_sanity_val_steps=0, accelerator="cpu", default_root_dir=tmp_path, **quiet
    )
    trainer.fit(Net(), data, data)
    found = table(run, tmp_path)
    assert found["best"] == saving.best_model_path
    assert (found["metric"]["value"], found["mode"]["value"]) == ("score", "max")
    facts = {Path(entry["path"]).name: (entry["epoch"]["value"], entry["rank"]) for entry in found["files"]}
    assert facts["epoch=1-score=0.90.ckpt"] == (1, 1)
    assert facts["last.ckpt"][0] == 2  # a copy of what was saved last, not of the last epoch


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["epoch=09-val_loss=0.38.ckpt", "epoch=10-val_loss=0.41.ckpt"], "epoch=09-val_loss=0.38.ckpt"),
        (["acc1=76.2260.ckpt", "acc1=8.1.ckpt"], "acc1=76.2260.ckpt"),
        (["checkpoint.pth.tar", "model_best.pth.tar"], "model_best.pth.tar"),
        (["epoch_1_val_acc_0.71.pt", "epoch_2_val_acc_0.93.pt"], "epoch_2_val_acc_0.93.pt"),
    ],
)
def test_names_tell_what_the_files_do_not(names: list[str], expected: str, run: Run, tmp_path: Path) -> None:
    for name in names:
        save(tmp_path / name)
    assert best(run, tmp_path) == expected


@pytest.mark.parametrize(
    ("names", "expected", "reason"),
    [
        (["epoch=1-loss=0.5.ckpt", "epoch=3-step=100-loss=0.5.ckpt"], "epoch=1-loss=0.5.ckpt", "the earliest counts"),
        (["epoch=3-step=5-loss=0.5.ckpt", "epoch=1-step=9-loss=0.5.ckpt"], "epoch=3-step=5-loss=0.5.ckpt", "earliest"),
        (["b-loss=0.5.ckpt", "epoch=1-loss=0.5.ckpt"], "b-loss=0.5.ckpt", "none tells when"),
        (["loss=0,25.ckpt", "loss=0.5.ckpt"], "loss=0.5.ckpt", "lowest loss of 1"),
    ],
)
def test_of_equal_scores_the_earliest_is_told_by_what_all_have(
    names: list[str], expected: str, reason: str, run: Run, tmp_path: Path
) -> None:
    for name in names:
        save(tmp_path / name)
    assert best(run, tmp_path) == expected
    assert reason in table(run, tmp_path)["reason"]


def test_what_a_file_states_outranks_its_name(run: Run, tmp_path: Path) -> None:
    lightning(tmp_path / "epoch=1-val_loss=0.10.ckpt", 1, 0.5)
    lightning(tmp_path / "epoch=2-val_loss=0.90.ckpt", 2, 0.25)
    assert best(run, tmp_path) == "epoch=2-val_loss=0.90.ckpt"
    named = save(tmp_path / "named" / "epoch=3-val_loss=0.2.pt")
    entry = table(run, named.parent)["files"][0]
    assert entry["metrics"] == {"val_loss": {"value": 0.2, "evidence": "from the file's name"}}
    assert entry["epoch"] == {"value": 3, "evidence": "from the file's name"}
    assert entry["training"]["epoch"] is None


NAMES = {
    "epoch=09-val_loss=0.38.ckpt": (9, None, {"val_loss": 0.38}),
    "model-epoch=03-val_loss=0.20-v1.ckpt": (3, None, {"val_loss": 0.2}),
    "epoch=1-step=300.ckpt": (1, 300, {}),
    "acc1=76.2260.ckpt": (None, None, {"acc1": 76.226}),
    "model_best.pth.tar": (None, None, {}),
    "checkpoint-1500": (None, 1500, {}),
    "global_step1000": (None, 1000, {}),
    "iter_20000.pth": (None, 20000, {}),
    "model_epoch_12_val_acc_0.91.pt": (12, None, {"val_acc": 0.91}),
    "ckpt_epoch_300.pth": (300, None, {}),
    "val_loss=-1e-05.ckpt": (None, None, {"val_loss": -1e-05}),
    "acc10.5.pt": (None, None, {"acc": 10.5}),
    "lr=0.1-seed=3.pt": (None, None, {}),
    "v1.0_epoch=2.pt": (2, None, {}),
    "resnet50-0676ba61.pth": (None, None, {}),
    "vit_b_16-224.pt": (None, None, {}),
    "epoch3.5.pt": (None, None, {}),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_read(name: str) -> None:
    facts = read_name(name)
    epoch, step = (fact and fact.value for fact in (facts.epoch, facts.global_step))
    assert (epoch, step, {key: fact.value for key, fact in facts.metrics.items()}) == NAMES[name]


@pytest.mark.parametrize(
    ("direction", "metrics"),
    [
        ("min", "loss val_loss eval/loss valLoss perplexity wer error_rate fid_score rmse log_loss"),
        ("max", "acc val/acc acc1 top5 mAP50 map miou f1 r2 eval_accuracy rouge1 bleu4 AUC psnr"),
        (None, "metric score neg_mse loss_acc eval_runtime something"),
    ],
)
def test_a_name_may_tell_its_direction(direction: str | None, metrics: str) -> None:
    assert {metric: better_direction(metric) for metric in metrics.split()} == dict.fromkeys(metrics.split(), direction)


@pytest.mark.parametrize(("goal", "expected"), [("top1", "b.pth.tar"), ("loss", "a.pth.tar")])
def test_timm_s_settings_tell_what_its_metric_is(goal: str, expected: str, run: Run, tmp_path: Path) -> None:
    for name, score in (("a", 0.25), ("b", 0.5)):
        args = argparse.Namespace(eval_metric=goal)
        save(tmp_path / f"{name}.pth.tar", epoch=1, arch="resnet18", version=2, args=args, metric=score)
    assert best(run, tmp_path) == expected


# What is open is refused, with what settles it.


def test_several_metrics_need_a_word(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "a.pt", val_loss=0.1, val_acc=0.7, train_loss=0.3)
    save(tmp_path / "b.pt", val_loss=0.2, val_acc=0.9, train_loss=0.1)
    assert "val_loss, val_acc" in refusal(run, tmp_path, "--best")
    found = table(run, tmp_path)
    assert (found["best"], found["metric"]) == (None, None)
    assert "--metric" in found["refusal"]
    assert best(run, tmp_path, "--metric", "val_loss") == "a.pt"
    assert best(run, tmp_path, "--metric", "val_acc") == "b.pt"
    assert best(run, tmp_path, "--metric", "val_acc", "--mode", "min") == "a.pt"
    assert "val_loss, val_acc, train_loss" in refusal(run, tmp_path, "--metric", "bleu")


def test_the_score_of_held_out_data_counts_before_that_of_training(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "a.pt", val_loss=0.1, train_loss=0.3)
    save(tmp_path / "b.pt", val_loss=0.2, train_loss=0.1)
    assert best(run, tmp_path) == "a.pt"


def test_an_unknown_direction_needs_a_word(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "a.pt", metric=0.1)
    save(tmp_path / "b.pt", metric=0.2)
    for args in (("--best",), ("--metric", "metric"), ("--best", "--json")):
        assert "--mode" in refusal(run, tmp_path, *args)
    assert table(run, tmp_path)["best"] is None
    assert best(run, tmp_path, "--mode", "max") == "b.pt"
    assert "min, max" in refusal(run, tmp_path, "--mode", "best")


def test_the_best_score_so_far_is_no_file_s_own(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "a.pt", best_acc1=0.7)
    save(tmp_path / "b.pt", best_acc1=0.9)
    assert "best_acc1" in refusal(run, tmp_path, "--best")
    assert best(run, tmp_path, "--metric", "best_acc1") == "b.pt"
    (tmp_path / "a.pt").rename(tmp_path / "model_best.pt")
    assert best(run, tmp_path) == "model_best.pt"


def test_trainers_that_disagree_need_a_word(run: Run, tmp_path: Path) -> None:
    lightning(tmp_path / "a.ckpt", 1, 0.5)
    lightning(tmp_path / "b.ckpt", 2, 0.9, monitor="val_acc", mode="max")
    assert "val_loss, val_acc" in refusal(run, tmp_path, "--best")
    lightning(tmp_path / "b.ckpt", 2, 0.9, mode="max")
    assert "--mode" in refusal(run, tmp_path, "--best")


def test_two_callbacks_need_a_word(run: Run, tmp_path: Path) -> None:
    states = {}
    for monitor, mode in (("val_acc", "max"), ("val_loss", "min")):
        score = {"monitor": monitor, "best_model_score": torch.tensor(0.5), "current_score": torch.tensor(0.5)}
        states[CALLBACK.format(monitor=monitor, mode=mode)] = score
    counts = {"epoch": 1, "global_step": 10, "pytorch-lightning_version": "2.6.6"}
    save(tmp_path / "a.ckpt", **counts, callbacks=states)
    assert "val_acc, val_loss" in refusal(run, tmp_path, "--best")
    assert best(run, tmp_path, "--metric", "val_loss") == "a.ckpt"


def test_no_metric_anywhere_says_what_would_help(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "a.pt")
    save(tmp_path / "b.pt")
    assert "val_loss=0.38" in refusal(run, tmp_path, "--best")
    ran = run("inspect", tmp_path)
    assert (ran.status, ran.err) == (0, "")
    assert [line.split("\t")[0] for line in ran.out.splitlines()] == ["file", "file", "refusal"]


def test_a_file_without_weights_is_never_the_best(run: Run, tmp_path: Path) -> None:
    torch.save({"state": {}, "param_groups": []}, tmp_path / "val_loss=0.01.pt")
    save(tmp_path / "val_loss=0.5.pt")
    assert best(run, tmp_path) == "val_loss=0.5.pt"


# What is in a folder.


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Make a folder as a training leaves it, with what may go wrong in one."""
    folder = tmp_path / "runs"
    lightning(folder / "epoch=1.ckpt", 1, 0.5)
    lightning(folder / "epoch=2.ckpt", 2, 0.25)
    save(folder / "without.pt")
    whole = (folder / "epoch=1.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "no suffix").write_bytes(whole)
    (folder / "gone.ckpt").symlink_to("nowhere.ckpt")
    (folder / "page.pt").write_text("<!doctype html>")
    (folder / "hparams.yaml").write_text("lr: 0.1\n")
    (folder / "train.log").write_bytes(b"50%\r\x1b[A100%\n")
    (folder / "curve.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    (folder / "events.out.tfevents.1").write_bytes(
        bytes.fromhex("1800000000000000a37f4b22090000c0") + b"x" * 7 + b"brain.Event:2"
    )
    (folder / ".hidden").write_bytes(b"\xff\xfe")
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "pipe.pt")
    lightning(folder / "version_1" / "deep.ckpt", 3, 0.125)
    lightning(folder / ".trash" / "old.ckpt", 4, 0.0)
    return folder


READABLE = {"epoch=1.ckpt", "epoch=2.ckpt", "without.pt", "no suffix"}
UNREADABLE = {"cut.ckpt", "gone.ckpt", "page.pt", "pipe.pt"}


def test_every_checkpoint_of_a_folder_gets_a_row(run: Run, runs: Path) -> None:
    found = table(run, runs, status=2)
    entries = {Path(entry["path"]).name: entry for entry in found["files"]}
    assert {name for name, entry in entries.items() if "error" in entry} == UNREADABLE
    assert {name for name, entry in entries.items() if "error" not in entry} == READABLE
    assert found["best"] == str(runs / "epoch=2.ckpt")
    skipped = {"text": 2, "image": 1, "TensorBoard log": 1, "pipe": 1, "hidden file": 1, "folder": 2}
    assert found["skipped"] == skipped
    assert [entry["path"] for entry in found["files"]] == sorted(entry["path"] for entry in found["files"])
    assert entries["epoch=2.ckpt"]["state_dicts"][0]["tensors"] == 1
    assert entries["cut.ckpt"]["modified"].endswith("Z")


def test_lines_say_the_same(run: Run, runs: Path) -> None:
    ran = run("inspect", runs)
    assert ran.status == 2
    assert len(ran.err.splitlines()) == len(UNREADABLE)
    records = [line.split("\t") for line in ran.out.splitlines()]
    files = [cells for cells in records if cells[0] == "file"]
    assert files[0][1:7] == ["best", str(runs / "epoch=2.ckpt"), "PyTorch Lightning", "2", "20", "0.25"]
    assert {Path(cells[2]).name for cells in files} == READABLE
    assert {Path(cells[1]).name for cells in records if cells[0] == "unreadable"} == UNREADABLE
    assert all(len(cells) == 10 for cells in files)


def test_best_prints_one_path_and_says_what_it_could_not_read(run: Run, runs: Path) -> None:
    ran = run("inspect", runs, "--best")
    assert (ran.status, ran.out) == (2, f"{runs / 'epoch=2.ckpt'}\n")
    assert len(ran.err.splitlines()) == len(UNREADABLE)


def test_folders_below_are_entered_when_asked(run: Run, runs: Path) -> None:
    (runs / "loop").symlink_to(runs)
    found = table(run, runs, "-r", status=2)
    assert found["best"] == str(runs / "version_1" / "deep.ckpt")
    assert found["skipped"]["folder"] == 2


def test_an_empty_folder_says_what_would_fill_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing yet\n")
    for args in ((), ("--json",), ("--best",)):
        assert "1 other file" in refusal(run, tmp_path, *args)
    save(tmp_path / "below" / "a.pt")
    assert "-r" in refusal(run, tmp_path)
    (tmp_path / "below" / "a.pt").unlink()
    assert "save one into it" in refusal(run, tmp_path, "-r")


def test_an_empty_folder_among_others_is_a_row(run: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    found = table(run, save(tmp_path / "a.pt"), empty, status=2)
    assert ["error" in entry for entry in found["files"]] == [False, True]


def test_a_folder_that_cannot_be_listed_is_no_empty_one(run: Run, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.iterdir

    def iterdir(path: Path) -> Any:
        if path.name == "version_1":
            raise PermissionError(13, "Permission denied")
        return whole(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    errors = {Path(entry["path"]).name for entry in table(run, runs, "-r", status=2)["files"] if "error" in entry}
    assert errors == {*UNREADABLE, "version_1"}


@pytest.mark.parametrize("data", ["{a}\n{b}\n", "{a}\n\n{b}", "{a}\0{b}\0"])
def test_paths_come_from_standard_input(data: str, tmp_path: Path) -> None:
    first, second = lightning(tmp_path / "a b.ckpt", 1, 0.5), lightning(tmp_path / "b.ckpt", 2, 0.25)
    command = [sys.executable, "-m", "ckptool", "inspect", "-", "--best"]
    ran = subprocess.run(command, input=data.format(a=first, b=second).encode(), capture_output=True, check=False)
    assert (ran.returncode, ran.stdout.decode(), ran.stderr) == (0, f"{second}\n", b"")


def test_standard_input_without_a_path_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert "names no path" in refusal(run, "-")


def test_closed_standard_input_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert "standard input is closed" in refusal(run, "-")


def test_the_best_path_is_printed_byte_for_byte(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/val_loss=0.1-\xff\n\xc3\xa9.pt"
    shutil.copy(save(tmp_path / "val_loss=0.5.pt"), name)
    command = [sys.executable, "-m", "ckptool", "inspect", "--best", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == name + b"\n"


def test_several_processes_give_the_same_answer(run: Run, tmp_path: Path) -> None:
    for index in range(20):
        lightning(tmp_path / f"{index}.ckpt", index, abs(index - 7) / 8)
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    answers = [run("inspect", tmp_path, *form, "--jobs", jobs) for form in ((), ("--json",)) for jobs in (1, 3)]
    assert [ran.status for ran in answers] == [2] * 4
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]
    assert json.loads(answers[2].out)["best"] == str(tmp_path / "7.ckpt")


def test_hostile_names_and_metrics_stay_one_record(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "a\x1b[5m\n.pt", **{"x\n\x1b[2J_acc": 0.5, "acc": 10**400})  # a number of that length stays unread
    for args in ((), ("--color", "always"), ("--json",)):
        ran = run("inspect", tmp_path, *args)
        assert ran.status == 0
        assert "\x1b[5m" not in ran.out
        assert "\x1b[2J" not in ran.out
    assert run("inspect", tmp_path).out.count("\nmetric\t") == 1


def test_a_file_full_of_metrics_is_shown_at_once(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "a.pt", **{f"val_loss_{index}": 0.5 for index in range(20_000)})
    assert len(run("inspect", tmp_path, "--color", "always").out) < 4000
    assert run("inspect", tmp_path).out.count("\nmetric\t") == 20_000


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_view_fits_and_marks_the_best(width: int, run: Run, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    ran = run("inspect", runs, "--color", "always")
    assert (ran.status, ran.err) == (2, "")
    marked = [line for line in ran.out.splitlines() if "→" in line]
    assert len(marked) == 1
    assert "epoch=2.ckpt" in marked[0]
    assert "0.25" in marked[0]
    assert all(name in ran.out for name in READABLE | UNREADABLE)


def test_lists_describe_one_file_after_the_other(run: Run, tmp_path: Path) -> None:
    first, second = save(tmp_path / "a.pt"), save(tmp_path / "b.pt")
    ran = run("inspect", tmp_path, "--tensors")
    assert ran.status == 0
    assert [line for line in ran.out.splitlines() if line.startswith("path\t")] == [f"path\t{first}", f"path\t{second}"]
    assert ran.out.count("\ntensor\t") == 2


def trainer_folder(path: Path, step: int, scores: dict[str, float], monitored: str | None = None) -> Path:
    """Write what transformers' Trainer leaves of one step, with its own classes."""
    from transformers.trainer_callback import TrainerState

    path.mkdir(parents=True)
    save_file({"fc.weight": torch.ones(2, 3)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    history = [
        {"loss": 9.0, "step": step},
        {"eval_loss": 0.0, "step": step - 1},
        {**scores, "eval_runtime": 1.0, "step": step},
    ]
    state = TrainerState(epoch=step / 4, global_step=step, log_history=history)
    state.save_to_json(str(path / "trainer_state.json"))
    arguments = argparse.Namespace(
        metric_for_best_model=monitored, greater_is_better=None if monitored is None else False
    )
    torch.save(arguments, path / "training_args.bin")
    return path


def test_the_folders_of_a_trainer_are_a_row_each(run: Run, tmp_path: Path) -> None:
    scores = {4: {"eval_loss": 0.5, "eval_wer": 3.0}, 8: {"eval_loss": 0.75, "eval_wer": 1.0}, 12: {"eval_loss": 0.9}}
    for step, measured in scores.items():
        trainer_folder(tmp_path / f"checkpoint-{step}", step, measured, "wer")
    found = table(run, tmp_path)
    assert [Path(entry["path"]).name for entry in found["files"]] == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert (found["best"], found["metric"]["value"]) == (str(tmp_path / "checkpoint-8"), "eval_wer")
    entry = found["files"][1]
    assert {name: fact["value"] for name, fact in entry["metrics"].items()} == scores[8]
    assert (entry["epoch"]["value"], entry["global_step"]["value"]) == (2, 8)
    assert best(run, tmp_path, "--metric", "eval_loss") == "checkpoint-4"
    # The weights beside them may be those of any step, whatever their state says.
    shutil.copytree(tmp_path / "checkpoint-12", tmp_path, dirs_exist_ok=True)
    entry = table(run, tmp_path, "-r")["files"][0]
    assert (entry["path"], entry["metrics"], entry["rank"]) == (str(tmp_path), {}, None)
    assert best(run, tmp_path, "-r") == "checkpoint-8"
    assert "files" not in table(run, tmp_path)


@pytest.mark.parametrize(
    "state", ["", "[]", "{", '{"global_step": "8"}', '{"global_step": 8, "log_history": {"a": 1}}']
)
def test_a_broken_trainer_state_leaves_the_name(state: str, run: Run, tmp_path: Path) -> None:
    folder = trainer_folder(tmp_path / "checkpoint-8", 8, {})
    (folder / "trainer_state.json").write_text(state)
    (folder / "training_args.bin").write_bytes(b"PK")
    entry = table(run, tmp_path)["files"][0]
    assert (entry["global_step"]["value"], entry["metrics"]) == (8, {})


def test_a_distributed_checkpoint_is_one_row(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "a.pt")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / ".metadata").write_bytes(b"\x80\x02N.")
    save(tmp_path / "sharded" / "__0_0.distcp")
    found = table(run, tmp_path, "-r", status=2)
    assert ["error" in entry for entry in found["files"]] == [False, True]


# What is dangerous, and what is odd.


def test_a_dangerous_file_is_called_so(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "a.pt", extra=Command())
    assert run("inspect", tmp_path).out.splitlines()[0].split("\t")[-1] == "dangerous"
    assert "dangerous" in run("inspect", tmp_path, "--color", "always").out


def test_facts_in_metadata_may_be_anything(run: Run, tmp_path: Path) -> None:
    said = {
        "metrics": {"val_loss": "NaN", "val_acc": True, "f1": 10**4200, "top1": 10**300, "top5": 0.5},
        "monitor": 10**4200,
        "mode": 10**4200,
        "epoch": "third",
        "global_step": -1.5,
    }
    for name in ("a", "b"):
        metadata = {"ckptool.training": json.dumps(said)}
        save_file({"fc.weight": torch.ones(2, 3)}, tmp_path / f"{name}.safetensors", metadata=metadata)
    for args in ((), ("--json",), ("--color", "always"), ("--best", "--metric", "top1")):
        assert run("inspect", tmp_path, *args).status == 0
    for metric in ("val_loss", "val_acc", "f1"):
        assert "no file here has a finite value" in refusal(run, tmp_path, "--best", "--metric", metric)


def test_a_path_that_looks_like_an_option_is_printed_as_a_path(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "-f1=0.5.pt")
    monkeypatch.chdir(tmp_path)
    assert run("inspect", ".", "--best").out == "./-f1=0.5.pt\n"


def test_a_deepspeed_folder_is_one_row_and_a_link_to_the_latest_is_none(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "epoch=1.ckpt" / "checkpoint" / "mp_rank_00_model_states.pt")
    (tmp_path / "epoch=1.ckpt" / "latest").write_text("checkpoint")
    save(tmp_path / "f1=0.5.pt")
    (tmp_path / "latest").symlink_to("f1=0.5.pt")
    found = table(run, tmp_path, "-r")
    entries = {Path(entry["path"]).name: entry.get("error", "") for entry in found["files"]}
    assert entries == {"epoch=1.ckpt": "", "f1=0.5.pt": "", "latest": ""}
    assert found["best"] == str(tmp_path / "f1=0.5.pt")


def test_a_dangerous_file_that_is_damaged_is_called_both(run: Run, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", extra=Command())
    torch.save({"state_dict": WEIGHTS, "extra": Command()}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-40])
    other = save(tmp_path / "b.pt")
    ran = run("inspect", path, other)
    record = next(line for line in ran.out.splitlines() if line.startswith("unreadable\t"))
    assert (ran.status, record.split("\t")[-1]) == (2, "dangerous")
    assert "it can run commands" in run("inspect", tmp_path, "--color", "always").out
    assert table(run, tmp_path, status=2)["files"][0]["safety"]["verdict"] == "dangerous"


@pytest.mark.parametrize("seconds", [-1e10, 0, 253402300800, 2**40])
def test_any_time_can_be_written(seconds: float) -> None:
    assert time_text(seconds).startswith(("1", "@"))


BYSTANDERS = {
    "image": b"BM\x36\x00\x0c\x00" + bytes(40),
    "document": b"%PDF-1.7\n",
    "program": b"\xa7\r\r\n" + bytes(12) + b"\xe3",
    "sound": b"RIFF\0\0\0\0WAVEfmt ",
    "video": b"\0\0\0\x20ftypisom",
    "ONNX model": b"\x08\x08\x12\x07pytorch",
    "compressed text": gzip.compress(b"epoch 1\n" * 9),
    "text": "loss: café\n".encode("latin-1") * 9,
    "empty file": b"",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("kind", BYSTANDERS)
def test_what_lies_beside_checkpoints_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(BYSTANDERS[kind])
    assert name_bystander(path) == kind


def test_utf_16_is_text(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes("loss\n".encode("utf-16"))
    assert name_bystander(path) == "text"


CHECKPOINTS: dict[str, Callable[[Path], Any]] = {
    "zip": lambda path: torch.save(WEIGHTS, path),
    "legacy": lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),
    "old protocol": lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False, pickle_protocol=0),
    "safetensors": lambda path: save_file(WEIGHTS, path),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"w": np.ones(3)}, 4)),
    "pickle in letters": lambda path: path.write_bytes(pickle.dumps({"w": [1.0] * 40}, 0)),
    "arrays": lambda path: path.write_bytes(npz(w=np.ones(3))),
    "gzip": lambda path: path.write_bytes(gzip.compress(npz(w=np.ones(3)))),
    "zeros": lambda path: path.write_bytes(bytes(99)),
    "noise": lambda path: path.write_bytes(bytes(range(255, 0, -1))),
}


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_what_is_or_may_have_been_a_checkpoint_is_never_skipped(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    CHECKPOINTS[kind](path)
    whole = path.read_bytes()
    for nbytes in (len(whole), len(whole) // 2, 64):
        path.write_bytes(whole[:nbytes])
        assert name_bystander(path) is None, nbytes


def test_archives_of_other_things_are_skipped_and_broken_ones_are_not(run: Run, tmp_path: Path) -> None:
    for name, records in {"notes.docx": ["word/document.xml"], "bundle": ["best.ckpt"]}.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for record in records:
                archive.writestr(record, b"x")
    (tmp_path / "cut").write_bytes((tmp_path / "notes.docx").read_bytes()[:40])
    found = table(run, tmp_path, status=2)
    assert [Path(entry["path"]).name for entry in found["files"]] == ["bundle", "cut"]
    assert found["skipped"] == {"zip archive": 1}


@pytest.mark.parametrize("name", ["model.npz", "labels.npy", "model.pt2", "mobile.ptl", "speech.nemo"])
def test_a_broken_file_named_as_tensors_are_is_no_bystander(name: str, run: Run, tmp_path: Path) -> None:
    save(tmp_path / "good.pt")
    (tmp_path / name).write_bytes(b"")
    ran = run("inspect", tmp_path)
    assert ran.status == 2
    assert f"{name}: the file is empty" in ran.err
