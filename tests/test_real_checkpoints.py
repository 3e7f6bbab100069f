"""Checkpoints as trainers and frameworks leave them, through the command line; torch and the plain model judge."""

from __future__ import annotations

import argparse
import copy
import json
import re
import shlex
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.networks import Net
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ckptool
from ckptool.errors import CkptoolError

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Say what a file holds and which tensors are right: of the main, the averaged and the raw weights."""

    content: Any
    clean: Tensors
    ema: Tensors = field(default_factory=dict)
    raw: Tensors = field(default_factory=dict)
    save: Mapping[str, Any] = field(default_factory=dict)


def seeded(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net()


def below(path: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    return {f"{path}.{name}": value for name, value in tensors.items()}


NET, AVERAGE = seeded(0), seeded(1)
SD, EMA = NET.state_dict(), AVERAGE.state_dict()


def trained() -> dict[str, Any]:
    net = copy.deepcopy(NET)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.125)
    net(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


OPT = trained()
ARGS = argparse.Namespace(lr=0.1, arch="net", compile=True, out=Path("/runs/x"))


def averaged() -> AveragedModel:
    model = AveragedModel(AVERAGE)
    model.n_averaged += 5
    return model


def lucidrains(**copies: Tensors) -> dict[str, torch.Tensor]:
    """Build what ``EMA.state_dict()`` of ema-pytorch gives."""
    state = {"initted": torch.tensor([True]), "step": torch.tensor([7])}
    for name, tensors in copies.items():
        state |= below(name, tensors)
    return state


def latent_diffusion() -> Case:
    raw = below("model.diffusion_model", {"in.0.w": torch.ones(2), "mid.w": torch.zeros(3)})
    beside = {"first_stage_model.w": torch.ones(3), "betas": torch.ones(3)}
    flat = {"model_ema.diffusion_modelin0w": torch.ones(2) * 2, "model_ema.diffusion_modelmidw": torch.ones(3) * 3}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(4)}
    content = lightning_like({**raw, **beside, **flat, **counters})
    average = dict(zip(raw, flat.values(), strict=True))
    return Case(content, content["state_dict"], ema={**average, **beside})


def lightning_like(state: Tensors) -> dict[str, Any]:
    return {
        "state_dict": OrderedDict(state), "epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.1.0",
        "callbacks": {}, "loops": {}, "optimizer_states": [OPT], "lr_schedulers": [],
    }  # fmt: skip


class Extra(nn.Linear):
    """Keep an extra state: a mapping with a tensor in it, bytes, or nothing."""

    def __init__(self, state: Any) -> None:
        super().__init__(2, 2)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


EXTRA = nn.Sequential(Extra({"scale": torch.ones(2)}), Extra(b"abc"), Extra(None), Extra(torch.arange(3)))


class Tied(nn.Module):
    """Share the embedding with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.lm_head.weight = self.embed.weight


def only_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def normed() -> nn.Module:
    net = copy.deepcopy(NET)
    nn.utils.parametrizations.weight_norm(net.head)
    nn.utils.parametrizations.spectral_norm(net.attn_module)
    return net


def dynamic_ints() -> dict[str, Any]:
    """Give numbers as NumPy scalars and arrays, which many trainers leave in a file."""
    return {"epoch": np.int64(3), "val_loss": np.float32(0.5), "history": np.arange(5.0), "names": np.array(["a", "b"])}


ZIP, LEGACY = {}, {"_use_new_zipfile_serialization": False}

