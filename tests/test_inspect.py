"""Inspect through the command line: what it says is true, whatever the file; what it prints is safe."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ran
from safetensors.torch import save_file
from support.strict_json import strictly
from support.terminal import on_a_terminal
from torch import nn

import ckptool
from ckptool.model import dtypes
from ckptool.model.values import DictNode, GlobalRef, SetNode, Stub
from ckptool.operations.advice import shell_quote
from ckptool.operations.module_tree import fold, grow
from ckptool.operations.plain import MAX_VALUES, to_plain

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples" / "digits.ckpt"

Run = Callable[..., Ran]


def saved(folder: Path, value: Any, name: str = "model.pt") -> Path:
    torch.save(value, folder / name)
    return folder / name


def answer(run: Run, *args: object) -> dict[str, Any]:
    """Give the JSON answer of a command that could answer."""
    ran = run("inspect", "--json", *args)
    assert (ran.status, ran.err) == (0, "")
    return strictly(ran.out)


def records(run: Run, *args: object) -> dict[str, list[list[str]]]:
    """Give the plain lines by their first cell."""
    ran = run("inspect", *args)
    assert (ran.status, ran.err) == (0, "")
    found: dict[str, list[list[str]]] = {}
    for line in ran.out.splitlines():
        name, *cells = line.split("\t")
        found.setdefault(name, []).append(cells)
    return found


class Small(nn.Module):
    """A network with everything that counts twice or not at all: ties, running statistics, a frozen buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.encoder = nn.Linear(8, 8, bias=False)
        self.decoder = nn.Linear(8, 8, bias=False)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(8, 5)


# What is in it.


def test_the_shipped_checkpoint_is_described_as_torch_reads_it(run: Run) -> None:
    found = answer(run, DIGITS, "--tensors")
    truth = torch.load(DIGITS, weights_only=True)
    assert found["schema"] == "ckptool.inspect/1"
    assert (found["path"], found["format"], found["file_bytes"]) == (str(DIGITS), "torch-zip", DIGITS.stat().st_size)
    assert "Lightning" in found["producer"]["name"]
    assert found["producer"]["version"] == truth["pytorch-lightning_version"]
    assert found["training"]["epoch"] == truth["epoch"]
    assert found["training"]["global_step"] == truth["global_step"]
    assert found["training"]["compiled"]["value"] is True
    assert "_orig_mod" in found["training"]["compiled"]["evidence"]
    assert found["hyper_parameters"] == json.loads(json.dumps(truth["hyper_parameters"]))
    assert [
        (row["source_key"], row["key"], f"torch.{row['dtype']}", tuple(row["shape"]), row["bytes"])
        for row in found["tensors"]
    ] == [
        (key, key.removeprefix("model._orig_mod."), str(value.dtype), tuple(value.shape), value.nbytes)
        for key, value in truth["state_dict"].items()
    ]


def test_keys_say_what_they_would_become_and_on_what_evidence(run: Run) -> None:
    keys = answer(run, DIGITS)["keys"]
    count = len(torch.load(DIGITS, weights_only=True)["state_dict"])
    assert keys["already_clean"] is False
    assert keys["renamed"] == count
    assert keys["refusal"] is None
    compiled = next(wrapper for wrapper in keys["wrappers"] if wrapper["segment"] == "_orig_mod")
    assert compiled == {
        "name": "torch.compile",
        "segment": "_orig_mod",
        "count": count,
        "of": count,
        "certainty": "certain",
    }
    assert keys["examples"][0]["target"] == keys["examples"][0]["source"].removeprefix("model._orig_mod.")


def test_parameters_are_counted_as_the_model_counts_them(run: Run, tmp_path: Path) -> None:
    model = Small()
    [summary] = answer(run, saved(tmp_path, model.state_dict()))["state_dicts"]
    values = model.state_dict().values()
    assert summary["parameters"] == sum(value.numel() for value in model.parameters())
    assert summary["elements"] == sum(value.numel() for value in values)
    assert summary["tensors"] == len(values)
    assert summary["bytes"] == sum(value.nbytes for value in values) - model.decoder.weight.nbytes
    assert summary["dtypes"]["int64"] == {"tensors": 1, "elements": 1, "bytes": 8}
    assert (summary["selected"], summary["role"], summary["path"]) == (True, "main", "")


