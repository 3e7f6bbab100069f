"""What verify found, as JUnit's XML: a suite for each checkpoint, a case for each check."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from xml.etree import ElementTree

from ckptool.model.verification import Check, CheckStatus, Verification
from ckptool.reports.findings import level_of, sentence, title_of, unsaid_error
from ckptool.reports.text import safe_text

_COUNTED = {"failures": "failure", "errors": "error", "skipped": "skipped"}


def write_junit(verifications: Sequence[Verification], gate: Collection[CheckStatus]) -> str:
    """Write one document, in ASCII; ``gate`` holds the statuses that mean no.

    A check that fails is a failure, one that is open an error, one that is allowed is skipped with the reason, and one
    that only warns passes with its warning as output.
    """
    root = ElementTree.Element("testsuites", name="ckptool verify")
    for verification in verifications:
        suite = ElementTree.SubElement(root, "testsuite", name=safe_text(verification.path))
        suite.extend(_cases(verification, gate))
        _count(suite)
    _count(root)
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="us-ascii", xml_declaration=True)
    return document.decode("ascii") + "\n"


def _count(element: ElementTree.Element) -> None:
    element.set("tests", str(len(list(element.iter("testcase")))))
    for name, tag in _COUNTED.items():
        element.set(name, str(len(list(element.iter(tag)))))


def _cases(verification: Verification, gate: Collection[CheckStatus]) -> Iterable[ElementTree.Element]:
    for check in verification.checks:
        case = _case(verification, title_of(check))
        _judge(case, check, gate)
        yield case
    error = unsaid_error(verification)
    if error is not None:
        case = _case(verification, "answer")
        _say(case, "error", "error", error)
        yield case


def _case(verification: Verification, name: str) -> ElementTree.Element:
    return ElementTree.Element("testcase", classname=safe_text(verification.path), name=name)


def _judge(case: ElementTree.Element, check: Check, gate: Collection[CheckStatus]) -> None:
    if check.status == "pass":
        return
    if check.allowed:
        _say(case, "skipped", check.status, f"allowed ({check.allowed}): {check.message}")
    elif check.status == "skip":
        _say(case, "skipped", "skip", check.message)
    elif check.status == "inconclusive":
        _say(case, "error", "inconclusive", sentence(check))
    elif level_of(check, gate) == "error":
        _say(case, "failure", check.status, sentence(check))
    else:
        ElementTree.SubElement(case, "system-out").text = safe_text(f"warn: {sentence(check)}")


def _say(case: ElementTree.Element, tag: str, kind: str, text: str) -> None:
    ElementTree.SubElement(case, tag, type=kind, message=safe_text(text))
