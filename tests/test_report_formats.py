"""The report formats of verify are what their readers expect, whatever the names in a file say."""

from __future__ import annotations

import json
import math
import re
import urllib.parse
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
import torch
from markdown_it import MarkdownIt
from support.strict_json import strictly

from ckptool.model.checks import CHECKS
from ckptool.model.verification import Check, Verification
from ckptool.reports.github import write_github
from ckptool.reports.junit import write_junit
from ckptool.reports.markdown import write_markdown
from ckptool.reports.sarif import write_sarif

ROOT = Path(__file__).parents[1]
SCHEMAS = Path(__file__).parent / "data" / "schemas"
FAIL = frozenset(("fail",))
WARN = frozenset(("fail", "warn"))
NASTY = (
    "a\n::error file=x::planted\r%0A|cell|<script>alert(1)</script>]]>&amp;\x00\x1b[31m\ud800\ufffe"
    " [link](https://evil.example) ![image](http://evil.example/x.png) https://evil.example www.evil.example"
    " @someone #123 `code` *bold* __bold__ ~~gone~~ $x$ \\[x\\] {0}"
)


def verification(path: str = "weights.pt", *checks: Check, error: str | None = None) -> Verification:
    statuses = {check.status for check in checks if not check.allowed}
    verdict = "error" if error else next((s for s in ("fail", "inconclusive") if s in statuses), "pass")
    return Verification(path, verdict, checks, error=error)


ALL_STATUSES = (
    Check("integrity", "pass", "sound"),
    Check("safety", "fail", "names os.system", advice="do not load it"),
    Check("keys", "inconclusive", "two networks", advice="choose with --select"),
    Check("values.finite", "warn", "one is large"),
    Check("values.dead", "skip", "nothing to look at"),
    Check("values.untrained", "fail", "never trained", allowed="a test fixture"),
)
NASTY_CHECKS = tuple(Check("keys", status, NASTY, advice=NASTY) for status in ("fail", "warn", "inconclusive", "pass"))
NASTY_ONE = verification(NASTY.replace("\ud800", "").replace("\x00", ""), *NASTY_CHECKS, error=f"unread: {NASTY}")


# --- the table of checks ---


def test_numbers_and_names_of_checks_are_unique_and_known():
    assert len({kind.code for kind in CHECKS}) == len({kind.id for kind in CHECKS}) == len(CHECKS)
    assert [kind.code for kind in CHECKS] == sorted(kind.code for kind in CHECKS)
    assert all(re.fullmatch(r"CK\d{3}", kind.code) for kind in CHECKS)
    sources = "".join(path.read_text() for path in (ROOT / "ckptool").rglob("*.py"))
    made = set(re.findall(r'Check\(\s*"([a-z_.]+)"', sources))
    made |= set(re.findall(r'(?m)^(?:_?ID|CHECK|AGREEMENT) = "([a-z_.]+)"', sources))
    assert len(made) > 10
    assert made <= {kind.id for kind in CHECKS}


def test_numbers_stay_what_they_are():
    """Allow lists and dashboards name them: a change here breaks what others wrote."""
    assert [f"{kind.code} {kind.id}" for kind in CHECKS] == [
        "CK101 integrity",
        "CK102 manifest",
        "CK201 safety",
        "CK301 keys",
        "CK401 values.finite",
        "CK402 values.dead",
        "CK403 values.batchnorm",
        "CK404 values.outliers",
        "CK405 values.duplicates",
        "CK406 values.untrained",
        "CK501 load.coverage",
        "CK502 load.meta",
        "CK601 output.finite",
        "CK602 output.constant",
        "CK603 output.diverse",
        "CK604 output.determinism",
        "CK605 output.batch",
        "CK701 agreement.tensors",
        "CK702 agreement.outputs",
        "CK801 accuracy",
        "CK901 speed",
    ]


# --- JUnit ---


def cases(text: str) -> dict[str, str]:
    """Give what became of each case: the tag of its outcome, empty where it passed in silence."""
    root = ElementTree.fromstring(text)
    return {case.get("name", ""): next((child.tag for child in case), "") for case in root.iter("testcase")}


