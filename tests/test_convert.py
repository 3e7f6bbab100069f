"""strip-prefixes and convert through the real entry point; torch and safetensors judge what was written."""

from __future__ import annotations

import copy
import json
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

DIGITS = Path(__file__).parent.parent / "examples" / "digits.ckpt"
WRONG_STRIP = DIGITS.with_name("digits_wrong_strip.pt")
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare dtype, shape and every bit, NaN payloads included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.resolve_conj().resolve_neg().contiguous() for t in (a, b))
    return bytes(a.reshape(-1).view(torch.uint8).tolist()) == bytes(b.reshape(-1).view(torch.uint8).tolist())


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    different = [name for name in expected if not same(found[name], expected[name])]
    assert not different


def load(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Give any bit pattern the type can hold."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = torch.empty(shape, dtype=dtype).numel() * torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


@pytest.fixture
def every_dtype() -> OrderedDict[str, torch.Tensor]:
    state = OrderedDict()
    for index, dtype in enumerate(DTYPES):
        name = str(dtype).removeprefix("torch.")
        state[f"{name}.weight"] = random_tensor(dtype, (3, 5), index)
        state[f"{name}.scalar"] = random_tensor(dtype, (1,), index)[0]
        state[f"{name}.empty"] = torch.empty((0, 4), dtype=dtype)
    return state


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_dtype_survives_both_ways(run, tmp_path, every_dtype, suffix):
    torch.save(every_dtype, tmp_path / "in.pt")
    first, second = tmp_path / f"a{suffix}", tmp_path / "b.pt"
    assert run("convert", tmp_path / "in.pt", first).status == 0
    assert run("convert", first, second).status == 0
    assert_same(load(first), every_dtype)
    assert_same(load(second), every_dtype)


def test_views_are_written_dense(run, tmp_path):
    base = torch.randn(6, 8)
    state = {
        "transposed": base.t(),
        "stepped": base[::2, 1::3],
        "expanded": torch.randn(1, 4).expand(5, 4),
        "slice": torch.randn(1000, 16)[:2],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conj": torch.randn(4, dtype=torch.complex64).conj(),
        "negative": torch.randn(4, dtype=torch.complex64).conj().imag,
        "parameter": nn.Parameter(torch.randn(3)),
    }
    torch.save(state, tmp_path / "in.pt")
    for suffix in (".pt", ".safetensors"):
        out = tmp_path / f"out{suffix}"
        assert run("convert", tmp_path / "in.pt", out).status == 0
        assert_same(load(out), {name: tensor.detach() for name, tensor in state.items()})
        assert out.stat().st_size < 20_000  # the 64 kB storage behind "slice" stays behind


def test_complex128_has_no_safetensors_type(run, tmp_path):
    torch.save({"w": torch.randn(3, dtype=torch.complex128)}, tmp_path / "in.pt")
    ran = run("convert", tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert ran.status == 2
    assert '"w"' in ran.err
    assert "complex128" in ran.err
    assert not (tmp_path / "out.safetensors").exists()
    assert run("convert", tmp_path / "in.pt", tmp_path / "out.pt").status == 0


def test_digits_become_clean(run, tmp_path):
    out = tmp_path / "digits.pt"
    ran = run("strip-prefixes", DIGITS, out)
    assert ran.status == 0, ran.err
    original = torch.load(DIGITS, weights_only=True)["state_dict"]
    expected = {name.removeprefix("model._orig_mod."): tensor for name, tensor in original.items()}
    assert_same(load(out), expected)
    assert list(load(out)) == list(expected)
    assert zipfile.ZipFile(out).testzip() is None


def test_digits_as_safetensors_carry_their_facts(run, tmp_path):
    out = tmp_path / "digits.safetensors"
    assert run("convert", DIGITS, out).status == 0
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["ckptool.hyper_parameters"])["compile_model"] is True
    assert json.loads(metadata["ckptool.training"])["epoch"] == torch.load(DIGITS, weights_only=True)["epoch"]
    assert run("convert", DIGITS, out, "--no-metadata", "--force").status == 0
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_facts_are_read_back_from_the_metadata(run, tmp_path):
    out, again = tmp_path / "digits.safetensors", tmp_path / "again.safetensors"
    assert run("convert", DIGITS, out).status == 0
    before, after = (json.loads(run("inspect", path, "--json").out) for path in (DIGITS, out))
    assert after["hyper_parameters"] == before["hyper_parameters"]
    for name in ("epoch", "global_step", "metrics", "learning_rate", "optimizer", "versions"):
        assert after["training"][name] == before["training"][name]
    assert after["training"]["compiled"]["value"] is True
    assert run("convert", out, again).status == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_second_copy_in_the_same_mapping_is_listed(run, tmp_path):
    state = {"model.w": torch.ones(2), "ema_model.w": torch.zeros(2)}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.6", "epoch": 1}, tmp_path / "in.ckpt")
    for weights, value, left in (("main", 1, "ema_model.w"), ("ema", 0, "model.w")):
        ran = run("convert", tmp_path / "in.ckpt", tmp_path / f"{weights}.pt", "--weights", weights, "--json")
        assert ran.status == 0, ran.err
        assert left in {dropped["name"] for dropped in json.loads(ran.out)["dropped"]}
        assert load(tmp_path / f"{weights}.pt")["w"].tolist() == [value, value]
    assert run("convert", tmp_path / "in.ckpt", tmp_path / "no.pt", "--weights", "ema", "--keep-rest").status == 2


def lucid(inner):
    """Name the keys of ``ema_pytorch.EMA``, which counts its steps and may hold the raw weights as well."""
    return {"initted": torch.tensor(True), "step": torch.tensor(1), "online_model.w": -inner, "ema_model.w": inner}


AVERAGED = {
    "AveragedModel": lambda inner: {"n_averaged": torch.tensor(3), "module.w": inner},
    "AveragedModel of DDP": lambda inner: {"n_averaged": torch.tensor(3), "module.module.w": inner},
    "ModelEma of timm": lambda inner: {"module.w": inner},
    "ema_pytorch": lucid,
    "a copy": lambda inner: {"w": inner},
}


@pytest.mark.parametrize("wrapper", AVERAGED)
@pytest.mark.parametrize("attribute", ["ema", "ema_model", "model_ema", "averaged_model"])
def test_an_average_that_a_trainer_keeps_as_an_attribute_gets_clean_names(run, tmp_path, attribute, wrapper):
    average = {f"{attribute}.{name}": value for name, value in AVERAGED[wrapper](torch.ones(2)).items()}
    if (attribute, wrapper) == ("model_ema", "a copy"):
        average = {"model_ema.a.w": torch.ones(2)}  # without a dot it would be one of LitEma
    state = {"model.w": torch.zeros(2), **average}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.6", "epoch": 1}, tmp_path / "in.ckpt")
    assert "--weights ema" in run("convert", tmp_path / "in.ckpt", tmp_path / "main.pt").err
    ran = run("convert", tmp_path / "in.ckpt", tmp_path / "ema.pt", "--weights", "ema")
    assert ran.status == 0, ran.err
    (tensor,) = load(tmp_path / "ema.pt").values()
    assert tensor.tolist() == [1, 1]
    assert [name.rpartition(".")[2] for name in load(tmp_path / "ema.pt")] == ["w"]
    assert "module" not in next(iter(load(tmp_path / "ema.pt")))


def test_two_averages_in_one_state_dict_are_chosen_by_root(run, tmp_path):
    state = {f"{root}.w": torch.full((2,), value) for value, root in enumerate(("model", "ema", "model_ema.a"))}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.6", "epoch": 1}, tmp_path / "in.ckpt")
    ran = run("convert", tmp_path / "in.ckpt", tmp_path / "no.pt", "--weights", "ema")
    assert ran.status == 2
    assert "--select ema or --select model_ema, without --weights" in ran.err
    assert run("convert", tmp_path / "in.ckpt", tmp_path / "out.pt", "--select", "model_ema").status == 0
    assert load(tmp_path / "out.pt")["a.w"].tolist() == [2, 2]


def test_what_lies_beside_the_weights_in_a_list_is_listed(run, tmp_path):
    weights, beside = {"a.w": torch.ones(2)}, torch.optim.Adam([torch.zeros(2)]).state_dict()
    torch.save((weights, beside, 3), tmp_path / "in.pt")
    torch.save({0: weights, 1: {"a.w": torch.zeros(2)}}, tmp_path / "folds.pt")
    for name, left in (("in", ["1", "2"]), ("folds", ["1"])):
        ran = run("convert", tmp_path / f"{name}.pt", tmp_path / "out.pt", "--weights", "0", "--json", "--force")
        assert ran.status == 0, ran.err
        assert [dropped["name"] for dropped in json.loads(ran.out)["dropped"]] == left
        assert_same(load(tmp_path / "out.pt"), weights)


def test_wrong_strip_is_repaired(run, tmp_path):
    assert run("strip-prefixes", WRONG_STRIP, tmp_path / "fixed.pt").status == 0
    assert run("strip-prefixes", DIGITS, tmp_path / "clean.pt").status == 0
    assert_same(load(tmp_path / "fixed.pt"), load(tmp_path / "clean.pt"))


def test_clean_file_is_written_all_the_same(run, tmp_path):
    state = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3)}
    torch.save(state, tmp_path / "in.pt")
    ran = run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt", "--json")
    assert ran.status == 0
    assert json.loads(ran.out)["already_clean"] is True
    assert_same(load(tmp_path / "out.pt"), state)


