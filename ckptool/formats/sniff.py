"""What a file is, by its content alone: which reader reads it, or one sentence on what it is instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ckptool.errors import AGAIN, UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.safetensors import LARGEST_HEADER, LENGTH_BYTES
from ckptool.formats.zip import LOCAL_SIGNATURE, has_directory

SHARD_INDEX = "shard-index"

HEAD_BYTES = 4096
_SEARCHED_BYTES = 1 << 20
_SHOWN_CHARACTERS = 60

# The pickled magic number 0x1950a86a20f9469cfc6c, in every protocol (torch/serialization.py, MAGIC_NUMBER).
_LEGACY = re.compile(
    rb"(?:\x80[\x00-\x05](?:\x95.{8})?)?(?:\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19|L119547037146038801333356L?\n)", re.DOTALL
)
_BRACE = re.compile(rb"[ \t\r\n]*\{")
_PICKLE = re.compile(rb"\x80[\x02-\x05]|\((?:[dlt](?:p\d+\n|q)|c[\w.]+\n[\w.]+\n)|c[\w.]+\n[\w.]+\n|[\]})](?:q|p\d)")
_LFS = re.compile(rb"version https://git-lfs\.github\.com/spec/v\d+\r?\n")
_LFS_SIZE = re.compile(rb"^size (\d{1,20})\r?$", re.MULTILINE)
# ModelProto: ir_version (field 1), then producer_name (field 2), a short printable text.
_ONNX = re.compile(rb"\x08[\x01-\x1f]\x12[\x01-\x40][\x20-\x7e]{2}")

_EXPORT = "load it where it was made and save its tensors with torch.save or safetensors"

# Where it stands, the first bytes, what it is and what to do; the first match counts.
_SIGNATURES = (
    (0, b"7z\xbc\xaf\x27\x1c", "this is a 7z archive; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "this is compressed with zstd; run unzstd on it first"),
    (0, b"\x04\x22\x4d\x18", "this is compressed with lz4; run unlz4 on it first"),
    (0, b"Rar!\x1a\x07", "this is a rar archive; unpack it first"),
    (0, b"PK\x07\x08", "this is one part of a zip archive in several parts; join them first"),
    (0, b"GGUF", f"this is a GGUF model for llama.cpp, which ckptool does not read yet; {_EXPORT}"),
    (0, b"FUGG", f"this is a big-endian GGUF model for llama.cpp, which ckptool does not read yet; {_EXPORT}"),
    (0, b"\x89HDF\r\n\x1a\n", f"this is an HDF5 file (Keras or h5py), not a PyTorch checkpoint; {_EXPORT}"),
)

# What a record name holds, the pattern that it matches, and what the archive is then: a kind that has a reader, or a
# sentence. Sources: torch/csrc/jit/serialization (constants.pkl; model.json before torch 1.2),
# torch/export/pt2_archive/constants.py, torch/export/__init__.py (serialized_exported_program.json before torch 2.8).
_ARCHIVES = (
    ("constants.pkl", re.compile(r"^[^/]+/constants\.pkl$"), "torchscript"),
    ("model.json", re.compile(r"^[^/]+/model\.json$"), "torchscript-1.0"),
    ("archive_format", re.compile(r"^[^/]+/archive_format$"), "torch-export"),
    ("models/", re.compile(r"^[^/]+/models/[^/]+\.json$"), "torch-export"),
    ("exported_program", re.compile(r"^serialized_exported_program\.json$"), "torch-export-2.1"),
    ("data.pkl", re.compile(r"^[^/]+/data\.pkl$"), "torch-zip"),
    (
        "data.pkl",
        re.compile(r"^data\.pkl$"),
        "this zip archive has no folder around its records; zip the folder, not its content",
    ),
    (
        ".h5",
        re.compile(r"^(?:model\.weights|variables)\.h5$"),
        f"this is a Keras model, not a PyTorch checkpoint; {_EXPORT}",
    ),
)

_FOLDERS = (
    (
        re.compile(r"\.distcp$"),
        (
            "this folder holds parts of a distributed checkpoint without the .metadata that says what of;"
            " get it, too (it is written last: where it never was, the save did not end)"
        ),
    ),
    (
        re.compile(r"^latest(?:_universal)?$"),
        "this folder names a save of DeepSpeed that is not in it, or a universal one, which is not read; get all of it",
    ),
    (
        re.compile(r"^latest_checkpointed_iteration\.txt$"),
        "this folder holds checkpoints of Megatron; name one of them (iter_...), which is read where it is torch_dist",
    ),
)
_FOLDER = "this is a folder, not a file; name a file in it"


def sniff(file: InputFile) -> str:
    """Name the container: a row of ``_CONTAINERS``, ``pickle``, or the index of a checkpoint in shards.

    :raises UnreadableCheckpoint: it is none of them, or more than one at once.
    """
    if file.size == 0:
        raise UnreadableCheckpoint(f"the file is empty; {AGAIN}")
    head = file.read(0, min(file.size, HEAD_BYTES))
    found = recognise(head)
    # Readers that look at the end of a file first would take it for a zip archive.
    if "zip" not in found and has_directory(file):
        found.append("zip")
    if len(found) > 1:
        raise UnreadableCheckpoint(f"the file is two formats at once ({' and '.join(found)}); do not trust it")
    if not found and _is_index(file, head):
        return SHARD_INDEX
    if not found:
        raise UnreadableCheckpoint(_explain_other(file, head))
    return found[0]


def recognise(head: bytes) -> list[str]:
    """Name every container that begins with these bytes."""
    found = [name for name, test in _CONTAINERS if test(head)]
    return found or (["pickle"] if _PICKLE.match(head) else [])


def archive_kind(names: Iterable[str]) -> str:
    """Name what a zip archive with these record names is; ``zip-around`` is any that no reader claims.

    :raises UnreadableCheckpoint: it is no checkpoint, and holds none.
    """
    listed = list(names)
    if not any(not name.endswith("/") for name in listed):
        raise UnreadableCheckpoint(f"this is an empty zip archive; {AGAIN}")
    text = "\n".join(listed)  # one look at all names before one at each
    for word, pattern, meaning in _ARCHIVES:
        if word in text and any(pattern.search(name) for name in listed):
            if " " in meaning:
                raise UnreadableCheckpoint(meaning)
            return meaning
    return "npz" if all(name.endswith(".npy") for name in listed) else "zip-around"


def explain_folder(path: Path) -> str:
    """Say what a folder is, by the names in it."""
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError as error:
        return f"this is a folder that cannot be listed ({error.strerror}); name a file in it"
    for pattern, meaning in _FOLDERS:
        if any(pattern.search(name) for name in names):
            return meaning
    return _FOLDER


def _is_zip(head: bytes) -> bool:
    return head.startswith(LOCAL_SIGNATURE)


def _is_legacy(head: bytes) -> bool:
    return _LEGACY.match(head) is not None


def _is_safetensors(head: bytes) -> bool:
    """Look for a header length and a brace; a length beyond all limits counts if it cannot be text."""
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if length > LARGEST_HEADER:
        return head[LENGTH_BYTES : LENGTH_BYTES + 2] == b'{"' and not _is_text(head[:LENGTH_BYTES])
    return length > 0 and _BRACE.match(head, LENGTH_BYTES) is not None


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


_CONTAINERS: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    ("zip", _is_zip),
    ("torch-legacy", _is_legacy),
    ("safetensors", _is_safetensors),
    ("tar", _is_tar),
    ("npy", lambda head: head.startswith(b"\x93NUMPY")),
    ("gzip", lambda head: head.startswith(b"\x1f\x8b")),
    ("bzip2", lambda head: head.startswith(b"BZh")),
    ("xz", lambda head: head.startswith(b"\xfd7zXZ\0")),
)


def _explain_other(file: InputFile, head: bytes) -> str:
    for offset, signature, meaning in _SIGNATURES:
        if head.startswith(signature, offset):
            return meaning
    for matches, explain in _TEXTS:
        if matches(head):
            return explain(file, head)
    return "this is no format of PyTorch checkpoints that ckptool knows; check which file is meant"


def is_plain_text(head: bytes) -> bool:
    """Tell whether a file begins as text does, and not as a pickle in letters."""
    return _is_text(head) and not recognise(head)


def _is_text(head: bytes) -> bool:
    """Tell whether bytes are printable UTF-8; a character cut at the end is forgiven."""
    text = head.decode("utf-8", errors="replace").rstrip("\ufffd")
    return bool(text.strip()) and all(character.isprintable() or character in "\t\r\n" for character in text)


def _is_zeros(head: bytes) -> bool:
    return not any(head)


def _is_lfs(head: bytes) -> bool:
    return _LFS.match(head) is not None


def _is_page(head: bytes) -> bool:
    return head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html", b"<head"))


def _is_xml(head: bytes) -> bool:
    return head.lstrip().startswith(b"<?xml")


def _is_json(head: bytes) -> bool:
    return head.lstrip()[:1] in (b"{", b"[") and _is_text(head)


def _is_index(file: InputFile, head: bytes) -> bool:
    return _is_json(head) and b'"weight_map"' in file.read(0, min(file.size, _SEARCHED_BYTES))


def is_onnx(head: bytes) -> bool:
    """Tell whether a file begins as ONNX models do, which have no signature."""
    return _ONNX.match(head) is not None


def _explain_zeros(file: InputFile, head: bytes) -> str:
    nbytes = min(file.size, _SEARCHED_BYTES)
    if any(file.read(0, nbytes)) or any(file.read(file.size - nbytes, nbytes)):
        return f"the file begins with {len(head):,} zero bytes, as no checkpoint does; {AGAIN}"
    return f"the file is filled with zeros, as a full disk or a download that never ended leaves it; {AGAIN}"


def _explain_lfs(_: InputFile, head: bytes) -> str:
    size = _LFS_SIZE.search(head)
    what = f" to a file of {int(size[1]):,} bytes" if size else ""
    return f"this is a Git LFS pointer{what}, not the checkpoint itself; run git lfs pull"


def _explain_page(_: InputFile, __: bytes) -> str:
    return "this is a web page, not a checkpoint: the download failed; download the file itself"


def _explain_xml(_: InputFile, __: bytes) -> str:
    return "this is XML, probably a server's error reply, not a checkpoint; download the file itself"


def _explain_json(_: InputFile, __: bytes) -> str:
    return "this is JSON (an error reply or a configuration), not a checkpoint; download the file itself"


def _explain_onnx(_: InputFile, __: bytes) -> str:
    return "this looks like an ONNX model, not a PyTorch checkpoint; go back to the model it was exported from"


def _explain_text(_: InputFile, head: bytes) -> str:
    line = head.decode("utf-8", errors="replace").strip().splitlines()[0][:_SHOWN_CHARACTERS]
    return f"this is text that begins {line!r}, not a checkpoint; download the file itself"


# How to recognise what has no fixed signature, and what to say; the first match counts.
_TEXTS = (
    (_is_zeros, _explain_zeros),
    (_is_lfs, _explain_lfs),
    (_is_page, _explain_page),
    (_is_xml, _explain_xml),
    (_is_json, _explain_json),
    (is_onnx, _explain_onnx),
    (_is_text, _explain_text),
)
