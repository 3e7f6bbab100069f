"""Read what a user names as a reference: the keys (and shapes) to be reached, or an explicit map of names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ckptool.errors import CkptoolError, PlanRefused, UnreadableCheckpoint
from ckptool.formats import open_checkpoint
from ckptool.layouts import select

_ARCHITECTURE = re.compile(r"(timm|torchvision|transformers):[\w.-]{1,100}")
MAX_TEXT_BYTES = 64 << 20
_TEXT = re.compile(rb"[^\x00-\x08\x0e-\x1f]*")
_SED = re.compile(
    r"s(?P<mark>[^\w\s\\])(?P<pattern>(?:\\.|(?!(?P=mark)).)+)(?P=mark)(?P<text>(?:\\.|(?!(?P=mark)).)*)(?P=mark)"
)


def read_reference(path: Path) -> Mapping[str, tuple[int, ...] | None]:
    """Read the names to be reached out of a checkpoint (with shapes) or a text file (one key a line).

    A checkpoint's names are taken as they stand in it. The name of an architecture (``timm:resnet50``) stands for its
    names; its head may have any number of classes.

    :raises CkptoolError: it cannot be read, or there is no such architecture.
    """
    architecture = _ARCHITECTURE.fullmatch(str(path))
    if architecture is not None and not path.exists():
        from ckptool.operations.architectures.named import names_of  # the only one that reads the index

        return names_of(str(path))
    try:
        with open_checkpoint(path) as checkpoint:
            selection = select(checkpoint)
            if selection.chosen is None:
                reason = selection.refusal.text if selection.refusal else "it holds no state dict"
                raise CkptoolError(f"{path}: no reference: {reason}")
            return {name: tensor.shape for name, tensor in selection.chosen.tensors.items()}
    except UnreadableCheckpoint:
        names = _names(path)
        if names is None:
            raise
        return dict.fromkeys(names)


def _names(path: Path) -> list[str] | None:
    """Give the lines of a text file, or None where it is no plain list of keys."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES)
    except OSError:
        return None
    if not data or not _TEXT.fullmatch(data):
        return None
    names = [line.strip() for line in data.decode("utf-8", "replace").splitlines()]
    names = [name for name in names if name and not name.startswith("#")]
    looks_like_keys = names and not any(re.search(r"\s|[<>{}]|\ufffd", name) for name in names)
    return names if looks_like_keys else None


def read_map(path: Path) -> Mapping[str, str | None]:
    """Read a JSON object of source to target names; null drops a key.

    The report of ``--dry-run --json`` is read as well: its ``map`` is taken.

    :raises PlanRefused: it is no such object.
    """
    from ckptool.formats.json_tables import read_json  # what few commands read

    try:
        content = read_json(path.read_bytes())
    except OSError as error:
        raise PlanRefused("bad-map", f"{path}: {error.strerror}; --map needs a JSON file of names") from error
    except ValueError as error:
        raise PlanRefused("bad-map", f'{path}: not a JSON map of names ({error}); give {{"old": "new"}}') from error
    if isinstance(content, dict) and isinstance(content.get("map"), dict):
        content = content["map"]
    if not isinstance(content, dict) or not all(
        target is None or isinstance(target, str) for target in content.values()
    ):
        raise PlanRefused("bad-map", f"{path}: --map needs one JSON object of names to names (or null)")
    return content


def read_rename(text: str) -> tuple[str, str]:
    """Take ``s/pattern/replacement/`` apart into a pattern and a replacement for ``re.sub``.

    :raises PlanRefused: it is not of that form.
    """
    match = _SED.fullmatch(text)
    if match is None:
        raise PlanRefused("bad-map", f"--rename {text}: write it as s/pattern/replacement/")
    mark = match["mark"]
    return match["pattern"].replace("\\" + mark, mark), match["text"].replace("\\" + mark, mark)
