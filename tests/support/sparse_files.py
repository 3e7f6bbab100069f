"""Files that say they are large, and of which the disk holds next to nothing."""

from __future__ import annotations

import json
from pathlib import Path


def sparse_safetensors(path: Path, nbytes: int, count: int) -> Path:
    """Write a safetensors file of float32 zeros, of which the disk holds the header only."""
    each = nbytes // count // 4
    header = {
        f"layers.{i}.weight": {"dtype": "F32", "shape": [each], "data_offsets": [i * each * 4, (i + 1) * each * 4]}
        for i in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + count * each * 4)
    return path
