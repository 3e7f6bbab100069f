"""The model that --model names is built, with the sizes of the checkpoint, or refused in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptool
from ckptool.errors import CkptoolError
from ckptool.loading.build import BuiltModel, archive_kind, build_archive, build_model, load_checked, suggest
from ckptool.loading.torchvision import ensure_torchvision
from ckptool.model.verification import VerifyOptions

EXAMPLES = Path(__file__).parents[1] / "examples"
DIGITS = EXAMPLES / "digits.ckpt"
SCRIPT = EXAMPLES / "train_digits.py"


def has_torchvision() -> bool:
    try:
        ensure_torchvision()
        import torchvision  # noqa: F401
    except ImportError:
        return False
    return True


needs_torchvision = pytest.mark.skipif(not has_torchvision(), reason="torchvision is not installed")

NETS = '''
import sys
from dataclasses import dataclass
from enum import Enum
import lightning
import torch
from torch import nn

print("imported")


class Small(nn.Module):
    def __init__(self, in_channels=3, num_classes=10, width=4):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


class Needy(Small):
    def __init__(self, num_classes, in_channels):
        super().__init__(in_channels, num_classes)


class Blank(Small):
    def __init__(self, width):
        super().__init__(width=width)


class Configured(Small):
    def __init__(self, config):
        super().__init__(width=config.width, num_classes=config["classes"])


class Greedy(Small):
    def __init__(self, width=4, pretrained=True):
        if pretrained:
            raise RuntimeError("no network here")
        super().__init__(width=width)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        raise KeyError("a\\nb")


class Meta(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.empty(3, device="meta"), persistent=False)


class Holder:
    @staticmethod
    def make():
        return Small(width=5)


class TextAndImage(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.conv = nn.Embedding(7, 3), nn.Conv2d(1, 3, 3)

    def forward(self, pixels, tokens, mask=None):
        return self.conv(pixels).mean((2, 3)) + self.words(tokens).mean(1)


class Plain(lightning.LightningModule):
    """Say how it is called, and keep a loss with weights of its own."""

    def __init__(self, width, num_classes=10, **anything):
        super().__init__()
        self.anything = anything
        self.net = Small(width=width, num_classes=num_classes)
        self.criterion = nn.CrossEntropyLoss(torch.ones(num_classes))

    def forward(self, x):
        return self.net(x).softmax(1)


class Whole(lightning.LightningModule):
    """Have two networks, so that only the whole is the network."""

    def __init__(self, width=4):
        super().__init__()
        self.first, self.second = Small(width=width), Small(width=width)

    def forward(self, x):
        return self.first(x) + self.second(x)


class Silent(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.second = Small(), Small()


class Late(lightning.LightningModule):
    def __init__(self, width=4):
        super().__init__()
        self.width = width

    def configure_model(self):
        self.net = Small(width=self.width)


class TakesConfig(lightning.LightningModule):
    def __init__(self, config):
        super().__init__()
        self.net = torch.compile(Small(width=config.width))


@dataclass
class TrainingConfig:
    width: int
    name: str = "x"


class Kind(Enum):
    A = "a"


def factory(num_classes=3):
    return Small(num_classes=num_classes)


def pair():
    return Small(), "transform"


def leaves():
    raise SystemExit(3)


instance = Small(width=6)
number = 7
'''


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    (folder / "ckptool_test_nets.py").write_text(NETS)
    (folder / "ckptool_test_broken.py").write_text("import ckptool_no_such_module")
    (folder / "ckptool_test_wrong.py").write_text("x = = 1")
    (folder / "ckptool_test_ends.py").write_text("raise SystemExit('usage: train.py --epochs')")
    return folder


def module(nets: Path) -> Any:
    sys.path.insert(0, str(nets))
    try:
        import ckptool_test_nets
    finally:
        sys.path.remove(str(nets))
    return ckptool_test_nets


def build(model: str | None, path: Path, **options: Any) -> BuiltModel:
    with ckptool.open(path) as opened:
        return build_model(VerifyOptions(model=model, **options), opened)


def save(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


def loads(built: BuiltModel, path: Path, **options: Any) -> bool:
    return load_checked(built.make(0), path, VerifyOptions(**options)).is_exact


# --- what can be named ---


@pytest.mark.parametrize(
    ("name", "width"), [("Small", 4), ("factory", 4), ("instance", 6), ("Holder.make", 5), ("Needy", 4)]
)
@pytest.mark.parametrize("form", ["ckptool_test_nets:{}", "{folder}/ckptool_test_nets.py:{}"])
def test_code_is_found_in_a_module_or_a_file(nets, tmp_path, capsys, name, width, form):
    nets_module = module(nets)
    path = save(tmp_path / "net.pt", nets_module.Small(width=width).state_dict())
    capsys.readouterr()
    built = build(form.format(name, folder=nets), path, app_dir=nets)
    assert loads(built, path)
    assert built.make(0)(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    assert built.input_hint.modality == "image"
    assert built.input_hint.channels == 3
    assert capsys.readouterr().out == ""


def test_only_app_dir_is_put_on_the_path(nets, tmp_path):
    path = save(tmp_path / "net.pt", {"w": torch.ones(1)})
    code = textwrap.dedent(f"""
        import ckptool
        from pathlib import Path
        from ckptool.loading.build import build_model
        from ckptool.model.verification import VerifyOptions
        with ckptool.open({str(path)!r}) as opened:
            for folder in (None, Path({str(nets)!r})):
                try:
                    build_model(VerifyOptions(model="ckptool_test_nets:Small", app_dir=folder), opened)
                except ckptool.errors.CkptoolError as error:
                    print(error)
                else:
                    print("built")
    """)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=nets.parent, check=True)
    first, second = ran.stdout.splitlines()
    assert "No module named 'ckptool_test_nets'; name a folder to import from with --app-dir" in first
    assert second == "built"
    assert ran.stderr == "imported\n"


def test_every_model_is_fresh_and_follows_its_seed(nets, tmp_path):
    path = save(tmp_path / "net.pt", module(nets).Small().state_dict())
    for name in ("Small", "instance"):
        built = build(f"{nets}/ckptool_test_nets.py:{name}", path)
        state = torch.get_rng_state()
        first, again, other = built.make(1), built.make(1), built.make(2)
        assert torch.equal(torch.get_rng_state(), state)
        assert first is not again
        assert torch.equal(first.fc.weight, again.fc.weight)
        assert torch.equal(first.fc.weight, other.fc.weight) == (name == "instance")
        first.fc.weight.data.zero_()
        assert again.fc.weight.any()


# --- sizes of the checkpoint ---


@pytest.mark.parametrize("name", ["Small", "Needy", "factory"])
def test_classes_and_channels_come_from_the_file(nets, tmp_path, name):
    channels = 3 if name == "factory" else 1
    state = module(nets).Small(in_channels=channels, num_classes=7).state_dict()
    path = save(tmp_path / "net.pt", {f"model._orig_mod.{key}": value for key, value in state.items()})
    built = build(f"{nets}/ckptool_test_nets.py:{name}", path)
    assert loads(built, path)
    assert "num_classes=7" in built.description
    assert any("num_classes=7" in note for note in built.notes)


def test_what_the_user_gives_is_not_changed(nets, tmp_path):
    path = save(tmp_path / "net.pt", module(nets).Small(num_classes=7).state_dict())
    built = build(f"{nets}/ckptool_test_nets.py:Small", path, model_args={"num_classes": 5})
    assert built.make(0).fc.out_features == 5
    assert build(f"{nets}/ckptool_test_nets.py:Small", path, model_args={"width": 9}).make(0).conv.out_channels == 9


def test_two_sizes_for_one_argument_leave_it_open(nets, tmp_path):
    state = {**module(nets).Small(num_classes=7).state_dict(), "fc.bias": torch.zeros(6)}
    built = build(f"{nets}/ckptool_test_nets.py:Small", save(tmp_path / "net.pt", state))
    assert built.make(0).fc.out_features == 10


# --- recorded hyperparameters ---


def lightning_file(path: Path, net: nn.Module, hyper_parameters: Any, **more: Any) -> Path:
    return save(
        path,
        {
            "state_dict": net.state_dict(),
            "epoch": 1,
            "global_step": 2,
            "pytorch-lightning_version": "2.5.0",
            "hyper_parameters": hyper_parameters,
            **more,
        },
    )


def test_the_digits_module_is_built_from_what_it_recorded():
    built = build(f"{SCRIPT}:DigitsClassifier", DIGITS)
    net = built.make(0)
    assert type(net).__name__ == "DigitsNet"
    assert built.description.endswith(".model")
    assert loads(built, DIGITS)
    assert loads(built, DIGITS.with_name("digits_wrong_strip.pt"))
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_as_it_stands_the_module_keeps_its_own_names():
    compiled = torch._dynamo.utils.counters["frames"]["total"]
    built = build(f"{SCRIPT}:DigitsClassifier", DIGITS, as_is=True)
    net = built.make(0)
    assert set(net.state_dict()) == set(torch.load(DIGITS, weights_only=True)["state_dict"])
    assert load_checked(net, DIGITS, VerifyOptions(as_is=True)).is_exact
    with torch.no_grad():
        assert torch.equal(net.eval()(torch.ones(1, 1, 8, 8)), net.model._orig_mod(torch.ones(1, 1, 8, 8)))
    assert torch._dynamo.utils.counters["frames"]["total"] == compiled


@pytest.mark.parametrize(
    ("name", "recorded", "kind"),
    [
        ("Plain", {"width": 6, "num_classes": 4, "lr": 0.1}, "Small"),
        ("Whole", {"width": 6}, "Whole"),
        ("Late", {"width": 6}, "Small"),
        ("TakesConfig", {"config": {"width": 6}}, "Small"),
    ],
)
def test_lightning_modules_are_built_from_what_they_recorded(nets, tmp_path, name, recorded, kind):
    source = getattr(module(nets), name)
    arguments = {**recorded, "config": module(nets).TrainingConfig(6)} if "config" in recorded else recorded
    original = source(**arguments)
    if name == "Late":
        original.configure_model()
    path = lightning_file(tmp_path / "net.ckpt", original, recorded)
    built = build(f"{nets}/ckptool_test_nets.py:{name}", path)
    assert type(built.make(0)).__name__ == kind
    assert loads(built, path)
    assert built.make(0)(torch.zeros(1, 3, 8, 8)).shape == (1, recorded.get("num_classes", 10))


def test_an_object_of_a_class_that_is_gone_shows_its_fields(nets, tmp_path):
    nets_module = module(nets)
    config = nets_module.TrainingConfig(6)
    path = lightning_file(tmp_path / "net.ckpt", nets_module.TakesConfig(config), {"config": config})
    assert loads(build(f"{nets}/ckptool_test_nets.py:TakesConfig", path), path)


def test_settings_given_as_one_argument_are_given_so_again(nets, tmp_path):
    nets_module = module(nets)
    net = nets_module.TakesConfig(nets_module.TrainingConfig(6))
    path = lightning_file(tmp_path / "net.ckpt", net, {"width": 6}, hparams_name="config")
    assert loads(build(f"{nets}/ckptool_test_nets.py:TakesConfig", path), path)


@pytest.mark.parametrize("name", ["Blank", "Small", "Configured"])
def test_a_plain_class_takes_the_settings_that_it_needs(nets, tmp_path, name):
    nets_module = module(nets)
    state = nets_module.Small(width=6).state_dict()
    path = save(tmp_path / "ckpt.pt", {"model": state, "model_args": {"width": 6, "classes": 10}, "iter_num": 1})
    assert loads(build(f"{nets}/ckptool_test_nets.py:{name}", path), path)


def test_nothing_is_downloaded_unless_asked_for(nets, tmp_path):
    path = save(tmp_path / "net.pt", module(nets).Small().state_dict())
    assert loads(build(f"{nets}/ckptool_test_nets.py:Greedy", path), path)
    with pytest.raises(CkptoolError, match="no network here"):
        build(f"{nets}/ckptool_test_nets.py:Greedy", path, model_args={"pretrained": True})


def test_settings_that_hold_themselves_come_to_an_end(nets, tmp_path):
    nets_module = module(nets)
    loop: dict[str, Any] = {"width": 6}
    loop["self"] = [loop, loop]
    path = lightning_file(tmp_path / "net.ckpt", nets_module.Whole(6), {"width": 6, "loop": loop})
    assert loads(build(f"{nets}/ckptool_test_nets.py:Whole", path), path)


# --- refusals ---

REFUSED = {
    "no model": (None, r"no model to build; name one with --model"),
    "no colon": ("ckptool_test_nets", r"this names no factory; write package\.module:factory"),
    "no name": ("ckptool_test_nets:", r"this names no factory"),
    "no module": ("ckptool_no_such:Net", r"importing ckptool_no_such failed.*--app-dir"),
    "no file": ("nowhere/net.py:Net", r"there is no file nowhere/net\.py"),
    "import fails": ("{nets}/ckptool_test_broken.py:Net", r"No module named 'ckptool_no_such_module'"),
    "no Python": ("{nets}/ckptool_test_wrong.py:Net", r"SyntaxError"),
    "ends the program": ("{nets}/ckptool_test_ends.py:Net", r"SystemExit: usage: train\.py --epochs"),
    "no attribute": ("{file}:Smal", r'there is no "Smal" in it; name Small or Needy'),
    "no class of torch": ("{file}:Kind", r"the class is no torch\.nn\.Module"),
    "a number": ("{file}:number", r"this is a int; name a torch\.nn\.Module"),
    "gives no module": ("{file}:pair", r"it gives a tuple, no torch\.nn\.Module"),
    "leaves": ("{file}:leaves", r"building it failed: SystemExit: 3"),
    "raises": ("{file}:Broken", r"building it failed: KeyError: 'a\\nb'"),
    "on meta": ("{file}:Meta", r'"table" is on the meta device'),
    "argument missing": ("{file}:Blank", r"missing a required argument: 'width' \(it takes width\).*--model-arg"),
    "no forward": ("{file}:Silent", r"Silent: it has no forward, .*\(first or second\)"),
    "no such zoo model": ("timm:", r"no name after the colon"),
    "no config": ("transformers:nowhere", r"there is no nowhere/config\.json"),
    "a checkpoint": (str(DIGITS), r"this is no TorchScript or \.pt2 archive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_in_one_sentence(nets, tmp_path, case):
    model, message = REFUSED[case]
    path = save(tmp_path / "net.pt", {"w": torch.ones(1)})
    text = None if model is None else model.format(nets=nets, file=nets / "ckptool_test_nets.py")
    with pytest.raises(CkptoolError, match=message) as caught:
        build(text, path)
    assert "\n" not in str(caught.value)


def test_unknown_arguments_are_refused_with_the_known_ones(nets, tmp_path):
    path = save(tmp_path / "net.pt", {"w": torch.ones(1)})
    with pytest.raises(CkptoolError, match=r"unexpected keyword argument 'depth' \(it takes in_channels, num_classes"):
        build(f"{nets}/ckptool_test_nets.py:Small", path, model_args={"depth": 3})


def test_a_recorded_object_that_is_missing_is_named(nets, tmp_path):
    net = module(nets).Whole(6)
    path = lightning_file(tmp_path / "net.ckpt", net, {"width": nn.Linear(1, 1)})
    with pytest.raises(
        CkptoolError, match=r"'width' .*own width \(it is an object of class torch\.nn\.modules\.linear"
    ):
        build(f"{nets}/ckptool_test_nets.py:Blank", path)


def test_the_folder_of_the_app_must_exist(tmp_path):
    with pytest.raises(CkptoolError, match=r"--app-dir .*nowhere: this is no folder"):
        build("a:b", save(tmp_path / "net.pt", {"w": torch.ones(1)}), app_dir=tmp_path / "nowhere")


# --- zoos ---


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "arguments", "channels"),
    [
        ("resnet10t", {"num_classes": 7, "in_chans": 1}, 1),
        ("vit_tiny_patch16_224", {"num_classes": 4, "img_size": 64, "depth": 1}, 3),
    ],
)
def test_timm_models_get_the_sizes_of_the_file(tmp_path, name, arguments, channels):
    timm = pytest.importorskip("timm")
    state = timm.create_model(name, **arguments).state_dict()
    path = save(tmp_path / "net.pt", {"state_dict": {f"module.{key}": value for key, value in state.items()}})
    built = build(f"timm:{name}", path, model_args={"depth": 1} if "depth" in arguments else {})
    assert loads(built, path)
    found = built.preprocessing
    assert found is not None
    assert (len(found.mean), len(found.std), found.channels) == (channels,) * 3
    height, width = found.size
    assert built.make(0).eval()(torch.zeros(1, channels, height, width)).shape == (1, arguments["num_classes"])


@needs_torchvision
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_0"])
def test_torchvision_models_get_the_classes_of_the_file(tmp_path, name):
    import torchvision

    path = save(tmp_path / "net.pt", torchvision.models.get_model(name, weights=None, num_classes=6).state_dict())
    built = build(f"torchvision:{name}", path)
    assert loads(built, path)
    assert built.preprocessing.size == (224, 224)
    assert built.preprocessing.mean == (0.485, 0.456, 0.406)


@needs_torchvision
@pytest.mark.parametrize(("model", "hint"), [("timm:resnet5", "resnet50"), ("torchvision:resnet9", "resnet")])
def test_a_name_that_a_zoo_lacks_is_answered_with_those_like_it(tmp_path, model, hint):
    pytest.importorskip("timm")
    with pytest.raises(CkptoolError, match=f"no such model; did you mean .*{hint}"):
        build(model, save(tmp_path / "net.pt", {"w": torch.ones(1)}))


def test_a_zoo_that_is_missing_says_what_to_install(tmp_path):
    if has_torchvision():
        pytest.skip("torchvision is installed")
    with pytest.raises(CkptoolError, match=r"No module named 'torchvision'.*run pip install torchvision"):
        build("torchvision:resnet18", save(tmp_path / "net.pt", {"w": torch.ones(1)}))


@needs_torchvision
def test_torchvision_works_beside_a_torch_without_cuda():
    code = """