CASES: dict[str, Callable[[], Case]] = {
    "ImageNet example": lambda: Case(
        {"epoch": 3, "arch": "resnet18", "state_dict": nn.DataParallel(NET).state_dict(),
         "best_acc1": torch.tensor(71.5), "optimizer": OPT}, SD,
    ),
    "ImageNet example before torch 1.6": lambda: Case(
        {"epoch": 3, "arch": "x", "state_dict": below("module", SD), "optimizer": OPT, "args": ARGS}, SD, save=LEGACY
    ),
    "torchvision references": lambda: Case(
        {"model": SD, "optimizer": OPT, "lr_scheduler": {"last_epoch": 4, "_last_lr": [0.1]}, "epoch": 4, "args": ARGS,
         "model_ema": averaged().state_dict(), "scaler": {"scale": 65536.0, "growth_factor": 2.0}}, SD, ema=EMA,
    ),
    "timm": lambda: Case(
        {"epoch": 4, "arch": "resnet18", "state_dict": SD, "optimizer": OPT, "version": 2, "args": ARGS,
         "state_dict_ema": EMA, "metric": 78.5}, SD, ema=EMA,
    ),
    "nanoGPT": lambda: Case(
        {"model": below("module._orig_mod", SD), "optimizer": OPT, "model_args": {"n_layer": 2}, "iter_num": 20,
         "best_val_loss": torch.tensor(1.5), "config": {"compile": True}}, SD,
    ),
    "MMEngine with EMAHook": lambda: Case(
        {"meta": {"epoch": 12, "iter": 9, "mmengine_version": "0.10"}, "state_dict": EMA, "message_hub": {},
         "optimizer": OPT, "ema_state_dict": {"steps": torch.tensor(5), **below("module", SD)}}, EMA, raw=SD,
    ),
    "MMCV with EMAHook": lambda: Case(
        {"meta": {"mmcv_version": "1.7", "epoch": 1}, "optimizer": OPT,
         "state_dict": {**EMA, **{"ema_" + name.replace(".", "_"): value for name, value in SD.items()}}}, EMA, raw=SD,
    ),
    "fairseq": lambda: Case(
        {"args": None, "cfg": {"task": {"data": "x"}}, "model": SD, "criterion": {}, "task_state": {},
         "optimizer_history": [{"num_updates": 10}], "last_optimizer_state": OPT,
         "extra_state": {"train_iterator": {"epoch": 3}, "val_loss": 2.5, "ema": EMA}}, SD, ema=EMA,
    ),
    "DeepSpeed": lambda: Case(
        {"module": SD, "buffer_names": [], "optimizer": None, "ds_config": {}, "ds_version": "0.14", "global_steps": 9,
         "param_shapes": [OrderedDict((name, value.shape) for name, value in NET.named_parameters())]}, SD,
    ),
    "DeepSpeed under Lightning": lambda: Case(
        {"module": below("_forward_module.model", SD), "ds_version": "0.14", "ds_config": {}, "param_shapes": None,
         "epoch": 2, "global_step": 9, "pytorch-lightning_version": "2.0"}, SD,
    ),
    "Megatron-LM, one rank": lambda: Case(
        {"args": argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1), "iteration": 10,
         "checkpoint_version": 3.0, "model": SD, "optimizer": OPT}, SD,
    ),
    "Composer": lambda: Case(
        {"state": {"model": below("model", SD), "optimizers": {"AdamW": OPT}, "algorithms": [], "run_name": "r",
                   "timestamp": {"epoch": 3, "batch": 30}}, "rng": [{"torch": torch.get_rng_state()}]}, SD,
    ),
    "YOLOv5, trained to the end": lambda: Case(
        {"epoch": -1, "best_fitness": 0.5, "model": copy.deepcopy(NET).half(), "ema": None, "optimizer": None},
        copy.deepcopy(NET).half().state_dict(),
    ),
    "Ultralytics, in training": lambda: Case(
        {"epoch": 3, "best_fitness": 0.5, "model": None, "ema": copy.deepcopy(AVERAGE).half(), "optimizer": OPT,
         "train_args": {"lr0": 0.01}, "version": "8.2.0"}, copy.deepcopy(AVERAGE).half().state_dict(),
    ),
    "RT-DETR": lambda: Case(
        {"last_epoch": 71, "model": SD, "optimizer": OPT, "ema": {"module": EMA, "updates": 100}}, SD, ema=EMA
    ),
    "BasicSR": lambda: Case({"params": SD, "params_ema": EMA}, SD, ema=EMA),
    "denoising-diffusion": lambda: Case(
        {"step": 100, "model": SD, "opt": OPT, "scaler": None, "version": "2.2",
         "ema": lucidrains(online_model=SD, ema_model=EMA)}, SD, ema=EMA,
    ),
    "F5-TTS": lambda: Case(
        {"model_state_dict": SD, "ema_model_state_dict": lucidrains(ema_model=EMA), "optimizer_state_dict": OPT,
         "update": 5}, SD, ema=EMA,
    ),
    "latent diffusion": latent_diffusion,
    "nnU-Net": lambda: Case(
        {"network_weights": SD, "optimizer_state": OPT, "logging": {"mean_fg_dice": [np.float64(0.5)]},
         "_best_ema": np.float64(0.75), "current_epoch": 100, "init_args": {"fold": 0}, "trainer_name": "t"}, SD,
    ),
    "DINOv2 for evaluation": lambda: Case({"teacher": below("backbone", SD)}, below("backbone", SD)),
    "shadow parameters beside": lambda: Case(
        {"model": SD, "ema": {"decay": 0.9, "shadow_params": [value.detach() for value in AVERAGE.parameters()]}}, SD
    ),
    "stochastic weight averaging": lambda: Case(
        {"state_dict": SD, "swa_state_dict": averaged().state_dict(), "swa_n": 3}, SD, ema=EMA
    ),
    "a network without a usual name": lambda: Case({"my_net": SD, "epoch": 3}, SD),
    "a loss beside a network without a usual name": lambda: Case(
        {"my_net": SD, "arc_loss": {"centers": torch.ones(3)}}, SD
    ),
    "a tuple": lambda: Case((SD, OPT, 3), SD),
    "a Llama in a LightningModule": lambda: Case(
        lightning_like(below("model", {**below("model", SD), "lm_head.weight": torch.ones(2, 2)})),
        {**below("model", SD), "lm_head.weight": torch.ones(2, 2)},
    ),
    "a YOLO in a LightningModule": lambda: Case(lightning_like(below("model.model", SD)), below("model", SD)),
    "averaged": lambda: Case(averaged().state_dict(), EMA),
    "averaged and compiled": lambda: Case(AveragedModel(torch.compile(NET)).state_dict(), SD),
    "a whole averaged model": lambda: Case(averaged(), EMA),
    "a whole model": lambda: Case(NET, SD),
    "a whole model before torch 1.6": lambda: Case(NET, SD, save=LEGACY),
    "a whole parallel model": lambda: Case({"epoch": 3, "model": nn.DataParallel(NET), "optimizer": OPT}, SD),
    "a whole compiled model": lambda: Case(torch.compile(NET), SD),
    "extra states": lambda: Case({"model": torch.compile(EXTRA).state_dict()}, only_tensors(EXTRA.state_dict())),
    "parametrizations": lambda: Case(torch.compile(NORMED).state_dict(), NORMED.state_dict()),
    "tied weights": lambda: Case({"model": torch.compile(TIED).state_dict()}, TIED.state_dict()),
    "NumPy values": lambda: Case({"model": SD, **dynamic_ints()}, SD),
    "NumPy weights": lambda: Case({"model": {name: value.numpy() for name, value in SD.items()}}, SD),
    **{
        f"pickle protocol {protocol}{', before torch 1.6' if way else ''}": lambda protocol=protocol, way=way: Case(
            {"model": SD, "optimizer": OPT, "args": ARGS}, SD, save={"pickle_protocol": protocol, **way}
        )
        for protocol in (3, 4, 5)
        for way in (ZIP, LEGACY)
    },
}  # fmt: skip
TIED, NORMED = Tied(), normed()


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read with torch or safetensors, tied names from the metadata included."""
    if path.suffix != ".safetensors":
        return only_tensors(torch.load(path, weights_only=True))
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return tensors | {name: tensors[kept] for name, kept in metadata.items() if kept in tensors}


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert set(found) == set(wanted)
    assert [name for name, value in wanted.items() if found[name].dtype != value.dtype] == []
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


def saved(case: Case, tmp_path: Path) -> Path:
    path = tmp_path / "it.pth.tar"
    torch.save(case.content, path, **case.save)
    return path


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param()


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_the_plain_model_gets_its_tensors(case: Case, name: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    ran = run("convert", saved(case, tmp_path), tmp_path / name)
    assert ran.status == 0, ran.err
    assert_same(read(tmp_path / name), case.clean)


def test_the_other_weights_on_request(case: Case, tmp_path: Path, run: Callable[..., Any]) -> None:
    path = saved(case, tmp_path)
    for role, wanted in {"ema": case.ema, "raw": case.raw}.items():
        if wanted:
            ran = run("convert", path, tmp_path / f"{role}.safetensors", "--weights", role)
            assert ran.status == 0, ran.err
            assert_same(read(tmp_path / f"{role}.safetensors"), wanted)


def test_a_kept_container_stays_clean(case: Case, tmp_path: Path, run: Callable[..., Any]) -> None:
    """What --keep-rest wrote is read as what it is: names that were cleaned are not cleaned again."""
    ran = run("strip-prefixes", saved(case, tmp_path), tmp_path / "kept.pt", "--keep-rest", "--foreign", "fields")
    if "other weights lie in the same mapping" in ran.err:
        return
    assert ran.status == 0, ran.err
    torch.load(tmp_path / "kept.pt", weights_only=True)
    ran = run("convert", tmp_path / "kept.pt", tmp_path / "again.pt")
    assert ran.status == 0, ran.err
    assert_same(read(tmp_path / "again.pt"), case.clean)
    assert run("strip-prefixes", tmp_path / "kept.pt", tmp_path / "kept2.pt", "--keep-rest").status == 0
    assert (tmp_path / "kept2.pt").read_bytes() == (tmp_path / "kept.pt").read_bytes()


def inspected(path: Path, run: Callable[..., Any]) -> dict[str, Any]:
    ran = run("inspect", path, "--json")
    assert ran.status == 0, ran.err
    return json.loads(ran.out)


def run_next(path: Path, run: Callable[..., Any]) -> Any:
    program, *words = shlex.split(inspected(path, run)["next"])
    assert program == "ckptool"
    return run(*words)


def test_the_next_command_runs(case: Case, tmp_path: Path, run: Callable[..., Any]) -> None:
    path = saved(case, tmp_path)
    ran = run_next(path, run)
    assert ran.status == 0, ran.err
    assert not any(".pth." in other.name for other in tmp_path.iterdir() if not other.name.endswith(".pth.tar"))


# --- what must be refused, and the option that settles it ---


@dataclass(frozen=True)
class Refused:
    """Say what a file holds, a part of the refusal, and which options settle it how."""

    content: Any
    says: str
    options: tuple[str, ...] = ()
    gives: Tensors = field(default_factory=dict)


def quantized() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8).state_dict()


SCALES = {f"{index}.{name}": value for index in (0, 2) for name, value in
          {"scale": torch.tensor(1.0), "zero_point": torch.tensor(0)}.items()}  # fmt: skip
PACKED = tuple(f"--exclude={index}._packed_params._packed_params" for index in (0, 2))

REFUSED: dict[str, Callable[[], Refused]] = {
    "DINO": lambda: Refused(
        {"student": below("module", SD), "teacher": EMA, "dino_loss": {"center": torch.zeros(1, 9)}, "optimizer": OPT},
        "choose with --weights student (18 tensors, 328 bytes, from \"module.embed.weight\") or teacher (",
        ("--weights", "teacher"), EMA,
    ),
    "a classifier beside an encoder": lambda: Refused(
        {"encoder": SD, "classifier": EMA}, "--weights encoder", ("--weights", "classifier"), EMA
    ),
    "a nested state dict": lambda: Refused(
        {"args": argparse.Namespace(tensor_model_parallel_size=1), "checkpoint_version": 3.0,
         "model": {"embedding": {"weight": torch.ones(4, 3)}, "encoder": SD}},
        "choose with --weights model.embedding (1 tensor, 48 bytes", ("--weights", "model.encoder"), SD,
    ),
    "MoCo": lambda: Refused(
        {"epoch": 3, "arch": "r50", "optimizer": OPT, "state_dict": {
            **below("module.encoder_q", SD), **below("module.encoder_k", EMA), "module.queue": torch.ones(3)}},
        "--select module.encoder_q", ("--select", "module.encoder_q"), SD,
    ),
    "a teacher in a LightningModule": lambda: Refused(
        lightning_like({**below("model", SD), **below("teacher", EMA), "criterion.weight": torch.ones(2)}),
        '"model", "teacher" lie side by side in one state dict: choose with --select model or --select teacher, or',
        ("--select", "teacher"), EMA,
    ),
    "an EMA with both copies": lambda: Refused(
        lucidrains(online_model=SD, ema_model=EMA), "--select ema_model", ("--select", "ema_model"), EMA
    ),
    "ZeRO-3": lambda: Refused(
        {"module": {name: torch.empty(0) for name in SD}, "ds_version": "0.14", "param_shapes": [
            OrderedDict((name, value.shape) for name, value in NET.named_parameters())]}, "run zero_to_fp32.py",
    ),
    "Megatron-LM pipeline": lambda: Refused(
        {"args": argparse.Namespace(), "checkpoint_version": 3.0, "model0": SD, "model1": EMA},
        '"model0", "model1": only a slice of the model',
    ),
    "shadow parameters": lambda: Refused({"decay": 0.9, "shadow_params": [torch.ones(2)]}, "without names"),
    "an optimizer": lambda: Refused(OPT, "it holds the state of an optimizer"),
    "dynamically quantized": lambda: Refused(
        quantized(), '"0._packed_params._packed_params", "2._packed_params._packed_params": quantized', PACKED, SCALES
    ),
    "half precision packed": lambda: Refused(
        {"model": {"fc.scale": torch.ones(1), "fc._packed_params": (torch.ones(2, 2).half(), torch.ones(2))}},
        '"fc._packed_params": holds tensors inside, which a safetensors file cannot, but a .pt file can; ',
        ("--exclude", "fc._packed_params"), {"fc.scale": torch.ones(1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_a_refusal_names_what_settles_it(make: Callable[[], Refused], tmp_path: Path, run: Callable[..., Any]) -> None:
    refused = make()
    path, out = tmp_path / "it.pt", tmp_path / "out.safetensors"
    torch.save(refused.content, path)
    ran = run("convert", path, out)
    assert (ran.status, refused.says in ran.err, out.exists()) == (2, True, False), ran.err
    assert run_next(path, run).status == 0
    if refused.options:
        assert run("convert", path, out, *refused.options).status == 0
        assert_same(read(out), refused.gives)


def test_a_tuple_of_tensors_stays_in_a_torch_file(tmp_path: Path, run: Callable[..., Any]) -> None:
    torch.save({"fc.scale": torch.ones(1), "fc.packed": (torch.ones(2, 2), None)}, tmp_path / "it.pt")
    assert run("strip-prefixes", tmp_path / "it.pt", tmp_path / "out.pt").status == 0
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(written["fc.packed"][0], torch.ones(2, 2))


def test_a_loaded_state_dict_is_whole_or_refused(tmp_path: Path) -> None:
    torch.save(quantized(), tmp_path / "it.pt")
    with pytest.raises(CkptoolError, match=re.escape('"0._packed_params._packed_params", ')):
        ckptool.load_state_dict(tmp_path / "it.pt")
    assert_same(ckptool.load_state_dict(tmp_path / "it.pt", exclude=("*_packed_params._packed_params",)), SCALES)


# --- what inspect says ---


def test_facts_of_a_timm_file(tmp_path: Path, run: Callable[..., Any]) -> None:
    facts = inspected(saved(CASES["timm"](), tmp_path), run)
    assert facts["producer"]["name"] == "timm"
    assert {entry["path"]: entry["role"] for entry in facts["state_dicts"]} == {
        "state_dict": "main",
        "state_dict_ema": "ema",
    }
    assert facts["training"]["metrics"]["metric"] == 78.5
    assert facts["hyper_parameters"] == {"lr": 0.1, "arch": "net", "compile": True, "out": "/runs/x"}
    assert facts["safety"]["verdict"] == "clean"


@pytest.mark.parametrize("name", ["MMEngine with EMAHook", "MMCV with EMAHook", "torchvision references"])
def test_a_second_copy_is_told_once(name: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    notes = [note["text"] for note in inspected(saved(CASES[name](), tmp_path), run)["notes"]]
    assert sum("--weights" in text for text in notes) == 1


def test_quantized_entries_are_announced(tmp_path: Path, run: Callable[..., Any]) -> None:
    torch.save(quantized(), tmp_path / "it.pt")
    (note,) = inspected(tmp_path / "it.pt", run)["notes"]
    assert note["text"] == "2 of 8 entries hold quantized tensors: a .pt file keeps them, --dequantize gives float32"


@pytest.fixture
def settings_class(monkeypatch: pytest.MonkeyPatch) -> type:
    """Give a mapping under the name of addict's, which pickles its pairs one by one."""
    module = ModuleType("addict")
    kind = type("Dict", (dict,), {"__module__": "addict"})
    module.Dict = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "addict", module)
    return kind


