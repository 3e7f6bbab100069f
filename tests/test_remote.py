"""Checkpoints elsewhere: few bytes for a description, the same answers as on this disk, and one sentence where not."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.servers import Asked, Server, served

from ckptool.formats import open_checkpoint
from ckptool.model.places import RemotePath, as_path

TENSORS = 500
SHAPE = (1024, 524)
MOST_BYTES = 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Write checkpoints of a few megabytes, in every container."""
    torch.manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(64 + i, 300) for i in range(60)}
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, folder / "a.pt")
    changed = {**tensors, "layers.7.weight": tensors["layers.7.weight"] + 1}
    torch.save(changed, folder / "b.pt")
    torch.save({**tensors, "layers.7.weight": torch.randn(3, 3)}, folder / "c.pt")
    torch.save(tensors, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors, folder / "a.safetensors")
    return tensors


@pytest.fixture(scope="module")
def large(folder: Path) -> None:
    """Write two checkpoints of a gigabyte with holes for values."""
    with torch.serialization.skip_data():
        torch.save({f"layers.{i}.weight": torch.empty(SHAPE) for i in range(TENSORS)}, folder / "large.pt")
    nbytes = 4 * SHAPE[0] * SHAPE[1]
    header = {
        f"layers.{i}.weight": {"dtype": "F32", "shape": SHAPE, "data_offsets": [i * nbytes, (i + 1) * nbytes]}
        for i in range(TENSORS)
    }
    text = json.dumps(header).encode()
    with (folder / "large.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + TENSORS * nbytes)


@pytest.fixture(scope="module")
def running(folder: Path, weights: dict[str, torch.Tensor]) -> Iterator[Server]:
    with served(folder) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    running.asked.clear()
    running.sent = 0
    running.change = lambda asked: None
    running.tag = ""
    return running


# --- few bytes ---


@pytest.mark.parametrize("name", ["large.pt", "large.safetensors"])
def test_a_description_of_a_gigabyte_costs_less_than_a_megabyte(name, server, folder, large, run):
    ran = run("inspect", "--json", "--tensors", server.url(name))
    assert ran.status == 0, ran.err
    answer = json.loads(ran.out)
    assert answer["path"] == server.url(name)
    assert answer["file_bytes"] == (folder / name).stat().st_size > 1_000_000_000
    assert [row["shape"] for row in answer["tensors"]] == [list(SHAPE)] * TENSORS
    assert 0 < server.sent < MOST_BYTES
    assert len(server.asked) == 2


def test_a_file_of_the_old_format_is_described_by_small_jumps(server, folder, run):
    ran = run("inspect", "--json", server.url("legacy.pt"))
    assert json.loads(ran.out)["format"] == "torch-legacy"
    assert server.sent < (folder / "legacy.pt").stat().st_size / 4


def test_the_same_is_said_of_a_file_wherever_it_lies(server, folder, run):
    for name in ("a.pt", "a.safetensors", "legacy.pt"):
        here, there = (json.loads(run("inspect", "--json", place).out) for place in (folder / name, server.url(name)))
        notes = [note for note in there["notes"] if note["code"] != "unread-headers"]
        differing = {"path", "next", "notes"}
        assert notes == here["notes"]
        assert {key: there[key] for key in there.keys() - differing} == {
            key: here[key] for key in here.keys() - differing
        }


# --- the same bytes ---


@pytest.mark.parametrize("command", ["convert", "strip-prefixes"])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "legacy.pt"])
def test_what_is_written_is_the_same(command, name, server, folder, tmp_path, run):
    suffix = ".safetensors" if command == "convert" else Path(name).suffix
    here, there = tmp_path / f"here{suffix}", tmp_path / f"there{suffix}"
    assert run(command, folder / name, here).status == 0
    ran = run(command, server.url(name), there)
    assert ran.status == 0, ran.err
    assert there.read_bytes() == here.read_bytes()
    assert server.sent < 1.5 * (folder / name).stat().st_size + MOST_BYTES


