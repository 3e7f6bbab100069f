"""The pictures of diff --plot: every tensor in its place, foreign text as text, pages that need no network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from support.strict_json import strictly
from torch import Tensor

pytest.importorskip("matplotlib", reason="the picture is drawn by matplotlib")

EVIL = "evil.</script><img src=x onerror=alert(1)>$\\frac{&\x1b\u202e.weight"
SVG = "{http://www.w3.org/2000/svg}"
GREY = "#9a9a9a"


def net(blocks: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {"stem.weight": torch.randn(8, 3, generator=generator), "stem.bias": torch.randn(8, generator=generator)}
    for block in range(blocks):
        state[f"blocks.{block}.attn.weight"] = torch.randn(8, 8, generator=generator)
        state[f"blocks.{block}.mlp.weight"] = torch.randn(8, 8, generator=generator)
        state[f"blocks.{block}.mlp.bias"] = torch.randn(8, generator=generator)
    return {**state, EVIL: torch.randn(3, generator=generator), "steps": torch.tensor(1)}


def moved(share: float = 0.5, blocks: int = 3) -> dict[str, Tensor]:
    """Move the stem by a share, the attention by a tenth of it, freeze the last block and break a bias."""
    state = net(blocks)
    state["stem.weight"] = state["stem.weight"] * (1 + share)
    for block in range(blocks - 1):
        state[f"blocks.{block}.attn.weight"] = state[f"blocks.{block}.attn.weight"] * (1 + share / 10)
    state["blocks.0.mlp.bias"][0] = math.nan
    state["blocks.0.mlp.weight"] = torch.ones(2, 2)
    state[EVIL] = state[EVIL] * (1 + share)
    return {**state, "steps": torch.tensor(1000)}


@pytest.fixture
def draw(run, tmp_path) -> Callable[..., str]:
    """Draw states against the first of them, and give the file."""

    def drawn(suffix: str, *states: dict[str, Tensor], status: int = 1) -> str:
        paths = [tmp_path / f"{name}.pt" for name in "abcd"[: len(states)]]
        for path, state in zip(paths, states, strict=True):
            torch.save(state, path)
        target = tmp_path / f"new{suffix}"
        target.unlink(missing_ok=True)
        answer = run("diff", *paths, "--quiet", "--plot", target)
        assert (answer.status, answer.out, answer.err) == (status, "", "")
        return target.read_text("utf-8")

    return drawn


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def markers(svg: str, color: str = "") -> list[tuple[float, float]]:
    """Give the places of the points of one colour, the legend's own not among them; of all marks without a colour."""
    groups = list(ElementTree.fromstring(svg).iter(f"{SVG}g"))
    scattered = [group for group in groups if group.get("id", "").startswith("PathCollection") or not color]
    used = {use: use for group in scattered for use in group.iter(f"{SVG}use") if color in use.get("style", "")}
    return [(float(use.get("x", 0)), float(use.get("y", 0))) for use in used]


def test_every_tensor_has_its_place(draw):
    svg = draw(".svg", net(), moved())
    shown = texts(svg)
    assert {"stem.weight", "blocks.1.attn.weight", "blocks.2.mlp.bias"} <= set(shown)
    assert {"unchanged", "NaN or inf", "not comparable"} <= set(shown)
    assert "steps" not in shown
    assert "5 of 12 tensors changed, 1 with NaN or inf, 1 of another shape, 1 counters not drawn" in shown
    assert any(text.startswith("most changed: stem.weight 50%, evil.") for text in shown)
    assert len(markers(svg, GREY)) == 6  # four of the last block and the stem's bias, and the other bias


