"""Checkpoints in several files, read through the real entry point; the Hugging Face libraries write and judge them."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from support.tensors import assert_same

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats import open_checkpoint
from ckptool.formats.shards import is_sharded_folder
from ckptool.loading import load_into, load_state_dict

INDEX = "model.safetensors.index.json"
FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


def state(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{index}.weight": torch.randn(8, 8, generator=generator) for index in range(count)}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Write three shards with two tensors each, as the Hub's library does."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_torch_state_dict(state(), folder, max_shard_size=600)
    assert sorted(path.name for path in folder.iterdir()) == [FIRST, SECOND, THIRD, INDEX]
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


# --- reading ---


@pytest.mark.parametrize("named", [".", INDEX])
def test_shards_are_one_checkpoint(run, sharded, named):
    ran = run("inspect", sharded / named, "--json", "--tensors")
    document = json.loads(ran.out)
    assert ran.status == 0
    assert document["path"] == str(sharded / named)
    assert document["format"] == "safetensors-shards"
    assert document["file_bytes"] == sum(path.stat().st_size for path in sharded.iterdir())
    assert document["container"] == {"shards": "3", "index": INDEX}
    sizes = {name: (sharded / name).stat().st_size for name in (FIRST, SECOND, THIRD)}
    assert document["shards"] == [{"name": name, "bytes": size, "tensors": 2} for name, size in sizes.items()]
    assert [row["key"] for row in document["tensors"]] == list(state())
    assert document["notes"] == []
    assert sum(document["disk"].values()) == document["file_bytes"]


def test_the_api_loads_shards(sharded):
    assert_same(load_state_dict(sharded), state())
    net = torch.nn.Module()
    net.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=False) for _ in range(6))
    report = load_into(net, sharded / INDEX)
    assert report.is_exact
    assert_same(net.state_dict(), state())


def test_pickled_shards_are_one_checkpoint(run, tmp_path):
    save_torch_state_dict(state(), tmp_path, max_shard_size=600, safe_serialization=False)
    document = json.loads(run("inspect", tmp_path, "--json").out)
    assert document["format"] == "torch-shards"
    assert document["safety"]["verdict"] == "clean"
    assert len(document["safety"]["globals"]) == 3  # each once, not once a shard
    assert_same(load_state_dict(tmp_path), state())
    integrity = json.loads(run("verify", tmp_path, "--json").out)["checks"][0]
    assert integrity["status"] == "pass"
    assert integrity["evidence"]["storages_checked"] == 6


def transformers_folder(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    model = BertModel(config)
    model.save_pretrained(folder, **options)
    return model.state_dict()


@pytest.mark.parametrize(
    "options",
    [{}, {"max_shard_size": "20KB"}, {"max_shard_size": "20KB", "variant": "fp16"}, {"variant": "fp16"}],
    ids=["one file", "shards", "variant in shards", "variant"],
)
def test_what_transformers_saves_is_read_by_its_folder(tmp_path, options):
    expected = transformers_folder(tmp_path, **options)
    assert is_sharded_folder(tmp_path)
    assert_same(load_state_dict(tmp_path), expected)


def test_the_cache_of_the_hub_links_out_of_its_folder(run, sharded, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0f1e"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(sharded.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert run("inspect", snapshot).status == 0
    assert_same(load_state_dict(snapshot / INDEX), state())


def test_numbered_shards_need_no_index(run, sharded):
    (sharded / INDEX).unlink()
    document = json.loads(run("inspect", sharded, "--json").out)
    assert [note["code"] for note in document["notes"]] == ["no-index"]
    assert_same(load_state_dict(sharded), state())
    assert json.loads(run("verify", sharded, "--json").out)["checks"][0]["status"] == "warn"


def test_one_shard_says_that_it_is_no_whole(run, sharded):
    document = json.loads(run("inspect", sharded / SECOND, "--json").out)
    assert [note["text"] for note in document["notes"]] == [
        "this is shard 2 of 3: name the folder or the index to read them all"
    ]
    assert json.loads(run("verify", sharded / SECOND, "--json").out)["checks"][0]["status"] == "warn"


# --- which weights of a folder ---


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["config.json", "model.safetensors"], "model.safetensors"),
        (["config.json", "model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["config.json", "model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
        (["config.json", "diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter_model.safetensors"),
        (["optimizer.bin", "model.safetensors", "random_states_0.pkl"], "model.safetensors"),
        (["config.json", "model.safetensors", "diffusion_pytorch_model.safetensors"], None),
        (["config.json", "model.safetensors", INDEX], None),
    ],
)
def test_the_weights_of_a_folder_are_chosen_as_the_hub_chooses(run, tmp_path, names, taken):
    for name in names:
        (tmp_path / name).write_text("{}")
        if name.endswith((".safetensors", ".bin")):
            save_file(state(1), tmp_path / name)
    assert is_sharded_folder(tmp_path)
    ran = run("inspect", tmp_path, "--json")
    if taken is None:
        assert ran.status == 2
        assert "holds several checkpoints" in ran.err
        return
    document = json.loads(ran.out)
    assert document["path"] == str(tmp_path / taken)
    others = [name for name in names if name != taken and name.endswith((".safetensors", ".bin"))]
    told = [note["text"] for note in document["notes"] if note["code"] == "other-weights"]
    assert len(told) == bool([name for name in others if name != "optimizer.bin"])


def test_a_file_of_a_folder_is_named_where_it_is_refused(run, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    assert (
        run("inspect", tmp_path).err
        == f"ckptool: {tmp_path}: 'model.safetensors': the file is empty; get the file again\n"
    )


@pytest.mark.parametrize("names", [[], ["a.ckpt"], ["model.safetensors"], ["last.ckpt", "config.json"], ["latest"]])
def test_other_folders_are_no_checkpoint(run, tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    assert not is_sharded_folder(tmp_path)
    assert run("inspect", tmp_path).status == 2
    assert not is_sharded_folder(tmp_path / "missing")


# --- index against headers against disk ---


def _forget(index: dict[str, Any]) -> None:
    del index["weight_map"]["layers.0.weight"]


def _forget_a_file(index: dict[str, Any]) -> None:
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if name != THIRD}


def _misplace(index: dict[str, Any]) -> None:
    index["weight_map"]["layers.0.weight"] = THIRD


def _miscount(index: dict[str, Any]) -> None:
    index["metadata"]["total_size"] += 1


def _miscount_in_words(index: dict[str, Any]) -> None:
    index["metadata"]["total_size"] = "1536"


ODD = {
    "unindexed-tensor": [_forget],
    "misplaced-tensor": [_misplace],
    "total-size": [_miscount, _miscount_in_words],
    "unlisted-shard": [_forget_a_file, _miscount],
}


@pytest.mark.parametrize(("code", "change"), [(code, change) for code, changes in ODD.items() for change in changes])
def test_an_odd_index_is_told_and_fails_verify(run, sharded, code, change):
    edit_index(sharded, _forget_a_file if code == "unlisted-shard" else change)
    ran = run("inspect", sharded, "--json")
    assert ran.status == 0
    assert code in [note["code"] for note in json.loads(ran.out)["notes"]]
    ran = run("verify", sharded, "--json", "--checks", "integrity")
    assert ran.status == 1
    assert json.loads(ran.out)["checks"][0]["status"] == "fail"


def test_sizes_of_tied_tensors_may_be_counted_either_way(run, sharded):
    edit_index(sharded, lambda index: index["metadata"].update(total_size=1536.0))  # some writers state a float
    assert json.loads(run("inspect", sharded, "--json").out)["notes"] == []
    tied = torch.ones(4)
    torch.save({"a": tied, "b": tied}, sharded / "a.bin")
    for total, codes in ((16, []), (32, []), (24, ["total-size"])):
        index = {"metadata": {"total_size": total}, "weight_map": {"a": "a.bin", "b": "a.bin"}}
        (sharded / "tied.json").write_text(json.dumps(index))
        notes = json.loads(run("inspect", sharded / "tied.json", "--json").out)["notes"]
        assert [note["code"] for note in notes] == codes


def _missing_shard(folder: Path) -> None:
    (folder / SECOND).unlink()


def _missing_tensor(folder: Path) -> None:
    edit_index(folder, lambda index: index["weight_map"].update(lost=FIRST))


@pytest.mark.parametrize("damage", [_missing_shard, _missing_tensor])
def test_what_is_missing_is_refused_and_no_sound_checkpoint(run, sharded, damage):
    damage(sharded)
    ran = run("inspect", sharded)
    assert ran.status == 2
    assert ran.err.startswith(f"ckptool: {sharded}: ")
    assert "that no shard holds" in ran.err or "are not there" in ran.err
    assert run("verify", sharded).status == 1


def _loaded(path: Path) -> dict[str, torch.Tensor]:
    """Load a file so that it may be written over."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _duplicate(folder: Path) -> None:
    save_file(_loaded(folder / FIRST) | _loaded(folder / SECOND), folder / SECOND)


