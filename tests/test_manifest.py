"""A manifest says what was written, by its own definition, and verify holds a file against it."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.strict_json import strictly

DIGITS = Path(__file__).parents[1] / "examples" / "digits.ckpt"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture
def written(run, tmp_path):
    """Convert the digits with a manifest, and give the folder."""
    ran = run("convert", DIGITS, tmp_path / "out.safetensors", "--manifest", tmp_path / "out.json", "--digest")
    assert ran.status == 0, ran.err
    return tmp_path


def manifest_of(folder: Path) -> dict:
    return strictly((folder / "out.json").read_text())


@pytest.fixture
def held(run):
    """Give the status and the check ``manifest`` of a file held against a manifest."""

    def verify(path: Path, manifest: Path) -> tuple[int, dict]:
        ran = run("verify", path, "--manifest", manifest, "--checks", "manifest", "--json")
        [check] = strictly(ran.out)["checks"]
        assert check["code"] == "CK102"
        return ran.status, check

    return verify


def test_it_says_what_was_written_by_its_own_definition(written):
    found = manifest_of(written)
    out = (written / "out.safetensors").read_bytes()
    assert found["files"] == [{"name": "out.safetensors", "bytes": len(out), "sha256": sha256(out)}]
    tensors = safetensors.torch.load(out)
    assert {each["name"] for each in found["tensors"]} == tensors.keys()
    for each in found["tensors"]:
        tensor = tensors[each["name"]]
        dtype, values = str(tensor.dtype).removeprefix("torch."), tensor.numpy().tobytes()
        assert (each["dtype"], each["shape"], each["bytes"]) == (dtype, list(tensor.shape), len(values))
        header = f"{dtype} {','.join(map(str, tensor.shape))}\n"
        assert each["sha256"] == sha256(header.encode() + values)
    lines = (f"{each['sha256']} {len(each['name'])} {each['name']}\n" for each in found["tensors"])
    assert found["digest"] == "sha256:" + sha256("".join(sorted(lines, key=lambda line: line.split(" ")[2])).encode())


def test_it_says_where_that_comes_from_and_what_was_left(written, run):
    found = manifest_of(written)
    source = DIGITS.read_bytes()
    assert found["source"] == {
        "files": [{"name": "digits.ckpt", "bytes": len(source), "sha256": sha256(source)}],
        "state_dict": {"path": "state_dict", "role": "main"},
    }
    assert {"optimizer_states", "callbacks", "loops"} <= {each["name"] for each in found["dropped"]}
    assert [each["segment"] for each in found["wrappers"]] == ["_orig_mod", "model"]
    assert found["map"]["model._orig_mod.fc.bias"] == "fc.bias"
    assert str(written) not in (written / "out.json").read_text()
    ran = run("convert", DIGITS, written / "again.safetensors", "--digest", "--json")
    assert strictly(ran.out)["digest"] == found["digest"]


def test_the_same_input_gives_the_same_manifest(written, run):
    before = (written / "out.json").read_bytes()
    given = ("convert", DIGITS, written / "out.safetensors", "--manifest", written / "out.json")
    assert run(*given, "--force").status == 0
    assert (written / "out.json").read_bytes() == before


def test_a_file_is_held_against_it(written, held):
    out, manifest = written / "out.safetensors", written / "out.json"
    assert held(out, manifest)[0] == 0
    renamed = written / "renamed.safetensors"
    out.rename(renamed)
    assert held(renamed, manifest)[0] == 0
    flip(renamed, len(renamed.read_bytes()) - 1)
    status, check = held(renamed, manifest)
    assert status == 1
    assert len(check["evidence"]["changed"]) == 1
    assert check["evidence"]["changed"][0] in check["message"]


def test_another_file_with_the_same_tensors_is_another_file(written, held, run):
    other = written / "other.safetensors"
    assert run("convert", DIGITS, other, "--no-metadata").status == 0
    status, check = held(other, written / "out.json")
    assert (status, check["evidence"]["changed"], check["evidence"]["missing"]) == (1, [], [])
    assert "the file around them is another" in check["message"]


def test_names_shapes_and_dtypes_that_differ_are_named(written, held):
    tensors = safetensors.torch.load_file(written / "out.safetensors")
    tensors["fc.bias"] = tensors["fc.bias"].half()
    tensors["new.bias"] = tensors.pop("bn.bias").clone()
    tensors["fc.weight"] = tensors["fc.weight"].reshape(-1)
    safetensors.torch.save_file(tensors, written / "other.safetensors")
    status, check = held(written / "other.safetensors", written / "out.json")
    assert status == 1
    assert check["evidence"]["missing"] == ["bn.bias"]
    assert check["evidence"]["unexpected"] == ["new.bias"]
    assert sorted(check["evidence"]["changed"]) == ["fc.bias", "fc.weight"]


def test_the_other_checks_stand_beside_it(written, run):
    found = strictly(run("verify", written / "out.safetensors", "--manifest", written / "out.json", "--json").out)
    assert [check["code"] for check in found["checks"]][:3] == ["CK101", "CK102", "CK201"]
    assert found["verdict"] == "pass"


def tied() -> dict:
    weight = torch.arange(6.0).reshape(2, 3)
    return {"a.weight": weight, "b.weight": weight, "c.weight": torch.ones(2)}


def sparse() -> dict:
    return {"a.weight": torch.eye(3).to_sparse(), "b.weight": torch.ones(3)}


def averaged() -> dict:
    main = {"fc.weight": torch.ones(2, 2)}
    return {"state_dict": main, "state_dict_ema": {"fc.weight": torch.zeros(2, 2)}, "epoch": 3}


OUTPUTS = {
    "torch file": (tied, "out.pt", ()),
    "tied names": (tied, "out.safetensors", ()),
    "tied names written": (tied, "out.safetensors", ("--ties", "copy")),
    "shards": (tied, "out", ("--to", "safetensors", "--max-shard-size", "20")),
    "shards by the name of a file": (tied, "out.safetensors", ("--max-shard-size", "20")),
    "shards of torch by the name of a file": (tied, "out.pt", ("--max-shard-size", "20")),
    "shards of torch": (tied, "out", ("--to", "pt", "--max-shard-size", "20")),
    "sparse": (sparse, "out.pt", ()),
    "averaged": (averaged, "out.safetensors", ("--weights", "ema")),
    "the rest kept": (averaged, "out.pt", ("--keep-rest", "--weights", "ema")),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_kind_of_output_is_described_and_held(run, held, tmp_path, name):
    make, out, options = OUTPUTS[name]
    torch.save(make(), tmp_path / "in.pt")
    manifest = tmp_path / "out.json"
    ran = run("convert", tmp_path / "in.pt", tmp_path / out, "--manifest", manifest, *options)
    assert ran.status == 0, ran.err
    found = manifest_of(tmp_path)
    files = [path for path in sorted(tmp_path.rglob("out*")) if path.is_file() and path != manifest]
    files = files or sorted((tmp_path / out).iterdir())
    assert sorted((each["name"], each["sha256"]) for each in found["files"]) == [
        (path.name, sha256(path.read_bytes())) for path in files
    ]
    if make is tied:
        assert {each["name"] for each in found["tensors"]} == set(tied())
    if make is averaged:
        assert found["tensors"][0]["sha256"] == sha256(b"float32 2,2\n" + bytes(16))
    if make is sparse:
        assert [each["sha256"] is None for each in found["tensors"]] == [True, False]
        assert found["digest"] is None
    index = tmp_path / f"{out}.index.json"
    written = index if index.exists() else tmp_path / out
    assert held(written, manifest)[0] == 0
    flip(files[0], files[0].stat().st_size // 2)
    ran = run("verify", written, "--manifest", manifest)
    assert ran.status != 0


def test_what_is_kept_beside_the_weights_is_no_part_of_their_tensors(run, held, tmp_path):
    for name, epoch in (("one", 3), ("other", 4)):
        torch.save({**averaged(), "epoch": epoch}, tmp_path / f"{name}.ckpt")
        given = (tmp_path / f"{name}.ckpt", tmp_path / f"{name}.pt", "--keep-rest", "--weights", "ema")
        assert run("convert", *given, "--manifest", tmp_path / f"{name}.json").status == 0
    status, check = held(tmp_path / "other.pt", tmp_path / "one.json")
    assert (status, check["evidence"]["changed"]) == (1, [])
    assert "the file around them is another" in check["message"]


def test_a_file_replaced_in_place_has_the_source_that_it_replaced(run, held, tmp_path):
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in tied().items()}, tmp_path / "a.pt")
    before = sha256((tmp_path / "a.pt").read_bytes())
    assert run("strip-prefixes", tmp_path / "a.pt", "--in-place", "--manifest", tmp_path / "out.json").status == 0
    assert manifest_of(tmp_path)["source"]["files"][0]["sha256"] == before
    assert held(tmp_path / "a.pt", tmp_path / "out.json")[0] == 0


def test_a_program_is_held_against_it_before_it_runs(run, tmp_path):
    model = torch.nn.Linear(3, 2)
    torch.jit.trace(model, torch.rand(1, 3)).save(tmp_path / "traced.pt")
    torch.save(model.state_dict(), tmp_path / "in.pt")
    assert run("convert", tmp_path / "in.pt", tmp_path / "o.pt", "--manifest", tmp_path / "out.json").status == 0
    given = ("--manifest", tmp_path / "out.json", "--trust-code", "--device", "cpu", "--json")
    found = strictly(run("verify", tmp_path / "traced.pt", *given).out)
    held = {check["code"]: check["status"] for check in found["checks"]}
    assert held["CK102"] == "fail"


REFUSED = {
    "dry run": (("{in}", "{folder}/o.pt", "--dry-run", "--manifest", "{folder}/m.json"), "dry run"),
    "several": (("{in}", "{in}", "-o", "{folder}/new", "--to", "pt", "--manifest", "{folder}/m.json"), "one"),
    "there already": (("{in}", "{folder}/o.pt", "--manifest", "{folder}/old.json"), "--force"),
    "the output": (("{in}", "{folder}/o.pt", "--manifest", "{folder}/o.pt"), "named as a checkpoint"),
    "the input": (("{folder}/plain", "{folder}/o.pt", "--manifest", "{folder}/plain", "--force"), "named as a"),
    "no folder": (("{in}", "{folder}/o.pt", "--manifest", "{folder}/absent/m.json"), "create it"),
    "a folder": (("{in}", "{folder}/o.pt", "--manifest", "{folder}"), "folder"),
    "no input": (("{folder}/absent.pt", "{folder}/o.pt", "--manifest", "{folder}/m.json"), "absent.pt"),
    "no output": (("{in}", "{folder}/full.pt", "--manifest", "{folder}/m.json"), "full.pt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_described_is_not_written(run, tmp_path, name):
    torch.save(tied(), tmp_path / "in.pt")
    for other in ("plain", "full.pt"):
        (tmp_path / other).write_bytes((tmp_path / "in.pt").read_bytes())
    (tmp_path / "old.json").write_text("old")
    before = sorted(path.name for path in tmp_path.iterdir())
    args, culprit = REFUSED[name]
    ran = run("convert", *(arg.format(**{"in": tmp_path / "in.pt", "folder": tmp_path}) for arg in args))
    assert (ran.status, ran.out) == (2, "")
    assert culprit in ran.err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "new") == before
    assert (tmp_path / "old.json").read_text() == "old"


GOOD = {
    "schema": "ckptool.manifest/1",
    "weights": "main",
    "files": [{"name": "a", "bytes": 1, "sha256": "0" * 64}],
    "tensors": [{"name": "a", "dtype": "float32", "shape": [1], "bytes": 4, "sha256": None}],
    "digest": None,
}
NO_MANIFEST = {
    "empty": b"",
    "no JSON": b"junk",
    "a list": b"[]",
    "a number": b"3",
    "of another kind": json.dumps({**GOOD, "schema": "ckptool.inspect/1"}).encode(),
    "of the next kind": json.dumps({**GOOD, "schema": "ckptool.manifest/2"}).encode(),
    "without files": json.dumps({**GOOD, "files": []}).encode(),
    "files of no table": json.dumps({**GOOD, "files": ["a"]}).encode(),
    "files of no list": json.dumps({**GOOD, "files": 3}).encode(),
    "without tensors": json.dumps({key: value for key, value in GOOD.items() if key != "tensors"}).encode(),
    "endless size": json.dumps({**GOOD, "files": [{"name": "a", "bytes": math.inf, "sha256": "0"}]}).encode(),
    "shape of text": json.dumps({**GOOD, "tensors": [{**GOOD["tensors"][0], "shape": "ab"}]}).encode(),
    "deep": b"[" * 100_000,
    "no text": b"\xff\xfe\xff",
}


@pytest.mark.parametrize("name", [*NO_MANIFEST, "absent", "a folder"])
def test_what_is_no_manifest_settles_nothing(run, tmp_path, name):
    path = tmp_path / "m.json"
    if name in NO_MANIFEST:
        path.write_bytes(NO_MANIFEST[name])
    elif name == "a folder":
        path.mkdir()
    ran = run("verify", DIGITS, "--manifest", path, "--json")
    assert (ran.status, strictly(ran.out)["verdict"]) == (2, "error")
    assert "Traceback" not in ran.err
    assert "m.json" in strictly(ran.out)["error"]


def test_one_manifest_is_of_one_checkpoint(run, written):
    given = (written / "out.safetensors", DIGITS, "--manifest", written / "out.json")
    assert "one PATH" in run("verify", *given).err
