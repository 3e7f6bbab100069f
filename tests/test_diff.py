"""What diff says of two checkpoints, held against plain arithmetic over what torch makes of the same values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ckptool.errors import ChecksumMismatch
from ckptool.model.comparison import CompareOptions, Comparison
from ckptool.operations.compare import compare_files
from tests.support.strict_json import strictly

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")
DIGITS = Path(__file__).parents[1] / "examples" / "digits.ckpt"
StateDict = dict[str, Any]

FLOATS = (
    *("float64", "float32", "float16", "bfloat16"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)
INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
COMPLEX = ("complex32", "complex64", "complex128")
DTYPES = (*FLOATS, *INTEGERS, "bool", *COMPLEX)
LONG = dict.fromkeys(("float32", "bfloat16", "int64", "complex64"), (250, 301))  # more than what is read at a time
SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 0.0)


def randoms(dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw values of any dtype; integers over their whole range, special floats among the others."""
    kind = getattr(torch, dtype)
    if dtype in INTEGERS or dtype == "bool":
        size = 1 if dtype == "bool" else kind.itemsize
        octets = torch.randint(0, 256, (*shape, size), generator=generator, dtype=torch.uint8)
        return octets[..., 0] > 127 if dtype == "bool" else octets.view(kind).reshape(shape)
    wide = torch.randn(shape, generator=generator, dtype=torch.float64)
    if dtype in COMPLEX:
        return torch.complex(wide, torch.randn(shape, generator=generator, dtype=torch.float64)).to(kind)
    return sprinkled(wide, generator).to(kind)


def sprinkled(values: Tensor, generator: torch.Generator) -> Tensor:
    flat = values.reshape(-1)
    for number in SPECIAL:
        if len(flat) > 20:
            flat[torch.randint(0, len(flat), (1,), generator=generator)] = number
    return values


def view_of(tensor: Tensor, number: int) -> Tensor:
    """Make one of several views that are no row-major array."""
    if tensor.dim() < 2:
        return tensor.conj() if tensor.is_complex() else tensor
    return (tensor, tensor.transpose(0, -1), tensor[::2], tensor[1:])[number % 4]


def state_dicts(seed: int) -> tuple[StateDict, StateDict]:
    """Draw two state dicts of every dtype and many shapes, of which some tensors, or a few elements, are equal."""
    generator = torch.Generator().manual_seed(seed)
    a: StateDict = {}
    b: StateDict = {}
    for dtype in DTYPES:
        for number, shape in enumerate([(), (0, 3), (1,), (7, 9), (5, 3, 4), LONG.get(dtype, (40, 33))]):
            name = f"{dtype}.{number}"
            a[name] = view_of(randoms(dtype, shape, generator), seed + number)
            b[name] = mutated(a[name], (seed + number + len(a)) % 3, generator)
    a["tie"], b["tie"] = a["float32.5"], b["float32.5"]
    return a, b


def mutated(tensor: Tensor, how: int, generator: torch.Generator) -> Tensor:
    other = randoms(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), generator)
    if how == 0 or not tensor.numel():
        return tensor.clone()
    if how == 1:
        return other
    mixed, place = tensor.resolve_conj().contiguous().clone().reshape(-1), tensor.numel() // 2
    mixed[place] = other.reshape(-1)[place]
    return mixed.reshape(tensor.shape)


def plain(tensor: Tensor) -> list[Any]:
    """Give Python numbers: exact integers, float64, or complex128."""
    flat = tensor.detach().resolve_conj().contiguous().reshape(-1)
    if tensor.is_complex():
        return flat.to(torch.complex128).tolist()
    return (flat.to(torch.float64) if tensor.is_floating_point() else flat).tolist()


def is_same(before: Any, after: Any) -> bool:
    if isinstance(before, complex) or isinstance(after, complex):
        one, other = complex(before), complex(after)
        return is_same(one.real, other.real) and is_same(one.imag, other.imag)
    return before == after or (before != before and after != after)


def is_finite(*numbers: Any) -> bool:
    return all(math.isfinite(complex(number).real) and math.isfinite(complex(number).imag) for number in numbers)


