"""A target is old or complete, whatever happens in between, and nothing but a file is ever replaced."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckptool.errors import OutputRefused
from ckptool.writers import staging

OLD = b"old " * 1000
NEW = b"new " * 100_000


def publish(target, content=NEW, **options):
    with staging(target, nbytes=len(content), **options) as staged:
        staged.file.write(content)
        staged.publish()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leftovers(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if name.endswith(".tmp")]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.pt"


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


# --- what is published ---


@pytest.mark.parametrize("existing", [False, True])
def test_a_file_appears_whole(target, existing):
    if existing:
        target.write_bytes(OLD)
    publish(target, force=existing)
    assert target.read_bytes() == NEW
    assert names_in(target.parent) == [target.name]


def test_what_is_staged_can_be_read_before_it_is_published(target):
    with staging(target) as staged:
        staged.file.write(NEW)
        staged.sync()
        assert staged.path.read_bytes() == NEW
        assert staged.path.parent == target.parent
        assert staged.path.name.startswith(".")
        assert not target.exists()
        staged.publish()
        assert target.read_bytes() == NEW


def test_leaving_without_publishing_leaves_nothing(target):
    with staging(target) as staged:
        staged.file.write(NEW)
    assert names_in(target.parent) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_keeps_the_old_file_and_passes_on(target, error):
    target.write_bytes(OLD)
    with pytest.raises(error), staging(target, force=True) as staged:  # noqa: PT012
        staged.file.write(NEW)
        raise error
    assert target.read_bytes() == OLD
    assert names_in(target.parent) == [target.name]


def test_file_and_folder_are_synced_around_the_publication(target, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace

    def log_fsync(handle):
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"file {os.fstat(handle).st_size}")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("replace"), replace(self, to)))
    publish(target, force=True)
    assert events == [f"file {len(NEW)}", "replace", "folder"]


def test_a_relative_target_and_text_are_paths_too(target, monkeypatch):
    monkeypatch.chdir(target.parent)
    publish("./out.pt")
    assert target.read_bytes() == NEW


# --- modes ---


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_that_the_umask_allows(target, umask, mask, mode):
    umask(mask)
    publish(target)
    assert stat.S_IMODE(target.stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o640, 0o600, 0o666, 0o444, 0o4755, 0o000])
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_replaced_file_keeps_its_mode(target, umask, mode, mask):
    umask(mask)
    target.write_bytes(OLD)
    target.chmod(mode)
    with staging(target, force=True) as staged:
        staged_mode = stat.S_IMODE(staged.path.stat().st_mode)
        staged.file.write(NEW)
        staged.publish()
    assert staged_mode == stat.S_IMODE(target.stat().st_mode) == mode & 0o777


# --- what is refused, before anything is written ---


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)  # a socket's path is limited to some 100 bytes
        bound.bind(path.name)
        os.fchdir(here)
        os.close(here)


REFUSED = {
    "folder": ("out.pt", Path.mkdir, "is a folder"),
    "trailing slash": ("out.pt/", None, "names a folder"),
    "fifo": ("out.pt", os.mkfifo, "is a device, pipe"),
    "socket": ("out.pt", bind_socket, "is a device, pipe"),
    "link to a folder": ("out.pt", lambda path: path.symlink_to(path.parent), "is a folder"),
    "link to a device": ("out.pt", lambda path: path.symlink_to("/dev/null"), "is a device, pipe"),
    "link to itself": ("out.pt", lambda path: path.symlink_to(path.name), "broken link"),
    "missing folder": ("none/out.pt", None, "its folder does not exist"),
    "link into a missing folder": ("out.pt", lambda path: path.symlink_to("none/out.pt"), "its folder does not exist"),
    "a file as folder": ("out.pt/a.pt", lambda path: path.parent.write_bytes(OLD), "a part of the path is no folder"),
    "long name": ("x" * 256, None, "the name is too long"),
    "NUL": ("a\0b", None, "is no possible file name"),
    "surrogate": ("a\ud800b", None, "is no possible file name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_file_is_refused(tmp_path, name):
    leaf, make, reason = REFUSED[name]
    target = f"{tmp_path}/{leaf}"
    if make is not None:
        make(Path(target))
    before = names_in(tmp_path)
    with pytest.raises(OutputRefused, match=reason) as refusal, staging(target, force=True):
        pytest.fail("it was staged")
    assert names_in(tmp_path) == before
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("device", ["/dev/null", "/dev/full", "/dev/zero"])
def test_a_device_stays_a_device(device):
    with pytest.raises(OutputRefused, match="is a device"), staging(device, force=True):
        pytest.fail("it was staged")
    assert stat.S_ISCHR(os.lstat(device).st_mode)


@pytest.mark.parametrize("target", ["", "."])
def test_the_working_folder_is_refused(target):
    with pytest.raises(OutputRefused, match="is a folder"), staging(target, force=True):
        pytest.fail("it was staged")


def test_an_existing_file_is_refused_without_force(target):
    target.write_bytes(OLD)
    with pytest.raises(OutputRefused, match=r"out\.pt: exists already; add --force"), staging(target):
        pytest.fail("it was staged")
    assert target.read_bytes() == OLD


def test_the_longest_name_that_the_file_system_takes_is_written(tmp_path):
    publish(tmp_path / ("x" * 255))
    assert (tmp_path / ("x" * 255)).read_bytes() == NEW


@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_without_permission_is_refused(existing, as_ordinary_user):
    with tempfile.TemporaryDirectory() as name:
        target = Path(name, "out.pt")
        if existing:
            target.write_bytes(OLD)
        Path(name).chmod(0o555)
        with pytest.raises(OutputRefused, match="no permission to write"), staging(target, force=True):
            pytest.fail("it was staged")
        assert names_in(Path(name)) == [target.name] * existing
        Path(name).chmod(0o755)


def test_too_little_space_is_refused_before_it_is_written(target):
    with pytest.raises(OutputRefused, match=r"needs 4611686018427387904 bytes where \d+ are free"):
        publish_nothing(target, nbytes=1 << 62)


def publish_nothing(target, nbytes):
    with staging(target, nbytes=nbytes):
        pytest.fail("it was staged")


def test_a_file_system_that_reports_no_size_is_tried(target, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=0, f_frsize=0, f_blocks=0))
    publish(target)
    assert target.read_bytes() == NEW


# --- links and other names of the same file ---


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    real, link = tmp_path / "deep" / "real.pt", tmp_path / "link.pt"
    real.parent.mkdir()
    real.write_bytes(OLD)
    link.symlink_to("deep/real.pt")
    publish(link, force=True)
    assert link.is_symlink()
    assert real.read_bytes() == NEW
    assert leftovers(tmp_path) == leftovers(real.parent) == []


def test_a_link_to_a_file_needs_force_too(tmp_path):
    (tmp_path / "real.pt").write_bytes(OLD)
    (tmp_path / "link.pt").symlink_to("real.pt")
    with pytest.raises(OutputRefused, match=r"link\.pt: exists already"):
        publish(tmp_path / "link.pt")
    assert (tmp_path / "real.pt").read_bytes() == OLD


def test_a_dangling_link_is_filled(tmp_path):
    (tmp_path / "link.pt").symlink_to("real.pt")
    publish(tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert (tmp_path / "real.pt").read_bytes() == NEW


def test_an_open_input_survives_being_replaced(tmp_path):
    source, other = tmp_path / "in.pt", tmp_path / "other.pt"
    source.write_bytes(OLD)
    other.hardlink_to(source)
    with source.open("rb") as reader:
        publish(source, force=True)
        assert reader.read() == OLD
    assert (source.read_bytes(), other.read_bytes()) == (NEW, OLD)


def test_a_stale_staged_file_is_left_alone(target):
    stale = target.parent / ".ckptool-0123456789abcdef.tmp"
    stale.write_bytes(OLD)
    publish(target)
    assert stale.read_bytes() == OLD


def test_a_planted_name_is_never_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_bytes(OLD)
    monkeypatch.setattr("secrets.token_hex", lambda nbytes: "guessed")
    (tmp_path / ".ckptool-guessed.tmp").symlink_to(victim)
    with pytest.raises(OutputRefused):
        publish(tmp_path / "out.pt")
    assert victim.read_bytes() == OLD
    assert not (tmp_path / "out.pt").exists()


# --- a disk that refuses ---

DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "quota is used up",
    errno.EFBIG: "larger than the system or a limit allows",
    errno.EIO: "input/output error",
    errno.EROFS: "read-only file system",
    errno.ESTALE: "it cannot be written",
}


@pytest.mark.parametrize("number", DISK_ERRORS)
@pytest.mark.parametrize("while_writing", [True, False])
def test_an_error_of_the_disk_is_one_sentence(target, monkeypatch, number, while_writing):
    target.write_bytes(OLD)

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputRefused, match=DISK_ERRORS[number]) as refusal, staging(target, force=True) as staged:  # noqa: PT012
        staged.file.write(NEW)
        if while_writing:
            fail()
        staged.publish()
    assert str(refusal.value).startswith(f"{target}: ")
    assert target.read_bytes() == OLD
    assert leftovers(target.parent) == []


PRELUDE = "import os, resource, signal, sys\nfrom pathlib import Path\nfrom ckptool.writers import staging\n"


def run_child(code: str, *args: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


FILL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
with staging(sys.argv[1], force=True) as staged:
    for _ in range(64):
        staged.file.write(bytes(1 << 16))
    staged.publish()
"""