# --- ties ---


@pytest.fixture
def tied(tmp_path) -> Path:
    embedding = torch.randn(10, 4)
    state = {"embed.weight": embedding, "body.weight": torch.randn(4, 4), "a_head.weight": embedding}
    torch.save(state, tmp_path / "tied.pt")
    return tmp_path / "tied.pt"


def test_ties_share_storage_in_torch_files(run, tmp_path, tied):
    assert run("convert", tied, tmp_path / "out.pt").status == 0
    state = load(tmp_path / "out.pt")
    assert state["embed.weight"].data_ptr() == state["a_head.weight"].data_ptr()


def test_ties_become_an_alias_in_safetensors_and_come_back(run, tmp_path, tied):
    ran = run("convert", tied, tmp_path / "out.safetensors")
    assert ran.status == 0
    assert "--ties copy" in ran.err
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert set(file.keys()) == {"embed.weight", "body.weight"}
        assert file.metadata()["a_head.weight"] == "embed.weight"
    assert run("convert", tmp_path / "out.safetensors", tmp_path / "back.pt").status == 0
    assert_same(load(tmp_path / "back.pt"), load(tied))
    assert run("convert", tmp_path / "out.safetensors", tmp_path / "again.safetensors").status == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_ties_can_be_copied(run, tmp_path, tied):
    for suffix in (".pt", ".safetensors"):
        assert run("convert", tied, tmp_path / f"out{suffix}", "--ties", "copy").status == 0
        assert_same(load(tmp_path / f"out{suffix}"), load(tied))
    state = load(tmp_path / "out.pt")
    assert state["embed.weight"].data_ptr() != state["a_head.weight"].data_ptr()


