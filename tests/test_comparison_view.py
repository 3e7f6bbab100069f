"""What a person sees of a comparison: the verdict, every kind of difference, bars that tell how far, at any width."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
EVIL = "evil.[bold]\x1b[31m\u202e.weight"


def net() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in {
            "stem.weight": (8, 3),
            "stem.bias": (8,),
            **{f"blocks.{i}.linear.weight": (8, 8) for i in range(4)},
            "head.weight": (5, 8),
            "head.bias": (5,),
        }.items()
    } | {"stem.count": torch.tensor(7)}


def changed() -> dict[str, Tensor]:
    """Change one tensor in every way that there is."""
    state = net()
    state["stem.weight"] = state["stem.weight"] * 1.5
    state["stem.count"] = torch.tensor(700)
    state["blocks.0.linear.weight"] = state["blocks.0.linear.weight"] * 1.25
    state["blocks.1.linear.weight"] = state["blocks.1.linear.weight"].double()
    state["blocks.2.linear.weight"][0, 0] = math.nan
    state["tail.linear.weight"] = state.pop("blocks.3.linear.weight")
    state["head.weight"] = torch.ones(6, 8)
    del state["head.bias"]
    return {**state, EVIL: torch.ones(3)}


@pytest.fixture
def see(run, tmp_path, monkeypatch):
    """Show a comparison as a terminal of some width would."""

    def shown(a: Any, b: Any, *options: object, columns: int = 80, color: bool = False) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
        for path, value in zip(paths, (a, b), strict=True):
            torch.save(value, path)
        text = run("diff", *paths, *options, "--color", "always").out
        return text if color else plain(text)

    return shown


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if re.match(rf"[│├└─ ]*{re.escape(start)}", line))


@pytest.mark.parametrize("columns", [80, 120])
def test_every_kind_of_difference_is_seen(columns, see):
    text = see(net(), changed(), columns=columns)
    assert "DIFFERENT  in names, shapes, dtypes and values" in text
    for count in ("4 changed", "1 of another shape", "1 only in A", "1 only in B", "1 renamed", "1 identical"):
        assert re.search(rf"█ {count}(  |\n)", text), count
    assert "1 same values in another dtype" in text
    for line in (
        *("Only A    head.bias  float32 5", "Renamed   blocks.3.linear.weight → tail.linear.weight"),
        *("Shapes    head.weight  float32 [5, 8] → float32 [6, 8]", "float32 → float64 · 1 tensor · same values"),
    ):
        assert line in text
    assert max(map(len, text.splitlines())) <= columns


def test_the_most_changed_come_first_and_bars_tell_how_far(see):
    listed = see(net(), changed()).partition("most changed")[2].splitlines()[1:]
    rows = {line.split()[0]: line for line in listed}
    assert list(rows) == ["blocks.2.linear.weight", "stem.weight", "blocks.0.linear.weight", "stem.count"]
    assert "1 broken" in rows["blocks.2.linear.weight"]
    assert "NaN" in rows["blocks.2.linear.weight"]
    assert [rows[name].split()[2] for name in ("stem.weight", "blocks.0.linear.weight")] == ["50%", "25%"]
    bars = [rows[name].count("█") for name in ("blocks.2.linear.weight", "stem.weight", "blocks.0.linear.weight")]
    assert bars == [10, 10, 5]
    short = see(net(), changed(), "--top", 1)
    assert "... and 3 more: --top N lists N" in short
    assert "stem.weight" not in short


def test_the_tree_folds_what_is_frozen(see):
    state, other = net(), net()
    other["blocks.3.linear.weight"] = other["blocks.3.linear.weight"] * 1.5
    other["head.bias"][0] = math.inf
    other["stem.count"] += 1
    text = see(state, other, "--tree", columns=120)
    assert "frozen  3 tensors" in line_of(text, "[0-2]")
    assert "50%" in line_of(text, "linear")
    assert "weight frozen, bias 1 broken" in line_of(text, "head")
    assert "count counted on" in line_of(text, "stem")
    assert "most changed" not in text
    assert "most changed" in see(state, other, "--tree", "--top", 3)
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("head")}
    assert "2 tensors only in A" in line_of(see(state, headless, "--tree"), "head  ")


def test_foreign_text_is_text(see):
    settings = (
        {"hyper_parameters": {"[red]rate\x1b[2J": 0.0, "gone": 1}},
        {"hyper_parameters": {"[red]rate\x1b[2J": 0.05}},
    )
    text = see({"state_dict": net(), **settings[0]}, {"state_dict": changed(), **settings[1]}, "--metadata", color=True)
    assert r"evil.[bold]\x1b[31m\u202e.weight" in plain(text)
    assert r"[red]rate\x1b[2J  0 → 0.05" in plain(text)
    assert "gone  only in A  1" in plain(text)
    assert not re.search(r"\x1b(?!\[[0-9;]*m)|\u202e", text)


def test_same_and_unknown_do_not_look_alike(see):
    assert "SAME  9 tensors, equal to the last bit" in see(net(), net())
    assert "SAME  in every number" in see({"w": torch.tensor([0.0])}, {"w": torch.tensor([-0.0])})
    near = {name: tensor + (tensor.dtype.is_floating_point and 1e-6) for name, tensor in net().items()}
    assert "SAME  within rtol 0, atol 1e-05" in see(net(), near, "--atol", 1e-5)
    unreadable = {**net(), "m": torch.empty(3, device="meta")}
    text = see(unreadable, unreadable)
    assert "UNKNOWN" in text
    assert "SAME" not in text


def test_counters_do_not_drown_the_weights(see, run, tmp_path, monkeypatch):
    other = {**net(), "head.bias": net()["head.bias"] * 1.5, "stem.count": torch.tensor(10_000)}
    see(net(), other)
    monkeypatch.setenv("COLUMNS", "120")
    text = plain(
        run("diff", *(tmp_path / name for name in ("a.pt", "b.pt", "a.pt", "none.pt")), "--color", "always").out
    )
    row = line_of(text, "b.pt")
    assert row.split()[1:6] == ["█" * 15, "50%", "2", "of", "9"]
    assert row.endswith("head.bias")
    assert "same" in line_of(text, "a.pt")
    assert "none.pt: could not be compared" in text


def test_colour_changes_nothing_but_the_colour(see, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    painted = see(net(), changed(), "--tree", "--top", 9, color=True)
    assert "\x1b[33m" in painted
    assert len(plain(painted)) < len(painted)


def test_a_terminal_without_colour_or_unicode(tmp_path):
    for name, value in (("a.pt", net()), ("b.pt", changed())):
        torch.save(value, tmp_path / name)
    code = (
        "import sys; sys.stdout.isatty = lambda: True; from ckptool.cli import main;"
        " sys.exit(main(['diff', 'a.pt', 'b.pt', '--tree', '--top', '9']))"
    )
    environment = {
        "TERM": "dumb",
        "PYTHONIOENCODING": "ascii",
        "COLUMNS": "80",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout.isascii()
    assert "\x1b" not in ran.stdout
    assert "##" in ran.stdout
    assert "# 4 changed" in ran.stdout
    assert "= 1 identical" in ran.stdout