def test_a_mean_is_that_of_files_wherever_they_lie(server, folder, tmp_path, run):
    here, there = tmp_path / "here.pt", tmp_path / "there.pt"
    names = ("a.pt", "legacy.pt")
    assert run("convert", "--average", *(folder / name for name in names), here).status == 0
    ran = run("convert", "--average", *map(server.url, names), there)
    assert ran.status == 0, ran.err
    assert there.read_bytes() == here.read_bytes()


def test_the_values_are_those_of_the_file(server, weights):
    import ckptool

    found = ckptool.load_state_dict(server.url("a.pt"))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_files_elsewhere_are_verified_and_compared(server, folder, run):
    assert run("verify", server.url("a.pt"), "--checks", "integrity").status == 0
    assert run("diff", server.url("a.pt"), folder / "a.safetensors").status == 0
    ran = run("diff", "--json", server.url("a.pt"), server.url("b.pt"))
    assert ran.status == 1
    assert [value["key"] for value in json.loads(ran.out)["values"]] == ["layers.7.weight"]


def test_names_and_shapes_are_compared_without_the_values(server, folder, large, run):
    for name, status in {"a.pt": 0, "a.safetensors": 0, "b.pt": 0, "c.pt": 1, "large.pt": 1}.items():
        server.sent = 0
        ran = run("diff", "--json", "--no-values", server.url("a.pt"), server.url(name))
        assert ran.status == status, ran.err
        answer = json.loads(ran.out)
        assert (answer["values_compared"], answer["identical"], answer["values"]) == (False, 0, [])
        assert "values-unread" in {note["code"] for note in answer["notes"]}
        assert server.sent < MOST_BYTES
    answer = json.loads(run("diff", "--json", "--no-values", server.url("a.pt"), server.url("c.pt")).out)
    assert [change["key"] for change in answer["shape"]] == ["layers.7.weight"]
    ran = run("diff", "--no-values", "--color", "always", server.url("a.pt"), server.url("b.pt"))
    assert "the values were not read" in ran.out
    for option in (["--tree"], ["--rtol", "1"]):
        ran = run("diff", "--no-values", *option, server.url("a.pt"), server.url("b.pt"))
        assert (ran.status, "leave out --no-values" in ran.err) == (2, True)


def test_an_output_is_named_after_the_address(server, tmp_path, run):
    ran = run("convert", f"{server.url('a.pt')}?signature=a//b", "--out-dir", tmp_path / "out", "--to", "safetensors")
    assert ran.status == 0, ran.err
    assert (tmp_path / "out" / "a.safetensors").is_file()
    assert {asked.query for asked in server.asked} == {"signature=a//b"}


# --- shards ---


