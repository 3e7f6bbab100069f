"""README.md cannot drift: its commands are run, what it shows is compared, its tables are made anew."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomllib
import torch
from support.commands import command_environment
from support.option_reference import README, with_table

from ckptool.model.checks import CHECKS

ROOT = README.parent
PICTURES = ROOT / "examples" / "pictures"
TEXT = README.read_text()

# What a line answers where that is not 0.
STATUS = {
    "ckptool diff epoch1.ckpt epoch2.ckpt --tree": 1,
    "ckptool diff base.ckpt epoch*.ckpt": 1,
    "ckptool diff epoch1.ckpt epoch2.ckpt --metadata --top 20": 1,
    "ckptool diff epoch1.ckpt epoch2.ckpt --plot change.html": 1,
    "ckptool verify epoch1.ckpt epoch2.ckpt --model net.py:Net --images photos/0": 2,
    "examples/audit.sh runs 4": 1,
}
# Lines that are not run here, and why.
NOT_RUN = {
    "python3 -m venv --clear": "this is what runs the tests",
    "python3 -m venv .venv": "it installs torch; its two commands of ckptool are run",
    "python examples/train_digits.py --pictures photos": "the fixture runs it once for all",
    "ckptool verify examples/digits_wrong_strip.pt --as-is": "the test of its picture runs it",
}
# The script is imported by every command that names its network: Lightning itself would take seconds each time.
LIGHTNING = "LightningModule = ModelCheckpoint = object\n"
NET = """
import torch
from torch import Tensor, nn
from torch.nn import functional

{classes}

