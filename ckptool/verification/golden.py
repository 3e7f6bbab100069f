"""Keep the inputs and answers of one verification in a safetensors file, and ask them again.

Layout: ``inputs`` (or ``inputs.NAME`` for each of several, by name or position) and ``outputs``, with one row for each
input; facts as text metadata. ``ckptool.golden`` is the version of this layout.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ckptool.errors import ChecksumMismatch, OutputRefused, UnreadableCheckpoint
from ckptool.formats import open_checkpoint
from ckptool.formats.sources import MemorySource
from ckptool.loading import materialise
from ckptool.model import dtypes
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.copies import CopyPlan, Extent, Payload, PlannedTensor
from ckptool.model.sources import NoProgress
from ckptool.model.values import DictNode, OpaqueTensor, TensorSpec
from ckptool.operations.agreement import GOLDEN_KEY
from ckptool.operations.readback import check_staged
from ckptool.operations.rounding import coarsest
from ckptool.verification.compare import ELSEWHERE
from ckptool.verification.device import Batch, move, take_inputs
from ckptool.verification.outputs import Inputs
from ckptool.writers import WRITERS, StagedFile
from ckptool.writers.saving import save

_VERSION = "1"
_INPUTS, _OUTPUTS = "inputs", "outputs"


@dataclass(frozen=True, slots=True)
class Golden:
    """Hold the inputs and answers that a golden file recorded; it can be fed to a model like any other inputs.

    ``facts`` are the texts recorded with them: ``task``, ``precision``, ``digest``, ``device``, ``torch``, ``model``,
    ``seed``.
    """

    path: Path
    inputs: Batch
    outputs: Tensor
    kind: str
    modality: str
    names: Sequence[str]
    facts: Mapping[str, str]
    batch_size: int = 16
    labels: Tensor | None = field(default=None, init=False)
    class_names: Sequence[str] | None = field(default=None, init=False)
    assumed_scale: bool = field(default=False, init=False)

    @property
    def count(self) -> int:
        """Count the inputs."""
        return len(self.outputs)

    def batches(self) -> Iterator[Batch]:
        """Give the inputs in batches, as they were recorded."""
        for start in range(0, self.count, self.batch_size):
            yield take_inputs(self.inputs, start, min(self.batch_size, self.count - start))

    def precision(self, device: torch.device, stored: str, *, same_tensors: bool) -> str:
        """Say by which thresholds the answers of weights on a device are to be judged.

        ``stored`` is the coarsest dtype of their file; ``same_tensors`` says that nothing was rounded since.
        """
        rounded = "float32" if same_tensors else coarsest((stored, self.facts.get("precision", "")))
        return ELSEWHERE if rounded == "float32" and self.facts.get("made_with") != made_with(device) else rounded


def made_with(device: torch.device) -> str:
    """Name what computes: answers of another device or torch are equal in their first digits only."""
    return f"{device.type}, torch {torch.__version__}"


def save_golden(path: Path, inputs: Inputs, outputs: Tensor, facts: Mapping[str, str], device: torch.device) -> None:
    """Write inputs, in the batches they come in, and the answers to them; the same content gives the same bytes.

    :raises OutputRefused: the path exists, the disk refuses, or the inputs differ in size.
    """
    batches = [move(batch, torch.device("cpu")) for batch in inputs.batches()]
    described = {
        **facts,
        GOLDEN_KEY: _VERSION,
        "kind": inputs.kind,
        "modality": inputs.modality,
        "names": json.dumps(list(inputs.names)),
        "structure": _structure(batches[0]),
        "made_with": made_with(device),
    }
    tensors = {**_joined(path, batches), _OUTPUTS: outputs}
    described["crc32"] = _checksum(tensors)
    plan = CopyPlan({name: _planned(tensor) for name, tensor in tensors.items()}, None, described)
    save(path, lambda staged: _write(plan, staged))


def _write(plan: CopyPlan, staged: StagedFile) -> None:
    progress = NoProgress()
    checksums = WRITERS["safetensors"].write(plan, staged.file, progress)
    staged.sync()
    with open_checkpoint(staged.path) as written:
        check_staged(written, plan, checksums, progress)


def _structure(batch: Batch) -> str:
    if isinstance(batch, Tensor):
        return "tensor"
    return "mapping" if isinstance(batch, Mapping) else "sequence"


def _joined(path: Path, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Join the batches tensor by tensor."""
    parts = [_by_name(batch) for batch in batches]
    try:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    except (RuntimeError, KeyError) as error:
        raise OutputRefused(
            f"{path}: inputs of different sizes cannot be kept as one; make them equal with --image-size or --inputs"
        ) from error


