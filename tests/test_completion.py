"""The completion scripts offer every command, option and word, and what they offer is taken."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from ckptool.cli.completion import SHELLS, WORDS

DIGITS = Path(__file__).parents[1] / "examples" / "digits.ckpt"
COMMANDS = ["inspect", "diff", "strip-prefixes", "convert", "verify"]

# Each fills in what the shell itself would, and prints what is offered.
BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_ckptool; printf '%s\\n' "${COMPREPLY[@]}"
"""
ZSH = """
compdef() { : }
compset() { PREFIX=${PREFIX#*=} }
compadd() { shift; print -l -- ${(M)@:#$PREFIX*} }
_describe() { local -a all=("${(@P)argv[-1]}"); print -l -- ${(M)${all%%:*}:#$PREFIX*} }
_files() { print -l -- "<files>" $@ }
source "$1"; shift
words=("$@"); CURRENT=$#; PREFIX=${words[-1]}
_ckptool
"""
FISH = "source $argv[1]; complete -C (string join ' ' -- $argv[2..])"


@pytest.fixture
def offers(run, tmp_path):
    """Give what a shell offers for the last of some words, or skip where there is no such shell."""

    def offered(shell: str, *words: str) -> set[str]:
        program = shutil.which(shell)
        if program is None:
            pytest.skip(f"{shell} is not installed")
        script = tmp_path / f"ckptool.{shell}"
        ran = run("--show-completion", shell)
        assert (ran.status, ran.err) == (0, "")
        assert ran.out.isascii()
        script.write_text(ran.out)
        options = {
            "bash": ["--norc", "-c", BASH, "x"],
            "zsh": ["-f", "-c", ZSH, "x"],
            "fish": ["--no-config", "-c", FISH],
        }
        command = [program, *options[shell], script, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return {line.split("\t")[0] for line in done.stdout.splitlines() if line}

    return offered


@pytest.mark.parametrize("shell", SHELLS)
def test_commands_options_and_words_are_offered(offers, shell):
    assert offers(shell, "ckptool", "") >= set(COMMANDS)
    assert offers(shell, "ckptool", "in") == {"inspect"}
    assert offers(shell, "ckptool", "--ver") == {"--version"}
    assert offers(shell, "ckptool", "verify", "--fail") == {"--fail-on"}
    assert offers(shell, "ckptool", "diff", "a.pt", "--exact") == {"--exact-names"}
    assert offers(shell, "ckptool", "diff", "--fail") == set()
    assert offers(shell, "ckptool", "verify", "--fail-on", "") >= {"fail", "warn", "never"}
    assert offers(shell, "ckptool", "convert", "--dtype", "bf") == {"bfloat16"}
    assert offers(shell, "ckptool", "verify", "--checks", "values.d") == {"values.dead", "values.duplicates"}


def test_readline_parts_words_at_the_sign(offers):
    assert offers("bash", "ckptool", "verify", "--fail-on", "=", "ne") == {"never"}
    assert offers("bash", "ckptool", "verify", "--fail-on", "=") == {"fail", "warn", "never"}
    assert offers("zsh", "ckptool", "verify", "--fail-on=ne") == {"never"}


@pytest.mark.parametrize("shell", SHELLS)
def test_files_are_offered_where_a_file_is_meant(offers, tmp_path, shell):
    (tmp_path / "weights.pt").touch()
    (tmp_path / "folder").mkdir()
    found = {
        "argument": offers(shell, "ckptool", "inspect", "w"),
        "file": offers(shell, "ckptool", "diff", "--like", "w"),
        "folder": offers(shell, "ckptool", "convert", "--out-dir", "fol"),
    }
    # Where bash is offered nothing, it falls back to file names by itself.
    expected = {
        "bash": {"argument": set(), "file": set(), "folder": set()},
        "zsh": {"argument": {"<files>"}, "file": {"<files>"}, "folder": {"<files>", "-/"}},
        "fish": {"argument": {"weights.pt"}, "file": {"weights.pt"}, "folder": {"folder/"}},
    }
    assert found == expected[shell]


def test_bash_takes_the_script_as_it_is_told_to(run, tmp_path):
    (tmp_path / "script").write_text(run("--show-completion", "bash").out)
    code = 'eval "$(cat script)"; complete -p ckptool'
    done = subprocess.run(["bash", "--norc", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == shlex.split("complete -o default -F _ckptool ckptool")


@pytest.mark.parametrize("option", WORDS)
def test_every_word_that_is_offered_is_taken(run, tmp_path, option):
    commands = {
        "verify": ("--checks", "--skip-checks", "--device", "--fail-on", "--output", "--task"),
        "convert": ("--dtype", "--foreign", "--ties", "--to"),
    }
    command = next((name for name, options in commands.items() if option in options), "inspect")
    helped = run(command, "--help").out
    assert option in helped
    for word in WORDS[option]:
        given = (DIGITS, tmp_path / "out", "--dry-run") if command == "convert" else (DIGITS,)
        ran = run(command, *given, option, word, "--quiet")
        assert not re.search("choose|no such|write it as|unknown", ran.err), ran.err


def test_an_unknown_shell_is_refused(run):
    ran = run("--show-completion", "tcsh")
    assert (ran.status, ran.out) == (2, "")
    assert "bash, zsh, fish" in ran.err