def distance(before: Any, after: Any) -> Any:
    if is_same(before, after):
        return 0
    if is_finite(before, after):
        return abs(after - before)
    numbers = complex(before), complex(after)
    return math.nan if any(x != x for number in numbers for x in (number.real, number.imag)) else math.inf


def relative(far: Any, before: Any) -> Any:
    if far != far or far == 0 or math.isinf(far):
        return far
    return far / abs(before) if before else math.inf


def worst(numbers: list[Any]) -> Any:
    return math.nan if any(number != number for number in numbers) else max(numbers, default=0)


def reference(a: Tensor, b: Tensor) -> dict[str, Any]:
    """Compare element by element, the slow and plain way."""
    pairs = list(zip(plain(a), plain(b), strict=True))
    far = [distance(*pair) for pair in pairs]
    finite = [pair for pair in pairs if is_finite(*pair)]
    own = math.fsum(abs(before) ** 2 for before, _ in finite)
    other = math.fsum(abs(after) ** 2 for _, after in finite)
    mixed = math.fsum((before * complex(after).conjugate()).real for before, after in finite)
    broken = sum(not is_same(*pair) and not is_finite(*pair) for pair in pairs)
    return {
        "elements": len(pairs),
        "changed": sum(not is_same(*pair) for pair in pairs),
        "broken": broken,
        "max_abs": worst(far),
        "mean_abs": worst(far) if not is_finite(worst(far)) else sum(far) / len(far),
        "max_rel": worst([relative(each, before) for each, (before, _) in zip(far, pairs, strict=True)]),
        "change_norm": math.sqrt(math.fsum(abs(after - before) ** 2 for before, after in finite)),
        "weight_norm": math.sqrt(own),
        "cosine": None if broken or not own or not other else mixed / math.sqrt(own) / math.sqrt(other),
    }


def agrees(found: Any, expected: Any) -> bool:
    if expected is None or found is None:
        return found is expected
    if isinstance(expected, int):
        return found == expected
    return is_same(found, expected) or math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def save(state: StateDict, path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.suffix != ".legacy")
    return path


def compared(a: StateDict, b: StateDict, folder: Path, **options: Any) -> Comparison:
    return compare_files(save(a, folder / "a.pt"), save(b, folder / "b.pt"), CompareOptions(**options))


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_those_of_plain_arithmetic(seed, tmp_path):
    a, b = state_dicts(seed)
    found = compared(a, b, tmp_path)
    assert found.names == tuple(a)
    identical = [name for name in a if same_bits(a[name], b[name])]
    assert found.identical == len(identical)
    assert set(found.by_key) == set(a) - set(identical)
    for name, value in found.by_key.items():
        for field, expected in reference(a[name], b[name]).items():
            assert agrees(getattr(value, field), expected), (name, field, getattr(value, field), expected)
        assert value.outcome == ("changed" if value.changed else "same")


ONES = ("float32", "float64", "bfloat16", "int64", "uint64", "bool", "complex64")
OTHERS = ("float32", "float16", "float8_e4m3fn", "int64", "uint64", "int32", "int8", "complex128")


@pytest.mark.parametrize("pair", [(one, other) for one in ONES for other in OTHERS if one != other])
def test_dtypes_are_compared_by_value(pair, tmp_path):
    generator = torch.Generator().manual_seed(1)
    a = randoms(pair[0], (60, 7), generator)
    b = randoms(pair[1], (60, 7), generator)
    if not (b.is_complex() or a.is_complex()) and pair[1] != "float8_e4m3fn":
        b[:20] = torch.tensor([[1] * 7] * 20).to(b.dtype)
        a[:20] = torch.tensor([[1] * 7] * 20).to(a.dtype)
    found = compared({"w": a}, {"w": b}, tmp_path)
    (value,) = found.values
    for field, expected in reference(a, b).items():
        assert agrees(getattr(value, field), expected), (field, getattr(value, field), expected)
    assert [(change.a, change.b) for change in found.dtype] == [pair]


@pytest.mark.parametrize("suffixes", [(".pt", ".safetensors"), (".legacy", ".pt"), (".safetensors", ".legacy")])
def test_containers_make_no_difference(suffixes, tmp_path, run):
    a, _ = state_dicts(0)
    kept = {name: tensor for name, tensor in a.items() if not name.startswith(("complex", "tie"))}
    paths = [save(kept, tmp_path / f"file{suffix}") for suffix in suffixes]
    assert run("diff", *paths).status == 0