def test_ties_are_seen_without_reading_a_tensor(run: Run, tmp_path: Path) -> None:
    path = saved(tmp_path, Small().state_dict())
    assert answer(run, path)["ties"] == [["encoder.weight", "decoder.weight"]]
    assert records(run, path)["tie"] == [["encoder.weight", "decoder.weight"]]


def test_the_groups_on_disk_add_up_to_the_file(run: Run, tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    model.head(model.encoder(torch.ones(2, 8))).sum().backward()
    optimizer.step()
    ema = {key: value.clone() for key, value in model.state_dict().items()}
    hidden = torch.zeros(100, 100)
    path = saved(
        tmp_path,
        {"state_dict": model.state_dict(), "ema": ema, "opt": optimizer.state_dict(), "row": hidden[3], "epoch": 1},
    )
    disk = answer(run, path)["disk"]
    assert sum(disk.values()) == path.stat().st_size
    tied = model.encoder.weight.nbytes
    dense = sum(value.nbytes for value in model.state_dict().values())
    assert disk["weights"] == dense - tied
    assert disk["ema"] == dense
    state = optimizer.state_dict()["state"].values()
    assert disk["optimizer"] == sum(value.nbytes for moments in state for value in moments.values())
    assert disk["hidden"] == hidden.nbytes - hidden[3].nbytes


@pytest.mark.parametrize(
    ("views", "hidden"),
    [
        (lambda base: [base], 0),
        (lambda base: [base[:2], base[1:3]], 4),
        (lambda base: [base.t()], 0),
        (lambda base: [base[:, :1]], 12),
        (lambda base: [base[:1].expand(50, 4)], 12),
        (lambda base: [base.flatten().as_strided((5, 3), (1, 1))], 9),
        (lambda base: [base[:0]], 16),
    ],
    ids=["all", "overlapping rows", "transposed", "a column", "expanded", "windows", "nothing"],
)
def test_hidden_bytes_are_those_that_no_view_shows(
    views: Callable[[torch.Tensor], list[torch.Tensor]], hidden: int, run: Run, tmp_path: Path
) -> None:
    base = torch.arange(16.0).reshape(4, 4)
    path = saved(tmp_path, {f"v{index}.weight": view for index, view in enumerate(views(base))})
    assert answer(run, path)["disk"]["hidden"] == hidden * 4


def test_equal_candidates_are_listed_and_no_error(run: Run, tmp_path: Path) -> None:
    path = saved(tmp_path, {"student": {"w.a": torch.ones(3)}, "teacher": {"w.a": torch.ones(4)}})
    found = answer(run, path, "--tensors")
    assert [(one["path"], one["role"], one["selected"]) for one in found["state_dicts"]] == [
        ("student", "peer", False),
        ("teacher", "peer", False),
    ]
    assert found["keys"]["already_clean"] is None
    assert "--weights" in found["keys"]["refusal"]["text"]
    assert [row["source_key"] for row in found["tensors"]] == ["student.w.a", "teacher.w.a"]
    chosen = answer(run, path, "--weights", "teacher", "--tensors")
    assert [(row["key"], row["shape"]) for row in chosen["tensors"]] == [("w.a", [4])]


def test_keys_that_cannot_be_planned_are_no_error(run: Run, tmp_path: Path) -> None:
    path = saved(tmp_path, {"_orig_mod.a.w": torch.ones(1), "a.w": torch.ones(1)})
    found = answer(run, path, "--tensors")
    assert found["keys"]["refusal"]["code"] == "collision"
    assert [row["key"] for row in found["tensors"]] == ["_orig_mod.a.w", "a.w"]


def test_a_file_without_weights_is_described_all_the_same(run: Run, tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    found = answer(run, saved(tmp_path, optimizer.state_dict()), "--tensors")
    assert found["state_dicts"] == []
    assert found["keys"]["refusal"]["code"] == "no-weights"
    assert found["disk"]["optimizer"] == 24
    assert [row["shape"] for row in found["tensors"]] == [[2, 2], [2]]


def test_dropped_keys_are_listed_with_their_reason(run: Run, tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    found = answer(run, saved(tmp_path, averaged.state_dict()), "--tensors")
    [dropped] = found["keys"]["dropped"]
    assert dropped["source"] == "n_averaged"
    assert dropped["reason"]
    assert [row["key"] for row in found["tensors"] if row["source_key"] == "n_averaged"] == [None]


# Lists.


def sizes(folder: Path) -> Path:
    tensors = {"b.w": torch.ones(2, 2), "a.w": torch.ones(9), "c.w": torch.ones(1, 1, 1, dtype=torch.float64)}
    return saved(folder, tensors)


@pytest.mark.parametrize(
    ("order", "keys"),
    [
        ("file", ["b.w", "a.w", "c.w"]),
        ("name", ["a.w", "b.w", "c.w"]),
        ("size", ["a.w", "b.w", "c.w"]),
        ("dtype", ["b.w", "a.w", "c.w"]),
        ("shape", ["c.w", "b.w", "a.w"]),
    ],
)
def test_tensors_are_sorted_as_asked(order: str, keys: list[str], run: Run, tmp_path: Path) -> None:
    path = sizes(tmp_path)
    assert [row["key"] for row in answer(run, path, "--tensors", "--sort", order)["tensors"]] == keys
    assert [cells[0] for cells in records(run, path, "--tensors", "--sort", order)["tensor"]] == keys


def test_an_unknown_order_is_refused(run: Run, tmp_path: Path) -> None:
    ran = run("inspect", sizes(tmp_path), "--sort", "colour")
    assert (ran.status, ran.out) == (2, "")
    assert "--sort colour: choose one of file, name, size, dtype, shape" in ran.err


@pytest.mark.parametrize(
    ("globs", "keys"),
    [
        (["--include", "a.*"], ["a.w"]),
        (["--exclude", "a.*"], ["b.w", "c.w"]),
        (["--include", "a.*", "--include", "c*"], ["a.w", "c.w"]),
        (["--include", "[ab].w", "--exclude", "b*"], ["a.w"]),
        (["--include", "nothing"], []),
    ],
)
def test_globs_choose_what_is_listed_and_nothing_else(
    globs: list[str], keys: list[str], run: Run, tmp_path: Path
) -> None:
    path = sizes(tmp_path)
    found = answer(run, path, "--tensors", *globs)
    assert [row["key"] for row in found["tensors"]] == keys
    assert found["state_dicts"][0]["tensors"] == 3
    assert found["keys"]["already_clean"] is True


def test_values_are_read_only_when_asked_for(run: Run, tmp_path: Path) -> None:
    values = {
        "a.weight": torch.randn(64, 3),
        "b.weight": torch.tensor([1.0, float("nan"), -float("inf"), 0.0]),
        "c.weight": torch.zeros(5, dtype=torch.bfloat16),
        "d.count": torch.tensor([2**60, -1]),
    }
    path = saved(tmp_path, values)
    assert all("statistics" not in row for row in answer(run, path, "--tensors")["tensors"])
    found = {row["key"]: row["statistics"] for row in answer(run, path, "--stats")["tensors"]}
    a = values["a.weight"].double()
    assert found["a.weight"]["mean"] == pytest.approx(a.mean().item(), rel=1e-12)
    assert found["a.weight"]["std"] == pytest.approx(a.std(correction=0).item(), rel=1e-9)
    assert (found["a.weight"]["minimum"], found["a.weight"]["maximum"]) == (a.min().item(), a.max().item())
    assert {name: found["b.weight"][name] for name in ("nan", "infinite", "zeros", "finite")} == {
        "nan": 1,
        "infinite": 1,
        "zeros": 1,
        "finite": 2,
    }
    assert found["c.weight"]["zeros"] == 5
    assert found["d.count"]["maximum"] == 2**60
    assert records(run, path, "--stats")["tensor"][2][-5] == "5"


def test_values_that_are_too_many_to_read_are_refused_by_file_and_name(run: Run, tmp_path: Path) -> None:
    path = saved(tmp_path, {"big": torch.zeros(1).expand(1 << 33), "small": torch.ones(3)})
    for form in ([], ["--json"]):
        ran = run("inspect", path, "--stats", *form)
        assert (ran.status, ran.out) == (2, "")
        assert ran.err.startswith(f'ckptool: {path}: tensor "big" is a view that repeats')
    assert [row["key"] for row in answer(run, path, "--stats", "--exclude", "big")["tensors"]] == ["small"]


def test_the_tree_folds_equal_blocks_only(run: Run, tmp_path: Path) -> None:
    blocks = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)]
    model = nn.Sequential()
    model.add_module("layers", nn.Sequential(*blocks))
    path = saved(tmp_path, model.state_dict())
    tree = answer(run, path, "--tree")["tree"]
    assert (tree["name"], tree["tensors"], tree["elements"]) == ("layers", 8, 3 * 20 + 10)
    assert [(node["name"], node["repeats"], node["tensors"], node["bytes"]) for node in tree["children"]] == [
        ("[0-2]", 3, 6, 240),
        ("3", 1, 2, 40),
    ]
    assert [(leaf["name"], leaf["dtype"], leaf["shape"]) for leaf in tree["children"][0]["children"]] == [
        ("weight", "float32", [4, 4]),
        ("bias", "float32", [4]),
    ]


def test_a_name_with_many_dots_is_no_deep_tree() -> None:
    from ckptool.model.inspection import TensorRow

    deep = ".".join("a" * 2000)
    tree = fold(grow([TensorRow(deep, deep, "float32", (1,), 4), TensorRow("a", "a", "float32", (2,), 8)]))
    assert (tree.tensors, tree.elements, tree.nbytes) == (2, 3, 12)


def test_a_tensor_in_a_module_without_a_name_stays_apart_in_the_tree(run: Run, tmp_path: Path) -> None:
    path = saved(tmp_path, {"weight": torch.ones(3), ".weight": torch.ones(4)})
    tree = answer(run, path, "--tree")["tree"]
    assert (tree["tensors"], tree["elements"]) == (2, 7)
    assert [(node["name"], node["elements"]) for node in tree["children"]] == [("weight", 3), ("", 4)]


# Safety and foreign objects.


class Command:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/ckptool-was-here",)


def test_a_dangerous_pickle_is_a_verdict_and_runs_nothing(run: Run, tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": {"fc.weight": torch.ones(2, 2)}, "x": Command()})
    safety = answer(run, path)["safety"]
    assert safety["verdict"] == "dangerous"
    [bad] = [use for use in safety["globals"] if use["severity"] == "dangerous"]
    assert bad["name"] == f"{os.system.__module__}.system"
    assert bad["called"] is True
    assert re.fullmatch(r"data\.pkl@\d+", bad["where"])
    assert not Path("/tmp/ckptool-was-here").exists()


class TrainingConfig:
    def __init__(self) -> None:
        self.width, self.names, self.nested = 3, ["a", "b"], {1: argparse.Namespace(lr=0.5)}


@pytest.mark.parametrize("inside", [{"hyper_parameters": {"config": TrainingConfig()}}, {"config": TrainingConfig()}])
def test_a_foreign_class_is_shown_with_its_fields(run: Run, tmp_path: Path, inside: dict[str, object]) -> None:
    path = saved(tmp_path, {"state_dict": {"fc.weight": torch.ones(2, 2)}, **inside})
    data = path.read_bytes()
    # The module is gone by the time the file is read; a name of equal length keeps the pickle whole.
    gone = data.replace(__name__.encode(), b"x" * len(__name__))
    assert gone != data
    path.write_bytes(patched_crc(gone))
    found = answer(run, path)
    config = found["hyper_parameters"]["config"]
    assert config["$class"] == f"{'x' * len(__name__)}.TrainingConfig"
    assert (config["width"], config["names"]) == (3, ["a", "b"])
    assert config["nested"]["1"]["lr"] == 0.5
    assert found["safety"]["verdict"] == "unknown"
    with ckptool.open(path) as checkpoint:
        assert checkpoint.hyper_parameters == found["hyper_parameters"]


def patched_crc(data: bytes) -> bytes:
    """Write a torch file again, so that its checksums are right for its changed pickle."""
    import io
    import zipfile

    source, target = zipfile.ZipFile(io.BytesIO(bytes(data))), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for info in source.infolist():
            start = info.header_offset
            name, extra = struct.unpack_from("<HH", data, start + 26)
            begin = start + 30 + name + extra
            archive.writestr(info.filename, data[begin : begin + info.file_size])
    return target.getvalue()


REF = GlobalRef("my.module", "Config", "unknown")
LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (b"\x00\xff", {"$bytes": "00ff"}),
        (1 + 2j, {"$complex": [1.0, 2.0]}),
        (float("nan"), "NaN"),
        (-float("inf"), "-Infinity"),
        (2**64, 2**64),
        (2**5000, {"$int": hex(2**5000)}),
        (dtypes.BY_NAME["bfloat16"], "torch.bfloat16"),
        ((1, [2, None]), [1, [2, None]]),
        (SetNode([1, 2]), [1, 2]),
        (REF, {"$global": "my.module.Config"}),
        (DictNode([("a", 1), (2, "b")]), {"a": 1, "2": "b"}),
        (DictNode([("2", 1), (2, "b")]), {"$pairs": [["2", 1], [2, "b"]]}),
        (DictNode([((1, 2), 3)]), {"$pairs": [[[1, 2], 3]]}),
        (DictNode([("$class", "spoof")]), {"$$class": "spoof"}),
        (Stub(REF, args=(1,)), {"$class": "my.module.Config", "$args": [1]}),
        (Stub(REF, state=DictNode([("lr", 1)])), {"$class": "my.module.Config", "lr": 1}),
        (Stub(REF, state=[1], items=[2], pairs=[("k", 3)]),
         {"$class": "my.module.Config", "$state": [1], "$items": [2], "$mapping": {"k": 3}}),
        (LOOP, [{"$cut": "holds itself"}]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_every_value_has_a_plain_form(value: Any, plain: Any) -> None:
    assert to_plain(value) == plain


def test_a_small_file_does_not_unfold_into_a_huge_answer() -> None:
    layer: Any = ["x"] * 10
    for _ in range(40):
        layer = [layer] * 10
    text = str(to_plain(layer))
    assert "$cut" in text
    assert text.count("'x'") <= MAX_VALUES
    deep: Any = 1
    for _ in range(250):
        deep = [deep]
    assert "nested deeper" in str(to_plain(deep))


# The network.


def huggingface() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return {
        "vit": (
            ViTForImageClassification(ViTConfig(**small, num_labels=7, image_size=16, patch_size=8, num_channels=4)),
            {"input_channels": 4, "classes": 7, "vocabulary": None},
        ),
        "resnet": (
            ResNetForImageClassification(
                ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=6)
            ),
            {"input_channels": 3, "classes": 6, "vocabulary": None},
        ),
        "bert": (
            BertForSequenceClassification(BertConfig(**small, vocab_size=50, num_labels=3)),
            {"input_channels": None, "classes": 3, "vocabulary": 50},
        ),
        "gpt2": (
            GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)),
            {"input_channels": None, "classes": None, "vocabulary": 50},
        ),
        "perceptron": (
            nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)),
            {"input_channels": None, "classes": 4, "vocabulary": None},
        ),
        "autoencoder": (
            nn.Sequential(nn.Linear(20, 5), nn.ReLU(), nn.Linear(5, 20)),
            {"input_channels": None, "classes": None, "vocabulary": None},
        ),
    }


