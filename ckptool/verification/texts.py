"""Token ids: drawn at random, or of a built-in English text where a tokenizer is at hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from ckptool.errors import CkptoolError

TEXT = """\
The old harbour lies an hour south of the city, behind a long wall of grey stone. In winter the wind comes straight
from the sea, and the boats stay where they are for days. People here do not talk about the weather; they look at the
sky in the morning, put on another coat, and go to work.

My grandmother was born in the house next to the school. She told me that there were once more than forty families in
the village, and that every child knew how to row before it could read. When the railway was built, most of the young
people left. Some of them came back for the summer, bringing newspapers, oranges and stories about streets that were
bright all night.

"What did you do in the evenings?" I asked her.

"We had enough to do," she said. "There was the fire, and the animals, and my father's tools had to be cleaned. On
Sundays we sang. Your great-uncle played the violin, not very well, but he was the only one who had a violin, so nobody
complained."

Last year the school was closed, because there were only three pupils left. The building now belongs to a small company
that repairs engines. If you walk past it at noon, you can still hear a bell, though there is nobody who has to come in
from the yard. The owner says that he likes the sound, and that it tells him when to eat.

Scientists from the university visit us every spring to count the birds on the island. They have found that the number
of nests has grown since the factory was shut down in 1987. Water that was once brown and warm is clear again, and the
fish have returned to the mouth of the river. One of the researchers explained to me how they mark a bird without
hurting it: the ring weighs less than a gram, and the whole procedure takes about ten seconds.

In the afternoon I often climb the hill behind the church. From the top you can see both sides of the bay, the white
line of the beach, and the road that leads to the north. There is a bench under the oak tree with two names cut into the
wood. Nobody remembers who they were. I like to think that they were happy, and that they also sat there for a while
without saying anything, before it became dark and they had to find the path down to the lights.
"""
_WINDOW = 32  # tokens


def random_ids(count: int, shape: tuple[int, ...], vocabulary: int, seed: int) -> Tensor:
    """Draw token ids below ``vocabulary``, shape (count, *shape)."""
    return torch.randint(vocabulary, (count, *shape), generator=Generator().manual_seed(seed))


def text_windows(tokenizer: Path, count: int, length: int = _WINDOW) -> Tensor:
    """Give the built-in text as token ids, shape (count, length): windows evenly spread over it, which may overlap.

    Where a window is longer than the text, the text begins again.

    :raises CkptoolError: there is no tokenizer, or it is for a text of another kind.
    """
    ids = torch.tensor(encode(tokenizer, TEXT))
    if len(ids) <= _WINDOW:
        raise CkptoolError(f"{tokenizer}: makes {len(ids)} tokens of a page of English; give the model's own tokenizer")
    ids = ids.repeat(length // len(ids) + 1)
    starts = [place * (len(ids) - length) // max(count - 1, 1) for place in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])


def encode(path: Path, text: str) -> list[int]:
    """Turn a text into token ids with what a folder holds: a ``tokenizer.json``, else what transformers reads.

    :raises CkptoolError: there is no tokenizer, or the library for it is missing.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        raise CkptoolError(f"{path}: is not there; give the folder of the tokenizer with --tokenizer")
    encoder = _encode_characters if _is_character_table(file) else _encode_file if file.is_file() else _encode_folder
    return encoder(path if encoder is _encode_folder else file, text)


def _is_character_table(file: Path) -> bool:
    return file.is_file() and _character_table(file) is not None


def _character_table(file: Path) -> dict[str, int] | None:
    """Give the numbers of single characters, as small models have them (``{"a": 0, "b": 1}``)."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(table, dict) and all(len(key) == 1 and type(value) is int for key, value in table.items())
    return table if whole and table else None


def _encode_characters(file: Path, text: str) -> list[int]:
    table = _character_table(file) or {}
    return [table[character] for character in text if character in table]


def _encode_file(file: Path, text: str) -> list[int]:
    return list(_load(file, _from_file, "tokenizers")(text))


def _from_file(file: Path) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _encode_folder(folder: Path, text: str) -> list[int]:
    return list(_load(folder, _from_folder, "transformers")(text))


def _from_folder(folder: Path) -> Callable[[str], list[int]]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def _load(path: Path, load: Callable[[Path], Callable[[str], list[int]]], library: str) -> Callable[[str], list[int]]:
    try:
        return load(path)
    except ImportError as error:
        raise CkptoolError(f"{path}: reading it needs {library}; pip install {library}") from error
    # These libraries raise whatever their parsers raise, plain Exception included.
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CkptoolError(f"{path}: holds no tokenizer ({said[:200]}); give a folder with a tokenizer.json") from error
