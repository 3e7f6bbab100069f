"""A conversion that is killed, interrupted or refused by the disk at any of its steps: the old file, or the new one.

The processes are real, and each of them meets its fault one step later than the one before (``support/faults.py``).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import safetensors.torch
import torch
from support import faults

from ckptool.model.copies import CopyPlan, Payload
from ckptool.model.sources import Progress
from ckptool.writers import WRITERS

ROOT = Path(__file__).parents[1]
OLD = b"the old file"
STAGED = re.compile(r"\.ckptool-[0-9a-f]{16}\.tmp")
KINDS = ("pt", "safetensors")


@dataclass(frozen=True)
class Place:
    """Know the input, the folder that is written to, and the output in it."""

    source: Path
    folder: Path
    target: Path

    def arguments(self, *more: str) -> list[str]:
        return ["convert", str(self.source), str(self.target), *more]


@pytest.fixture
def place(tmp_path: Path) -> Callable[..., Place]:
    torch.manual_seed(0)
    source, folder = tmp_path / "in.pt", tmp_path / "out"
    # Tensors beyond the buffer of a file and within it; a view, and a second name.
    state = {f"module.{name}": torch.randn(300, 200) for name in "ab"}
    torch.save({**state, "module.c": torch.randn(9)[::2], "module.d": state["module.a"]}, source)
    folder.mkdir()

    def make(kind: str, *, exists: bool) -> Place:
        target = folder / f"out.{kind}"
        if exists:
            target.write_bytes(OLD)
        return Place(source, folder, target)

    return make


@dataclass(frozen=True)
class Trial:
    """Hold what one process left behind; ``target`` is the word for the file that is there now."""

    status: int
    errors: str
    target: str
    staged: int


def trials(place: Place, fault: str, *, force: bool, moments: int | None = None, since: str = "staging") -> list[Trial]:
    """Let the fault meet a conversion at each of its steps; give what each process left behind."""
    request = {
        "folder": str(place.folder),
        "arguments": place.arguments("--quiet", *["--force"] * force),
        "fault": fault,
        "moments": moments,
        "since": since,
    }
    ran = subprocess.run(
        [sys.executable, faults.__file__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    whole = bytes.fromhex(answer["whole"][place.target.name])
    check_loads(place.target, whole)
    rows = [judged(row, place.target.name, whole) for row in answer["trials"]]
    assert len(rows) > 6
    return rows


# Python cannot raise what a signal raises while it closes a generator that was left half-way (that of ``any``, say): it
# says so, and the command goes on to its end, as if the signal had never come.
_SWALLOWED = re.compile(
    r"Exception ignored in: <generator object [^\n]*\nTraceback \(most recent call last\):\n(?:  [^\n]*\n)+"
    r"(?:KeyboardInterrupt|SystemExit)[^\n]*\n"
)


def judged(row: dict[str, Any], name: str, whole: bytes) -> Trial:
    errors = _SWALLOWED.sub("", row["errors"])
    assert errors == row["errors"] or row["status"] == 0
    files = {found: bytes.fromhex(content) for found, content in row["files"].items()}
    words = {None: "none", OLD: "old", whole: "new"}
    target = words.get(files.pop(name, None), "broken")
    assert all(STAGED.fullmatch(found) for found in files), files.keys()
    assert "Traceback" not in errors
    assert "left the command" not in errors, errors
    return Trial(row["status"], errors, target, len(files))


def check_loads(path: Path, content: bytes) -> None:
    """Let the format's own reader read the new file."""
    with tempfile.NamedTemporaryFile(suffix=path.suffix) as file:
        file.write(content)
        file.flush()
        load = safetensors.torch.load_file if path.suffix == ".safetensors" else torch.load
        assert set(load(file.name)) >= {"a", "b", "c"}


@pytest.mark.parametrize(("kind", "exists"), [("pt", False), ("pt", True), ("safetensors", True)])
@pytest.mark.parametrize("when", ["kill before", "kill within", "kill after"])
def test_killed_at_every_step(place, when, kind, exists):
    before = "old" if exists else "none"
    found = trials(place(kind, exists=exists), when, force=exists)
    killed = [trial for trial in found if trial.status == -signal.SIGKILL]
    assert killed == found
    assert {trial.target for trial in found} == {before, "new"}
    assert [trial.target for trial in found] == sorted((trial.target for trial in found), key=[before, "new"].index)
    assert max(trial.staged for trial in found) == 1