@pytest.mark.parametrize(("gate", "of_warning"), [(FAIL, "system-out"), (WARN, "failure"), (frozenset(), "system-out")])
def test_a_suite_has_a_case_for_each_check(gate, of_warning):
    text = write_junit([verification("a.pt", *ALL_STATUSES), verification("b.pt", error="junk")], gate)
    assert cases(text) == {
        "CK101 integrity": "",
        "CK201 safety": "failure",
        "CK301 keys": "error",
        "CK401 values.finite": of_warning,
        "CK402 values.dead": "skipped",
        "CK406 values.untrained": "skipped",
        "answer": "error",
    }
    root = ElementTree.fromstring(text)
    failures = 2 if of_warning == "failure" else 1
    counts = [root.get(name) for name in ("tests", "failures", "errors", "skipped")]
    assert counts == ["7", str(failures), "2", "2"]
    assert [suite.get("name") for suite in root] == ["a.pt", "b.pt"]
    assert "a test fixture" in text


def test_nothing_breaks_out_of_the_xml():
    text = write_junit([NASTY_ONE], FAIL)
    assert text.isascii()
    root = ElementTree.fromstring(text)
    assert {element.tag for element in root.iter()} <= {
        *("testsuites", "testsuite", "testcase", "failure", "error", "skipped", "system-out"),
    }
    assert len(list(root.iter("testcase"))) == 5


# --- SARIF ---


def sarif(*verifications: Verification, gate: frozenset = FAIL) -> dict:
    document = strictly(write_sarif(verifications, gate, "1.2.3"))
    schema = json.loads((SCHEMAS / "sarif-2.1.0.json").read_text())
    jsonschema.Draft7Validator(schema).validate(document)
    [run] = document["runs"]
    return run


def test_a_log_has_a_result_for_each_finding():
    run = sarif(verification("runs/a b.pt", *ALL_STATUSES))
    found = [(result["ruleId"], result["level"], "suppressions" in result) for result in run["results"]]
    assert found == [
        ("CK201", "error", False),
        ("CK301", "error", False),
        ("CK401", "warning", False),
        ("CK406", "error", True),
    ]
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [kind.code for kind in CHECKS]
    assert all(rule["help"]["text"] and rule["fullDescription"]["text"] for rule in rules)
    assert len({rule["name"] for rule in rules}) == len(rules)
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        location = result["locations"][0]["physicalLocation"]["artifactLocation"]
        assert location == {"uri": "runs/a%20b.pt", "uriBaseId": "%SRCROOT%", "index": 0}
    [suppression] = run["results"][3]["suppressions"]
    assert suppression == {"kind": "external", "justification": "a test fixture"}
    assert run["invocations"][0]["executionSuccessful"] is True


def test_what_could_not_be_answered_is_a_notification(tmp_path):
    junk = str(tmp_path / "junk.pt")
    run = sarif(verification("a.pt", ALL_STATUSES[0]), verification(junk, error="is no checkpoint"))
    assert run["results"] == []
    [invocation] = run["invocations"]
    assert invocation["executionSuccessful"] is False
    [notification] = invocation["toolExecutionNotifications"]
    assert notification["message"]["text"] == "is no checkpoint"
    assert notification["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == Path(junk).as_uri()


def test_fingerprints_follow_the_finding_and_not_its_words():
    def fingerprints(*checks: Check) -> list:
        return [result["partialFingerprints"] for result in sarif(verification("a.pt", *checks))["results"]]

    one = fingerprints(Check("keys", "warn", "33 of 33 keys"), Check("safety", "fail", "x"))
    other = fingerprints(Check("keys", "fail", "34 of 34 keys"), Check("safety", "fail", "y"))
    assert one == other
    assert one[0] != one[1]


def test_an_address_stays_what_it_is():
    path = "https://example.com/a/b c.pt?download=true"
    run = sarif(verification(path, ALL_STATUSES[1]))
    location = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]
    assert location == {"uri": "https://example.com/a/b%20c.pt?download=true", "index": 0}
    assert "file=https%3A//example.com/a/b c.pt" in write_github([verification(path, ALL_STATUSES[1])], FAIL)


@pytest.mark.parametrize("path", ["a:b.pt", "100%.pt", "ä#?.pt", "\udcff.pt", "x\ny.pt"])
def test_a_place_is_a_uri_of_the_bytes_of_the_name(path):
    run = sarif(verification(path, ALL_STATUSES[1]))
    uri = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert urllib.parse.urlsplit(uri).scheme == ""
    assert urllib.parse.unquote_to_bytes(uri) == path.encode("utf-8", "surrogateescape")


