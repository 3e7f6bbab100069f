"""Completion for bash, zsh and fish: scripts that know every command and option, and start no Python at the Tab key."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import typer

from ckptool.cli import import_commands
from ckptool.cli.report_files import FORMATS
from ckptool.cli.settings import GATES
from ckptool.model.checks import CHECK_IDS, CHECKS
from ckptool.model.dtypes import BY_NAME
from ckptool.model.verification import Task

# Options that take one of a few words; the words of others are names of the user's own.
WORDS: Mapping[str, Sequence[str]] = {
    "--checks": (*CHECK_IDS, *dict.fromkeys(kind.group for kind in CHECKS if kind.group != kind.id)),
    "--color": ("auto", "always", "never"),
    "--device": ("auto", "cpu", "cuda", "mps"),
    "--dtype": tuple(name for name, dtype in BY_NAME.items() if dtype.is_floating),
    "--fail-on": tuple(GATES),
    "--foreign": ("drop", "fields"),
    "--mode": ("min", "max"),
    "--output": tuple(FORMATS),
    "--sort": ("file", "name", "size", "dtype", "shape"),
    "--task": get_args(Task),
    "--ties": ("keep", "copy"),
    "--to": ("pt", "safetensors"),
    "--weights": ("main", "ema", "raw"),
}
WORDS = {**WORDS, "--skip-checks": WORDS["--checks"]}
_PLACES = {"FILE": "file", "OTHER": "file", "MODEL": "file", "DIR": "folder"}


@dataclass(frozen=True, slots=True)
class _Option:
    """Describe one option: ``takes`` is nothing, ``words``, ``file``, ``folder`` or ``text``."""

    names: tuple[str, ...]
    help: str
    takes: str


@dataclass(frozen=True, slots=True)
class _Command:
    """Describe one command; that without a name is ``ckptool`` itself."""

    name: str
    help: str
    options: tuple[_Option, ...]


def write_completion(shell: str) -> str:
    """Write the script for ``bash``, ``zsh`` or ``fish``."""
    return SHELLS[shell](list(_commands()))


def _commands() -> Iterator[_Command]:
    from ckptool.cli.app import app

    import_commands(set())
    group: Any = typer.main.get_command(app)
    yield _Command("", "", _options(group))
    for name, command in group.commands.items():
        yield _Command(name, command.get_short_help_str(200), _options(command))


def _options(command: Any) -> tuple[_Option, ...]:
    described = (
        _Option((*option.opts, *option.secondary_opts), option.help or "", _takes(option))
        for option in command.params
        if option.param_type_name == "option"
    )
    return (*described, _Option(("--help", "-h"), "Show this message and exit.", ""))


def _takes(option: Any) -> str:
    if option.is_flag:
        return ""
    return "words" if option.opts[0] in WORDS else _PLACES.get(option.metavar, "text")


def _values(commands: Sequence[_Command], takes: str) -> list[str]:
    """List the names of the options that take something of a kind, in any command."""
    found = (
        name for command in commands for option in command.options if option.takes == takes for name in option.names
    )
    return list(dict.fromkeys(found))


def _quoted(text: str) -> str:
    """Quote text for any of the three shells, which part ways over quotes and backslashes within."""
    return "'" + re.sub(r"['\\]", "", text) + "'"


_BASH = """\
# Completion of ckptool for bash: eval "$(ckptool --show-completion bash)"
_ckptool() {
    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command= word
    # Readline parts --option=value at the sign.
    [[ $current == "=" ]] && current=
    [[ $before == "=" ]] && before=${COMP_WORDS[COMP_CWORD-2]}
    COMPREPLY=()
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case $word in @COMMANDS@) command=$word; break ;; esac
    done
    case $before in
@VALUES@
        @OTHERS@) return ;;
    esac
    if [[ $current == -* ]]; then
        case $command in
@OPTIONS@
        esac
    elif [[ -z $command ]]; then
        COMPREPLY=($(compgen -W "@NAMES@" -- "$current"))
    fi
}
# Where nothing is offered, file names are.
complete -o default -F _ckptool ckptool
"""

_ZSH = """\
#compdef ckptool
# Completion of ckptool for zsh: put it into a folder of $fpath as _ckptool, or behind compinit:
# eval "$(ckptool --show-completion zsh)"
_ckptool() {
    local command= word before=${words[CURRENT-1]}
    local -a offered
    if [[ $PREFIX == --*=* ]]; then
        before=${PREFIX%%=*}
        compset -P '*='
    fi
    for word in ${words[2,CURRENT-1]}; do
        case $word in @COMMANDS@) command=$word; break ;; esac
    done
    case $before in
