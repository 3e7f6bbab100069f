"""The action, the workflows and the hooks that the repository offers do what they say: their very commands are run."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
ACTION = ROOT / ".github" / "actions" / "ckptool" / "action.yml"
WORKFLOW = ROOT / "examples" / "ci" / "github-workflow.yml"
GITLAB = ROOT / "examples" / "ci" / "gitlab-ci.yml"
HOOKS = ROOT / ".pre-commit-hooks.yaml"
SCHEMAS = ROOT / "tests" / "data" / "schemas"


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """Give a folder with this ``ckptool``, and a ``python`` that installs nothing."""
    folder = tmp_path_factory.mktemp("bin")
    scripts = {
        "ckptool": f'exec "{sys.executable}" -m ckptool "$@"',
        "python": 'test "$1 $2 $3" = "-m pip install" && echo "$@" >> "$(dirname "$0")/installed"',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def shell(programs, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a script as the runner of GitHub does, in the folder of the repository that is checked out."""

    def run_script(script: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "GITHUB_ACTION_PATH": str(ACTION.parent),
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
            "GITHUB_OUTPUT": str(tmp_path / "output"),
            **variables,
        }
        (tmp_path / "step.sh").write_text(script)
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", tmp_path / "step.sh"]
        place = tmp_path / "checkout"
        return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=100)

    return run_script


@pytest.fixture
def weights(tmp_path) -> Path:
    """Give the folder ``weights`` of a repository, with one sound checkpoint in it."""
    folder = tmp_path / "checkout" / "weights"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save(folder / "sound.ckpt")
    return folder


def save(path: Path, prefix: str = "", **changed: torch.Tensor) -> None:
    torch.manual_seed(0)
    state = {"fc.weight": torch.randn(4, 3), "fc.bias": torch.randn(4), **changed}
    torch.save({prefix + name: tensor for name, tensor in state.items()}, path)


def resolve(text: str, inputs: Mapping[str, str]) -> str:
    return re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda match: inputs[match[1]], text)


def act(shell: Callable[..., subprocess.CompletedProcess], **given: str) -> subprocess.CompletedProcess:
    """Run the steps of the action with these inputs, until one fails."""
    action = read(ACTION)
    inputs = {name: given.get(name, entry.get("default", "")) for name, entry in action["inputs"].items()}
    assert given.keys() <= inputs.keys()
    for step in action["runs"]["steps"]:
        assert "${{" not in step["run"]
        ran = shell(step["run"], **{name: resolve(text, inputs) for name, text in step.get("env", {}).items()})
        if ran.returncode:
            break
    return ran


# --- the action ---


@pytest.mark.parametrize(("path", "schema"), [(ACTION, "github-action"), (WORKFLOW, "github-workflow")])
def test_the_definitions_keep_to_the_schemas_of_github(path, schema):
    # YAML 1.1 takes the key ``on`` for a truth value.
    document = {"on" if key is True else key: value for key, value in read(path).items()}
    jsonschema.Draft7Validator(json.loads((SCHEMAS / f"{schema}.json").read_text())).validate(document)


def test_the_action_passes_what_is_sound(shell, programs, weights, tmp_path):
    ran = act(shell, paths="weights/*.ckpt\n")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "ckptool verify: 1 checkpoint: 1 sound\n"
    assert (tmp_path / "output").read_text() == "status=0\n"
    assert "1 sound" in (tmp_path / "summary.md").read_text()
    reports = weights.parent / "ckptool-reports"
    assert sorted(path.name for path in reports.iterdir()) == [
        *("ckptool.json", "ckptool.md", "ckptool.sarif", "ckptool.xml"),
    ]
    installed = (programs / "installed").read_text().splitlines()
    assert installed[-1] == f"-m pip install --quiet {ACTION.parent}/../../.."
    assert (ACTION.parent / "../../../pyproject.toml").is_file()


def test_the_action_fails_and_annotates(shell, weights, tmp_path):
    save(weights / "nan.ckpt", **{"fc.bias": torch.full((4,), math.nan)})
    ran = act(shell, paths="weights/sound.ckpt\nweights/nan.ckpt", reports="found here")
    assert ran.returncode == 1
    assert ran.stdout.startswith("::error file=weights/nan.ckpt,title=CK401 values.finite::")
    assert (tmp_path / "output").read_text() == "status=1\n"
    assert "1 not sound" in (tmp_path / "summary.md").read_text()
    assert ElementTree.parse(weights.parent / "found here" / "ckptool.xml").getroot().get("failures") == "1"