EQUAL_NUMBERS = {
    "zeros of either sign": ([0.0, 1.0], [-0.0, 1.0]),
    "infinities": ([math.inf, -math.inf, 0.0], [math.inf, -math.inf, -0.0]),
    "NaN": ([math.nan, 0.0], [math.nan, -0.0]),
}


@pytest.mark.parametrize("name", EQUAL_NUMBERS)
def test_equal_numbers_in_other_bytes_are_the_same(name, tmp_path, run):
    a, b = [
        save({"w": torch.tensor(values)}, tmp_path / f"{index}.pt") for index, values in enumerate(EQUAL_NUMBERS[name])
    ]
    answer = run("diff", a, b, "--json")
    (value,) = strictly(answer.out)["values"]
    assert (answer.status, value["outcome"], value["changed"], value["max_abs"]) == (0, "same", 0, 0)


def test_the_bits_of_a_nan_are_bytes_and_no_number(tmp_path, run):
    patterns = [torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001)]
    a, b = [save({"w": tensor}, tmp_path / f"{index}.pt") for index, tensor in enumerate(patterns)]
    answer = run("diff", a, b, "--json")
    assert (answer.status, strictly(answer.out)["outcomes"]["same"]) == (0, 1)


BROKEN = [
    (1.0, math.inf, "Infinity"),
    (math.inf, 1.0, "Infinity"),
    (math.inf, -math.inf, "Infinity"),
    (1.0, math.nan, "NaN"),
]


@pytest.mark.parametrize(("before", "after", "max_abs"), BROKEN)
def test_what_broke_is_strict_json(before, after, max_abs, tmp_path, run):
    a, b = [
        save({"w": torch.tensor([2.0, value])}, tmp_path / f"{name}.pt")
        for name, value in (("a", before), ("b", after))
    ]
    answer = run("diff", a, b, "--json")
    (value,) = strictly(answer.out)["values"]
    assert (answer.status, value["changed"], value["broken"], value["cosine"]) == (1, 1, 1, None)
    assert [value[name] for name in ("max_abs", "mean_abs", "max_rel", "relative_change")] == [max_abs] * 4


@pytest.mark.parametrize(
    ("before", "after", "dtype", "largest"),
    [
        (2**63 - 1, 2**63 - 2, "int64", 1),
        (-(2**63), 2**63 - 1, "int64", 2**64 - 1),
        (2**64 - 1, 0, "uint64", 2**64 - 1),
        (2**53, 2**53 + 1, "int64", 1),
    ],
)
def test_large_integers_are_exact(before, after, dtype, largest, tmp_path, run):
    kind = getattr(torch, dtype)
    a, b = written(tmp_path, *({"w": torch.tensor([value, 3], dtype=kind)} for value in (before, after)))
    (value,) = strictly(run("diff", a, b, "--json").out)["values"]
    assert (value["changed"], value["max_abs"]) == (1, largest)


def test_numbers_whose_squares_overflow(tmp_path):
    a, b = torch.tensor([1e300, -3e307], dtype=torch.float64), torch.tensor([1e300, -2e307], dtype=torch.float64)
    (value,) = compared({"w": a}, {"w": b}, tmp_path).values
    assert value.change_norm == pytest.approx(1e307)
    assert value.weight_norm == pytest.approx(3e307)
    assert value.cosine == pytest.approx(1.0)


@pytest.mark.parametrize("factor", [-1e6, -1.0, 1e-6, 0.5, 1.0, 2.1, 1e6])
@pytest.mark.parametrize("noise", [0.0, 1e-6, 1.0])
def test_angles_are_exact_whatever_the_lengths(factor, noise, tmp_path):
    generator = torch.Generator().manual_seed(0)
    a, other = torch.randn(2, 1000, dtype=torch.float64, generator=generator)
    b = factor * (a + noise * other)
    (value,) = compared({"w": a}, {"w": b}, tmp_path).values or (None,)
    if value is None:
        assert torch.equal(a, b)
        return
    expected = reference(a, b)
    assert value.cosine == pytest.approx(expected["cosine"], abs=1e-14)
    assert value.change_norm == pytest.approx(expected["change_norm"], rel=1e-14)


