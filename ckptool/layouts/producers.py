"""What wrote a checkpoint: one row per producer, with the keys that give it away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptool.layouts.modules import is_module
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.plans import Producer, Role
from ckptool.model.values import DictNode, Stub


@dataclass(frozen=True, slots=True)
class Layout:
    """Describe one producer's file.

    All of ``needs`` and one of ``any_of`` (dotted paths from the root) must be there. ``version`` is the path of
    its version. ``roles`` overrides what the names of the state dicts seem to say; its first path is the main one.
    """

    name: str
    needs: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    version: str = ""
    container: str = ""
    roles: Mapping[str, Role] = field(default_factory=dict)


_LIGHTNING = "PyTorch Lightning"
_LIGHTNING_VERSION = "pytorch-lightning_version"

# The first row that fits wins. Sources: lightning/pytorch/callbacks/weight_averaging.py (the average is what
# state_dict holds), mmengine/hooks/ema_hook.py (_swap_ema_state_dict), mmcv/runner/hooks/ema.py,
# composer/core/state.py, deepspeed/runtime/engine.py, megatron/training/checkpointing.py, fairseq/trainer.py,
# fvcore/common/checkpoint.py, timm/utils/checkpoint_saver.py, torchvision references, basicsr/models/base_model.py,
# dino/main_dino.py, moco/main_lincls.py, open_clip, nanoGPT/train.py, nnUNetTrainer.py.
LAYOUTS = (
    Layout(
        _LIGHTNING,
        ("state_dict", "current_model_state", "averaging_state"),
        version=_LIGHTNING_VERSION,
        container="lightning",
        roles={"state_dict": "ema", "current_model_state": "raw"},
    ),
    Layout(_LIGHTNING, ("state_dict", _LIGHTNING_VERSION), version=_LIGHTNING_VERSION, container="lightning"),
    Layout(
        _LIGHTNING,
        ("state_dict", "epoch", "global_step"),
        (
            "hparams",
            "module_arguments",
            "checkpoint_callback_best",
            "checkpoint_callback_best_model_score",
            "early_stop_callback_wait",
            "callbacks",
            "optimizer_states",
            "lr_schedulers",
        ),
        container="lightning",
    ),
    Layout(
        "Composer",
        ("state.model",),
        ("rng", "state.timestamp", "state.run_name"),
        version="state.metadata.composer_env_info.composer_version",
        container="composer",
    ),
    Layout(
        "MMEngine",
        ("state_dict", "meta", "ema_state_dict"),
        ("message_hub", "meta.mmengine_version"),
        version="meta.mmengine_version",
        roles={"state_dict": "ema", "ema_state_dict": "raw"},
    ),
    Layout(
        "MMEngine",
        ("state_dict", "meta"),
        ("message_hub", "meta.mmengine_version"),
        version="meta.mmengine_version",
    ),
    Layout("MMCV", ("state_dict", "meta"), version="meta.mmcv_version"),
    Layout("DeepSpeed", ("module", "ds_version", _LIGHTNING_VERSION), version="ds_version", container="lightning"),
    Layout("DeepSpeed", ("module",), ("ds_version", "ds_config", "param_shapes"), version="ds_version"),
    Layout("DeepSpeed ZeRO optimizer", ("optimizer_state_dict",), ("ds_version", "ds_config"), version="ds_version"),
    Layout("Megatron-LM", ("checkpoint_version",), ("model", "model0"), version="checkpoint_version"),
    Layout("fairseq", ("model",), ("optimizer_history", "last_optimizer_state", "task_state", "extra_state")),
    Layout("Detectron2", ("model",), ("__author__", "matching_heuristics")),
    Layout("Detectron2", ("model", "iteration"), ("optimizer", "scheduler")),
    Layout("Ultralytics", ("train_args",), ("model", "ema"), version="version"),
    Layout("YOLOv5", ("best_fitness",), ("model", "ema")),
    Layout("timm", ("state_dict", "arch", "version"), ("args", "metric", "state_dict_ema", "epoch")),
    Layout("MoCo or ImageNet example", ("state_dict", "arch", "epoch"), ("optimizer", "best_acc1", "best_prec1")),
    Layout("OpenCLIP", ("state_dict", "name", "epoch")),
    Layout("torchvision references", ("model", "lr_scheduler", "args")),
    Layout("DINO", ("student", "teacher")),
    Layout("BasicSR", any_of=("params", "params_ema")),
    Layout("BasicSR training state", ("iter", "optimizers", "schedulers")),
    Layout("denoising-diffusion-pytorch", ("step", "model", "ema"), ("opt", "scaler", "version"), version="version"),
    Layout("F5-TTS", ("ema_model_state_dict",)),
    Layout("nnU-Net", ("network_weights",), ("init_args", "trainer_name", "optimizer_state")),
    Layout("nanoGPT", ("model", "model_args"), ("iter_num", "config")),
    Layout("nerfstudio", ("pipeline",), ("step", "optimizers", "scalers")),
    Layout("NeRF-pytorch", ("network_fn_state_dict",)),
    Layout("fairchem", ("state_dict", "normalizers")),
    Layout("stylegan2-pytorch", ("g", "d", "g_ema")),
    Layout("diffusers EMAModel", ("shadow_params",)),
    Layout("pycls", ("model_state",), ("cfg", "optimizer_state")),
)


# What writes containers of a kind of their own.
_BY_CONTAINER = {
    "torchscript": "torch.jit.save",
    "torch-export": "torch.export.save",
    "torch-tar": "torch.save before 0.1.10",
    "pickle": "pickle.dump",
    "npy": "numpy.save",
    "npz": "numpy.savez",
    "torch-distributed": "torch.distributed.checkpoint",
}


def identify(checkpoint: Checkpoint) -> Producer:
    """Name what wrote the file, from the keys that it holds."""
    root = checkpoint.root
    layout = layout_of(root)
    if layout is not None:
        found = [path for path in (*layout.needs, *layout.any_of) if has(root, path)]
        return Producer(layout.name, _version_text(root, layout.version), f"keys {', '.join(found)}", layout.container)
    if is_module(root):
        return Producer("torch.save of a whole module", evidence=f"a pickled {root.ref.full_name}")
    if isinstance(root, Stub):
        return Producer("a pickled object", evidence=root.ref.full_name)
    if checkpoint.is_safetensors:
        return _safetensors_producer(checkpoint)
    if checkpoint.format in _BY_CONTAINER:
        return Producer(_BY_CONTAINER[checkpoint.format], checkpoint.facts.get("torch_version"), "the container")
    return Producer("torch.save", evidence="no key of a known trainer")


def _safetensors_producer(checkpoint: Checkpoint) -> Producer:
    written_by = checkpoint.metadata.get("format")
    return Producer("safetensors", evidence=f'metadata format "{written_by}"' if written_by else "no metadata")


def layout_of(root: Any) -> Layout | None:
    """Give the first row that fits the root."""
    return next((layout for layout in LAYOUTS if _fits(layout, root)), None)


def _fits(layout: Layout, root: Any) -> bool:
    required = all(has(root, path) for path in layout.needs)
    return required and (not layout.any_of or any(has(root, path) for path in layout.any_of))


def lookup(root: Any, path: str) -> Any:
    """Follow a dotted path through mappings and the fields of objects; None where it ends early."""
    for step in path.split("."):
        node = root.fields if isinstance(root, Stub) else root
        root = node.get(step) if isinstance(node, DictNode) else None
    return root


def has(root: Any, path: str) -> bool:
    """Tell whether the last step of a dotted path is a key (its value may be None)."""
    above, _, last = path.rpartition(".")
    node = lookup(root, above) if above else root
    return isinstance(node, DictNode) and last in node


def _version_text(root: Any, path: str) -> str | None:
    """Give the version that stands at a path, as text."""
    value = lookup(root, path) if path else None
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