@pytest.mark.parametrize("name", ["vit", "resnet", "bert", "gpt2", "perceptron", "autoencoder"])
def test_the_network_is_previewed_and_unknown_stays_unknown(name: str, run: Run, tmp_path: Path) -> None:
    model, expected = huggingface()[name]
    found = answer(run, saved(tmp_path, model.state_dict()))["architecture"]
    assert {field: found[field] for field in expected} == expected
    assert sum(block["elements"] for block in found["blocks"]) == sum(v.numel() for v in model.state_dict().values())


@pytest.mark.parametrize("name", ["vit", "resnet", "bert"])
def test_a_file_sorted_by_name_tells_the_same_ends_or_nothing(name: str, run: Run, tmp_path: Path) -> None:
    model, expected = huggingface()[name]
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    found = answer(run, path)["architecture"]
    assert all(found[field] in (value, None) for field, value in expected.items())
    assert found["classes"] == expected["classes"]


def test_blocks_are_folded(run: Run, tmp_path: Path) -> None:
    model, _ = huggingface()["vit"]
    found = answer(run, saved(tmp_path, model.state_dict()))["architecture"]
    [stack] = [block for block in found["blocks"] if block["repeats"] > 1]
    assert stack["name"].endswith(".[0-2]")
    assert stack["repeats"] == 3


