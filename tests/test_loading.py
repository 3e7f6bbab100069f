"""Tensors come out as torch itself loads them, and into models whatever wraps either side."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import ckptool
from ckptool.errors import ChecksumMismatch, CkptoolError, PlanRefused, UnreadableCheckpoint, UnsupportedTensor

DIGITS = Path(__file__).parents[1] / "examples" / "digits.ckpt"
DTYPES = [
    *(
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
    ),
    *("float8_e8m0fnu", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"),
    *("complex32", "complex64", "complex128"),
]


# --- what the oracle says ---


def raw(tensor: Tensor) -> bytes:
    resolved = tensor.resolve_conj().resolve_neg().contiguous()
    return bytes(resolved.reshape(-1).view(torch.uint8).tolist())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].stride() == tensor.stride(), name
        assert raw(found[name]) == raw(tensor), name


def random_tensor(dtype: str, *shape: int) -> Tensor:
    size = getattr(torch, dtype).itemsize
    high = 2 if dtype == "bool" else 256
    codes = torch.randint(0, high, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    return codes.view(getattr(torch, dtype))


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as old:
        parts = [(name, change(name, old.read(name))) for name in old.namelist()]
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in parts:
            new.writestr(name, content)


# --- tensors ---


@pytest.fixture
def many() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    tensors = {f"of_{dtype}": random_tensor(dtype, 3, 5) for dtype in DTYPES}
    return tensors | {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "base": base,
        "transposed": base.t(),
        "slice": base[1:4, ::2],
        "expanded": torch.randn(4, 1).expand(4, 7),
        "overlapping": torch.randn(10).as_strided((4, 4), (2, 1)),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "parameter": nn.Parameter(torch.randn(2)).detach(),
    }


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_kind_of_tensor_comes_out_as_torch_loads_it(many, tmp_path, legacy):
    path = tmp_path / "many.pt"
    if legacy:  # the stream of old has no word for the newer dtypes
        many = {
            name: value for name, value in many.items() if not name.startswith(("of_float8", "of_uint", "of_complex32"))
        }
    torch.save(many, path, _use_new_zipfile_serialization=not legacy)
    assert_same(ckptool.load_state_dict(path), torch.load(path, weights_only=True))


def test_lazy_bits_stay_lazy(tmp_path):
    path = tmp_path / "lazy.pt"
    torch.save(
        {"conj": torch.randn(2, dtype=torch.cfloat).conj(), "neg": torch.randn(2, dtype=torch.cfloat).conj().imag}, path
    )
    loaded = ckptool.load_state_dict(path)
    assert loaded["conj"].is_conj()
    assert loaded["neg"].is_neg()


def test_safetensors_come_out_as_safetensors_loads_them(tmp_path):
    path = tmp_path / "many.safetensors"
    tensors = {f"t.{dtype}": random_tensor(dtype, 2, 3) for dtype in DTYPES if dtype not in ("complex32", "complex128")}
    safetensors.torch.save_file(tensors | {"t.empty": torch.empty(0, 2), "t.scalar": torch.tensor(1.0)}, path)
    expected = safetensors.torch.load_file(path)
    found = ckptool.load_state_dict(path)
    assert_same({name: found[name] for name in expected}, expected)
    assert len(found) == len(expected)


def test_tensors_are_mapped_and_writing_to_them_leaves_the_file(tmp_path):
    path = tmp_path / "large.pt"
    torch.save({"w": torch.zeros(1 << 18)}, path)
    before = path.read_bytes()
    loaded = ckptool.load_state_dict(path)
    assert is_mapped(path)
    loaded["w"].fill_(7)
    assert loaded["w"].sum() == 7 << 18
    assert path.read_bytes() == before
    del loaded
    assert not is_mapped(path)


def test_ties_and_views_share_their_memory(tmp_path):
    path = tmp_path / "tied.pt"
    weight = torch.randn(4, 4)
    torch.save({"embed": weight, "head": weight, "row": weight[1], "other": weight.clone()}, path)
    loaded = ckptool.load_state_dict(path)
    loaded["embed"].fill_(9)
    assert (loaded["head"] == 9).all()
    assert (loaded["row"] == 9).all()
    assert not (loaded["other"] == 9).any()


def test_tensors_at_odd_places_are_read(tmp_path):
    path = tmp_path / "odd.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (3 - len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + torch.tensor([1.0, 2.0]).numpy().tobytes())
    assert ckptool.load_state_dict(path)["w"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int64", "complex64", "uint8"])
def test_big_endian_files_come_out_as_torch_loads_them(tmp_path, dtype):
    path = tmp_path / "big.pt"
    tensor = random_tensor(dtype, 2, 3)
    torch.save({"w": tensor, "row": tensor[1]}, path)
    unit = tensor.dtype.itemsize // (2 if tensor.dtype.is_complex else 1)

    def swap(name: str, content: bytes) -> bytes:
        if name.endswith("byteorder"):
            return b"big"
        units = [content[i : i + unit][::-1] for i in range(0, len(content), unit)]
        return b"".join(units) if "/data/" in name else content

    rewrite(path, swap)
    found = ckptool.load_state_dict(path)
    assert raw(found["w"]) == raw(tensor)
    assert raw(found["row"]) == raw(tensor[1])


def test_deflated_records_are_read_and_checked(tmp_path):
    path = tmp_path / "deflated.pt"
    torch.save({"w": torch.arange(1000.0)}, path)
    rewrite(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert torch.equal(ckptool.load_state_dict(path)["w"], torch.arange(1000.0))
    assert not is_mapped(path)


def test_a_sparse_tensor_is_named_and_can_be_left_out(tmp_path):
    path = tmp_path / "sparse.pt"
    torch.save({"emb.s": torch.eye(3).to_sparse(), "emb.w": torch.ones(2)}, path)
    with pytest.raises(UnsupportedTensor, match=r'sparse.pt: .*"emb.s".*sparse'):
        ckptool.load_state_dict(path)
    assert list(ckptool.load_state_dict(path, exclude=("*.s",))) == ["emb.w"]


def test_a_path_that_is_nothing_is_refused():
    with pytest.raises(UnreadableCheckpoint, match=r"^nowhere\.pt"):
        ckptool.load_state_dict("nowhere.pt")


# --- names ---


def test_a_lightning_file_comes_out_clean():
    stored = torch.load(DIGITS, weights_only=True)["state_dict"]
    expected = {key.removeprefix("model._orig_mod."): value for key, value in stored.items()}
    assert_same(ckptool.load_state_dict(DIGITS), expected)


def test_include_select_and_weights_choose(tmp_path):
    path = tmp_path / "peers.pt"
    net = {"enc.w": torch.ones(2), "enc.b": torch.ones(1), "dec.w": torch.ones(3)}
    torch.save({"model": net, "model_ema": {key: value + 1 for key, value in net.items()}}, path)
    assert list(ckptool.load_state_dict(path)) == list(net)
    assert list(ckptool.load_state_dict(path, select="enc")) == ["w", "b"]
    assert list(ckptool.load_state_dict(path, include=("*.w",))) == ["enc.w", "dec.w"]
    assert ckptool.load_state_dict(path, weights="ema")["enc.b"].item() == 2
    with pytest.raises(PlanRefused, match="nothing-here"):
        ckptool.load_state_dict(path, weights="nothing-here")


def test_an_opened_checkpoint_describes_without_reading():
    with ckptool.open(DIGITS) as opened:
        assert opened.tensors["fc.weight"].shape == (10, 32)
        assert opened.tensors["fc.weight"].dtype.name == "float32"
        assert list(opened.select(include=("fc.*",)).tensors) == ["fc.weight", "fc.bias"]
        assert "model._orig_mod.fc.bias" in opened.select(keep_prefixes=True).tensors


def test_names_that_safetensors_keeps_as_aliases_come_back(tmp_path):
    path = tmp_path / "alias.safetensors"
    safetensors.torch.save_file({"emb.weight": torch.ones(3, 2)}, path, {"format": "pt", "head.weight": "emb.weight"})
    loaded = ckptool.load_state_dict(path)
    assert set(loaded) == {"emb.weight", "head.weight"}
    assert loaded["emb.weight"].data_ptr() == loaded["head.weight"].data_ptr()


def test_the_package_names_its_interface():
    assert set(ckptool.__all__) <= set(dir(ckptool))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        ckptool.lod  # noqa: B018


# --- models ---


class Net(nn.Module):
    """Have what matters: a child called ``module``, batch norm counters, repeated blocks."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.module(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def regional(net: Net) -> nn.Module:
    for index, block in enumerate(net.blocks):
        net.blocks[index] = torch.compile(block)
    return net