def test_a_reference_chooses_the_tied_name(run, tmp_path, tied):
    (tmp_path / "names.txt").write_text("a_head.weight\nbody.weight\n")
    ran = run("convert", tied, tmp_path / "out.safetensors", "--like", tmp_path / "names.txt")
    assert ran.status == 0, ran.err
    assert set(load(tmp_path / "out.safetensors")) == {"a_head.weight", "body.weight"}


def test_tied_tensors_are_cast_once(run, tmp_path, tied):
    assert run("convert", tied, tmp_path / "out.pt", "--dtype", "float16").status == 0
    state = load(tmp_path / "out.pt")
    assert state["embed.weight"].dtype == torch.float16
    assert state["embed.weight"].data_ptr() == state["a_head.weight"].data_ptr()


# --- dtype ---


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"])
def test_casts_are_those_of_torch(run, tmp_path, name):
    state = {"w": torch.randn(40, 50) * 100, "steps": torch.arange(5), "mask": torch.tensor([True, False])}
    torch.save(state, tmp_path / "in.pt")
    assert run("convert", tmp_path / "in.pt", tmp_path / "out.safetensors", "--dtype", name).status == 0
    dtype = getattr(torch, name)
    assert_same(load(tmp_path / "out.safetensors"), {**state, "w": state["w"].to(dtype)})


def test_cast_losses_are_told_and_can_refuse(run, tmp_path):
    torch.save({"w": torch.tensor([1.0, 1e6, -1e6, 1e-12])}, tmp_path / "in.pt")
    ran = run("convert", tmp_path / "in.pt", tmp_path / "out.pt", "--dtype", "float16", "--json")
    loss = json.loads(ran.out)["casts"][0]
    assert (loss["key"], loss["overflowed"], loss["underflowed"], loss["elements"]) == ("w", 2, 1, 4)
    ran = run("convert", tmp_path / "in.pt", tmp_path / "no.pt", "--dtype", "float16", "--fail-on-overflow")
    assert ran.status == 2
    assert '"w"' in ran.err
    assert not (tmp_path / "no.pt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt", "out.pt"]


