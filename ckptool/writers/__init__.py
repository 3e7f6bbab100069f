"""Copy plans in, files out: safetensors and torch files, streamed, published whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from ckptool.model.copies import CopyPlan, Payload
from ckptool.model.sources import Progress
from ckptool.writers.safetensors import count_safetensors_bytes, write_safetensors
from ckptool.writers.shards import StagedFolder, encode_index, staging_folder
from ckptool.writers.staging import StagedFile, staging, syncing
from ckptool.writers.torch_zip import count_torch_bytes, write_torch

__all__ = ["WRITERS", "StagedFile", "StagedFolder", "Writer", "encode_index", "staging", "staging_folder", "syncing"]


@dataclass(frozen=True, slots=True)
class Writer:
    """Write one container kind.

    ``nbytes`` gives the size of the file in bytes before it is written; ``write`` streams it, tells the progress of
    every byte of a tensor, and gives the CRC32 of each payload.
    """

    nbytes: Callable[[CopyPlan], int]
    write: Callable[[CopyPlan, BinaryIO, Progress], Mapping[Payload, int]]


WRITERS: Mapping[str, Writer] = {
    "safetensors": Writer(count_safetensors_bytes, write_safetensors),
    "torch": Writer(count_torch_bytes, write_torch),
}
