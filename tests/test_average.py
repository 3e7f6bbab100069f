"""The mean of several checkpoints, judged by torch: streamed, in float32, and refused where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tensors import bits

FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
State = dict[str, torch.Tensor]


def state(seed: int) -> State:
    """Make what a step of training changes, and what it does not."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    embed = random(6, 4)
    return {
        "embed.weight": embed,
        "head.weight": embed,
        **{f"{name}.weight": random(5, 3).to(getattr(torch, name)) for name in FLOATS},
        "complex.weight": torch.complex(random(3), random(3)),
        "turned.weight": random(4, 6).t(),
        "large.weight": random(700, 600),
        "norm.running_mean": random(4),
        "norm.num_batches_tracked": torch.tensor(100 + seed),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }


@pytest.fixture
def steps(tmp_path: Path) -> list[Path]:
    """Save three steps: a container, a plain file, a safetensors file, under wrapped and under clean names."""
    paths = [tmp_path / "a.ckpt", tmp_path / "b.pt", tmp_path / "c.safetensors"]
    torch.save({"model": {f"module.{key}": one for key, one in state(1).items()}, "epoch": 1}, paths[0])
    torch.save(state(2), paths[1])
    save_file({key: one.clone().contiguous() for key, one in state(3).items()}, paths[2])
    return paths


def mean(*states: State) -> State:
    """Average as torch does, in float32; what is no number with a mean is that of the last."""
    found = {}
    for key, first in states[0].items():
        terms = [one[key] for one in states]
        if first.is_floating_point() or first.is_complex():
            wide = [term.float() if first.dtype.itemsize < 4 else term for term in terms]
            total = wide[0].clone()
            for term in wide[1:]:
                total += term
            # Divided by a complex number, parts would be rounded otherwise than each by itself.
            parts = torch.view_as_real(total) if total.is_complex() else total
            parts /= len(terms)
            found[key] = total.to(first.dtype)
        else:
            found[key] = terms[-1]
    return found


def assert_same(found: State, wanted: State) -> None:
    assert sorted(found) == sorted(wanted)
    assert [
        key for key in wanted if (found[key].dtype, found[key].shape) != (wanted[key].dtype, wanted[key].shape)
    ] == []
    assert [key for key in wanted if bits(found[key]) != bits(wanted[key].contiguous())] == []


@pytest.mark.parametrize("form", ["last name", "-o"])
def test_the_mean_of_three_is_that_of_torch(run: Any, steps: list[Path], tmp_path: Path, form: str) -> None:
    out = tmp_path / "out.safetensors"
    target = ("-o", out) if form == "-o" else (out,)
    ran = run("convert", *steps, *target, "--average", "--json", "--ties", "copy")
    assert ran.status == 0, ran.err
    assert_same(load_file(out), mean(state(1), state(2), state(3)))
    document = json.loads(ran.out)
    assert document["averaged"] == [str(path) for path in steps[1:]]
    codes = [note["code"] for note in document["notes"]]
    assert {"averaged", "counters-kept", "running-statistics"} <= set(codes)
    assert "epoch" not in json.dumps(load_metadata(out))


def load_metadata(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    read: dict[str, str] = header.get("__metadata__", {})
    return read


def test_what_is_tied_in_all_stays_tied(run: Any, steps: list[Path], tmp_path: Path) -> None:
    assert run("convert", *steps[:2], tmp_path / "out.pt", "--average").status == 0
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["embed.weight"].data_ptr() == found["head.weight"].data_ptr()
    assert run("convert", *steps[1:], tmp_path / "apart.pt", "--average").status == 0
    found = torch.load(tmp_path / "apart.pt", weights_only=True)
    assert found["embed.weight"].data_ptr() != found["head.weight"].data_ptr()
    assert_same(found, mean(state(2), state(3)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_cast_rounds_the_mean_once(run: Any, steps: list[Path], tmp_path: Path, dtype: str) -> None:
    ran = run("convert", *steps, tmp_path / "out.pt", "--average", "--dtype", dtype, "--include", "*loat*.weight")
    assert ran.status == 0, ran.err
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    wide = [
        {key: one.float() if one.dtype.itemsize < 4 else one for key, one in state(seed).items()} for seed in (1, 2, 3)
    ]
    wanted = {key: one.to(getattr(torch, dtype)) for key, one in mean(*wide).items() if "loat" in key}
    assert_same(found, wanted)


def test_a_dry_run_writes_nothing(run: Any, steps: list[Path]) -> None:
    before = sorted(path.name for path in steps[0].parent.iterdir())
    assert run("convert", *steps, "--average", "--dry-run", "--to", "pt").status == 0
    assert sorted(path.name for path in steps[0].parent.iterdir()) == before


def renamed(one: State) -> None:
    one["other.weight"] = one.pop("float32.weight")


def widened(one: State) -> None:
    one["float16.weight"] = one["float16.weight"].float()


def reshaped(one: State) -> None:
    one["float32.weight"] = torch.zeros(3, 5)


def masked(one: State) -> None:
    one["mask"] = ~one["mask"]


def added(one: State) -> None:
    one["extra"] = torch.zeros(1)


REFUSED: dict[str, tuple[Callable[[State], None], str]] = {
    "another name": (renamed, 'has no "float32.weight"'),
    "a name more": (added, 'has "extra"'),
    "another type": (widened, '"float16.weight" is float32 [5, 3] there and float16 [5, 3]'),
    "another shape": (reshaped, '"float32.weight" is float32 [3, 5] there'),
    "another mask": (masked, '"mask" (bool) has no mean'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(run: Any, steps: list[Path], tmp_path: Path, name: str) -> None:
    change, reason = REFUSED[name]
    other = state(4)
    change(other)
    torch.save(other, tmp_path / "other.pt")
    ran = run("convert", steps[0], tmp_path / "other.pt", tmp_path / "out.pt", "--average")
    assert (ran.status, reason in ran.err, (tmp_path / "out.pt").exists()) == (2, True, False), ran.err
    assert "other.pt" in ran.err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("a.ckpt", "out.pt"), "name two checkpoints or more"),
        (("a.ckpt", "b.pt", "out.pt", "--keep-rest"), "no container to keep"),
        (("a.ckpt", "b.pt", "b.pt", "--force"), "is the input itself"),
        (("a.ckpt", "gone.pt", "out.pt"), "no such file"),
        (("a.ckpt", "b.pt", "out.pt", "--manifest", "m.json"), "leave it out of --average"),
    ],
)
def test_what_cannot_be_meant_is_refused(run: Any, steps: list[Path], words: tuple[str, ...], reason: str) -> None:
    folder = steps[0].parent
    given = [folder / word if "." in word else word for word in words]
    ran = run("convert", *given, "--average")
    assert (ran.status, reason in ran.err) == (2, True), ran.err
    assert_same(torch.load(folder / "b.pt", weights_only=True), state(2))


def test_damage_in_any_of_them_is_found(run: Any, steps: list[Path], tmp_path: Path) -> None:
    data = bytearray(steps[1].read_bytes())
    data[data.index(state(2)["large.weight"].numpy().tobytes()) + 9] ^= 1
    steps[1].write_bytes(data)
    ran = run("convert", *steps, tmp_path / "out.pt", "--average")
    assert (ran.status, "b.pt" in ran.err, "checksum" in ran.err) == (2, True, True), ran.err