# --- names ---


def test_names_can_be_given(run, tmp_path):
    torch.save({"net.a.weight": torch.ones(2), "net.b.weight": torch.zeros(2)}, tmp_path / "in.pt")
    source, out = tmp_path / "in.pt", tmp_path / "out.pt"

    def names(*args: object) -> set[str]:
        ran = run("strip-prefixes", source, out, "--force", *args)
        assert ran.status == 0, ran.err
        return set(load(out))

    assert names() == {"net.a.weight", "net.b.weight"}
    assert names("--prefix", "net.") == {"a.weight", "b.weight"}
    assert names("--select", "net.a") == {"weight"}
    assert names("--prefix", "net.", "--add-prefix", "backbone.") == {"backbone.a.weight", "backbone.b.weight"}
    assert names("--rename", "s/^net\\.(.)/\\1_layer/") == {"a_layer.weight", "b_layer.weight"}
    assert names("--include", "*.a.*") == {"net.a.weight"}
    assert names("--exclude", "*.a.*") == {"net.b.weight"}
    (tmp_path / "map.json").write_text(json.dumps({"net.a.weight": "x", "net.b.weight": None}))
    assert names("--map", tmp_path / "map.json") == {"x"}


def test_what_was_asked_for_names_and_changes_nothing_is_told(run, tmp_path):
    torch.save({"module.a.weight": torch.ones(2), "module.module_list.0": torch.ones(2)}, tmp_path / "in.pt")
    options = ("--rename", "s/^a/b/", "--rename", "s/^bb/c/", "--keep", "modul", "--keep", "module_list")
    ran = run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt", *options)
    assert ran.status == 0, ran.err
    assert list(load(tmp_path / "out.pt")) == ["b.weight", "module_list.0"]
    assert 'no clean name is changed by --rename "s/^bb/c/"' in ran.err
    assert 'no key has the segment "modul" of --keep' in ran.err
    assert "s/^a/b/" not in ran.err
    ran = run("strip-prefixes", tmp_path / "in.pt", tmp_path / "no.pt", "--exclude", "*")
    assert (ran.status, (tmp_path / "no.pt").exists()) == (2, False)
    assert "--exclude" in ran.err


def test_dry_run_prints_a_map_that_map_reads(run, tmp_path):
    ran = run("strip-prefixes", DIGITS, "--dry-run", "--json")
    assert ran.status == 0, ran.err
    plan = json.loads(ran.out)
    assert plan["map"]["model._orig_mod.fc.weight"] == "fc.weight"
    assert plan["dry_run"] is True
    (tmp_path / "map.json").write_text(ran.out)
    assert run("strip-prefixes", DIGITS, tmp_path / "a.pt", "--map", tmp_path / "map.json").status == 0
    assert run("strip-prefixes", DIGITS, tmp_path / "b.pt").status == 0
    mapped, stripped = load(tmp_path / "a.pt"), load(tmp_path / "b.pt")
    assert_same(mapped, stripped)
    assert mapped._metadata.items() <= stripped._metadata.items()
    assert mapped._metadata["bn"] == {"version": 2}


def test_keep_prefixes_leaves_the_names(run, tmp_path):
    assert run("strip-prefixes", DIGITS, tmp_path / "out.pt", "--keep-prefixes").status == 0
    assert_same(load(tmp_path / "out.pt"), torch.load(DIGITS, weights_only=True)["state_dict"])


@pytest.mark.parametrize(
    ("state", "args", "sentence"),
    [
        ({"_orig_mod.a": 1, "a": 2}, [], "a"),
        ({"student.w": 1, "teacher.w": 2}, [], "--select"),
        ({"net.w": 1, "head.w": 2}, ["--prefix", "net."], "1 of 2"),
        ({"a.w": 1}, ["--rename", "oops"], "s/pattern/replacement/"),
        ({"a.w": 1}, ["--dtype", "int8"], "floating"),
        ({"a.w": 1}, ["--ties", "perhaps"], "keep, copy"),
        ({"a.w": 1}, ["--include", "nothing*"], "nothing"),
    ],
)
def test_what_is_open_is_refused_in_one_sentence(run, tmp_path, state, args, sentence):
    torch.save({name: torch.full((2,), float(value)) for name, value in state.items()}, tmp_path / "in.pt")
    ran = run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt", *args)
    assert ran.status == 2
    assert sentence in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out.pt").exists()