@pytest.mark.parametrize(
    ("error", "said", "kind", "exists"),
    [
        ("ENOSPC", "the disk is full; free some space", "pt", True),
        ("EDQUOT", "the disk quota is used up; free some space", "safetensors", False),
        ("EIO", "the disk reports an input/output error; write to another one", "safetensors", True),
        ("ESTALE", "it cannot be written (", "pt", False),
    ],
)
def test_refused_by_the_disk_from_every_step_on(place, error, said, kind, exists):
    where = place(kind, exists=exists)
    for trial in trials(where, error, force=exists):
        assert trial.staged == 0
        if trial.status == 0:  # all that was left to do is to bring the name itself to the disk
            assert trial.target == "new"
            continue
        assert (trial.status, trial.target) == (2, "old" if exists else "none")
        assert trial.errors.startswith(f"ckptool: {where.target}: {said}")
        assert trial.errors.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_writes_that_take_only_a_part_are_gone_on_with(place, kind):
    found = trials(place(kind, exists=True), "short", force=True)
    assert {(trial.status, trial.target, trial.staged) for trial in found} == {(0, "new", 0)}


SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


def check_interrupted(found: list[Trial], name: str, before: str) -> None:
    """Demand an end in order: the old file or the new one, and nothing beside it."""
    assert {trial.status for trial in found} <= {SIGNALS[name], 0}
    assert {trial.target for trial in found} <= {before, "new"}
    assert {trial.staged for trial in found} == {0}
    assert all(trial.target == "new" for trial in found if trial.status == 0)
    assert {trial.errors for trial in found if trial.status} <= {"", "ckptool: interrupted\n"}


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize(("kind", "exists"), [("pt", True), ("safetensors", False)])
def test_interrupted_at_every_step(place, name, kind, exists):
    found = trials(place(kind, exists=exists), name, force=exists)
    check_interrupted(found, name, "old" if exists else "none")
    assert len({trial.target for trial in found}) == 2


@pytest.mark.parametrize(
    ("name", "kind", "exists", "since"),
    [("SIGINT", "pt", False, "_heed_signals"), ("SIGTERM", "safetensors", True, "staging")],
)
def test_interrupted_at_any_moment(place, name, kind, exists, since):
    found = trials(place(kind, exists=exists), name, force=exists, moments=24, since=since)
    check_interrupted(found, name, "old" if exists else "none")


@pytest.mark.fuzz
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SIGNALS)
def test_interrupted_at_every_moment(place, name, kind, exists):
    where = place(kind, exists=exists)
    for moments, since in ((600, "staging"), (200, "_heed_signals")):
        check_interrupted(
            trials(where, name, force=exists, moments=moments, since=since), name, "old" if exists else "none"
        )


# --- the same, with the system itself as the one that fails: what no wrapper sees is counted, too ---

CHANGES = "write,writev,pwrite64,pwritev,fsync,fdatasync,rename,renameat,renameat2,link,linkat,fchmod"


@pytest.mark.fuzz
@pytest.mark.parametrize("fault", ["signal=KILL", "signal=INT", "signal=TERM", "error=ENOSPC"])
@pytest.mark.parametrize("kind", KINDS)
def test_faults_of_every_system_call(place, fault, kind):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: it is what makes a system call fail")
    where = place(kind, exists=True)
    calls = CHANGES if fault.startswith("error") else f"{CHANGES},unlink,unlinkat"
    seen = []
    for at in range(1, 3000):
        where.target.write_bytes(OLD)
        strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={calls}:{fault}:when={at}"]
        command = [sys.executable, "-m", "ckptool", *where.arguments("--force", "--quiet")]
        ran = subprocess.run([*strace, *command], capture_output=True, text=True, cwd=ROOT, check=False)
        if at == 1 and "ptrace" in ran.stderr:
            pytest.skip("this machine lets nobody trace a process")
        content = where.target.read_bytes()
        seen.append(ran.returncode)
        if content != OLD:
            check_loads(where.target, content)
        assert "Traceback" not in ran.stderr
        left = [path for path in where.folder.iterdir() if path != where.target]
        assert all(STAGED.fullmatch(path.name) for path in left)
        assert not left or "KILL" in fault
        for path in left:
            path.unlink()
        if seen[-2:] == [0, 0]:  # the last step of all is the sync of the folder, which nothing depends on
            break
    assert len(seen) > 5


# --- what is no ordinary place to write to, through the command line ---


def make_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))  # a second /dev/full
    except PermissionError:
        pytest.skip("only root may make a device")


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.chdir(here)