def accelerated(net: Net) -> nn.Module:
    from accelerate.utils import compile_regions

    return compile_regions(net)


def checkpointed(net: Net) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net.blocks[1] = checkpoint_wrapper(net.blocks[1])
    return net


def distributed(net: Net) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net)


WRAPS: dict[str, Callable[[Net], nn.Module]] = {
    "plain": lambda net: net,
    "compiled": torch.compile,
    "regions": regional,
    "accelerate": accelerated,
    "data parallel": nn.DataParallel,
    "distributed": distributed,
    "parallel of compiled": lambda net: nn.DataParallel(torch.compile(net)),
    "compiled distributed": lambda net: torch.compile(distributed(net)),
    "checkpointed": checkpointed,
}


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(1)
    net = Net().train()
    net(torch.randn(8, 4))  # moves the running statistics away from their start
    return net


def values(net: nn.Module) -> list[bytes]:
    return [raw(value) for value in net.state_dict().values()]


@pytest.mark.parametrize("target", WRAPS)
@pytest.mark.parametrize("source", WRAPS)
def test_any_file_loads_into_any_model(net, tmp_path, source, target):
    expected = values(net)
    torch.save(WRAPS[source](net).state_dict(), tmp_path / "net.pt")
    torch.manual_seed(2)
    model = WRAPS[target](Net())
    assert values(model) != expected
    report = ckptool.load_into(model, tmp_path / "net.pt")
    assert values(model) == expected
    assert (report.is_exact, report.coverage, report.dropped) == (True, 1.0, ())
    assert set(report.matched) == set(Net().state_dict())


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
def test_the_lightning_file_loads_into_the_plain_net(tmp_path, suffix):
    import importlib.util

    spec = importlib.util.spec_from_file_location("train_digits", DIGITS.with_name("train_digits.py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path / f"digits{suffix}"
    if suffix == ".ckpt":
        shutil.copy(DIGITS, path)
    elif suffix == ".pt":
        shutil.copy(DIGITS.with_name("digits_wrong_strip.pt"), path)
    else:
        safetensors.torch.save_file(torch.load(DIGITS, weights_only=True)["state_dict"], path)
    model = script.DigitsNet()
    assert ckptool.load_into(model, path).is_exact
    assert script.evaluate(model)[0] == pytest.approx(358 / 360)
    assert ckptool.load_into(script.DigitsClassifier(), path).is_exact


def saved(path: Path, **changes: Tensor | None) -> Path:
    """Save a Net's weights with some entries replaced, added or (None) left out; ``__`` stands for a dot."""
    state = dict(Net().state_dict())
    for key, value in changes.items():
        state.pop(key.replace("__", "."), None)
        if value is not None:
            state[key.replace("__", ".")] = value
    torch.save(state, path)
    return path


REFUSED = {
    "missing": ({"head__bias": None}, r'1 of the model\'s tensors are missing \("head.bias"\)'),
    "unexpected": ({"aux__weight": torch.ones(2)}, r'1 are unknown to the model \("aux.weight"\)'),
    "shape": (
        {"head__bias": torch.ones(5)},
        r'1 do not fit \("head.bias"; the first is float32 \[5\] instead of float32 \[3\]\)',
    ),
    "kind": (
        {"head__bias": torch.ones(3, dtype=torch.complex64)},
        r"the first is complex64 \[3\] instead of float32 \[3\]",
    ),
    "sparse": ({"head__bias": torch.ones(3).to_sparse()}, r"the first is sparse"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_strict_refuses_in_one_sentence_and_touches_nothing(tmp_path, name):
    changes, message = REFUSED[name]
    path = saved(tmp_path / "net.pt", **changes)
    model = Net()
    before = values(model)
    with pytest.raises(CkptoolError, match=message) as caught:
        ckptool.load_into(model, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("or load what fits with strict=False")
    assert "\n" not in str(caught.value)
    assert values(model) == before


@pytest.mark.parametrize("name", REFUSED)
def test_what_fits_is_loaded_on_request(tmp_path, name):
    path = saved(tmp_path / "net.pt", **REFUSED[name][0])
    model = Net()
    report = ckptool.load_into(model, path, strict=False)
    assert not report.is_exact
    stored = torch.load(path, weights_only=True)
    assert all(torch.equal(model.state_dict()[key], stored[key]) for key in report.matched)
    total = sum(value.numel() for value in Net().state_dict().values())
    lost = 0 if name == "unexpected" else 3
    assert report.coverage == pytest.approx((total - lost) / total)


def test_a_file_of_another_model_is_never_loaded(tmp_path):
    path = saved(tmp_path / "net.pt")
    with pytest.raises(CkptoolError, match="none of its tensors fits the model"):
        ckptool.load_into(nn.Conv2d(1, 1, 3), path, strict=False)


def test_damaged_bytes_are_found_before_anything_is_loaded(tmp_path):
    path = saved(tmp_path / "net.pt")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    content[place.header_offset + 128] ^= 1
    path.write_bytes(content)
    model = Net()
    before = values(model)
    with pytest.raises(ChecksumMismatch):
        ckptool.load_into(model, path)
    assert values(model) == before


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model._orig_mod.", "backbone.net."])
def test_a_new_head_leaves_the_rest_of_a_wrapped_file(tmp_path, prefix):
    path = tmp_path / "old.pt"
    old = Net(classes=7)
    torch.save({prefix + key: value for key, value in old.state_dict().items()}, path)
    model = Net(classes=3)
    report = ckptool.load_into(model, path, strict=False)
    assert [item.name for item in report.mismatched] == ["head.weight", "head.bias"]
    assert torch.equal(model.blocks[1][0].weight, old.blocks[1][0].weight)


def test_a_part_of_a_file_loads_into_the_part(tmp_path):
    path = tmp_path / "both.pt"
    encoder, decoder = Net(), nn.Linear(5, 6)
    torch.save({**encoder.state_dict(prefix="encoder."), **decoder.state_dict(prefix="decoder.")}, path)
    model = Net()
    report = ckptool.load_into(model, path)
    assert values(model) == values(encoder)
    assert [move.source for move in report.dropped] == ["decoder.weight", "decoder.bias"]


def test_two_nets_of_one_shape_must_be_chosen(tmp_path):
    path = tmp_path / "peers.pt"
    student, teacher = Net(), Net()
    torch.save({**student.state_dict(prefix="student."), **teacher.state_dict(prefix="teacher.")}, path)
    model = Net()
    with pytest.raises(PlanRefused, match=r"student.* or .*teacher"):
        ckptool.load_into(model, path)
    report = ckptool.load_into(model, path, select="teacher")
    assert values(model) == values(teacher)
    assert {move.source.partition(".")[0] for move in report.dropped} == {"student"}


def test_counters_that_an_old_file_lacks_keep_their_value(tmp_path):
    path = saved(tmp_path / "old.pt", module__1__num_batches_tracked=None)
    report = ckptool.load_into(Net(), path)
    assert report.defaulted == ("module.1.num_batches_tracked",)
    assert report.is_exact


def test_a_cast_is_reported(tmp_path):
    path = saved(tmp_path / "half.pt", head__bias=torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16))
    model = Net()
    assert ckptool.load_into(model, path).casts == ("head.bias",)
    assert model.head.bias.tolist() == [1.0, 2.0, 3.0]


class Tied(nn.Module):
    """Use the embedding as the head, unless told not to."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5, bias=False)
        if tie:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("absent", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_tied_name_counts_as_present(tmp_path, absent, prefix):
    old = Tied()
    torch.save({prefix + key: value for key, value in old.state_dict().items() if key != absent}, tmp_path / "tied.pt")
    model = Tied()
    report = ckptool.load_into(model, tmp_path / "tied.pt")
    assert values(model) == values(old)
    assert (report.tied, report.coverage, report.is_exact) == ((absent,), 1.0, True)


@pytest.mark.parametrize("tie", [True, False])
def test_an_alias_of_safetensors_counts_as_present(tmp_path, tie):
    old, path = Tied(), tmp_path / "tied.safetensors"
    state = {key: value for key, value in old.state_dict().items() if key != "head.weight"}
    safetensors.torch.save_file(state, path, {"format": "pt", "head.weight": "embed.weight"})
    model = Tied(tie)
    assert ckptool.load_into(model, path).is_exact
    assert torch.equal(model.head.weight, old.embed.weight)
    assert torch.equal(model.embed.weight, old.embed.weight)


def test_two_values_for_one_tied_tensor_are_a_contradiction(tmp_path):
    path = tmp_path / "untied.pt"
    torch.save(Tied(tie=False).state_dict(), path)
    with pytest.raises(
        CkptoolError, match=r'"head\.weight"; the first is values of its own instead of one tensor with'
    ):
        ckptool.load_into(Tied(), path)
    report = ckptool.load_into(Tied(), path, strict=False)
    assert [item.name for item in report.mismatched] == ["head.weight"]


def test_a_lazy_model_takes_the_shapes_of_the_file(tmp_path):
    path = tmp_path / "lazy.pt"
    torch.save(nn.Sequential(nn.Linear(4, 2)).state_dict(), path)
    model = nn.Sequential(nn.LazyLinear(2))
    report = ckptool.load_into(model, path)
    assert model[0].weight.shape == (2, 4)
    assert report.coverage == 1.0


def test_a_model_without_memory_is_refused(tmp_path):
    path = saved(tmp_path / "net.pt")
    with torch.device("meta"):
        model = Net()
    with pytest.raises(CkptoolError, match="meta device"):
        ckptool.load_into(model, path)


class Stateful(nn.Module):
    """Keep something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.note: object = None

    def get_extra_state(self) -> object:
        return self.note

    def set_extra_state(self, state: object) -> None:
        self.note = state


def test_extra_state_is_handed_over_or_named(tmp_path):
    old = Stateful()
    old.note = "calibrated"
    torch.save(old.state_dict(), tmp_path / "extra.pt")
    model = Stateful()
    assert "_extra_state" in ckptool.load_into(model, tmp_path / "extra.pt").matched
    assert model.note == "calibrated"
    torch.save(OrderedDict(old.fc.state_dict(prefix="fc.")), tmp_path / "bare.pt")
    with pytest.raises(CkptoolError, match=r'missing \("_extra_state"\)'):
        ckptool.load_into(Stateful(), tmp_path / "bare.pt")


def test_a_model_that_refuses_is_quoted(tmp_path):
    path = saved(tmp_path / "net.pt")
    model = Net()

    def refuse(*_: object) -> None:
        raise RuntimeError("not today")

    model.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(CkptoolError, match=r"net\.pt: the model's own load_state_dict refused: not today"):
        ckptool.load_into(model, path)