# --- files ---


def test_output_is_not_overwritten(run, tmp_path):
    (tmp_path / "out.pt").write_text("mine")
    ran = run("strip-prefixes", DIGITS, tmp_path / "out.pt")
    assert (ran.status, (tmp_path / "out.pt").read_text()) == (2, "mine")
    assert "--force" in ran.err
    assert run("strip-prefixes", DIGITS, tmp_path / "out.pt", "--force").status == 0
    assert load(tmp_path / "out.pt")


def test_the_input_is_only_replaced_in_place(run, tmp_path):
    source = tmp_path / "in.ckpt"
    source.write_bytes(DIGITS.read_bytes())
    ran = run("strip-prefixes", source, source, "--force")
    assert ran.status == 2
    assert "--in-place" in ran.err
    assert source.read_bytes() == DIGITS.read_bytes()


def test_suffix_and_kind_must_agree(run, tmp_path):
    for args in (("convert", DIGITS, tmp_path / "out.xyz"), ("strip-prefixes", DIGITS, tmp_path / "out.safetensors")):
        ran = run(*args)
        assert ran.status == 2
        assert not list(tmp_path.iterdir())


def test_several_inputs_go_into_a_folder(run, tmp_path):
    ran = run("convert", DIGITS, WRONG_STRIP, "--out-dir", tmp_path / "new", "--to", "safetensors", "--json")
    assert ran.status == 0, ran.err
    assert [Path(file["target"]).name for file in json.loads(ran.out)["files"]] == [
        "digits.safetensors",
        "digits_wrong_strip.safetensors",
    ]
    assert_same(
        load(tmp_path / "new" / "digits.safetensors"), load(tmp_path / "new" / "digits_wrong_strip.safetensors")
    )


def test_one_unreadable_input_does_not_stop_the_others(run, tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"PK\x03\x04 not a zip")
    ran = run("strip-prefixes", tmp_path / "bad.pt", DIGITS, "-o", tmp_path / "new")
    assert ran.status == 2
    assert "bad.pt" in ran.err
    assert (tmp_path / "new" / "digits.ckpt").exists()


def test_same_input_same_bytes(run, tmp_path):
    for suffix in (".pt", ".safetensors"):
        outputs = [tmp_path / f"{name}{suffix}" for name in ("a", "b")]
        for out in outputs:
            assert run("convert", DIGITS, out).status == 0
        assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_digest_is_that_of_the_values_in_any_container(run, tmp_path, tied):
    digests = set()
    for name in ("a.pt", "b.safetensors"):
        ran = run("convert", tied, tmp_path / name, "--digest", "--json")
        digests.add(json.loads(ran.out)["digest"])
    ran = run("convert", tmp_path / "b.safetensors", tmp_path / "c.pt", "--digest", "--json")
    digests.add(json.loads(ran.out)["digest"])
    assert len(digests) == 1
    assert None not in digests
    state = load(tied)
    state["body.weight"][0, 0] += 1
    torch.save(state, tmp_path / "other.pt")
    ran = run("convert", tmp_path / "other.pt", tmp_path / "d.pt", "--digest", "--json")
    assert json.loads(ran.out)["digest"] not in digests


