"""At home in a shell: plain lines for cut, awk and jq, dumb and narrow terminals, the C locale, paths of Windows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest
import torch
from support.strict_json import strictly
from support.terminal import on_a_terminal

from ckptool.model.verification import Check, Verification
from ckptool.reports.github import write_github
from ckptool.reports.sarif import write_sarif

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples" / "digits.ckpt"
WRONG = ROOT / "examples" / "digits_wrong_strip.pt"


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Run a line of bash with this ``ckptool`` in the C locale."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "ckptool").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ckptool "$@"\n')
    (folder / "ckptool").chmod(0o755)
    torch.save({"größe.weight": torch.ones(2, 2), "tab\there\n.weight": torch.ones(3)}, folder / "odd name.pt")
    for path in (DIGITS, WRONG):  # the lines are about cells and fields, not about where the repository lies
        shutil.copy(path, folder)
    variables = {"LC_ALL": "C", "PYTHONPATH": str(ROOT), "D": DIGITS.name, "W": WRONG.name}
    environment = os.environ | variables | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}

    def run_line(line: str) -> str:
        command = ["bash", "-o", "pipefail", "-c", line]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    return run_line


TENSORS = 33
OF_TENSORS = "ckptool inspect --tensors $D | awk -F'\\t' '$1 == \"tensor\"'"
LINES = {
    "cut": ("ckptool inspect --tensors $D | cut -f1 | grep -c '^tensor$'", f"{TENSORS}\n"),
    "awk": ("ckptool inspect --tensors $D | awk -F'\\t' '$1 == \"tensor\" {n += $5} END {print n}'", None),
    "sort": (f"{OF_TENSORS} | sort -t$'\\t' -k5,5nr | head -1 | cut -f2", "blocks.1.conv2.weight\n"),
    "odd names": ("ckptool inspect --tensors 'odd name.pt' | awk -F'\\t' '$1 == \"tensor\" {print NF}' | uniq", "6\n"),
    "failed checks": ("ckptool verify $D | awk -F'\\t' '$1 == \"check\" && $3 == \"warn\" {print $6}'", "CK301\n"),
    "status in a condition": ("if ckptool diff $D $W --quiet; then echo same; else echo other; fi", "same\n"),
    "wrote": ("ckptool strip-prefixes -q --force $D out.pt && ckptool inspect out.pt | cut -f1 | head -1", "path\n"),
    "all of the help": ("ckptool --help verify | sed '1,/^Commands/d' | grep -c '^  '", "5\n"),
    "annotations": ("ckptool verify $D --output github | cut -d: -f3 | cut -d' ' -f1 | head -1", "warning\n"),
}


@pytest.mark.parametrize("name", LINES)
def test_plain_lines_are_made_for_the_tools_of_a_shell(shell, name):
    line, expected = LINES[name]
    said = shell(line)
    if name == "awk":
        saved = torch.load(DIGITS, weights_only=True)["state_dict"].values()
        expected = f"{sum(tensor.nbytes for tensor in saved)}\n"
    assert said == expected


WARNED = '.files[].checks[] | select(.status == "warn") | .code'
SUMS = '.files[] | "\\(.sha256)  \\(.name)"'
DESCRIBED = "ckptool convert -q --force $D out.safetensors --manifest out.json"
JQ = {
    "inspect": ("ckptool inspect --json --tensors $D | jq '.tensors | length'", f"{TENSORS}\n"),
    "diff": ("ckptool diff -q --json $D $W | jq -r '.same'", "true\n"),
    "convert": ("ckptool convert -q --json --force $D out.safetensors | jq -r '.map | length'", f"{TENSORS}\n"),
    "verify": (f"ckptool verify --json $D $W | jq -r '{WARNED}' | uniq", "CK301\n"),
    "manifest": (f"{DESCRIBED} && jq -r '{SUMS}' out.json | sha256sum -c", "out.safetensors: OK\n"),
}


@pytest.mark.parametrize("name", JQ)
@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_documents_are_made_for_jq(shell, name):
    line, expected = JQ[name]
    assert shell(line) == expected


VIEWS = {
    "inspect": ["inspect", str(DIGITS)],
    "tensors": ["inspect", str(DIGITS), "--tensors"],
    "diff": ["diff", str(DIGITS), str(WRONG)],
    "verify": ["verify", str(DIGITS)],
    "dry run": ["strip-prefixes", str(DIGITS), "--dry-run"],
    "refusal": ["inspect", "absent.pt"],
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_terminal_that_wants_no_colour_gets_none(name):
    assert "\x1b" not in on_a_terminal(VIEWS[name], 80, TERM="dumb")
    assert "\x1b[3" not in on_a_terminal(VIEWS[name], 80, NO_COLOR="1")


@pytest.mark.parametrize("name", [name for name in VIEWS if name in ("inspect", "diff", "verify")])
@pytest.mark.parametrize("folder", ["", "a folder of a long name " * 4])
def test_a_narrow_terminal_in_ascii_is_filled_and_not_overrun(name, folder, tmp_path):
    (tmp_path / folder).mkdir(exist_ok=True)
    line = [
        shutil.copy(word, tmp_path / folder / Path(word).name) if Path(word).is_file() else word for word in VIEWS[name]
    ]
    shown = on_a_terminal(line, 44, TERM="dumb", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert shown.isascii()
    # Commands are there to be copied, and notes are lines of stderr: neither is broken.
    drawn = [line for line in shown.partition("\nNext ")[0].splitlines() if not line.startswith("note:")]
    assert len(drawn) > 5
    assert max(map(len, drawn)) <= 44
    assert "Traceback" not in shown


def test_what_was_done_breaks_between_names():
    shown = on_a_terminal(VIEWS["dry run"], 60, TERM="dumb").splitlines()
    done = [line for line in shown if line.startswith("  ")]
    assert max(map(len, done)) <= 60
    left_out = next(place for place, line in enumerate(done) if line.startswith("  left out epoch, "))
    assert done[left_out + 1].startswith("           ")


def test_names_of_windows_stay_what_they_are(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = r"C:\models\unet\x.pt"
    torch.save({"fc.weight": torch.ones(2, 2)}, "plain.pt")
    Path("plain.pt").rename(name)
    for command in ("inspect", "verify"):
        assert strictly(run(command, name, "--json").out)["path"] == name
    shown = run("inspect", name).out.splitlines()[0].partition("\t")[2]
    assert re.sub(r"\\x5c", r"\\", shown) == name
    assert run("convert", name, "out.safetensors", "--manifest", "out.json").status == 0
    assert strictly(Path("out.json").read_text())["source"]["files"][0]["name"] == name


def test_reports_name_files_of_windows_as_pipelines_do(monkeypatch):
    found = [Verification(path, "fail", (Check("safety", "fail", "x"),)) for path in (r"runs\unet.pt", r"C:\a b.pt")]
    for module in ("findings", "sarif"):
        monkeypatch.setattr(f"ckptool.reports.{module}.Path", PureWindowsPath)
    run = strictly(write_sarif(found, frozenset(("fail",)), "1"))["runs"][0]
    uris = [each["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for each in run["results"]]
    assert uris == ["runs/unet.pt", "file:///C:/a%20b.pt"]
    lines = write_github(found, frozenset(("fail",))).splitlines()
    assert lines[0].startswith("::error file=runs/unet.pt,")
    assert lines[1].startswith("::error file=C%3A/a b.pt,")