from ckptool.loading.torchvision import ensure_torchvision
print(ensure_torchvision(), ensure_torchvision())
import torch, torchvision
print(tuple(torchvision.models.resnet18().eval()(torch.zeros(1, 3, 32, 32)).shape))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True)
    first, second = ran.stdout.splitlines()
    assert first in ("True True", "False False")
    assert second == "(1, 1000)"


@pytest.fixture(scope="module")
def transformers() -> Any:
    ensure_torchvision()
    return pytest.importorskip("transformers")


def test_a_folder_of_transformers_is_read_for_images(transformers, tmp_path):
    configuration = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    configuration.num_labels = 5
    transformers.ViTForImageClassification(configuration).save_pretrained(tmp_path)
    sizes = {"size": {"height": 32, "width": 48}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(sizes))
    path = tmp_path / "model.safetensors"
    built = build(f"transformers:{tmp_path}", path)
    assert loads(built, path)
    assert built.make(0)(pixel_values=torch.zeros(1, 3, 32, 32)).logits.shape == (1, 5)
    assert (built.input_hint.modality, built.input_hint.size, built.input_hint.main) == (
        "image",
        (32, 32),
        "pixel_values",
    )
    assert built.preprocessing.size == (32, 48)
    assert built.preprocessing.std == (0.25, 0.25, 0.25)
    assert built.preprocessing.interpolation == "bicubic"


