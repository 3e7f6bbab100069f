"""A model that has answered its inputs, with the file that its weights are from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ckptool.loading.build import BuiltModel, archive_kind
from ckptool.model.verification import VerifyOptions
from ckptool.operations.opening import OpenedCheckpoint, open_path
from ckptool.verification.outputs import Inputs, Outputs


@dataclass(frozen=True, slots=True)
class Running:
    """Hold a model on its device, what it was given and what it answered; ``path`` is where its weights are from."""

    path: Path
    options: VerifyOptions
    built: BuiltModel
    model: nn.Module
    device: torch.device
    inputs: Inputs
    outputs: Outputs

    @property
    def is_program(self) -> bool:
        """Tell whether the weights are a program's own."""
        return archive_kind(self.path) is not None

    @contextmanager
    def viewed(self) -> Iterator[OpenedCheckpoint]:
        """Look at the weights that were loaded, as data.

        :raises CkptoolError: the file cannot be read any more.
        """
        with open_path(self.path) as opened:
            yield OpenedCheckpoint(opened.checkpoint, self.options.weights, self.options.keys)
