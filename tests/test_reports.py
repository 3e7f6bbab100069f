"""What is shown is safe, exact and readable: escapes, numbers, strict JSON, the view for people."""

from __future__ import annotations

import math
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.filesize import decimal
from support.strict_json import strictly

from ckptool.formats import open_checkpoint
from ckptool.model.inspection import Inspection, InspectOptions
from ckptool.operations.describe import describe
from ckptool.reports.canvas import Canvas
from ckptool.reports.inspect_lines import lines
from ckptool.reports.inspect_view import view
from ckptool.reports.json import answer_json, to_json
from ckptool.reports.phrases import value_phrase
from ckptool.reports.text import count_text, plural, row, safe_text, shape_text, shorten, size_text

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "data" / "golden"

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12) | st.text("\\xuU05c1b\x1b", max_size=12)
INVISIBLE = "\u034f\u115f\u1160\u17b4\u180b\u2800\u3164\ufe0f\uffa0\U000e0100"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer1.0.conv1.weight", "layer1.0.conv1.weight"),
        ("größe.权重.😀", "größe.权重.😀"),
        ("[/x][bold]:smile:", "[/x][bold]:smile:"),
        ("a\x1b[2J\x1b]52;c;aGk=\x07", r"a\x1b[2J\x1b]52;c;aGk=\x07"),
        ("a\nPASS b", r"a\x0aPASS b"),
        ("a\r\tb\x00", r"a\x0d\x09b\x00"),
        ("\x7f\x80\x9b", r"\x7f\x80\x9b"),
        ("\u202edcba\u2066", r"\u202edcba\u2066"),
        ("w\u200b\u200d\ufeff", r"w\u200b\u200d\ufeff"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("\ud800\udcff", r"\ud800\udcff"),
        ("\ue000\U000e0041", r"\ue000\U000e0041"),
        ("a\u3164b\ufe0f", r"a\u3164b\ufe0f"),
        (r"C:\models\a.pt", r"C:\models\a.pt"),
        (r"a\x1b", r"a\x5cx1b"),
    ],
)
def test_foreign_text_is_escaped(text: str, shown: str) -> None:
    assert safe_text(text) == shown


@given(ANY_TEXT)
def test_shown_text_holds_nothing_that_acts(text: str) -> None:
    shown = safe_text(text)
    assert shown.isprintable()
    assert not any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in shown)
    assert not set(INVISIBLE) & set(shown)


@given(ANY_TEXT, ANY_TEXT)
def test_two_names_never_look_the_same(one: str, other: str) -> None:
    assert (safe_text(one) == safe_text(other)) == (one == other)


@given(ANY_TEXT, ANY_TEXT)
def test_a_line_has_as_many_cells_as_it_was_given(one: str, other: str) -> None:
    assert row(one, None, other, 3).split("\t") == [safe_text(one), "", safe_text(other), "3"]


@pytest.mark.parametrize("nbytes", [0, 1, 2, 999, 1000, 1001, 999_949, 1_000_000, 123_456_789, 10**9, 10**15])
def test_sizes_are_written_as_rich_writes_them(nbytes: int) -> None:
    assert size_text(nbytes) == decimal(nbytes)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (10_000, "10.0 k"),
        (11_173_962, "11.2 M"),
        (7 * 10**9, "7.0 B"),
        (2 * 10**12, "2.0 T"),
    ],
)
def test_counts_are_short(count: int, text: str) -> None:
    assert count_text(count) == text


def test_words_agree_with_their_number() -> None:
    assert [plural(count, "tensor") for count in (0, 1, 1234)] == ["0 tensors", "1 tensor", "1,234 tensors"]
    assert [shape_text(shape) for shape in ((64, 3, 7, 7), (), (0, 3), None)] == ["64x3x7x7", "scalar", "0x3", "?"]