def test_nested_settings_keep_their_own_values(settings_class: type, tmp_path: Path, run: Callable[..., Any]) -> None:
    def nested(value: Any) -> Any:
        if isinstance(value, dict):
            return settings_class({name: nested(child) for name, child in value.items()})
        return [nested(child) for child in value] if isinstance(value, list) else value

    settings = {f"stage{index}": {"width": index, "blocks": [{"depth": index}, {"stride": 2}]} for index in range(8)}
    torch.save({"model": SD, "config": nested(settings)}, tmp_path / "it.pt")
    assert inspected(tmp_path / "it.pt", run)["hyper_parameters"] == settings


def test_a_network_among_the_settings_shows_its_settings_only(tmp_path: Path, run: Callable[..., Any]) -> None:
    settings = {"net": NET, "loss": nn.CrossEntropyLoss(label_smoothing=0.25), "lr": 0.5}
    torch.save({"model": SD, "hyper_parameters": settings}, tmp_path / "it.pt")
    shown = inspected(tmp_path / "it.pt", run)["hyper_parameters"]
    assert shown["net"] == {"$class": f"{Net.__module__}.Net"}
    assert shown["loss"].items() >= {"label_smoothing": 0.25, "reduction": "mean"}.items()
    assert "_modules" not in shown["loss"]