@pytest.mark.parametrize(("wide", "narrow"), [("float32", "bfloat16"), ("float32", "float8_e5m2"), ("int64", "int8")])
def test_another_dtype_with_the_same_values_is_told_from_changed_values(wide, narrow, tmp_path, run):
    kept = torch.tensor([1, 2, -4]).to(getattr(torch, narrow))
    lost = torch.tensor([1.001, 2, 3]) if wide == "float32" else torch.tensor([1, 2, 130])
    a = save({"kept": kept.to(getattr(torch, wide)), "lost": lost}, tmp_path / "a.pt")
    b = save({"kept": kept, "lost": lost.to(getattr(torch, narrow))}, tmp_path / "b.pt")
    answer = strictly(run("diff", a, b, "--json").out)
    assert [(change["key"], change["same_values"]) for change in answer["dtype"]] == [("kept", True), ("lost", False)]
    assert {value["key"]: value["outcome"] for value in answer["values"]} == {"kept": "same", "lost": "changed"}
    assert run("diff", a, b, "--include", "kept").status == 1


def net(seed: int = 0) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "stem.weight": (4, 3),
        "stem.bias": (4,),
        "blocks.0.weight": (4, 4),
        "blocks.1.weight": (4, 4),
        "head.weight": (2, 4),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def prefixed(prefix: str, state: StateDict) -> StateDict:
    return {prefix + name: tensor for name, tensor in state.items()}


def written(folder: Path, *values: Any) -> list[Path]:
    paths = [folder / f"{name}.pt" for name in "abcd"[: len(values)]]
    for path, value in zip(paths, values, strict=True):
        torch.save(value, path)
    return paths


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "model._orig_mod."])
def test_only_a_wrapper_differs(prefix, tmp_path, run):
    wrapped = prefixed(prefix, net())
    a, b = written(tmp_path, {"state_dict": wrapped, "pytorch-lightning_version": "2.6.0"}, net())
    for pair in ((a, b), (b, a)):
        answer = run("diff", *pair, "--json")
        (note,) = [note for note in strictly(answer.out)["notes"] if note["code"] == "wrapper"]
        assert answer.status == 0
        assert all(f"`{segment}`" in note["text"] for segment in prefix.rstrip(".").split("."))
        raw = strictly(run("diff", *pair, "--exact-names", "--json").out)
        assert (raw["same"], len(raw["renamed"]), raw["tensors"]) == (False, len(net()), 0)


def test_names_shapes_and_dtypes(tmp_path, run):
    state = net()
    other = {**state, "stem.bias": torch.randn(5), "head.weight": state["head.weight"].double(), "new": torch.ones(3)}
    del other["blocks.1.weight"]
    answer = run("diff", *written(tmp_path, state, other), "--json")
    told = strictly(answer.out)
    assert (answer.status, told["same"], told["identical"], told["tensors"]) == (1, False, 2, 4)
    assert (told["only_in_a"], told["only_in_b"]) == (["blocks.1.weight"], ["new"])
    assert [(change["key"], change["a"], change["b"]) for change in told["shape"]] == [("stem.bias", [4], [5])]
    assert told["dtype"] == [{"key": "head.weight", "a": "float32", "b": "float64", "same_values": True}]


def test_the_most_changed_come_first(tmp_path, run):
    state = net()
    other = {
        name: tensor * factor for (name, tensor), factor in zip(state.items(), (1.1, 1, 3, 1.5, 1.01), strict=True)
    }
    paths = written(tmp_path, state, other)
    ordered = ["blocks.0.weight", "blocks.1.weight", "stem.weight", "head.weight"]
    assert [value["key"] for value in strictly(run("diff", *paths, "--json").out)["values"]] == ordered
    assert [value["key"] for value in strictly(run("diff", *paths, "--json", "--top", 2).out)["values"]] == ordered[:2]
    listed = [
        line.split("\t")[1] for line in run("diff", *paths, "--top", 3).out.splitlines() if line.startswith("value")
    ]
    assert listed == ordered[:3]