def _by_name(batch: Batch) -> dict[str, Tensor]:
    if isinstance(batch, Tensor):
        return {_INPUTS: batch}
    named = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    return {f"{_INPUTS}.{name}": tensor for name, tensor in named}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Sum up all bytes: a safetensors file has no checksum of its own, and a damaged answer convicts a sound model."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(_bytes(tensors[name]), found)
    return f"{found:08x}"


def _planned(tensor: Tensor) -> PlannedTensor:
    dtype = dtypes.BY_NAME[str(tensor.dtype).removeprefix("torch.")]
    source = MemorySource("memory", _bytes(tensor))
    extents = (Extent(source, 0, source.nbytes),) if source.nbytes else ()
    return PlannedTensor(dtype, tuple(tensor.shape), Payload(dtype, tensor.numel(), extents))


def read_golden(path: Path, batch_size: int) -> Golden | None:
    """Read a golden file; None where the path is a checkpoint and no golden file.

    :raises UnreadableCheckpoint: it is neither, is damaged, or is of a version that this ckptool does not know.
    """
    with open_checkpoint(path) as opened:
        version = opened.metadata.get(GOLDEN_KEY)
        if version is None:
            return None
        if version != _VERSION:
            raise UnreadableCheckpoint(f"{path}: is a golden file of version {version!a:.20}; update ckptool")
        return _as_golden(opened, batch_size)


def _as_golden(opened: Checkpoint, batch_size: int) -> Golden:
    tensors = {name: tensor.clone() for name, tensor in materialise(opened.path, _described(opened)).items()}
    if opened.metadata.get("crc32", _checksum(tensors)) != _checksum(tensors):
        raise ChecksumMismatch(
            f"{opened.path}: this golden file is not what was recorded; write it again with --save-golden"
        )
    outputs = tensors.pop(_OUTPUTS, None)
    inputs = _restored(tensors, opened.metadata.get("structure", ""))
    names = _names(opened.metadata.get("names", ""))
    rows = {len(tensor) if tensor.ndim else 0 for tensor in tensors.values()}
    if outputs is None or inputs is None or not outputs.ndim or {len(outputs), len(names)} != rows or rows == {0}:
        raise UnreadableCheckpoint(f"{opened.path}: is no whole golden file; write it again with --save-golden")
    kind, modality = (opened.metadata.get(key, "") for key in ("kind", "modality"))
    return Golden(opened.path, inputs, outputs, kind, modality, names, dict(opened.metadata), batch_size)


def _described(opened: Checkpoint) -> dict[str, TensorSpec | OpaqueTensor]:
    entries = opened.root.text_items() if isinstance(opened.root, DictNode) else {}
    return {name: value for name, value in entries.items() if isinstance(value, TensorSpec | OpaqueTensor)}


def _names(text: str) -> list[str]:
    try:
        names = json.loads(text)
    except ValueError:
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _restored(tensors: Mapping[str, Tensor], structure: str) -> Batch | None:
    """Put recorded inputs together as the model takes them; None where they do not make a whole."""
    if structure == "tensor":
        return tensors.get(_INPUTS) if len(tensors) == 1 else None
    named = {name.removeprefix(f"{_INPUTS}."): tensor for name, tensor in tensors.items()}
    if structure == "mapping":
        return named or None
    positions = [str(index) for index in range(len(named))]
    return [named[index] for index in positions] if structure == "sequence" and {*positions} == named.keys() else None
