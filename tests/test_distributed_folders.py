"""Folders of torch.distributed.checkpoint, written by one to four ranks and judged by torch's own reader."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support.crafted import Command
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

import ckptool
from ckptool.formats import assembly, open_checkpoint
from ckptool.loading import load_state_dict
from tests.support.ranks import WORLDS, tensors
from tests.support.tensors import bits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write what one, two and four ranks save; every value of it is read by torch, too."""
    out = tmp_path_factory.mktemp("ranks")
    command = (sys.executable, "-m", "tests.support.ranks", out)
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True)
    return out


def by_torch(folder: Path) -> dict[str, Any]:
    """Read a whole folder as torch does."""
    whole = folder.with_name(f"{folder.name}.whole.pt")
    if not whole.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp_to_torch_save(folder, whole)
    read: dict[str, Any] = torch.load(whole, weights_only=False)
    return read


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    wrong = [
        name
        for name, tensor in expected.items()
        if (found[name].dtype, found[name].shape) != (tensor.dtype, tensor.shape)
        or bits(found[name]) != bits(tensor.contiguous())
    ]
    assert wrong == []


KINDS = [f"{kind}-{world}" for kind in ("ranks", "flat", "fsdp") for world in WORLDS]


# --- what torch wrote ---


@pytest.mark.parametrize("name", KINDS)
def test_every_tensor_is_what_torch_reads(folders: Path, name: str) -> None:
    expected = by_torch(folders / name)
    assert_same(load_state_dict(folders / name), expected.get("model", expected))


@pytest.mark.parametrize("rank", [1, 2])
def test_safetensors_of_one_rank_are_not_taken_for_the_whole(
    run: Any, folders: Path, tmp_path: Path, rank: int
) -> None:
    written = folders / "hub-2" / f"shard-{rank:05d}-model-00001-of-00001.safetensors"
    for path in (written.parent, written):
        ran = run("convert", path, tmp_path / "out.pt")
        assert ran.status == 2
        assert "consolidate_safetensors_files" in ran.err
    moved = tmp_path / "model.safetensors"
    shutil.copy(written, moved)
    ran = run("inspect", moved)
    assert (ran.status, "one rank" in ran.out + ran.err) == ({1: 0, 2: 2}[rank], True)


