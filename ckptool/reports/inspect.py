"""What inspect found, for programs: as a JSON document and as tab-separated lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ckptool.model.checkpoint import Shard
from ckptool.model.inspection import (
    Architecture,
    Inspection,
    KeySummary,
    ModuleNode,
    Safety,
    SpecialTensor,
    StateDictSummary,
    TensorRow,
)
from ckptool.model.training import Fact, Training
from ckptool.model.values import GlobalUse
from ckptool.reports.json import Encoded, encode_texts, to_text

if TYPE_CHECKING:  # few read the values
    from ckptool.model.results import TensorStatistics

SCHEMA = "ckptool.inspect/1"


def document(inspection: Inspection) -> dict[str, Any]:
    """Lay one inspection out as the fields of a JSON object (sizes in bytes); the names are stable."""
    fields = {
        "path": inspection.path,
        "format": inspection.format,
        "file_bytes": inspection.file_bytes,
        "container": dict(inspection.facts),
        "shards": [_shard(shard) for shard in inspection.shards],
        "metadata": dict(inspection.metadata),
        "producer": asdict(inspection.producer),
        "disk": asdict(inspection.disk),
        "state_dicts": [_state_dict(summary) for summary in inspection.state_dicts],
        "keys": _keys(inspection.keys),
        "training": _training(inspection.training),
        "hyper_parameters": inspection.hyper_parameters,
        "ties": [list(names) for names in inspection.ties],
        "safety": _safety(inspection.safety),
        "not_dense": list(map(_special, inspection.not_dense)),
        "architecture": inspection.architecture and _architecture(inspection.architecture, inspection.selected),
        "notes": list(map(asdict, inspection.notes)),
        "next": inspection.next.command,
        "next_reason": inspection.next.reason,
    }
    if inspection.tensors is not None:
        fields["tensors"] = _tensors(inspection.tensors)
    if inspection.tree is not None:
        fields["tree"] = _module(inspection.tree)
    return fields


def _shard(shard: Shard) -> dict[str, Any]:
    return {"name": shard.name, "bytes": shard.nbytes, "tensors": len(shard.keys)}


def refused_document(path: str, reason: str, safety: Safety) -> dict[str, Any]:
    """Lay out why a file could not be read and, where there is any, what its pickle named until then."""
    found = {"safety": _safety(safety)} if safety.globals else {}
    return {"path": path, "error": reason, **found}


def _safety(safety: Safety) -> dict[str, Any]:
    return {"verdict": safety.verdict, "globals": list(map(_global, safety.globals))}


def _state_dict(summary: StateDictSummary) -> dict[str, Any]:
    return {
        "path": summary.path,
        "role": summary.role,
        "selected": summary.selected,
        "reason": summary.reason,
        "tensors": summary.tensors,
        "parameters": summary.parameters,
        "elements": summary.elements,
        "bytes": summary.nbytes,
        "dtypes": {
            share.dtype: {"tensors": share.tensors, "elements": share.elements, "bytes": share.nbytes}
            for share in summary.dtypes
        },
    }


def _keys(keys: KeySummary) -> dict[str, Any]:
    return {
        "already_clean": keys.already_clean,
        "certainty": keys.certainty,
        "wrappers": list(map(asdict, keys.wrappers)),
        "renamed": keys.renamed,
        "examples": [move._asdict() for move in keys.examples],
        "dropped": [move._asdict() for move in keys.dropped],
        "refusal": keys.refusal and asdict(keys.refusal),
    }


def _training(training: Training) -> dict[str, Any]:
    plain = ("epoch", "global_step", "monitor", "mode", "learning_rate", "optimizer")
    explained = ("compiled", "strategy", "ema")
    return {
        **{name: _value(getattr(training, name)) for name in plain},
        "metrics": {name: fact.value for name, fact in training.metrics.items()},
        "versions": {name: fact.value for name, fact in training.versions.items()},
        **{name: with_evidence(getattr(training, name)) for name in explained},
    }


def _value(fact: Fact | None) -> Any:
    return None if fact is None else fact.value


def with_evidence(fact: Fact | None) -> dict[str, Any] | None:
    """Lay out what a file states, with the place where it stands."""
    return None if fact is None else {"value": fact.value, "evidence": fact.evidence}


def _global(use: GlobalUse) -> dict[str, Any]:
    return {"name": use.ref.full_name, "severity": use.ref.severity, "where": use.where, "called": use.called}


def _architecture(architecture: Architecture, selected: StateDictSummary | None) -> dict[str, Any]:
    match = architecture.match
    return {
        "name": match and match.name,
        "family": match and match.family,
        "match": "structure" if match is None else match.kind,
        "score": match and match.score,
        "alternatives": match.alternatives if match else (),
        "differences": match.differences if match else (),
        "layers": dict(architecture.layers),
        "first": architecture.first and architecture.first._asdict(),
        "last": architecture.last and architecture.last._asdict(),
        "widths": architecture.widths,
        "input_channels": architecture.input_channels,
        "classes": architecture.classes,
        "vocabulary": architecture.vocabulary,
        "blocks": [_module(block) for block in architecture.blocks],
        "parameters": selected and selected.parameters,
        **asdict(architecture.structure),
        "stages": [stage._asdict() for stage in architecture.structure.stages],
    }


def _tensors(tensors: Sequence[TensorRow]) -> Encoded:
    """Write one object for each tensor; what many have in common is written once."""
    names = [tensor.key for tensor in tensors]
    keys, sources = (
        encode_texts([name or "" for name in names]),
        encode_texts([tensor.source_key for tensor in tensors]),
    )
    if None in names:
        keys = ["null" if name is None else key for name, key in zip(names, keys, strict=True)]
    facts = [tensor[2:] for tensor in tensors]
    texts = {fact: to_text(_tensor_facts(*fact))[1:] for fact in set(facts)}
    rows = zip(keys, sources, facts, strict=True)
    return Encoded([f'{{"key": {key}, "source_key": {source}, {texts[fact]}' for key, source, fact in rows])


def _special(tensor: SpecialTensor) -> dict[str, Any]:
    return {
        "key": tensor.key,
        "source_key": tensor.source_key,
        "kind": tensor.kind,
        "detail": tensor.detail,
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "bytes": tensor.nbytes,
        **tensor.facts,
        "parts": [
            {"name": part.name, "dtype": part.dtype, "shape": part.shape, "bytes": part.nbytes} for part in tensor.parts
        ],
    }


def _tensor_facts(
    dtype: str, shape: tuple[int, ...] | None, nbytes: int, statistics: TensorStatistics | None
) -> dict[str, Any]:
    fields: dict[str, Any] = {"dtype": dtype, "shape": shape, "bytes": nbytes}
    if statistics is not None:
        shares = {"finite": statistics.finite, "finite_share": statistics.finite_share}
        fields["statistics"] = asdict(statistics) | shares
    return fields


def _module(node: ModuleNode) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": node.name,
        "repeats": node.repeats,
        "tensors": node.tensors,
        "elements": node.elements,
        "bytes": node.nbytes,
    }
    if node.dtype:
        fields |= {"dtype": node.dtype, "shape": node.shape}
    if node.children:
        fields["children"] = list(map(_module, node.children))
    return fields
