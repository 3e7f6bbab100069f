"""The limits that hold the readers' tests must themselves fail what breaks them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.containment import WATCH, Acted, limited_memory, limited_time

import ckptool

PACKAGE = Path(ckptool.__file__).parent
ACTS = {
    "process": "import os; os.system('true')",
    "child": "import subprocess; subprocess.run(['true'])",
    "socket": "import socket; socket.socket()",
    "library": "import ctypes; ctypes.CDLL(None)",
    "import by name": "__import__('antigravity')",
    "import by its path": "import importlib; importlib.import_module('this')",
    "codec by name": "b'x'.decode('mac_iceland')",
    "program": "exec('1')",
    "expression": "eval('1')",
    "pickle": "import pickle; pickle.loads(b'cthis\\ns\\n.')",
    "writing": "open('made', 'w').close()",
    "writing at a low level": "import os; os.close(os.open('made', os.O_WRONLY | os.O_CREAT))",
    "removing": "import os; os.remove('there')",
    "temporary file": "import tempfile; tempfile.NamedTemporaryFile(dir='.').close()",
    "folder": "import os; os.mkdir('made')",
}
HARMLESS = {
    "import": "import this",
    "reading": "with open('there') as file: file.read()",
    "reading at a low level": "import os; os.close(os.open('there', os.O_RDONLY))",
    "a file without a name": "import tempfile; tempfile.TemporaryFile().close()",
    "nowhere": "import os; open(os.devnull, 'w').close()",
}
ALLOWED = [
    ("writers/staging.py", "writing"),
    ("writers/staging.py", "removing"),
    ("loading/build.py", "import by its path"),
    ("verification/bench.py", "child"),
    ("cli/writing.py", "folder"),
]
FORBIDDEN = [
    *(("formats/pickle/machine.py", act) for act in ACTS),
    *(("layouts/select.py", act) for act in ACTS),
    ("operations/describe.py", "writing"),
    ("operations/describe.py", "process"),
    ("writers/staging.py", "child"),
    ("reports/json.py", "writing"),
    ("cli/inspect.py", "writing"),
]


@pytest.fixture(autouse=True)
def contained() -> None:
    """Stand in for the limits themselves: what is caught here is meant to be."""


def act(module: str, statement: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run a statement as if it stood in a module of the package; give what was caught."""
    monkeypatch.chdir(folder)
    Path("there").touch()
    program = compile(statement, str(PACKAGE / module), "exec")
    try:
        with WATCH.watching():
            exec(program, {})
    except (Acted, AssertionError):
        return list(WATCH.seen)
    return []


@pytest.mark.parametrize(("module", "name"), FORBIDDEN)
def test_what_a_file_must_not_cause_is_caught(module, name, tmp_path, monkeypatch):
    assert act(module, ACTS[name], tmp_path, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("name", HARMLESS)
def test_reading_is_free(name, tmp_path, monkeypatch):
    assert act("formats/zip/end.py", HARMLESS[name], tmp_path, monkeypatch) == []


@pytest.mark.parametrize(("module", "name"), ALLOWED)
def test_what_the_user_asked_for_is_done(module, name, tmp_path, monkeypatch):
    assert act(module, ACTS[name], tmp_path, monkeypatch) == []


def test_an_action_whose_error_is_swallowed_is_caught_all_the_same(tmp_path, monkeypatch):
    swallowed = "import os\ntry:\n    os.system('true')\nexcept BaseException:\n    pass"
    assert act("formats/zip/end.py", swallowed, tmp_path, monkeypatch)


def test_too_much_memory_is_an_error():
    with limited_memory(64 << 20):
        assert bytearray(32 << 20)
        with pytest.raises(MemoryError):
            bytearray(1 << 30)
    assert bytearray(65 << 20)


@pytest.mark.parametrize(
    ("limits", "work"), [((0.05, 60), "while True: pass"), ((60, 0.05), "import time; time.sleep(60)")]
)
def test_too_much_time_is_an_error(limits, work):
    with pytest.raises(Acted, match="seconds"), limited_time(*limits):
        exec(work, {})