# Several inputs, the next command, the streams.


def test_unreadable_files_do_not_hide_the_others_and_the_worst_wins(run: Run, tmp_path: Path) -> None:
    good = saved(tmp_path, {"a.weight": torch.ones(2, 2)})
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    ran = run("inspect", bad, good, "--json")
    found = strictly(ran.out)
    assert ran.status == 2
    assert ran.err.count("\n") == 1
    assert str(bad) in ran.err
    assert [entry["path"] for entry in found["files"]] == [str(bad), str(good)]
    assert "error" in found["files"][0]
    assert found["files"][1]["state_dicts"][0]["tensors"] == 1
    plain = run("inspect", bad, good)
    assert plain.status == 2
    assert [line.split("\t")[0] for line in plain.out.splitlines()] == ["file", "unreadable", "refusal"]
    listed = run("inspect", bad, good, "--tensors")
    assert listed.status == 2
    assert listed.out.startswith(f"path\t{good}\n")
    alone = run("inspect", bad, "--json")
    assert (alone.status, alone.out) == (2, "")


def test_quiet_says_nothing(run: Run) -> None:
    ran = run("inspect", DIGITS, "--quiet")
    assert (ran.status, ran.out, ran.err) == (0, "", "")


@pytest.mark.parametrize(
    "name", ["my model's.ckpt", "-o.pt", "a\nb\x1b[2J.pt", "caf\udce9.pt", "$HOME.pt", "w\u200b.pt", "v1.2"]
)
def test_the_next_command_names_the_file_for_a_shell(
    name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, {"module.fc.weight": torch.ones(2, 2), "module.fc.bias": torch.ones(2)}, "model.pt")
    (tmp_path / "model.pt").rename(tmp_path / name)
    ran = run("inspect", "--json", "--", name)
    command = strictly(ran.out)["next"]
    read = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    words = [os.fsdecode(word) for word in read.split(b"\0")[:-1]]
    assert words[:2] == ["ckptool", "strip-prefixes"]
    assert Path(words[2]) == Path(name)
    assert words[3] != words[2]
    assert Path(words[3]).name == ("v1.2-clean" if name == "v1.2" else f"{Path(name).stem}-clean{Path(name).suffix}")
    assert command.isprintable()