def test_long_text_keeps_its_ends_its_length_and_a_checksum() -> None:
    one, other = "a" * 500_000 + "x" + "b" * 500_000, "a" * 500_000 + "y" + "b" * 500_000
    assert shorten("short", 80) == "short"
    assert len(shorten(one, 80)) == 80
    assert "1,000,001 characters" in shorten(one, 80)
    assert shorten(one, 80) != shorten(other, 80)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (math.nan, "NaN"),
        ([math.inf, -math.inf, 1.5], ["Infinity", "-Infinity", 1.5]),
        ({"deep": {"er": (math.nan, 1)}}, {"deep": {"er": ["NaN", 1]}}),
        (2**53 + 1, 2**53 + 1),
        pytest.param(10**4400, hex(10**4400), id="too long for decimal"),
        (0.1 + 0.2, 0.30000000000000004),
        (True, True),
        (None, None),
        ([{"key": '}, {"key": '}, {"key": "}, {", "more": [{"key": "], ["}]}, {}], ...),
        ([["], [", 1], ["}, {", 2]], ...),
        ("\x7f\x9b\u202e\ud800", "\x7f\x9b\u202e\ud800"),
    ],
)
def test_json_is_strict_and_exact(value: Any, read: Any) -> None:
    text = to_json({"field": value, "empty": []})
    assert strictly(text) == {"field": value if read is ... else read, "empty": []}
    assert text.isascii()
    assert all(line.isprintable() for line in text.splitlines())


def test_several_answers_are_one_document() -> None:
    assert strictly(answer_json("x/1", [{"a": 1}], several=False)) == {"schema": "x/1", "a": 1}
    assert strictly(answer_json("x/1", [{"a": 1}, {"b": 2}], several=True)) == {
        "schema": "x/1",
        "files": [{"a": 1}, {"b": 2}],
    }


@pytest.mark.parametrize(
    ("value", "phrase"),
    [
        ("adam", "adam"),
        (["a", 1, None], "['a', 1, None]"),
        (0.1 + 0.2, "0.3"),
        (list(range(20)), "[0, 1, 2, 3, 4, 5, 6, 7, ... 12 more]"),
        ({"lr": 0.1, "n": [1]}, "{lr: 0.1, n: [1]}"),
        ({"$class": "my.Config", "lr": 0.1}, "my.Config(lr=0.1)"),
        ({"$tensor": "float32", "shape": [2, 3]}, "tensor(float32, [2, 3])"),
        ({"a": {"b": {"c": {"d": {"e": 1}}}}}, "{a: {b: {c: {d: {... 1 more}}}}}"),
    ],
)
def test_values_are_one_short_line(value: Any, phrase: str) -> None:
    assert value_phrase(value) == phrase


def inspected(**options: Any) -> Inspection:
    with open_checkpoint(Path("examples/digits.ckpt")) as checkpoint:
        return describe(checkpoint, InspectOptions(**options))


# To rewrite a golden file after a look at it: write ``drawn`` into it.
@pytest.mark.parametrize(
    ("name", "options", "canvas"),
    [
        ("inspect_80", {}, Canvas(80, color=False)),
        ("inspect_120", {}, Canvas(120, color=False)),
        ("inspect_ascii", {}, Canvas(80, color=False, unicode=False)),
        ("tensors_80", {"tensors": True, "sort": "size"}, Canvas(80, color=False)),
        ("tree_80", {"tree": True}, Canvas(80, color=False)),
        ("stats_80", {"statistics": True}, Canvas(80, color=False)),
    ],
)
def test_the_view_is_as_it_was_found_good(
    name: str, options: dict[str, Any], canvas: Canvas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    drawn = view(inspected(**options), canvas)
    assert drawn == (GOLDEN / f"{name}.txt").read_text("utf-8")
    assert max(map(len, drawn.splitlines())) <= canvas.width or name == "tree_80"
    assert canvas.unicode or drawn.isascii()


def test_the_lines_are_as_they_were_found_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    written = "".join(f"{line}\n" for line in lines(inspected(tensors=True, tree=True)))
    assert written == (GOLDEN / "inspect.tsv").read_text("utf-8")


def test_colour_changes_nothing_but_the_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for options in ({}, {"tensors": True}, {"tree": True}):
        found = inspected(**options)
        painted = view(found, Canvas(80, color=True))
        assert "\x1b[" in painted
        assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == view(found, Canvas(80, color=False))
