"""The settings file of verify: ``ckptool.toml``, or ``[tool.ckptool]`` of ``pyproject.toml``."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ckptool.errors import CkptoolError
from ckptool.model.checks import CHECK_IDS, matching_checks
from ckptool.model.gate import Allowance, Gate, Settings
from ckptool.model.verification import Thresholds

GATES: dict[str, Gate] = {"fail": "fail", "warn": "warn", "never": "never"}
_OWN_FILE = "ckptool.toml"
_PROJECT_FILE = "pyproject.toml"
_MAX_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KINDS = {field.name: type(getattr(Thresholds(), field.name)) for field in fields(Thresholds)}


def find_settings(start: Path) -> Settings:
    """Read the nearest settings file from a folder upwards; a ``ckptool.toml`` outranks the project file beside it.

    :raises CkptoolError: it cannot be read, or says what is not known.
    """
    for folder in (start, *start.parents):
        for name in (_OWN_FILE, _PROJECT_FILE):
            path = folder / name
            if _is_file(path) and (table := _table(path)) is not None:
                return _settings(path, table)
    return Settings()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder above that may not be looked into
        return False


def read_settings(path: Path) -> Settings:
    """Read one settings file.

    :raises CkptoolError: it cannot be read, says nothing of ckptool, or says what is not known.
    """
    table = _table(path)
    if table is None:
        raise CkptoolError(f"{path}: has no table [tool.ckptool]; add one, or name another file")
    return _settings(path, table)


def _table(path: Path) -> Mapping[str, Any] | None:
    """Give the settings in a file; None where it is a project file that has none."""
    document = _parse(path)
    if path.name != _PROJECT_FILE:
        return document
    tools = document.get("tool")
    return tools.get("ckptool") if isinstance(tools, dict) else None


def _parse(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise CkptoolError(f"{path}: is larger than a settings file may be ({_MAX_BYTES} bytes); shorten it")
        document: dict[str, Any] = tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise CkptoolError(f"{path}: cannot be read ({error.strerror}); name another settings file") from error
    except (ValueError, RecursionError) as error:
        raise CkptoolError(f"{path}: is no TOML ({error}); correct it") from error
    return document


def _settings(path: Path, table: Any) -> Settings:
    if not isinstance(table, dict):
        raise CkptoolError(f"{path}: ckptool is no table; write [tool.ckptool]")
    read: dict[str, Callable[[Path, Any], Any]] = {
        "fail-on": _gate,
        "checks": _checks,
        "skip-checks": _checks,
        "thresholds": _thresholds,
        "allow": _allowances,
    }
    _refuse_unknown(path, "", table, read)
    return Settings(path, **{name.replace("-", "_"): read[name](path, value) for name, value in table.items()})


def _refuse_unknown(path: Path, where: str, table: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in table:
        if name not in known:
            raise CkptoolError(f"{path}: {where}{name} is no setting; choose among {', '.join(known)}")


def _gate(path: Path, value: Any) -> Gate:
    if not isinstance(value, str) or value not in GATES:
        raise CkptoolError(f"{path}: fail-on = {value!r}: choose one of {', '.join(GATES)}")
    return GATES[value]


def _checks(path: Path, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CkptoolError(f'{path}: checks and skip-checks are lists of names; write them as ["keys", "CK4"]')
    return checks_named(f"{path}: checks", value)


def checks_named(option: str, names: list[str]) -> tuple[str, ...]:
    """Give the ids of the checks that are named, by id, group, number or the start of one.

    :raises CkptoolError: a name stands for no check.
    """
    for name in names:
        if not matching_checks(name):
            groups = dict.fromkeys(check.partition(".")[0] for check in CHECK_IDS)
            raise CkptoolError(
                f"{option} {name}: no such check; choose an id, a number as CK401, or {', '.join(groups)}"
            )
    return tuple(dict.fromkeys(check for name in names for check in matching_checks(name)))


def _thresholds(path: Path, value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise CkptoolError(f"{path}: thresholds is no table; write [thresholds] with a number for each name")
    for name, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise CkptoolError(f"{path}: thresholds.{name} = {number!r}: is no number; give one")
    return {name: threshold(f"{path}: thresholds.", name, str(number)) for name, number in value.items()}


def threshold(option: str, name: str, text: str) -> float:
    """Read the number of one threshold; ``option`` is what its name stands behind in a refusal.

    :raises CkptoolError: there is no such threshold, or it is no number of its kind.
    """
    if name not in _KINDS:
        raise CkptoolError(f"{option}{name}: choose one of {', '.join(_KINDS)}")
    try:
        number: float = _KINDS[name](text)
    except ValueError as error:
        raise CkptoolError(f"{option}{name}={text}: is no number of this kind; give one") from error
    if math.isnan(number):
        raise CkptoolError(f"{option}{name}={text}: nothing is above or below it; give a number")
    return number


def _allowances(path: Path, value: Any) -> tuple[Allowance, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise CkptoolError(f"{path}: allow is no list of tables; write [[allow]] with sha256, check and reason")
    return tuple(allowance for entry in value for allowance in _allowance(path, entry))


def _allowance(path: Path, entry: Mapping[str, Any]) -> Iterator[Allowance]:
    wanted = ("sha256", "check", "reason")
    _refuse_unknown(path, "allow.", entry, dict.fromkeys(wanted))
    given = {name: entry.get(name) for name in wanted}
    for name, text in given.items():
        if not isinstance(text, str) or not text.strip():
            raise CkptoolError(f"{path}: an entry of allow lacks its {name}; give sha256, check and reason as text")
    sha256 = str(given["sha256"]).lower()  # as CertUtil and PowerShell write it: in capitals
    if not _SHA256.fullmatch(sha256):
        raise CkptoolError(f"{path}: allow.sha256 {given['sha256']}: write 64 hexadecimal digits, as sha256sum does")
    for check in checks_named(f"{path}: allow.check", [str(given["check"])]):
        yield Allowance(sha256, check, str(given["reason"]))
