"""Which state dict is meant and what its clean keys are: tables of cases met in the wild, and properties."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.value_trees import checkpoint, node, scalar, spec, state_dict, stub, tree, weights

from ckptool.errors import PlanRefused, UnreadableCheckpoint
from ckptool.layouts import identify, node_at, plan_keys, read_training, rename_key, rename_module_path, select
from ckptool.model.dtypes import BY_NAME
from ckptool.model.plans import KeyOptions, KeyPlan, Producer, StateDict
from ckptool.model.values import DictNode, OpaqueTensor, Stub

CASES = json.loads((Path(__file__).parent / "data" / "strip_cases.json").read_text())
BARE = Producer("torch.save")
LIGHTNING = Producer("PyTorch Lightning", container="lightning")


def plan(*keys: str, producer: Producer = BARE, role: str = "main", **options: Any) -> KeyPlan:
    """Plan the keys of a state dict of 2x2 tensors."""
    return plan_keys(state_dict(keys, role), producer, KeyOptions(**options))


def targets(made: KeyPlan) -> list[str | None]:
    return [move.target for move in made.moves]


def codes(made: Any) -> list[str]:
    return [note.code for note in made.notes]


# --- the 56 cases ---


def _options(case: dict[str, Any]) -> KeyOptions:
    reference = dict.fromkeys(case["ref"]) if "ref" in case else None
    return KeyOptions(reference=reference, select=case.get("select"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_case(case: dict[str, Any]) -> None:
    named = state_dict(case["keys"])
    producer = Producer("", container=case.get("hint", ""))
    if isinstance(case["expect"], str):
        with pytest.raises(PlanRefused) as refused:
            plan_keys(named, producer, _options(case))
        assert refused.value.code == case["expect"]
        return
    made = plan_keys(named, producer, _options(case))
    gone = [None] * len(case.get("dropped", []))
    assert targets(made) == case["expect"] + gone
    assert codes(made) == case["notes"]
    assert [move.source for move in made.moves] == case["keys"]
    assert all(move.reason for move in made.dropped)
    if "dropped" in case:
        assert [move.source for move in made.dropped] == case["dropped"]


def test_every_case_is_here() -> None:
    assert {case["id"] for case in CASES} == {f"T{number:02}" for number in range(1, 57)}


# --- what a refusal says ---

REFUSALS = [
    (
        "choice",
        ["model.0.w", "teacher.w", "criterion.weight", "m.mean_value"],
        {"producer": LIGHTNING},
        (
            '"model", "teacher" lie side by side in one state dict: choose with --select model '
            "or --select teacher, or --keep-prefixes"
        ),
    ),
    (
        "choice below a wrapper",
        ["module.encoder_q.w", "module.encoder_k.w", "module.queue"],
        {},
        (
            '"encoder_k", "encoder_q", "queue" lie side by side in one state dict: choose with '
            "--select module.encoder_k or --select module.encoder_q, or --keep-prefixes"
        ),
    ),
    (
        "collision",
        ["_orig_mod.a.w", "a.w"],
        {},
        (
            '"_orig_mod.a.w and a.w -> a.w": two keys would get one name; protect a segment with --keep, choose '
            "with --select, or use --map"
        ),
    ),
    (
        "partial prefix",
        ["net.a", "net.b", "c"],
        {"prefix": "net."},
        'only 2 of 3 keys start with "net.", not "c": --select net would drop the others',
    ),
    (
        "nothing selected",
        ["net.a", "head.b"],
        {"select": "neck"},
        'no key lies below "neck": --select takes one of "net", "head", or a path below',
    ),
    (
        "reference of another model",
        ["model.a", "model.b"],
        {"reference": {"a": None, "b": None, "c": None}},
        (
            '"c": in the reference, not in this state dict; the closest rule (stripping "model.") matches 2 of 3 '
            "names and shapes: give the reference of the same model"
        ),
    ),
    (
        "reference that fits twice",
        ["student.w", "teacher.w"],
        {"reference": {"w": None}},
        (
            'stripping "student." or stripping "teacher.": each matches the reference equally well; choose with '
            "--select student or teacher"
        ),
    ),
    ("bad name", ["a..b"], {}, '"a..b": a name with an empty segment; give it another with --map'),
    (
        "bad expression",
        ["a"],
        {"rename": (("(", ""),)},
        '--rename "s/(//" is no regular expression (missing ), unterminated subpattern at position 0): correct it',
    ),
    ("bad map", ["a"], {"mapping": {"b": "c"}}, '--map names "b", which the state dict does not hold: correct it'),
    (
        "empty target",
        ["a.w", "b"],
        {"mapping": {"b": ""}},
        '"b -> ": the name would have an empty segment; correct --rename, --map or --add-prefix',
    ),
    (
        "prefix of nothing",
        ["net.a", "head.b"],
        {"prefix": "ned"},
        'no key lies below "ned": --prefix takes one of "net", "head", or a path below',
    ),
    ("nothing included", ["a"], {"include": ("z*",)}, 'no clean name matches --include "z*": see --tensors'),
    (
        "contradiction",
        ["m.a"],
        {"prefix": "m", "keep_prefixes": True},
        "--prefix and --keep-prefixes contradict each other: give one of them",
    ),
]


@pytest.mark.parametrize(("keys", "options", "text"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_refusal(keys: list[str], options: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanRefused) as refused:
        plan(*keys, **options)
    assert str(refused.value) == text


SHARDS = {
    "ShardedTensor": (OpaqueTensor("sharded", "ShardedTensor", None, (4, 4)), True),
    "part of a DTensor": (OpaqueTensor("dtensor", "DTensor", None, (4, 4), (("local", spec(2, 4)),)), True),
    "whole DTensor": (OpaqueTensor("dtensor", "DTensor", None, (4, 4), (("local", spec(4, 4)),)), False),
    "sparse": (OpaqueTensor("sparse", "COO", None, (4, 4)), False),
}


@pytest.mark.parametrize(("value", "is_refused"), SHARDS.values(), ids=SHARDS)
def test_shards_are_refused(value: OpaqueTensor, is_refused: bool) -> None:
    named = StateDict((), "main", {"module.a": value, "module.b": spec(2)})
    if is_refused:
        with pytest.raises(PlanRefused, match=re.escape('"module.a": only one rank\'s shard')) as refused:
            plan_keys(named, BARE)
        assert refused.value.code == "sharded"
    else:
        assert targets(plan_keys(named, BARE)) == ["a", "b"]


# --- what the user asks for ---

EXPLICIT = [
    ("keep module", ["_orig_mod.module.w.a"], {"keep": ("module",)}, ["module.w.a"]),
    ("keep a private segment", ["_orig_mod.a.w", "a.w"], {"keep": ("_orig_mod",)}, ["_orig_mod.a.w", "a.w"]),
    ("keep half a pair", ["_flattened_output_module._base_module.a"], {"keep": ("_base_module",)}, None),
    ("keep model", ["model.a"], {"keep": ("model",), "producer": LIGHTNING}, ["model.a"]),
    ("keep the root of an average", ["n_averaged", "module.a"], {"keep": ("module",)}, ["n_averaged", "module.a"]),
    ("keep prefixes", ["student.a", "teacher.a"], {"keep_prefixes": True}, ["student.a", "teacher.a"]),
    ("keep prefixes of a subtree", ["s.a", "t.a"], {"keep_prefixes": True, "select": "t"}, [None, "t.a"]),
    ("keep prefixes of flat buffers", ["_flat_param"], {"keep_prefixes": True}, ["_flat_param"]),
    ("prefix as written", ["model._orig_mod.a", "model._orig_mod.b"], {"prefix": "model._orig_mod."}, ["a", "b"]),
    ("prefix before a wrapper", ["model._orig_mod.a"], {"prefix": "model"}, ["a"]),
    ("prefix behind a wrapper", ["_orig_mod.net.a", "net.b"], {"prefix": "net."}, ["a", "b"]),
    ("prefix that is a wrapper", ["_orig_mod.module.a"], {"prefix": "_orig_mod"}, ["module.a"]),
    ("prefix beside counters", ["n_averaged", "module.a"], {"prefix": "module"}, [None, "a"]),
    ("select a path", ["net.body.a", "net.head.b"], {"select": "net.body."}, ["a", None]),
    ("select as written", ["model._orig_mod.a", "t.b"], {"select": "model._orig_mod"}, ["a", None]),
    ("select a clean name", ["module.body.a", "module.head.b"], {"select": "head"}, [None, "b"]),
    ("select is no substring", ["net.a", "network.b"], {"select": "net"}, ["a", None]),
    ("select below a kept segment", ["m._orig_mod.fc.w", "t.b"],
     {"select": "m._orig_mod.fc", "keep": ("_orig_mod",)}, ["w", None]),
    ("select around a kept segment", ["m._orig_mod.fc.w", "t.b"],
     {"select": "m", "keep": ("_orig_mod",)}, ["_orig_mod.fc.w", None]),
    ("exclude", ["module.a.w", "module.b.w"], {"exclude": ("b.*",)}, ["a.w", None]),
    ("include", ["module.a.w", "module.b.w"], {"include": ("a.*", "c")}, ["a.w", None]),
    ("rename", ["module.enc.0.w"], {"rename": ((r"^enc\.", "encoder."), (r"\.w$", ".weight"))}, ["encoder.0.weight"]),
    ("map by source and by clean name", ["module.a", "module.b", "module.c"],
     {"mapping": {"module.a": "x", "b": "y"}}, ["x", "y", "c"]),
    ("map drops", ["module.a", "module.b"], {"mapping": {"a": None}}, [None, "b"]),
    ("a whole map needs no evidence", ["student.a", "teacher.a"],
     {"mapping": {"student.a": "a", "teacher.a": None}}, ["a", None]),
    ("a map gives names to the nameless", ["a..b", "c"], {"mapping": {"a..b": "a.b"}}, ["a.b", "c"]),
    ("add prefix", ["module.a"], {"add_prefix": "net."}, ["net.a"]),
    ("add prefix without a dot", ["a"], {"add_prefix": "net"}, ["net.a"]),
    ("all at once, in order", ["module.a.w", "module.b.w"],
     {"exclude": ("b.*",), "rename": (("^a", "c"),), "mapping": {"c.w": "d.w"}, "add_prefix": "e"}, ["e.d.w", None]),
    ("select before reference", ["student.net.w", "teacher.net.w"],
     {"select": "teacher", "reference": {"w": None}}, [None, "w"]),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "options", "wanted"), [row[1:] for row in EXPLICIT], ids=[row[0] for row in EXPLICIT])
def test_explicit_option(keys: list[str], options: dict[str, Any], wanted: list[str | None] | None) -> None:
    made = plan(*keys, **options)
    assert targets(made) == (keys if wanted is None else wanted)
    assert all(move.reason for move in made.dropped)


CERTAINTIES = [
    (["_orig_mod.a"], {}, "certain"),
    (["module.a"], {}, "assumed"),
    (["module.a"], {"keep": ("module",)}, "certain"),
    (["model.a"], {"producer": LIGHTNING}, "assumed"),
    (["net.a"], {"select": "net"}, "explicit"),
    (["net.a"], {"prefix": "net"}, "explicit"),
    (["net.a"], {"keep_prefixes": True}, "explicit"),
    (["net.a"], {"mapping": {"net.a": "a"}}, "explicit"),
    (["net.a"], {"reference": {"a": None}}, "reference"),
]


@pytest.mark.parametrize(("keys", "options", "certainty"), CERTAINTIES)
def test_certainty(keys: list[str], options: dict[str, Any], certainty: str) -> None:
    assert plan(*keys, **options).certainty == certainty


def test_wrappers_are_named_and_counted() -> None:
    made = plan("model._orig_mod.a", "model.b", "criterion.w", producer=LIGHTNING)
    assert [(w.name, w.segment, w.count, w.of, w.certainty) for w in made.wrappers] == [
        ("torch.compile", "_orig_mod", 1, 3, "certain"),
        ("LightningModule", "model", 2, 3, "assumed"),
    ]


# --- a container's own roots ---

CONTAINER_ROOTS = [
    ("losses", ["criterion.w", "loss.w", "loss_fn.w", "aux_loss.w"], True),
    ("metrics", ["metrics.acc.total", "train_metric.x", "val_metrics.x"], True),
    ("torchmetrics mean", ["m.mean_value", "m.weight"], True),
    ("torchmetrics counts", ["train_acc.tp", "train_acc.fp", "train_acc.tn", "train_acc.fn"], True),
    ("torchmetrics in a collection", ["val.acc.correct", "val.acc.total"], True),
    ("an EMA copy", ["ema_model.0.w"], True),
    ("only a weight", ["m.weight"], False),
    ("a head", ["head.weight", "head.total"], False),
    ("a generator", ["generator.0.w"], False),
    ("a root parameter", ["logit_scale"], False),
    ("a lossless name", ["lossless.w"], False),
]


@pytest.mark.parametrize(("beside", "goes"), [row[1:] for row in CONTAINER_ROOTS], ids=[r[0] for r in CONTAINER_ROOTS])
def test_roots_beside_the_network(beside: list[str], goes: bool) -> None:
    if goes:
        made = plan("model.0.w", *beside, producer=LIGHTNING)
        assert targets(made) == ["0.w", *[None] * len(beside)]
        assert any(code.startswith("mixed-roots:") for code in codes(made))
    else:
        with pytest.raises(PlanRefused) as refused:
            plan("model.0.w", *beside, producer=LIGHTNING)
        assert refused.value.code == "choose"


def test_another_attribute_of_a_lightning_module_stays_and_is_named() -> None:
    made = plan("net.a", "net.b", producer=LIGHTNING)
    assert targets(made) == ["net.a", "net.b"]
    assert codes(made) == ["single-root-left"]
    assert "--prefix net" in made.notes[0].text


def test_composer_strips_both_wrappers() -> None:
    made = plan("module.model.a", "module.model.b", producer=Producer("Composer", container="composer"))
    assert targets(made) == ["a", "b"]
    assert codes(made) == ["module-assumed", "model-by-container"]


# --- references ---


def test_shapes_decide_between_rules() -> None:
    named = StateDict((), "main", {"a.w": spec(2), "b.w": spec(3)})
    made = plan_keys(named, BARE, KeyOptions(reference={"w": (3,)}))
    assert targets(made) == [None, "w"]


def test_a_shape_that_differs_is_missing() -> None:
    with pytest.raises(PlanRefused, match=re.escape('"w": in the reference, not')) as refused:
        plan("module.w", reference={"w": (7,)})
    assert refused.value.code == "ref-missing"


REFERENCES = [
    ("the reference is wrapped", ["a.w", "b.w"], ["model.a.w", "model.b.w"], ["model.a.w", "model.b.w"]),
    ("extras are dropped", ["model.a", "model.b", "loss.w"], ["a", "b"], ["a", "b", None]),
    ("nothing changes", ["a", "b"], ["a", "b"], ["a", "b"]),
    ("private and public wrappers", ["_orig_mod.module.net.a"], ["a"], ["a"]),
    ("a wrapper in the middle", ["net.features.module.0.w", "net.fc.w"], ["features.0.w", "fc.w"], None),
    ("one module kept, one taken", ["module.x.module.w"], ["x.module.w"], ["x.module.w"]),
]


@pytest.mark.parametrize(("keys", "names", "wanted"), [row[1:] for row in REFERENCES], ids=[r[0] for r in REFERENCES])
def test_reference(keys: list[str], names: list[str], wanted: list[str | None] | None) -> None:
    made = plan(*keys, reference=dict.fromkeys(names, (2, 2)))
    assert targets(made) == (names if wanted is None else wanted)
    assert (made.certainty, codes(made)) == ("reference", ["by-reference"])


# --- one rule for all names ---

COMPILED = plan("model._orig_mod.fc.weight", "model._orig_mod.fc.bias", "criterion.weight", producer=LIGHTNING)

RENAMED_KEYS = {
    "model._orig_mod.fc.weight": "fc.weight",
    "model._orig_mod.fc.new": "fc.new",
    "model.fc.weight": "fc.weight",
    "_orig_mod.fc.weight": "fc.weight",
    "criterion.weight": "criterion.weight",
    "elsewhere": "elsewhere",
}


@pytest.mark.parametrize(("key", "wanted"), RENAMED_KEYS.items())
def test_optimizer_names_follow_the_plan(key: str, wanted: str) -> None:
    assert rename_key(COMPILED, key) == wanted


def test_every_kept_key_follows_its_own_rule() -> None:
    for case in CASES:
        if isinstance(case["expect"], list):
            made = plan_keys(
                state_dict(case["keys"]), Producer("", container=case.get("hint", "")), _options(case)
            )  # fmt: skip
            assert {key: rename_key(made, key) for key in made.kept} == made.kept, case["id"]


MODULE_PATHS = {
    "": None,
    "model": "",
    "model._orig_mod": "",
    "model._orig_mod.fc": "fc",
    "model._orig_mod.layers.0": "layers.0",
    "criterion": None,
}


@pytest.mark.parametrize(("path", "wanted"), MODULE_PATHS.items())
def test_module_paths_follow_the_plan(path: str, wanted: str | None) -> None:
    assert rename_module_path(COMPILED, path) == wanted


def test_explicit_names_reach_optimizer_and_modules() -> None:
    made = plan("module.enc.w", "module.b", rename=(("^enc[.]", "encoder."),), mapping={"b": "c"}, add_prefix="net")
    assert [rename_key(made, key) for key in ("module.enc.x", "module.b")] == ["net.encoder.x", "net.c"]
    assert [rename_module_path(made, path) for path in ("", "module", "module.enc")] == [None, "net", "net.encoder"]


def test_a_clean_model_keeps_its_root_path() -> None:
    made = plan("_orig_mod.a.w", "_orig_mod.b.w")
    assert [rename_module_path(made, path) for path in ("", "_orig_mod", "_orig_mod.a")] == ["", "", "a"]


# --- properties ---

SEGMENTS = st.sampled_from(["a", "b", "0", "1", "model", "module", "_orig_mod", "ema_model", "loss", "_flat_param_x"])
KEYS = st.lists(st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=8, unique=True)
OPTIONS = st.builds(
    KeyOptions,
    select=st.none() | SEGMENTS,
    prefix=st.none() | SEGMENTS,
    keep=st.lists(SEGMENTS, max_size=2).map(tuple),
    keep_prefixes=st.booleans(),
    exclude=st.sampled_from([(), ("a*",)]),
    rename=st.sampled_from([(), (("a", "b"),), (("[.]", ""),), (("^.*$", ""),)]),
    reference=st.none() | KEYS.map(dict.fromkeys),
    add_prefix=st.sampled_from(["", "x", "x."]),
)


@settings(max_examples=300, deadline=None)
@given(KEYS, OPTIONS, st.sampled_from([BARE, LIGHTNING]))
def test_no_plan_loses_or_merges_a_key(keys: list[str], options: KeyOptions, producer: Producer) -> None:
    try:
        made = plan_keys(state_dict(keys), producer, options)
    except PlanRefused:
        return
    assert [move.source for move in made.moves] == keys
    kept = [move.target for move in made.moves if move.target is not None]
    assert len(set(kept)) == len(kept)
    assert all(all(target.split(".")) for target in kept)
    assert all(move.reason for move in made.dropped)


PRIVATE = ["_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module",
           "_original_module", "_dmp_wrapped_module", "_flattened_output_module._base_module"]  # fmt: skip
CLEAN_KEYS = st.lists(
    st.lists(st.sampled_from(["emb", "layers", "0", "1", "fc", "weight", "module_list"]), min_size=1, max_size=4),
    min_size=1, max_size=8, unique_by=tuple,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(CLEAN_KEYS, st.data())
def test_random_wrappers_are_undone_exactly(keys: list[list[str]], data: st.DataObject) -> None:
    def wrap(key: list[str]) -> str:
        stacks = [data.draw(st.lists(st.sampled_from(PRIVATE), max_size=2)) for _ in key]
        return ".".join(part for stack, segment in zip(stacks, key, strict=True) for part in (*stack, segment))

    wrapped = [wrap(key) for key in keys]
    made = plan(*wrapped)
    assert targets(made) == [".".join(key) for key in keys]
    assert made.certainty == "certain"


@pytest.mark.benchmark
def test_many_keys_are_planned_fast() -> None:
    from time import process_time

    keys = [f"model._orig_mod.layers.{number // 10}.attention.w{number % 10}.weight" for number in range(50_000)]
    named = StateDict((), "main", dict.fromkeys(keys, spec(2, 2)))
    start = process_time()
    copied = {key: ".".join(key.split(".")[2:]) for key in keys for _ in range(3)}
    unit = process_time() - start
    start = process_time()
    made = plan_keys(named, LIGHTNING)
    assert process_time() - start < 6 * unit
    assert made.kept == copied


# --- which state dict ---

SD = ["a.w", "b.w"]
OPTIMIZER = {"state": {0: {"exp_avg": spec(2, 2), "step": spec()}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def chosen(content: Any, selector: str = "main") -> Any:
    """Select in a checkpoint with this content."""
    return select(checkpoint(content), selector)


def roles(selection: Any) -> dict[str, str]:
    return {candidate.name: candidate.role for candidate in selection.candidates}


SELECTIONS: list[tuple[str, Any, dict[str, str], str, list[str]]] = [
    ("K01 optimizer beside", {"state_dict": weights(SD), "optimizer": OPTIMIZER}, {"state_dict": "main"},
     "state_dict", []),
    ("K02 torchvision", {"model": weights(SD), "model_ema": {"n_averaged": spec(), **weights(["module.a.w"])},
                         "args": stub("argparse.Namespace", lr=0.1)},
     {"model": "main", "model_ema": "ema"}, "model", ["ema-present"]),
    ("K03 mmengine swaps", {"meta": {"mmengine_version": "0.10.4"}, "message_hub": {}, "state_dict": weights(SD),
                            "ema_state_dict": {"steps": spec(), **weights(["module.a.w"])}},
     {"state_dict": "ema", "ema_state_dict": "raw"}, "state_dict", ["ema-weights", "raw-present"]),
    ("K04 Lightning averages", {"pytorch-lightning_version": "2.6.6", "state_dict": weights(SD),
                                "current_model_state": weights(SD), "averaging_state": {"n_averaged": spec()}},
     {"state_dict": "ema", "current_model_state": "raw"}, "state_dict", ["ema-weights", "raw-present"]),
    ("K10 BasicSR", {"params": weights(SD), "params_ema": weights(SD)}, {"params": "main", "params_ema": "ema"},
     "params", ["ema-present"]),
    ("K11 twice nested", {"state_dict": {"state_dict": weights(SD)}}, {"state_dict.state_dict": "main"},
     "state_dict.state_dict", []),
    ("K12 nnU-Net", {"network_weights": weights(SD), "_best_ema": 0.9, "current_epoch": 3},
     {"network_weights": "main"}, "network_weights", []),
    ("K13 unknown name", {"my_net": weights(SD), "epoch": 3}, {"my_net": "peer"}, "my_net", ["name-assumed"]),
    ("bare", weights(SD), {"": "main"}, "", []),
    ("K07 DeepSpeed", {"module": weights(SD), "ds_version": "0.14", "param_shapes": [{"a.w": (2, 2)}]},
     {"module": "main"}, "module", []),
    ("timm", {"arch": "x", "version": 2, "state_dict": weights(SD), "state_dict_ema": weights(SD),
              "optimizer": OPTIMIZER, "args": stub("argparse.Namespace")},
     {"state_dict": "main", "state_dict_ema": "ema"}, "state_dict", ["ema-present"]),
    ("ema below its own name", {"model": weights(SD), "ema": {"module": weights(SD)}},
     {"model": "main", "ema.module": "ema"}, "model", ["ema-present"]),
    ("only an EMA", {"ema": weights(SD), "step": 3}, {"ema": "ema"}, "ema", ["ema-weights"]),
    ("only a teacher", {"teacher": weights(SD)}, {"teacher": "peer"}, "teacher", ["name-assumed"]),
    ("Composer", {"state": {"model": weights(SD), "optimizers": {"AdamW": OPTIMIZER}, "timestamp": {}}, "rng": [1]},
     {"state.model": "main"}, "state.model", []),
    ("an average in a callback", {"pytorch-lightning_version": "1.5", "state_dict": weights(SD),
                                  "callbacks": {"EMA": {"ema_state_dict": weights(SD)}, "Other": weights(SD)}},
     {"state_dict": "main", "callbacks.EMA.ema_state_dict": "ema"}, "state_dict", ["ema-present"]),
    ("SWA of Lightning", {"pytorch-lightning_version": "2.6", "state_dict": weights(SD), "callbacks": {
        "StochasticWeightAveraging": {"n_averaged": spec(), "scheduler_state": {"last_epoch": 1},
                                      "average_model_state": weights(SD)}}},
     {"state_dict": "main", "callbacks.StochasticWeightAveraging.average_model_state": "ema"}, "state_dict",
     ["ema-present"]),
    ("a nameless average in a callback", {"pytorch-lightning_version": "1.5", "state_dict": weights(SD),
                                          "callbacks": {"EMA": {"ema_weights": [spec(2), spec(2)]}}},
     {"state_dict": "main"}, "state_dict", ["ema-nameless"]),
    ("a normalizer beside", {"state_dict": weights(SD), "normalizers": {"target": {"mean": spec(1), "std": spec(1)}}},
     {"state_dict": "main", "normalizers.target": "peer"}, "state_dict", ["others-present"]),
    ("list of dicts", [{"net": weights(SD)}], {"0.net": "main"}, "0.net", []),
    ("random states beside", {"model": weights(SD), "cpu_rng": spec(5056, dtype="uint8"),
                              "rng_state": {"cpu": spec(5056, dtype="uint8")}}, {"model": "main"}, "model", []),
    ("scores beside", {"model": weights(SD), "best": {"acc": scalar(0.9)}}, {"model": "main"}, "model", []),
    ("hyperparameters with tensors", {"model": weights(SD), "hyper_parameters": {"class_weights": spec(3)}},
     {"model": "main"}, "model", []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "found", "name", "notes"), [row[1:] for row in SELECTIONS], ids=[row[0] for row in SELECTIONS]
)
def test_selection(content: Any, found: dict[str, str], name: str, notes: list[str]) -> None:
    selection = chosen(content)
    assert selection.refusal is None
    assert roles(selection) == found
    assert selection.chosen.name == name
    assert codes(selection) == notes


BY_OPTION = [
    ("ema", "state_dict_ema"),
    ("raw", "state_dict"),
    ("main", "state_dict"),
    ("state_dict_ema", "state_dict_ema"),
    ("extra.buffers", "extra.buffers"),
    ("folds.1", "folds.1"),
]


@pytest.mark.parametrize(("selector", "name"), BY_OPTION)
def test_weights_option(selector: str, name: str) -> None:
    content = {"state_dict": weights(SD), "state_dict_ema": weights(SD), "extra": {"buffers": {"x": spec(2), "n": 3}}}
    content |= {"folds": {0: weights(SD), 1: weights(SD)}}
    assert chosen(content, selector).chosen.name == name


def test_swapped_roles_are_found_by_role() -> None:
    content = {"meta": {}, "message_hub": {}, "state_dict": weights(SD), "ema_state_dict": weights(["module.a.w"])}
    assert chosen(content, "ema").chosen.name == "state_dict"
    assert chosen(content, "raw").chosen.name == "ema_state_dict"


REFUSED_FILES: list[tuple[str, Any, str, str]] = [
    ("K05 peers", {"student": weights(SD), "teacher": weights(SD), "dino_loss": {"center": spec(1, 2)}}, "choose",
     ('several state dicts are equal candidates: choose with --weights student (2 tensors, 32 bytes, from "a.w") or '
     'teacher (2 tensors, 32 bytes, from "a.w")')),
    ("K07 ZeRO-3", {"module": {"a.w": spec(0)}, "ds_version": "0.14", "param_shapes": [{"a.w": (2, 2)}]}, "sharded",
     ('"a.w": only a placeholder, its values are in the ZeRO-3 files of all ranks; run zero_to_fp32.py in the '
     "checkpoint folder")),
    ("K08 Megatron chunks", {"model0": weights(SD), "model1": weights(SD), "args": None, "checkpoint_version": 3.0},
     "sharded", ('"model0", "model1": only a slice of the model (pipeline or tensor parallel); merge it '
     "with Megatron's tools")),
    ("Megatron tensor parallel", {"model": weights(SD), "checkpoint_version": 3.0,
                                  "args": stub("argparse.Namespace", tensor_model_parallel_size=2)},
     "sharded", '"model": only a slice'),
    ("fairseq shard", {"model": weights(SD), "extra_state": {}, "fsdp_metadata": {"x": 1}}, "sharded",
     "fsdp_metadata says that this is one FSDP shard: consolidate the shards with fairseq"),
    ("K09 nameless EMA", {"shadow_params": [spec(2), spec(2)], "decay": 0.999}, "nameless",
     "shadow_params is a list of tensors without names: use the model saved beside it"),
    ("K14 training arguments", stub("transformers.training_args.TrainingArguments", lr=0.1), "no-weights",
     ("no model weights in this file, it holds a pickled transformers.training_args.TrainingArguments: name the file "
     "with the state dict")),
    ("K14 optimizer", OPTIMIZER, "no-weights", "it holds the state of an optimizer"),
    ("K14 ZeRO shard", {"optimizer_state_dict": {"zero_stage": 2, "partition_count": 1, "x": [spec(2)]},
                        "ds_version": "1"}, "no-weights", "an optimizer shard of DeepSpeed ZeRO"),
    ("K14 BasicSR state", {"epoch": 1, "iter": 2, "optimizers": [OPTIMIZER], "schedulers": []}, "no-weights",
     "it holds a training state of BasicSR"),
    ("K14 scheduler", {"last_epoch": 3, "_last_lr": [0.1]}, "no-weights", "the state of a learning rate scheduler"),
    ("K14 scaler", {"scale": 65536.0, "growth_factor": 2.0}, "no-weights", "the state of a GradScaler"),
    ("K14 random states", {"python": (3, ()), "numpy": (), "cpu": spec(5056, dtype="uint8")}, "no-weights",
     "the states of random generators"),
    ("K15 tensor", spec(2), "no-weights", "it holds a bare tensor"),
    ("K15 list", [spec(2), spec(2)], "nameless", "the file holds a list of 2 tensors without names: save a state dict"),
    ("K15 number", 3, "no-weights", "it holds a value of type int"),
    ("empty", {}, "no-weights", "it holds an empty mapping"),
    ("settings only", {"lr": 0.1, "name": "x"}, "no-weights",
     'a mapping with the keys "lr", "name", none of them a state dict'),
    ("numbered tensors", {0: spec(2), 1: spec(2)}, "no-weights", 'a mapping with the keys "0", "1"'),
    ("one network for each fold", {0: weights(SD), 1: weights(SD)}, "choose", "--weights 0 (2 tensors, 32 bytes, from"),
    ("two mains", {"model": weights(SD), "net": weights(SD)}, "choose", "--weights model (2 tensors"),
    ("NeRF", {"network_fn_state_dict": weights(SD), "network_fine_state_dict": weights(SD)}, "choose", "network_fn"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "code", "text"), [row[1:] for row in REFUSED_FILES], ids=[row[0] for row in REFUSED_FILES]
)
def test_refused_file(content: Any, code: str, text: str) -> None:
    selection = chosen(content)
    assert selection.chosen is None
    assert selection.refusal.code == code
    assert text in selection.refusal.text


MISSING = [("ema", "no ema weights in this file"), ("nothing.here", 'no state dict at "nothing.here"')]


@pytest.mark.parametrize(("selector", "text"), MISSING)
def test_missing_weights(selector: str, text: str) -> None:
    refusal = chosen({"model": weights(SD), "epoch": 3}, selector).refusal
    assert refusal.code == "not-found"
    assert refusal.text == f'{text}: --weights takes model (2 tensors, 32 bytes, from "a.w")'


def test_two_averages_are_refused() -> None:
    refusal = chosen({"model": weights(SD), "ema": weights(SD), "model_ema": weights(SD)}, "ema").refusal
    assert refusal.code == "choose"
    assert "ema (2 tensors" in refusal.text


def test_the_node_of_a_selection_is_found_again() -> None:
    root = tree({"a": [{"net": weights(SD)}]})
    selection = select(checkpoint(root))
    assert node_at(root, selection.chosen.path) is root.get("a")[0].get("net")


def test_torch_metadata_goes_along() -> None:
    state = node(weights(SD), "OrderedDict")
    state.attributes = node({"_metadata": {"": {"version": 1}}})
    assert chosen({"model": state}).chosen.key_metadata.get("").get("version") == 1


# --- several sets of weights in one state dict ---


def test_k17_latent_diffusion_ema_gets_its_own_names_back() -> None:
    ema = spec(2, 2)
    content = {
        "pytorch-lightning_version": "1.4.2",
        "state_dict": {
            **weights(["model.diffusion_model.out.0.weight", "first_stage_model.w", "betas"]),
            "model_ema.diffusion_modelout0weight": ema,
            "model_ema.decay": spec(),
            "model_ema.num_updates": spec(),
        },
    }
    selection = chosen(content, "ema")
    assert selection.chosen.role == "ema"
    assert list(selection.chosen.entries) == ["model.diffusion_model.out.0.weight", "first_stage_model.w", "betas"]
    assert selection.chosen.entries["model.diffusion_model.out.0.weight"] is ema
    made = plan_keys(selection.chosen, selection.producer)
    assert made.already_clean
    assert made.is_ema


def test_k17_names_that_flatten_alike_give_no_ema() -> None:
    raw = ["model.input_blocks.11.0.w", "model.input_blocks.1.10.w"]
    selection = chosen({"state_dict": weights([*raw, "model_ema.input_blocks110w"])}, "ema")
    assert selection.refusal.code == "not-found"


def test_k18_mmcv_swaps_within_one_dict() -> None:
    raw = spec(2, 2)
    content = {"meta": {"mmcv_version": "1.7"}, "state_dict": {**weights(["a.b.weight", "c"]), "ema_a_b_weight": raw}}
    averaged, unaveraged = chosen(content).chosen, chosen(content, "raw").chosen
    assert (averaged.role, unaveraged.role) == ("ema", "raw")
    made = plan_keys(averaged, BARE)
    assert targets(made) == ["a.b.weight", "c", None]
    assert codes(made) == []
    assert made.is_ema
    assert unaveraged.entries["a.b.weight"] is raw
    assert targets(plan_keys(unaveraged, BARE)) == ["a.b.weight", "c"]


def test_k18_needs_every_twin() -> None:
    made = plan("a.b.weight", "ema_a_b_weight", "ema_other")
    assert targets(made) == ["a.b.weight", "ema_a_b_weight", "ema_other"]


def test_k19_latent_diffusion_keeps_model() -> None:
    made = plan("model.diffusion_model.w", "first_stage_model.w", "betas", producer=LIGHTNING)
    assert made.already_clean
    assert codes(made) == ["latent-diffusion"]


def test_k20_the_same_rules_hold_for_safetensors() -> None:
    content = weights(["ema_model.a.w", "initted", "step"])
    selection = select(checkpoint(content, "safetensors"))
    made = plan_keys(selection.chosen, selection.producer)
    assert targets(made) == ["a.w", None, None]
    assert made.is_ema


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_composer_says_which_weights_are_the_average(active: bool, nested: bool) -> None:
    model = {"named_parameters_dict": weights(["a"]), "named_buffers_dict": weights(["b"])} if nested else weights("ab")
    algorithms = [("LabelSmoothing", {}), ("EMA", {"ema_model": model, "ema_weights_active": active})]
    content = {"state": {"model": weights("ab"), "algorithms": algorithms}, "rng": []}
    main, other = ("ema", "raw") if active else ("main", "ema")
    selection = chosen(content)
    assert roles(selection) == {"state.model": main, "state.algorithms.1.1.ema_model": other}
    assert selection.chosen.name == "state.model"
    averaged = chosen(content, "ema").chosen
    assert averaged.name == ("state.model" if active else "state.algorithms.1.1.ema_model")
    assert list(averaged.entries) == ["a", "b"]


def test_an_ema_root_beside_model_is_a_candidate_of_its_own() -> None:
    content = {
        "pytorch-lightning_version": "2.0",
        "state_dict": weights(["model._orig_mod.a", "ema_model._orig_mod.a", "criterion.w"]),
    }
    main = chosen(content)
    assert codes(main) == ["ema-present"]
    assert targets(plan_keys(main.chosen, main.producer)) == ["a", None, None]
    averaged = chosen(content, "ema")
    made = plan_keys(averaged.chosen, averaged.producer)
    assert [(move.source, move.target) for move in made.moves] == [("ema_model._orig_mod.a", "a")]
    assert made.is_ema


# --- values that are no plain tensors ---


def test_v12_values_without_tensors_move_with_their_module() -> None:
    content = {
        "module.fc.scale": spec(),
        "module.fc.zero_point": spec(dtype="int64"),
        "module.fc._packed_params.dtype": BY_NAME["qint8"],
        "module.fc._packed_params._packed_params": (OpaqueTensor("quantized", "affine", None, (2, 2)), None),
        "module.fc._extra_state": {"amax": spec(3)},
        "module.fc.weight_format": "nf4",
        "module.fc.none": None,
    }
    selection = chosen(content)
    made = plan_keys(selection.chosen, selection.producer)
    assert targets(made) == [key.removeprefix("module.") for key in content]


def test_v14_the_order_of_the_file_is_kept() -> None:
    keys = ["module.z", "module.a", "module.m.0", "module.m"]
    assert targets(plan(*keys)) == ["z", "a", "m.0", "m"]


def test_v15_numpy_arrays_are_weights() -> None:
    array = replace(spec(2, 2), is_numpy=True)
    selection = chosen({"model": {"a.w": array}, "__author__": "x", "matching_heuristics": True})
    assert (selection.producer.name, selection.chosen.name) == ("Detectron2", "model")


def test_names_that_safetensors_keeps_in_the_metadata_are_present() -> None:
    made = replace(checkpoint(weights(["embed.weight"]), "safetensors"), metadata={"head.weight": "embed.weight"})
    entries = select(made).chosen.entries
    assert entries["head.weight"] is entries["embed.weight"]


# --- pickled modules ---


def module(name: str = "models.Net", **parts: Any) -> Stub:
    """Stand in for a pickled nn.Module."""
    fields = {"training": True, "_parameters": {}, "_buffers": {}, "_non_persistent_buffers_set": set(), "_modules": {}}
    return stub(name, **{**fields, **parts})


LINEAR = module("torch.nn.modules.linear.Linear", _parameters={"weight": spec(2, 2), "bias": None})
NORM = module(_buffers={"running_mean": spec(2), "cache": spec(2)}, _non_persistent_buffers_set={"cache"})
NET = module(_parameters={"scale": spec(1)}, _modules={"fc": LINEAR, "again": LINEAR, "norm": NORM, "none": None})
NET_KEYS = ["scale", "fc.weight", "again.weight", "norm.running_mean"]


def test_parameters_of_a_pickled_module() -> None:
    selection = chosen(NET)
    assert list(selection.chosen.entries) == NET_KEYS
    assert "models.Net" in selection.chosen.reason
    assert selection.producer.evidence == "a pickled models.Net"


def test_parameters_of_a_wrapped_module() -> None:
    compiled = Stub(stub("torch._dynamo.eval_frame.OptimizedModule").ref, args=(NET, None))
    parallel = module("torch.nn.parallel.data_parallel.DataParallel", _modules={"module": compiled})
    selection = chosen(parallel)
    assert list(selection.chosen.entries) == [f"module._orig_mod.{key}" for key in NET_KEYS]
    assert targets(plan_keys(selection.chosen, selection.producer)) == NET_KEYS


def test_k06_yolo_keeps_modules_as_values() -> None:
    selection = chosen({"epoch": -1, "best_fitness": 0.5, "model": None, "ema": NET, "updates": 3, "optimizer": None})
    assert selection.producer.name == "YOLOv5"
    assert (selection.chosen.name, selection.chosen.role) == ("ema", "ema")
    assert list(selection.chosen.entries) == NET_KEYS


def test_modules_that_nest_without_end_are_refused() -> None:
    loop = module()
    loop.state.get("_modules").pairs.append(("self", loop))
    with pytest.raises(UnreadableCheckpoint, match="nests modules without end: save its state_dict"):
        chosen(loop)


# --- producers ---

PRODUCERS: list[tuple[Any, str, str | None, str]] = [
    ({"pytorch-lightning_version": "2.6.6", "state_dict": {}}, "PyTorch Lightning", "2.6.6", "lightning"),
    ({"state_dict": {}, "epoch": 1, "global_step": 2, "hparams": {}}, "PyTorch Lightning", None, "lightning"),
    ({"state": {"model": {}, "run_name": "x"}, "rng": []}, "Composer", None, "composer"),
    ({"meta": {"mmengine_version": "0.10"}, "state_dict": {}}, "MMEngine", "0.10", ""),
    ({"meta": {"mmcv_version": "1.7"}, "state_dict": {}}, "MMCV", "1.7", ""),
    ({"module": {}, "ds_version": "0.14.0"}, "DeepSpeed", "0.14.0", ""),
    ({"module": {}, "ds_version": "0.14.0", "pytorch-lightning_version": "2"}, "DeepSpeed", "0.14.0", "lightning"),
    ({"model": {}, "checkpoint_version": 3.0}, "Megatron-LM", "3.0", ""),
    ({"model": {}, "extra_state": {}, "cfg": None}, "fairseq", None, ""),
    ({"model": {}, "iteration": 3, "optimizer": {}}, "Detectron2", None, ""),
    ({"model": None, "ema": {}, "train_args": {}, "version": "8.3"}, "Ultralytics", "8.3", ""),
    ({"state_dict": {}, "arch": "vit", "version": 2, "args": None}, "timm", None, ""),
    ({"state_dict": {}, "arch": "x", "epoch": 2, "best_acc1": 0.5}, "MoCo or ImageNet example", None, ""),
    ({"state_dict": {}, "name": "x", "epoch": 2}, "OpenCLIP", None, ""),
    ({"model": {}, "lr_scheduler": {}, "args": None, "epoch": 1}, "torchvision references", None, ""),
    ({"student": {}, "teacher": {}, "dino_loss": {}}, "DINO", None, ""),
    ({"params_ema": {}}, "BasicSR", None, ""),
    ({"step": 1, "model": {}, "ema": {}, "opt": {}, "version": "1.0"}, "denoising-diffusion-pytorch", "1.0", ""),
    ({"ema_model_state_dict": {}, "step": 3}, "F5-TTS", None, ""),
    ({"network_weights": {}, "trainer_name": "x"}, "nnU-Net", None, ""),
    ({"model": {}, "model_args": {}, "iter_num": 3}, "nanoGPT", None, ""),
    ({"pipeline": {}, "step": 3}, "nerfstudio", None, ""),
    ({"g": {}, "d": {}, "g_ema": {}}, "stylegan2-pytorch", None, ""),
    ({"a.w": None}, "torch.save", None, ""),
]


@pytest.mark.parametrize(("content", "name", "version", "container"), PRODUCERS, ids=[row[1] for row in PRODUCERS])
def test_producer(content: Any, name: str, version: str | None, container: str) -> None:
    producer = identify(checkpoint(content))
    assert (producer.name, producer.version, producer.container) == (name, version, container)
    assert producer.evidence


# --- training ---

LIGHTNING_FILE = {
    "epoch": 7,
    "global_step": 176,
    "pytorch-lightning_version": "2.6.6",
    "state_dict": weights(["model._orig_mod.a", "model.b"]),
    "callbacks": {
        "EarlyStopping{'monitor': 'x', 'mode': 'min'}": {"best_score": scalar(0.25)},
        "ModelCheckpoint{'monitor': 'val_acc', 'mode': 'max'}": {
            "monitor": "val_acc",
            "best_model_score": scalar(0.75),
            "current_score": scalar(0.5),
        },
    },
    "optimizer_states": [
        {
            "state": {},
            "param_groups": [{"lr": 0.125, "betas": (0.9, 0.99), "amsgrad": False, "decoupled_weight_decay": True}],
        }
    ],
    "hyper_parameters": {"compile_model": True, "lr": 0.5},
}


def facts(content: Any) -> Any:
    made = checkpoint(content)
    return read_training(made, select(made))


def test_lightning_training() -> None:
    training = facts(LIGHTNING_FILE)
    assert (training.epoch.value, training.epoch.evidence) == (7, "epoch")
    assert training.global_step.value == 176
    assert {name: fact.value for name, fact in training.metrics.items()} == {"val_acc": 0.5, "best_val_acc": 0.75}
    assert training.metrics["val_acc"].evidence.endswith(".current_score")
    assert (training.monitor.value, training.mode.value) == ("val_acc", "max")
    assert training.learning_rate.value == 0.125
    assert training.learning_rate.evidence == "optimizer_states.0.param_groups.0.lr"
    assert training.optimizer.value == "AdamW"
    assert training.versions["pytorch-lightning"].value == "2.6.6"
    assert (training.compiled.value, training.compiled.evidence) == (True, '"_orig_mod" is in 1 of 2 keys')
    assert training.strategy is training.ema is None
    assert training.hyper_parameters.text_items() == {"compile_model": True, "lr": 0.5}
    assert training.hyper_parameter_sources == ("hyper_parameters",)


FACTS: list[tuple[str, Any, str, Any, str]] = [
    ("settings say compiled", {"model": weights(SD), "config": {"compile": False}}, "compiled", False,
     "config.compile"),
    ("DDP by keys", weights(["module._orig_mod.a", "module.b"]), "strategy", "ddp",
     'every one of 2 keys lies below "module." (DataParallel or DDP)'),
    ("FSDP by keys", weights(["_fsdp_wrapped_module.a"]), "strategy", "fsdp",
     '"_fsdp_wrapped_module" is in 1 of 1 keys'),
    ("FSDP by values", {"a": OpaqueTensor("dtensor", "DTensor", None, (2,)), "b": spec(2)}, "strategy", "fsdp",
     "tensors are stored as DTensor"),
    ("DeepSpeed", {"module": weights(SD), "ds_version": "0.1"}, "strategy", "deepspeed", "keys module, ds_version"),
    ("strategy by settings", {"model": weights(SD), "args": stub("argparse.Namespace", strategy="ddp_spawn")},
     "strategy", "ddp_spawn", "args.strategy"),
    ("EMA by name", {"model": weights(SD), "model_ema": weights(SD)}, "ema", True,
     'the state dict at "model_ema" (its name says so)'),
    ("EMA by counter", {**weights(["module.a"]), "n_averaged": spec()}, "ema", True,
     'the counter "n_averaged" of an AveragedModel'),
    ("EMA by settings", {"model": weights(SD), "args": stub("argparse.Namespace", model_ema=False)}, "ema", False,
     "args.model_ema"),
    ("nanoGPT step", {"model": weights(SD), "iter_num": 2000}, "global_step", 2000, "iter_num"),
    ("mmengine epoch", {"state_dict": weights(SD), "meta": {"epoch": 12, "iter": 5}}, "epoch", 12, "meta.epoch"),
    ("epoch in a tensor", {"model": weights(SD), "epoch": scalar(3.0)}, "epoch", 3.0, "epoch"),
    ("SGD", {"model": weights(SD), "optimizer": {"state": {}, "param_groups": [
        {"lr": 0.5, "momentum": 0.9, "nesterov": False, "dampening": 0}]}}, "optimizer", "SGD",
     "optimizer.param_groups.0 has momentum, nesterov, dampening"),
    ("rate of a scheduler", {"model": weights(SD), "lr_schedulers": [{"_last_lr": [0.25]}]}, "learning_rate", 0.25,
     "the learning rate scheduler's _last_lr"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "name", "value", "evidence"), [row[1:] for row in FACTS], ids=[row[0] for row in FACTS]
)
def test_fact(content: Any, name: str, value: Any, evidence: str) -> None:
    fact = getattr(facts(content), name)
    assert (fact.value, fact.evidence) == (value, evidence)


def test_metrics_of_common_trainers() -> None:
    content = {
        "model": weights(SD),
        "epoch": 3,
        "best_acc1": scalar(0.5),
        "best_val_loss": 1.5,
        "metric": 77.5,
        "_best_ema": 0.25,
        "best_epoch": 2,
        "loss_scaler": {"scale": 2.0},
        "metrics": {"val/miou": 0.125, "name": "x", "loss_scale": 3.0},
    }
    found = {name: fact.value for name, fact in facts(content).metrics.items()}
    assert found == {"best_acc1": 0.5, "best_val_loss": 1.5, "metric": 77.5, "_best_ema": 0.25, "val/miou": 0.125}


@pytest.mark.parametrize("content", [weights(SD), [weights(SD)], NET, spec(2), {"epoch": None, "optimizer": 3}])
def test_a_file_that_says_nothing(content: Any) -> None:
    training = facts(content)
    assert training.epoch is training.global_step is training.learning_rate is training.optimizer is None
    assert not training.metrics
    assert training.hyper_parameters.pairs == []


def omega(name: str, **fields: Any) -> Stub:
    return stub(f"omegaconf.{name}", _metadata=None, _parent=None, **fields)


def any_node(value: Any) -> Stub:
    return omega("nodes.AnyNode", _val=value)


def test_configuration_objects_become_mappings() -> None:
    layers = omega("listconfig.ListConfig", _content=[any_node(1), any_node(2)])
    config = omega("dictconfig.DictConfig", _content={"lr": any_node(0.1), "layers": layers})
    path = Stub(stub("pathlib.PosixPath").ref, args=("/", "data", "x"))
    foreign = stub("my.project.Settings", depth=3)
    args = stub("argparse.Namespace", cfg=config, path=path, foreign=foreign)
    settings_found = facts({"model": weights(SD), "args": args}).hyper_parameters
    assert settings_found.get("cfg").text_items() == {"lr": 0.1, "layers": [1, 2]}
    assert settings_found.get("path") == "/data/x"
    assert settings_found.get("foreign") is foreign


def test_several_sources_keep_their_places() -> None:
    training = facts({"model": weights(SD), "model_args": {"n_layer": 2}, "config": {"compile": True}})
    assert training.hyper_parameter_sources == ("model_args", "config")
    assert training.hyper_parameters.get("n_layer") == 2
    assert training.hyper_parameters.get("config").get("compile") is True
    assert training.compiled.evidence == "config.compile"


def test_settings_that_hold_themselves_are_read_once() -> None:
    config = DictNode([("lr", 0.1)])
    config.pairs.append(("self", config))
    assert facts({"model": weights(SD), "config": config}).hyper_parameters.get("lr") == 0.1


# --- whatever a file may hold ---

NAMES = (
    "state_dict model ema callbacks state algorithms param_groups args _modules _parameters _buffers module a.w "
    "model_ema.w optimizer param_shapes ds_version meta epoch ema_model pytorch-lightning_version shadow_params "
    "best_model_score monitor _content lr_schedulers . .."
)
CLASSES = ("argparse.Namespace", "omegaconf.DictConfig", "a.OptimizedModule", "pathlib.PosixPath", "models.Net")
LEAVES = (None, 3, 0.5, "text", True, b"x", spec(2), scalar(0.5), OpaqueTensor("meta", "", None, None))


def grow(random: Random, depth: int = 4) -> Any:
    """Make a value tree of the names and classes that the layouts look for, in places where they do not belong."""

    def below() -> list[Any]:
        return [grow(random, depth - 1) for _ in range(random.randrange(4))]

    def mapping() -> DictNode:
        names = [*random.sample(NAMES.split(), 4), "", 7]
        return DictNode(list(zip(random.sample(names, 4), below(), strict=False)))

    def foreign() -> Stub:
        state = random.choice([mapping(), None, (None, mapping()), 3])
        return Stub(stub(random.choice(CLASSES)).ref, args=tuple(below()), state=state, pairs=mapping().pairs)

    if depth == 0:
        return random.choice(LEAVES)
    kinds = (mapping, mapping, below, lambda: tuple(below()), foreign, lambda: random.choice(LEAVES))
    return random.choice(kinds)()


@pytest.mark.parametrize("selector", ["main", "ema", "raw", "model", "a.w", "0.model"])
def test_any_content_is_described_or_refused(selector: str) -> None:
    for seed in range(300):
        describe_or_refuse(grow(Random(seed)), selector)


def describe_or_refuse(root: Any, selector: str) -> None:
    made = checkpoint(root)
    selection = select(made, selector)
    assert (selection.chosen is None) == (selection.refusal is not None)
    assert read_training(made, selection) is not None
    if selection.chosen is not None:
        try:
            made_plan = plan_keys(selection.chosen, selection.producer)
        except PlanRefused:
            return
        assert [move.source for move in made_plan.moves] == list(selection.chosen.entries)
