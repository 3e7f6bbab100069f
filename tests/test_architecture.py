"""Imports run one way, heavy libraries stay in their rooms, and nothing that runs a file's content exists."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptool.operations.architectures.named import names_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ckptool"
DIGITS = ROOT / "examples" / "digits.ckpt"

WORDS = {"errors", "model"}
LEAVES = {"formats", "layouts", "writers"}
# Who may import whom, besides itself. ``ckptool`` is the package's own __init__: the version and the lazy API.
MAY_IMPORT = {
    "errors": set(),
    "model": {"errors"},
    "formats": WORDS,
    "layouts": WORDS,
    "writers": WORDS,
    "operations": WORDS | LEAVES,
    "loading": WORDS | LEAVES | {"operations"},
    "verification": WORDS | LEAVES | {"operations", "loading"},
    "reports": WORDS,
    "cli": WORDS | LEAVES | {"operations", "loading", "verification", "reports", "ckptool"},
    "ckptool": WORDS | LEAVES | {"operations", "loading"},
    "__main__": {"cli"},
}
# In which rooms a library may be imported at all.
LIBRARY_ROOMS = {
    "torch": {"loading", "verification"},
    "numpy": {"operations", "loading", "verification"},
    "rich": {"reports"},
    "typer": {"cli"},
    "isal": {"model"},
    **{name: {"formats"} for name in ("http", "socket", "ssl", "fsspec", "aiohttp", "botocore", "gcsfs")},
}
# What runs the content of a file, or imports what a file names. ``import_module`` is for the package's own lazy API,
# and for loading, where the user names the module.
RUNS_CONTENT = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.load", "_pickle.loads", "_pickle.Unpickler"),
    *("marshal.load", "marshal.loads", "torch.load", "torch.serialization.load", "numpy.load", "runpy.run_path"),
    *("eval", "exec", "compile", "__import__", "importlib.import_module"),
}


@dataclass(frozen=True)
class Import:
    where: str
    room: str
    target: str


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "ckptool" if first == "__init__" else first


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports_in(path: Path, source: str) -> Iterator[Import]:
    tree = ast.parse(source, str(path))
    for node in ast.walk(tree):
        for name in imported_names(node):
            yield Import(f"{path.relative_to(ROOT)}:{node.lineno}", room_of(path), name)


def all_imports() -> list[Import]:
    return [found for path in modules() for found in imports_in(path, path.read_text())]


def target_room(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "ckptool":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "ckptool"


def wrong_directions(imports: list[Import]) -> list[str]:
    return [
        f"{found.where} imports {found.target}"
        for found in imports
        if (room := target_room(found.target)) is not None and room != found.room and room not in MAY_IMPORT[found.room]
    ]


def misplaced_libraries(imports: list[Import]) -> list[str]:
    return [
        f"{found.where} imports {found.target}"
        for found in imports
        if found.room not in LIBRARY_ROOMS.get(found.target.split(".")[0], {found.room})
    ]


def content_runners(path: Path, source: str) -> list[str]:
    tree = ast.parse(source, str(path))
    named = {node: ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)}
    named |= {node: name for node in ast.walk(tree) for name in imported_names(node) if "." in name}
    allowed = {"importlib.import_module"} if room_of(path) in ("loading", "ckptool") else set()
    return [
        f"{path.relative_to(ROOT)}:{node.lineno} uses {name}"
        for node, name in named.items()
        if name in RUNS_CONTENT - allowed
    ]


def test_every_room_is_known():
    assert {room_of(path) for path in modules()} <= MAY_IMPORT.keys()


def test_imports_run_one_way():
    assert wrong_directions(all_imports()) == []


def test_heavy_libraries_stay_in_their_rooms():
    assert misplaced_libraries(all_imports()) == []


def test_nothing_runs_what_a_file_says():
    assert [use for path in modules() for use in content_runners(path, path.read_text())] == []


@pytest.mark.parametrize(
    ("room", "source", "check"),
    [
        ("model", "import ckptool.formats", wrong_directions),
        ("formats", "from ckptool import layouts", wrong_directions),
        ("writers", "def f():\n    from ckptool.formats.zip import read", wrong_directions),
        ("operations", "from ckptool.loading import load", wrong_directions),
        ("reports", "import ckptool.operations.describe", wrong_directions),
        ("loading", "from ckptool.cli import main", wrong_directions),
        ("operations", "import torch.nn", misplaced_libraries),
        ("cli", "from rich.table import Table", misplaced_libraries),
        ("reports", "import typer", misplaced_libraries),
        ("formats", "def f():\n    import numpy", misplaced_libraries),
    ],
)
def test_the_rules_find_what_breaks_them(room, source, check):
    path = PACKAGE / room / "new.py"
    assert len(check(list(imports_in(path, source)))) == 1


@pytest.mark.parametrize(
    "source",
    ["pickle.loads(data)", "torch.load(path)", "from pickle import load", "eval(text)", "from torch import load"],
)
def test_the_rules_find_what_runs_content(source):
    assert len(content_runners(PACKAGE / "formats" / "new.py", source)) == 1


# NumPy costs a tenth of a second and is only for values; typer must not bring pydantic.
COMMANDS = {
    "version": ("--version",),
    "help": ("--help",),
    "command help": ("convert", "--help"),
    "inspect": ("inspect", DIGITS),
    "inspect json": ("inspect", DIGITS, "--tensors", "--json"),
    "strip-prefixes": ("strip-prefixes", DIGITS, "{out}/clean.pt"),
    "dry run": ("strip-prefixes", DIGITS, "{out}/dry.pt", "--dry-run"),
    "convert": ("convert", DIGITS, "{out}/new.safetensors"),
    "convert back": ("convert", "{out}/clean.safetensors", "{out}/again.pt"),
    "cast": ("convert", DIGITS, "{out}/half.safetensors", "--dtype", "bfloat16"),
    "stats": ("inspect", DIGITS, "--stats"),
    "diff": ("diff", DIGITS, DIGITS, "--metadata"),
    "like an architecture": (
        "strip-prefixes",
        "{out}/net.safetensors",
        "{out}/own.safetensors",
        "--like",
        "timm:test_vit",
    ),
}
NEEDS_NUMPY = {"cast", "stats"}
RUN = """
import json, sys
from ckptool.cli import main
status = main(json.loads(sys.argv[1]))
print(json.dumps([status, sorted({name.split(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import safetensors.torch
    import torch

    out = tmp_path_factory.mktemp("imports")
    safetensors.torch.save_file({"fc.weight": torch.ones(2, 3)}, out / "clean.safetensors")
    network = {f"net.{name}": torch.zeros(shape) for name, shape in names_of("timm:test_vit").items() if shape}
    heads = {"net.head.weight": torch.zeros(5, 64), "net.head.bias": torch.zeros(5)}
    safetensors.torch.save_file(network | heads, out / "net.safetensors")
    return out


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_start_without_heavy_libraries(name, folder):
    argv = [str(arg).format(out=folder) for arg in COMMANDS[name]]
    ran = subprocess.run([sys.executable, "-c", RUN, json.dumps(argv)], capture_output=True, text=True)
    status, loaded = json.loads(ran.stderr.splitlines()[-1])
    assert status == 0, ran.stderr
    heavy = {"torch", "pydantic", "lightning", "safetensors", "numpy", "matplotlib", "http", "ssl", "fsspec"} - (
        {"numpy"} if name in NEEDS_NUMPY else set()
    )
    assert heavy.isdisjoint(loaded)


def test_the_package_alone_loads_nothing_heavy():
    code = "import sys, ckptool; ckptool.__version__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "numpy", "rich", "typer"}.isdisjoint(loaded)