def test_a_file_size_limit_leaves_the_old_file(target):
    target.write_bytes(OLD)
    child = run_child(FILL, target)
    assert "OutputRefused" in child.communicate()[1].splitlines()[-1]
    assert target.read_bytes() == OLD
    assert leftovers(target.parent) == []


FULL = """
for nbytes in (1 << 30, 0):  # known beforehand to be too much, and found out while writing
    try:
        with staging(sys.argv[1], force=True, nbytes=nbytes) as staged:
            for _ in range(1 << 10):
                staged.file.write(bytes(1 << 16))
            staged.publish()
    except Exception as error:
        print(type(error).__name__, error)
print(os.listdir("."), Path(sys.argv[1]).read_text())
"""
IN_A_SMALL_TMPFS = 'mount -t tmpfs -o size=1m tmpfs "$0" && cd "$0" && printf old > out.pt && exec "$@"'


def test_a_full_disk_leaves_the_old_file(tmp_path):
    in_namespace = ["unshare", "-rm", "sh", "-c", IN_A_SMALL_TMPFS, tmp_path]
    if subprocess.run([*in_namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system of their own")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [*in_namespace, sys.executable, "-c", PRELUDE + FULL, "out.pt"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    early, late, left = ran.stdout.splitlines()
    assert early.startswith("OutputRefused out.pt: needs 1073741824 bytes where ")
    assert late.startswith("OutputRefused out.pt: the disk is full; ")
    assert left == "['out.pt'] old"


# --- death ---

KILL = """
target, point, force = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
def before(function):
    return lambda *args, **options: die()
def after(function):
    def call(*args, **options):
        function(*args, **options)
        die()
    return call
wrap = before if point.startswith("before") else after
if point.endswith("sync"):
    os.fsync = wrap(os.fsync)
if point.endswith("move"):
    Path.replace, Path.hardlink_to = wrap(Path.replace), wrap(Path.hardlink_to)
with staging(target, force=force) as staged:
    if point == "created": die()
    staged.file.write(b"new " * 50_000)
    if point == "half": die()
    staged.file.write(b"new " * 50_000)
    if point == "written": die()
    staged.publish()
    if point == "published": die()
"""
KILL_POINTS = {
    "created": "old",
    "half": "old",
    "written": "old",
    "before sync": "old",
    "after sync": "old",
    "before move": "old",
    "after move": "new",
    "published": "new",
}


@pytest.mark.parametrize("point", KILL_POINTS)
@pytest.mark.parametrize("force", [False, True])
def test_a_killed_writer_leaves_the_old_file_or_the_whole_new_one(target, point, force):
    if force:
        target.write_bytes(OLD)
    child = run_child(KILL, target, point, force)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    content = target.read_bytes() if target.exists() else None
    assert content == {"old": OLD if force else None, "new": NEW}[KILL_POINTS[point]]
    publish(target, force=True)  # whatever it left behind is in nobody's way
    assert target.read_bytes() == NEW


ENDLESS = """
with staging(sys.argv[1], force=True) as staged:
    while True:
        staged.file.write(bytes(1 << 12))
        if staged.file.tell() == 1 << 16:
            print("writing", flush=True)
        if staged.file.tell() > 1 << 22:
            staged.file.seek(1 << 17)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_ctrl_c_leaves_no_trace(target, existing):
    if existing:
        target.write_bytes(OLD)
    child = run_child(ENDLESS, target)
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in child.communicate()[1]
    assert names_in(target.parent) == [target.name] * existing
    assert not existing or target.read_bytes() == OLD


# --- several writers at once ---


def race(target: Path, writers: int, **options) -> Counter:
    """Let every writer stage before the first publishes; give how they ended."""
    barrier, outcomes = threading.Barrier(writers), []

    def write(index: int) -> None:
        try:
            with staging(target, **options) as staged:
                staged.file.write(bytes((index,)) * 100_000)
                barrier.wait()
                staged.publish()
            outcomes.append("published")
        except OutputRefused as refusal:
            outcomes.append(str(refusal).split("; ")[0])

    threads = [threading.Thread(target=write, args=(index,)) for index in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Counter(outcomes)


def is_whole(target: Path) -> bool:
    content = target.read_bytes()
    return len(content) == 100_000 and len(set(content)) == 1


def no_hard_links(self, target):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("hard_links", [True, False])
def test_one_of_two_writers_wins_a_new_name(target, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr(Path, "hardlink_to", no_hard_links)
    assert race(target, 8) == {"published": 1, f"{target}: exists already": 7}
    assert is_whole(target)
    assert leftovers(target.parent) == []


def test_with_force_the_last_writer_wins_whole(target):
    target.write_bytes(OLD)
    assert race(target, 8, force=True) == {"published": 8}
    assert is_whole(target)
    assert leftovers(target.parent) == []


def test_a_claimed_name_is_given_back_when_the_move_fails(target, monkeypatch):
    def fail(self, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "hardlink_to", no_hard_links)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputRefused, match="input/output error"):
        publish(target)
    assert names_in(target.parent) == []


def test_a_target_that_becomes_a_folder_is_refused(target):
    with pytest.raises(OutputRefused, match="is a folder"), staging(target, force=True) as staged:  # noqa: PT012
        target.mkdir()
        staged.publish()
    assert leftovers(target.parent) == []


def test_readers_see_the_old_file_or_the_new_one(target):
    target.write_bytes(bytes(100_000))
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            content = target.read_bytes()
            seen.add((len(content), len(set(content))))

    reader = threading.Thread(target=read)
    reader.start()
    for index in range(20):
        publish(target, bytes((index,)) * 100_000, force=True)
    done.set()
    reader.join()
    assert seen == {(100_000, 1)}