@pytest.mark.parametrize(
    ("options", "status", "outcome"),
    [
        ((), 1, "changed"),
        (("--atol", 0.11), 0, "close"),
        (("--atol", 0.09), 1, "changed"),
        (("--rtol", 0.011), 0, "close"),
        (("--rtol", 0.009), 1, "changed"),
        (("--rtol", 0.005, "--atol", 0.06), 0, "close"),
    ],
)
def test_tolerances_decide(options, status, outcome, tmp_path, run):
    paths = written(tmp_path, {"w": torch.tensor([10.0, 5.0])}, {"w": torch.tensor([10.1, 5.0])})
    answer = run("diff", *paths, "--json", *options)
    (value,) = strictly(answer.out)["values"]
    assert (answer.status, value["outcome"], value["changed"], value["beyond"]) == (status, outcome, 1, status)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_no_tolerance_covers_what_broke(broken, tmp_path, run):
    paths = written(tmp_path, {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([broken, 2.0])})
    assert run("diff", *paths, "--rtol", 1e6, "--atol", 1e300).status == 1
    assert run("diff", *reversed(paths), "--rtol", 1e6, "--atol", 1e300).status == 1


def test_with_a_tolerance_a_dtype_is_no_difference(tmp_path, run):
    a, b = written(tmp_path, net(), {name: tensor.half() for name, tensor in net().items()})
    assert [run("diff", a, b, *options).status for options in ((), ("--rtol", 1e-3), ("--rtol", 1e-6))] == [1, 0, 1]


def test_renamed_tensors_and_their_map(tmp_path, run):
    state = net() | {"blocks.0.zero": torch.zeros(4), "blocks.1.zero": torch.zeros(4), "empty": torch.empty(0)}
    other = {name.replace("blocks.", "layers."): tensor for name, tensor in state.items()}
    a, b = written(tmp_path, state, other)
    told = run("diff", a, b, "--json")
    pairs = {(rename["a"], rename["b"]) for rename in strictly(told.out)["renamed"]}
    assert pairs == {(name, name.replace("blocks.", "layers.")) for name in state if name.startswith("blocks.")}
    assert (told.status, strictly(told.out)["only_in_a"], strictly(told.out)["ambiguous"]) == (1, [], [])
    (tmp_path / "map.json").write_text(told.out)
    assert run("diff", a, b, "--map", tmp_path / "map.json").status == 0
    assert run("strip-prefixes", a, tmp_path / "c.pt", "--map", tmp_path / "map.json").status == 0
    assert run("diff", tmp_path / "c.pt", b).status == 0


def test_what_became_which_is_left_open_where_it_is(tmp_path, run):
    zeros = torch.zeros(4)
    told = strictly(
        run("diff", *written(tmp_path, {"a": zeros, "b": zeros + 0}, {"c": zeros, "d": zeros}), "--json").out
    )
    assert told["renamed"] == []
    assert told["ambiguous"] == [{"a": ["a", "b"], "b": ["c", "d"]}]
    assert (told["only_in_a"], told["only_in_b"]) == (["a", "b"], ["c", "d"])
    other = {"p.bias": zeros}, {"q.gain": zeros}
    assert strictly(run("diff", *written(tmp_path, *other), "--json").out)["renamed"] == []


def test_an_alias_is_present(tmp_path, run):
    weight = torch.randn(3, 2)
    a = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"embed.weight": weight}, a, {"head.weight": "embed.weight"})
    (b,) = written(tmp_path, {"embed.weight": weight, "head.weight": weight})
    assert run("diff", a, b).status == 0
    assert run("diff", a, b, "--metadata").status == 0


def sparse(value: float = 1.0) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0, 1], [2, 0]]), torch.tensor([3.0, value]), (2, 3))


def quantized(scale: float = 0.1, value: float = 0.5) -> Tensor:
    return torch.quantize_per_tensor(torch.tensor([0.2, value]), scale, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "change"),
    [
        (sparse, lambda: sparse(2.0)),
        (sparse, lambda: sparse().to_sparse_csr()),
        (sparse, lambda: sparse().to_dense()),
        (quantized, lambda: quantized(0.2)),
        (quantized, lambda: quantized(0.1, 0.7)),
        (quantized, lambda: quantized().dequantize()),
    ],
)
def test_tensors_that_are_no_arrays(make, change, tmp_path, run):
    state = {"w": torch.ones(2), "s": make()}
    assert run("diff", *written(tmp_path, state, {"w": torch.ones(2), "s": make()})).status == 0
    answer = run("diff", *written(tmp_path, state, {"w": torch.ones(2), "s": change()}), "--json")
    told = strictly(answer.out)
    assert answer.status == 1
    assert [each["key"] for each in (*told["shape"], *told["values"])] == ["s"]


