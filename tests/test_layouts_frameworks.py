"""Keys and files as the frameworks themselves write them: a clean model's own names are the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import Net
from support.value_trees import spec
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from ckptool.formats import open_checkpoint
from ckptool.layouts import plan_keys, read_training, rename_key, rename_module_path, select
from ckptool.model.plans import KeyOptions, KeyPlan, Producer, StateDict

BARE = Producer("torch.save")


CLEAN = list(Net().state_dict())


def planned(state: Mapping[str, Any], producer: Producer = BARE, **options: Any) -> KeyPlan:
    """Plan the keys of a real state dict."""
    entries = {key: spec(*value.shape) if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    return plan_keys(StateDict((), "main", entries), producer, KeyOptions(**options))


def compiled_regions(net: Net) -> nn.Module:
    net.layers = nn.ModuleList(torch.compile(layer) for layer in net.layers)
    return net


def compiled_by_accelerate(net: Net) -> nn.Module:
    from accelerate.utils import compile_regions

    return compile_regions(net)


def checkpointed(net: Net) -> nn.Module:
    net.layers[0] = checkpoint_wrapper(net.layers[0])
    return net


WRAPPED: dict[str, Callable[[Net], nn.Module]] = {
    "plain": lambda net: net,
    "compile": torch.compile,
    "regional compile": compiled_regions,
    "accelerate compile_regions": compiled_by_accelerate,
    "DataParallel": nn.DataParallel,
    "DataParallel(compile)": lambda net: nn.DataParallel(torch.compile(net)),
    "compile(DataParallel)": lambda net: torch.compile(nn.DataParallel(net)),
    "compile(DataParallel(compile))": lambda net: torch.compile(nn.DataParallel(torch.compile(net))),
    "AveragedModel": AveragedModel,
    "AveragedModel(compile)": lambda net: AveragedModel(torch.compile(net)),
    "AveragedModel(DataParallel)": lambda net: AveragedModel(nn.DataParallel(net)),
    "checkpoint_wrapper": checkpointed,
    "checkpoint_wrapper(compile)": lambda net: checkpoint_wrapper(torch.compile(net)),
    "compile(regional)": lambda net: torch.compile(compiled_regions(net)),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_the_names_of_the_plain_model_come_back(wrap: Callable[[Net], nn.Module]) -> None:
    assert list(planned(wrap(Net()).state_dict()).kept.values()) == CLEAN


def test_parameter_names_of_a_checkpointed_compiled_model() -> None:
    wrapped = torch.compile(checkpointed(Net()))
    names = [name for name, _ in wrapped.named_parameters()]
    assert any("_checkpoint_wrapped_module" in name for name in names)
    made = planned(dict(wrapped.named_parameters()))
    assert list(made.kept.values()) == [name for name, _ in Net().named_parameters()]
    assert [rename_key(made, name) for name in names] == list(made.kept.values())


def test_torch_metadata_gets_the_paths_of_the_plain_model() -> None:
    state = torch.compile(nn.DataParallel(compiled_regions(Net()))).state_dict()
    made = planned(state)
    paths = [rename_module_path(made, path) for path in state._metadata]
    assert {path for path in paths if path is not None} == set(Net().state_dict()._metadata)


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_reference_leads_to_the_same_names(wrap: Callable[[Net], nn.Module]) -> None:
    shapes = {name: tuple(value.shape) for name, value in Net().state_dict().items()}
    made = planned(wrap(Net()).state_dict(), reference=shapes)
    assert (list(made.kept.values()), made.certainty) == (CLEAN, "reference")


def test_peft_keeps_its_own_layout() -> None:
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(Net(), LoraConfig(target_modules=["attn_module"], modules_to_save=["head"]))
    made = planned(torch.compile(tuned).state_dict())
    assert list(made.kept.values()) == list(tuned.state_dict())


def test_peft_is_named(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(Net(), LoraConfig(target_modules=["attn_module"]))
    tuned.save_pretrained(tmp_path / "adapter")
    torch.save(torch.compile(tuned).state_dict(), tmp_path / "whole.pt")
    torch.save({f"base_model.model.{key}": one for key, one in Net().state_dict().items()}, tmp_path / "other.pt")
    for name, said in {
        "adapter": "without its model (lora)",
        "whole.pt": "adapter in it (lora)",
        "other.pt": "",
    }.items():
        with open_checkpoint(tmp_path / name) as checkpoint:
            texts = [note.text for note in select(checkpoint).notes if note.code == "peft"]
            assert [said in text for text in texts] == ([True] if said else [])


def test_a_parametrized_model_keeps_its_names() -> None:
    net = Net()
    nn.utils.parametrizations.weight_norm(net.head)
    assert list(planned(nn.DataParallel(net).state_dict()).kept.values()) == list(net.state_dict())


# --- whole modules ---

MODULES: dict[str, Callable[[Net], nn.Module]] = {
    "plain": WRAPPED["plain"],
    "DataParallel": WRAPPED["DataParallel"],
    "AveragedModel": WRAPPED["AveragedModel"],
    "compile": WRAPPED["compile"],
}


@pytest.mark.parametrize("wrap", MODULES.values(), ids=MODULES)
def test_a_pickled_module_gives_the_names_of_its_state_dict(wrap: Callable[[Net], nn.Module], tmp_path: Path) -> None:
    module = wrap(Net())
    torch.save({"model": module, "epoch": 3}, tmp_path / "whole.pt")
    with open_checkpoint(tmp_path / "whole.pt") as checkpoint:
        selection = select(checkpoint)
        assert selection.chosen is not None
        assert list(selection.chosen.entries) == list(module.state_dict())
        shapes = {key: value.shape for key, value in selection.chosen.tensors.items()}
        assert shapes == {key: tuple(value.shape) for key, value in module.state_dict().items()}
        assert list(plan_keys(selection.chosen, selection.producer).kept.values()) == CLEAN


# --- files of Lightning ---


@pytest.fixture(scope="module")
def lightning_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train for one step under Lightning, plain and averaged, and keep what its own callbacks write."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning
        from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

        class Lit(lightning.LightningModule):
            def __init__(self, compile_model: bool = False, lr: float = 0.125) -> None:
                super().__init__()
                self.save_hyperparameters()
                self.model = torch.compile(Net(), backend="eager") if compile_model else Net()
                self.criterion = nn.CrossEntropyLoss(weight=torch.ones(2))

            def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
                loss = self.criterion(self.model(batch[0]), batch[1])
                self.log("train_loss", loss)
                return loss

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.5)

        def write(name: str, *callbacks: Any, **settings: Any) -> Path:
            folder = tmp_path_factory.mktemp("lightning")
            keep = ModelCheckpoint(folder, name, monitor="train_loss", mode="min")
            trainer = lightning.Trainer(
                max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                callbacks=[keep, *callbacks],
            )  # fmt: skip
            data = torch.utils.data.TensorDataset(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
            trainer.fit(Lit(**settings), torch.utils.data.DataLoader(data, batch_size=2))
            return folder / f"{name}.ckpt"

        return {
            "plain": write("plain"),
            "compiled": write("compiled", compile_model=True),
            "averaged": write("averaged", EMAWeightAveraging(decay=0.5)),
        }


@pytest.mark.parametrize("name", ["plain", "compiled", "averaged"])
def test_lightning_file(lightning_files: dict[str, Path], name: str) -> None:
    with open_checkpoint(lightning_files[name]) as checkpoint:
        selection = select(checkpoint)
        assert selection.chosen is not None
        assert (selection.producer.name, selection.producer.container) == ("PyTorch Lightning", "lightning")
        made = plan_keys(selection.chosen, selection.producer)
        assert list(made.kept.values()) == CLEAN
        assert [move.source for move in made.dropped] == ["criterion.weight"]
        assert selection.chosen.role == ("ema" if name == "averaged" else "main")


def test_lightning_training_facts(lightning_files: dict[str, Path]) -> None:
    written = torch.load(lightning_files["compiled"], weights_only=False)
    (callback,) = (state for name, state in written["callbacks"].items() if name.startswith("ModelCheckpoint"))
    with open_checkpoint(lightning_files["compiled"]) as checkpoint:
        training = read_training(checkpoint, select(checkpoint))
    assert training.metrics["train_loss"].value == callback["current_score"].item()
    assert training.metrics["best_train_loss"].value == callback["best_model_score"].item()
    facts = {name: getattr(training, name).value for name in ("monitor", "mode", "optimizer", "learning_rate")}
    assert facts == {"monitor": "train_loss", "mode": "min", "optimizer": "SGD", "learning_rate": 0.125}
    assert (training.epoch.value, training.global_step.value) == (written["epoch"], written["global_step"])
    assert training.hyper_parameters.text_items() == {"compile_model": True, "lr": 0.125}
    assert training.compiled.value is True


def test_lightning_average_keeps_the_raw_weights_beside(lightning_files: dict[str, Path]) -> None:
    with open_checkpoint(lightning_files["averaged"]) as checkpoint:
        raw = select(checkpoint, "raw").chosen
        assert raw is not None
        assert raw.path == ("current_model_state",)


OPTIMIZERS = {
    name: getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adadelta", "Adagrad", "ASGD", "Rprop")
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_told_apart(name: str, tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    optimizer = OPTIMIZERS[name](net.parameters(), lr=0.25)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "it.pt")
    with open_checkpoint(tmp_path / "it.pt") as checkpoint:
        training = read_training(checkpoint, select(checkpoint))
    assert training.optimizer is not None
    assert (training.optimizer.value, training.learning_rate.value) == (name, 0.25)