@pytest.mark.parametrize("paths", ["weights/absent.ckpt", "weights/*.nothing", "", "weights/junk.ckpt"])
def test_the_action_does_not_pass_what_it_could_not_read(shell, weights, tmp_path, paths):
    (weights / "junk.ckpt").write_bytes(b"junk")
    assert act(shell, paths=paths).returncode == 2
    assert (tmp_path / "output").read_text() == "status=2\n"


def test_options_and_names_are_words_and_no_commands(shell, weights, tmp_path):
    odd = "a b; touch planted; $(touch planted) `touch planted` 'x\".ckpt"
    save(weights / odd, prefix="_orig_mod.")
    ran = act(shell, paths=f"weights/{odd}", options="--fail-on\nwarn\n--checks\nkeys")
    assert ran.returncode == 1
    assert ran.stdout.count("::error ") == 1
    assert not list(tmp_path.rglob("planted"))


# --- the workflows ---


def steps_of(job: str) -> list[dict]:
    return read(WORKFLOW)["jobs"][job]["steps"]


def test_the_job_that_verifies(shell, weights):
    [inputs] = [step["with"] for step in steps_of("verify") if "ckptool" in step.get("uses", "")]
    save(weights / "other.pt", prefix="_orig_mod.")
    assert act(shell, **inputs).returncode == 0
    folder = read(ACTION)["inputs"]["reports"]["default"]
    named = [value for step in steps_of("verify") for key, value in step.get("with", {}).items() if "file" in key]
    assert all((weights.parent / name).is_file() for name in named)
    assert any(step.get("with", {}).get("path") == f"{folder}/" for step in steps_of("verify"))


def test_the_job_that_publishes(shell, weights):
    save(weights / "wrapped.ckpt", prefix="_orig_mod.")
    scripts = [step["run"] for step in steps_of("release") if "run" in step]
    for script in scripts:
        ran = shell(script)
        assert ran.returncode == 0, ran.stderr
    out = weights.parent / "dist"
    assert sorted(path.name for path in out.iterdir()) == [
        *("sound.json", "sound.safetensors", "wrapped.json", "wrapped.safetensors"),
    ]
    (out / "sound.safetensors").write_bytes((out / "sound.safetensors").read_bytes()[:-1] + b"\1")
    assert shell(scripts[-1]).returncode == 1


def test_the_job_for_gitlab(shell, weights):
    script = "\n".join(read(GITLAB)["checkpoints"]["script"])
    assert shell(script).returncode == 0
    save(weights / "nan.ckpt", **{"fc.bias": torch.full((4,), math.nan)})
    assert shell(script).returncode == 1
    artifacts = read(GITLAB)["checkpoints"]["artifacts"]
    names = [artifacts["reports"]["junit"], *artifacts["paths"]]
    assert all((weights.parent / name).is_file() for name in names)


# --- the hooks ---


def test_the_hooks_have_what_pre_commit_asks_for():
    for hook in yaml.safe_load(HOOKS.read_text()):
        assert {"id", "name", "entry", "language", "files"} <= hook.keys()
        names = ["a.ckpt", "b/c.pt", "d.pth", "model.safetensors", "notes.txt", "a.ckpt.json", "opt"]
        assert [bool(re.search(hook["files"], name)) for name in names] == [True] * 4 + [False] * 3


@pytest.mark.parametrize(
    ("hook", "expected"),
    [("ckptool-verify", (0, 0, 1, 2)), ("ckptool-safety", (0, 0, 0, 2)), ("ckptool-keys", (0, 1, 0, 2))],
)
def test_a_hook_stops_what_it_is_for(run, weights, hook, expected):
    [entry] = [each["entry"] for each in yaml.safe_load(HOOKS.read_text()) if each["id"] == hook]
    save(weights / "wrapped.ckpt", prefix="_orig_mod.")
    save(weights / "nan.ckpt", **{"fc.bias": torch.full((4,), math.nan)})
    (weights / "junk.ckpt").write_bytes(b"junk")
    program, *args = shlex.split(entry)
    assert program == "ckptool"
    files = [weights / f"{name}.ckpt" for name in ("sound", "wrapped", "nan", "junk")]
    assert tuple(run(*args, file).status for file in files) == expected
    assert run(*args, *files).status == 2
