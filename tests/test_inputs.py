"""What verify feeds a model: the user's pictures and arrays as they are, labels that fit, else inputs made up."""

from __future__ import annotations

import io
import json
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import ckptool
from ckptool.errors import CkptoolError
from ckptool.loading.built import BuiltModel, InputHint, Preprocessing
from ckptool.loading.hints import input_hint
from ckptool.model.verification import VerifyOptions
from ckptool.verification import photos
from ckptool.verification.battery import draw_image, name_image
from ckptool.verification.images import IMAGENET_MEAN, IMAGENET_STD, ImageForm, find_pictures, read_picture
from ckptool.verification.inputs import InputSet, prepare_inputs
from ckptool.verification.photos import sample_photos
from ckptool.verification.sizes import position_size
from ckptool.verification.texts import TEXT

EXAMPLES = Path(__file__).parents[1] / "examples"
CPU = torch.device("cpu")


def feed(
    model: nn.Module, preprocessing: Preprocessing | None = None, hint: InputHint | None = None, **options: object
):
    built = BuiltModel("a model", lambda _seed: model, preprocessing, input_hint(model) if hint is None else hint)
    return prepare_inputs(VerifyOptions(**options), built, model, CPU)


def whole(inputs: InputSet) -> torch.Tensor:
    return torch.cat(list(inputs.batches()))


def pooled(channels: int = 3, classes: int = 10, stride: int = 16) -> nn.Module:
    """A network for images of any size."""
    convolution = nn.Conv2d(channels, 4, 3, stride, padding=1)
    return nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


def fixed(side: int, channels: int = 3, classes: int = 10) -> nn.Module:
    """A network for images of one size."""
    return nn.Sequential(nn.Conv2d(channels, 2, 1), nn.Flatten(), nn.Linear(2 * side * side, classes))


@pytest.fixture
def no_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "_PHOTOS", {})


# --- the structured battery ---


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("size", [(8, 8), (48, 32), (1, 1)])
def test_the_battery_fits_any_form(channels, size):
    images = torch.stack([draw_image(place, size, channels, 0) for place in range(8)])
    assert images.shape == (8, channels, *size)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.isfinite().all()


def test_the_battery_is_half_leaves_and_seeded():
    kinds = [name_image(place).rpartition(" ")[0] for place in range(48)]
    assert {kind: kinds.count(kind) for kind in kinds} == {"dead leaves": 24, "1/f noise": 12, "pattern": 12}
    assert torch.equal(draw_image(5, (16, 16), 3, 1), draw_image(5, (16, 16), 3, 1))
    assert not torch.equal(draw_image(5, (16, 16), 3, 1), draw_image(5, (16, 16), 3, 2))
    assert not torch.equal(draw_image(5, (16, 16), 3, 1), draw_image(9, (16, 16), 3, 1))


def test_the_battery_has_edges_and_the_spectrum_of_images():
    """Neighbours are alike (noise: 0), and yet there is contrast."""
    leaves = torch.stack([draw_image(4 * place, (64, 64), 1, 0) for place in range(8)])
    flat = torch.stack([leaves[..., :-1].flatten(), leaves[..., 1:].flatten()])
    assert torch.corrcoef(flat)[0, 1] > 0.7
    assert leaves.std() > 0.2


# --- pictures ---


def gradient(height: int = 8, width: int = 8) -> np.ndarray:
    return np.linspace(0, 255, height * width).reshape(height, width).round().astype(np.uint8)


def save(folder: Path, name: str, array: np.ndarray) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


