"""Judge one open file in one pass over its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckptool.errors import PlanRefused
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.inspection import TensorRow
from ckptool.model.sources import Progress
from ckptool.model.values import OpaqueTensor, TensorSpec
from ckptool.model.verification import Check, VerifyOptions
from ckptool.operations.health.batchnorm import check_batchnorm
from ckptool.operations.health.container import check_integrity, check_keys, check_safety
from ckptool.operations.health.roles import Ends
from ckptool.operations.health.survey import survey
from ckptool.operations.health.untrained import check_untrained
from ckptool.operations.health.values import check_dead, check_duplicates, check_finite, check_outliers
from ckptool.operations.manifest import check_manifest
from ckptool.operations.opening import OpenedCheckpoint
from ckptool.operations.preview import preview
from ckptool.operations.tables import by_place

_Tensors = Mapping[str, TensorSpec | OpaqueTensor]


def check_file(opened: OpenedCheckpoint, options: VerifyOptions, progress: Progress) -> tuple[Check, ...]:
    """Check a file and the weights in it without a model; every byte that is judged is read once.

    Damage is a check that fails, not an error. Where it is open which weights are meant, all tensors are judged, each
    under its place in the file.
    """
    checkpoint = opened.checkpoint
    cleaned = OpenedCheckpoint(checkpoint, options.weights, options.keys)
    tensors = _judged(cleaned, options)
    ends = _ends(checkpoint, tensors)
    found = survey(checkpoint, tensors, progress)
    return (
        check_integrity(checkpoint, found),
        *((check_manifest(checkpoint, options.manifest, progress),) if options.manifest else ()),
        check_safety(checkpoint.globals, checkpoint.findings),
        check_keys(cleaned, options),
        check_finite(found.tensors),
        check_dead(found.tensors, ends, options.thresholds),
        check_batchnorm(found.tensors),
        check_outliers(found.tensors, ends, options.thresholds),
        check_duplicates(found.tensors),
        check_untrained(found.tensors, ends, options.thresholds),
    )


def _judged(cleaned: OpenedCheckpoint, options: VerifyOptions) -> _Tensors:
    """Give the tensors under the names by which they are told."""
    names = replace(options.keys, keep_prefixes=True) if options.as_is else options.keys
    try:
        return OpenedCheckpoint(cleaned.checkpoint, options.weights, names).tensors
    except PlanRefused:
        if cleaned.selection.chosen is not None:
            return cleaned.state_dict.tensors
        return by_place(cleaned.checkpoint)


def _ends(checkpoint: Checkpoint, tensors: _Tensors) -> Ends:
    rows = [TensorRow(name, name, "", tensor.shape, tensor.nbytes) for name, tensor in tensors.items()]
    network = preview(rows, in_order=not checkpoint.is_safetensors)
    if network is None:
        return Ends(None, None)
    first, last = network.first, network.last
    gives_classes = last is not None and last.outputs in (network.classes, network.vocabulary)
    return Ends(first.name if first else None, last.name if last and gives_classes else None)