@pytest.mark.parametrize("safe", [True, False], ids=["file", "memory"])
def test_transformers_names_are_those_in_the_file_or_in_memory(transformers, tmp_path, safe):
    configuration = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    net = transformers.BertForSequenceClassification(configuration)
    net.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors" if safe else save(tmp_path / "net.pt", net.state_dict())
    built = build(f"transformers:{tmp_path}", path)
    model = built.make(0)
    assert load_checked(model, path, VerifyOptions()).is_exact
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in model.state_dict().items())
    assert (built.input_hint.modality, built.input_hint.vocabulary, built.input_hint.length) == ("tokens", 50, 512)


def test_another_number_of_labels_comes_from_the_file(transformers, tmp_path):
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    configuration = transformers.BertConfig(**tiny, vocab_size=50, architectures=["BertForSequenceClassification"])
    configuration.save_pretrained(tmp_path)
    net = transformers.BertForSequenceClassification(transformers.BertConfig(**tiny, vocab_size=50, num_labels=7))
    path = save(tmp_path / "net.pt", net.state_dict())
    assert loads(build(f"transformers:{tmp_path}", path), path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"reading its config\.json failed"),
        ('{"model_type": "no-such-model"}', r"reading its config\.json failed"),
        ('{"model_type": "bert", "architectures": ["BertForNothing"]}', r"has no BertForNothing; install a version"),
    ],
)
def test_a_configuration_that_says_nothing_known_is_refused(transformers, tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CkptoolError, match=message) as caught:
        build(f"transformers:{tmp_path}", save(tmp_path / "net.pt", {"w": torch.ones(1)}))
    assert "\n" not in str(caught.value)