def test_no_message_of_a_log_holds_a_link():
    run = sarif(NASTY_ONE)
    texts = [result["message"]["text"] for result in run["results"]]
    assert len(texts) == 3
    for text in texts:
        assert text.isprintable()
        assert not re.search(r"(?<!\\)(\\\\)*\[", text)


# --- GitHub ---


def test_annotations_name_file_check_and_remedy():
    lines = write_github([verification("runs/a.pt", *ALL_STATUSES)], FAIL).splitlines()
    assert lines == [
        "::error file=runs/a.pt,title=CK201 safety::names os.system; remedy: do not load it",
        "::error file=runs/a.pt,title=CK301 keys::not settled: two networks; remedy: choose with --select",
        "::warning file=runs/a.pt,title=CK401 values.finite::one is large",
        "ckptool verify: 1 checkpoint: 1 not sound",
    ]
    assert write_github([verification("a.pt", *ALL_STATUSES)], WARN).count("::error ") == 3


def test_annotations_stay_within_the_limits():
    many = [verification(f"{number}.pt", *ALL_STATUSES[1:4]) for number in range(30)]
    lines = write_github(many, FAIL).splitlines()
    assert sum(line.startswith("::error ") for line in lines) == 10
    assert sum(line.startswith("::warning ") for line in lines) == 10
    assert "51 more findings in 26 checkpoint(s)" in lines[9]
    assert "21 more findings in 21 checkpoint(s)" in lines[19]
    [line, _] = write_github([verification("a.pt", Check("keys", "fail", "x" * 100_000))], FAIL).splitlines()
    assert len(line.partition("title=CK301 keys::")[2]) <= 4096


def test_foreign_text_is_no_command():
    lines = write_github([NASTY_ONE], FAIL).splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["::error"] * 3 + ["::warning", "ckptool"]
    for line in lines[:-1]:
        properties = line.partition(" ")[2].partition("::")[0]
        assert re.fullmatch(r"file=[^,:]*,title=[^,:]*", properties)
        assert urllib.parse.unquote(line).count("%0A") >= 2
        assert line.isprintable()


# --- Markdown ---


def rendered(text: str) -> str:
    return MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(text)


def test_a_summary_tells_the_worst_first():
    page = write_markdown([verification("a.pt", *ALL_STATUSES), verification("b.pt", error="is junk")])
    assert page.startswith("### ckptool verify: 2 checkpoints: 1 not sound, 1 not answered\n")
    rows = [line for line in page.splitlines() if line.startswith("| CK")]
    assert [row.split(" | ")[1] for row in rows] == ["**fail**", "allowed", "**open**", "warn", "pass", "skip"]
    assert "is junk" in page
    assert "allowed (a test fixture): never trained" in page
    assert "<summary>1 passed, 1 skipped</summary>" in page


def test_foreign_text_stays_text_in_a_page():
    page = rendered(write_markdown([NASTY_ONE]))
    tags = set(re.findall(r"<\s*([a-zA-Z0-9]+)", page))
    assert tags <= {
        *("h3", "h4", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "strong"),
        "details",
        "summary",
    }
    assert page.count("<strong>") == 2
    rows = [line for line in write_markdown([NASTY_ONE]).splitlines() if line.startswith("| CK")]
    assert [row.count("|") for row in rows] == [4] * 4
    # GitHub looks for people and issues in the text that is shown, outside of code.
    outside = re.sub(r"<code>.*?</code>", "", page)
    assert "@" not in outside
    assert not re.search(r"#\d", re.sub(r"&#\d+;", "", outside))
    # What stands in the source as an address, GitHub makes a link of.
    assert not re.search(r"://|www\.", write_markdown([NASTY_ONE]))


def test_a_page_is_no_longer_than_a_comment_may_be():
    many = [verification(f"{number}.pt", *ALL_STATUSES) for number in range(400)]
    page = write_markdown(many)
    assert len(page) <= 65_536
    shown = page.count("\n#### ")
    assert f"{400 - shown} checkpoints more" in page