def test_a_change_ten_times_as_large_is_as_much_higher(draw):
    svg = draw(".svg", net(), moved())
    (stem,) = markers(svg, "fill: #0072b2")
    attention = markers(svg, "fill: #e69f00")
    ticks = {text.text: float(text.get("y", 0)) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}
    heights = [(y - stem[1]) / (ticks["0%"] - ticks["50%"]) for _, y in attention]
    assert heights == pytest.approx([0.9, 0.9], abs=0.001)  # of the way from 50% down to zero
    assert [x for x, _ in (stem, *attention)] == sorted(x for x, _ in (stem, *attention))


def test_a_wide_range_is_logarithmic(draw):
    state = net()
    other = {**state, "stem.weight": state["stem.weight"] * 1.5, "stem.bias": state["stem.bias"] * 1.00001}
    shown = texts(draw(".svg", state, other))
    assert {"0.001%", "0.1%", "10%"} <= set(shown)
    assert "0%" not in shown


def test_many_tensors_are_named_by_their_modules(draw):
    shown = texts(draw(".svg", net(100), moved(blocks=100)))
    modules = [text for text in shown if re.fullmatch(r"blocks\.\d+", text)]
    assert 20 < len(modules) <= 40
    assert "blocks.99.mlp.bias" not in shown
    shown = texts(draw(".svg", net(30), moved(blocks=30)))
    assert {f"blocks.{index}" for index in range(30)} <= set(shown)
    assert {"blocks.*.attn", "stem"} <= set(shown)


def test_the_tenth_layer_comes_after_the_second(run, tmp_path):
    import safetensors.torch

    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, factor in zip(paths, (1, 2), strict=True):
        safetensors.torch.save_file({f"layers.{i}.w": torch.ones(2, 2) * (i + factor) for i in range(12)}, path)
    assert run("diff", *paths, "--plot", tmp_path / "new.html").status == 1
    spots = sorted(read((tmp_path / "new.html").read_text("utf-8")).spots)
    assert [name for _, _, name, _ in spots] == [f"layers.{i}.w" for i in range(12)]


def test_foreign_text_is_text(draw):
    svg = draw(".svg", net(), moved())
    name = EVIL.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    assert any(text.startswith(name[:20]) and text.endswith(name[-20:]) for text in texts(svg))
    assert "\x1b" not in svg
    page = draw(".html", net(), moved())
    assert "<img" not in page
    assert not {"\x1b", "\u202e"} & set(page)
    assert name in [spot[2] for spot in read(page).spots]