def test_the_next_command_does_what_it_says(run: Run, tmp_path: Path) -> None:
    path = saved(tmp_path, {"module.fc.weight": torch.ones(2, 2), "module.fc.bias": torch.ones(2)})
    for expected in ("strip-prefixes", "convert", "inspect"):
        command = shlex.split(answer(run, path)["next"])
        assert command[:2] == ["ckptool", expected]
        assert run(*command[1:]).status == 0
        path = Path(command[-1])


def test_quoting_is_for_the_shell_alone() -> None:
    assert shell_quote("plain/model.pt") == "plain/model.pt"
    assert shell_quote("größe.pt") == shlex.quote("größe.pt")
    assert shell_quote("a\n'\\") == r"$'a\x0a\'\\'"


HOSTILE = {
    "\x1b[2J\x1b]52;c;aGk=\x07bad\nPASS b.weight": torch.ones(3, 3),
    "[/x][bold]:smile:[link=http://x].weight": torch.ones(2, 2),
    "w\u200b.weight": torch.ones(2),
    "\u202eabc.weight": torch.ones(2),
    "\u009b31m.weight": torch.ones(2),
    "n" * 4000 + ".weight": torch.ones(2),
    "tab\there.weight": torch.ones(2),
}


def hostile(folder: Path) -> Path:
    value = {
        "state_dict": HOSTILE,
        "hyper_parameters": {"\x1b[31mred": "\x1b]0;title\x07", "[/x]": "[/y]", "deep": {"\x9b": ["\u2028"]}},
        "epoch": 1,
        "val_loss\x1b": 0.5,
    }
    return saved(folder, value).rename(folder / "ho\x1b[5mst[x]\nile.pt")


