"""The table of all options in README.md, made from the commands themselves.

python tests/support/option_reference.py      # writes it anew
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- options: written by tests/support/option_reference.py -->\n", "<!-- end of options -->\n"
COMMANDS = ("inspect", "diff", "strip-prefixes", "convert", "verify")
_NO_DEFAULT = (None, False, (), [], "")


def option_table() -> str:
    """Give one row for each option: how it is written, the commands that take it, and what it means in each."""
    rows: dict[tuple[str, str], list[str]] = {}
    for command, parameter in _parameters():
        if parameter.param_type_name == "option" and parameter.name != "help":
            rows.setdefault((_spelling(parameter), _meaning(parameter)), []).append(command)
    ordered = sorted(rows.items(), key=lambda row: _by_name(row[0][0]))
    lines = [f"| `{spelling}` | {_all_or(names)} | {meaning} |\n" for (spelling, meaning), names in ordered]
    return "".join(["| option | commands | meaning |\n", "| --- | --- | --- |\n", *lines])


def _parameters() -> list[tuple[str, Any]]:
    # A command is registered when its module is imported.
    import ckptool.cli.diff
    import ckptool.cli.inspect
    import ckptool.cli.verify
    import ckptool.cli.writing  # noqa: F401
    from ckptool.cli.app import app

    group: Any = typer.main.get_command(app)
    return [(name, parameter) for name in COMMANDS for parameter in group.commands[name].params]


def _spelling(parameter: Any) -> str:
    names = " / ".join([*sorted(parameter.opts, key=len), *parameter.secondary_opts])
    if parameter.is_flag:
        return names
    return f"{names} {parameter.metavar or ('X' if parameter.type.name.startswith('float') else 'N')}"


def _meaning(parameter: Any) -> str:
    default = "" if parameter.default in _NO_DEFAULT or parameter.is_flag else f" Default: `{parameter.default}`."
    return re.sub(r"([|<*_])", r"\\\1", parameter.help) + default


def _all_or(names: list[str]) -> str:
    return "all" if len(names) == len(COMMANDS) else ", ".join(names)


def _by_name(spelling: str) -> str:
    return spelling[spelling.index("--") :]


def with_table(text: str) -> str:
    """Put the table between its marks."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{option_table()}\n{END}{tail}"


if __name__ == "__main__":
    sys.path.insert(0, str(README.parent))
    README.write_text(with_table(README.read_text()))