def _truncate(folder: Path) -> None:
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1])


def _mix(folder: Path) -> None:
    torch.save(_loaded(folder / SECOND), folder / SECOND)


def _script(folder: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / SECOND)


def _zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "outer", "w") as archive:
        archive.write(folder / SECOND, "inner.safetensors")
    (folder / "outer").replace(folder / SECOND)


def _nest(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        torch.save({"state_dict": _loaded(path)}, path)


def _link_twice(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(FIRST)


def _link_out(folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / SECOND).rename(outside)
    (folder / SECOND).symlink_to(outside)


def _index_in_index(folder: Path) -> None:
    shutil.copy(folder / INDEX, folder / "other.json")
    edit_index(folder, lambda index: index["weight_map"].update(lost="other.json"))


def _twice_in_json(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"layers.0.weight": "x", ', 1))


def _replace_index(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX).write_text(content) and None


REFUSED = {
    "the same name in two shards": (_duplicate, "readers differ"),
    "a shard that is cut short": (_truncate, f"{SECOND!r}: the file is truncated"),
    "shards of two formats": (_mix, "different formats"),
    "a program instead of a shard": (_script, "is no shard but torchscript"),
    "an archive instead of a shard": (_zip, "is no shard but safetensors"),
    "containers instead of state dicts": (_nest, "no tensors at its top"),
    "one file under two names": (_link_twice, "are one file"),
    "a link that leads out": (_link_out, "leads out of the folder"),
    "an index in an index": (_index_in_index, "this is an index"),
    "a name twice in the index": (_twice_in_json, "twice"),
    "half an index": (_replace_index('{"weight_map": {"a": '), "not valid JSON"),
    "a deep index": (_replace_index('{"weight_map": ' + "[" * 100_000), "not valid JSON"),
    "an empty map": (_replace_index('{"weight_map": {}}'), "maps no tensors"),
    "a map to numbers": (_replace_index('{"weight_map": {"a": 1}}'), "maps no tensors"),
    "a list as map": (_replace_index('{"weight_map": ["a"]}'), "maps no tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_two_readers_would_read_differently_is_refused(run, sharded, case):
    damage, message = REFUSED[case]
    damage(sharded)
    open_files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(2):
        with pytest.raises(UnreadableCheckpoint):
            open_checkpoint(sharded)
    assert len(os.listdir("/proc/self/fd")) == open_files  # noqa: PTH208
    ran = run("inspect", sharded)
    assert ran.status == 2, ran.out
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert run("verify", sharded).status == 2


HOSTILE_NAMES = [
    *("../model.safetensors", "/etc/passwd", "..", ".", "", "sub/model.safetensors", "..\\model.safetensors"),
    *("C:model.safetensors", "https://example.org/model.safetensors", "a\0b", "a\x1b[2Jb", "a\nb", "\u202eb", "\ud800"),
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_an_index_cannot_name_what_is_not_beside_it(run, sharded, name):
    shutil.copy(sharded / FIRST, sharded.parent / "model.safetensors")
    edit_index(sharded, lambda index: index["weight_map"].update({"layers.0.weight": name}))
    ran = run("inspect", sharded)
    assert ran.status == 2
    assert "no plain name of a file" in ran.err
    assert ran.err.isprintable() or ran.err.count("\n") == 1


class Command:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("echo boo",)


def test_a_dangerous_shard_is_found_even_if_another_is_broken(run, tmp_path):
    save_torch_state_dict(state(), tmp_path, max_shard_size=600, safe_serialization=False)
    first, second, _ = sorted(tmp_path.glob("*.bin"))
    torch.save({**torch.load(first), "x": Command()}, first)
    ran = run("verify", tmp_path, "--json")
    assert ran.status == 1
    evil = [use for use in json.loads(ran.out)["checks"][1]["evidence"]["globals"] if use["severity"] == "dangerous"]
    assert [use["where"].partition(":")[0] for use in evil] == [first.name]
    second.write_bytes(second.read_bytes()[:100])
    checks = json.loads(run("verify", tmp_path, "--json").out)["checks"]
    assert {check["id"]: check["status"] for check in checks} == {"integrity": "fail", "safety": "fail"}


def test_a_damaged_index_gives_the_same_tensors_or_a_refusal(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "y.safetensors")
    index = tmp_path / "i.json"
    whole = b'{"metadata": {"total_size": 20}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}'
    places = ((at, bit) for at in range(len(whole)) for bit in range(8))
    flipped = [whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :] for at, bit in places]
    outcomes: set[object] = set()
    for data in (whole, *(whole[:length] for length in range(len(whole))), *flipped):
        index.write_bytes(data)
        try:
            with open_checkpoint(index) as checkpoint:
                outcomes.add(tuple(key for key, _ in checkpoint.root.pairs))
        except UnreadableCheckpoint as error:
            outcomes.add(str(error).startswith(f"{index}: "))
    assert outcomes == {("a", "b"), True}


def test_the_index_of_another_framework_is_no_choice(run, tmp_path):
    save_file(state(1), tmp_path / "model.safetensors")
    for name in ("config.json", "tf_model.h5.index.json", "flax_model.msgpack.index.json"):
        (tmp_path / name).write_text("{}")
    assert json.loads(run("inspect", tmp_path, "--json").out)["notes"] == []


def test_the_next_command_names_a_folder_beside_it(run, tmp_path, monkeypatch):
    folder = tmp_path / "net"
    folder.mkdir()
    save_torch_state_dict({f"module.{key}": value for key, value in state().items()}, folder, max_shard_size=600)
    for where, named in ((folder, "."), (folder, INDEX), (folder / "..", "net"), (folder / "..", f"net/{INDEX}")):
        monkeypatch.chdir(where)
        command = json.loads(run("inspect", named, "--json").out)["next"].split()
        assert run(*command[1:]).status == 0
        assert_same(load_state_dict(tmp_path / "net-clean"), state())
        shutil.rmtree(tmp_path / "net-clean")


def test_a_checkpoint_in_shards_compares_and_verifies_like_a_file(run, sharded, tmp_path):
    torch.save(state(), tmp_path / "whole.pt")
    assert run("diff", sharded, tmp_path / "whole.pt").status == 0
    assert run("verify", sharded, "--against", tmp_path / "whole.pt", "--checks", "agreement").status == 0
    assert run("convert", tmp_path / "whole.pt", tmp_path / "like.pt", "--like", sharded).status == 0
    digests = [json.loads(run("convert", path, tmp_path / "x.pt", "-f", "--digest", "--json").out)["digest"]
               for path in (sharded, sharded / INDEX, tmp_path / "whole.pt")]  # fmt: skip
    assert len(set(digests)) == 1
    changed = {key: value + 1 for key, value in load_file(sharded / SECOND).items()}
    save_file(changed, sharded / SECOND)
    assert run("diff", sharded, tmp_path / "whole.pt").status == 1