def test_flipped_bit_is_refused(run, tmp_path):
    state = {"w": torch.arange(1000.0)}
    torch.save(state, tmp_path / "in.pt")
    data = bytearray((tmp_path / "in.pt").read_bytes())
    data[data.index(state["w"].numpy().tobytes()) + 100] ^= 1
    (tmp_path / "in.pt").write_bytes(data)
    ran = run("convert", tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert ran.status == 2
    assert "data/0" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


# --- the rest of the container ---


class Config:
    """Stand for a class that the reader does not have."""

    def __init__(self) -> None:
        self.depth = 3


def test_keep_rest_keeps_the_container(run, tmp_path):
    out = tmp_path / "out.ckpt"
    ran = run("strip-prefixes", DIGITS, out, "--keep-rest")
    assert ran.status == 0, ran.err
    before, after = (torch.load(path, weights_only=True) for path in (DIGITS, out))
    clean = {name.removeprefix("model._orig_mod."): tensor for name, tensor in before["state_dict"].items()}
    assert_same(after["state_dict"], clean)
    assert list(before) == list(after)
    for key in set(before) - {"state_dict", "optimizer_states"}:
        assert repr(before[key]) == repr(after[key])
    moments = [
        [state[name] for group in ckpt["optimizer_states"] for state in group["state"].values() for name in state]
        for ckpt in (before, after)
    ]
    assert all(same(a, b) for a, b in zip(*moments, strict=True))


def test_in_place_replaces_and_refuses_to_lose(run, tmp_path):
    source = tmp_path / "in.ckpt"
    torch.save({"state_dict": {"_orig_mod.w": torch.ones(3)}, "epoch": 4, "config": Config()}, source)
    before = source.read_bytes()
    ran = run("strip-prefixes", source, "--in-place")
    assert (ran.status, source.read_bytes()) == (2, before)
    assert "config" in ran.err
    assert "--weights-only" in ran.err
    assert run("strip-prefixes", source, "--in-place", "--foreign", "fields").status == 0
    after = torch.load(source, weights_only=True)
    assert after["config"] == {"depth": 3}
    assert (list(after["state_dict"]), after["epoch"]) == (["w"], 4)
    assert run("strip-prefixes", source, "--in-place").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["in.ckpt"]


class Net(nn.Module):
    """Have a batch norm and a dropout, so that buffers and RNG state matter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def training(model: nn.Module):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20), torch.amp.GradScaler("cpu")


def step(model, optimizer, scheduler, scaler) -> torch.Tensor:
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    return loss.detach()


def test_training_resumes_bit_equal_from_the_output(run, tmp_path):
    torch.manual_seed(0)
    plain = Net()
    model = torch.compile(plain, backend="eager")
    parts = training(model)
    for _ in range(5):
        step(model, *parts)
    names = ("optimizer", "scheduler", "scaler")
    torch.save(
        {
            "model": model.state_dict(),
            **{name: part.state_dict() for name, part in zip(names, parts, strict=True)},
            "rng": torch.get_rng_state(),
            "epoch": 5,
        },
        tmp_path / "last.pt",
    )
    twin = copy.deepcopy(plain)
    expected_loss = step(model, *parts)

    assert run("strip-prefixes", tmp_path / "last.pt", tmp_path / "clean.pt", "--keep-rest").status == 0
    checkpoint = torch.load(tmp_path / "clean.pt", weights_only=True)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    twin.load_state_dict(checkpoint["model"], strict=True)
    twin_parts = training(twin)
    for name, part in zip(names, twin_parts, strict=True):
        part.load_state_dict(checkpoint[name])
    torch.set_rng_state(checkpoint["rng"])
    assert torch.equal(step(twin, *twin_parts), expected_loss)
    assert_same(twin.state_dict(), plain.state_dict())


def test_optimizer_state_keyed_by_name_follows(run, tmp_path):
    names = ["_orig_mod.layer.weight", "_orig_mod.layer.bias"]
    moments = {name: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2)} for name in names}
    groups = [{"lr": 0.1, "params": names, "param_names": names}]
    torch.save(
        {
            "model": {name: torch.randn(2) for name in names},
            "optimizer": {"state": moments, "param_groups": groups},
        },
        tmp_path / "in.pt",
    )
    assert run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt", "--keep-rest").status == 0
    after = torch.load(tmp_path / "out.pt", weights_only=True)
    clean = ["layer.weight", "layer.bias"]
    assert list(after["model"]) == clean
    assert list(after["optimizer"]["state"]) == clean
    assert after["optimizer"]["param_groups"][0]["params"] == clean
    assert after["optimizer"]["param_groups"][0]["param_names"] == clean
    assert same(after["optimizer"]["state"]["layer.bias"]["exp_avg"], moments[names[1]]["exp_avg"])


def test_metadata_of_the_state_dict_is_renamed(run, tmp_path):
    model = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), backend="eager")
    torch.save(model.state_dict(), tmp_path / "in.pt")
    assert run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt").status == 0
    after = torch.load(tmp_path / "out.pt", weights_only=True)
    assert {path: entry["version"] for path, entry in after._metadata.items()} == {"": 1, "0": 1, "1": 2}


def test_nothing_foreign_is_written(run, tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "config": Config(), "list": [1, Config()]}, tmp_path / "in.pt")
    ran = run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt", "--keep-rest", "--json")
    assert ran.status == 0, ran.err
    assert {"config", "list[1]"} <= {dropped["name"] for dropped in json.loads(ran.out)["dropped"]}
    after = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(after) == {"state_dict", "list"}
    assert after["list"] == [1, None]


def test_safetensors_metadata_is_carried(run, tmp_path):
    save_file({"module.w": torch.ones(2)}, tmp_path / "in.safetensors", {"author": "me"})
    assert run("strip-prefixes", tmp_path / "in.safetensors", tmp_path / "out.safetensors").status == 0
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"author": "me", "format": "pt", "ckptool.training": '{"strategy":"ddp"}'}
        assert list(file.keys()) == ["w"]


def test_keep_rest_says_what_becomes_plainer(run, tmp_path):
    rest = {"counts": defaultdict(int, a=1), "frozen": frozenset({3}), "array": np.arange(3)}
    torch.save({"state_dict": {"a.weight": torch.ones(2, 2)}, "callbacks": rest}, tmp_path / "in.ckpt")
    ran = run("strip-prefixes", tmp_path / "in.ckpt", tmp_path / "out.ckpt", "--keep-rest", "--json")
    notes = [note["text"] for note in json.loads(ran.out)["notes"] if note["code"] == "simplified"]
    assert notes == [
        'a defaultdict becomes a dict: "callbacks.counts"',
        'a frozenset becomes a set: "callbacks.frozen"',
        'a NumPy array becomes a tensor: "callbacks.array"',
    ]
    kept = torch.load(tmp_path / "out.ckpt", weights_only=True)["callbacks"]
    assert (kept["counts"], kept["frozen"], kept["array"].tolist()) == ({"a": 1}, {3}, [0, 1, 2])


class Tagger(nn.Linear):
    """Hold more than weights, as many modules do."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.labels = ["a", "b", "c"]
        self.history = torch.ones(5)


@pytest.mark.parametrize("beside", [{}, {"epoch": 3}])
def test_what_a_pickled_module_holds_beside_weights_is_no_silent_loss(run, tmp_path, beside):
    path, module = tmp_path / "module.pt", Tagger()
    torch.save({"model": module, **beside} if beside else module, path)
    before = path.read_bytes()
    ran = run("convert", path, tmp_path / "out.pt", "--json")
    (lost,) = [drop for drop in json.loads(ran.out)["dropped"] if "a pickled module" in drop["reason"]]
    assert (lost["name"], lost["bytes"]) == ("model" if beside else "Tagger", 20)
    assert f"{Tagger.__module__}.Tagger" in lost["reason"]
    assert_same(load(tmp_path / "out.pt"), module.state_dict())
    other = run("convert", "--in-place", "--to", "safetensors", path)
    assert (other.status, path.read_bytes()) == (2, before)
    assert "--to" in other.err
    refused = run("strip-prefixes", "--in-place", path)
    assert (refused.status, path.read_bytes()) == (2, before)
    assert "would be lost" in refused.err
    assert "--foreign" not in refused.err  # which would not help
    assert run("strip-prefixes", "--in-place", "--weights-only", path).status == 0
    assert_same(load(path)["model"] if beside else load(path), module.state_dict())


class Learner:
    """Hold a network as an attribute, as the learners of fastai and the agents of reinforcement learning do."""

    def __init__(self, **parts: object) -> None:
        self.__dict__.update(parts)


class EasyDict(dict):
    """Be a mapping of a class of one's own."""


class Step(NamedTuple):
    """Hold the weights at a place, without a name."""

    weights: object
    epoch: int


STATE = {"module.a.weight": torch.ones(2), "module.a.bias": torch.zeros(2)}
INSIDE = {
    "a learner": (Learner(model=Tagger(), epoch=3), Tagger().state_dict()),
    "a learner in a mapping": ({"agent": Learner(model=STATE, lr=0.1)}, STATE),
    "a mapping of its own class": (EasyDict(model=EasyDict(STATE), epoch=3), STATE),
    "a named tuple": (Step(STATE, 3), STATE),
}


@pytest.mark.parametrize("case", INSIDE)
def test_weights_inside_an_object_of_a_foreign_class_are_found(run, tmp_path, case):
    content, weights = INSIDE[case]
    torch.save(content, tmp_path / "in.pt")
    ran = run("convert", tmp_path / "in.pt", tmp_path / "out.pt", "--json")
    assert ran.status == 0, ran.err
    assert [key.removeprefix("module.") for key in weights] == list(load(tmp_path / "out.pt"))
    names = [dropped["name"] for dropped in json.loads(ran.out)["dropped"]]
    assert any(name.rpartition(".")[2] in ("epoch", "lr", "1") for name in names)
    assert len(set(names)) == len(names)
    refused = run("convert", tmp_path / "in.pt", tmp_path / "rest.pt", "--keep-rest")
    assert (refused.status, (tmp_path / "rest.pt").exists()) == (2, False)
    assert "the weights lie inside a pickled" in refused.err
    if case == "a learner in a mapping":
        assert (
            run("convert", tmp_path / "in.pt", tmp_path / "rest.pt", "--keep-rest", "--foreign", "fields").status == 0
        )
        assert list(load(tmp_path / "rest.pt")["agent"]["model"]) == ["a.weight", "a.bias"]


def test_an_object_beside_weights_adds_no_choice_but_can_be_named(run, tmp_path):
    torch.save({"vae": STATE, "norm": Learner(model=Tagger()), "act": nn.ReLU()}, tmp_path / "in.pt")
    assert run("convert", tmp_path / "in.pt", tmp_path / "out.pt").status == 0
    assert list(load(tmp_path / "out.pt")) == ["a.weight", "a.bias"]
    assert run("convert", tmp_path / "in.pt", tmp_path / "norm.pt", "--weights", "norm.model").status == 0
    assert list(load(tmp_path / "norm.pt")) == ["weight", "bias"]
    torch.save(nn.ReLU(), tmp_path / "act.pt")
    assert "no model weights in this file" in run("convert", tmp_path / "act.pt", tmp_path / "no.pt").err


FLAT = {"a.weight": torch.ones(2, 2), "a.bias": torch.zeros(2), "b.weight": torch.ones(3)}


@pytest.mark.parametrize("odd", [{"norm": {"mean": torch.ones(3)}}, {"act": nn.ReLU(), "cfg": {"w": torch.ones(1)}}])
def test_an_entry_with_a_tensor_inside_does_not_stand_for_the_whole_state_dict(run, tmp_path, odd):
    torch.save({**FLAT, **odd}, tmp_path / "in.pt")
    ran = run("convert", tmp_path / "in.pt", tmp_path / "out.pt", "--json")
    assert ran.status == 0, ran.err
    written = load(tmp_path / "out.pt")
    assert_same({name: written[name] for name in FLAT}, FLAT)
    (nested,) = (value for value in odd.values() if isinstance(value, dict))
    (kept,) = (value for value in written.values() if isinstance(value, dict))
    assert_same(kept, nested)
    assert {*written, *(dropped["name"] for dropped in json.loads(ran.out)["dropped"])} == {*FLAT, *odd}
    assert run("convert", tmp_path / "in.pt", tmp_path / "no.safetensors").status == 2


def test_tensors_inside_a_foreign_object_of_a_state_dict_are_no_silent_loss(run, tmp_path):
    torch.save({**FLAT, "cell.param": Learner(weight=torch.ones(2))}, tmp_path / "in.pt")
    for name in ("out.pt", "out.safetensors"):
        ran = run("convert", tmp_path / "in.pt", tmp_path / name)
        assert (ran.status, (tmp_path / name).exists()) == (2, False)
        assert f'"cell.param": holds tensors inside a pickled {Learner.__module__}.Learner' in ran.err
        assert "--exclude cell.param" in ran.err
    assert run("convert", tmp_path / "in.pt", tmp_path / "out.pt", "--exclude", "cell.param").status == 0
    ran = run("convert", tmp_path / "in.pt", tmp_path / "fields.pt", "--foreign", "fields")
    assert ran.status == 0, ran.err
    assert load(tmp_path / "fields.pt")["cell.param"]["weight"].tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore")
def test_a_dynamically_quantized_lstm_is_refused_by_name(run, tmp_path):
    net = nn.Sequential(nn.LSTM(2, 2), nn.Linear(2, 2))
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.LSTM, nn.Linear})
    torch.save(quantized.state_dict(), tmp_path / "in.pt")
    ran = run("convert", tmp_path / "in.pt", tmp_path / "out.pt")
    assert ran.status == 2
    assert '"0._all_weight_values.0.param": holds tensors inside a pickled torch.ScriptObject' in ran.err