# --- archives ---


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5)).eval()
    torch.jit.script(net).save(str(folder / "net.pt"))
    torch.export.save(torch.export.export(net, (torch.zeros(2, 2, 4, 4),)), str(folder / "net.pt2"))
    return folder


@pytest.mark.parametrize("name", ["net.pt", "net.pt2"])
def test_programs_need_trust_and_run_as_they_are(archives, tmp_path, name):
    path = save(tmp_path / "w.pt", {"w": torch.ones(1)})
    with pytest.raises(CkptoolError, match="loading it runs its code; allow that with --trust-code"):
        build(str(archives / name), path)
    built = build(str(archives / name), path, trust_code=True)
    model = built.make(0).eval()
    assert model(torch.zeros(2, 2, 4, 4)).shape == (2, 5)
    assert torch.equal(model(torch.ones(2, 2, 4, 4)), built.make(1)(torch.ones(2, 2, 4, 4)))
    if name == "net.pt2":
        assert [tuple(value.shape) for value in built.example_inputs] == [(2, 2, 4, 4)]
    else:
        assert (built.input_hint.modality, built.input_hint.channels, built.input_hint.names) == (
            "image",
            2,
            ("input",),
        )


def test_archives_are_told_from_checkpoints(archives, tmp_path):
    assert archive_kind(archives / "net.pt") == "TorchScript archive"
    assert archive_kind(archives / "net.pt2") == "torch.export archive"
    assert archive_kind(DIGITS) is None
    assert archive_kind(tmp_path / "nowhere") is None


