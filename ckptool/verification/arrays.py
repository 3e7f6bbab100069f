"""Arrays out of a file, as tensors: NumPy's own formats and checkpoints, read as data. Nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from ckptool.errors import CkptoolError
from ckptool.formats import open_checkpoint
from ckptool.loading import check_bytes, materialise
from ckptool.model.values import DictNode, OpaqueTensor, TensorSpec

_CHECKPOINTS = (".pt", ".pth", ".safetensors", ".bin", ".ckpt")
ARRAY_SUFFIXES = frozenset((".npz", ".npy", *_CHECKPOINTS))
# NumPy has neither bfloat16 nor its wider types: these are the ones that torch has as well.
_KINDS = "biufc"


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Give the arrays of a file by name, in its order; a single one without a name is called ``0``.

    :raises CkptoolError: it cannot be read, or holds something else.
    """
    suffix = path.suffix.lower()
    if suffix not in ARRAY_SUFFIXES:
        raise CkptoolError(f"{path}: is no file of arrays; give .npz, .npy, .pt or .safetensors")
    arrays = _READ.get(suffix, _read_checkpoint)(path)
    if not arrays:
        raise CkptoolError(f"{path}: holds no array; save the inputs in it")
    return arrays


def _read_npy(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            return {"0": _parse_npy(file, path.stat().st_size)}
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            return {_plain_name(info.filename): _read_member(archive, info) for info in members}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise _unreadable(path, error) from error


def _plain_name(member: str) -> str:
    """Give the name of an array; those that were saved without one (``arr_0``) count from 0."""
    name = member.removesuffix(".npy")
    number = name.removeprefix("arr_")
    return number if number != name and number.isdecimal() else name


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    with archive.open(info) as file:
        return _parse_npy(file, info.file_size)


def _parse_npy(file: IO[bytes], nbytes: int) -> Tensor:
    """Read one array after its declared size was held against the bytes that are there."""
    version = npy.read_magic(file)
    read_header: Any = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read_header is None:
        raise ValueError(f"version {version} of the format")
    shape, fortran, dtype = read_header(file)
    if dtype.kind not in _KINDS:
        raise ValueError(f"elements of type {dtype}, which are no numbers")
    if math.prod(shape) * dtype.itemsize > nbytes:
        raise ValueError("fewer bytes than its header says")
    content = bytearray(file.read(math.prod(shape) * dtype.itemsize))
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    return _to_tensor(array)


def _to_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    wider = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64, "float128": np.float64}.get(native.dtype.name)
    plain = native if wider is None else native.astype(wider)
    return torch.from_numpy(plain if plain.flags.c_contiguous else plain.copy())


def _unreadable(path: Path, error: Exception) -> CkptoolError:
    why = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return CkptoolError(f"{path}: cannot be read ({why}); save the arrays again with numpy.savez")


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    with open_checkpoint(path) as checkpoint:
        specs = _specs(path, checkpoint.root)
        tensors = materialise(path, specs)
        check_bytes(specs.values())
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _specs(path: Path, root: Any) -> dict[str, TensorSpec | OpaqueTensor]:
    """Name the tensors of a file that holds one, a list of them, or a mapping from names to them."""
    if isinstance(root, TensorSpec | OpaqueTensor):
        return {"0": root}
    if isinstance(root, DictNode):
        entries = root.text_items()
    elif isinstance(root, list | tuple):
        entries = {str(place): value for place, value in enumerate(root)}
    else:
        entries = {}
    strange = [name for name, value in entries.items() if not isinstance(value, TensorSpec | OpaqueTensor)]
    if strange or not entries:
        what = f"{strange[0]!a} is no tensor" if strange else "it is no mapping from names to tensors"
        raise CkptoolError(f"{path}: {what}; save the inputs as a tensor, or as a dict of tensors by argument name")
    return entries


_READ: dict[str, Callable[[Path], dict[str, Tensor]]] = {".npz": _read_npz, ".npy": _read_npy}
