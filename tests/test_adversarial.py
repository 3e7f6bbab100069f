"""What a hostile author and an unlucky user do, through the command line itself."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.support import crafted, zips
from tests.support.opcodes import Pickle

CKPTOOL = f"{shlex.quote(sys.executable)} -m ckptool"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "in.pt"
    torch.save({"module.a": torch.arange(4.0), "module.b": torch.ones(2)}, path)
    return path


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line.replace("ckptool", CKPTOOL, 1)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def loads(path: Path) -> list[str]:
    return list(torch.load(path, weights_only=True))


# --- streams that cannot be written to ---


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("ckptool inspect in.pt >&-", 0, ""),
        ("ckptool inspect in.pt <&- >&- 2>&-", 0, ""),
        ("ckptool inspect in.pt > /dev/full", 2, "standard output"),
        ("ckptool inspect in.pt --json > /dev/full", 2, "standard output"),
        ("ckptool --help > /dev/full", 2, "standard output"),
        ("ckptool --version > /dev/full", 2, "standard output"),
        ("ckptool inspect nothing 2> /dev/full", 2, ""),
        ("ckptool nothing > /dev/full 2>&1", 2, ""),
        ("ckptool inspect in.pt | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("ckptool inspect in.pt --json | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("ckptool --help | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("ckptool inspect nothing 2>&1 | true; exit ${PIPESTATUS[0]}", 141, ""),
    ],
)
def test_a_lost_answer_is_one_sentence_at_most(weights, line, status, said):
    ran = shell(line, weights.parent)
    assert ran.returncode == status, ran.stderr
    assert said in ran.stderr
    assert ran.stderr.count("\n") == bool(said)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_are_not_taken_for_the_output(weights, closed):
    assert shell(f"ckptool convert in.pt out.pt --quiet {closed}", weights.parent).returncode == 0
    assert loads(weights.with_name("out.pt")) == ["a", "b"]


# --- the place and the settings that it runs in ---

HOSTILE_MODULES = ("torch", "json", "numpy", "typer", "rich", "zlib", "pickle", "sitecustomize", "ckptool")


@pytest.mark.parametrize(
    "arguments", [["inspect", "in.pt", "--json"], ["verify", "in.pt"], ["convert", "in.pt", "out.safetensors"]]
)
def test_modules_beside_the_checkpoint_are_never_imported(weights, arguments):
    folder = weights.parent
    for name in HOSTILE_MODULES:
        (folder / f"{name}.py").write_text("open('imported', 'w')")
    (folder / "bin").mkdir()
    script = folder / "bin" / "ckptool"  # as an installer writes it
    script.write_text("import sys\nfrom ckptool.cli import main\nsys.exit(main())\n")
    settings = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "0"}
    ran = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | settings | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert ran.returncode == 0, ran.stderr
    assert not (folder / "imported").exists()


# --- outputs that are no files ---


@pytest.mark.parametrize("name", ["x/", "x/.", "./x//", ".", "..", "", "missing/x", "in.pt", "./in.pt", "link", "hard"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_is_no_new_file_is_refused(run, weights, monkeypatch, name, force):
    monkeypatch.chdir(weights.parent)
    Path("link").symlink_to("in.pt")
    Path("hard").hardlink_to("in.pt")
    before = weights.read_bytes()
    ran = run("convert", "in.pt", name, "--to", "pt", *force)
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert weights.read_bytes() == before
    assert sorted(path.name for path in weights.parent.iterdir()) == ["hard", "in.pt", "link"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_writing_leaves_the_old_file(tmp_path, number):
    torch.save({f"w{index}": torch.zeros(1 << 20) for index in range(24)}, tmp_path / "in.pt")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "out.pt").write_bytes(b"old")
    arguments = [sys.executable, "-m", "ckptool", "convert", tmp_path / "in.pt", folder / "out.pt", "--force"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while len(list(folder.iterdir())) < 2 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (128 + number, 0)  # the last moment before it is published may be over
    assert (folder / "out.pt").stat().st_size == 3 or process.returncode == 0
    assert [path.name for path in folder.iterdir()] == ["out.pt"]
    assert b"Traceback" not in err


def test_too_little_memory_is_one_sentence(weights):
    ran = shell("ulimit -v 45000; exec ckptool convert --dtype float16 in.pt out.pt", weights.parent)
    assert ran.returncode in (0, 1, 2, 127, 134)  # below some size Python itself cannot start
    assert ran.returncode != 2 or ran.stderr.count("\n") == 1
    assert not list(weights.parent.glob(".ckptool*"))


# --- names that pose as output ---

FORGERIES = [
    "a\nwrote\tout.pt",
    "\x1b]52;c;eA==\x07",
    "\x1b[2J",
    "[bold]x[/bold]",
    "[/x]",
    "\u202egnp",
    "a\rb",
    "\x9b31m",
]


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "--tensors"],
        ["inspect", "--tree", "--color", "always"],
        ["inspect", "--json", "--tensors"],
        ["convert", "--dry-run"],
        ["convert", "--dry-run", "--json"],
        ["convert", "--include", "nothing", "--dry-run"],
        ["convert", "--select", "nothing", "--dry-run"],
    ],
)
def test_names_cannot_forge_an_answer(run, tmp_path, name, arguments):
    torch.save({"state_dict": {f"module.{name}": torch.ones(2)}, name: 1}, tmp_path / "in.pt")
    ran = run(arguments[0], tmp_path / "in.pt", *arguments[1:])
    assert ran.status in (0, 2)
    shown = ran.out + ran.err
    own = {"\n", "\t", "\x1b"} if "always" in arguments else {"\n", "\t"}
    assert not {character for character in shown if not character.isprintable()} - own
    assert "\x1b[2J" not in shown
    assert "\x1b]" not in shown
    assert "\nwrote\tout.pt" not in shown


def test_a_refusal_is_one_line_whatever_a_name_holds(run, tmp_path):
    torch.save({"x\nckptool: all is well": 1}, tmp_path / "in.pt")
    ran = run("convert", tmp_path / "in.pt", tmp_path / "out.pt")
    assert (ran.status, ran.err.count("\n")) == (2, 1)


# --- small files that unfold ---


def _unfolding(stream: Pickle) -> Pickle:
    """Push a tuple of a few bytes that has 2 ** 100 parts."""
    return stream.raw(b"K\x01\x85" + b"2\x86" * 100)


def _container(**entries: Callable[[Pickle], Pickle]) -> bytes:
    stream = Pickle().raw(b"}(").text("state_dict").raw(b"}(").text("w").tensor().raw(b"u")
    for name, push in entries.items():
        push(stream.text(name))
    return stream.raw(b"u").stop()


BOMBS = {
    "key": Pickle().raw(b"}(").text("w").tensor().raw(b"K\x01\x85" + b"2\x86" * 100 + b"K\x05u").stop(),
    "key-in-rest": _container(extra=lambda stream: _unfolding(stream.raw(b"}(")).raw(b"K\x05u")),
    "epoch": _container(epoch=_unfolding, global_step=_unfolding),
    "hyperparameters": _container(hyper_parameters=lambda s: _unfolding(s.raw(b"}(").text("a")).raw(b"u")),
    "set": _container(extra=lambda stream: _unfolding(stream.name("__builtin__", "set").raw(b"](")).raw(b"e\x85R")),
    "state": _container(extra=lambda s: _unfolding(s.name("a", "B").raw(b")\x81}(").text("f")).raw(b"ub")),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "--json", "--tensors"],
        ["inspect", "--stats", "--tree"],
        ["convert", "out.pt"],
        ["convert", "out.safetensors"],
        ["convert", "out.pt", "--keep-rest", "--foreign", "fields"],
    ],
)
def test_what_unfolds_costs_nothing(run, tmp_path, monkeypatch, bomb, arguments):
    monkeypatch.chdir(tmp_path)
    members = crafted.members_of(None, _0=crafted.FOUR_FLOATS)
    Path("in.pt").write_bytes(crafted.archived(members | {"archive/data.pkl": BOMBS[bomb]}))
    started = time.process_time()
    ran = run(arguments[0], "in.pt", *arguments[1:])
    assert time.process_time() - started < 5
    assert ran.status in (0, 2)
    assert ran.err.count("\n") <= 2
    for path in tmp_path.glob("out.pt"):
        assert path.stat().st_size < 10_000


# --- what must not survive ---

MARK = b"MARKER"


class Foreign:
    def __init__(self) -> None:
        self.secret = MARK.decode()
        self.tensor = torch.tensor(list(MARK), dtype=torch.uint8)


def _saved(value: Any, folder: Path, **options: Any) -> bytes:
    torch.save(value, folder / "saved.pt", **options)
    return (folder / "saved.pt").read_bytes()


def _entries(folder: Path, **changes: bytes) -> list[zips.Entry]:
    members = crafted.unzipped(_saved({"w": torch.ones(3)}, folder))
    return zips.entries_of(members | {f"saved/{name}": data for name, data in changes.items()})


def _with_entry(entries: list[zips.Entry], **changes: Any) -> list[zips.Entry]:
    for name, value in changes.items():
        setattr(entries[1], name, value)
    return entries


def _slack() -> torch.Tensor:
    return torch.tensor(list(MARK + b"abcdef" + MARK), dtype=torch.uint8)


def _tensor_with_attribute() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.secret = MARK.decode()
    return tensor


def _noted(state: OrderedDict[str, Any]) -> OrderedDict[str, Any]:
    state.secret = MARK.decode()
    return state


PLANTED: dict[str, Callable[[Path], bytes]] = {
    "storage behind a view": lambda f: _saved({"w": _slack()[6:12], "f": torch.ones(1)}, f),
    "storage behind a view in the rest": lambda f: _saved({"state_dict": {"w": torch.ones(1)}, "x": _slack()[7:9]}, f),
    "legacy storage": lambda f: _saved(
        {"w": _slack()[6:12], "f": torch.ones(1)}, f, _use_new_zipfile_serialization=False
    ),
    "steps between": lambda f: _saved({"w": torch.cat([_slack(), _slack()])[0:36:12], "f": torch.ones(1)}, f),
    "foreign object": lambda f: _saved({"state_dict": {"w": torch.ones(2)}, "x": Foreign(), "y": [Foreign()]}, f),
    "attribute of a tensor": lambda f: _saved({"w": _tensor_with_attribute()}, f),
    "attribute of a mapping": lambda f: _saved(_noted(nn.Linear(2, 2).state_dict()), f),
    "comment": lambda f: zips.archive(_entries(f), comment=MARK),
    "gap": lambda f: zips.archive(_entries(f), gap=MARK),
    "between records": lambda f: zips.archive(_with_entry(_entries(f), before=MARK)),
    "padding": lambda f: zips.archive(_with_entry(_entries(f), local_extra=b"FB\x06\x00" + MARK)),
    "unused storage": lambda f: zips.archive(_entries(f, **{"data/9": MARK})),
    "another member": lambda f: zips.archive(_entries(f, **{"evil.py": MARK})),
    "behind the pickle": lambda f: zips.archive(
        _entries(f, **{"data.pkl": crafted.unzipped(_saved({"w": torch.ones(3)}, f))["saved/data.pkl"] + MARK})
    ),
    "location": lambda f: crafted.archived(
        crafted.members_of({"w": crafted.Rebuilt(crafted.named(location="MARKER"))}, _0=crafted.FOUR_FLOATS)
    ),
    "storage key": lambda f: crafted.archived(
        crafted.members_of({"w": crafted.Rebuilt(crafted.named("MARKER"))}, _MARKER=crafted.FOUR_FLOATS)
    ),
}


@pytest.mark.parametrize("place", PLANTED)
@pytest.mark.parametrize("arguments", [["out.pt"], ["out.safetensors"], ["out.pt", "--keep-rest"]])
def test_hidden_content_stays_behind(run, tmp_path, place, arguments):
    (tmp_path / "in.pt").write_bytes(PLANTED[place](tmp_path))
    assert MARK in (tmp_path / "in.pt").read_bytes()
    out = tmp_path / arguments[0]
    ran = run("convert", tmp_path / "in.pt", out, *arguments[1:])
    assert ran.status == 0, ran.err
    assert MARK not in out.read_bytes()


# --- what --keep-rest must keep ---

KEPT: dict[str, Any] = {
    "tuple keys": {(1, "a"): 2, ("x", (3,)): 4},
    "every plain key": {1: 1, None: 2, 2.5: 3, b"b": 4, 1 + 2j: 5, torch.float16: 6},
    "set": {1, "a", (2, 3), None},
    "counter": Counter([1, 1, 2]),
    "numbers": [0.1, -0.0, float("inf"), 2**200, -(2**70), True, 1 + 2j, None],
    "texts": ["", "x" * 70_000, "\x00\x1b", "\u00e9"],
    "octets": b"\x00\xff",
    "nested": [({"a": [(1,), []]},), {}],
    "dtype": torch.bfloat16,
    "random": random.Random(0).getstate(),
}


@pytest.mark.parametrize("name", KEPT)
def test_plain_values_survive(run, tmp_path, name):
    torch.save({"state_dict": {"module.w": torch.ones(2)}, "value": KEPT[name]}, tmp_path / "in.pt")
    ran = run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt", "--keep-rest")
    assert ran.status == 0, ran.err
    kept = torch.load(tmp_path / "out.pt", weights_only=True)["value"]
    assert repr(kept) == repr(KEPT[name]) if not isinstance(kept, set) else kept == KEPT[name]
    assert "dropped" not in ran.out


LOST: dict[str, tuple[Any, list[str]]] = {
    "foreign object twice": ((lambda foreign: {"a": foreign, "b": foreign})(Foreign()), ["value.a", "value.b"]),
    "foreign key": ({Foreign: 1}, ["value.<GlobalRef>"]),
    "set in a set": ({1, frozenset({2})}, ["value{"]),
    "attribute": (_noted(OrderedDict(a=1)), ["value.__dict__.secret"]),
    "range": ([range(3)], ["value[0]"]),
}


@pytest.mark.parametrize("name", LOST)
def test_whatever_is_lost_is_listed(run, tmp_path, name):
    value, places = LOST[name]
    torch.save({"state_dict": {"module.w": torch.ones(2)}, "value": value}, tmp_path / "in.pt")
    ran = run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt", "--keep-rest")
    assert ran.status == 0, ran.err
    dropped = [line for line in ran.out.splitlines() if line.startswith("dropped\t")]
    assert len(dropped) == len(places)
    assert all(line.startswith(f"dropped\t{place}") for line, place in zip(dropped, places, strict=True))
    torch.load(tmp_path / "out.pt", weights_only=True)


def test_an_average_keeps_the_versions_of_its_modules(run, tmp_path):
    average = nn.Sequential(nn.BatchNorm1d(2)).state_dict()
    torch.save({"state_dict": {"module.w": torch.ones(2)}, "ema_state_dict": average}, tmp_path / "in.pt")
    assert run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt", "--keep-rest").status == 0
    kept = torch.load(tmp_path / "out.pt", weights_only=True)["ema_state_dict"]
    assert kept._metadata == average._metadata


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.01), amsgrad=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "adafactor": lambda groups: torch.optim.Adafactor(groups),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, centered=True),
}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "multistep": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 4, 4, 5]),
    "onecycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=50, cycle_momentum=False),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[4],
    ),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
}


class _Training:
    """Train two groups of parameters for some steps on random inputs."""

    def __init__(self, optimizer: str, scheduler: str) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        groups = [
            {"params": self.net[0].parameters(), "weight_decay": 0.1},
            {"params": [*self.net[1].parameters(), *self.net[2].parameters()], "lr": 0.02},
        ]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.net(torch.randn(16, 4) + random.random() + np.random.rand()).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def saved(self) -> dict[str, Any]:
        return {
            "model": {f"_orig_mod.{name}": tensor for name, tensor in self.net.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": (torch.get_rng_state(), random.getstate(), np.random.get_state()),
            "history": defaultdict(list, loss=[1.0]),
        }

    def resume(self, saved: dict[str, Any]) -> None:
        self.net.load_state_dict(
            {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()}, strict=True
        )
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["rng"][0])
        random.setstate(saved["rng"][1])
        np.random.set_state(saved["rng"][2])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_training_goes_on_as_if_nothing_had_happened(run, tmp_path, optimizer, scheduler):
    first = _Training(optimizer, scheduler)
    first.train(3)
    torch.save(first.saved(), tmp_path / "in.pt")
    assert run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt", "--keep-rest").status == 0
    results = []
    for saved in (
        torch.load(tmp_path / "in.pt", weights_only=False),
        torch.load(tmp_path / "out.pt", weights_only=True),
    ):
        resumed = _Training(optimizer, scheduler)
        resumed.resume(saved)
        resumed.train(3)
        results.append((resumed.net.state_dict(), resumed.optimizer.param_groups))
    (weights, groups), (other_weights, other_groups) = results
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert [float(group["lr"]) for group in groups] == [float(group["lr"]) for group in other_groups]