def test_a_damaged_program_is_refused(archives, tmp_path):
    with zipfile.ZipFile(archives / "net.pt") as old, zipfile.ZipFile(tmp_path / "bad.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"no code" if name.endswith(".py") else old.read(name))
    with pytest.raises(CkptoolError, match=r"bad\.pt: torch\.jit\.load failed"):
        build_archive(tmp_path / "bad.pt", trust_code=True)


# --- what goes in ---


@pytest.mark.parametrize(
    ("model", "state", "expected"),
    [
        ("{file}:TextAndImage", {}, ("multi", ("pixels", "tokens"))),
        ("torch.nn:Identity", {}, (None, ("input",))),
    ],
)
def test_the_hint_says_what_forward_asks_for(nets, tmp_path, model, state, expected):
    path = save(tmp_path / "net.pt", state or {"w": torch.ones(1)})
    hint = build(model.format(file=nets / "ckptool_test_nets.py"), path).input_hint
    assert (hint.modality, hint.names) == expected


# --- what the checkpoint suggests ---

NAMESPACE = __import__("argparse").Namespace
WEIGHT = {"w": torch.ones(1)}
TIMM = {"state_dict": WEIGHT, "arch": "resnet26d", "version": 2, "epoch": 3, "args": NAMESPACE(model="resnet26d")}
SUGGESTED = {
    "timm": (TIMM, "timm:resnet26d"),
    "timm arguments": ({**TIMM, "arch": None}, "timm:resnet26d"),
    "hostile name": ({**TIMM, "arch": "x; rm -rf /", "args": NAMESPACE(model="$(ls)")}, None),
    "torchvision": ({"model": WEIGHT, "lr_scheduler": {}, "args": NAMESPACE(model="resnet18")}, "torchvision:resnet18"),
    "imagenet": (
        {"state_dict": WEIGHT, "arch": "resnet18", "epoch": 1, "best_acc1": 3.0, "optimizer": {}},
        "torchvision:resnet18",
    ),
    "nanoGPT": ({"model": WEIGHT, "model_args": {"n_layer": 1}, "iter_num": 1, "config": {}}, "model.py:GPT"),
    "lightning cli": (
        {
            "state_dict": WEIGHT,
            "epoch": 1,
            "global_step": 1,
            "pytorch-lightning_version": "2.5.0",
            "hyper_parameters": {"_class_path": "project.nets.Classifier", "_instantiator": "x", "width": 3},
        },
        "project.nets:Classifier",
    ),
    "pickled module": (nn.Linear(1, 1), "torch.nn.modules.linear:Linear"),
    "bare": (WEIGHT, None),
}


@pytest.mark.parametrize("case", SUGGESTED)
def test_a_checkpoint_suggests_its_own_model(tmp_path, case):
    content, expected = SUGGESTED[case]
    with ckptool.open(save(tmp_path / "net.pt", content)) as opened:
        assert suggest(opened) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "bert"}, "transformers:{}"),
        ({"architecture": "vit_tiny_patch16_224"}, "timm:vit_tiny_patch16_224"),
        ({"lr": 1}, None),
        ([1], None),
        (None, None),
    ],
)
def test_a_configuration_beside_the_file_suggests_too(tmp_path, config, expected):
    (tmp_path / "config.json").write_text("{" if config is None else json.dumps(config))
    with ckptool.open(save(tmp_path / "net.pt", WEIGHT)) as opened:
        assert suggest(opened) == (None if expected is None else expected.format(tmp_path))


def test_suggesting_needs_no_torch():
    code = "import sys, ckptool.operations.suggest; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "numpy"}.isdisjoint(loaded)