def test_hostile_names_stay_one_record_when_piped(run: Run, tmp_path: Path) -> None:
    path = hostile(tmp_path)
    ran = run("inspect", path, "--tensors", "--tree")
    assert ran.status == 0
    assert all(cell.isprintable() for line in ran.out.splitlines() for cell in line.split("\t"))
    assert sum(line.startswith("tensor\t") for line in ran.out.splitlines()) == len(HOSTILE)
    assert not any(line.startswith(("PASS", "ile.pt")) for line in ran.out.splitlines())
    assert "n" * 4000 in ran.out
    keys = [row["key"] for row in answer(run, path, "--tensors")["tensors"]]
    assert keys == list(HOSTILE)


@pytest.mark.parametrize("options", [[], ["--tensors"], ["--tree"], ["--stats"]], ids=str)
@pytest.mark.parametrize("width", [1, 80])
def test_hostile_names_do_nothing_to_a_terminal(options: list[str], width: int, tmp_path: Path) -> None:
    shown = on_a_terminal(["inspect", str(hostile(tmp_path)), *options], width)
    bare = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert all(line.isprintable() for line in bare.split("\n"))
    assert "[/x]" in bare
    assert "4,007 characters" in bare.replace("\n", "") or not options or options == ["--tree"] or width == 1
    assert "Traceback" not in bare


