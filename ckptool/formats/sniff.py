"""What a file is, by its content alone: which reader reads it, or one sentence on what it is instead."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.safetensors import LARGEST_HEADER, LENGTH_BYTES
from ckptool.formats.zip import LOCAL_SIGNATURE, has_directory

SHARD_INDEX = "shard-index"

_HEAD_BYTES = 4096
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

_AGAIN = "get the file again"
_EXPORT = "load it where it was made and save its tensors with torch.save or safetensors"

# Where it stands, the first bytes, what it is and what to do; the first match counts.
_SIGNATURES = (
    (0, b"\x1f\x8b", "this is compressed with gzip, which ckptool does not unpack yet; run gunzip on it first"),
    (0, b"\xfd7zXZ\0", "this is compressed with xz; run unxz on it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "this is a 7z archive; unpack it first"),
    (0, b"BZh", "this is compressed with bzip2; run bunzip2 on it first"),
    (0, b"\x28\xb5\x2f\xfd", "this is compressed with zstd; run unzstd on it first"),
    (0, b"\x04\x22\x4d\x18", "this is compressed with lz4; run unlz4 on it first"),
    (0, b"Rar!\x1a\x07", "this is a rar archive; unpack it first"),
    (0, b"PK\x07\x08", "this is one part of a zip archive in several parts; join them first"),
    (0, b"GGUF", f"this is a GGUF model for llama.cpp, which ckptool does not read yet; {_EXPORT}"),
    (0, b"FUGG", f"this is a big-endian GGUF model for llama.cpp, which ckptool does not read yet; {_EXPORT}"),
    (0, b"\x89HDF\r\n\x1a\n", f"this is an HDF5 file (Keras or h5py), not a PyTorch checkpoint; {_EXPORT}"),
    (
        0,
        b"\x93NUMPY",
        "this is a NumPy array, which ckptool does not read yet; save it with safetensors.numpy.save_file",
    ),
)

_TAR_MEMBERS = (
    (b"sys_info", f"this is a checkpoint of torch before 0.1.10 (tar), which ckptool does not read yet; {_EXPORT}"),
    (b"storages", f"this is a checkpoint of torch before 0.1.10 (tar), which ckptool does not read yet; {_EXPORT}"),
    (
        b"model_config.yaml",
        "this is a NeMo archive, which ckptool does not read yet; unpack it and name model_weights.ckpt",
    ),
)
_TAR = "this is a tar archive, which ckptool does not read yet; unpack it and name the checkpoint in it"

_TORCHSCRIPT = (
    "this is a TorchScript archive (a program with its weights), which ckptool does not read yet;"
    " load it with torch.jit.load and save its state_dict() with torch.save"
)
_PT2 = (
    "this is a torch.export archive (.pt2), which ckptool does not read yet;"
    " load it with torch.export.load and save its state_dict with torch.save"
)

# What a record name holds, the pattern that it matches, and what the archive is then; None: a checkpoint of torch.save.
_ARCHIVES = (
    ("constants.pkl", re.compile(r"^[^/]+/constants\.pkl$"), _TORCHSCRIPT),
    ("archive_format", re.compile(r"^[^/]+/archive_format$"), _PT2),
    ("models/", re.compile(r"^[^/]+/models/[^/]+\.json$"), _PT2),
    ("exported_program", re.compile(r"(?:^|/)serialized_exported_program\.json$"), _PT2),
    ("data.pkl", re.compile(r"^[^/]+/data\.pkl$"), None),
    (
        "data.pkl",
        re.compile(r"^data\.pkl$"),
        "this zip archive has no folder around its records; zip the folder, not its content",
    ),
    (".npy", re.compile(r"\.npy$"), f"this is a NumPy archive (.npz), which ckptool does not read yet; {_EXPORT}"),
    (
        ".h5",
        re.compile(r"^(?:model\.weights|variables)\.h5$"),
        f"this is a Keras model, not a PyTorch checkpoint; {_EXPORT}",
    ),
    (
        ".",
        re.compile(r"\.(?:pt|pth|ckpt|bin|tar|safetensors|pkl)$"),
        "this zip archive has a checkpoint inside; unpack it first",
    ),
)
_NO_CHECKPOINT = "this zip archive holds no checkpoint (no data.pkl in it); check which file is meant"

_FOLDERS = (
    (
        re.compile(r"^\.metadata$"),
        (
            "this folder is a distributed checkpoint, which ckptool does not read yet; run"
            " python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUT.pt first"
        ),
    ),
    (
        re.compile(r"^latest(?:_universal)?$"),
        "this folder is a DeepSpeed checkpoint, which ckptool does not read yet; run its zero_to_fp32.py first",
    ),
    (
        re.compile(r"^latest_checkpointed_iteration\.txt$"),
        "this folder is a Megatron checkpoint, which ckptool does not read yet; convert it with Megatron's tools first",
    ),
)
_FOLDER = "this is a folder, not a file; name a file in it"


def sniff(file: InputFile) -> str:
    """Name the container: ``zip``, ``torch-legacy``, ``safetensors``, or the index of a checkpoint in shards.

    :raises UnreadableCheckpoint: it is none of them, or more than one at once.
    """
    if file.size == 0:
        raise UnreadableCheckpoint(f"the file is empty; {_AGAIN}")
    head = file.read(0, min(file.size, _HEAD_BYTES))
    found = [name for name, test in _CONTAINERS if test(head)]
    # Readers that look at the end of a file first would take it for a zip archive.
    if "zip" not in found and has_directory(file):
        found.append("zip")
    if len(found) > 1:
        raise UnreadableCheckpoint(f"the file is two formats at once ({' and '.join(found)}); do not trust it")
    if not found and _is_index(file, head):
        return SHARD_INDEX
    if not found or found == ["tar"]:
        raise UnreadableCheckpoint(_explain_tar(file) if found else _explain_other(file, head))
    return found[0]


def explain_archive(names: Iterable[str]) -> str | None:
    """Say what a zip archive with these record names is, or None where it is a checkpoint of torch.save."""
    listed = list(names)
    if not listed:
        return f"this is an empty zip archive; {_AGAIN}"
    text = "\n".join(listed)  # one look at all names before one at each
    for word, pattern, meaning in _ARCHIVES:
        if word in text and any(pattern.search(name) for name in listed):
            return meaning
    return _NO_CHECKPOINT


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


_CONTAINERS = (("zip", _is_zip), ("torch-legacy", _is_legacy), ("safetensors", _is_safetensors), ("tar", _is_tar))


def _explain_other(file: InputFile, head: bytes) -> str:
    for offset, signature, meaning in _SIGNATURES:
        if head.startswith(signature, offset):
            return meaning
    for matches, explain in _TEXTS:
        if matches(head):
            return explain(file, head)
    return "this is no format of PyTorch checkpoints that ckptool knows; check which file is meant"


def _explain_tar(file: InputFile) -> str:
    """Read the member names of a tar archive: 512-byte headers, the size in octal at byte 124."""
    position = 0
    for _ in range(64):
        if position + 512 > file.size:
            break
        header = file.read(position, 512)
        name = header[:100].rstrip(b"\0").removeprefix(b"./")
        for member, meaning in _TAR_MEMBERS:
            if name == member:
                return meaning
        digits = header[124:136].strip(b" \0")
        if not digits.isdigit() or digits.strip(b"01234567"):
            break
        position += 512 + -(-int(digits, 8) // 512) * 512
    return _TAR


def is_plain_text(head: bytes) -> bool:
    """Tell whether a file begins as text does, and not as a pickle in letters."""
    return _is_text(head) and not _is_pickle(head) and not _is_legacy(head)


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


def _is_pickle(head: bytes) -> bool:
    return _PICKLE.match(head) is not None


def _is_onnx(head: bytes) -> bool:
    return _ONNX.match(head) is not None


def _explain_zeros(file: InputFile, head: bytes) -> str:
    nbytes = min(file.size, _SEARCHED_BYTES)
    if any(file.read(0, nbytes)) or any(file.read(file.size - nbytes, nbytes)):
        return f"the file begins with {len(head):,} zero bytes, as no checkpoint does; {_AGAIN}"
    return f"the file is filled with zeros, as a full disk or a download that never ended leaves it; {_AGAIN}"


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


def _explain_pickle(_: InputFile, __: bytes) -> str:
    return f"this is a plain pickle, not a file of torch.save, which ckptool does not read yet; {_EXPORT}"


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
    (_is_pickle, _explain_pickle),
    (_is_onnx, _explain_onnx),
    (_is_text, _explain_text),
)