# --- files of the frameworks themselves ---


def fit(module: Any, folder: Path) -> Path:
    """Train for one epoch under Lightning and give the file of its ModelCheckpoint."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.tensor([0, 1] * 4))
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, "it")],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    return folder / "it.ckpt"


@cache
def lightning_class() -> type:
    import lightning

    class Lit(lightning.LightningModule):
        """Train whatever stands under ``attribute``, with a weighted loss beside it."""

        def __init__(self, attribute: str = "model", **settings: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            setattr(self, attribute, Net())
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(2))

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            out = getattr(self, self.hparams["attribute"])(batch[0])
            for metric in (child for child in self.children() if hasattr(child, "compute_groups")):
                metric(out.detach().softmax(-1), batch[1])
            return self.criterion(out, batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.125)

    return Lit


@pytest.fixture
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("quiet")
def test_torchmetrics_states_stay_behind(tmp_path: Path, run: Callable[..., Any]) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    module = lightning_class()()
    classes = torchmetrics.classification
    module.scores = torchmetrics.MetricCollection(
        {"f1": classes.MulticlassF1Score(2), "auroc": classes.MulticlassAUROC(2, thresholds=5)}
    )
    module.best = torchmetrics.MinMetric()
    for metric in (module.scores, module.best):
        metric.persistent(True)
    path = fit(module, tmp_path)
    ran = run("convert", path, tmp_path / "out.safetensors")
    assert ran.status == 0, ran.err
    state = torch.load(path, weights_only=True)["state_dict"]
    assert any(name.startswith("scores.auroc") for name in state)
    assert_same(read(tmp_path / "out.safetensors"), {name: state[f"model.{name}"] for name in SD})


@pytest.mark.usefixtures("quiet")
def test_another_attribute_than_model_is_pointed_at(tmp_path: Path, run: Callable[..., Any]) -> None:
    path = fit(lightning_class()("net"), tmp_path)
    (note,) = inspected(path, run)["notes"]
    assert note["text"] == (
        'the network seems to be "net.", beside "criterion": --select net takes it alone, without the prefix'
    )
    assert run("strip-prefixes", path, tmp_path / "out.pt", "--select", "net").status == 0
    Net().load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))


@pytest.mark.usefixtures("quiet")
def test_omegaconf_settings_are_shown_as_data(tmp_path: Path, run: Callable[..., Any]) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    settings = omegaconf.OmegaConf.create({"net": {"widths": [1, 2, None]}, "path": None, "compile": True})
    path = fit(lightning_class()(cfg=settings), tmp_path)
    facts = inspected(path, run)
    assert facts["hyper_parameters"]["cfg"] == {"net": {"widths": [1, 2, None]}, "path": None, "compile": True}
    assert facts["safety"]["verdict"] == "clean"


@pytest.mark.usefixtures("quiet")
def test_fabric_compiled(tmp_path: Path, run: Callable[..., Any]) -> None:
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    net = Net()
    module = fabric.setup_module(torch.compile(net))
    fabric.save(tmp_path / "fabric.ckpt", {"model": module, "iter": 3})
    torch.save(dict(module.named_parameters()), tmp_path / "named.pt")
    for name, wanted in {"fabric.ckpt": net.state_dict(), "named.pt": dict(net.named_parameters())}.items():
        assert run("convert", tmp_path / name, tmp_path / f"{name}.safetensors").status == 0
        assert_same(read(tmp_path / f"{name}.safetensors"), wanted)


ACCELERATE_REST = {
    "optimizer.bin": "the state of an optimizer",
    "scheduler.bin": "the state of a learning rate scheduler",
    "random_states_0.pkl": "none of them a state dict",
}


@pytest.mark.usefixtures("quiet")
def test_accelerate_save_state(tmp_path: Path, run: Callable[..., Any]) -> None:
    from accelerate import Accelerator

    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    accelerator = Accelerator(cpu=True)
    model, *_ = accelerator.prepare(net, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(model, str(tmp_path / "model"))
    for folder in ("state", "model"):
        assert run("convert", tmp_path / folder / "model.safetensors", tmp_path / f"{folder}.pt").status == 0
        assert_same(read(tmp_path / f"{folder}.pt"), net.state_dict())
    for name, says in ACCELERATE_REST.items():
        ran = run("convert", tmp_path / "state" / name, tmp_path / "no.pt")
        assert (ran.status, says in ran.err) == (2, True), ran.err


def llama() -> nn.Module:
    import transformers

    settings = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **settings))


def gpt2() -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    )


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "tied gpt2"])
def test_transformers(make: Callable[[], nn.Module], tmp_path: Path, run: Callable[..., Any]) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    assert run("convert", tmp_path / "model.safetensors", tmp_path / "hub.pt").status == 0
    assert_same(read(tmp_path / "hub.pt"), load_file(tmp_path / "model.safetensors"))
    forms = {
        "bare": model.state_dict(),
        "compiled": {"model": torch.compile(model).state_dict()},
        "lightning": lightning_like(below("model", model.state_dict())),
        "whole": model,
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / f"{name}.ckpt")
        ran = run("convert", tmp_path / f"{name}.ckpt", tmp_path / f"{name}.safetensors")
        assert ran.status == 0, ran.err
        assert_same(read(tmp_path / f"{name}.safetensors"), model.state_dict())


@pytest.mark.usefixtures("quiet")
def test_training_arguments_of_transformers(tmp_path: Path, run: Callable[..., Any]) -> None:
    import transformers

    path = tmp_path / "training_args.bin"
    torch.save(transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]), path)
    ran = run("convert", path, tmp_path / "no.pt")
    assert (ran.status, "TrainingArguments" in ran.err) == (2, True), ran.err
    facts = inspected(path, run)
    named = {entry["name"]: entry["severity"] for entry in facts["safety"]["globals"]}
    assert named["transformers.training_args.TrainingArguments"] == "unknown"
    assert facts["safety"]["verdict"] == "unknown"


@pytest.fixture
def process_group(tmp_path: Path) -> Any:
    """Be the only rank of a group."""
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("quiet", "process_group")
def test_fsdp2_on_one_rank_is_whole(tmp_path: Path, run: Callable[..., Any]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = Net()
    wanted = {name: value.clone() for name, value in net.state_dict().items()}
    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    torch.save({"model": net.state_dict(), "epoch": 1}, tmp_path / "it.pt")
    assert run("convert", tmp_path / "it.pt", tmp_path / "out.safetensors").status == 0
    assert_same(read(tmp_path / "out.safetensors"), wanted)
    assert run("strip-prefixes", tmp_path / "it.pt", tmp_path / "kept.pt", "--keep-rest").status == 0
    assert_same(torch.load(tmp_path / "kept.pt", weights_only=True)["model"], wanted)


@pytest.mark.usefixtures("quiet", "process_group")
def test_distributed_data_parallel(tmp_path: Path, run: Callable[..., Any]) -> None:
    from torch.nn.parallel import DistributedDataParallel

    net = Net()
    for name, content in {
        "outside": {"model": DistributedDataParallel(torch.compile(net)).state_dict()},
        "inside": torch.compile(DistributedDataParallel(net)).state_dict(),
        "whole": DistributedDataParallel(net),
    }.items():
        torch.save(content, tmp_path / f"{name}.pt")
        assert run("convert", tmp_path / f"{name}.pt", tmp_path / f"{name}.safetensors").status == 0
        assert_same(read(tmp_path / f"{name}.safetensors"), net.state_dict())


# --- what a terminal shows ---


def test_the_next_command_stands_on_one_line(tmp_path: Path, run: Callable[..., Any]) -> None:
    path = tmp_path / ("a long name with blanks " * 4) / "last.ckpt"
    path.parent.mkdir()
    torch.save({"model": below("_orig_mod", SD)}, path)
    view = run("inspect", path, "--color", "always").out
    assert inspected(path, run)["next"] in view


def test_a_network_of_one_layer_has_a_first_and_a_last(tmp_path: Path, run: Callable[..., Any]) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "it.pt")
    lines = [line.split("\t")[:2] for line in run("inspect", tmp_path / "it.pt").out.splitlines()]
    assert [line for line in lines if line[0] == "layer"] == [["layer", "first"], ["layer", "last"]]
