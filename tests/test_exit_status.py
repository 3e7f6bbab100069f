"""The exit status of every command is a table: 0 done, same, sound; 1 the answer is no; 2 could not answer."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch


class Command:
    def __reduce__(self):
        return os.system, ("touch planted",)


def state(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {"fc.weight": torch.randn(4, 3, generator=generator), "fc.bias": torch.randn(4, generator=generator)}
    return {**weights, **changed}


def damage(path: Path) -> None:
    """Flip a bit in a record with the bytes of a tensor, which its checksum proves."""
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    content = bytearray(path.read_bytes())
    content[content.index(info.filename.encode()) + len(info.filename) + 64] ^= 1
    path.write_bytes(content)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Stand in a folder with files of every kind."""
    monkeypatch.chdir(tmp_path)
    torch.save(state(), "sound.pt")
    torch.save(state(), "same.pt")
    safetensors.torch.save_file(state(), "same.safetensors")
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in state().items()}, "wrapped.pt")
    torch.save(state(**{"fc.bias": torch.full((4,), math.nan)}), "nan.pt")
    torch.save(state(**{"fc.bias": torch.full((4,), 1e9)}), "large.pt")
    torch.save({"state_dict": state(), "callback": Command()}, "evil.pt")
    torch.save(
        {f"{part}.{name}": tensor for part in ("student", "teacher") for name, tensor in state().items()}, "pair.pt"
    )
    torch.save({"epoch": 3}, "empty.pt")
    for name in ("eye.pt", "damaged.pt"):
        torch.save({"x.weight": torch.eye(64)}, name)
    damage(tmp_path / "damaged.pt")
    Path("junk.pt").write_bytes(b"junk")
    Path("there.pt").write_bytes(b"old")
    Path("settings.toml").write_text("fail-on = 'warn'")
    Path("wrong.toml").write_text("luck = 1")
    digest = hashlib.sha256(Path("nan.pt").read_bytes()).hexdigest()
    Path("allow.toml").write_text(f"[[allow]]\nsha256 = '{digest}'\ncheck = 'CK401'\nreason = 'known'\n")
    Path("runs").mkdir()
    torch.save(state(), "runs/epoch=1.ckpt")
    return tmp_path