def test_entries_that_are_no_tensors_count(tmp_path, run):
    extra = {"amax": torch.ones(3), "recipe": {"margin": 0}}
    same = run("diff", *written(tmp_path, net() | {"fc._extra_state": extra}, net() | {"fc._extra_state": extra}))
    assert same.status == 0
    for changed in ({**extra, "amax": torch.zeros(3)}, {**extra, "recipe": {"margin": 1}}):
        paths = written(tmp_path, net() | {"fc._extra_state": extra}, net() | {"fc._extra_state": changed})
        answer = run("diff", *paths, "--json")
        assert (answer.status, [change["group"] for change in strictly(answer.out)["entries"]]) == (1, ["entry"])


def trained(epoch: int, **settings: Any) -> StateDict:
    return {"state_dict": net(), "epoch": epoch, "global_step": epoch * 10, "hyper_parameters": settings}


def test_metadata_is_compared_key_by_key(tmp_path, run):
    a = trained(1, dropout_rate=0.0, optim={"betas": [0.9, 0.99], "name": "adam"}, gone=True, mask=torch.zeros(2))
    b = trained(2, dropout_rate=0.05, optim={"betas": [0.9, 0.999], "name": "adam"}, come=None, mask=torch.ones(2))
    paths = written(tmp_path, a, b)
    assert run("diff", *paths).status == 0
    answer = run("diff", *paths, "--metadata", "--json")
    changes = {
        (change["group"], change["key"]): (change["in"], change["a"], change["b"])
        for change in strictly(answer.out)["metadata"]
    }
    assert answer.status == 1
    assert changes == {
        ("hyper_parameters", "dropout_rate"): ("both", 0.0, 0.05),
        ("hyper_parameters", "optim.betas[1]"): ("both", 0.99, 0.999),
        ("hyper_parameters", "gone"): ("a", True, None),
        ("hyper_parameters", "come"): ("b", None, None),
        ("hyper_parameters", "mask"): ("both", "other values", "other values"),
        ("training", "epoch"): ("both", 1, 2),
        ("training", "global_step"): ("both", 10, 20),
    }
    assert "hyper_parameters\tdropout_rate\tboth\t0.0\t0.05" in run("diff", *paths, "--metadata").out


def test_metadata_survives_a_conversion(tmp_path, run):
    assert run("convert", DIGITS, tmp_path / "clean.safetensors").status == 0
    assert run("diff", DIGITS, tmp_path / "clean.safetensors", "--metadata").status == 0


def test_configurations_beside_the_files_are_compared(tmp_path, run):
    for folder, dropout in (("a", 0.0), ("b", 0.05)):
        (tmp_path / folder).mkdir()
        safetensors.torch.save_file(net(), tmp_path / folder / "model.safetensors")
        config = {"model_type": "bert", "heads": {"dropout_rate": dropout}}
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    paths = tmp_path / "a", tmp_path / "b" / "model.safetensors"
    assert run("diff", *paths).status == 0
    answer = run("diff", *paths, "--metadata")
    assert (answer.status, "config\theads.dropout_rate\tboth\t0.0\t0.05" in answer.out) == (1, True)
    for text in ("no json", '{"x":' * 950 + "1" + "}" * 950, "[" * 100_000):
        (tmp_path / "a" / "config.json").write_text(text)
        assert (run("diff", *paths, "--metadata").status, run("diff", *paths).status) == (2, 0)


