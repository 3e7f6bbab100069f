"""Which task a model does, told from its answers, its labels and its last layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ckptool.model.verification import Task
from ckptool.verification.device import Batch, call_model, evaluating, move
from ckptool.verification.finite import watching
from ckptool.verification.outputs import Inputs, Outputs, first_batch, run_batch
from ckptool.verification.tasks.language import tokens_of

_VECTORS = {"pooler_output", "last_hidden_state", "sentence_embedding", "image_embeds", "text_embeds", "embeddings"}
# How BatchNorm, LayerNorm and GroupNorm call it.
_NORM_WIDTHS = ("num_features", "normalized_shape", "num_channels")
_PROBLEMS: dict[str, Task] = {
    "regression": "regression",
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
}


def find_task(model: nn.Module, inputs: Inputs, outputs: Outputs, device: torch.device) -> Task:
    """Tell the task; ``--task`` is for what cannot be told: a vector of numbers looks like logits."""
    if outputs.detections or "pred_boxes" in outputs.tensors:
        return "detection"
    answers = outputs.judged
    if answers.ndim <= 2:
        return _task_of_rows(model, inputs, outputs, device)
    first = first_batch(inputs, outputs)
    if answers.ndim == 3:
        return _task_of_sequences(outputs, first)
    return "regression" if _is_image_to_image(answers, first) else "segmentation"


def _is_image_to_image(answers: Tensor, batch: Batch) -> bool:
    return answers.shape[1] == 1 or (isinstance(batch, Tensor) and batch.shape[1:] == answers.shape[1:])


def _task_of_sequences(outputs: Outputs, batch: Batch) -> Task:
    if outputs.main in _VECTORS:
        return "embedding"
    tokens = tokens_of(batch)
    if tokens is not None and outputs.judged.shape[2] > int(tokens.max()):
        return "language"
    return "segmentation" if outputs.main == "logits" else "embedding" if tokens is not None else "regression"


def _task_of_rows(model: nn.Module, inputs: Inputs, outputs: Outputs, device: torch.device) -> Task:
    """Ask the most telling first: the labels, the model's own configuration, the values, the last layer."""
    answers = outputs.judged
    if not answers.is_floating_point():
        return "classification"
    if outputs.main in _VECTORS:
        return "embedding"
    known = _task_of_labels(inputs.labels) or _PROBLEMS.get(str(_configured(model, "problem_type")))
    if known:
        return known
    width = answers.shape[1] if answers.ndim == 2 else 1
    names = inputs.class_names
    if width == 1:
        return "classification" if names and len(names) == 2 else "regression"
    return _task_of_values(answers) or _task_of_layer(model, first_batch(inputs, outputs), device, width)


def _task_of_labels(labels: Tensor | None) -> Task | None:
    if labels is None:
        return None
    if labels.is_floating_point():
        return "regression"
    return "multilabel" if labels.ndim == 2 and labels.shape[1] > 1 else "classification"


def _configured(model: nn.Module, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)


def _task_of_values(answers: Tensor) -> Task | None:
    sums = answers.double().sum(dim=1)
    if bool((answers >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all()):
        return "classification"
    if bool(((answers >= 0) & (answers <= 1)).all()):
        return "multilabel"
    lengths = answers.double().norm(dim=1)
    return "embedding" if bool(((lengths - 1).abs() < 1e-3).all()) else None


def _task_of_layer(model: nn.Module, batch: Batch, device: torch.device, width: int) -> Task:
    """Take for a vector what comes straight from a normalisation of that width, as from a network without a head."""
    last: list[nn.Module] = []

    def look(name: str, _given: Any, _answer: Any) -> None:
        module = model.get_submodule(name)
        if next(module.parameters(recurse=False), None) is not None:
            last[:] = [module]

    with evaluating(model), watching(model, look):
        call_model(model, move(batch, device))
    widths = [getattr(last[0], name, None) for name in _NORM_WIDTHS] if last else []
    return "embedding" if width in widths or (width,) in widths else "classification"


def reads_left_to_right(model: nn.Module, batch: Batch, device: torch.device) -> bool:
    """Tell whether another last token leaves the answers at the first positions as they are."""
    tokens = tokens_of(batch)
    if tokens is None or tokens.shape[1] < 2:
        return False
    with evaluating(model):
        before = run_batch(model, batch, device).judged
        after = run_batch(model, _with_other_end(batch, tokens), device).judged
    return bool(torch.allclose(before[:, 0], after[:, 0], rtol=1e-4, atol=1e-5))


def _with_other_end(batch: Batch, tokens: Tensor) -> Batch:
    other = tokens.clone()
    other[:, -1] = torch.where(other[:, -1] == 0, 1, other[:, -1] - 1)
    if isinstance(batch, Tensor):
        return other
    if isinstance(batch, Mapping):
        return {name: other if each is tokens else each for name, each in batch.items()}
    return [other if each is tokens else each for each in batch]