def test_safetensors_of_ranks_are_read_once_they_are_together(run: Any, folders: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    expected = {
        name: tensor for name, tensor in load_state_dict(folders / "fsdp-4").items() if tensor.is_floating_point()
    }
    consolidate_safetensors_files(str(folders / "hub-4"), str(tmp_path), dict.fromkeys(expected, 1))
    assert_same(load_state_dict(tmp_path), expected)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("world", WORLDS)
def test_blocks_of_every_size_give_the_same(
    folders: Path, world: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "BLOCK_BYTES", block)
    assert_same(load_state_dict(folders / f"ranks-{world}"), by_torch(folders / f"ranks-{world}")["model"])


def test_any_stretch_of_a_tensor_can_be_read(folders: Path) -> None:
    with ckptool.open(folders / "ranks-4") as opened:
        for name in ("rows.weight", "columns.weight", "grid.weight", "turned.weight"):
            source = opened.tensors[name].storage.source
            whole = b"".join(map(bytes, source.stream()))
            for start in range(0, len(whole), 13):
                for length in (0, 1, 17, len(whole) - start):
                    nbytes = min(length, len(whole) - start)
                    assert b"".join(map(bytes, source.stream(start, nbytes))) == whole[start : start + nbytes]


@pytest.mark.parametrize("name", [f"ranks-{world}" for world in WORLDS])
def test_the_model_is_written_without_the_rest(run: Any, folders: Path, name: str, tmp_path: Path) -> None:
    expected = {key: value for key, value in by_torch(folders / name)["model"].items() if not value.is_complex()}
    ran = run("convert", folders / name, tmp_path / "out.safetensors", "--exclude", "*complex*", "--json")
    assert ran.status == 0, ran.err
    assert_same(load_file(tmp_path / "out.safetensors"), expected)
    assert {row["name"] for row in json.loads(ran.out)["dropped"]} >= {"groups", "name"}


@pytest.mark.parametrize("options", [(), ("--keep-rest",)])
def test_a_file_of_torch_is_written(run: Any, folders: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    ran = run("strip-prefixes", folders / "ranks-4", tmp_path / "out.pt", *options)
    assert ran.status == 0, ran.err
    found, expected = torch.load(tmp_path / "out.pt", weights_only=True), by_torch(folders / "ranks-4")
    assert_same(found["model"] if options else found, expected["model"])
    if options:
        assert {key: found[key] for key in ("epoch", "name", "groups")} == {
            key: expected[key] for key in ("epoch", "name", "groups")
        }


def test_the_optimizer_is_read_and_left_behind(run: Any, folders: Path, tmp_path: Path) -> None:
    expected = by_torch(folders / "fsdp-4")
    assert expected["optimizer"]["param_groups.0.weight.lr"] == 0.01
    assert run("convert", folders / "fsdp-4", tmp_path / "kept.pt", "--keep-rest").status == 0
    found = torch.load(tmp_path / "kept.pt", weights_only=True)
    tensors = {key: value for key, value in expected["optimizer"].items() if isinstance(value, torch.Tensor)}
    assert_same({key: found["optimizer"][key] for key in tensors}, tensors)
    assert {key: found["optimizer"][key] for key in expected["optimizer"] if key not in tensors} == {
        key: value for key, value in expected["optimizer"].items() if key not in tensors
    }


def test_shards_are_written_from_shards(run: Any, folders: Path, tmp_path: Path) -> None:
    ran = run("convert", folders / "fsdp-4", tmp_path / "out", "--max-shard-size", "300B")
    assert ran.status == 0, ran.err
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert_same(load_state_dict(tmp_path / "out"), by_torch(folders / "fsdp-4")["model"])


def test_as_many_ranks_as_there_were_the_tensors_are_the_same(run: Any, folders: Path) -> None:
    ran = run("diff", folders / "fsdp-1", folders / "fsdp-4", "--json")
    assert (ran.status, json.loads(ran.out)["same"]) == (0, True)
    pt = folders / "fsdp-4.state.pt"
    torch.save(by_torch(folders / "fsdp-4")["model"], pt)
    assert run("diff", folders / "fsdp-4", pt).status == 0
    digests = [
        json.loads(run("convert", path, "--to", "pt", "--dry-run", "--digest", "--json").out).get("digest")
        for path in (folders / "fsdp-2", pt)
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("named", [".", ".metadata"])
def test_inspect_describes_the_folder(run: Any, folders: Path, named: str) -> None:
    folder = folders / "ranks-4"
    document = json.loads(run("inspect", folder / named, "--json", "--tensors").out)
    names = [f"__{rank}_0.distcp" for rank in range(4)]
    assert document["format"] == "torch-distributed"
    assert document["container"] == {"index": ".metadata", "shards": "4"}
    assert [row["name"] for row in document["shards"]] == names
    assert document["file_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert [row["key"] for row in document["tensors"]] == [*tensors(), "grid.weight", "stack.weight"]
    assert document["training"]["epoch"] == 3
    assert document["safety"]["verdict"] == "clean"
    assert "parts-unread" in [note["code"] for note in document["notes"]]


def test_a_folder_is_one_row_of_a_table(run: Any, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "ranks-2", tmp_path / "epoch-3")
    torch.save({"w": torch.zeros(2)}, tmp_path / "a.pt")
    rows = json.loads(run("inspect", tmp_path, "--json").out)["files"]
    assert [Path(row["path"]).name for row in rows if "error" not in row] == ["a.pt", "epoch-3"]


@pytest.mark.parametrize("name", ["ranks-4", "fsdp-2"])
def test_verify_checks_every_part(run: Any, folders: Path, name: str) -> None:
    ran = run(
        "verify", folders / name, "--checks", "integrity", "--checks", "safety", "--checks", "values.finite", "--json"
    )
    checks = {check["id"]: check for check in json.loads(ran.out)["checks"]}
    assert (ran.status, {check["status"] for check in checks.values()}) == (0, {"pass"}), ran.out
    assert checks["integrity"]["evidence"]["storages_without_checksum"] == 0


def test_lightning_keeps_the_rest_in_a_file_beside(run: Any, tmp_path: Path) -> None:
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    folder = tmp_path / "epoch=1.ckpt"
    weights = {"model.net.weight": torch.randn(3, 2), "model.net.bias": torch.zeros(3)}
    dcp.save({"state_dict": weights, "optimizer_0": {"state": {}}}, checkpoint_id=folder, no_dist=True)
    meta = {"pytorch-lightning_version": "2.6.0", "epoch": 1, "global_step": 20, "hyper_parameters": {"lr": 0.5}}
    torch.save(meta, folder / "meta.pt")
    document = json.loads(run("inspect", folder, "--json").out)
    assert document["producer"]["name"] == "PyTorch Lightning"
    assert (document["training"]["global_step"], document["hyper_parameters"]) == (20, {"lr": 0.5})
    with torch.serialization.safe_globals([]):
        assert_same(_load_distributed_checkpoint(folder)["state_dict"], weights)
    assert_same(load_state_dict(folder), {key.removeprefix("model."): value for key, value in weights.items()})


def test_megatron_names_are_its_own(run: Any, tmp_path: Path) -> None:
    """Its names are flat, its optimizer among them, and what is common to all ranks lies beside."""
    folder = tmp_path / "iter_0000100"
    weights = {"decoder.layers.mlp.weight": torch.randn(2, 3, 4), "embedding.weight": torch.randn(5, 3)}
    moments = {f"optimizer.state.exp_avg.{key}": torch.zeros_like(one) for key, one in weights.items()}
    dcp.save({**moments, **weights}, checkpoint_id=folder, no_dist=True)

    def change(metadata: Metadata) -> None:
        metadata.planner_data = {}
        metadata.mcore_data = {"decoder.layers.mlp.weight": {"nd_reformulated_orig_global_shape": (2, 3, 4)}}

    edit(folder, change)
    torch.save({"iteration": 100, "checkpoint_version": 3.0}, folder / "common.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    assert_same(load_state_dict(folder), weights)
    document = json.loads(run("inspect", folder, "--json").out)
    assert "megatron" in [note["code"] for note in document["notes"]]
    ran = run("convert", folder, tmp_path / "out.safetensors", "--json")
    assert_same(load_file(tmp_path / "out.safetensors"), weights)
    assert "optimizer" in [row["name"] for row in json.loads(ran.out)["dropped"]]
    assert "iter_" in run("inspect", tmp_path).err + run("inspect", tmp_path).out


def test_weights_at_the_top_are_parted_from_the_optimizer(run: Any, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    moments = {f"state.{key}.exp_avg": torch.zeros_like(one) for key, one in net.state_dict().items()}
    state = {**net.state_dict(), "optimizer": moments, "train_state": {"step": torch.tensor(3)}, "scale": torch.ones(1)}
    dcp.save(state, checkpoint_id=tmp_path / "step-3", no_dist=True)
    ran = run("convert", tmp_path / "step-3", tmp_path / "out.safetensors", "--json")
    assert ran.status == 0, ran.err
    assert_same(load_file(tmp_path / "out.safetensors"), {**net.state_dict(), "scale": torch.ones(1)})
    assert {"optimizer", "train_state"} <= {row["name"] for row in json.loads(ran.out)["dropped"]}


# --- what is wrong ---


def edit(folder: Path, change: Callable[[Metadata], None]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def place(folder: Path, name: str, number: int = 0) -> tuple[Path, int, int]:
    """Give the file of a part, and where in it the part lies."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    chunk = metadata.state_dict_metadata[name].chunks[number]
    info = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
    return folder / info.relative_path, info.offset, info.length


def change_tensor(**changes: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["model.rows.weight"]
        metadata.state_dict_metadata["model.rows.weight"] = dataclasses.replace(entry, **changes)

    return change


def change_place(**changes: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        index = MetadataIndex("model.rows.weight", torch.Size([2, 0]))
        info = metadata.storage_data[index]
        metadata.storage_data[index] = _StorageInfo(**{**_plain(info), **changes})

    return change


def _plain(info: _StorageInfo) -> dict[str, Any]:
    return {"relative_path": info.relative_path, "offset": info.offset, "length": info.length}


def part(offsets: tuple[int, int], sizes: tuple[int, int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def drop_place(metadata: Metadata) -> None:
    del metadata.storage_data[MetadataIndex("model.rows.weight", torch.Size([2, 0]))]


def put_elsewhere(metadata: Metadata) -> None:
    metadata.planner_data["epoch"] = ("model", "rows.weight", "deeper")


ROWS = [part((0, 0), (2, 5)), part((2, 0), (2, 5)), part((4, 0), (2, 5)), part((6, 0), (1, 5))]
REFUSED: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "a part is left out": (change_tensor(chunks=ROWS[1:]), "'model.rows.weight': its parts hold 25 of 35 elements"),
    "the tensor is larger": (change_tensor(size=torch.Size([9, 5])), "its parts hold 35 of 45 elements"),
    "a part reaches beyond": (change_tensor(size=torch.Size([6, 5])), "reaches beyond the tensor of [6, 5]"),
    "two parts overlap": (change_tensor(chunks=[*ROWS[:3], part((6, 0), (1, 5)), ROWS[1]]), "overlaps another"),
    "a part has no place": (drop_place, "names no file that holds the part at [2, 0] of 'model.rows.weight'"),
    "a file beyond its end": (change_place(offset=1 << 40), "ends at byte"),
    "a file elsewhere": (change_place(relative_path="../secret"), "no plain name of a file"),
    "a file that is not there": (change_place(relative_path="__9_0.distcp"), "'__9_0.distcp'"),
    "a negative offset": (change_place(offset=-1), "no place in a file"),
    "an extension": (change_place(transform_descriptors=["zstd"]), "transform_descriptors"),
    "a path through a value": (put_elsewhere, "leads through another value"),
}


@pytest.fixture
def broken(folders: Path, tmp_path: Path) -> Path:
    """Copy a folder, to be damaged."""
    return Path(shutil.copytree(folders / "ranks-4", tmp_path / "broken"))


@pytest.mark.parametrize("name", REFUSED)
def test_metadata_that_contradicts_itself_is_refused(run: Any, broken: Path, name: str) -> None:
    change, reason = REFUSED[name]
    edit(broken, change)
    ran = run("inspect", broken)
    assert (ran.status, reason in ran.err, ran.err.count("\n")) == (2, True, 1), ran.err


def test_a_missing_file_is_named(run: Any, broken: Path) -> None:
    (broken / "__2_0.distcp").unlink()
    ran = run("convert", broken, broken.with_suffix(".safetensors"))
    assert (ran.status, "1 of 4 files" in ran.err, "'__2_0.distcp'" in ran.err) == (2, True, True)


def test_a_missing_metadata_is_named(run: Any, broken: Path) -> None:
    (broken / ".metadata").unlink()
    assert ".metadata" in run("inspect", broken / ".").err
    assert "name its folder" in run("inspect", broken / "__0_0.distcp").err


def test_a_link_out_of_the_folder_is_refused(run: Any, broken: Path) -> None:
    (broken / "__1_0.distcp").rename(broken.parent / "away")
    (broken / "__1_0.distcp").symlink_to(broken.parent / "away")
    assert "leads out of the folder" in run("inspect", broken).err


def test_a_file_of_another_save_is_told(run: Any, broken: Path) -> None:
    (broken / "__7_0.distcp").write_bytes(b"")
    assert "__7_0.distcp" in run("inspect", broken).out


@pytest.mark.parametrize("cut", [0, 1, 100, 1500])
def test_a_file_that_ends_early_is_refused(run: Any, broken: Path, cut: int) -> None:
    path, offset, _ = place(broken, "model.rows.weight", 1)
    os.truncate(path, offset + cut)
    ran = run("inspect", broken)
    assert (ran.status, "ends at byte" in ran.err or "no such file" in ran.err) == (2, True), ran.err


def test_damage_is_found_where_it_is(run: Any, broken: Path, tmp_path: Path) -> None:
    path, offset, nbytes = place(broken, "model.columns.weight", 1)
    data = bytearray(path.read_bytes())
    values = by_torch(broken)["model"]["columns.weight"][:, 3:6].contiguous()
    at = data.index(values.numpy().tobytes(), offset, offset + nbytes)
    data[at + 5] ^= 1
    path.write_bytes(data)
    ran = run("convert", broken, tmp_path / "out.pt")
    assert (ran.status, "checksum" in ran.err, "columns.weight" in ran.err) == (2, True, True), ran.err
    ran = run("verify", broken, "--json")
    integrity = json.loads(ran.out)["checks"][0]
    assert (ran.status, integrity["status"]) == (1, "fail")
    assert integrity["evidence"]["faults"][0]["tensors"] == ["columns.weight"]


def test_a_part_that_is_another_tensor_is_refused(run: Any, broken: Path, tmp_path: Path) -> None:
    other = place(broken, "model.few.weight")
    edit(broken, change_place(relative_path=other[0].name, offset=other[1], length=other[2]))
    assert run("inspect", broken).status == 0
    ran = run("convert", broken, tmp_path / "out.pt")
    assert (ran.status, "does not hold the float32 tensor of [2, 5]" in ran.err) == (2, True), ran.err


def replace_item(folder: Path, name: str, number: int, value: Any) -> None:
    """Put another pickle in the place of an item, at the end of its file."""
    path, _, _ = place(folder, name, number) if name.startswith("model") else (folder / "__0_0.distcp", 0, 0)
    start = path.stat().st_size
    with path.open("ab") as file:
        torch.save(value, file)
    length = path.stat().st_size - start

    def change(metadata: Metadata) -> None:
        offset = metadata.state_dict_metadata[name].chunks[number].offsets if name.startswith("model") else None
        metadata.storage_data[MetadataIndex(name, offset)] = _StorageInfo(path.name, start, length)

    edit(folder, change)


def test_a_value_that_runs_a_command_is_dangerous_and_never_run(run: Any, broken: Path) -> None:
    replace_item(broken, "name", 0, Command())
    document = json.loads(run("inspect", broken, "--json").out)
    assert document["safety"]["verdict"] == "dangerous"
    assert run("verify", broken).status == 1


def test_a_part_that_runs_a_command_is_refused_where_it_is_read(run: Any, broken: Path, tmp_path: Path) -> None:
    replace_item(broken, "model.rows.weight", 1, Command())
    ran = run("convert", broken, tmp_path / "out.pt")
    assert (ran.status, "which no tensor needs" in ran.err) == (2, True), ran.err
    assert run("verify", broken).status == 1


@pytest.mark.parametrize("data", [b"", b"\x80\x04N.", b"\x80\x04}.", b"junk", pickle.dumps(Command())])
def test_other_metadata_is_refused_in_one_sentence(run: Any, broken: Path, data: bytes) -> None:
    (broken / ".metadata").write_bytes(data)
    ran = run("inspect", broken)
    assert (ran.status, ran.err.count("\n")) == (2, 1), ran.err


def test_every_cut_of_the_metadata_is_refused(broken: Path) -> None:
    whole = (broken / ".metadata").read_bytes()
    for length in range(0, len(whole), 97):
        (broken / ".metadata").write_bytes(whole[:length])
        with pytest.raises(ckptool.errors.UnreadableCheckpoint):
            open_checkpoint(broken)


def test_changed_bytes_give_tensors_or_one_refusal(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "ranks-2", tmp_path / "changed"))
    files, generator = sorted(folder.iterdir()), Random(0)
    for number in range(120):
        path = files[0] if number % 2 else generator.choice(files)
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        with contextlib.suppress(ckptool.errors.UnreadableCheckpoint), open_checkpoint(folder) as checkpoint:
            for storage in checkpoint.storages:
                assert sum(map(len, storage.source.stream())) == storage.nbytes
        path.write_bytes(whole)


def test_a_folder_is_never_replaced(run: Any, broken: Path) -> None:
    ran = run("strip-prefixes", broken, "--in-place")
    assert (ran.status, "cannot be replaced in place" in ran.err) == (2, True)


def test_what_is_in_both_files_is_refused(run: Any, broken: Path) -> None:
    torch.save({"epoch": 4}, broken / "meta.pt")
    assert "'epoch' is in '.metadata' and in 'meta.pt'" in run("inspect", broken).err


def test_weights_beside_are_told(run: Any, broken: Path) -> None:
    torch.save({"w": torch.zeros(2)}, broken / "pytorch_model.bin")
    (broken / "config.json").write_text("{}")
    assert "did not look at" in run("inspect", broken).out
