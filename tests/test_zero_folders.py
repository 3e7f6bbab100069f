"""Folders of DeepSpeed ZeRO: the weights that were split must come out whole, and what does not fit is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckptool
from ckptool.loading import load_state_dict
from tests.support.tensors import bits
from tests.support.zero import TAG, write_zero

ROOT = Path(__file__).parents[1]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


MATRICES = {"embed.weight": random(11, 3), "block.weight": random(5, 7), "head.weight": random(3, 4)}
VECTORS = {"block.bias": random(5), "head.bias": random(3), "gain": random(1)}
FROZEN = {"base.weight": random(4, 5), "base.bias": random(3)}
BUFFERS = {"norm.running_mean": random(4), "norm.num_batches_tracked": torch.tensor(2**40)}
SHARED = {"tied.weight": "embed.weight"}


def expected() -> dict[str, torch.Tensor]:
    return {**MATRICES, **VECTORS, **FROZEN, **BUFFERS, "tied.weight": MATRICES["embed.weight"]}


def write(folder: Path, stage: int, world: int, **changes: Any) -> Path:
    given: dict[str, Any] = {"buffers": BUFFERS, "frozen": FROZEN, "shared": SHARED, **changes}
    return write_zero(folder, [MATRICES, VECTORS], stage=stage, world=world, **given)


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name].shape != wanted[name].shape] == []
    assert [name for name in wanted if bits(found[name]) != bits(wanted[name])] == []


def optimizer_file(folder: Path, rank: int) -> Path:
    return next((folder / TAG).glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))


def model_file(folder: Path) -> Path:
    return min((folder / TAG).glob("*model_states.pt"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    root = torch.load(path, weights_only=False)
    change(root)
    torch.save(root, path)


# --- what comes out ---


@pytest.mark.parametrize("world", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_weights_of_all_ranks_are_put_together(tmp_path: Path, stage: int, world: int) -> None:
    assert_same(load_state_dict(write(tmp_path / "run", stage, world)), expected())


@pytest.mark.parametrize("prefix", ["", "bf16_"])
def test_the_folder_of_the_tag_is_the_same(tmp_path: Path, prefix: str) -> None:
    folder = write(tmp_path / "run", 2, 2, prefix=prefix)
    assert_same(load_state_dict(folder / TAG), expected())


def test_padding_between_parameters_is_left_out(tmp_path: Path) -> None:
    assert_same(load_state_dict(write(tmp_path / "run", 2, 3, paddings=[[1, 0, 4], [3, 2, 0]])), expected())


@pytest.mark.parametrize("stage", [2, 3])
def test_they_are_written_streamed(run: Any, tmp_path: Path, stage: int) -> None:
    folder, out = write(tmp_path / "run", stage, 3), tmp_path / "out.safetensors"
    ran = run("convert", folder, out, "--ties", "copy", "--json")
    assert ran.status == 0, ran.err
    assert_same(load_file(out), expected())
    dropped = {row["name"] for row in json.loads(ran.out)["dropped"]}
    assert dropped >= {"optimizer_ranks", *({"module_as_trained"} if stage == 2 else ())}
    assert run("strip-prefixes", folder, tmp_path / "out.pt").status == 0
    assert run("diff", folder, tmp_path / "out.pt").status == 0
    assert_same(torch.load(tmp_path / "out.pt", weights_only=True), expected())


def test_the_copies_that_were_trained_can_be_chosen(tmp_path: Path) -> None:
    with ckptool.open(write(tmp_path / "run", 2, 2)) as opened:
        tensor = opened.select("module_as_trained").tensors["embed.weight"]
        assert (tensor.dtype.name, opened.tensors["embed.weight"].dtype.name) == ("bfloat16", "float32")


def test_inspect_says_what_it_is(run: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 3, 2)
    document = json.loads(run("inspect", folder, "--json").out)
    assert (document["format"], document["producer"]["name"]) == ("deepspeed-zero", "DeepSpeed")
    assert document["container"] == {"index": "none", "shards": "4", "tag": TAG}
    assert document["file_bytes"] == sum(path.stat().st_size for path in (folder / TAG).iterdir())
    assert document["training"]["global_step"] == 2
    assert "consolidated" in [note["code"] for note in document["notes"]]
    assert document["ties"] != []
    torch.save({"w": torch.zeros(2)}, tmp_path / "a.pt")
    rows = json.loads(run("inspect", tmp_path, "--json").out)["files"]
    assert sorted(Path(row["path"]).name for row in rows if "error" not in row) == ["a.pt", "run"]


@pytest.mark.parametrize("stage", [1, 3])
def test_verify_checks_all_files(run: Any, tmp_path: Path, stage: int) -> None:
    folder = write(tmp_path / "run", stage, 3)
    ran = run("verify", folder, "--checks", "integrity", "--json")
    check = json.loads(ran.out)["checks"][0]
    assert (ran.status, check["status"], check["evidence"]["storages_without_checksum"]) == (0, "pass", 0)
    path = optimizer_file(folder, 1)
    data = bytearray(path.read_bytes())
    state = torch.load(path, weights_only=True)["optimizer_state_dict"]
    flat = state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"][0]
    data[data.index(flat.numpy().tobytes())] ^= 1
    path.write_bytes(data)
    ran = run("convert", folder, tmp_path / "out.pt")
    assert (ran.status, path.name in ran.err) == (2, True), ran.err
    assert run("verify", folder, "--checks", "integrity").status == 1


def test_lightning_keeps_its_own_beside(run: Any, tmp_path: Path) -> None:
    extra = {"pytorch-lightning_version": "2.6.0", "epoch": 4, "global_step": 9, "hyper_parameters": {"lr": 0.5}}
    folder = write_zero(tmp_path / "e.ckpt", [{"net.w": random(3, 4)}], stage=2, world=2, extra=extra)
    document = json.loads(run("inspect", folder, "--json").out)
    assert (document["training"]["epoch"], document["hyper_parameters"]) == (4, {"lr": 0.5})


# --- what is wrong ---


def drop_rank(folder: Path) -> None:
    optimizer_file(folder, 1).unlink()


def drop_model(folder: Path) -> None:
    model_file(folder).unlink()


def add_rank(folder: Path) -> None:
    path = optimizer_file(folder, 2)
    path.with_name(path.name.replace("rank_2", "rank_3")).write_bytes(path.read_bytes())


def add_slice(folder: Path) -> None:
    path = optimizer_file(folder, 2)
    path.with_name(path.name.replace("mp_rank_00", "mp_rank_01")).write_bytes(path.read_bytes())


def add_twin(folder: Path) -> None:
    path = optimizer_file(folder, 2)
    path.with_name(path.name.removeprefix("bf16_")).write_bytes(path.read_bytes())


def add_layer(folder: Path) -> None:
    (folder / TAG / "layer_00-model_00-model_states.pt").write_bytes(b"")


def add_expert(folder: Path) -> None:
    (folder / TAG / "layer_0_expert_3_mp_rank_00_model_states.pt").write_bytes(b"")


def leave_folder(folder: Path) -> None:
    (folder / "latest").write_text("../other")


def of_optimizer(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(optimizer_file(folder, 0), lambda root: root["optimizer_state_dict"].update(changes))


def of_model(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(model_file(folder), lambda root: root.update(changes))


WRONG: dict[str, tuple[int, Callable[[Path], None], str]] = {
    "a rank is missing": (2, drop_rank, "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    "a rank is missing in stage 3": (3, drop_rank, "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    "the model is missing": (2, drop_model, "mp_rank_00_model_states.pt"),
    "a model file is missing in stage 3": (3, drop_model, "zero_pp_rank_0_mp_rank_00_model_states.pt"),
    "a rank too many": (2, add_rank, "take away what is of another save"),
    "tensor slices": (2, add_slice, "tensor parallel in 2 slices"),
    "two files of a rank": (2, add_twin, "two files are of one rank"),
    "pipeline": (2, add_layer, "pipeline parallel"),
    "experts": (2, add_expert, "expert parallel"),
    "a tag elsewhere": (2, leave_folder, "DeepSpeed"),
    "another stage": (2, of_optimizer(zero_stage=3), "do not agree on a stage"),
    "no such stage": (2, of_optimizer(zero_stage="2"), "do not agree on a stage"),
    "another count": (2, of_optimizer(partition_count=4), "of [3, 4] ranks"),
    "no count": (2, of_optimizer(partition_count=None), "how many partitions"),
    "no partitions": (2, of_optimizer(single_partition_of_fp32_groups=None), "no flat partitions"),
    "fewer partitions": (2, of_optimizer(single_partition_of_fp32_groups=[torch.zeros(9)]), "other partitions"),
    "partitions of no one dimension": (3, of_optimizer(fp32_flat_groups=[torch.zeros(3, 3)]), "no flat partitions"),
    "paddings that do not fit": (2, of_optimizer(param_alignment_paddings=[[1]]), "param_alignment_paddings"),
    "no shapes": (2, of_model(param_shapes=None), "shapes of its parameters"),
    "odd shapes": (2, of_model(param_shapes=[{"w": (-1,)}, {}]), "no shape of a parameter"),
    "larger shapes": (2, of_model(param_shapes=[{"w": torch.Size([999])}, {}]), "end within 'w'"),
    "smaller shapes": (2, of_model(param_shapes=[{"w": (2,)}, {"b": (1,)}]), "do not fit partitions"),
    "larger shapes in stage 3": (3, of_model(param_shapes=[{"w": torch.Size([999])}]), "end within 'w'"),
    "smaller shapes in stage 3": (3, of_model(param_shapes=[{"w": (2,)}]), "do not fit partitions"),
    "a name in two groups": (2, of_model(param_shapes=[{"w": (2,)}, {"w": (2,)}]), "in two groups"),
    "more groups than partitions": (2, of_model(param_shapes=[{}, {}, {}]), "3 parameter groups"),
    "frozen without values": (2, of_model(frozen_param_fragments={}), "no values of the frozen parameter"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(run: Any, tmp_path: Path, name: str) -> None:
    stage, change, reason = WRONG[name]
    folder = write(tmp_path / "run.ckpt", stage, 3)
    change(folder)
    ran = run("inspect", folder)
    assert (ran.status, reason in ran.err, ran.err.count("\n")) == (2, True, 1), ran.err


def test_a_folder_is_never_replaced(run: Any, tmp_path: Path) -> None:
    ran = run("strip-prefixes", write(tmp_path / "run", 2, 2), "--in-place")
    assert (ran.status, "cannot be replaced in place" in ran.err) == (2, True)


def test_what_no_partition_holds_is_taken_and_told(run: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 1, 2)
    edit(model_file(folder), lambda root: root.update(frozen_param_shapes=None, frozen_param_fragments=None))
    wanted = {name: one.bfloat16() if name in FROZEN else one for name, one in expected().items()}
    assert_same(load_state_dict(folder), wanted)
    assert "not-partitioned" in run("inspect", folder).out


# --- DeepSpeed itself ---


@pytest.fixture(scope="module", params=["1 3 fp16", "2 2 bf16", "3 3 fp32"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Have DeepSpeed train and save on the CPU: stage, ranks, element type."""
    pytest.importorskip("deepspeed.utils.zero_to_fp32")
    out = tmp_path_factory.mktemp("zero") / "run"
    words = request.param.split()
    command = (sys.executable, "-m", "tests.support.deepspeed_ranks", *words, out)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PORT": f"2987{words[0]}"}
    subprocess.run(command, cwd=ROOT, check=True, timeout=300, capture_output=True, env=environment)
    return out


def test_deepspeed_agrees(saved: Path) -> None:
    zero_to_fp32 = pytest.importorskip("deepspeed.utils.zero_to_fp32")
    with contextlib.redirect_stdout(io.StringIO()):
        read: OrderedDict[str, Any] = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(saved)
    found = load_state_dict(saved)
    # In stage 1 its script drops what is frozen.
    assert_same({name: found[name] for name in read}, {name: one.contiguous() for name, one in read.items()})
    assert set(found) == {*read, "frozen.weight", "frozen.bias"}
