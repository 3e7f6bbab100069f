"""The settings file of verify: where it is found, what it says, what it may not say, and what it accepts."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch
from support.strict_json import strictly


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    torch.manual_seed(0)
    state = {"fc.weight": torch.randn(4, 3), "fc.bias": torch.randn(4)}
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in state.items()}, folder / "wrapped.pt")
    torch.save({**state, "fc.bias": torch.full((4,), math.nan)}, folder / "nan.pt")
    both = {f"{part}.{name}": tensor for part in ("student", "teacher") for name, tensor in state.items()}
    torch.save(both, folder / "pair.pt")
    (folder / "junk.pt").write_bytes(b"junk")
    return folder


@pytest.fixture
def verify(run, place, tmp_path, monkeypatch):
    """Run ``verify --json`` below a folder whose settings file says ``text``."""

    def verify_under(text: str, *args: object, name: str = "ckptool.toml"):
        (tmp_path / name).write_text(text)
        below = tmp_path / "below" / "deeper"
        below.mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(below)
        return run("verify", *args, "--json")

    return verify_under


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def statuses(text: str) -> dict[str, str]:
    return {check["code"]: check["status"] for check in strictly(text)["checks"]}


@pytest.mark.parametrize("name", ["ckptool.toml", "pyproject.toml"])
def test_settings_are_found_from_the_working_folder_upwards(verify, place, tmp_path, name):
    text = 'fail-on = "warn"\nchecks = ["CK1", "keys"]\nskip-checks = ["manifest"]\nthresholds = {share = 0.5}\n'
    if name == "pyproject.toml":
        text = '[project]\nname = "other"\n[tool.ckptool]\n' + text
    ran = verify(text, place / "wrapped.pt", name=name)
    assert ran.status == 1
    assert statuses(ran.out) == {"CK101": "pass", "CK301": "warn"}
    found = strictly(ran.out)
    assert found["thresholds"]["share"] == 0.5
    assert f"settings were read from {tmp_path / name}" in found["notes"]


def test_an_option_outranks_the_file(verify, place):
    text = 'fail-on = "warn"\nchecks = ["keys"]\nskip-checks = ["CK4"]\nthresholds = {share = 0.5, echo = 0.5}\n'
    options = ("--fail-on", "fail", "--checks", "CK301", "--checks", "CK401", "--skip-checks", "speed")
    ran = verify(text, place / "wrapped.pt", *options, "--threshold", "share=0.75")
    assert ran.status == 0
    assert statuses(ran.out) == {"CK301": "warn", "CK401": "pass"}
    thresholds = strictly(ran.out)["thresholds"]
    assert (thresholds["share"], thresholds["echo"]) == (0.75, 0.5)


def test_its_own_file_outranks_the_project_and_the_nearest_folder_the_others(verify, place, tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.ckptool]\nchecks = ["safety"]\n')
    assert statuses(verify('checks = ["keys"]', place / "wrapped.pt").out).keys() == {"CK301"}
    (tmp_path / "below" / "pyproject.toml").write_text('[tool.ckptool]\nchecks = ["integrity"]\n')
    (tmp_path / "below" / "deeper" / "pyproject.toml").write_text('[tool.other]\nchecks = ["x"]\n')
    assert statuses(verify('checks = ["keys"]', place / "wrapped.pt").out).keys() == {"CK101"}
    (tmp_path / "named.toml").write_text('checks = ["values.finite"]\n')
    named = verify("", place / "wrapped.pt", "--config", tmp_path / "named.toml")
    assert statuses(named.out).keys() == {"CK401"}


def test_a_folder_that_is_gone_has_no_settings(run, place, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert run("verify", place / "wrapped.pt").status == 0


HASH = "0" * 64
REFUSED = {
    "unknown key": ("fail_on = 'warn'", "fail_on is no setting"),
    "unknown threshold": ("[thresholds]\nluck = 1", "luck"),
    "threshold of text": ("[thresholds]\nshare = '0.5'", "no number"),
    "threshold of truth": ("[thresholds]\nshare = true", "no number"),
    "threshold of nothing": ("[thresholds]\nshare = nan", "nothing is above"),
    "a part of an input": ("[thresholds]\nleast_inputs = 3.5", "no number of this kind"),
    "thresholds of no table": ("thresholds = 3", "no table"),
    "gate": ("fail-on = 'sometimes'", "fail, warn, never"),
    "gate of no text": ("fail-on = 1", "fail, warn, never"),
    "check": ("checks = ['luck']", "no such check"),
    "checks of no list": ("checks = 'keys'", "lists"),
    "allow of no list": ("allow = {sha256 = 'x'}", "[[allow]]"),
    "allow without reason": (f"[[allow]]\nsha256 = '{HASH}'\ncheck = 'keys'", "reason"),
    "allow with an empty reason": (f"[[allow]]\nsha256 = '{HASH}'\ncheck = 'keys'\nreason = ' '", "reason"),
    "allow without file": ("[[allow]]\ncheck = 'keys'\nreason = 'x'", "sha256"),
    "allow of no hash": ("[[allow]]\nsha256 = 'abc'\ncheck = 'keys'\nreason = 'x'", "64 hexadecimal"),
    "allow of another check": (f"[[allow]]\nsha256 = '{HASH}'\ncheck = 'luck'\nreason = 'x'", "no such check"),
    "allow of a path": (
        f"[[allow]]\nsha256 = '{HASH}'\ncheck = 'keys'\nreason = 'x'\npath = 'y'",
        "path is no setting",
    ),
    "no toml": ("checks = [", "no TOML"),
    "no text": ("\udcff", "no TOML"),
    "deep": ("checks = " + "[" * 100_000, "no TOML"),
    "long": ("#" * (1 << 21), "larger"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_may_not_say(run, place, tmp_path, monkeypatch, name):
    text, culprit = REFUSED[name]
    (tmp_path / "ckptool.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    monkeypatch.chdir(tmp_path)
    ran = run("verify", place / "wrapped.pt")
    assert (ran.status, ran.out) == (2, "")
    [line] = ran.err.splitlines()
    assert culprit in line
    assert "ckptool.toml" in line


def test_a_named_file_has_to_be_there_and_to_speak_of_ckptool(run, place, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    for name, culprit in (("absent.toml", "cannot be read"), ("pyproject.toml", "[tool.ckptool]"), ("", "cannot be")):
        ran = run("verify", place / "wrapped.pt", "--config", tmp_path / name)
        assert (ran.status, culprit in ran.err) == (2, True)
    (tmp_path / "pyproject.toml").write_text("tool = {ckptool = 3}\n")
    assert "is no table" in run("verify", place / "wrapped.pt", "--config", tmp_path / "pyproject.toml").err


def allowing(path: Path, check: str, reason: str = "a fixture of our tests") -> str:
    return f'[[allow]]\nsha256 = "{sha256(path)}"\ncheck = "{check}"\nreason = "{reason}"\n'


@pytest.mark.parametrize("check", ["values.finite", "CK401", "values"])
def test_a_finding_is_allowed_in_the_file_that_is_named(verify, place, check):
    path = place / "nan.pt"
    assert verify("", path).status == 1
    ran = verify(allowing(path, check), path)
    found = strictly(ran.out)
    assert (ran.status, found["verdict"]) == (0, "pass")
    [finite] = [each for each in found["checks"] if each["code"] == "CK401"]
    assert (finite["status"], finite["allowed"]) == ("fail", "a fixture of our tests")
    assert all(each["allowed"] is None for each in found["checks"] if each["status"] == "pass")


def test_a_digest_in_capitals_is_the_same(verify, place):
    path = place / "nan.pt"
    assert verify(allowing(path, "CK401").replace(sha256(path), sha256(path).upper()), path).status == 0


def test_nothing_else_is_allowed(verify, place, tmp_path):
    path = place / "nan.pt"
    assert verify(allowing(path, "keys"), path).status == 1
    assert verify(allowing(place / "wrapped.pt", "CK401"), path).status == 1
    other = tmp_path / "other.pt"
    other.write_bytes(path.read_bytes() + b"\0")
    assert verify(allowing(path, "CK401"), other).status != 0


def test_warnings_and_what_is_open_are_allowed_too(verify, place):
    wrapped, pair = place / "wrapped.pt", place / "pair.pt"
    assert verify('fail-on = "warn"', wrapped).status == 1
    assert verify('fail-on = "warn"\n' + allowing(wrapped, "keys"), wrapped).status == 0
    assert verify("", pair).status == 2
    assert verify(allowing(pair, "keys"), pair).status == 0


def test_what_cannot_be_read_is_never_allowed(verify, place):
    ran = verify(allowing(place / "junk.pt", "integrity"), place / "junk.pt")
    assert (ran.status, strictly(ran.out)["verdict"]) == (2, "error")


def test_reports_say_what_is_allowed(run, place, tmp_path, monkeypatch):
    (tmp_path / "ckptool.toml").write_text(allowing(place / "nan.pt", "CK401"))
    monkeypatch.chdir(tmp_path)
    for name in ("text", "json", "junit", "sarif", "markdown"):
        assert "a fixture of our tests" in run("verify", place / "nan.pt", "--output", name).out
    drawn = run("verify", place / "nan.pt", "--color", "always").out
    assert "allowed because: a fixture of our tests" in drawn
    assert "1 allowed" in drawn
    assert "FAIL" not in drawn
    assert run("verify", place / "nan.pt", "--output", "github").out == "ckptool verify: 1 checkpoint: 1 sound\n"