class Page(HTMLParser):
    """Read a page: its tags, what they refer to, the data in it, and its SVG."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.policy = ""
        self.data = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.references += [found[name] or "" for name in found if name in ("src", "href", "xlink:href", "action")]
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        if tag not in ("meta", "img"):
            self.open.append(f"{tag}#{found.get('id')}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().partition("#")[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script#spots":
            self.data += data

    @property
    def spots(self) -> list[Any]:
        return json.loads(self.data)


def read(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_a_page_stands_alone(draw):
    text = draw(".html", net(), moved())
    page = read(text)
    assert not re.search(r"https?://|@import|//cdn", text)
    assert page.policy.startswith("default-src 'none'")
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert "fetch(" not in text
    assert "innerHTML" not in text


def test_the_pointer_finds_the_numbers_where_they_were_drawn(draw, run, tmp_path):
    page, svg = read(draw(".html", net(), moved())), draw(".svg", net(), moved())
    told = strictly(run("diff", tmp_path / "a.pt", tmp_path / "b.pt", "--json").out)
    lines = {name: text for _, _, name, text in page.spots}
    assert len(lines) == len(page.spots) == 12
    value = next(value for value in told["values"] if value["key"] == "blocks.0.attn.weight")
    assert f"max abs {value['max_abs']:.4g}" in lines["blocks.0.attn.weight"]
    assert "relative change 5%\n64 of 64 elements changed" in lines["blocks.0.attn.weight"]
    assert lines["stem.bias"] == "identical"
    assert "B is float32 [2, 2]" in lines["blocks.0.mlp.weight"]
    width, height = (float(side) for side in ElementTree.fromstring(svg).get("viewBox", "").split()[2:])
    drawn = markers(svg)
    for x, y, name, _ in page.spots:
        assert min(math.hypot(x * width - at, y * height - up) for at, up in drawn) < 0.1, name


def test_several_checkpoints_are_a_line_each(draw):
    svg = draw(".svg", net(), moved(0.1), moved(0.2), moved(0.4))
    assert {"b.pt", "c.pt", "d.pt", "a.pt → 3 checkpoints"} <= set(texts(svg))
    spots = read(draw(".html", net(), moved(0.1), moved(0.2), moved(0.4))).spots
    stems = [(y, text.splitlines()[0]) for _, y, name, text in spots if name == "stem.weight"]
    assert [title for _, title in sorted(stems, reverse=True)] == ["b.pt", "c.pt", "d.pt"]
    assert len({round(y, 4) for _, y, name, _ in spots if name == "stem.bias"}) == 3


def test_nothing_moved_and_nothing_common(draw):
    assert "no weight moved" in texts(draw(".svg", net(), net(), status=0))
    assert "no weight moved" in texts(draw(".svg", {"a": torch.ones(2)}, {"b": torch.zeros(3)}))


def test_the_same_comparison_gives_the_same_bytes(draw):
    assert draw(".svg", net(), moved()) == draw(".svg", net(), moved())
    assert draw(".html", net(), moved()) == draw(".html", net(), moved())


def test_pixels_show_it_too(run, tmp_path):
    image_of = pytest.importorskip("PIL.Image").open
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for path, state in zip(paths, (net(), moved()), strict=True):
        torch.save(state, path)
    answer = run("diff", *paths, "--json", "--plot", tmp_path / "new.png")
    assert (answer.status, strictly(answer.out)["same"]) == (1, False)
    with image_of(tmp_path / "new.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0xD0, 0, 0)} <= colors


@pytest.mark.parametrize(
    ("target", "other", "reason"),
    [
        ("new.jpg", "a.pt", "the suffix names no picture; use .svg, .png, .html"),
        ("a.pt", "a.pt", "the suffix names no picture"),
        ("there.svg", "a.pt", "exists already"),
        ("none/new.svg", "a.pt", "its folder does not exist"),
        ("new.svg", "none.pt", "there is no such file"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(target, other, reason, run, tmp_path):
    torch.save(net(), tmp_path / "a.pt")
    (tmp_path / "there.svg").write_text("mine")
    answer = run("diff", tmp_path / "a.pt", tmp_path / other, "--plot", tmp_path / target)
    assert answer.status == 2
    assert len(answer.err.splitlines()) == 1
    assert reason in answer.err
    assert (tmp_path / "there.svg").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "there.svg"]


def test_without_matplotlib_it_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ckptool.writers.pictures.find_spec", lambda name: None)
    answer = run("diff", tmp_path / "a.pt", tmp_path / "b.pt", "--plot", tmp_path / "new.html")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.count("\n") == 1
    assert "pip install" in answer.err
    assert "no such file" not in answer.err


def test_a_picture_of_what_could_be_compared(run, tmp_path):
    for name, state in (("a.pt", net()), ("b.pt", moved())):
        torch.save(state, tmp_path / name)
    paths = [tmp_path / name for name in ("a.pt", "b.pt", "none.pt")]
    answer = run("diff", *paths, "--plot", tmp_path / "new.svg")
    assert answer.status == 2
    assert "a.pt → b.pt" in texts((tmp_path / "new.svg").read_text("utf-8"))


def test_a_name_is_no_formula(draw):
    state = {"$\\frac{": torch.ones(2, 2), "_hidden.$x$": torch.ones(2)}
    shown = texts(draw(".svg", state, {name: tensor * 2 for name, tensor in state.items()}))
    assert "$\\frac{" in shown
    assert any("_hidden" in text for text in shown)