Net = DigitsNet
"""
MODEL = "import sys\nsys.path.insert(0, '.')\nfrom net import Net\nnet = model = Net()\n"


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    text: str
    shown: str | None  # what the block of text right below says it prints

    @property
    def name(self) -> str:
        return f"line {self.line}: {self.text.splitlines()[0][:50]}"


def blocks() -> Iterator[Block]:
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", TEXT, re.DOTALL | re.MULTILINE):
        yield Block(TEXT[: found.start()].count("\n") + 2, found[1], found[2], found[3])


def in_language(*languages: str) -> pytest.MarkDecorator:
    found = [block for block in blocks() if block.language in languages]
    return pytest.mark.parametrize("block", found, ids=[block.name for block in found])


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    callbacks = tmp_path_factory.mktemp("stand_in") / "lightning" / "pytorch" / "callbacks"
    for folder in (callbacks, callbacks.parent, callbacks.parents[1]):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(LIGHTNING)
    found = command_environment(tmp_path_factory.mktemp("bin"))
    paths = f"{callbacks.parents[2]}{os.pathsep}{found['PYTHONPATH']}"
    return found | {"COLUMNS": "100", "PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"}


@pytest.fixture(scope="module")
def stage(tmp_path_factory, environment) -> Path:
    """A folder with every file that the README names."""
    stage = tmp_path_factory.mktemp("stage")
    shutil.copytree(ROOT / "examples", stage / "examples")
    source = (ROOT / "examples" / "train_digits.py").read_text()
    classes = source[source.index("class Block(") : source.index("class DigitsClassifier(")]
    (stage / "net.py").write_text(NET.format(classes=classes))
    checkpoint = torch.load(stage / "examples" / "digits.ckpt", weights_only=True)
    (stage / "runs").mkdir()
    generator = torch.Generator().manual_seed(0)
    for epoch, name in enumerate(("base", "epoch1", "epoch2", "last")):
        torch.save(checkpoint | {"epoch": epoch + 4, "global_step": (epoch + 4) * 22}, stage / f"{name}.ckpt")
        shutil.copy(stage / f"{name}.ckpt", stage / "runs" / f"epoch={epoch:02}.ckpt")
        for value in checkpoint["state_dict"].values():
            if value.is_floating_point() and value.dim() > 1:
                value += 0.01 * value.std() * torch.randn(value.shape, generator=generator)
    for command in (
        "python examples/train_digits.py --pictures photos",
        "ckptool strip-prefixes last.ckpt weights.pt",
        "ckptool convert last.ckpt weights.safetensors",
        "ckptool convert --dtype bfloat16 last.ckpt half.safetensors",
        "ckptool convert --manifest out.json last.ckpt out.safetensors",
    ):
        subprocess.run(command, shell=True, cwd=stage, env=environment, check=True, capture_output=True)
    return stage


@pytest.fixture
def place(stage, tmp_path) -> Path:
    """A copy of the stage without what the commands of the README write."""
    return Path(shutil.copytree(stage, tmp_path / "place"))


WRITTEN = ("weights.pt", "weights.safetensors", "half.safetensors", "out.safetensors", "out.json")


@in_language("sh")
def test_every_command_does_what_it_is_listed_for(block, place, environment):
    commands = [re.sub(r"\s+#.*", "", line).strip() for line in block.text.splitlines()]
    if any("convert" in command for command in commands):
        for name in WRITTEN:
            (place / name).unlink()
    for command in commands:
        if not any(command.startswith(start) for start in NOT_RUN):
            status, out = answer(command, place, environment)
            assert status == STATUS.get(command, 0), f"{command}\n{out}"


def answer(command: str, place: Path, environment: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(command, shell=True, cwd=place, env=environment, capture_output=True, text=True, timeout=200)
    assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"
    return done.returncode, f"{done.stdout}{done.stderr if done.returncode else ''}"


@in_language("console")
def test_every_session_shows_what_is_answered(block, place, environment):
    for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE):
        _, out = answer(f"{command} --color always", place, environment)  # as a terminal shows it
        seen = re.sub(r" +$", "", re.sub(r"\x1b\[[0-9;]*m", "", out), flags=re.MULTILINE)
        assert re.fullmatch(pattern(shown), seen, re.DOTALL), f"{command}\n{seen}"


def pattern(shown: str) -> str:
    """What ``...`` leaves out is anything, in a line or of lines."""
    return re.escape(shown).replace(r"\.\.\.\n", ".*").replace(r"\.\.\.", ".*")


@in_language("python")
def test_every_python_block_runs_and_prints_what_is_shown(block, place, environment):
    script = [sys.executable, "-c", MODEL + block.text]
    done = subprocess.run(script, cwd=place, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (block.shown or "")


@in_language("toml")
def test_the_settings_are_understood(block, place, environment):
    (place / "ckptool.toml").write_text(block.text)
    assert answer("ckptool verify weights.pt --quiet", place, environment)[0] == 0
    assert answer("ckptool verify last.ckpt --quiet", place, environment)[0] == 1  # a warning means no there


def test_the_two_first_commands_are_run_as_they_stand(place, environment):
    (line,) = [line for line in TEXT.splitlines() if line.startswith("python3 -m venv .venv")]
    for command in line.split(" && ")[-2:]:
        assert answer(command.removeprefix(".venv/bin/"), place, environment)[0] == 0


def test_nothing_is_listed_that_is_not_in_the_readme():
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks() for line in block.text.splitlines()]
    assert set(STATUS) <= set(lines)
    assert all(any(line.startswith(start) for line in lines) for start in NOT_RUN)


def test_no_block_is_of_a_kind_that_nothing_checks():
    assert {block.language for block in blocks()} <= {"sh", "console", "python", "toml", ""}
    assert sum(block.language == "" for block in blocks()) == 2  # key names, and what the training script said


def test_the_table_of_options_is_that_of_the_commands():
    assert with_table(TEXT) == TEXT, "run python tests/support/option_reference.py"


def test_the_table_of_checks_is_that_of_verify():
    rows = [f"| {check.code} `{check.id}` | {check.asks} |" for check in CHECKS]
    assert re.findall(r"^\| CK\d+ .*$", TEXT, re.MULTILINE) == rows


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!https?:)[^)]+)\)", TEXT))))
def test_every_link_leads_somewhere(link):
    if not link.startswith("#"):
        assert (ROOT / link).exists()
        return
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    assert link[1:] in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_example_is_listed():
    files = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh")}
    assert files == set(re.findall(r"^\| \[`(\w+\.\w+)`\]", TEXT, re.MULTILINE))


@pytest.fixture(scope="module")
def draw():
    spec = importlib.util.spec_from_file_location("draw_pictures", PICTURES / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "numbers"), [("inspect.svg", True), ("verify.svg", False)])
def test_every_picture_is_what_is_answered(draw, stage, environment, monkeypatch, name, numbers):
    """Style is rich's own, and changes with it; what an untrained network answers differs between machines."""
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    command = draw.PICTURES[name]
    now, then = draw.drawn(command, draw.shown_by(command, stage)), (PICTURES / name).read_text()
    assert letters(now, numbers=numbers) == letters(then, numbers=numbers), "run python examples/pictures/draw.py"
    assert not re.findall(r"url\((?!#)|href=|@import", then)


def letters(picture: str, *, numbers: bool) -> str:
    text = "".join(html.unescape(part) for part in re.findall(r"<text [^>]*>([^<]*)</text>", picture))
    words = re.sub(r"\s+", "", text)
    return words if numbers else re.sub(r"[\d.e█-]+", "", words[: words.index("Answers")])


def test_the_settings_shown_are_toml():
    assert all(tomllib.loads(block.text) for block in blocks() if block.language == "toml")
