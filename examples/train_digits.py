"""Train a small ResNet on scikit-learn's digits with Lightning and torch.compile, and keep what Lightning saves.

Writes two files: ``digits.ckpt``, as Lightning's ModelCheckpoint wrote it, and ``digits_wrong_strip.pt``, its weights
after the usual one-line clean-up, which cuts ``model.`` off and leaves the ``_orig_mod.`` of torch.compile on.

    pip install "torch>=2.2" lightning scikit-learn  # and pillow for --pictures
    python examples/train_digits.py --out /tmp/digits

Runs on the CPU in about a minute; torch.compile needs a C++ compiler. ``--keep-all`` keeps every epoch, too, in
``OUT/epochs``; ``--pictures DIR`` trains nothing and writes the validation images as PNG, one folder per class.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

SEED = 7


class Block(nn.Module):
    """Add two convolutions to their input; halve the image where ``stride`` is 2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to images."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """Classify images of shape (1, 8, 8) with values from 0 to 1."""

    def __init__(self, widths: tuple[int, ...] = (16, 32), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.blocks = nn.ModuleList(Block(a, b, 1 if index == 0 else 2) for index, (a, b) in enumerate(pairs))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        x = functional.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean(dim=(2, 3)))


class DigitsClassifier(lightning.LightningModule):
    """Train a ``DigitsNet``; with ``compile_model`` through torch.compile, as most scripts do it."""

    def __init__(
        self,
        widths: tuple[int, ...] = (16, 32),
        classes: int = 10,
        lr: float = 5e-3,
        weight_decay: float = 1e-2,
        epochs: int = 12,
        compile_model: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        net = DigitsNet(widths, classes)
        self.model = torch.compile(net) if compile_model else net

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """Give the loss of one batch."""
        images, labels = batch
        loss = functional.cross_entropy(self.model(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], _index: int) -> None:
        """Log loss and accuracy of one batch."""
        images, labels = batch
        logits = self.model(images)
        self.log("val_loss", functional.cross_entropy(logits, labels))
        self.log("val_accuracy", (logits.argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Use AdamW with a cosine schedule over all epochs."""
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr, weight_decay=self.hparams.weight_decay)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams.epochs)]


def split_digits() -> tuple[TensorDataset, TensorDataset]:
    """Give 1,437 images to train with and 360 to validate with, every class in the same share."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    train, val = train_test_split(range(len(labels)), test_size=360, stratify=digits.target, random_state=SEED)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])


def train(out: Path, epochs: int, keep_all: bool) -> Path:
    """Train, and give the checkpoint with the best validation accuracy."""
    lightning.seed_everything(SEED)
    train_set, val_set = split_digits()
    model = DigitsClassifier(epochs=epochs)
    folder, name, kept = (out / "epochs", "{epoch:02d}", -1) if keep_all else (out, "digits", 1)
    best = ModelCheckpoint(folder, name, monitor="val_accuracy", mode="max", save_top_k=kept)
    trainer = lightning.Trainer(
        max_epochs=model.hparams.epochs,
        accelerator="cpu",
        deterministic=True,
        logger=False,
        callbacks=[best],
        enable_model_summary=False,
    )
    # drop_last: a last batch of another size would make torch.compile compile everything again.
    batches = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    trainer.fit(model, batches, DataLoader(val_set, batch_size=len(val_set)))
    print(f"{best.best_model_path}: validation accuracy {best.best_model_score:.4f}")
    return Path(best.best_model_path)


def strip_wrongly(checkpoint: Path, out: Path) -> None:
    """Save the weights the way the usual snippet does: ``model.`` goes, ``_orig_mod.`` stays."""
    state_dict = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save({key.removeprefix("model."): value for key, value in state_dict.items()}, out)


def evaluate(net: nn.Module) -> tuple[float, Tensor]:
    """Give the accuracy on the validation images, and how many of them fall to each class."""
    images, labels = split_digits()[1].tensors
    with torch.no_grad():
        predicted = net.eval()(images).argmax(dim=1)
    return (predicted == labels).float().mean().item(), predicted.bincount(minlength=10)


def write_pictures(folder: Path) -> None:
    """Write the validation images as grey PNG files, one folder per class."""
    from PIL import Image

    images, labels = split_digits()[1].tensors
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = folder / str(label) / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(path)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the two files")
    parser.add_argument("--epochs", type=int, default=12, help="how long to train")
    parser.add_argument("--keep-all", action="store_true", help="keep the checkpoint of every epoch, too")
    parser.add_argument("--pictures", type=Path, help="only write the validation images into this folder")
    return parser.parse_args()


def main() -> None:
    """Train, save both files and show what a plain loader makes of the second one."""
    arguments = parse()
    if arguments.pictures is not None:
        write_pictures(arguments.pictures)
        return
    out = arguments.out
    (out / "digits.ckpt").unlink(missing_ok=True)
    checkpoint = train(out, arguments.epochs, arguments.keep_all)
    if arguments.keep_all:
        checkpoint = Path(shutil.copy(checkpoint, out / "digits.ckpt"))
    wrong = out / "digits_wrong_strip.pt"
    strip_wrongly(checkpoint, wrong)
    net = DigitsNet()
    net.load_state_dict(torch.load(wrong, weights_only=True), strict=False)
    accuracy, counts = evaluate(net)
    print(f"{wrong}: validation accuracy {accuracy:.4f}, predictions per class {counts.tolist()}")


if __name__ == "__main__":
    main()
