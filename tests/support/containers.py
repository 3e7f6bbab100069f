"""Write what tensors are kept in besides files of torch.save: programs, NumPy's files, tar archives of any age."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from support.crafted import FOUR_FLOATS, PersistentId, Rebuilt, named, pickled


def tarred(members: Mapping[str, bytes], layout: int = tarfile.USTAR_FORMAT, mode: str = "w") -> bytes:
    """Write a tar archive of regular files; ``w:gz`` compresses it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=layout) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def short_tar(members: Mapping[str, bytes]) -> bytes:
    """Write a tar archive that ends with the two blocks of zeros that it must have, and no more."""
    whole = tarred(members)
    return whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512 + 1024)


def zipped(members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """Write a zip archive as Python does."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return stream.getvalue()


def npy(array: Any, **options: Any) -> bytes:
    """Save one array as NumPy does."""
    stream = io.BytesIO()
    numpy.save(stream, array, **options)
    return stream.getvalue()


def npy_with(header: str, data: bytes = b"", version: bytes = b"\x01\0") -> bytes:
    """Write an array file with any header."""
    text = header.encode("latin-1")
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text + data


def npz(arrays: Mapping[str, Any], *, compressed: bool = False) -> bytes:
    """Save arrays as NumPy does."""
    stream = io.BytesIO()
    (numpy.savez_compressed if compressed else numpy.savez)(stream, **arrays)
    return stream.getvalue()


# --- torch before 0.1.10 ------------------------------------------------------------------------------------------

STORAGE_KEY, VIEW_KEY, TENSOR_KEY, PART_KEY = 11, 12, 21, 22


def torch_tar_members(**changes: bytes) -> dict[str, bytes]:
    """Make the four files of a checkpoint with a tensor, and a part of it through a view of its storage."""
    members = {
        "sys_info": pickled({"protocol_version": 1000, "little_endian": True, "type_sizes": {"int": 4}}),
        "storages": storages_file(),
        "tensors": tensors_file(),
        "pickle": pickled({"w": PersistentId(str(TENSOR_KEY)), "part": PersistentId(str(PART_KEY))}),
    }
    return members | changes


def storages_file(
    numel: int = 4, views: Any = ((VIEW_KEY, STORAGE_KEY, 1, 2),), count: Any = 1, tail: bytes = b""
) -> bytes:
    """Write the file of storages."""
    entry = pickled((STORAGE_KEY, "cpu", torch.FloatStorage)) + struct.pack("<q", numel) + FOUR_FLOATS
    return pickled(count) + entry + pickled([tuple(view) for view in views]) + tail


def tensors_file(
    sizes: tuple[int, ...] = (2, 2), strides: tuple[int, ...] = (2, 1), offset: int = 0, key: Any = STORAGE_KEY
) -> bytes:
    """Write the file of tensors, of which the first may lie."""
    return pickled(2) + _tensor(TENSOR_KEY, key, sizes, strides, offset) + _tensor(PART_KEY, VIEW_KEY, (2,), (1,), 0)


def _tensor(key: int, storage: Any, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int) -> bytes:
    numbers = struct.pack(f"<i4x{2 * len(sizes)}qq", len(sizes), *sizes, *strides, offset)
    return pickled((key, storage, torch.FloatTensor)) + numbers


# --- programs -----------------------------------------------------------------------------------------------------

CODE = b'class M(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n  w : Tensor\n'


class Module:
    """Stand for a module of a program."""


def script_members(code: bytes = CODE, **fields: Any) -> dict[str, bytes]:
    """Make the records of a TorchScript archive with one module."""
    fields = fields or {"w": Rebuilt(named())}
    body = pickled(fields)[2:-1]  # without PROTO and STOP
    return {
        "m/data/0": FOUR_FLOATS,
        "m/data.pkl": b"\x80\x02c__torch__\nM\n)\x81" + body + b"b.",
        "m/code/__torch__.py": code,
        "m/constants.pkl": pickle.dumps((), 2),
        "m/version": b"3\n",
    }


def old_script_members(**changes: Any) -> dict[str, bytes]:
    """Make the records of a TorchScript archive of torch 1.0."""
    tensor = {"offset": "0", "requiresGrad": True, "device": "cpu"}
    vector = tensor | {"strides": ["1"], "dataType": "FLOAT", "data": {"key": "tensors/0"}}
    model = {
        "protoVersion": "2",
        "producerVersion": "1.0",
        "mainModule": {
            "name": "M",
            "parameters": [{"isBuffer": True, "tensorId": "1", "name": "steps"}, {"name": "w"}],
            "submodules": [{"name": "sub", "parameters": [{"isBuffer": False, "tensorId": "2", "name": "v"}]}],
        },
        "tensors": [
            tensor | {"dims": ["2", "2"], "strides": ["2", "1"], "dataType": "FLOAT", "data": {"key": "tensors/0"}},
            tensor | {"dims": [], "strides": [], "dataType": "INT64", "data": {"key": "tensors/1"}},
            tensor
            | {"dims": ["2"], "strides": ["1"], "offset": "1", "dataType": "FLOAT", "data": {"key": "tensors/0"}},
            vector | {"dims": ["1"]},
        ],
    }
    return {
        "m/model.json": json.dumps(model | changes).encode(),
        "m/tensors/0": FOUR_FLOATS,
        "m/tensors/1": struct.pack("<q", 7),
        "m/version": b"1\n",
    }


def exported_entry(**changes: Any) -> dict[str, Any]:
    """Describe one tensor as torch.export does."""
    entry = {
        "path_name": "weight_0",
        "is_param": True,
        "use_pickle": False,
        "tensor_meta": {
            "dtype": 7,
            "sizes": [{"as_int": 2}, {"as_int": 2}],
            "requires_grad": True,
            "device": {"type": "cpu", "index": None},
            "strides": [{"as_int": 2}, {"as_int": 1}],
            "storage_offset": {"as_int": 0},
            "layout": 7,
        },
    }
    entry["tensor_meta"] |= changes.pop("tensor_meta", {})
    return entry | changes


def exported_members(**entries: Any) -> dict[str, bytes]:
    """Make the records of a torch.export archive with one program."""
    entries = entries or {"w": exported_entry()}
    return {
        "m/data/weights/weight_0": FOUR_FLOATS,
        "m/data/weights/model_weights_config.json": json.dumps({"config": entries}).encode(),
        "m/data/constants/model_constants_config.json": b'{"config": {}}',
        "m/models/model.json": b'{"torch_version": "2.13.0"}',
        "m/archive_format": b"pt2",
        "m/archive_version": b"0",
        "m/byteorder": b"little",
    }