# --- the command ---


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Give a folder with a sound file, one with NaN, one with a wrapped name, and junk."""
    folder = tmp_path_factory.mktemp("reports")
    torch.manual_seed(0)
    state = {"fc.weight": torch.randn(4, 3), "fc.bias": torch.randn(4)}
    torch.save(state, folder / "sound.pt")
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in state.items()}, folder / "wrapped.pt")
    torch.save({**state, "fc.bias": torch.full((4,), math.nan)}, folder / "nan.pt")
    (folder / "junk.pt").write_bytes(b"junk")
    return folder


FILES = ("sound.pt", "wrapped.pt", "nan.pt", "junk.pt")
FORMATS = ("text", "json", "junit", "sarif", "github", "markdown")


def test_every_format_is_written_in_one_run(run, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    outputs = [arg for name in FORMATS for arg in ("--output", f"{name}={tmp_path / name}")]
    ran = run("verify", *FILES, *outputs)
    assert ran.status == 2
    written = {name: (tmp_path / name).read_text() for name in FORMATS}
    assert ran.out == written["text"] == run("verify", *FILES).out
    assert strictly(written["json"]) == strictly(run("verify", *FILES, "--json").out)
    for name in FORMATS:
        assert run("verify", *FILES, "--output", name).out == written[name]
        assert run("verify", *FILES, "--output", f"{name}=-", "--quiet").out == (
            "" if name == "text" else written[name]
        )
    assert cases(written["junit"])["CK401 values.finite"] == "failure"
    jsonschema.Draft7Validator(json.loads((SCHEMAS / "sarif-2.1.0.json").read_text())).validate(
        json.loads(written["sarif"])
    )
    assert [line.partition(" ")[0] for line in written["github"].splitlines()] == [
        *("::error", "::error", "::warning", "ckptool"),
    ]
    assert "4 checkpoints: 2 sound, 1 not sound, 1 not answered" in written["markdown"]


def test_a_report_is_replaced_and_reports_are_the_same_every_time(run, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    for name in FORMATS:
        target = tmp_path / f"report.{name}"
        target.write_text("of the last run")
        run("verify", *FILES, "--output", f"{name}={target}", "--quiet")
        first = target.read_bytes()
        run("verify", *FILES, "--output", f"{name}={target}", "--quiet")
        assert target.read_bytes() == first != b"of the last run"


REFUSED = {
    "unknown format": (("--output", "yaml=x.yaml"), "yaml"),
    "a checkpoint": (("--output", "json=out.pt"), "named as a checkpoint"),
    "the input": (("sound.pt", "other.link", "--output", "json=other.link"), "named as a checkpoint"),
    "one place": (("--output", "json=report", "--output", "sarif=report"), "two reports"),
    "stdout twice": (("--json", "--output", "junit"), "stdout"),
    "no folder": (("--output", "json=absent/report.json"), "create it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_refused(run, place, tmp_path, monkeypatch, name):
    monkeypatch.chdir(place)
    link = place / "other.link"
    if not link.exists():
        link.hardlink_to(place / "nan.pt")
    args, culprit = REFUSED[name]
    ran = run("verify", "sound.pt", *args)
    assert (ran.status, ran.out) == (2, "")
    [line] = ran.err.splitlines()
    assert culprit in line


def test_a_report_that_cannot_be_written_takes_no_other_along(run, place, tmp_path):
    (tmp_path / "folder").mkdir()
    outputs = ("--output", f"json={tmp_path / 'folder'}", "--output", f"junit={tmp_path / 'report.xml'}")
    ran = run("verify", place / "sound.pt", *outputs)
    assert ran.status == 2
    assert "is a folder" in ran.err
    assert ran.out.startswith("path\t")
    assert (tmp_path / "report.xml").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("CK401",), {"CK401"}),
        (("CK1", "keys"), {"CK101", "CK301"}),
        (("values.dead", "CK2"), {"CK402", "CK201"}),
        (("values",), {"CK401", "CK402", "CK403", "CK404", "CK405", "CK406"}),
    ],
)
def test_checks_are_chosen_by_number_name_and_beginning(run, place, names, expected):
    chosen = [arg for name in names for arg in ("--checks", name)]
    found = strictly(run("verify", place / "sound.pt", *chosen, "--json").out)
    assert {check["code"] for check in found["checks"]} == expected
    rest = strictly(
        run("verify", place / "sound.pt", "--json", *(arg.replace("--checks", "--skip-checks") for arg in chosen)).out
    )
    assert expected.isdisjoint(check["code"] for check in rest["checks"])


@pytest.mark.parametrize("name", ["CK", "CK9999", "ck401", "val", "values.", "CK401 values.finite", ""])
def test_what_names_no_check_is_refused(run, place, name):
    for option in ("--checks", "--skip-checks"):
        ran = run("verify", place / "sound.pt", option, name)
        assert (ran.status, "no such check" in ran.err) == (2, True)
