"""What verify found, as a SARIF 2.1.0 log: a rule for each check, a result for each finding.

Source: Static Analysis Results Interchange Format (SARIF) Version 2.1.0, OASIS Standard.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ckptool.model.checks import CHECK_IDS, CHECKS, CheckKind
from ckptool.model.verification import Check, CheckStatus, Verification
from ckptool.reports.findings import Finding, findings, is_address, level_of, place_of, sentence
from ckptool.reports.json import to_json
from ckptool.reports.text import safe_text

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_ROOT = "%SRCROOT%"  # what viewers set to the root of the repository
_FINGERPRINT = "ckptool/v1"
_IN_ADDRESSES = ":/?#[]@!$&'()*+,;=%~"  # what an address may hold, by RFC 3986
_OPEN = ("fail", "warn", "inconclusive")


def write_sarif(verifications: Sequence[Verification], gate: Collection[CheckStatus], version: str) -> str:
    """Write one log of one run; ``gate`` holds the statuses that mean no, ``version`` is that of ckptool.

    What is allowed is a suppressed result; what passed is none, since viewers show every result as a problem.
    """
    driver = {"name": "ckptool", "semanticVersion": version, "rules": [_rule(kind) for kind in CHECKS]}
    run = {
        "tool": {"driver": driver},
        "invocations": [_invocation(verifications)],
        "artifacts": [{"location": _location(each.path)} for each in verifications],
        "results": [result for index, each in enumerate(verifications) for result in _results(each, index, gate)],
        "columnKind": "unicodeCodePoints",
    }
    return to_json({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]})


def _rule(kind: CheckKind) -> dict[str, Any]:
    name = "".join(part.capitalize() for part in kind.id.split("."))
    return {
        "id": kind.code,
        "name": name,
        "shortDescription": {"text": f"{kind.id}: {kind.asks}"},
        "fullDescription": {"text": kind.asks},
        "help": {"text": kind.remedy, "markdown": kind.remedy},
        "defaultConfiguration": {"level": "error"},
        "properties": {"tags": ["checkpoint", kind.group]},
    }


def _invocation(verifications: Sequence[Verification]) -> dict[str, Any]:
    """Tell whether every checkpoint was answered for, and why not."""
    unanswered = [each for each in verifications if each.error is not None]
    return {
        "executionSuccessful": not unanswered,
        "toolExecutionNotifications": [_notification(each) for each in unanswered],
    }


def _notification(verification: Verification) -> dict[str, Any]:
    text = {"text": _plain(verification.error or "")}
    return {"level": "error", "message": text, "locations": _locations(verification.path)}


def _results(verification: Verification, artifact: int, gate: Collection[CheckStatus]) -> list[dict[str, Any]]:
    said = [finding for finding in findings(verification, gate) if finding.check is not None]
    allowed = [
        Finding(verification.path, level_of(check, gate), sentence(check), check)
        for check in verification.checks
        if check.allowed and check.status in _OPEN
    ]
    return [_result(finding, finding.check, artifact) for finding in (*said, *allowed) if finding.check is not None]


def _result(finding: Finding, check: Check, artifact: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": check.code,
        "ruleIndex": CHECK_IDS.index(check.id),
        "level": finding.level,
        "message": {"text": _plain(finding.text)},
        "locations": _locations(finding.path, artifact),
        "partialFingerprints": {_FINGERPRINT: _fingerprint(finding.path, check)},
        "properties": {"status": check.status},
    }
    if check.allowed:
        result["suppressions"] = [{"kind": "external", "justification": safe_text(check.allowed)}]
    return result


def _locations(path: str, artifact: int | None = None) -> list[dict[str, Any]]:
    index = {} if artifact is None else {"index": artifact}
    return [{"physicalLocation": {"artifactLocation": {**_location(path), **index}}}]


def _location(path: str) -> dict[str, str]:
    """Give the place of a file: relative to the root of the repository, or as an absolute URI."""
    if is_address(path):
        return {"uri": quote(path, safe=_IN_ADDRESSES)}
    if Path(path).is_absolute():
        return {"uri": Path(path).as_uri()}
    # Of its bytes: a name need not be text. A colon would make the beginning a scheme.
    return {"uri": quote(os.fsencode(place_of(path)), safe="/"), "uriBaseId": _ROOT}


def _fingerprint(path: str, check: Check) -> str:
    return hashlib.sha256(os.fsencode(place_of(path)) + b"\0" + check.code.encode()).hexdigest()[:32]


def _plain(text: str) -> str:
    """Escape foreign text, and the brackets that make a link of it."""
    return re.sub(r"[\\\[\]]", r"\\\g<0>", safe_text(text))
