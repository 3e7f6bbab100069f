"""What every test uses: the real entry point, run in-process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from support.containment import WATCH, limited_memory, limited_time

# Their tests build, train and run networks, or measure: they take what that takes.
_UNLIMITED = frozenset({
    "test_bench", "test_build", "test_compare", "test_coverage", "test_example_scripts", "test_examples", "test_inputs",
    "test_judge", "test_layouts_frameworks", "test_loading", "test_metrics", "test_readme", "test_real_checkpoints",
    "test_verify",
})  # fmt: skip


@pytest.fixture(autouse=True)
def contained(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hold every test to what a file may cause, and those of the readers to the time and memory it may take."""
    marked = {marker.name for marker in request.node.iter_markers()}
    if "benchmark" in marked:
        yield
        return
    with ExitStack() as limits:
        limits.enter_context(WATCH.watching())
        if request.node.module.__name__.rpartition(".")[2] not in _UNLIMITED:
            if "large" not in marked:
                limits.enter_context(limited_memory())
            if "fuzz" not in marked:
                limits.enter_context(limited_time())
        yield


@dataclass(frozen=True)
class Ran:
    """Hold what one command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run ``ckptool ARG...`` through ``ckptool.cli.main`` and capture it."""

    def run_command(*args: object) -> Ran:
        from ckptool.cli import main

        capsys.readouterr()
        status = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return run_command


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Have torch compute with one thread.

    Networks as small as those of tests wait for each other's threads more than they compute; and where torch cuts a
    tensor up among threads, the bits of a NaN depend on the place.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def as_ordinary_user() -> Iterator[None]:
    """Let root meet permissions as everyone else does."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)
