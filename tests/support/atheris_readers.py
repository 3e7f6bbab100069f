"""Feed the readers from a coverage-guided fuzzer: whatever escapes them but a refusal is a crash.

Run as a program, with the name of a target and libFuzzer's own options; it needs atheris.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from support.programs import write_program


def read_program(data: bytes) -> None:
    """Take the bytes for the choices of an author of programs."""
    choices = iter(data)
    read_pickle_bytes(write_program(lambda count: next(choices, 0) % count, 40))


def read_pickle_bytes(data: bytes) -> None:
    """Take the bytes for a pickle."""
    from ckptool.formats.pickle import GlobalLog, read_pickle, scan_rest

    log = GlobalLog()
    end = read_pickle(data, label="data.pkl", load_storage=None, log=log).end
    scan_rest(data, label="data.pkl", log=log, start=end)


def read_file(data: bytes) -> None:
    """Take the bytes for a whole file."""
    from ckptool.formats import open_checkpoint

    handle = os.memfd_create("model")
    try:
        os.write(handle, data)
        with open_checkpoint(Path(f"/proc/self/fd/{handle}")) as checkpoint:
            for storage in checkpoint.storages:
                for _ in storage.source.stream():
                    pass
    finally:
        os.close(handle)


TARGETS: dict[str, Callable[[bytes], None]] = {"program": read_program, "pickle": read_pickle_bytes, "file": read_file}


def seeds(target: str) -> Iterator[bytes]:
    """Give inputs to begin with; torch is needed for those of files."""
    if target == "program":
        yield from (bytes(range(start, start + 60)) for start in range(0, 180, 20))
    elif target == "pickle":
        value = {"w": [1, 2.5, None, "x" * 30, (True, {"k": -3})], "n": 10**20}
        yield from (pickle.dumps(value, protocol) for protocol in range(6))
    else:
        yield from files()


def files() -> Iterator[bytes]:
    """Give one small file of each container."""
    import safetensors.torch
    import torch

    from support.tensors import torch_bytes

    state = {"w": torch.arange(4.0), "b": torch.ones(2).half()}
    yield torch_bytes(state)
    yield torch_bytes(state, _use_new_zipfile_serialization=False)
    yield safetensors.torch.save(state)


def fuzz() -> None:
    """Run until libFuzzer has had enough."""
    import atheris

    with atheris.instrument_imports(include=["ckptool"]):
        import ckptool.formats.pickle  # noqa: F401
        from ckptool.errors import UnreadableCheckpoint
    feed = TARGETS[sys.argv.pop(1)]

    def feed_once(data: bytes) -> None:
        with suppress(UnreadableCheckpoint):
            feed(data)

    atheris.Setup(sys.argv, feed_once)
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz()
