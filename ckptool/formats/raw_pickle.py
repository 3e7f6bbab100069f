"""A plain pickle, as Detectron2 writes its models: arrays of NumPy, or tensors of torch, lie between its opcodes."""

from __future__ import annotations

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.pickle import GlobalLog, read_pickle, scan_rest
from ckptool.formats.pickled_storage import read_pickled_storage
from ckptool.formats.torch_zip import LARGEST_PICKLE
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.values import TensorSpec, walk

_LABEL = "the pickle"


def read_raw_pickle(file: InputFile) -> Checkpoint:
    """Describe what a pickle holds; nothing it names is imported. Its arrays are kept in memory.

    :raises UnreadableCheckpoint: it is damaged or too large. ``globals`` of the error are those found until then.
    """
    if file.size > LARGEST_PICKLE:
        raise UnreadableCheckpoint(
            f"this is a plain pickle of {file.size:,} bytes, and {LARGEST_PICKLE:,} are read at most; "
            "load it where it was made and save its tensors with torch.save or safetensors"
        )
    log = GlobalLog()
    data = file.read(0, file.size)
    unpickled = read_pickle(
        data,
        label=_LABEL,
        load_storage=None,
        log=log,
        load_bytes=lambda stream: read_pickled_storage(stream, log),
    )
    if unpickled.end != file.size:
        raise _trailing(data, unpickled.end, log)
    found = [node.storage for _, node in walk(unpickled.value) if isinstance(node, TensorSpec)]
    return Checkpoint(
        path=file.path,
        format="pickle",
        file_bytes=file.size,
        root=unpickled.value,
        file=file,
        storages=tuple(dict.fromkeys(found)),
        globals=log.uses(),
        findings=tuple(log.findings),
    )


def _trailing(data: bytes, end: int, log: GlobalLog) -> UnreadableCheckpoint:
    """Refuse what follows a pickle, and say what that names."""
    scan_rest(data, label=_LABEL, log=log, start=end)
    error = UnreadableCheckpoint(
        f"{len(data) - end:,} bytes follow the pickle, which most readers pass over; "
        "load it where it was made and save all of it as one"
    )
    error.globals = log.uses()
    return error