def test_a_terminal_gets_the_view_and_a_pipe_the_lines(run: Run) -> None:
    shown = on_a_terminal(["inspect", str(DIGITS)], 100)
    assert "\x1b[" in shown
    assert "model" in shown
    assert "stem.weight" in shown
    assert "Next" in shown
    assert "\x1b[" not in run("inspect", DIGITS).out
    assert "\x1b[" in run("inspect", DIGITS, "--color", "always").out


def python(code: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, **options)


def test_the_piped_answer_loads_nothing_heavy() -> None:
    code = f"""
import sys
from ckptool.cli import main
status = main(["inspect", {str(DIGITS)!r}, "--tensors"])
loaded = {{"torch", "numpy", "rich", "safetensors", "zipfile", "pydantic"}} & set(sys.modules)
sys.exit(f"{{status}} {{loaded}}" if status or loaded else 0)
"""
    ran = python(code)
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    path = saved(tmp_path, {f"layer.{index}.weight": torch.ones(1) for index in range(5000)})
    command = [sys.executable, "-m", "ckptool", "inspect", "--tensors", str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"path\t")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode != 0


def test_a_stream_that_knows_only_ascii_gets_ascii(tmp_path: Path) -> None:
    path = saved(tmp_path, {"größe.weight": torch.ones(2, 2)})
    for options in ([], ["--color", "always"], ["--json"]):
        arguments = ["inspect", str(path), "--tensors", *options]
        ran = python(
            f"import sys; from ckptool.cli import main; sys.exit(main({arguments!r}))",
            env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
        )
        assert (ran.returncode, ran.stderr) == (0, b"")
        assert ran.stdout.isascii()
        assert b"gr\\xf6\\xdfe" in ran.stdout or b"gr\\u00f6\\u00dfe" in ran.stdout


def test_a_pickled_module_of_numpy_scalars_and_text_is_data(run: Run, tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": {"fc.weight": torch.ones(2, 2)}, "best_acc": np.float64(0.75), "epoch": 4})
    training = answer(run, path)["training"]
    assert training["epoch"] == 4
    assert training["metrics"] == {"best_acc": 0.75}
    assert pickle.loads(pickle.dumps(training)) == training
