"""What verify and inspect say of content that can act, of what hides behind damage, and of honest files."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import crafted, zips
from support.opcodes import Pickle
from support.tensors import torch_bytes
from torch import nn

Run = Callable[..., Any]


class Acts:
    """Pickle as the call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class ActsLater(Acts):
    """Pickle as a call whose result gets a state."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (*self.call, {"a": 1})


def weights() -> dict[str, Any]:
    return {name: torch.randn(8, 8) for name in ("first.weight", "second.weight")}


def popped() -> bytes:
    """Call something, forget the result, and then be an honest state dict."""
    call = Pickle().mark().name("os", "system").text("true").raw(b"o").pop()
    honest = Pickle(None).raw(b"}(").text("w").tensor().raw(b"u").stop()
    return crafted.archived(crafted.members_of(None, _0=crafted.FOUR_FLOATS) | {"archive/data.pkl": call.data + honest})


EVIL: dict[str, tuple[Callable[[], bytes], str]] = {
    "in a container": (lambda: torch_bytes({"state_dict": weights(), "x": Acts(eval, "1")}), "__builtin__.eval"),
    "among the weights": (lambda: torch_bytes({**weights(), "x": Acts(eval, "1")}), "__builtin__.eval"),
    "as a key": (lambda: torch_bytes({"state_dict": weights(), Acts(eval, "'a'"): 1}), "__builtin__.eval"),
    "the whole file": (lambda: torch_bytes(Acts(eval, "1")), "__builtin__.eval"),
    "with a state": (lambda: torch_bytes({"state_dict": weights(), "x": ActsLater(exec, "1")}), "__builtin__.exec"),
    "in a legacy stream": (
        lambda: torch_bytes({"state_dict": weights(), "x": Acts(eval, "1")}, _use_new_zipfile_serialization=False),
        "__builtin__.eval",
    ),
    "forgotten": (popped, "os.system"),
    "a nested load": (lambda: torch_bytes({"state_dict": weights(), "x": Acts(pickle.loads, b"N.")}), "pickle.loads"),
    "a nested torch.load": (
        lambda: torch_bytes({"state_dict": weights(), "x": Acts(torch.storage._load_from_bytes, b"")}),
        "torch.storage._load_from_bytes",
    ),
}


@pytest.mark.parametrize("name", EVIL)
def test_dangerous_content_is_no_with_its_name_and_place(run: Run, tmp_path: Path, name: str) -> None:
    make, expected = EVIL[name]
    path = tmp_path / "model.pt"
    path.write_bytes(make())
    ran = run("verify", path, "--json")
    assert ran.status == 1, ran.err
    (safety,) = [check for check in json.loads(ran.out)["checks"] if check["id"] == "safety"]
    (found,) = [one for one in safety["evidence"]["globals"] if one["severity"] == "dangerous"]
    assert (safety["status"], found["name"]) == ("fail", expected)
    assert found["where"].startswith(("data.pkl@", "object@")), found
    plain = run("verify", path)
    assert plain.status == 1
    assert expected in plain.out
    assert found["where"] in plain.out
    inspected = run("inspect", path, "--json")
    assert (inspected.status, json.loads(inspected.out)["safety"]["verdict"]) == (0, "dangerous")


# --- damage hides nothing ---


def cut_archive(data: bytes) -> bytes:
    """Cut the pickle of an archive in two; all that the archive says of it is true."""
    members = crafted.unzipped(data)
    (name,) = [name for name in members if name.endswith("data.pkl")]
    at = members[name].index(b"eval") + 20
    return zips.archive(zips.entries_of(members | {name: members[name][:at]}))


def wrong_checksum(data: bytes) -> bytes:
    entries = zips.entries_of(crafted.unzipped(data))
    entries[0].both = {"crc": 1}
    return zips.archive(entries)


def missing_record(data: bytes) -> bytes:
    members = crafted.unzipped(data)
    return zips.archive(zips.entries_of({name: part for name, part in members.items() if "/data/" not in name}))


def garbled(data: bytes) -> bytes:
    """Break the pickle behind the call."""
    members = crafted.unzipped(data)
    (name,) = [name for name in members if name.endswith("data.pkl")]
    return zips.archive(zips.entries_of(members | {name: members[name][:-1] + b"\xff"}))


ZIPPED = {"x": Acts(eval, "1" * 50), "state_dict": weights()}
DAMAGED: dict[str, Callable[[], bytes]] = {
    "cut": lambda: cut_archive(torch_bytes(ZIPPED)),
    "a wrong checksum": lambda: wrong_checksum(torch_bytes(ZIPPED)),
    "a record that is missing": lambda: missing_record(torch_bytes(ZIPPED)),
    "an unknown opcode": lambda: garbled(torch_bytes(ZIPPED)),
    "a legacy stream without its end": lambda: torch_bytes(ZIPPED, _use_new_zipfile_serialization=False)[:-9],
    "a legacy stream cut in its pickle": lambda: torch_bytes(ZIPPED, _use_new_zipfile_serialization=False)[:400],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_was_named_before_the_damage_is_shown(run: Run, tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(DAMAGED[name]())
    expected = 1 if name == "a wrong checksum" else 2
    ran = run("verify", path, "--json")
    answer = json.loads(ran.out)
    assert (ran.status, answer["verdict"]) == (expected, "fail" if expected == 1 else "error")
    assert {check["id"]: check["status"] for check in answer["checks"]} == {"integrity": "fail", "safety": "fail"}
    assert "__builtin__.eval" in run("verify", path).out

    ran = run("inspect", path, "--json")
    answer = json.loads(ran.out)
    assert (ran.status, ran.err.count("\n"), answer["path"]) == (2, 1, str(path))
    assert answer["error"] in ran.err
    assert answer["safety"]["verdict"] == "dangerous"
    assert [one["name"] for one in answer["safety"]["globals"] if one["severity"] == "dangerous"] == [
        "__builtin__.eval"
    ]
    ran = run("inspect", path)
    assert f"path\t{path}\nsafety\tdangerous\n" in ran.out
    assert "global\t__builtin__.eval\tdangerous\t" in ran.out
    ran = run("inspect", path, "--color", "always")
    assert "__builtin__.eval" in ran.out
    assert "dangerous: it can run commands" in ran.out
    assert run("inspect", path, "--quiet").out == ""
    _, row = json.loads(run("inspect", path, path, "--json").out)["files"]
    assert row["safety"] == answer["safety"]


def test_a_legacy_stream_cut_anywhere_behind_the_call_names_it(run: Run, tmp_path: Path) -> None:
    data = crafted.legacy({"x": Acts(eval, "1"), "w": [1, "b", 2.5]}, [], [])
    path = tmp_path / "model.pt"
    for end in range(data.index(b"R", data.index(b"eval")) + 1, len(data)):
        path.write_bytes(data[:end])
        ran = run("inspect", path, "--json")
        assert ran.status == 2
        assert json.loads(ran.out)["safety"]["verdict"] == "dangerous", end


def test_what_cannot_be_read_is_never_clean(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(torch_bytes({"w": torch.ones(4)}, _use_new_zipfile_serialization=False)[:-3])
    answer = json.loads(run("inspect", path, "--json").out)
    assert answer["safety"]["verdict"] == "unknown"
    assert {one["severity"] for one in answer["safety"]["globals"]} == {"safe"}


def test_damaged_values_hide_no_global(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    data = bytearray(torch_bytes({"w": torch.ones(1000), "x": Acts(eval, "1")}))
    data[data.index(b"\x00\x00\x80\x3f" * 100)] ^= 1
    path.write_bytes(data)
    ran = run("inspect", path, "--stats", "--json")
    assert ran.status == 2
    assert json.loads(ran.out)["safety"]["verdict"] == "dangerous"
    ran = run("verify", path, "--json")
    checks = {check["id"]: check["status"] for check in json.loads(ran.out)["checks"]}
    assert (ran.status, checks["integrity"], checks["safety"]) == (1, "fail", "fail")


# --- honest files ---


@pytest.fixture(scope="module")
def lightning_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let Lightning train for one step and write what it writes."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self, width: int, where: Path, options: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.net(batch[0]).square().mean()
            self.log("val_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]

    folder = tmp_path_factory.mktemp("lightning")
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=4)
    watchers = [
        ModelCheckpoint(folder, "last", monitor="val_loss", save_last=True),
        EarlyStopping("val_loss", check_on_train_epoch_end=True),
    ]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=1, callbacks=watchers, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(Module(16, Path("data"), argparse.Namespace(seed=1, when=datetime.date(2024, 5, 6))), data)
        trainer.save_checkpoint(folder / "model.ckpt")
    return folder / "model.ckpt"


def test_no_false_alarm_over_what_lightning_writes(run: Run, lightning_checkpoint: Path) -> None:
    ran = run("verify", lightning_checkpoint, "--json")
    answer = json.loads(ran.out)
    assert (ran.status, answer["verdict"]) == (0, "pass")
    assert {check["status"] for check in answer["checks"] if check["id"] in ("integrity", "safety")} == {"pass"}
    answer = json.loads(run("inspect", lightning_checkpoint, "--json").out)
    assert answer["safety"]["verdict"] == "clean"
    assert "argparse.Namespace" in {one["name"] for one in answer["safety"]["globals"]}


def timm_style() -> dict[str, Any]:
    """Save what timm's CheckpointSaver saves."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    net(torch.randn(4, 3, 3, 3)).sum().backward()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    arguments = argparse.Namespace(model="resnet18", opt="sgd", mean=(0.1, 0.2), data_dir=Path("x"), device="cuda:0")
    return {
        "epoch": 3, "arch": "resnet18", "state_dict": net.state_dict(), "optimizer": optimizer.state_dict(),
        "version": 2, "args": arguments, "amp_scaler": torch.amp.GradScaler("cpu", enabled=False).state_dict(),
        "state_dict_ema": net.state_dict(), "metric": 76.2,
    }  # fmt: skip


def omegaconf_style() -> dict[str, Any]:
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"model": {"width": 8, "names": ["a", "b"]}, "lr": 0.1, "x": "${lr}"})
    return {"state_dict": weights(), "hyper_parameters": config, "epoch": 1}


HONEST: dict[str, Callable[[], dict[str, Any]]] = {
    "state dict": weights,
    "timm": timm_style,
    "omegaconf": omegaconf_style,
}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", HONEST)
def test_no_false_alarm(run: Run, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    path = tmp_path / "model.pt"
    path.write_bytes(torch_bytes(HONEST[name](), **options))
    ran = run("verify", path, "--json", "--checks", "safety", "--checks", "integrity")
    answer = json.loads(ran.out)
    assert (ran.status, {check["status"] for check in answer["checks"]}) == (0, {"pass"}), ran.out
    assert json.loads(run("inspect", path, "--json").out)["safety"]["verdict"] == "clean"
