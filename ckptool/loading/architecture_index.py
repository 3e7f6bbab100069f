"""Build the index of architectures: ``python -m ckptool.loading.architecture_index CACHE [OUT]``.

Every model that timm, torchvision and transformers know by name is built on the meta device, at its defaults. What was
built is kept in the folder CACHE, so that a run that was interrupted goes on where it stopped; a model that cannot be
built at its defaults stays out, and the reason stands in CACHE.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ckptool.errors import CkptoolError
from ckptool.loading.factories import parameters_of
from ckptool.loading.foreign import foreign_code
from ckptool.loading.torchvision import ensure_torchvision
from ckptool.model.inspection import TensorRow
from ckptool.operations.architectures.building import IndexBuilder
from ckptool.operations.architectures.index import PATH
from ckptool.operations.architectures.templates import template_of
from ckptool.operations.module_tree import grow

Build = Callable[[], nn.Module]
Job = tuple[str, str, Build]  # family, name, what builds it
Record = dict[str, Any]


def build_index(records: Iterable[Record], versions: Mapping[str, str]) -> bytes:
    """Encode what was built; a record has ``zoo``, ``family``, ``name`` and ``tensors`` (pairs of name and shape)."""
    builder = IndexBuilder()
    for record in records:
        rows = [TensorRow(name, name, "", tuple(shape), 0) for name, shape in record["tensors"]]
        if rows:
            builder.add(record["zoo"], record["family"], record["name"], grow(rows), template_of(rows))
    return builder.encode(versions)


def main(arguments: list[str]) -> None:
    """Build what is not in the cache yet, and write the index."""
    cache = Path(arguments[0])
    target = Path(arguments[1]) if len(arguments) > 1 else PATH
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    ensure_torchvision()
    records = [record for zoo in _ZOOS for record in _records(cache / f"{zoo}.jsonl", zoo) if "tensors" in record]
    target.write_bytes(build_index(records, {name: version(name) for name in ("torch", *_ZOOS)}))


def _records(path: Path, zoo: str) -> list[Record]:
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    known = {record["name"] for record in records}
    with path.open("a", encoding="utf-8") as file:
        for job in _ZOOS[zoo]():
            if job[1] not in known:
                records.append({"zoo": zoo, "family": job[0], "name": job[1], **_built(*job)})
                file.write(json.dumps(records[-1]) + "\n")
                file.flush()
                sys.stderr.write(f"{zoo}:{job[1]} {records[-1].get('error', '')}\n")
    return records


def _built(family: str, name: str, build: Build) -> Record:
    """Build one model and list its tensors, or say why it cannot be built."""
    try:
        with foreign_code(f"{family} {name}", "it stays out"):
            model = _without_memory(build)
    except CkptoolError as error:
        return {"error": str(error)}
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return {"tensors": [(key, tuple(value.shape)) for key, value in state.items()]}


def _without_memory(build: Build) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):  # it computes its own sizes with tensors
        with _parameters_on_meta():
            return build()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Send every parameter to the meta device as soon as a module has it."""
    register = nn.Module.register_parameter

    def send(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = send  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _timm() -> Iterator[Job]:
    timm, registry = import_module("timm"), import_module("timm.models._registry")
    for name in timm.list_models():
        yield registry._model_to_module[name], name, partial(timm.create_model, name, pretrained=False)


def _torchvision() -> Iterator[Job]:
    models = import_module("torchvision.models")
    for name in models.list_models():
        builder = models.get_model_builder(name)
        if not name.startswith("quantized_"):
            taken = parameters_of(builder) or {}
            nothing = {argument: None for argument in ("weights", "weights_backbone") if argument in taken}
            yield builder.__module__.rpartition(".")[2], name, partial(builder, **nothing)


# Of the tables in transformers.models.auto.modeling_auto; a class stands in several.
_TASKS = (
    *("MODEL_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_MASKED_LM_MAPPING", "MODEL_FOR_PRETRAINING_MAPPING"),
    *("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    *("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_CTC_MAPPING", "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING"),
    *("MODEL_FOR_OBJECT_DETECTION_MAPPING", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING"),
    *("MODEL_FOR_QUESTION_ANSWERING_MAPPING", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"),
    *("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING"),
    *("MODEL_FOR_DEPTH_ESTIMATION_MAPPING", "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING"),
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING",
)


def _transformers() -> Iterator[Job]:
    library, auto = import_module("transformers"), import_module("transformers.models.auto.modeling_auto")
    configurations = import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    library.logging.set_verbosity_error()
    seen: dict[str, str] = {}
    for task in _TASKS:
        for family, names in getattr(auto, f"{task}_NAMES").items():
            seen.setdefault(names if isinstance(names, str) else names[0], family)
    for name, family in seen.items():
        yield family, name, partial(_at_defaults, library, name, configurations, family)


def _at_defaults(library: ModuleType, name: str, configurations: Mapping[str, Any], family: str) -> nn.Module:
    model: nn.Module = getattr(library, name)(configurations[family]())
    return model


_ZOOS: Mapping[str, Callable[[], Iterator[Job]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}

if __name__ == "__main__":
    main(sys.argv[1:])