def test_tree_tells_moved_from_frozen(tmp_path, run):
    state = net() | {f"deep.{i}.weight": torch.full((2,), float(i)) for i in range(12)}
    other = {name: tensor + ("head" in name or name == "deep.5.weight") for name, tensor in state.items()}
    paths = written(tmp_path, state, other)
    tree = strictly(run("diff", *paths, "--tree", "--json").out)["tree"]
    assert (tree["tensors"], tree["moved"]) == (17, 2)
    by_name = {child["name"]: child for child in tree["children"]}
    assert {name: child["moved"] for name, child in by_name.items()} == {"stem": 0, "blocks": 0, "head": 1, "deep": 1}
    assert [child["name"] for child in by_name["deep"]["children"]] == ["[0-4]", "5", "[6-11]"]
    frozen = [line.split("\t")[1] for line in run("diff", *paths, "--tree").out.splitlines() if "\tfrozen\t" in line]
    assert {"stem", "blocks", "deep.[0-4]", "deep.[6-11]"} <= set(frozen)


def test_several_are_held_against_one(tmp_path, run):
    states = [{name: tensor + step * 0.1 for name, tensor in net().items()} for step in range(3)]
    base, *others = written(tmp_path, *({"state_dict": state, "epoch": step} for step, state in enumerate(states)))
    answer = run("diff", base, *others, base, "--json")
    drift = strictly(answer.out)["drift"]
    assert answer.status == 1
    assert [(each["same"], each["epoch"], each["moved"]) for each in drift] == [
        (False, 1, 5),
        (False, 2, 5),
        (True, 0, 0),
    ]
    assert drift[1]["relative_change"] == pytest.approx(2 * drift[0]["relative_change"], rel=1e-4)
    lines = run("diff", base, *others).out.splitlines()
    assert [line.split("\t")[:3] for line in lines] == [["drift", str(path), "different"] for path in others]
    mixed = run("diff", base, base, tmp_path / "none.pt", "--json")
    assert (mixed.status, [each["same"] for each in strictly(mixed.out)["drift"]]) == (2, [True, None])


@pytest.mark.parametrize(
    ("options", "status"),
    [(("--include", "stem.*"), 0), (("--exclude", "head.*"), 0), ((), 1), (("--include", "nothing"), 2)],
)
def test_globs_choose(options, status, tmp_path, run):
    other = {**net(), "head.weight": torch.ones(2, 4), "more": torch.ones(1)}
    assert (
        run("diff", *written(tmp_path, net(), other), *options, *(("--exclude", "more") if options else ())).status
        == status
    )


@pytest.mark.parametrize(
    ("a", "b", "options"),
    [
        ({"model": net(), "model_ema": net(1)}, net(1), ("--weights", "model_ema")),
        (prefixed("encoder.", net()) | {"other.w": torch.ones(2)}, net(), ("--select", "encoder")),
        (prefixed("net.", net()), net(), ("--prefix", "net")),
        (prefixed("net.", net()), prefixed("body.", net()), ("--rename", "s/^net/body/")),
        (net(), prefixed("body.", net()), ("--add-prefix", "body")),
    ],
)
def test_options_say_what_is_meant(a, b, options, tmp_path, run):
    paths = written(tmp_path, a, b)
    assert run("diff", *paths, *options).status == 0


def test_quiet_says_it_by_the_status_alone(tmp_path, run):
    paths = written(tmp_path, prefixed("_orig_mod.", net()), net(1))
    answer = run("diff", *paths, "--quiet")
    assert (answer.status, answer.out, answer.err) == (1, "", "")


def damaged(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    place = data.find(b"\x00\x00\x80\x3f" * 16)
    data[place] ^= 1
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.quint8])
def test_damage_is_no_difference(side, dtype, tmp_path, run):
    tensors = [torch.ones(64), torch.ones(64).double() if dtype is torch.float64 else torch.ones(64)]
    paths = written(tmp_path, *({"w": tensor, "v": torch.zeros(3)} for tensor in tensors))
    bad = damaged(paths[0])
    ordered = paths if side == 0 else paths[::-1]
    answer = run("diff", *ordered)
    assert (answer.status, answer.out) == (2, "")
    assert str(bad) in answer.err
    assert "checksum" in answer.err


REFUSED = (
    *("", "{a}", "{a} {none}", "{none} {a}", "{a} {text}", "{a} {b} --weights ema"),
    *("{a} {b} --rtol -1", "{a} {b} --atol nan", "{a} {b} --top -1"),
)