ODD_PLACES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (os.mkfifo, "is a device, pipe, socket or broken link, not a file; choose another name"),
    "device": (make_device, "is a device, pipe, socket or broken link, not a file; choose another name"),
    "socket": (make_socket, "is a device, pipe, socket or broken link, not a file; choose another name"),
    "folder": (Path.mkdir, "is a folder; name a file in it"),
    "link to a folder": (lambda path: path.symlink_to(path.parent), "is a folder; name a file in it"),
    "link to a device": (lambda path: path.symlink_to("/dev/full"), "is a device, pipe, socket or broken link"),
    "link in a circle": (lambda path: path.symlink_to(path.name), "is a device, pipe, socket or broken link"),
    "file": (lambda path: path.write_bytes(OLD), "exists already; add --force to replace it"),
    "link to a file": (lambda path: path.symlink_to(_file_beside(path)), "exists already; add --force to replace it"),
    "link into nowhere": (lambda path: path.symlink_to("none/x.pt"), "its folder does not exist; create it first"),
}


def _file_beside(path: Path) -> Path:
    path.with_name("beside").write_bytes(OLD)
    return path.with_name("beside")


def look(folder: Path) -> dict[str, Any]:
    """Tell what lies in a folder, and what its files hold."""
    seen = {}
    for path in sorted(folder.iterdir()):
        mode = path.lstat().st_mode
        seen[path.name] = (mode, path.lstat().st_ino, path.read_bytes() if stat.S_ISREG(mode) else None)
    return seen


@pytest.mark.parametrize("name", ODD_PLACES)
def test_what_is_no_new_file_is_left_as_it_is(run, place, name):
    make, said = ODD_PLACES[name]
    where = place("pt", exists=False)
    make(where.target)
    before = look(where.folder)
    force = [] if said.startswith("exists") else ["--force"]
    ran = run(*where.arguments(*force))
    assert ran.status == 2
    assert ran.err.splitlines()[-1].startswith(f"ckptool: {where.target}: {said}")
    assert look(where.folder) == before


def test_a_folder_that_is_gone_is_no_place_to_write(run, tmp_path, monkeypatch):
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pt")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    ran = run("convert", tmp_path / "in.pt", "out.pt")
    assert (ran.status, ran.err) == (2, "ckptool: out.pt: its folder does not exist; create it first\n")


def test_other_names_of_the_replaced_file(run, place):
    where = place("pt", exists=True)
    hard, soft = where.folder / "hard", where.folder / "soft.pt"
    hard.hardlink_to(where.target)
    soft.symlink_to(where.target.name)
    assert run("convert", where.source, soft, "--force").status == 0
    assert soft.is_symlink()
    assert set(torch.load(where.target)) == {"a", "b", "c", "d"}
    assert hard.read_bytes() == OLD
    assert len(list(where.folder.iterdir())) == 3


def test_in_place_through_every_name_of_the_input(run, place):
    where = place("pt", exists=False)
    shutil.copy(where.source, where.target)
    hard, soft = where.folder / "hard.pt", where.folder / "soft.pt"
    hard.hardlink_to(where.target)
    soft.symlink_to(where.target.name)
    before = hard.read_bytes()
    assert run("strip-prefixes", soft, "--in-place").status == 0
    assert soft.is_symlink()
    assert set(torch.load(where.target)) == {"a", "b", "c", "d"}
    assert hard.read_bytes() == before


@pytest.fixture
def modules_imported(run, place) -> None:
    """Import all that a conversion needs: an ordinary user may not read it."""
    run("convert", place("pt", exists=False).source, "--dry-run", "x.pt")


def test_a_folder_without_permission(run, place, modules_imported, as_ordinary_user):
    with tempfile.TemporaryDirectory() as name:
        source, folder = Path(name, "in.pt"), Path(name, "out")
        folder.mkdir()
        torch.save({"module.w": torch.ones(2)}, source)
        target = folder / "out.pt"
        target.write_bytes(OLD)
        folder.chmod(0o555)
        ran = run("convert", source, target, "--force")
        assert ran.err.splitlines()[-1].startswith(f"ckptool: {target}: no permission to write in its folder; ")
        assert (ran.status, target.read_bytes(), [*folder.iterdir()]) == (2, OLD, [target])
        folder.chmod(0o755)


def limited(*command: str, limit: str) -> subprocess.CompletedProcess[str]:
    """Run a command under a limit of the shell."""
    line = ["bash", "-c", f'ulimit {limit}; exec "$@"', "bash", sys.executable, "-m", "ckptool", *command]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_for_the_size_of_files(place, kind):
    where = place(kind, exists=True)
    ran = limited(*where.arguments("--force", "--quiet"), limit="-f 200")
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert f"{where.target}: the file is larger than the system or a limit allows" in ran.stderr
    assert look(where.folder)[where.target.name][2] == OLD
    assert len(list(where.folder.iterdir())) == 1


IN_A_SMALL_DISK = """
mount -t tmpfs -o size=$1 tmpfs "$0" && printf old > "$0/out.pt" && shift && "$@"
status=$?; ls -A "$0"; cat "$0/out.pt"; exit $status
"""