@VALUES@
        @FILES@) _files; return ;;
        @FOLDERS@) _files -/; return ;;
        @TEXTS@) return ;;
    esac
    if [[ $PREFIX == -* ]]; then
        case $command in
@OPTIONS@
        esac
        _describe -o option offered
    elif [[ -z $command ]]; then
        offered=(@NAMES@)
        _describe command offered
    else
        _files
    fi
}
if [[ $funcstack[1] == _ckptool ]]; then _ckptool "$@"; else compdef _ckptool ckptool; fi
"""
_ZSH_WORDS = "compadd -- {words}; return"


def _bash(commands: Sequence[_Command]) -> str:
    others = [name for takes in ("file", "folder", "text") for name in _values(commands, takes)]
    offer = 'COMPREPLY=($(compgen -W "{words}" -- "$current"))'
    return _filled(_BASH, {
        "COMMANDS": _names(commands, "|"),
        "NAMES": _names(commands, " "),
        "VALUES": _cases({name: " ".join(WORDS[name]) for name in _values(commands, "words")}, f"{offer}; return"),
        "OTHERS": "|".join(others),
        "OPTIONS": _cases({_pattern(command): " ".join(_all_names(command)) for command in commands}, offer),
    })  # fmt: skip


def _zsh(commands: Sequence[_Command]) -> str:
    return _filled(_ZSH, {
        "COMMANDS": _names(commands, "|"),
        "NAMES": " ".join(_quoted(f"{command.name}:{command.help}") for command in commands if command.name),
        "VALUES": _cases({name: " ".join(WORDS[name]) for name in _values(commands, "words")}, _ZSH_WORDS),
        "FILES": "|".join(_values(commands, "file")),
        "FOLDERS": "|".join(_values(commands, "folder")),
        "TEXTS": "|".join(_values(commands, "text")),
        "OPTIONS": _cases({_pattern(command): _described(command) for command in commands}, "offered=({words})"),
    })  # fmt: skip


def _described(command: _Command) -> str:
    return " ".join(_quoted(f"{name}:{option.help}") for option in command.options for name in option.names)


def _fish(commands: Sequence[_Command]) -> str:
    none_yet = f"not __fish_seen_subcommand_from {_names(commands, ' ')}"
    lines = ["# Completion of ckptool for fish: ckptool --show-completion fish | source", "complete -c ckptool -f"]
    for command in commands:
        condition = f"__fish_seen_subcommand_from {command.name}" if command.name else none_yet
        start = f"complete -c ckptool -n {_quoted(condition)}"
        if command.name:
            lines.append(f"{start} -F")
            lines.append(f"complete -c ckptool -n '{none_yet}' -a {command.name} -d {_quoted(command.help)}")
        lines += [f"{start} {_fish_option(option)} -d {_quoted(option.help)}" for option in command.options]
    return "\n".join(lines) + "\n"


def _fish_option(option: _Option) -> str:
    names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
    takes = {
        "": "",
        "text": " -x",
        "file": " -r -F",
        "folder": " -x -a '(__fish_complete_directories)'",
        "words": f" -x -a {_quoted(' '.join(WORDS.get(option.names[0], ())))}",
    }
    return names + takes[option.takes]


def _filled(template: str, parts: Mapping[str, str]) -> str:
    for name, part in parts.items():
        template = template.replace(f"@{name}@", part)
    return template


def _names(commands: Sequence[_Command], separator: str) -> str:
    return separator.join(command.name for command in commands if command.name)


def _all_names(command: _Command) -> list[str]:
    return [name for option in command.options for name in option.names]


def _pattern(command: _Command) -> str:
    return command.name or '""'


def _cases(words: Mapping[str, str], line: str) -> str:
    """Write the branches of a ``case``, each with its words."""
    return "\n".join(f"            {pattern}) {line.format(words=text)} ;;" for pattern, text in words.items())


SHELLS: Mapping[str, Callable[[Sequence[_Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