RGB = np.stack([gradient(), gradient()[::-1], 255 - gradient()], -1)
GREY_OF_RGB = np.asarray(Image.fromarray(RGB).convert("L"))
MODES = {
    "L": (Image.fromarray(gradient()), np.stack([gradient()] * 3, -1)),
    "1": (Image.fromarray(gradient() > 99), np.stack([(gradient() > 99) * np.uint8(255)] * 3, -1)),
    "LA": (Image.fromarray(gradient()).convert("LA"), np.stack([gradient()] * 3, -1)),
    "RGB": (Image.fromarray(RGB), RGB),
    "RGBA": (Image.fromarray(np.dstack([RGB, gradient()])), RGB),
    "I;16": (Image.fromarray(gradient().astype(np.uint16) * 257), np.stack([gradient()] * 3, -1)),
    "P": (Image.fromarray(gradient()).convert("P"), np.stack([gradient()] * 3, -1)),
    "F": (Image.fromarray(gradient().astype(np.float32) / 255), np.stack([gradient()] * 3, -1)),
    "CMYK": (Image.fromarray(np.dstack([255 - RGB, RGB * 0])[..., :4], "CMYK"), RGB),
}
PLAIN = ImageForm((8, 8), (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_mode_are_colours(mode, tmp_path):
    image, expected = MODES[mode]
    path = tmp_path / ("a.tif" if mode in ("F", "CMYK") else "a.png")
    image.save(path)
    got = read_picture(path, PLAIN)
    assert torch.allclose(got, torch.tensor(expected.astype(np.float32) / 255).permute(2, 0, 1), atol=1 / 255 + 1e-6)


def test_a_palette_may_be_transparent(tmp_path):
    palette = Image.fromarray(gradient()).convert("P")
    palette.save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert read_picture(tmp_path / "a.png", PLAIN).shape == (3, 8, 8)


def test_one_channel_is_luminance_and_four_have_opacity(tmp_path):
    rgba = save(tmp_path, "a.png", np.dstack([RGB, gradient()]))
    grey = read_picture(rgba, ImageForm((8, 8), (0.0,), (1.0,)))
    assert torch.equal(grey, torch.tensor(GREY_OF_RGB[None] / np.float32(255)))
    four = read_picture(rgba, ImageForm((8, 8), (0.0,) * 4, (1.0,) * 4))
    assert torch.equal(four[3], torch.tensor(gradient() / np.float32(255)))


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "jpg", "gif", "tiff", "ppm"])
def test_usual_kinds_of_pictures_decode(suffix, tmp_path):
    Image.fromarray(RGB).save(tmp_path / f"a.{suffix}")
    assert read_picture(tmp_path / f"a.{suffix}", PLAIN).shape == (3, 8, 8)


def test_a_picture_is_resized_and_cropped_around_its_middle(tmp_path):
    """The usual recipe: the shorter side to 256, the middle 224 x 224 of that."""
    array = np.zeros((300, 400, 3), np.uint8)
    array[:, 190:210] = 255
    form = ImageForm((224, 224), (0.0,) * 3, (1.0,) * 3, crop=0.875)
    got = read_picture(save(tmp_path, "a.png", array), form)
    image = Image.fromarray(array).resize((341, 256), Image.Resampling.BILINEAR).crop((58, 16, 282, 240))
    assert torch.allclose(got, torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255, atol=1 / 255)
    assert got[0, :, 112].mean() > 0.9


def test_pictures_are_found_at_any_depth_and_hidden_ones_are_not(tmp_path):
    for name in ("b/c/2.JPG", "a/1.png", ".hidden/3.png", "__MACOSX/4.png", ".5.png"):
        save(tmp_path, name, RGB)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "b" / "again").symlink_to(tmp_path)
    assert [path.name for path in find_pictures(tmp_path)] == ["1.png", "2.JPG"]