def test_a_disk_that_is_too_small(place):
    where = place("pt", exists=False)
    in_namespace = ["unshare", "-rm", "sh", "-c", IN_A_SMALL_DISK, str(where.folder), "200k"]
    if subprocess.run([*in_namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system of their own")
    command = [sys.executable, "-m", "ckptool", *where.arguments("--force", "--quiet")]
    ran = subprocess.run([*in_namespace, *command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert re.fullmatch(rf"ckptool: {where.target}: needs \d+ bytes where \d+ are free; .*\n", ran.stderr)
    assert (ran.returncode, ran.stdout) == (2, "out.pt\nold")


def test_a_disk_that_fills_up_meanwhile(run, place, monkeypatch):
    where = place("pt", exists=True)
    blocks = os.statvfs(where.folder)
    free = os.statvfs_result((*blocks[:4], 1, *blocks[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    ran = run(*where.arguments("--force"))
    assert "bytes where" in ran.err.splitlines()[-1]
    assert (ran.status, where.target.read_bytes()) == (2, OLD)


# --- several at once ---


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "ckptool", *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize("force", [False, True])
def test_writers_that_race_for_a_name(tmp_path, force):
    sources = [tmp_path / f"{index}.pt" for index in range(4)]
    for index, source in enumerate(sources):
        torch.save({"w": torch.full((300_000,), float(index))}, source)
    target = tmp_path / "out" / "out.safetensors"
    target.parent.mkdir()
    more = ["--quiet", *["--force"] * force]
    running = [start(["convert", str(source), str(target), *more]) for source in sources]
    ended = [(process.communicate()[1], process.returncode) for process in running]
    assert sorted(status for _, status in ended) == ([0] * 4 if force else [0, 2, 2, 2])
    assert all("exists already; add --force" in said for said, status in ended if status)
    values = safetensors.torch.load_file(target)["w"]
    winner = int(values[0])
    assert values.eq(winner).all()
    assert force or ended[winner][1] == 0
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_what_a_dead_writer_left_is_no_checkpoint_and_in_nobodys_way(run, place):
    where = place("pt", exists=False)
    stale = where.folder / ".ckptool-0123456789abcdef.tmp"
    stale.write_bytes(b"half of a file")
    assert run(*where.arguments()).status == 0
    assert stale.read_bytes() == b"half of a file"
    ran = run("inspect", where.folder, "--quiet")
    assert (ran.status, ran.err) == (0, "")


# --- what is published is what was read back ---


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_that_the_disk_changed_is_never_published(run, place, monkeypatch, kind, share):
    where = place(kind, exists=True)
    name = "torch" if kind == "pt" else kind
    writer = WRITERS[name]

    def spoil(plan: CopyPlan, file: BinaryIO, progress: Progress) -> Mapping[Payload, int]:
        checksums = writer.write(plan, file, progress)
        file.flush()
        data = Path(f"/proc/self/fd/{file.fileno()}").read_bytes()
        at = int(len(data) * share)
        os.pwrite(file.fileno(), bytes([data[at] ^ 1]), at)
        return checksums

    monkeypatch.setitem(WRITERS, name, replace(writer, write=spoil))
    ran = run(*where.arguments("--force"))
    assert (ran.status, where.target.read_bytes()) == (2, OLD)
    assert len(list(where.folder.iterdir())) == 1


@pytest.mark.parametrize("how", [[], ["--max-shard-size", "300MB"]], ids=["one file", "shards"])
def test_what_the_disk_refuses_while_more_is_written_is_heard(run, tmp_path, monkeypatch, how):
    torch.save({"w": torch.ones(20 << 20)}, tmp_path / "in.pt")  # more than is left to the last sync
    at_work = []

    def refuse(handle: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            at_work.append(handle)
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys.modules["ckptool.writers.staging"], "_SYNC_SECONDS", 0.001)
    monkeypatch.setattr(os, "fsync", refuse)
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" if how else tmp_path / "out" / "out.safetensors"
    ran = run("convert", tmp_path / "in.pt", target, "--to", "safetensors", *how)
    assert at_work
    assert (ran.status, ran.err) == (
        2,
        f"ckptool: {target}: the disk reports an input/output error; write to another one\n",
    )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_on_any_day_in_any_place(place, kind):
    where = place(kind, exists=False)
    written = []
    for index, settings in enumerate(
        ({"TZ": "Asia/Tokyo", "PYTHONHASHSEED": "1"}, {"LC_ALL": "C", "PYTHONHASHSEED": "2"})
    ):
        target = where.target.with_stem(f"out{index}")
        command = [sys.executable, "-m", "ckptool", "convert", str(where.source), str(target), "--quiet"]
        subprocess.run(command, env=os.environ | settings, cwd=ROOT, check=True)
        written.append(target.read_bytes())
    assert written[0] == written[1]
