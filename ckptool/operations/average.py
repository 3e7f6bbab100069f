"""Average checkpoints of one model: which tensors are averaged, which must be equal, and what cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptool.errors import OutputRefused
from ckptool.model.dtypes import BY_NAME, DType
from ckptool.model.plans import Note
from ckptool.model.values import OpaqueTensor, Storage, TensorSpec, row_major
from ckptool.operations.opening import OpenedCheckpoint
from ckptool.operations.runs import same_bytes
from ckptool.operations.transforms import payload_of

_MAX_NAMED = 3
_COMPLEX = frozenset({"complex64", "complex128"})
_STATISTICS = (".running_mean", ".running_var")


@dataclass(frozen=True, slots=True)
class Averaged:
    """Hold the tensors of the output by clean name, and what is to be said about them."""

    specs: Mapping[str, TensorSpec]
    notes: tuple[Note, ...]


def average(
    first: OpenedCheckpoint,
    specs: Mapping[str, TensorSpec],
    opaque: Mapping[str, OpaqueTensor],
    others: Sequence[OpenedCheckpoint],
    cast: DType | None,
) -> Averaged:
    """Replace tensors, by clean name, with the means of those of the same name in all checkpoints.

    Floating and complex tensors are averaged. Others are taken where they are equal in all; a number that differs (a
    counter, ``num_batches_tracked``) is that of the last checkpoint, as torch.optim.swa_utils leaves it. ``cast`` is
    the element type that they will be cast to.

    :raises OutputRefused: names, shapes or element types differ, or a tensor that cannot be averaged does.
    """
    path = first.checkpoint.path
    if opaque:
        raise OutputRefused(f'{path}: "{next(iter(opaque))}" is no dense tensor and has no mean; --exclude it')
    found = [_matching(path, specs, other) for other in others]
    means: dict[tuple[Any, ...], TensorSpec] = {}
    result: dict[str, TensorSpec] = {}
    counters: list[str] = []
    for name, spec in specs.items():
        views = (spec, *(tensors[name] for tensors in found))
        if spec.dtype.is_floating or spec.dtype.name in _COMPLEX:
            identity = tuple(view.view_key for view in views)  # tied in all of them, they stay tied
            result[name] = means.setdefault(identity, _mean(views, cast))
        else:
            result[name], is_equal = _unaveraged(name, views, others)
            counters += [] if is_equal else [name]
    return Averaged(result, tuple(_notes(1 + len(others), result, counters)))


def _matching(path: Any, specs: Mapping[str, TensorSpec], other: OpenedCheckpoint) -> dict[str, TensorSpec]:
    """Give the tensors of another checkpoint, of the same names, shapes and element types."""
    tensors, place = other.tensors, other.checkpoint.path
    missing, extra = [name for name in specs if name not in tensors], [name for name in tensors if name not in specs]
    if missing or extra:
        what = f"has no {_some(missing)}, as {path} has" if missing else f"has {_some(extra)}, as {path} has not"
        raise OutputRefused(f"{place}: {what}; average checkpoints of one model, or leave them out with --exclude")
    found = {}
    for name, spec in specs.items():
        tensor = tensors[name]
        if not isinstance(tensor, TensorSpec) or (tensor.shape, tensor.dtype) != (spec.shape, spec.dtype):
            theirs = f"{tensor.dtype.name if tensor.dtype else tensor} {list(tensor.shape or ())}"
            raise OutputRefused(
                f'{place}: "{name}" is {theirs} there and {spec.dtype.name} {list(spec.shape)} in {path}; '
                "average checkpoints of one model, brought to one --dtype"
            )
        found[name] = tensor
    return found


def _mean(views: Sequence[TensorSpec], cast: DType | None) -> TensorSpec:
    """Describe the mean; where it is cast anyway, that is done from the sum's own type, and rounds once."""
    from ckptool.operations.mean import MeanSource  # NumPy

    spec = views[0]
    is_cast = cast is not None and spec.dtype.is_floating and spec.dtype.itemsize < 4
    source = MeanSource(tuple(views), BY_NAME["float32"] if is_cast else spec.dtype)
    storage = Storage(spec.storage.key, source, source.nbytes)
    return TensorSpec(source.target, spec.shape, row_major(spec.shape), 0, storage, is_parameter=spec.is_parameter)


def _unaveraged(name: str, views: Sequence[TensorSpec], others: Sequence[OpenedCheckpoint]) -> tuple[TensorSpec, bool]:
    first = payload_of(views[0], key=name)
    for view, other in zip(views[1:], others, strict=True):
        if not same_bytes(first, payload_of(view, key=name)):
            if views[0].shape:
                raise OutputRefused(
                    f'{other.checkpoint.path}: "{name}" ({views[0].dtype.name}) has no mean and differs from that '
                    "of the first checkpoint; leave it out with --exclude"
                )
            return views[-1], False
    return views[0], True


def _notes(count: int, specs: Mapping[str, TensorSpec], counters: Sequence[str]) -> Iterator[Note]:
    yield Note("averaged", f"each floating tensor is the mean of {count} checkpoints, summed in float32")
    if counters:
        yield Note("counters-kept", f"{_some(counters)} differ and are those of the last checkpoint")
    statistics = [name for name in specs if name.endswith(_STATISTICS)]
    if statistics:
        text = (
            f"{len(statistics)} running statistics were averaged, too: swa_utils.update_bn of torch measures them anew"
        )
        yield Note("running-statistics", text)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(f'"{name}"' for name in names[:_MAX_NAMED]) + more