TABLE = """
0 --version
0 --help
0 inspect --help
0 --show-completion bash
2
2 --no-such-option
2 no-such-command
2 --show-completion tcsh

0 inspect sound.pt
0 inspect wrapped.pt nan.pt evil.pt pair.pt empty.pt
0 inspect sound.pt --json
0 inspect sound.pt --stats
0 inspect runs
2 inspect
2 inspect junk.pt
2 inspect absent.pt
2 inspect sound.pt junk.pt
2 inspect damaged.pt --stats
2 inspect sound.pt --sort luck
2 inspect sound.pt --color purple
2 inspect sound.pt --no-such-option
2 inspect runs --best

0 diff sound.pt same.pt
0 diff sound.pt same.safetensors
0 diff sound.pt wrapped.pt
1 diff sound.pt wrapped.pt --exact-names
1 diff sound.pt nan.pt
0 diff sound.pt nan.pt --exclude *.bias
1 diff sound.pt same.pt nan.pt
2 diff sound.pt
2 diff sound.pt junk.pt
2 diff junk.pt sound.pt
2 diff sound.pt nan.pt junk.pt
2 diff sound.pt absent.pt
2 diff eye.pt damaged.pt
2 diff sound.pt same.pt --rtol -1

0 strip-prefixes wrapped.pt out.pt
0 strip-prefixes sound.pt out.pt
0 strip-prefixes evil.pt out.pt
0 strip-prefixes wrapped.pt --dry-run
0 strip-prefixes wrapped.pt there.pt --force
0 strip-prefixes wrapped.pt --in-place
0 strip-prefixes evil.pt --in-place --weights-only
0 strip-prefixes sound.pt wrapped.pt -o out
0 strip-prefixes wrapped.pt out.pt --manifest out.json
2 strip-prefixes wrapped.pt
2 strip-prefixes wrapped.pt there.pt
2 strip-prefixes evil.pt --in-place
2 strip-prefixes pair.pt out.pt --prefix student.
2 strip-prefixes wrapped.pt out.pt --prefix luck.
2 strip-prefixes empty.pt out.pt
2 strip-prefixes damaged.pt out.pt
2 strip-prefixes junk.pt out.pt
2 strip-prefixes sound.pt junk.pt -o out
2 strip-prefixes wrapped.pt out.pt --weights ema

0 convert wrapped.pt out.safetensors
0 convert sound.pt out.safetensors --dtype float16
0 convert large.pt out.safetensors --dtype float16
0 convert evil.pt out.safetensors
0 convert sound.pt wrapped.pt -o out --to safetensors
0 convert sound.pt out.safetensors --manifest out.json
2 convert large.pt out.safetensors --dtype float16 --fail-on-overflow
2 convert sound.pt out.nothing
2 convert sound.pt there.pt
2 convert sound.pt out.safetensors --keep-rest
2 convert sound.pt out.safetensors --dtype int8
2 convert damaged.pt out.safetensors
2 convert junk.pt out.safetensors
2 convert sound.pt junk.pt -o out --to safetensors
2 convert sound.pt out.safetensors --manifest out.pt

0 verify sound.pt
0 verify wrapped.pt
0 verify sound.pt wrapped.pt
1 verify wrapped.pt --fail-on warn
1 verify wrapped.pt --config settings.toml
0 verify wrapped.pt --config settings.toml --fail-on fail
1 verify nan.pt
0 verify nan.pt --fail-on never
0 verify nan.pt --config allow.toml
1 verify large.pt nan.pt --config allow.toml --checks CK401 --against sound.pt --checks CK701
0 verify nan.pt --skip-checks values
1 verify evil.pt
1 verify damaged.pt
0 verify sound.pt --against same.safetensors
1 verify sound.pt --against nan.pt
2 verify pair.pt
2 verify pair.pt --fail-on never
2 verify junk.pt
2 verify junk.pt --fail-on never
2 verify absent.pt
2 verify sound.pt nan.pt junk.pt
1 verify sound.pt nan.pt
2 verify
2 verify sound.pt --checks luck
2 verify sound.pt --checks output
2 verify sound.pt --config wrong.toml
2 verify sound.pt --config absent.toml
2 verify sound.pt --output luck
2 verify sound.pt --output json=there.pt
2 verify sound.pt --against junk.pt
2 verify sound.pt --manifest junk.pt
2 verify sound.pt --model absent:Net
"""
ROWS = [line for line in TABLE.splitlines() if line]


@pytest.mark.parametrize("row", ROWS)
def test_the_exit_status_is_that_of_the_table(run, place, row):
    status, *args = row.split()
    ran = run(*args)
    assert ran.status == int(status), (ran.out, ran.err)
    assert "Traceback" not in ran.err
    assert not Path("planted").exists()
    assert Path("there.pt").read_bytes() == b"old" or "--force" in args
    if ran.status == 2:
        assert ran.err or "inconclusive" in ran.out


UNNAMED = [
    ("inspect", ""),
    ("inspect", "sound.pt", "--like", ""),
    ("diff", "sound.pt", ""),
    ("strip-prefixes", "wrapped.pt", ""),
    ("convert", "wrapped.pt", "--to", "pt", "-o", ""),
    ("verify", ""),
    ("verify", "sound.pt", "--against", ""),
    ("verify", "sound.pt", "--model", "auto", "--images", ""),
    ("verify", "sound.pt", "--model", "auto", "--data", ""),
]


@pytest.mark.parametrize("args", UNNAMED, ids=" ".join)
def test_an_empty_name_is_not_the_current_folder(run, place, args):
    before = sorted(Path().rglob("*"))
    ran = run(*args)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err == "ckptool: the name of a file is empty; check the variable that it comes from\n"
    assert sorted(Path().rglob("*")) == before


def test_every_command_has_its_rows():
    from ckptool.cli.app import app

    for command in app.registered_commands:
        statuses = {row[0] for row in ROWS if row[1:].startswith(f" {command.name}")}
        assert statuses >= {"0", "2"}, command.name
        assert ("1" in statuses) == (command.name in ("diff", "verify"))