def test_pictures_without_suffix_are_found_by_their_content(tmp_path):
    save(tmp_path, "a.png", RGB).rename(tmp_path / "0a1b")
    (tmp_path / "0a1c").write_bytes(b"no picture")
    assert [path.name for path in find_pictures(tmp_path)] == ["0a1b"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 small pictures of three classes, with colours that tell them apart."""
    for number in range(60):
        array = np.full((24, 24, 3), number, np.uint8)
        array[..., number % 3] = 200
        save(tmp_path, f"data/{'abc'[number % 3]}/{number:02}.png", array)
    return tmp_path / "data"


def test_pictures_are_normalised_for_imagenet_with_a_note(folder):
    inputs = feed(fixed(24), images=folder)
    raw = torch.tensor(np.asarray(Image.open(folder / inputs.names[0]))).permute(2, 0, 1) / 255
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    assert torch.allclose(whole(inputs)[0], (raw - mean) / std, atol=1e-5)
    assert (inputs.kind, inputs.modality, inputs.count) == ("in-domain", "image", 48)
    assert "ImageNet" in " ".join(inputs.notes)


def test_the_options_outrank_the_configuration_which_outranks_imagenet(folder):
    stated = Preprocessing((24, 24), (0.5,) * 3, (0.25,) * 3, 3)
    raw = whole(feed(fixed(24), images=folder, mean=(0.0,), std=(1.0,)))
    assert torch.allclose(whole(feed(fixed(24), stated, images=folder)), (raw - 0.5) / 0.25, atol=1e-5)
    assert torch.allclose(whole(feed(fixed(24), stated, images=folder, mean=(0.1, 0.1, 0.1))), (raw - 0.1) / 0.25)
    assert feed(fixed(24), stated, images=folder).notes == ()


def test_too_many_pictures_are_thinned_evenly(folder):
    inputs = feed(fixed(24), images=folder, num_samples=6, batch_size=4)
    assert [name[0] for name in inputs.names] == list("aabbcc")
    assert [len(batch) for batch in inputs.batches()] == [4, 2]


def test_batches_are_the_same_every_time_and_rows_can_be_taken_alone(folder):
    for inputs in (feed(fixed(24), images=folder), feed(fixed(24)), feed(nn.Linear(7, 3)), feed(nn.Embedding(9, 2))):
        first = whole(inputs)
        assert torch.equal(first, whole(inputs))
        assert torch.equal(inputs.take([3, 1]), first[[3, 1]])
        assert len(first) == inputs.count == 48


def test_small_pictures_of_one_size_are_used_as_they_are(folder):
    assert whole(feed(pooled(), images=folder)).shape[2:] == (24, 24)


def test_inputs_have_the_type_of_the_model(folder):
    model = pooled().to(torch.bfloat16)
    assert whole(feed(model, images=folder)).dtype == torch.bfloat16


def test_modes_and_gradients_are_left_as_they_were(folder):
    model = nn.Sequential(nn.BatchNorm2d(3), pooled())
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    feed(model, images=folder)
    assert model.training
    assert not model[1].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- in which size ---


@pytest.mark.parametrize("side", [224, 32, 28, 64, 96, 8, 48, 100])
def test_the_size_is_found_by_trying(side, no_photos):
    inputs = feed(fixed(side), num_samples=2)
    assert whole(inputs).shape == (2, 3, side, side)
    assert f"{side} x {side}" in " ".join(inputs.notes)


@pytest.mark.parametrize(("stride", "side"), [(2, 32), (8, 32), (16, 224), (32, 224)])
def test_a_network_that_hardly_shrinks_images_gets_small_ones(stride, side, no_photos):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(2))
    assert whole(feed(model, num_samples=2)).shape[2:] == (side, side)


def test_the_size_is_read_off_learned_positions():
    transformers = pytest.importorskip("transformers")
    shape = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.ViTModel(transformers.ViTConfig(image_size=80, patch_size=16, **shape))
    assert position_size(model) == 80
    assert whole(feed(model, num_samples=2)).shape[2:] == (80, 80)
    assert position_size(pooled()) is None


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_models_of_any_channels_get_images(channels):
    inputs = feed(pooled(channels), num_samples=8, image_size=40)
    assert whole(inputs).shape == (8, channels, 40, 40)
    assert inputs.kind == ("sample photos" if channels in (1, 3, 4) and sample_photos() else "synthetic")


def test_channels_are_tried_where_nothing_tells(no_photos):
    scripted = torch.jit.trace(fixed(28, channels=1), torch.zeros(2, 1, 28, 28))
    assert whole(feed(scripted, hint=InputHint(), num_samples=2)).shape == (2, 1, 28, 28)


def test_sample_photos_are_half_of_the_inputs_and_nothing_is_imported():
    if not sample_photos():
        pytest.skip("neither scikit-image nor scikit-learn is installed")
    inputs = feed(pooled(), image_size=32)
    real = [name for name in inputs.names if not name.startswith(("dead leaves", "1/f noise", "pattern"))]
    assert 2 <= len(real) <= 24
    assert inputs.count == 48
    assert whole(inputs).flatten(1).std(1).min() > 0
    assert "skimage" not in sys.modules


def test_a_network_that_flattens_images_itself_gets_images(no_photos):
    inputs = feed(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), num_samples=2)
    assert (inputs.modality, whole(inputs).shape) == ("image", (2, 1, 28, 28))


# --- labels ---


def test_one_folder_per_class_is_labelled_and_used_whole(folder):
    inputs = feed(fixed(24, classes=3), data=folder)
    assert inputs.count == 60
    assert inputs.labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert inputs.class_names == ("a", "b", "c")


def test_class_folders_follow_the_class_names(folder, tmp_path):
    (tmp_path / "names.txt").write_text("c\nunused\nb\na\n")
    inputs = feed(fixed(24, classes=4), data=folder, class_names=tmp_path / "names.txt", num_samples=3)
    assert inputs.labels.tolist() == [3, 2, 0]
    assert inputs.class_names == ("c", "unused", "b", "a")


@pytest.mark.parametrize(
    "names",
    [
        '["c", "b", "a"]',
        '{"0": "c", "1": "b", "2": "a"}',
        '{"0": ["c", "cat"], "1": ["b", "bear"], "2": ["a", "ant"]}',
        '{"id2label": {"0": "c", "1": "b", "2": "a"}}',
    ],
)
def test_class_names_are_read_from_json(names, folder, tmp_path):
    (tmp_path / "names.json").write_text(names)
    inputs = feed(fixed(24, classes=3), data=folder, class_names=tmp_path / "names.json", num_samples=3)
    assert inputs.labels.tolist() == [2, 1, 0]


def test_numbered_folders_fewer_than_the_classes_are_class_numbers(folder):
    for old, new in (("a", "3"), ("b", "7"), ("c", "11")):
        (folder / old).rename(folder / new)
    assert set(feed(fixed(24, classes=12), data=folder).labels.tolist()) == {3, 7, 11}


def test_numbered_folders_in_doubtful_order_are_said_to_be(tmp_path):
    for number in range(11):
        save(tmp_path, f"{number}/x.png", RGB)
    inputs = feed(fixed(8, classes=11), data=tmp_path)
    assert inputs.labels[inputs.names.index("10/x.png")] == 2  # as torchvision's ImageFolder numbers it
    assert "10 before 2" in " ".join(inputs.notes)


TABLES = {
    "headings": "label,filename\n1,a/00.png\n0,b/01.png\n",
    "no headings": "a/00.png,1\nb/01.png,0\n",
    "names only": "image_id,label\n00,1\n01,0\n",
    "semicolons": "name;class\n00.png;1\n01.png;0\n",
    "more columns": "id,width,label\n00,24,1\n01,24,0\n",
    "class names": "image,label\n00.png,dog\n01.png,cat\n",
    "a byte order mark": "\ufeffname,label\r\n00.png,1\r\n01.png,0\r\n",
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_labels_pictures(table, folder):
    (folder / "labels.csv").write_text(TABLES[table], encoding="utf-8")
    inputs = feed(fixed(24, classes=2), data=folder)
    assert inputs.names == ("a/00.png", "b/01.png")
    assert inputs.labels.tolist() == [1, 0]
    assert "58 picture(s)" in " ".join(inputs.notes)


TARGETS = {
    "t.txt": "\n".join(str(number % 3) for number in range(60)),
    "t.csv": "name,label\n" + "".join(f"{number:02}.png,{number % 3}\n" for number in range(60)),
    "t.json": json.dumps({f"{number:02}": number % 3 for number in range(60)}),
}


@pytest.mark.parametrize("name", ["t.csv", "t.json"])
def test_targets_by_name_belong_to_images(name, folder, tmp_path):
    (tmp_path / name).write_text(TARGETS[name])
    inputs = feed(fixed(24, classes=3), images=folder, targets=tmp_path / name)
    assert inputs.labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20


def test_targets_in_order_belong_to_rows(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(60, dtype=np.float32).reshape(60, 1))
    (tmp_path / "t.txt").write_text(TARGETS["t.txt"])
    np.save(tmp_path / "t.npy", np.arange(60) % 3)
    for targets in ("t.txt", "t.npy"):
        inputs = feed(nn.Linear(1, 3), inputs=tmp_path / "x.npy", targets=tmp_path / targets)
        assert inputs.labels.tolist() == [number % 3 for number in range(60)]


def test_targets_of_a_regression_are_values(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((40, 2), np.float32), y=np.linspace(0, 99, 40))
    labels = feed(nn.Linear(2, 1), inputs=tmp_path / "x.npz").labels
    assert labels.dtype == torch.float32
    assert labels[-1] == 99


# --- arrays ---


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_arrays_are_fed_as_they_are(suffix, tmp_path):
    values = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    path = write_arrays(tmp_path / f"x{suffix}", {"x": values, "labels": np.arange(40) % 3})
    inputs = feed(nn.Linear(5, 3), inputs=path)
    assert torch.equal(whole(inputs), torch.tensor(values))
    assert inputs.labels.tolist() == [number % 3 for number in range(40)]
    assert (inputs.kind, inputs.modality) == ("in-domain", "tabular")


def test_a_bare_tensor_or_array_is_fed(tmp_path):
    torch.save(torch.ones(33, 5), tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", np.ones((33, 5), order="F"))
    for name in ("x.pt", "x.npy"):
        inputs = feed(nn.Linear(5, 3), inputs=tmp_path / name)
        assert torch.equal(whole(inputs), torch.ones(33, 5))


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.table, self.words = nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Embedding(7, 4)

    def forward(self, image, table, words, scale=None):
        return self.image(image).mean((2, 3)) + self.table(table) + self.words(words).mean(1)


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_named_arrays_are_the_arguments(suffix, tmp_path):
    arrays = {
        "words": np.arange(36).reshape(36, 1) % 7,
        "table": np.ones((36, 5), np.int64),
        "image": np.random.default_rng(0).integers(0, 256, (36, 9, 9, 3), np.uint8),
    }
    inputs = feed(Several(), inputs=write_arrays(tmp_path / f"x{suffix}", arrays))
    batch = next(inputs.batches())
    assert {name: (tensor.dtype, tensor.shape[1:]) for name, tensor in batch.items()} == {
        "words": (torch.int64, (1,)),
        "table": (torch.float32, (5,)),
        "image": (torch.float32, (3, 9, 9)),
    }
    assert inputs.modality == "multi"
    assert Several()(**batch).shape == (16, 4)


def test_arrays_without_names_are_passed_in_their_order(tmp_path):
    np.savez(
        tmp_path / "x.npz", np.ones((36, 3, 9, 9), np.float32), np.ones((36, 5), np.float32), np.ones((36, 2), int)
    )
    batch = next(feed(Several(), inputs=tmp_path / "x.npz").batches())
    assert [tuple(tensor.shape[1:]) for tensor in batch] == [(3, 9, 9), (5,), (2,)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((40, 8, 8), "f4"), ((40, 8, 8, 1), "f4"), ((40, 1, 8, 8), "f8"), ((40, 8, 8), "u1"), ((40, 8, 8, 1), "u1")],
)
def test_layouts_of_images_are_brought_to_the_models(shape, dtype, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, shape)
    stored = pixels.astype(dtype) if dtype == "u1" else (pixels / 255).astype(dtype)
    np.savez(tmp_path / "x.npz", images=stored)
    got = whole(feed(fixed(8, channels=1), inputs=tmp_path / "x.npz"))
    assert torch.allclose(got, torch.tensor(pixels.reshape(40, 1, 8, 8) / 255).float(), atol=1e-6)


def test_scaling_of_arrays_is_asked_for(tmp_path):
    np.save(tmp_path / "x.npy", np.full((40, 3, 8, 8), 0.7, np.float32))
    assert torch.allclose(
        whole(feed(fixed(8), inputs=tmp_path / "x.npy", mean=(0.5,), std=(0.1,)))[0], torch.tensor(2.0)
    )


def test_a_single_image_is_one_input(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 8, 8), np.float32))
    assert feed(fixed(8), inputs=tmp_path / "x.npy").count == 1


# --- text, tables, signals ---


def test_tokens_are_drawn_within_the_vocabulary():
    inputs = feed(nn.Embedding(11, 4))
    ids = whole(inputs)
    assert ids.dtype == torch.int64
    assert ids.shape == (48, 32)
    assert (inputs.modality, inputs.kind) == ("tokens", "synthetic")
    assert set(ids.unique().tolist()) == set(range(11))
    assert not torch.equal(ids, whole(feed(nn.Embedding(11, 4), seed=1)))


def test_text_is_cut_into_windows(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["?"]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    inputs = feed(nn.Embedding(200, 4), tokenizer=tmp_path)
    expected = tokenizer.encode(TEXT).ids
    assert whole(inputs)[0].tolist() == expected[:32]
    assert whole(inputs)[-1].tolist() == expected[-32:]
    assert inputs.kind == "sample text"
    with pytest.raises(CkptoolError, match="the model knows 20"):
        feed(nn.Embedding(20, 4), tokenizer=tmp_path)


def test_a_tokenizer_of_long_tokens_has_a_page_to_work_on(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(dict.fromkeys(["?", *TEXT.split()]))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(TEXT.split()) < 512
    assert whole(feed(nn.Embedding(len(words), 4), tokenizer=tmp_path)).shape == (48, 32)
    long = nn.Sequential(nn.Embedding(len(words), 1), nn.Flatten(), nn.Linear(512, 2))
    assert whole(feed(long, tokenizer=tmp_path)).shape == (48, 512)


def test_a_table_of_characters_is_a_tokenizer(tmp_path):
    characters = sorted(set(TEXT))
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({character: number for number, character in enumerate(characters)}))
    ids = whole(feed(nn.Embedding(len(characters), 4), tokenizer=path))
    assert "".join(characters[number] for number in ids[0]) == TEXT[:32]


def test_a_model_with_a_decoder_gets_tokens_for_both():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(num_layers=1, d_model=8, d_ff=8, num_heads=2, d_kv=4, vocab_size=30)
    batch = next(feed(transformers.T5ForConditionalGeneration(config)).batches())
    assert batch.keys() == {"input_ids", "decoder_input_ids"}


def test_a_model_of_text_and_images_gets_both():
    transformers = pytest.importorskip("transformers")
    shape = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    text, vision = {**shape, "vocab_size": 30}, {**shape, "image_size": 24, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    inputs = feed(model)
    batch = next(inputs.batches())
    assert {name: tuple(rows.shape[1:]) for name, rows in batch.items()} == {
        "input_ids": (32,),
        "pixel_values": (3, 24, 24),
    }
    assert inputs.modality == "multi"


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.head = nn.LSTM(12, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.steps(x)[0][:, -1])


MADE_UP = {
    "sequence": (Recurrent(), "tabular", (16, 12)),
    "table": (nn.Linear(30, 2), "tabular", (30,)),
    "signal": (nn.Conv1d(2, 3, 5), "signal", (2, 16000)),
    "volume": (nn.Conv3d(1, 1, 3), "volume", (1, 16, 112, 112)),
}


@pytest.mark.parametrize("name", MADE_UP)
def test_other_models_get_numbers_of_their_shape(name):
    model, modality, shape = MADE_UP[name]
    inputs = feed(model, num_samples=3)
    assert (inputs.modality, inputs.kind, tuple(whole(inputs).shape)) == (modality, "synthetic", (3, *shape))
    assert whole(inputs).flatten(1).std(1).min() > 0.1


# --- stated shapes, exported programs ---

SHAPES = {"image": (3, 20, 16), "table": (5,), "words": (6,)}


@pytest.mark.parametrize("lead", [(), (1,)])
def test_stated_shapes_are_filled_with_what_the_model_takes(lead):
    shapes = {name: (*lead, *shape) for name, shape in SHAPES.items()}
    batch = next(feed(Several(), input_shapes=shapes, batch_size=8).batches())
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        name: (8, *shape) for name, shape in SHAPES.items()
    }
    assert batch["words"].dtype == torch.int64
    assert batch["words"].max() < 7
    assert batch["table"].dtype == torch.float32


def test_a_stated_image_is_taken_from_the_users_pictures(folder):
    inputs = feed(Several(), input_shapes=SHAPES, images=folder, num_samples=36)
    assert inputs.names[0] == "00.png"
    assert (inputs.kind, inputs.count) == ("sample photos", 36)  # the rest is made up
    alone = feed(pooled(), input_shapes={"x": (3, 20, 16)}, images=folder)
    assert (alone.kind, whole(alone).shape[1:]) == ("in-domain", (3, 20, 16))


def exported(model: nn.Module, example: torch.Tensor, dynamic: bool) -> BuiltModel:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(model.eval(), (example,), dynamic_shapes=shapes)
    module = program.module()
    module.eval = lambda: module
    return BuiltModel("a program", lambda _seed: module, example_inputs=(example,))


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_program_gets_inputs_like_its_example(dynamic):
    built = exported(fixed(12), torch.randn(5, 3, 12, 12), dynamic)
    inputs = prepare_inputs(VerifyOptions(), built, built.make(0), CPU)
    sizes = [tuple(batch.shape) for batch in inputs.batches()]
    assert set(sizes) == ({(16, 3, 12, 12)} if dynamic else {(5, 3, 12, 12)})
    assert inputs.count == (48 if dynamic else 45)
    assert inputs.fixed_batch is not dynamic


# --- the real thing ---


@pytest.fixture(scope="module")
def digits_net():
    sys.path.insert(0, str(EXAMPLES))
    try:
        from train_digits import DigitsNet
    finally:
        sys.path.remove(str(EXAMPLES))
    model = DigitsNet()
    ckptool.load_into(model, EXAMPLES / "digits.ckpt")
    return model


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    return datasets.load_digits()


def accuracy(model: nn.Module, inputs: InputSet) -> float:
    with torch.inference_mode():
        answers = torch.cat([model.eval()(batch) for batch in inputs.batches()])
    return (answers.argmax(1) == inputs.labels).float().mean().item()


def test_digits_as_pictures_are_recognised(digits_net, digits, tmp_path):
    for number, (image, label) in enumerate(zip(digits.images[:200], digits.target, strict=False)):
        save(tmp_path, f"{label}/{number}.png", (image / 16 * 255).round().astype(np.uint8))
    inputs = feed(digits_net, data=tmp_path)
    assert (inputs.count, next(inputs.batches()).shape[1:]) == (200, (1, 8, 8))
    assert accuracy(digits_net, inputs) > 0.97


def test_digits_as_arrays_are_recognised(digits_net, digits, tmp_path):
    np.savez(tmp_path / "digits.npz", images=digits.images / 16, target=digits.target)
    inputs = feed(digits_net, inputs=tmp_path / "digits.npz")
    assert inputs.count == 1797
    assert accuracy(digits_net, inputs) > 0.97


def information(answers: torch.Tensor) -> float:
    p = answers.softmax(1).double().clamp_min(1e-12)
    mean = p.mean(0)
    return float((-(mean * mean.log()).sum() + (p * p.log()).sum(1).mean()) / math.log(min(p.shape)))


def test_a_sound_network_tells_the_made_up_inputs_apart(digits_net):
    inputs = feed(digits_net)
    with torch.inference_mode():
        assert information(torch.cat([digits_net.eval()(batch) for batch in inputs.batches()])) > 0.2
        collapsed = functional.linear(torch.ones(48, 1), torch.ones(10, 1))
    assert information(collapsed) < 0.05


# --- what is refused, in one sentence ---


def refuse_undecodable(folder: Path) -> dict[str, object]:
    (folder / "a" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing else")
    return {"images": folder}


def refuse_cut(folder: Path) -> dict[str, object]:
    path = next((folder / "a").iterdir())
    path.write_bytes(path.read_bytes()[:-40])
    return {"images": folder, "num_samples": 60}


def refuse_text_as_picture(folder: Path) -> dict[str, object]:
    (folder / "a" / "00.png").write_text("<html>404</html>")
    return {"images": folder}


def refuse_no_picture(folder: Path) -> dict[str, object]:
    (folder / "empty").mkdir()
    (folder / "empty" / "x.txt").write_text("x")
    return {"images": folder / "empty"}


def refuse_table(text: str):
    def prepare(folder: Path) -> dict[str, object]:
        (folder / "labels.csv").write_text(text)
        return {"data": folder}

    return prepare


def refuse_file(option: str, name: str, content: bytes, **more: object):
    def prepare(folder: Path) -> dict[str, object]:
        (folder.parent / name).write_bytes(content)
        data = {"data": folder} if option == "class_names" else {"images": folder} if option == "targets" else {}
        return {option: folder.parent / name, **data, **more}

    return prepare


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def huge_npz() -> bytes:
    """Declare a petabyte."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 47,)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    return buffer.getvalue()


REFUSED = {
    "a damaged picture": (refuse_undecodable, "cannot be decoded"),
    "a cut picture": (refuse_cut, "cannot be decoded"),
    "a page that is no picture": (refuse_text_as_picture, "no known kind of picture"),
    "no picture": (refuse_no_picture, "holds no picture"),
    "no folder": (lambda folder: {"images": folder / "gone"}, "No such file"),
    "no data": (lambda folder: {"data": folder / "gone"}, "No such file"),
    "pictures outside of classes": (lambda folder: {"data": folder / "a"}, "lies in no class folder"),
    "splits": (lambda folder: {"data": splits(folder)}, "splits"),
    "another number of classes": (lambda folder: {"data": folder}, "has 3 classes and the model answers 10"),
    "strange rows": (refuse_table("name,label\nnone.png,1\n"), "name no picture"),
    "a class too high": (refuse_table("name,label\n00.png,10\n"), "the label 10 is no class"),
    "a negative class": (refuse_table("name,label\n00.png,-1\n"), "the label -1 is no class"),
    "no label column": (refuse_table("a,b,c\n00.png,1,2\n"), "none is named label"),
    "an empty table": (refuse_table(""), "is empty"),
    "a short row": (refuse_table("name,label\n00.png\n"), "has no label"),
    "too few targets": (refuse_file("targets", "t.txt", b"1\n2\n"), "2 targets for 60 inputs"),
    "targets of no name": (refuse_file("targets", "t.json", b'{"00": 1}'), "has no target for"),
    "targets that are no JSON": (refuse_file("targets", "t.json", b"{"), "not valid JSON"),
    "targets in Latin-1": (refuse_file("targets", "t.txt", b"\xe9"), "not UTF-8"),
    "class names of others": (refuse_file("class_names", "n.txt", b"x\ny\n"), "none of the 2 class names"),
    "class names that are none": (refuse_file("class_names", "n.json", b"[1, 2]"), "names no classes"),
    "no such class names": (lambda folder: {"data": folder, "class_names": folder / "gone"}, "cannot be read"),
    "a text as inputs": (refuse_file("inputs", "x.txt", b"1"), "no file of arrays"),
    "no npz": (refuse_file("inputs", "x.npz", b"1"), "cannot be read"),
    "no npy": (refuse_file("inputs", "x.npy", b"1"), "cannot be read"),
    "a cut npz": (refuse_file("inputs", "x.npz", npz(x=np.zeros((40, 3)))[:-30]), "cannot be read"),
    "a huge npz": (refuse_file("inputs", "x.npz", huge_npz()), "fewer bytes than its header says"),
    "pickled objects": (refuse_file("inputs", "x.npy", npy(np.array([print, None]))), "no numbers"),
    "texts": (refuse_file("inputs", "x.npy", npy(np.array(["a", "b"]))), "no numbers"),
    "a single number": (refuse_file("inputs", "x.npy", npy(np.array(1.0))), "one row for each"),
    "no rows": (refuse_file("inputs", "x.npy", npy(np.zeros((0, 3)))), "one row for each"),
    "arrays of other lengths": (refuse_file("inputs", "x.npz", npz(a=np.zeros(3), b=np.zeros(4))), "one row for each"),
    "a strange argument": (refuse_file("inputs", "x.npz", npz(a=np.zeros(3), b=np.zeros(3))), "'a' is no argument"),
    "labels that do not fit": (refuse_file("inputs", "x.npz", npz(x=np.zeros((3, 2)), y=np.zeros(4))), "3 inputs"),
    "inputs that do not fit": (refuse_file("inputs", "x.npy", npy(np.zeros((40, 3)))), "its forward raised"),
    "no such inputs": (lambda folder: {"inputs": folder / "gone.npz"}, "cannot be read"),
    "no such checkpoint": (lambda folder: {"inputs": folder / "gone.pt"}, "gone.pt"),
    "two sources": (lambda folder: {"images": folder, "data": folder}, "--data and --images"),
    "targets of nothing": (lambda folder: {"targets": folder}, "--targets"),
    "a wrong size": (lambda folder: {"images": folder, "image_size": 0}, "--image-size 0"),
    "no sample": (lambda folder: {"num_samples": 0}, "--num-samples 0"),
    "means of two channels": (lambda folder: {"images": folder, "mean": (0.1, 0.2)}, "--mean: has 2 values for 3"),
    "a deviation of zero": (lambda folder: {"images": folder, "std": (0.0,)}, "--std: 0 is no deviation"),
    "a shape that does not fit": (lambda folder: {"input_shapes": {"x": (5,)}}, "its forward raised"),
    "no tokenizer": (lambda folder: {"tokenizer": folder / "gone"}, "is not there"),
    "a folder without tokenizer": (lambda folder: {"tokenizer": folder}, "holds no tokenizer"),
}


def splits(folder: Path) -> Path:
    for name in ("train", "val"):
        save(folder.parent, f"split/{name}/x/1.png", RGB)
    return folder.parent / "split"


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_sentence(case, folder):
    prepare, part = REFUSED[case]
    with pytest.raises(CkptoolError) as caught:
        list(feed(fixed(24), **prepare(folder)).batches())
    message = str(caught.value)
    assert part in message
    assert "\n" not in message
    assert len(message) < 420


def test_a_model_of_several_inputs_asks_for_their_shapes():
    with pytest.raises(CkptoolError, match="--input-shape image="):
        feed(Several())


def test_a_forward_that_raises_is_told():
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError("scale")

    with pytest.raises(CkptoolError, match="its forward raised KeyError"):
        feed(Broken())
