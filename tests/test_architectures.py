"""Which architecture a checkpoint holds: the index finds all of its own, and what people make of them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.strict_json import strictly
from torch import nn
from torch.nn.utils import parametrizations

from ckptool.formats import open_checkpoint
from ckptool.loading.architecture_index import build_index
from ckptool.loading.automatic import automatic_model
from ckptool.loading.build import build_model
from ckptool.loading.torchvision import ensure_torchvision
from ckptool.model.inspection import Architecture, ArchitectureMatch, TensorRow
from ckptool.model.verification import VerifyOptions
from ckptool.operations.architectures import recognise
from ckptool.operations.architectures.index import PATH, decode, load_index
from ckptool.operations.architectures.recognition import identify
from ckptool.operations.describe import describe
from ckptool.operations.module_tree import grow
from ckptool.operations.opening import open_path
from ckptool.operations.preview import preview
from ckptool.reports.canvas import Canvas
from ckptool.reports.inspect_view import view

Pairs = list[tuple[str, tuple[int, ...]]]
Run = Callable[..., Any]

DIGITS = Path(__file__).parents[1] / "examples" / "digits.ckpt"
CHUNKS = 8
MAX_INDEX_BYTES = 600_000
SAMPLE = 120
CLASS_COUNTS = (2, 1000, 21841, 21843)  # at the defaults of the index: labels, ImageNet, ImageNet-21k


def tensors_of(name: str) -> Pairs:
    index = load_index()
    entry = index.find(name)
    assert entry is not None, name
    return list(index.tensors(entry.root))


def rows_of(pairs: Iterable[tuple[str, tuple[int, ...]]]) -> list[TensorRow]:
    return [TensorRow(name, name, "float32", shape, 0) for name, shape in pairs]


def found_in(pairs: Pairs) -> ArchitectureMatch | None:
    rows = rows_of(pairs)
    return identify(grow(rows), rows)


def previewed(pairs: Pairs) -> Architecture:
    rows = rows_of(pairs)
    sketch = preview(rows, True)
    assert sketch is not None
    return recognise(sketch, rows)


def names_in(match: ArchitectureMatch | None) -> tuple[str | None, ...]:
    return () if match is None else (match.name, *match.alternatives)


def saved(folder: Path, pairs: Pairs) -> Path:
    """Write a checkpoint with these names and shapes, in which every tensor is one element seen many times."""
    path = folder / "model.pt"
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in pairs}, path)
    return path


# The index itself.


def test_the_index_is_small_and_says_what_it_was_built_from() -> None:
    index = load_index()
    assert PATH.stat().st_size < MAX_INDEX_BYTES
    assert set(index.versions) == {"torch", "timm", "torchvision", "transformers"}
    assert len({entry.full_name for entry in index.entries}) == len(index.entries)
    counts = {zoo: sum(entry.zoo == zoo for entry in index.entries) for zoo in ("timm", "torchvision", "transformers")}
    assert counts["timm"] > 1200
    assert counts["torchvision"] > 100
    assert counts["transformers"] > 1000


def test_what_is_encoded_is_decoded() -> None:
    records = [
        {"zoo": "timm", "family": "f", "name": "a", "tensors": [("w", (2, 3)), ("l.0.w", (4,)), ("l.1.w", (4,))]},
        {"zoo": "timm", "family": "f", "name": "b", "tensors": [("l.0.w", (4,)), ("l.0", (5,)), ("n", ())]},
    ]
    index = decode(build_index(records, {"timm": "1"}))
    assert index.versions == {"timm": "1"}
    for entry, record in zip(index.entries, records, strict=True):
        assert (entry.name, entry.tensors) == (record["name"], 3)
        assert sorted(index.tensors(entry.root)) == sorted(record["tensors"])


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_architecture_of_the_index_finds_itself(chunk: int) -> None:
    index = load_index()
    by_root = {entry.root: entry for entry in index.entries if entry.tensors >= 8}
    for root, entry in list(by_root.items())[chunk::CHUNKS]:
        match = found_in(list(index.tensors(root)))
        assert match is not None, entry
        assert (match.kind, match.score, match.differences) == ("exact", 1, ()), entry
        assert {one.full_name for one in index.entries if one.root == root} <= set(names_in(match)), entry


def test_an_architecture_built_for_real_is_found() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTModel

    for kind, config in ((ResNetForImageClassification, ResNetConfig()), (ViTModel, ViTConfig())):
        with torch.device("meta"):
            state = kind(config).state_dict()
        match = found_in([(name, tuple(tensor.shape)) for name, tensor in state.items()])
        assert match is not None
        assert match.kind == "exact"
        assert f"transformers:{kind.__name__}" in names_in(match)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"])
def test_an_architecture_of_timm_built_for_real_is_found(name: str) -> None:
    try:
        ensure_torchvision()
        import timm
    except ImportError:
        pytest.skip("timm, or torchvision that it needs, is not installed")
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    match = found_in([(key, tuple(tensor.shape)) for key, tensor in state.items()])
    assert match is not None
    assert match.kind == "exact"
    assert f"timm:{name}" in names_in(match)


# What people make of them.


def test_random_changes_of_head_and_stem_leave_an_architecture_recognised() -> None:
    """Take some architectures at random, and change what is changed before training on other data."""
    index, chance = load_index(), random.Random(6)
    classifiers = [entry for entry in index.entries if entry.zoo != "transformers" and entry.tensors >= 30]
    missed = []
    for entry in chance.sample(classifiers, SAMPLE):
        match = found_in(changed_at_the_ends(list(index.tensors(entry.root)), chance))
        if entry.full_name not in names_in(match):
            missed.append((entry.full_name, match))
    assert len(missed) <= SAMPLE // 40, missed


def changed_at_the_ends(pairs: Pairs, chance: random.Random) -> Pairs:
    """Change classes and input channels, put a dropout before the head and one more prefix before every name."""
    weights = [name for name, shape in pairs if len(shape) > 1 and name.endswith("weight")]
    if not weights:
        return pairs
    sizes, head, behind = dict(pairs), weights[-1].removesuffix("weight"), ""
    if sizes[weights[-1]][0] in CLASS_COUNTS:
        behind = chance.choice(("", "1."))
        for name in {head + "weight", head + "bias"} & sizes.keys():
            sizes[name] = (chance.choice((7, 100)), *sizes[name][1:])
    if len(sizes[weights[0]]) == 4:
        sizes[weights[0]] = (sizes[weights[0]][0], chance.choice((1, 4)), *sizes[weights[0]][2:])
    before = chance.choice(("", "backbone.", "net."))
    return [
        (before + (name.replace(head, head + behind) if name.startswith(head) else name), shape)
        for name, shape in sizes.items()
    ]


def replaced(pairs: Pairs, shapes: Mapping[str, tuple[int, ...]]) -> Pairs:
    return [(name, shapes.get(name, shape)) for name, shape in pairs]


def renamed(pairs: Pairs, old: str, new: str) -> Pairs:
    return [(re.sub(old, new, name), shape) for name, shape in pairs]


def without(pairs: Pairs, *fronts: str) -> Pairs:
    return [(name, shape) for name, shape in pairs if not name.startswith(fronts)]


RESNET = "timm:resnet50"
TEN = {"fc.weight": (10, 2048), "fc.bias": (10,)}
CHANGES: dict[str, tuple[Callable[[Pairs], Pairs], str, tuple[str, ...]]] = {
    "nothing": (lambda pairs: pairs, "exact", ()),
    "no counters": (lambda pairs: [pair for pair in pairs if "num_batches" not in pair[0]], "exact", ()),
    "sorted": (sorted, "exact", ()),
    "below a prefix": (
        lambda pairs: renamed(pairs, "^", "net."),
        "exact",
        ('prefix: every name lies below "net."',),
    ),
    "classes": (lambda pairs: replaced(pairs, TEN), "head", ("head: 1000 -> 10 classes",)),
    "dropout before the head": (
        lambda pairs: renamed(replaced(pairs, TEN), r"^fc\.", "fc.1."),
        "head",
        ('head: 1000 -> 10 classes, "fc.1" instead of "fc"',),
    ),
    "no head": (lambda pairs: without(pairs, "fc."), "head", ('head: "fc" is missing',)),
    "small images": (
        lambda pairs: replaced(pairs, {**TEN, "conv1.weight": (64, 3, 3, 3)}),
        "head",
        ("stem: 3x3 instead of 7x7", "head: 1000 -> 10 classes"),
    ),
    "grey images": (
        lambda pairs: replaced(pairs, {"conv1.weight": (64, 1, 7, 7)}),
        "head",
        ("stem: 1 instead of 3 input channels",),
    ),
    "backbone and head": (
        lambda pairs: [*renamed(without(pairs, "fc."), "^", "backbone."), ("head.weight", (5, 2048))],
        "head",
        ('prefix: every name lies below "backbone."', 'head: 1000 -> 5 classes, "head" instead of "fc"'),
    ),
    "cut off": (
        lambda pairs: without(pairs, "fc.", "layer4."),
        "nearest",
        ('head: "fc" is missing', '"layer4.0-2": 50 tensors missing'),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_said(name: str) -> None:
    change, kind, differences = CHANGES[name]
    match = found_in(change(tensors_of(RESNET)))
    assert match is not None
    assert (match.name, match.family, match.kind, match.differences) == (RESNET, "resnet", kind, differences)
    assert {"timm:resnetaa50", "timm:resnetblur50", "torchvision:resnet50"} <= set(match.alternatives)


@pytest.mark.parametrize("seed", range(20))
def test_a_random_perceptron_is_no_architecture_and_its_structure_is_said(seed: int) -> None:
    chance = random.Random(seed)
    widths = [chance.randint(1, 900) for _ in range(chance.randint(3, 9))]
    layers = [nn.Linear(*pair, device="meta") for pair in pairwise(widths)]
    network = nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())])
    found = previewed([(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()])
    assert found.match is None
    assert (found.structure.kind, found.structure.depth) == ("MLP", len(layers))


def test_a_family_is_recognised_by_its_modules_alone() -> None:
    from transformers import BertConfig, BertForMaskedLM

    with torch.device("meta"):
        state = BertForMaskedLM(BertConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=4)).state_dict()
    match = found_in([(name, tuple(tensor.shape)) for name, tensor in state.items()])
    assert match is not None
    assert (match.kind, match.name, match.family) == ("structure", None, "bert")
    assert "transformers:BertForMaskedLM" in match.alternatives


# How it is built.


def stage(found: Architecture) -> Sequence[tuple[int, str, int | None]]:
    return [(one.blocks, one.kind, one.width) for one in found.structure.stages]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("timm:resnet34", list(zip((3, 4, 6, 3), ["BasicBlock"] * 4, (64, 128, 256, 512), strict=True))),
        ("timm:resnet50", list(zip((3, 4, 6, 3), ["Bottleneck"] * 4, (256, 512, 1024, 2048), strict=True))),
        ("timm:convnext_tiny", list(zip((3, 3, 9, 3), ["ConvNeXt block"] * 4, (96, 192, 384, 768), strict=True))),
        ("timm:vit_base_patch16_224", [(12, "transformer block", 768)]),
        ("timm:convnext_atto", list(zip((2, 2, 6, 2), ["ConvNeXt block"] * 4, (40, 80, 160, 320), strict=True))),
        ("timm:resnetv2_18", list(zip((2, 2, 2, 2), ["BasicBlock"] * 4, (64, 128, 256, 512), strict=True))),
        ("timm:starnet_s1", list(zip((2, 2, 8, 3), ["convolutional block"] * 4, (24, 48, 96, 192), strict=True))),
        ("timm:mixer_b16_224", [(12, "MLP block", 768)]),
        ("transformers:T5ForConditionalGeneration", [(6, "transformer block", 512)] * 2),
        ("transformers:MixtralForCausalLM", [(32, "transformer block", 4096)]),
        ("torchvision:mobilenet_v2", [(17, "inverted residual", 320)]),
        ("torchvision:vgg16", []),
        ("torchvision:googlenet", []),  # its auxiliary heads are no blocks
    ],
)
def test_stages_are_counted(name: str, stages: list[tuple[int, str, int]]) -> None:
    assert stage(previewed(tensors_of(name))) == stages


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "timm:vit_base_patch16_224",
            {"width": 768, "patch_size": (16, 16), "positions": 197, "grid": 14},
        ),
        ("timm:beit_base_patch16_224", {"heads": 12}),
        ("timm:botnet26t_256", {"patch_size": None, "kind": "Bottleneck"}),
        ("timm:hiera_base_224", {"patch_size": None, "width": 768}),
        ("transformers:T5ForConditionalGeneration", {"heads": 8}),
        ("transformers:Qwen3ForCausalLM", {"heads": 32, "width": 4096, "context": None}),
        ("transformers:GPT2LMHeadModel", {"context": 1024, "width": 768, "heads": None, "positions": None}),
        ("transformers:WhisperForConditionalGeneration", {"context": 448}),
        ("transformers:CLIPModel", {"context": 77, "grid": 7, "patch_size": (32, 32)}),
        ("timm:swin_tiny_patch4_window7_224", {"heads": None, "width": None, "depth": 12}),
        ("torchvision:vgg16", {"kind": "CNN", "depth": 16}),
    ],
)
def test_dimensions_are_told_where_the_shapes_tell(name: str, expected: Mapping[str, Any]) -> None:
    structure = previewed(tensors_of(name)).structure
    assert {field: getattr(structure, field) for field in expected} == expected


@pytest.mark.parametrize(
    "name", ["timm:efficientnet_b3", "timm:mobilenetv2_100", "timm:convnext_base", "timm:resnet101"]
)
def test_blocks_are_of_the_same_kind_in_a_sorted_file(name: str) -> None:
    pairs = tensors_of(name)
    kinds = [{one.kind for one in previewed(order).structure.stages} for order in (pairs, sorted(pairs))]
    assert kinds[0] == kinds[1]


def test_the_heads_of_each_stage_are_told() -> None:
    stages = previewed(tensors_of("timm:swin_tiny_patch4_window7_224")).structure.stages
    assert [one.heads for one in stages] == [3, 6, 12, 24]


def test_the_rank_of_adapters_is_told() -> None:
    pairs = [
        (f"base.layers.{n}.q_proj.lora_{ab}.weight", shape)
        for n in (0, 1)
        for ab, shape in (("A", (8, 64)), ("B", (64, 8)))
    ]
    structure = previewed(pairs).structure
    assert (structure.lora_rank, structure.width) == (8, None)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_are_told_apart(kind: type[nn.Module]) -> None:
    network = nn.ModuleDict({"rnn": kind(12, 20, num_layers=3, bidirectional=True), "out": nn.Linear(40, 5)})
    structure = previewed([(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()]).structure
    assert [stage[:4] for stage in structure.stages] == [("rnn", 3, kind.__name__, 20)]
    assert structure.kind == kind.__name__


@pytest.mark.parametrize(
    ("name", "blocks", "kind"),
    [
        ("timm:regnety_002", [1, 1, 4, 7], "Bottleneck"),
        ("timm:nfnet_f0", [1, 2, 6, 3], "convolutional block"),
        ("timm:resmlp_12_224", [12], "convolutional block"),
        ("transformers:Wav2Vec2BertModel", [24], "transformer block"),
        ("transformers:MobileBertModel", [24], "transformer block"),
    ],
)
def test_layers_of_a_block_are_no_blocks(name: str, blocks: list[int], kind: str) -> None:
    structure = previewed(tensors_of(name)).structure
    assert ([stage.blocks for stage in structure.stages], structure.kind) == (blocks, kind)


def double(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3), nn.BatchNorm2d(after), nn.ReLU(), nn.Conv2d(after, after, 3))


def test_outputs_of_anchors_are_not_called_classes() -> None:
    name = "head.classification_head.cls_logits."
    changed = {f"{name}weight": (27, 256, 3, 3), f"{name}bias": (27,)}
    pairs = [(path, changed.get(path, shape)) for path, shape in tensors_of("torchvision:retinanet_resnet50_fpn")]
    match = found_in(pairs)
    assert match is not None
    assert (match.kind, match.differences) == ("head", ("head: 819 -> 27 outputs",))


def test_heads_of_attention_side_by_side_are_no_blocks() -> None:
    head = [("query.weight", (8, 32)), ("key.weight", (8, 32)), ("value.weight", (8, 32))]
    block = [(f"sa.heads.{number}.{name}", shape) for number in range(4) for name, shape in head]
    block += [
        ("sa.proj.weight", (32, 32)),
        ("mlp.0.weight", (128, 32)),
        ("mlp.2.weight", (32, 128)),
        ("ln.weight", (32,)),
    ]
    found = previewed([(f"blocks.{number}.{name}", shape) for number in range(3) for name, shape in block])
    assert [one[:4] for one in found.structure.stages] == [("blocks", 3, "transformer block", 32)]


def named(**modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(modules)


def previewed_network(network: nn.Module) -> Architecture:
    return previewed([(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()])


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        (named(inc=double(1, 8), down1=double(8, 16), down2=double(16, 32), c1=double(32, 16)), "convolutional block"),
        (named(rest=nn.ModuleList([double(8, 8), double(8, 8)])), "BasicBlock"),
        (named(cell=nn.LSTMCell(10, 20), head=nn.Linear(20, 3)), "LSTM"),
        (named(inputs=nn.Linear(9, 8), mix=nn.MultiheadAttention(8, 2), head=nn.Linear(8, 3)), None),
        (named(conv=parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), head=nn.Linear(8, 3)), None),
    ],
)
def test_a_kind_is_named_only_where_all_weights_are_of_it(network: nn.Module, kind: str | None) -> None:
    structure = previewed_network(network).structure
    assert structure.kind == kind
    assert (structure.depth is None) == (kind is None)


@pytest.mark.parametrize(
    ("network", "classes"),
    [
        (nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)), 3),
        (named(body=double(3, 8), projector=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))), None),
    ],
)
def test_the_end_of_one_part_of_a_network_tells_no_classes(network: nn.Module, classes: int | None) -> None:
    assert previewed_network(network).classes == classes


def test_the_boxes_of_a_detector_are_no_classes() -> None:
    assert previewed(tensors_of("transformers:DetrForObjectDetection")).classes is None


def test_tokens_that_encoder_and_decoder_share_are_an_embedding() -> None:
    first = previewed(tensors_of("transformers:T5ForConditionalGeneration")).first
    assert first is not None
    assert (first.name, first.kind, first.inputs, first.outputs) == ("shared", "embedding", 32128, 512)


@pytest.mark.parametrize(
    ("network", "first", "last", "channels"),
    [
        (named(a=nn.Conv2d(3, 8, 3), b=nn.ConvTranspose2d(8, 2, 3)), (3, 8), (8, 2), 3),
        (named(a=nn.ConvTranspose2d(100, 16, 4), b=nn.ConvTranspose2d(16, 3, 4)), (100, 16), (16, 3), None),
        (named(cell=nn.LSTMCell(10, 20), head=nn.Linear(20, 3)), None, (20, 3), None),
        (named(inputs=nn.Linear(10, 20), rnn=nn.GRU(20, 7)), (10, 20), None, None),
    ],
)
def test_the_ends_are_told_the_right_way_round(
    network: nn.Module, first: tuple[int, int] | None, last: tuple[int, int] | None, channels: int | None
) -> None:
    found = previewed_network(network)
    ends = [layer and (layer.inputs, layer.outputs) for layer in (found.first, found.last)]
    assert (*ends, found.input_channels) == (first, last, channels)


def test_transposed_convolutions_without_biases_read_no_channels() -> None:
    network = nn.Sequential(nn.ConvTranspose2d(100, 16, 4, bias=False), nn.ConvTranspose2d(16, 3, 4, bias=False))
    assert previewed_network(network).input_channels is None


# Through the command line.


def answer(run: Run, *arguments: object) -> dict[str, Any]:
    ran = run("inspect", *arguments, "--json")
    assert ran.status == 0, ran.err
    return strictly(ran.out)


def test_inspect_names_the_architecture_and_its_twins(run: Run, tmp_path: Path) -> None:
    found = answer(run, saved(tmp_path, tensors_of(RESNET)))
    architecture = found["architecture"]
    expected = {"name": RESNET, "family": "resnet", "match": "exact", "classes": 1000, "parameters": 25557032}
    assert {field: architecture[field] for field in expected} == expected
    assert "timm:resnetblur50" in architecture["alternatives"]
    assert architecture["differences"] == []
    assert [one["blocks"] for one in architecture["stages"]] == [3, 4, 6, 3]
    assert "architecture-twins" in [note["code"] for note in found["notes"]]


def test_a_file_sorted_by_name_is_the_same_architecture(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors_of("torchvision:squeezenet1_1")}, path)
    architecture = answer(run, path)["architecture"]
    assert (architecture["name"], architecture["match"]) == ("torchvision:squeezenet1_1", "exact")


def test_the_digits_network_is_no_architecture_and_its_structure_is_said(run: Run) -> None:
    architecture = answer(run, DIGITS)["architecture"]
    expected = {"name": None, "family": None, "match": "structure", "alternatives": [], "classes": 10}
    assert {field: architecture[field] for field in expected} == expected
    assert [(one["blocks"], one["kind"]) for one in architecture["stages"]] == [(2, "BasicBlock")]


def test_nothing_is_looked_up_where_nobody_asks(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, tensors_of(RESNET))
    monkeypatch.setattr("ckptool.operations.architectures.recognition.load_index", lambda: pytest.fail("it was read"))
    assert answer(run, path, "--no-architecture")["architecture"] is None


def test_inspect_says_how_a_prefix_is_taken_off(run: Run, tmp_path: Path) -> None:
    name = "timm:test_efficientnet"
    path = saved(tmp_path, renamed(tensors_of(name), "^", "student."))
    [note] = [note for note in answer(run, path)["notes"] if note["code"] == "architecture-prefix"]
    assert f"strip-prefixes --like {name} takes it off" in note["text"]


def test_it_is_said_in_plain_lines(run: Run, tmp_path: Path) -> None:
    ran = run("inspect", saved(tmp_path, CHANGES["classes"][0](tensors_of(RESNET))))
    lines = [line.split("\t") for line in ran.out.splitlines()]
    assert ["difference", "head: 1000 -> 10 classes"] in lines
    assert ["stage", "layer1", "3", "Bottleneck", "256", ""] in lines
    assert [line[:4] for line in lines if line[0] == "architecture"] == [["architecture", RESNET, "resnet", "head"]]


# What a file may hold that no network does.

USUAL = ("0", "1", "layer1", "layer2", "conv1", "fc", "weight", "bias", "qkv", "pos_embed", "patch_embed", "experts")
ODD = ("", "007", "999999999", "lora_A", "q_norm", "weight_hh_l0", "num_batches_tracked", "\x1b[2J", "²", "٣")
SEGMENTS = st.sampled_from((*USUAL, *ODD))
SHAPES = st.none() | st.lists(st.sampled_from([0, 1, 2, 3, 64, 1 << 62]), max_size=5).map(tuple)
NAMES = st.lists(SEGMENTS, min_size=1, max_size=5).map(".".join)


@given(st.dictionaries(NAMES, SHAPES, min_size=8, max_size=40))
@settings(max_examples=150, deadline=None)
def test_no_names_and_shapes_are_an_error(tensors: dict[str, tuple[int, ...] | None]) -> None:
    rows = [TensorRow(name, name, "float32", shape, 0) for name, shape in tensors.items()]
    sketch = preview(rows, True)
    if sketch is not None:
        recognise(sketch, rows)


def test_a_hostile_name_in_what_differs_does_nothing_to_a_terminal(run: Run, tmp_path: Path) -> None:
    pairs = [*without(tensors_of(RESNET), "fc."), ("\x1b[2J\nhead.weight", (5, 2048))]
    path = saved(tmp_path, pairs)
    assert r"\x1b[2J\x0ahead" in run("inspect", path).out
    with open_checkpoint(path) as checkpoint:
        drawn = view(describe(checkpoint), Canvas(100, color=False))
    assert r"\x1b[2J\x0ahead" in drawn
    assert "\x1b" not in drawn


# As a reference for names, and as a model.


def strip(run: Run, folder: Path, pairs: Pairs, like: str, *arguments: object) -> Any:
    return run("strip-prefixes", saved(folder, pairs), folder / "clean.pt", "--like", like, *arguments)


def test_an_architecture_is_a_reference_whatever_its_number_of_classes(run: Run, tmp_path: Path) -> None:
    name, classes = "timm:test_efficientnet", {"classifier.weight": (7, 256), "classifier.bias": (7,)}
    pairs = [*renamed(replaced(tensors_of(name), classes), "^", "net."), ("loss.centers", (7, 256))]
    ran = strip(run, tmp_path, pairs, name, "--force")
    assert ran.status == 0, ran.err
    written = torch.load(tmp_path / "clean.pt")
    assert sorted(written) == sorted(key for key, _ in tensors_of(name))
    assert written["classifier.weight"].shape == (7, 256)


def test_a_file_from_before_there_were_counters_has_a_reference_too(run: Run, tmp_path: Path) -> None:
    name = "timm:test_efficientnet"
    pairs = [pair for pair in tensors_of(name) if "num_batches" not in pair[0]]
    assert len(pairs) < len(tensors_of(name))
    ran = strip(run, tmp_path, renamed(pairs, "^", "net."), name, "--force")
    assert ran.status == 0, ran.err
    assert sorted(torch.load(tmp_path / "clean.pt")) == sorted(key for key, _ in pairs)


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ("timm:resnet5", r"timm:resnet5: no such architecture in the index; did you mean timm:resnet50"),
        ("torchvision:qqqqqqqqqqqqqqqqqqqqqqqq", r"no such architecture in the index; give a checkpoint, or a list"),
        ("timm:resnet50", r'"layer1\.0\.conv1\.weight".*: in the reference, not in this state dict'),
    ],
)
def test_what_is_no_reference_is_refused(like: str, words: str, run: Run, tmp_path: Path) -> None:
    ran = strip(run, tmp_path, tensors_of("timm:resnet18"), like)
    assert ran.status == 2
    assert re.search(words, ran.err), ran.err
    assert ran.err.count("\n") == 1


def automatic(path: Path) -> str:
    with open_path(path) as opened:
        return automatic_model(opened)


def test_the_only_architecture_that_fits_is_built(tmp_path: Path) -> None:
    name = "transformers:SegformerForImageClassification"
    with open_path(saved(tmp_path, tensors_of(name))) as opened:
        assert build_model(VerifyOptions(model="auto"), opened).description.startswith(f"{name}(")


def test_of_several_architectures_the_recorded_one_is_meant(tmp_path: Path) -> None:
    state = {name: torch.zeros(()).expand(shape) for name, shape in tensors_of(RESNET)}
    path = tmp_path / "last.pth.tar"
    torch.save({"epoch": 3, "arch": "resnetblur50", "state_dict": state, "optimizer": {}, "version": 2}, path)
    assert automatic(path) == "timm:resnetblur50"


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (lambda: tensors_of(RESNET), r"4 architectures have its names and shapes; give --model timm:resnet50 or"),
        (lambda: CHANGES["classes"][0](tensors_of(RESNET)), r"1000 -> 10 classes\); give --model timm:resnet50 or"),
        (lambda: [("0.weight", (3, 4)), ("2.weight", (2, 3))], r"no architecture .* --model FILE\.py:Class"),
    ],
)
def test_what_names_and_shapes_do_not_settle_is_refused(
    pairs: Callable[[], Pairs], words: str, run: Run, tmp_path: Path
) -> None:
    ran = run("verify", saved(tmp_path, pairs()), "--model", "auto", "--checks", "load")
    assert ran.status == 2
    assert re.search(words, ran.err), ran.err