@pytest.mark.parametrize("argv", REFUSED)
def test_what_cannot_be_compared_is_one_sentence(argv, tmp_path, run):
    a, b = written(tmp_path, net(), net(1))
    (tmp_path / "text").write_text("hello")
    names = {"a": a, "b": b, "none": tmp_path / "none", "text": tmp_path / "text"}
    answer = run("diff", *argv.format(**names).split())
    assert (answer.status, answer.out) == (2, "")
    assert answer.err
    assert "Traceback" not in answer.err


def test_foreign_names_are_escaped(tmp_path, run):
    evil = "\x1b[31mred\u202e"
    answer = run(
        "diff",
        *written(tmp_path, {evil: torch.ones(2), "w": torch.ones(1)}, {evil: torch.zeros(2), "w": torch.ones(1)}),
    )
    assert answer.status == 1
    assert "\x1b" not in answer.out
    assert "\\x1b[31mred\\u202e" in answer.out


@pytest.fixture
def threads(monkeypatch):
    """Let threads take as little at a time as they can, parts of a tensor included."""
    from ckptool.operations import tensor_pairs

    monkeypatch.setattr(tensor_pairs, "_BATCH_BYTES", 1)
    monkeypatch.setattr(tensor_pairs, "_PART_ELEMENTS", 1000)
    monkeypatch.setattr(tensor_pairs, "available_cores", lambda: 4)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_threads_count_as_one_does(suffix, tmp_path):
    a, b = state_dicts(4)
    large = {"half": a["float32.5"].contiguous(), "large": torch.randn(300_000), "equal": torch.randn(300_000)}
    mixed = large | {"large": torch.cat([large["large"][:150_000], torch.randn(150_000)]), "half": large["half"].half()}
    for ours, theirs in ((a, b), (large, mixed)):
        kept = [name for name in ours if suffix == ".pt" or not name.startswith("complex")]
        paths = [
            save({name: state[name] for name in kept}, tmp_path / f"{i}{suffix}")
            for i, state in enumerate((ours, theirs))
        ]
        found = compare_files(*paths)
        assert set(found.by_key) == {name for name in kept if not same_bits(ours[name], theirs[name])}
        for name, value in found.by_key.items():
            for field, expected in reference(ours[name], theirs[name]).items():
                assert agrees(getattr(value, field), expected), (name, field, getattr(value, field), expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [64, 100_000])
def test_threads_meet_damage(count, tmp_path):
    state = {f"w{i}": torch.randn(300) for i in range(12)} | {"bad": torch.ones(count)}
    paths = written(tmp_path, state, state)
    damaged(paths[1])
    with pytest.raises(ChecksumMismatch, match=r"b\.pt"):
        compare_files(*paths)


class Interrupted:
    """Press Ctrl-C once some bytes were compared."""

    def start(self, label: str, total_bytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        raise KeyboardInterrupt


@pytest.mark.usefixtures("threads")
def test_an_interrupt_ends_it(tmp_path):
    paths = written(tmp_path, net(), net(1))
    with pytest.raises(KeyboardInterrupt):
        compare_files(*paths, progress=Interrupted())


def test_what_has_no_values_is_not_the_same(tmp_path, run):
    empty = torch.empty(3, device="meta")
    a, b = written(tmp_path, {"w": torch.ones(2), "m": empty}, {"w": torch.ones(2), "m": empty})
    answer = run("diff", a, b, "--json")
    told = strictly(answer.out)
    assert (answer.status, told["same"], told["outcomes"]["unknown"]) == (2, None, 1)
    assert run("diff", a, b, "--exclude", "m").status == 0
    assert run("diff", a, save({"w": torch.zeros(2), "m": empty}, tmp_path / "c.pt")).status == 1


def test_a_prefix_that_nobody_knows_is_found_by_the_other_names(tmp_path, run):
    answer = run("diff", *written(tmp_path, prefixed("backbone.net.", net()), net()), "--json")
    assert (answer.status, [note["code"] for note in strictly(answer.out)["notes"]]) == (0, ["reference"])


def test_a_view_that_expands_without_end_is_refused(tmp_path, run):
    state = {"w": torch.zeros(1).expand(1 << 26), "v": torch.ones(2)}
    paths = written(tmp_path, state, state)
    answer = run("diff", *paths)
    assert (answer.status, answer.out) == (2, "")
    assert str(paths[0]) in answer.err
    assert run("diff", *paths, "--exclude", "w").status == 0