@pytest.fixture(scope="module")
def sharded(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    shards = folder / "shards of it"
    shards.mkdir()
    names = sorted(weights)
    files = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, keys in files.items():
        safetensors.torch.save_file({key: weights[key] for key in keys}, shards / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in files.items() for key in keys}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    missing = {"weight_map": {**index["weight_map"], "fc.bias": "model-00003-of-00003.safetensors"}}
    (shards / "missing.safetensors.index.json").write_text(json.dumps(missing))
    return shards


def test_an_index_leads_to_its_shards(server, sharded, weights, run):
    ran = run("inspect", "--json", "--tensors", server.url("shards%20of%20it/model.safetensors.index.json"))
    assert ran.status == 0, ran.err
    answer = json.loads(ran.out)
    assert answer["format"] == "safetensors-shards"
    assert {row["key"] for row in answer["tensors"]} == weights.keys()
    assert len(server.asked) == 5


def test_a_missing_shard_is_named(server, sharded, run):
    ran = run("inspect", server.url("shards%20of%20it/missing.safetensors.index.json"))
    assert ran.status == 2
    assert "'model-00003-of-00003.safetensors': the server has no such file (404)" in ran.err


# --- what goes wrong ---


def answer_with(status: int, **headers: str) -> Callable[[Asked], None]:
    def change(asked: Asked) -> None:
        asked.status = status
        asked.answer = {name.replace("_", "-"): value for name, value in headers.items()}

    return change


def cut(asked: Asked) -> None:
    asked.cut = 10


def shift(asked: Asked) -> None:
    asked.answer["Content-Range"] = asked.answer["Content-Range"].replace("bytes 0-", "bytes 1-")


def compress(asked: Asked) -> None:
    asked.answer["Content-Encoding"] = "gzip"


def say_no_range(asked: Asked) -> None:
    del asked.answer["Content-Range"]


BROKEN: dict[str, tuple[Callable[[Asked], None], str]] = {
    "no ranges": (answer_with(200), "the server sends whole files only, no ranges; download the file first"),
    "moved": (answer_with(302, Location="/b.pt"), "/b.pt' (302); name that address if you trust it"),
    "moved to another server": (answer_with(307, Location="http://x.test/b"), "'http://x.test/b' (307)"),
    "unauthorised": (answer_with(401), "who you are (401)"),
    "forbidden": (answer_with(403), "the server refuses it (403)"),
    "missing": (answer_with(404), "no such file (404); check the address"),
    "busy": (answer_with(503), "status 503; try again later"),
    "odd": (answer_with(418), "status 418; check the address"),
    "cut": (cut, "the connection ended 10 bytes too early"),
    "other bytes": (shift, "other bytes than it was asked for"),
    "compressed": (compress, "the server compresses what it sends"),
    "no range told": (say_no_range, "does not say which bytes it sends"),
}


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "convert"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_server_that_cannot_be_used_gets_one_sentence(name, command, server, tmp_path, folder, run):
    server.change, sentence = BROKEN[name]
    rest = {"diff": [folder / "a.pt"], "convert": [tmp_path / "out.pt"]}.get(command, [])
    ran = run(command, server.url("a.pt"), *rest)
    assert ran.status == 2
    assert ran.err.startswith(f"ckptool: {server.url('a.pt')}: ")
    assert sentence in ran.err
    assert ran.err.count("\n") == 1
    assert len(server.asked) == 1
    assert list(tmp_path.iterdir()) == []


def new_tag(asked: Asked) -> None:
    asked.answer["ETag"] = f'"{asked.start}"'


def new_time(asked: Asked) -> None:
    del asked.answer["ETag"]
    asked.answer["Last-Modified"] = f"Mon, 01 Jan 2024 00:00:{'00' if asked.start == 0 else '01'} GMT"


def longer(asked: Asked) -> None:
    if asked.start:
        asked.answer["Content-Range"] += "0"


def gone_short(asked: Asked) -> None:
    if asked.start:
        asked.status, asked.body, asked.answer["Content-Range"] = 416, b"", "bytes */7"


@pytest.mark.parametrize("change", [new_tag, new_time, longer, gone_short])
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_file_that_changes_is_refused(command, change, server, tmp_path, run):
    server.change = change
    ran = run(command, server.url("a.pt"), *([tmp_path / "out.pt"] if command == "convert" else []))
    assert ran.status == 2
    assert "the file changed while it was read" in ran.err
    assert list(tmp_path.iterdir()) == []


def late(change: Callable[[Asked], None]) -> Callable[[Asked], None]:
    """Begin in the midst of the values, when the description was fetched."""

    def change_late(asked: Asked) -> None:
        if asked.start > 1 << 20 and asked.stop < 6 << 20:
            change(asked)

    return change_late


@pytest.mark.parametrize("change", [new_tag, cut, answer_with(503)])
@pytest.mark.parametrize("command", ["convert", "verify", "diff"])
def test_what_goes_wrong_among_the_values_is_no_answer(command, change, server, tmp_path, folder, run):
    server.change = late(change)
    rest = {"diff": [folder / "a.pt"], "convert": [tmp_path / "out.pt"]}.get(command, [])
    ran = run(command, server.url("a.pt"), *rest)
    assert len(server.asked) > 2
    assert ran.status == 2, ran.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("http://127.0.0.1:1/a.pt", "the server cannot be reached"),
        ("http://", "names no server"),
        ("http://127.0.0.1:99999/a.pt", "names no server"),
        ("http://user:secret@127.0.0.1:1/a.pt", "tells a name or a password"),
        ("http://127.0.0.1:1/a b.pt", "write them as %20"),
        ("http://127.0.0.1:1/folder/", "that of a folder"),
        ("http://127.0.0.1:1/run/.metadata", "read from this disk only"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused(address, sentence, run):
    ran = run("inspect", address)
    assert ran.status == 2
    assert sentence in ran.err


def test_nothing_is_written_elsewhere(server, run):
    for rest in ([server.url("new.pt")], ["--in-place"]):
        ran = run("convert", server.url("a.pt"), *rest)
        assert ran.status == 2
        assert "ckptool writes to this disk only" in ran.err
    ran = run("verify", server.url("a.pt"), "--trust-code")
    assert ran.status == 2
    assert "download it first" in ran.err
    assert server.asked == []


def test_a_connection_that_was_let_go_is_opened_again(server, tmp_path, run):
    def let_go(asked: Asked) -> None:
        asked.answer["Connection"] = "close"

    server.change = let_go
    assert run("convert", server.url("a.pt"), tmp_path / "out.pt").status == 0


# --- what the directory of an archive says of bytes that were not fetched ---


def damaged(path: Path, target: Path, at: Callable[[bytes, int], int], value: bytes) -> None:
    """Copy an archive, with other bytes in the local header of the storage 30, or behind its values."""
    data = bytearray(path.read_bytes())
    header = data.index(b"/data/30") - 30 - len(b"a")
    where = at(bytes(data), header)
    data[where : where + len(value)] = value
    target.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[bytes, int], int], bytes]] = {
    "another name": (lambda data, header: header + 30, b"X"),
    "no header": (lambda data, header: header, b"PK\x03\x05"),
    "another method": (lambda data, header: header + 8, b"\x08"),
    "longer extra field": (lambda data, header: header + 28, b"\x07"),
    "another descriptor": (lambda data, header: data.index(b"PK\x07\x08", header) + 8, b"\x01\x02\x03"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_headers_are_compared_before_their_tensors_are_read(name, server, folder, tmp_path, run):
    damaged(folder / "a.pt", folder / "damaged.pt", *DAMAGE[name])
    seen = run("inspect", "--json", server.url("damaged.pt"))
    assert "unread-headers" in {note["code"] for note in json.loads(seen.out)["notes"]}
    assert run("convert", folder / "damaged.pt", tmp_path / "out.pt").status == 2
    ran = run("convert", server.url("damaged.pt"), tmp_path / "out.pt")
    assert ran.status == 2
    assert "tampered with" in ran.err
    assert list(tmp_path.iterdir()) == []


# --- what an address is ---


def test_what_is_on_this_disk_wins(tmp_path, monkeypatch, folder, weights, run):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "http:" / "127.0.0.1:1"
    place.mkdir(parents=True)
    (place / "a.pt").write_bytes((folder / "a.pt").read_bytes())
    assert run("inspect", "http://127.0.0.1:1/a.pt").status == 0
    assert not isinstance(as_path("http://127.0.0.1:1/a.pt"), RemotePath)
    assert isinstance(as_path("http://127.0.0.1:1/b.pt"), RemotePath)


@pytest.mark.parametrize(
    ("text", "name", "parent"),
    [
        ("https://h/a//b/x.pt?q=1//2#f", "x.pt", "https://h/a//b"),
        ("S3://bucket/a/x?y.pt", "x?y.pt", "S3://bucket/a"),
        ("hf://org/model@main/x.pt", "x.pt", "hf://org/model@main"),
    ],
)
def test_an_address_is_kept_as_it_was_given(text, name, parent):
    path = as_path(text)
    assert isinstance(path, RemotePath)
    assert (str(path), os.fspath(path), path.name, str(path.parent)) == (text, text, name, parent)
    assert not path.is_file()
    assert path == as_path(text) != as_path(f"{text}2")


def test_a_beside_file_keeps_the_special_characters_of_its_name():
    path = as_path("https://h/a.pt?q=1")
    assert isinstance(path, RemotePath)
    assert str(path.with_name("b#1 %.pt")) == "https://h/b%231%20%25.pt"


def test_nothing_is_sent_but_what_a_range_needs(server, run):
    run("inspect", server.url("a.pt"))
    for asked in server.asked:
        assert asked.headers.keys() == {"Host", "Accept", "Accept-Encoding", "User-Agent", "Cache-Control", "Range"}


def test_a_closed_file_lets_its_connection_go(server):
    path = as_path(server.url("a.pt"))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.path == path
    checkpoint.close()


# --- buckets ---


@pytest.fixture
def bucket(server: Server, folder: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the server stand in for S3: of all its requests, HeadObject and GetObject with a range are what is needed."""
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.address)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    place = folder / "bucket"
    place.mkdir(exist_ok=True)
    for name in ("a.pt", "large.pt", "large.safetensors"):
        if (folder / name).exists() and not (place / name).exists():
            (place / name).hardlink_to(folder / name)
    return place


@pytest.mark.parametrize("name", ["large.pt", "large.safetensors"])
def test_an_object_of_a_gigabyte_is_described_for_less_than_a_megabyte(name, server, large, bucket, run):
    ran = run("inspect", "--json", "--tensors", f"s3://bucket/{name}")
    assert ran.status == 0, ran.err
    answer = json.loads(ran.out)
    assert answer["path"] == f"s3://bucket/{name}"
    assert len(answer["tensors"]) == TENSORS
    assert 0 < server.sent < MOST_BYTES


def test_an_object_is_written_as_the_file_it_is(folder, bucket, tmp_path, run):
    assert run("convert", folder / "a.pt", tmp_path / "here.safetensors").status == 0
    ran = run("convert", "s3://bucket/a.pt", tmp_path / "there.safetensors")
    assert ran.status == 0, ran.err
    assert (tmp_path / "there.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("address", "status", "sentence"),
    [
        ("s3://bucket/none.pt", 404, "there is no such object in the bucket; check the address"),
        ("s3://bucket/a.pt", 403, "the bucket refuses it"),
    ],
)
def test_what_is_wrong_with_an_object_is_said_in_one_sentence(address, status, sentence, server, bucket, run):
    server.change = answer_with(status)
    ran = run("inspect", address)
    assert ran.status == 2
    assert ran.err.startswith(f"ckptool: {address}: {sentence}")
    assert ran.err.count("\n") == 1


def test_an_object_that_changes_is_refused(server, bucket, run):
    server.change = lambda asked: setattr(server, "tag", f'"{len(server.asked)}"')
    ran = run("inspect", "s3://bucket/a.pt")
    assert ran.status == 2
    assert "the file changed while it was read" in ran.err


def test_a_bucket_without_its_library_says_what_to_install(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "gcsfs.retry", None)
    ran = run("inspect", "gs://bucket/a.pt")
    assert ran.status == 2
    assert "gs:// is read with gcsfs, which is not installed; pip install 'ckptool[remote]'" in ran.err


# --- the Hub ---


@pytest.fixture
def hub(server: Server, folder: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Server:
    """Let the server stand in for the Hub, with one model of two revisions."""
    for revision, name in (("main", "a.pt"), ("refs%2Fpr%2F1", "b.pt")):
        place = folder / "org" / "model" / "resolve" / revision.replace("%2F", "/")
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "x y.pt").exists():
            (place / "x y.pt").hardlink_to(folder / name)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", raising=False)
    return server


@pytest.mark.parametrize(("revision", "like"), [("", "a.pt"), ("@main", "a.pt"), ("@refs%2Fpr%2F1", "b.pt")])
def test_a_file_on_the_hub_is_read_with_the_token(revision, like, hub, folder, run):
    ran = run("inspect", "--json", f"hf://org/model{revision}/x y.pt")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["file_bytes"] == (folder / like).stat().st_size
    assert {asked.headers["Authorization"] for asked in hub.asked} == {"Bearer hf_secret"}


def test_the_token_goes_to_the_hub_alone(hub, folder, tmp_path, run):
    with served(folder) as store:

        def send_on(asked: Asked) -> None:
            answer_with(302, Location=store.url("a.pt?signature=1"))(asked)

        hub.change = send_on
        ran = run("convert", "hf://org/model/x y.pt", tmp_path / "out.pt")
        assert ran.status == 0, ran.err
        assert len(hub.asked) == 1
        assert len(store.asked) > 2
        assert all("Authorization" not in asked.headers for asked in store.asked)


def test_an_address_that_is_no_longer_valid_is_asked_for_again(hub, folder, tmp_path, run):
    with served(folder) as store:

        def send_on(asked: Asked) -> None:
            answer_with(302, Location=store.url(f"a.pt?signature={len(hub.asked)}"))(asked)

        def expire(asked: Asked) -> None:
            if asked.query == "signature=1" and len(store.asked) > 2:
                answer_with(403)(asked)

        hub.change, store.change = send_on, expire
        assert run("convert", "hf://org/model/x y.pt", tmp_path / "out.pt").status == 0
        assert len(hub.asked) == 2


def test_without_a_token_none_is_sent(hub, monkeypatch, tmp_path, run):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert run("inspect", "hf://org/model/x y.pt").status == 0
    assert all("Authorization" not in asked.headers for asked in hub.asked)
    (tmp_path / "token").write_text("hf_stored\n")
    hub.asked.clear()
    assert run("inspect", "hf://org/model/x y.pt").status == 0
    assert {asked.headers["Authorization"] for asked in hub.asked} == {"Bearer hf_stored"}
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    hub.asked.clear()
    assert run("inspect", "hf://org/model/x y.pt").status == 0
    assert all("Authorization" not in asked.headers for asked in hub.asked)


def test_who_has_no_home_has_no_stored_token(hub, monkeypatch, run):
    for name in ("HF_TOKEN", "HF_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert run("inspect", "hf://org/model/x y.pt").status == 0
    assert all("Authorization" not in asked.headers for asked in hub.asked)


def to_itself(asked: Asked) -> None:
    answer_with(302, Location=asked.path)(asked)


HUB_REFUSALS: dict[str, tuple[str, Callable[[Asked], None], str]] = {
    "no file": ("hf://org/model/none.pt", lambda asked: None, "the Hub has no such file or revision (404)"),
    "unknown": ("hf://org/model/x y.pt", answer_with(401), "the Hub has no such repository, or asks who you are (401)"),
    "gated": ("hf://org/model/x y.pt", answer_with(403), "the Hub refuses it (403)"),
    "in a circle": ("hf://org/model/x y.pt", to_itself, "sends on and on"),
    "to another scheme": ("hf://org/model/x y.pt", answer_with(302, Location="ftp://x.test/"), "sends on to 'ftp://x"),
    "no name": ("hf://org/model", lambda asked: None, "write it as hf://ORG/MODEL[@REVISION]/FILE"),
}


@pytest.mark.parametrize("name", HUB_REFUSALS)
def test_what_the_hub_refuses_is_said_in_one_sentence(name, hub, run):
    address, hub.change, sentence = HUB_REFUSALS[name]
    ran = run("inspect", address)
    assert ran.status == 2
    assert ran.err.startswith(f"ckptool: {address}: ")
    assert sentence in ran.err
    assert ran.err.count("\n") == 1


def test_a_token_that_is_none_is_never_sent(hub, monkeypatch, run):
    monkeypatch.setenv("HF_TOKEN", "two\r\nlines")
    ran = run("inspect", "hf://org/model/x y.pt")
    assert ran.status == 2
    assert "set HF_TOKEN anew" in ran.err
    assert hub.asked == []
