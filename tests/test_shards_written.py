"""Output in several files through the real entry point; huggingface_hub and transformers judge what was written."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import load_torch_model, save_torch_state_dict, split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from support.tensors import assert_same
from torch import nn

from ckptool.errors import OutputRefused
from ckptool.writers import staging_folder

INDEX = "model.safetensors.index.json"
FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


def random_state(shapes: dict[str, tuple[int, ...]]) -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return OrderedDict((name, torch.randn(shape, generator=generator)) for name, shape in shapes.items())


def six(prefix: str = "") -> OrderedDict[str, torch.Tensor]:
    return random_state({f"{prefix}layers.{index}.weight": (8, 8) for index in range(6)})


class Six(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(6))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    torch.save(six("module."), tmp_path / "in.pt")
    return tmp_path / "in.pt"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_torch_state_dict(six("module."), folder, max_shard_size=600)
    (folder / "config.json").write_text("{}")
    return folder


def read(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def index_of(folder: Path, name: str = INDEX) -> dict[str, Any]:
    index = json.loads((folder / name).read_text())
    assert set(index["weight_map"].values()) < set(names_in(folder))
    for name, home in index["weight_map"].items():
        assert name in read(folder / home)
    return index


# --- as the Hub's tools do ---


@pytest.mark.parametrize(("form", "stem", "safe"), [("safetensors", "model", True), ("pt", "pytorch_model", False)])
def test_the_hub_loads_what_is_written(run, single, tmp_path, form, stem, safe):
    ran = run("convert", single, tmp_path / "out", "--max-shard-size", "600", "--to", form, "--json", "--digest")
    assert ran.status == 0, ran.err
    net = Six()
    pattern = "model{suffix}.safetensors" if safe else "pytorch_model{suffix}.bin"
    loaded = load_torch_model(net, tmp_path / "out", strict=True, safe=safe, filename_pattern=pattern)
    assert loaded.missing_keys == loaded.unexpected_keys == []
    assert_same(net.state_dict(), six())
    document = json.loads(ran.out)
    suffix = "safetensors" if safe else "bin"
    names = [f"{stem}-0000{number}-of-00003.{suffix}" for number in (1, 2, 3)]
    assert [shard["name"] for shard in document["shards"]] == names
    assert document["index"] == f"{stem}.{suffix}.index.json"
    assert names_in(tmp_path / "out") == sorted([*names, document["index"]])
    assert document["target_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    whole = json.loads(run("convert", single, tmp_path / "one.pt", "--digest", "--json").out)
    assert document["digest"] == whole["digest"]
    ran = run("verify", tmp_path / "out", "--checks", "integrity")
    assert ran.status == 0, ran.out


SHAPES = {
    "even": {f"w{index}": (10,) for index in range(10)},
    "one tensor is larger than a file": {"a": (10,), "large": (100,), "b": (10,), "c": (30,), "d": (25,)},
    "scalars and empty ones": {"a": (), "b": (0, 5), "c": (50,), "d": (1,)},
    "each larger than a file": {"a": (60,), "b": (70,)},
    "all in one": {"a": (3,), "b": (4,)},
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("limit", ["200", "0.2KB", "0.1953125KiB"])
def test_tensors_are_split_as_the_hub_splits_them(run, tmp_path, case, limit):
    state = random_state(SHAPES[case])
    torch.save(state, tmp_path / "in.pt")
    assert run("convert", tmp_path / "in.pt", tmp_path / "out", "--max-shard-size", limit).status == 0
    expected = split_torch_state_dict_into_shards(state, max_shard_size="0.2KB")
    found = {name: read(tmp_path / "out" / name) for name in expected.filename_to_tensors}
    assert {name: set(tensors) for name, tensors in found.items()} == {
        name: set(tensors) for name, tensors in expected.filename_to_tensors.items()
    }
    assert names_in(tmp_path / "out") == sorted([*found, *([INDEX] if expected.is_sharded else [])])
    assert_same({name: tensor for tensors in found.values() for name, tensor in tensors.items()}, state)
    if expected.is_sharded:
        index = index_of(tmp_path / "out")
        assert index["weight_map"] == expected.tensor_to_filename
        assert index["metadata"] == expected.metadata


@pytest.mark.parametrize("form", ["safetensors", "pt"])
@pytest.mark.parametrize("ties", ["keep", "copy"])
def test_tied_tensors_stay_together(run, tmp_path, form, ties):
    state = random_state({"embed.weight": (10, 10), "middle.weight": (10, 10), "last.weight": (10, 10)})
    state["head.weight"] = state["embed.weight"]
    torch.save(state, tmp_path / "in.pt")
    arguments = ("--max-shard-size", "500", "--to", form, "--ties", ties)
    assert run("convert", tmp_path / "in.pt", tmp_path / "out", *arguments).status == 0
    index = index_of(tmp_path / "out", INDEX if form == "safetensors" else "pytorch_model.bin.index.json")
    homes = index["weight_map"]
    if form == "safetensors" and ties == "keep":
        assert "head.weight" not in homes
        assert index["metadata"] == {"total_size": 1200, "head.weight": "embed.weight"}
    elif ties == "keep":
        assert homes["head.weight"] == homes["embed.weight"]
        loaded = read(tmp_path / "out" / homes["head.weight"])
        assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()
        assert index["metadata"]["total_size"] == 1200
    else:
        assert homes["head.weight"] != homes["embed.weight"]
        assert index["metadata"]["total_size"] == 1600
    again = tmp_path / "again.pt"
    assert run("convert", tmp_path / "out", again).status == 0
    assert_same(read(again), state)
    assert run("verify", tmp_path / "out", "--checks", "integrity").status == 0


def test_transformers_loads_what_is_written(run, tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    model = BertModel(config)
    torch.save({"state_dict": {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}},
               tmp_path / "in.pt")  # fmt: skip
    for out, form in (("safe", "safetensors"), ("pickled", "pt")):
        assert run("convert", tmp_path / "in.pt", tmp_path / out, "--max-shard-size", "5KB", "--to", form).status == 0
        config.save_pretrained(tmp_path / out)
        assert_same(BertModel.from_pretrained(tmp_path / out).state_dict(), model.state_dict())


def test_accelerate_loads_what_is_written(run, single, tmp_path):
    from accelerate import load_checkpoint_in_model

    assert run("convert", single, tmp_path / "out", "--max-shard-size", "600").status == 0
    net = Six()
    load_checkpoint_in_model(net, str(tmp_path / "out" / INDEX), strict=True)
    assert_same(net.state_dict(), six())


def test_what_is_no_tensor_and_torchs_metadata_go_along(run, tmp_path):
    state = nn.BatchNorm1d(3).state_dict()
    state["_extra_state"] = {"step": 3}
    torch.save(state, tmp_path / "in.pt")
    assert run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out", "--max-shard-size", "12").status == 0
    index = index_of(tmp_path / "out", "pytorch_model.bin.index.json")
    assert list(index["weight_map"]) == list(state)
    shards = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "out").glob("*.bin"))]
    assert [shard._metadata for shard in shards] == [state._metadata] * 5
    assert run("strip-prefixes", tmp_path / "out", tmp_path / "again.pt").status == 0
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again["_extra_state"] == {"step": 3}
    assert again._metadata == state._metadata


# --- where it goes ---


@pytest.mark.parametrize(
    ("out", "names"),
    [
        ("new", [FIRST, SECOND, THIRD, INDEX]),
        ("new/", [FIRST, SECOND, THIRD, INDEX]),
        ("there/net.safetensors", [name.replace("model", "net") for name in (FIRST, SECOND, THIRD, INDEX)]),
        ("there/net.safetensors.index.json", [name.replace("model", "net") for name in (FIRST, SECOND, THIRD, INDEX)]),
        (f"there/{INDEX}", [FIRST, SECOND, THIRD, INDEX]),
        ("there", [FIRST, SECOND, THIRD, INDEX]),
    ],
)
def test_out_names_a_folder_or_what_the_files_begin_with(run, single, tmp_path, out, names):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "beside.txt").write_text("stays")
    assert run("convert", single, f"{tmp_path}/{out}", "--max-shard-size", "600").status == 0
    folder = tmp_path / ("there" if "there" in out else "new")
    assert [name for name in names_in(folder) if name != "beside.txt"] == sorted(names)
    assert_same({key: value for name in names[:3] for key, value in read(folder / name).items()}, six())


def test_shards_stay_shards_with_their_names(run, sharded, tmp_path):
    ran = run("strip-prefixes", sharded, tmp_path / "out")
    assert ran.status == 0, ran.err
    assert "not copied from beside the weights: config.json" in ran.err
    assert names_in(tmp_path / "out") == sorted([FIRST, SECOND, THIRD, INDEX])
    assert list(index_of(tmp_path / "out")["weight_map"].items()) == [
        (name.removeprefix("module."), home) for name, home in index_of(sharded)["weight_map"].items()
    ]
    index_of(tmp_path / "out")
    assert run("strip-prefixes", sharded / INDEX, tmp_path / "other" / INDEX).status == 2  # no such folder
    (tmp_path / "other").mkdir()
    assert run("strip-prefixes", sharded / INDEX, tmp_path / "other" / INDEX).status == 0
    assert contents(tmp_path / "other") == contents(tmp_path / "out")


def test_shards_become_what_is_asked_for(run, sharded, tmp_path):
    assert run("strip-prefixes", sharded, tmp_path / "one.safetensors").status == 0
    assert_same(load_file(tmp_path / "one.safetensors"), six())
    assert run("convert", sharded, tmp_path / "one.pt").status == 0
    assert_same(read(tmp_path / "one.pt"), six())
    assert run("convert", sharded, tmp_path / "bin", "--to", "pt").status == 0
    assert_same(load_from(tmp_path / "bin", "pytorch_model{suffix}.bin"), six())
    assert run("convert", sharded, tmp_path / "two", "--max-shard-size", "800").status == 0
    assert len(names_in(tmp_path / "two")) == 3
    assert_same(load_from(tmp_path / "two", "model{suffix}.safetensors"), six())
    assert run("convert", sharded, tmp_path / "whole", "--max-shard-size", "5GB").status == 0
    assert names_in(tmp_path / "whole") == ["model.safetensors"]
    assert run("convert", sharded, tmp_path / "part", "--exclude", "layers.[01].*").status == 0
    assert names_in(tmp_path / "part") == sorted(
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
    )
    assert run("convert", sharded, tmp_path / "few", "--include", "layers.[01].*", "--exclude", "x").status == 0
    assert names_in(tmp_path / "few") == ["model.safetensors"]


def load_from(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
    net = Six()
    load_torch_model(net, folder, strict=True, safe=".safetensors" in pattern, filename_pattern=pattern)
    return net.state_dict()


def test_variants_keep_their_names(run, sharded, tmp_path):
    for path in sharded.glob("*.safetensors"):
        path.rename(path.with_name(path.name.replace("model-", "model.fp16-")))
    index = (sharded / INDEX).read_text().replace("model-", "model.fp16-")
    (sharded / INDEX).unlink()
    (sharded / "model.safetensors.index.fp16.json").write_text(index)
    assert run("strip-prefixes", sharded, tmp_path / "out").status == 0
    assert [*names_in(tmp_path / "out"), "config.json"] == [
        *(name.replace("model", "model.fp16") for name in (FIRST, SECOND, THIRD)),
        "model.safetensors.index.fp16.json",
        "config.json",
    ]


def test_several_inputs_go_into_folders_of_their_own(run, sharded, single, tmp_path):
    assert run("strip-prefixes", sharded, single, "--out-dir", tmp_path / "out").status == 0
    assert names_in(tmp_path / "out") == ["in.pt", "sharded"]
    assert run("convert", sharded, single, "-o", tmp_path / "safe", "--to", "safetensors").status == 0
    assert names_in(tmp_path / "safe") == ["in.safetensors", "sharded.safetensors"]


def test_a_dry_run_names_the_files_and_writes_none(run, single, sharded, tmp_path):
    before = names_in(tmp_path)
    for arguments in ((single,), (single, tmp_path / "out.safetensors")):
        ran = run("convert", *arguments, "--max-shard-size", "600", "--dry-run", "--json", "--to", "safetensors")
        document = json.loads(ran.out)
        assert len(document["shards"]) == 3
        assert document["index"].endswith(".safetensors.index.json")
    document = json.loads(run("strip-prefixes", sharded, "--dry-run", "--json").out)
    assert [shard["name"] for shard in document["shards"]] == [FIRST, SECOND, THIRD]
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("size", ["0", "-5GB", "5", "5G", "GB", "", "1e9", "nan", "0.1B", "5 GB B"])
def test_a_size_is_a_number_of_bytes(run, single, tmp_path, size):
    ran = run("convert", single, tmp_path / "out", f"--max-shard-size={size}")
    assert (ran.status == 0) == (size == "5")
    assert size == "5" or f"--max-shard-size {size}: no size" in ran.err


def test_the_same_input_gives_the_same_bytes(run, single, tmp_path):
    for out in ("a", "b"):
        assert run("convert", single, tmp_path / out, "--max-shard-size", "600").status == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# --- what is there already ---


def test_nothing_is_replaced_unless_that_is_said(run, single, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model.safetensors", INDEX, "model-00007-of-00009.safetensors"):
        (out / name).write_text("old")
        ran = run("convert", single, out, "--max-shard-size", "600")
        assert ran.status == 2
        assert "exists already; add --force" in ran.err
        assert names_in(out) == [name]
        (out / name).unlink()


def test_force_leaves_one_checkpoint_and_what_is_none_of_it(run, single, tmp_path):
    out = tmp_path / "out"
    for size, count in (("300", 6), ("600", 3), ("5GB", 1), ("800", 2)):
        assert run("convert", single, out, "--max-shard-size", size, "--force").status == 0
        (out / "config.json").write_text("{}")
        expected = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        expected = ["model.safetensors"] if count == 1 else [*expected, INDEX]
        assert names_in(out) == sorted([*expected, "config.json"])
        assert_same(load_from(out, "model{suffix}.safetensors") if count > 1 else read(out / expected[0]), six())


def test_in_place_replaces_every_file(run, sharded, tmp_path):
    before = names_in(sharded)
    assert run("strip-prefixes", sharded, sharded).status == 2
    assert run("strip-prefixes", sharded, sharded, "--force").status == 2
    assert run("convert", sharded, sharded / "model.safetensors", "--max-shard-size", "600", "--force").status == 2
    assert run("strip-prefixes", sharded / INDEX, sharded / FIRST, "--force").status == 2
    assert names_in(sharded) == before
    assert run("strip-prefixes", sharded, "--in-place").status == 0
    assert names_in(sharded) == before
    assert_same(load_from(sharded, "model{suffix}.safetensors"), six())
    assert run("strip-prefixes", sharded / INDEX, "--in-place", "--max-shard-size", "1GB").status == 0
    assert names_in(sharded) == ["config.json", "model.safetensors"]


def test_files_in_the_place_of_private_ones_are_private(run, sharded):
    """A file keeps its permissions; a file under a new name may be read by those who could read them all."""
    for name, mode in ((FIRST, 0o600), (SECOND, 0o640), (THIRD, 0o644), (INDEX, 0o644)):
        (sharded / name).chmod(mode)
    assert run("strip-prefixes", sharded, "--in-place").status == 0
    modes = [(sharded / name).stat().st_mode & 0o777 for name in (FIRST, SECOND, THIRD, INDEX)]
    assert modes == [0o600, 0o640, 0o644, 0o644]
    assert run("convert", sharded, "--in-place", "--max-shard-size", "1GB").status == 0
    assert (sharded / "model.safetensors").stat().st_mode & 0o777 == 0o600


def test_in_place_replaces_the_one_file_of_a_folder(run, tmp_path):
    save_file(six("module."), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert run("convert", tmp_path, tmp_path / "model.safetensors", "--force").status == 2
    assert run("strip-prefixes", tmp_path, "--in-place").status == 0
    assert names_in(tmp_path) == ["config.json", "model.safetensors"]
    assert_same(load_file(tmp_path / "model.safetensors"), six())
    assert run("strip-prefixes", tmp_path, "--in-place", "--max-shard-size", "5").status == 2
    assert run("strip-prefixes", tmp_path, tmp_path / "out").status == 0
    assert names_in(tmp_path / "out") == ["model.safetensors"]


def test_pickled_shards_are_cleaned_in_place(run, tmp_path):
    save_torch_state_dict(six("module."), tmp_path, max_shard_size=600, safe_serialization=False)
    before = names_in(tmp_path)
    assert run("strip-prefixes", tmp_path, "--in-place").status == 0
    assert names_in(tmp_path) == before
    assert_same(load_from(tmp_path, "pytorch_model{suffix}.bin"), six())


def test_the_name_of_an_index_says_what_is_in_its_shards(run, single, tmp_path):
    out = tmp_path / INDEX
    ran = run("convert", single, out, "--max-shard-size", "600", "--to", "pt")
    assert ran.status == 2
    assert "does not stand for a torch file" in ran.err
    assert run("strip-prefixes", single, out, "--max-shard-size", "600").status == 2
    assert names_in(tmp_path) == ["in.pt"]


def test_a_container_does_not_go_into_shards(run, tmp_path):
    torch.save({"state_dict": six(), "epoch": 3}, tmp_path / "in.pt")
    ran = run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out", "--keep-rest", "--max-shard-size", "600")
    assert ran.status == 2
    assert "--keep-rest" in ran.err
    assert names_in(tmp_path) == ["in.pt"]


def test_a_link_in_a_folder_is_replaced_and_not_followed(run, sharded, tmp_path):
    outside = tmp_path / "blob"
    (sharded / FIRST).rename(outside)
    (sharded / FIRST).symlink_to(outside)
    old = outside.read_bytes()
    torch.save(six(), tmp_path / "in.pt")
    assert run("convert", tmp_path / "in.pt", sharded, "--max-shard-size", "600", "--force").status == 0
    assert outside.read_bytes() == old
    assert stat.S_ISREG((sharded / FIRST).lstat().st_mode)


def test_only_files_are_replaced(run, single, tmp_path):
    for make in (Path.mkdir, os.mkfifo):
        out = tmp_path / make.__name__
        out.mkdir()
        make(out / FIRST)
        ran = run("convert", single, out, "--max-shard-size", "600", "--force")
        assert ran.status == 2
        assert f"{out / FIRST}: is no file" in ran.err
        assert names_in(out) == [FIRST]


# --- in between ---


def test_a_refused_cast_leaves_nothing(run, tmp_path):
    torch.save({"a": torch.full((10,), 1e6), "b": torch.ones(10)}, tmp_path / "in.pt")
    arguments = ("--max-shard-size", "20", "--dtype", "float16", "--fail-on-overflow")
    assert run("convert", tmp_path / "in.pt", tmp_path / "out", *arguments).status == 2
    assert names_in(tmp_path) == ["in.pt"]


def test_a_source_that_turns_out_damaged_leaves_the_old_files(run, single, tmp_path):
    out = tmp_path / "out"
    assert run("convert", single, out, "--max-shard-size", "600").status == 0
    before = contents(out)
    data = bytearray(single.read_bytes())
    position = data.index(bytes(six()["layers.5.weight"].numpy().tobytes()))
    data[position] ^= 1
    single.write_bytes(data)
    ran = run("convert", single, out, "--max-shard-size", "600", "--force")
    assert ran.status == 2
    assert "checksum" in ran.err
    assert contents(out) == before


def stage_and_publish(
    folder: Path, names: list[str], meanwhile: Callable[[], object], index: str = "", *, replaced: bool = False
) -> None:
    everything = [*names, index] if index else names
    with staging_folder(folder, names, index, replaced=everything if replaced else ()) as staged:
        for name in everything:
            with staged.create(name) as file:
                file.write(b"new")
        meanwhile()
        staged.publish()


def test_names_that_come_to_exist_meanwhile_are_not_replaced(tmp_path):
    """Of two that write the same files, one wins whole."""
    names = ["a-00001-of-00002.bin", "a-00002-of-00002.bin"]
    with pytest.raises(OutputRefused, match="exists already"):
        stage_and_publish(tmp_path, names, lambda: (tmp_path / names[1]).write_bytes(b"theirs"))
    assert contents(tmp_path) == {names[1]: b"theirs"}
    new = tmp_path / "new"
    with pytest.raises(OutputRefused, match="exists already"):
        stage_and_publish(new, names, lambda: (new.mkdir(), (new / "theirs").touch()))
    assert names_in(new) == ["theirs"]


def test_a_disk_that_fails_in_the_midst_says_where_the_rest_is(tmp_path, monkeypatch):
    names = ["a-00001-of-00002.bin", "a-00002-of-00002.bin"]
    for name in (*names, "a.json"):
        (tmp_path / name).write_bytes(b"old")
    real = Path.replace

    def fail_at_the_first(path: Path, target: Path) -> Path:
        if path.name == names[0]:
            raise OSError(5, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", fail_at_the_first)
    with pytest.raises(OutputRefused, match="those that are not in place yet are in") as refused:
        stage_and_publish(tmp_path, names, lambda: None, "a.json", replaced=True)
    staged = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert str(staged) in str(refused.value)
    assert names_in(staged) == [names[0], "a.json"]
    assert names_in(tmp_path) == [staged.name, names[1]]  # neither the first nor the index: nothing looks whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_old_files_and_nothing_else(run, single, tmp_path, number):
    out = tmp_path / "out"
    assert run("convert", single, out, "--max-shard-size", "600").status == 0
    before = contents(out)
    torch.save({f"{index}": torch.zeros(1 << 22) for index in range(10)}, tmp_path / "large.pt")
    command = [sys.executable, "-m", "ckptool", "convert", tmp_path / "large.pt", out]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [*map(str, command), "--max-shard-size", "20MB", "--force"], stderr=subprocess.PIPE, env=environment
    )
    while process.poll() is None and len(names_in(out)) == len(before):
        pass
    process.send_signal(number)
    process.communicate()
    assert process.returncode in (130, 128 + number)
    assert contents(out) == before


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from ckptool.cli import main
left = int(sys.argv[1])
def count(name):
    real = getattr(Path, name)
    def wrapped(self, *args, **kwargs):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(self, *args, **kwargs)
    setattr(Path, name, wrapped)
for name in ("rename", "replace", "unlink", "hardlink_to"):
    count(name)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("existing", [True, False])
def test_killed_at_any_moment_no_mixture_passes_for_a_checkpoint(run, single, tmp_path, existing):
    """A folder holds the old checkpoint, the new one, or none that a reader would take for whole."""
    old = OrderedDict((name, tensor + 1) for name, tensor in six().items())
    outcomes = set()
    for steps in range(40):
        out = tmp_path / f"out{steps}"
        if existing:
            out.mkdir()
            save_torch_state_dict(old, out, max_shard_size=600)
        arguments = ["convert", single, out, "--max-shard-size", "600", *(["--force"] if existing else [])]
        command = [sys.executable, "-c", KILLED_AT, str(steps), *map(str, arguments)]
        ended = subprocess.run(
            command, capture_output=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        )
        outcomes.add(_outcome(run, out, old))
        if ended.returncode != -signal.SIGKILL:
            break
    assert ended.returncode == 0, ended.stderr
    assert outcomes == ({"old", "refused", "new"} if existing else {"none", "new"})


def _outcome(run: Any, folder: Path, old: dict[str, torch.Tensor]) -> str:
    if not folder.exists():
        return "none"
    visible = folder.parent / f"{folder.name}.pt"
    ran = run("convert", folder, visible)
    if ran.status == 2:
        with pytest.raises(ValueError, match="does not contain a valid checkpoint"):
            load_from(folder, "model{suffix}.safetensors")
        return "refused"
    found = read(visible)
    for name, expected in (("old", old), ("new", six())):
        if all(torch.equal(found[key], expected[key]) for key in expected):
            return name
    raise AssertionError("a mixture")
