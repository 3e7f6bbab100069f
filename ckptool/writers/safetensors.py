"""Write a safetensors file, byte for byte as the library does.

Source: https://github.com/huggingface/safetensors, ``safetensors/src/tensor.rs`` (``prepare``).
"""

from __future__ import annotations

import json
import struct
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

from ckptool.errors import OutputRefused, PlanRefused, UnsupportedTensor
from ckptool.model.copies import CopyPlan, Payload, PlannedTensor
from ckptool.model.sources import Progress
from ckptool.writers.stream import copy_payload

_ALIGNMENT = 8
_MAX_HEADER_BYTES = 100_000_000  # the library refuses to read a longer one
_METADATA = "__metadata__"
# The order of the library's ``Dtype``: tensors are laid out from the last to the first, so that all stay aligned.
_RANKED = (
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)
_RANK = {name: rank for rank, name in enumerate(_RANKED)}


def write_safetensors(plan: CopyPlan, file: BinaryIO, progress: Progress) -> dict[Payload, int]:
    """Write the tensors of a plan without its aliases; give the CRC32 of each payload.

    :raises UnsupportedTensor: a dtype has no name in safetensors.
    :raises PlanRefused: a tensor's name cannot stand in a header.
    :raises OutputRefused: the header would be longer than readers accept.
    """
    layout = _lay_out(plan)
    file.write(layout.header)
    checksums = {tensor.payload: copy_payload(tensor.payload, file, progress) for tensor in layout.tensors}
    file.flush()
    return checksums


def count_safetensors_bytes(plan: CopyPlan) -> int:
    """Give the size of the file in bytes; raises as ``write_safetensors`` does."""
    layout = _lay_out(plan)
    return len(layout.header) + sum(tensor.payload.nbytes for tensor in layout.tensors)


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    header: bytes
    tensors: tuple[PlannedTensor, ...]


@lru_cache(maxsize=1)  # a plan is asked for its size first and then written
def _lay_out(plan: CopyPlan) -> _Layout:
    written = {name: tensor for name, tensor in plan.tensors.items() if name not in plan.aliases}
    dtypes = {name: _dtype_name(name, tensor) for name, tensor in written.items()}
    for name in written:
        _require_name(name)
    order = sorted(written, key=lambda name: (-_RANK[dtypes[name]], name))
    header: dict[str, Any] = {_METADATA: dict(sorted(plan.metadata.items()))} if plan.metadata else {}
    position = 0
    for name in order:
        end = position + written[name].payload.nbytes
        header[name] = {"dtype": dtypes[name], "shape": _header_shape(written[name]), "data_offsets": [position, end]}
        position = end
    return _Layout(_encode(header), tuple(written[name] for name in order))


def _dtype_name(name: str, tensor: PlannedTensor) -> str:
    # A header counts single 4-bit values, and a scalar has no dimension to count the two of its byte in.
    if tensor.dtype.safetensors is None or (tensor.dtype.safetensors == "F4" and not tensor.shape):
        raise UnsupportedTensor(
            f'tensor "{ascii(name)[1:-1]}" is {tensor.dtype.name} of shape {tensor.shape}, which safetensors '
            "cannot hold; write a .pt file or leave it out with --exclude"
        )
    return tensor.dtype.safetensors


def _require_name(name: str) -> None:
    """Refuse names that the library writes but cannot read, and those that no text or terminal can carry."""
    unfit = name == _METADATA or any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
    if unfit:
        raise PlanRefused(
            "bad-key",
            f'tensor "{ascii(name)[1:-1]}" has a name that a safetensors file cannot carry; rename it with --rename',
        )


def _header_shape(tensor: PlannedTensor) -> list[int]:
    """Count values where torch counts bytes: two 4-bit floats lie in each."""
    shape = list(tensor.shape)
    if tensor.dtype.safetensors == "F4":
        shape[-1] *= 2
    return shape


def _encode(header: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise OutputRefused(
            "the metadata holds text that is no valid Unicode; leave it out with --no-metadata"
        ) from error
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _MAX_HEADER_BYTES:
        raise OutputRefused(
            f"the safetensors header would take {len(text)} bytes where readers accept {_MAX_HEADER_BYTES}; "
            "write a .pt file or add --no-metadata"
        )
    return struct.pack("<Q", len(text)) + text
