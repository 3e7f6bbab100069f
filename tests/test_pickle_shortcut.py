"""The shortcut for a thousand tensors against the loop that executes every opcode: nobody may tell them apart."""

from __future__ import annotations

import io
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import pytest
import torch

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.pickle import GlobalLog, PickledStorage, limits, read_pickle, shortcut
from ckptool.formats.pickle.engine import Stopped
from ckptool.formats.pickle.machine import Machine
from ckptool.formats.pickle.reading import Malformed, Reading
from ckptool.formats.sources import MemorySource
from ckptool.model.values import DictNode, OpaqueTensor, SetNode, Storage, Stub, TensorSpec

FIRST = 33  # tensors after which all memo indices take four bytes


class Storages:
    """Answer persistent ids as a container does: one storage for a key, declared once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[Any, ...], PickledStorage]] = {}

    def load(self, identifier: tuple[Any, ...]) -> PickledStorage:
        """Find a storage of any size up to a million elements."""
        if [type(part) for part in identifier[2:]] != [str, str, int] or not 0 <= identifier[4] < 1_000_000:
            raise UnreadableCheckpoint("the storage is none")
        _, kind, key, location, numel = identifier
        if key not in self._known:
            nbytes = numel * (kind.dtype.itemsize if kind.dtype else 1)
            storage = Storage(key, MemorySource("memory", b""), nbytes, location)
            self._known[key] = (identifier, PickledStorage(storage, kind.dtype, 0, numel))
        if self._known[key][0] != identifier:
            raise UnreadableCheckpoint("the storage is declared twice")
        return self._known[key][1]


def picture(value: Any, seen: dict[int, int]) -> Any:
    """Draw a value with everything below it; what has an identity is drawn once and numbered."""
    if isinstance(value, tuple):
        return (type(value).__name__, *(picture(part, seen) for part in value))
    parts = parts_of(value)
    if parts is None:
        return (type(value).__name__, repr(value))
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = len(seen)
    return (type(value).__name__, *(picture(part, seen) for part in parts))


def parts_of(value: Any) -> list[Any] | None:
    if isinstance(value, list):
        return value
    if isinstance(value, DictNode):
        return [value.type_name, value.attributes, *value.pairs]
    if isinstance(value, SetNode):
        return [value.type_name, *value.items]
    if isinstance(value, TensorSpec | OpaqueTensor | Stub | Storage):
        return [getattr(value, name) for name in type(value).__slots__ if name != "source"]
    return None


def run(data: bytes, storages: Storages | None) -> tuple[Any, ...]:
    """Execute a pickle; give all that it leaves behind."""
    log = GlobalLog()
    machine = Machine(data, 0, Reading("data.pkl", log, len(data)), storages and storages.load)
    outcome: Any
    try:
        stopped: Stopped = machine.execute()
        outcome = (stopped.value, stopped.end)
    except UnreadableCheckpoint as error:
        outcome = str(error)
    except (Malformed, IndexError, struct.error) as error:
        outcome = str(machine.explain(error))
    machine.settle()
    seen: dict[int, int] = {}
    return (
        picture(outcome, seen), picture(sorted(machine.memo.items(), key=itemgetter(0)), seen),
        picture(machine.stack, seen), machine.executed, machine.position, log.findings, log.uses(),
    )  # fmt: skip


class Shortcut:
    """Switch the shortcut off, and count the rows that it reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._count_opcodes = shortcut._count_opcodes
        self._read_tensors = shortcut.read_tensors
        self.rows = 0

    def _count(self, columns: Any, puts: int) -> int:
        self.rows += len(columns.word)
        return self._count_opcodes(columns, puts)

    def compare(self, data: bytes, *, has_storages: bool = True) -> tuple[Any, ...]:
        """Run both ways, demand the same of both, and give it."""
        storages = Storages if has_storages else lambda: None
        self._patch.setattr(shortcut, "_count_opcodes", self._count)
        self._patch.setattr(shortcut, "read_tensors", self._read_tensors)
        quick = run(data, storages())
        self._patch.setattr(shortcut, "read_tensors", lambda machine, position: None)
        assert quick == run(data, storages())
        return quick


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Shortcut:
    """Give the comparison of both ways."""
    return Shortcut(monkeypatch)


def pickled(value: Any) -> bytes:
    """Give the pickle that torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def state_dict(count: int = FIRST + 7) -> dict[str, torch.Tensor]:
    return {f"module.layers.{index}.weight": torch.zeros(2, 3) for index in range(count)}


def short_pickle() -> bytes:
    """Give a pickle that the shortcut reads from the second tensor on, all its memo indices taking four bytes."""
    data = pickled(state_dict(6))
    opcodes = [(opcode.name, arg, at) for opcode, arg, at in pickletools.genops(data)]
    ends = [at for _, _, at in opcodes[1:]] + [len(data)]
    return b"".join(
        put(arg) if name == "BINPUT" else data[at:end] for (name, arg, at), end in zip(opcodes, ends, strict=True)
    )


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def of_every_shape() -> dict[str, torch.Tensor]:
    shapes = [(), (0,), (3,), (255,), (256,), (70_000,), (2, 3), (2, 0, 3), (1, 2, 3), (2, 1, 2, 1), (1,) * 7]
    return {f"{index}.{shape}": torch.zeros(shape) for index in range(8) for shape in shapes}


def of_every_dtype() -> dict[str, torch.Tensor]:
    names = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    names += ["complex64", "complex128", "float8_e4m3fn", "uint16"]
    return {f"{index}.{name}": torch.zeros(2, dtype=getattr(torch, name)) for index in range(6) for name in names}


def views() -> dict[str, torch.Tensor]:
    base = torch.arange(1000.0).reshape(10, 100)
    return {f"{index}.{name}": view for index in range(FIRST) for name, view in {
        "row": base[index % 10], "column": base[:, index], "turned": base.T, "wide": base[:1].expand(5, 100),
        "real": torch.zeros(2), "conj": torch.zeros(2, dtype=torch.complex64).conj(),
    }.items()}  # fmt: skip


def tied() -> dict[str, torch.Tensor]:
    tensors = state_dict(2 * FIRST)
    return tensors | {f"{key}.again": tensor for key, tensor in tensors.items()} | {
        f"{key}.view": tensor[1:] for key, tensor in tensors.items()
    }  # fmt: skip


def optimizer() -> dict[str, Any]:
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(20)])
    adam = torch.optim.Adam(layers.parameters())
    sum(layer(torch.zeros(1, 2)).sum() for layer in layers).backward()
    adam.step()
    return {"model": layers.state_dict(), "optimizer": adam.state_dict(), "epoch": 3}


def module() -> torch.nn.Module:
    return torch.nn.Sequential(*[torch.nn.BatchNorm1d(2) for _ in range(FIRST)])


FILES: dict[str, tuple[Callable[[], Any], int]] = {
    "a state dict": (state_dict, 6),
    "more than one group": (lambda: state_dict(2500), 2460),
    "shapes": (of_every_shape, 40),
    "dtypes": (of_every_dtype, 30),
    "views": (views, 0),
    "ties": (tied, 30),
    "an optimizer": (optimizer, 40),
    "buffers": (lambda: module().state_dict(), 100),
    "gradients": (lambda: {key: tensor.requires_grad_() for key, tensor in state_dict().items()}, 6),
    "a module": (module, 0),
    "parameters": (lambda: dict(module().named_parameters()), 0),
    "a list": (lambda: list(state_dict().values()), 0),
    "odd keys": (lambda: {f"ключ.rr((hh{index}\n" + "x" * index: torch.zeros(1) for index in range(300)}, 200),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_torch(both: Shortcut, name: str) -> None:
    make, rows = FILES[name]
    both.compare(pickled(make()))
    assert both.rows >= rows


def test_files_of_a_gpu(both: Shortcut, monkeypatch: pytest.MonkeyPatch) -> None:
    """The location is a new text for every tensor there."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "".join(["cuda:", "0"]))
    data = pickled(state_dict())
    assert data.count(b"cuda:0") == FIRST + 7
    both.compare(data)
    assert both.rows > 5


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_five_tensors(both: Shortcut, bit: int) -> None:
    data = short_pickle()
    for position in range(data.index(b"layers.1"), len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        both.compare(bytes(flipped))
    assert both.rows


def test_every_cut(both: Shortcut) -> None:
    data = short_pickle()
    for end in range(data.index(b"layers.1"), len(data)):
        both.compare(data[:end])
    assert both.rows


@pytest.mark.parametrize("seed", range(3))
def test_spliced_pieces(both: Shortcut, seed: int) -> None:
    """Copy pieces of the rows elsewhere, within them: whole opcodes, halves of them, indices that are taken."""
    data = short_pickle()
    start = data.index(b"layers.1")
    chance = random.Random(seed)
    for _ in range(500):
        source, target = (chance.randrange(start, len(data) - 12) for _ in range(2))
        size, room = chance.choice([(1, 1), (2, 2), (4, 4), (5, 5), (2, 0), (5, 0), (0, 2), (0, 5), (5, 2), (2, 5)])
        both.compare(data[:target] + data[source : source + size] + data[target + room :])
    assert both.rows


WORD, KIND, PLACE, CALL, HOOKS = 3, 4, 6, 2, 10  # where torch's pickler remembers them


def edited(old: bytes, new: bytes) -> bytes:
    """Change what is found once in the rows that the shortcut reads."""
    data = short_pickle()
    start = data.index(b"layers.1")
    assert data[start:].count(old) >= 1, old
    return data[:start] + data[start:].replace(old, new, 1)


def index_of(key: bytes) -> int:
    """Give the memo index of a text of the pickle."""
    data = short_pickle()
    at = data.index(key) + len(key)
    assert data[at] == ord("r")
    return int.from_bytes(data[at + 1 : at + 5], "little")


CRAFTED: dict[str, Callable[[], bytes]] = {
    "an index that is taken": lambda: edited(put(index_of(b"3.weight") + 1), put(WORD)),
    "the called name is taken": lambda: edited(put(index_of(b"3.weight") + 1), put(CALL)),
    "an index twice": lambda: edited(put(index_of(b"3.weight") + 1), put(index_of(b"3.weight"))),
    "a high index": lambda: edited(put(index_of(b"3.weight") + 1), put(2**32 - 1)),
    "a row asks for what it puts": lambda: edited(b"h\x06K\x06t", get(index_of(b"3.weight") - 6) + b"K\x06t"),
    "a row asks for its own name": lambda: edited(b"h\x06K\x06t", get(index_of(b"3.weight") - 7) + b"K\x06t"),
    "nothing is there": lambda: edited(b"h\x06K\x06t", get(999_999) + b"K\x06t"),
    "long references": lambda: edited(b"h\x03h\x04X", get(WORD) + get(KIND) + b"X"),
    "another word": lambda: edited(b"h\x03h\x04X", b"h\x06h\x04X"),
    "another kind": lambda: edited(b"h\x03h\x04X", b"h\x03h\x02X"),
    "another place": lambda: edited(b"h\x06K\x06t", b"h\x04K\x06t"),
    "other hooks": lambda: edited(b"h\x0a)R", b"h\x02)R"),
    "hooks that are none": lambda: edited(b"h\x0a)R", b"h\x06)R"),
    "another call": lambda: edited(b"h\x02((h\x03h\x04X\x01\0\0\0004", b"h\x0a((h\x03h\x04X\x01\0\0\0004"),
    "a negative count": lambda: edited(b"h\x06K\x06t", b"h\x06J\xff\xff\xff\xfft"),
    "a negative offset": lambda: edited(b"QK\0K\x02", b"QJ\xff\xff\xff\xffK\x02"),
    "a negative size": lambda: edited(b"QK\0K\x02K\x03", b"QK\0J\xff\xff\xff\xffK\x03"),
    "a view beyond the storage": lambda: edited(b"QK\0K\x02K\x03", b"QK\x01K\x02K\x03"),
    "more sizes than strides": lambda: edited(b"K\x02K\x03\x86", b"K\x02K\x03K\x01\x87"),
    "65 sizes": lambda: edited(b"K\x02K\x03\x86", b"(" + b"K\x01" * 65 + b"t"),
    "no sizes, remembered": lambda: edited(b"K\x02K\x03\x86", b")"),
    "a long text": lambda: edited(b"X\x01\0\0\0003r", b"X\x05\0\0\0003rabcr"),
    "a key that is not UTF-8": lambda: edited(b"layers.3", b"layer\xff.3"),
    "half a character in a key": lambda: edited(b"layers.3.we", b"lay\xed\xa0\x80.3.we"),
    "a key twice": lambda: edited(b"layers.3", b"layers.4"),
    "a storage twice, differently": lambda: edited(b"X\x01\0\0\0003r", b"X\x01\0\0\0004r"),
    "inside a frame": lambda: edited(
        b"X\x16\0\0\0module.layers.2", b"\x95" + struct.pack("<Q", 180) + b"X\x16\0\0\0module.layers.2"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_rows(both: Shortcut, name: str) -> None:
    """The rows before and after the odd one may be read either way."""
    both.compare(CRAFTED[name]())


@pytest.mark.parametrize("index", [WORD, KIND, PLACE, CALL, HOOKS])
def test_names_that_are_overwritten_before(both: Shortcut, index: int) -> None:
    both.compare(edited(b"X\x16\0\0\0module.layers.4", b"K\x01" + put(index) + b"0X\x16\0\0\0module.layers.4"))


TEXT = b"X\x01\0\0\0z"
AFTERWARDS: dict[str, Callable[[int], bytes]] = {
    "asked for": lambda index: TEXT + get(index),
    "asked for twice": lambda index: TEXT + get(index) + get(index + 1) + get(index),
    "counted": lambda index: TEXT + b"\x94" + get(index),
    "overwritten": lambda index: TEXT + put(index) + get(index),
    "overwritten, and its neighbour asked for": lambda index: TEXT + put(index) + get(index + 1),
}


@pytest.mark.parametrize("name", AFTERWARDS)
def test_what_the_rows_remember(both: Shortcut, name: str) -> None:
    """Nearly always nobody asks for it, so it is made when somebody does."""
    data = short_pickle()
    for index in range(index_of(b"1.weight"), index_of(b"5.weight") + 9):
        both.compare(data[:-2] + AFTERWARDS[name](index) + b"u.")
    assert both.rows


THIRD = index_of(b"3.weight")


@pytest.mark.parametrize("between", [b"", b"0", b"NN", b"NN" + put(THIRD), get(THIRD) * 2])
def test_the_same_rows_again(both: Shortcut, between: bytes) -> None:
    """Their indices are taken then, by values that may not have been asked for."""
    data = short_pickle()
    rows = data[data.index(b"X\x16\0\0\0module.layers.1") : -2]
    renumbered = b"".join(
        put(1000 + int.from_bytes(piece[1:5], "little")) + piece[5:] if number else piece
        for number, piece in enumerate(split_puts(rows))
    )
    both.compare(data[:-2] + between + rows + between + renumbered + between + rows + b"u.")
    assert both.rows or not between  # all in one run, whose indices do not follow one another


def split_puts(rows: bytes) -> list[bytes]:
    """Cut before every PUT."""
    starts = [at for opcode, _, at in pickletools.genops(rows + b"t.") if opcode.name == "LONG_BINPUT"]
    return [rows[start:end] for start, end in zip([0, *starts], [*starts, len(rows)], strict=True)]


def test_without_a_container(both: Shortcut) -> None:
    both.compare(pickled(state_dict()), has_storages=False)


@pytest.mark.parametrize("opcodes", [900, 1000, 1001, 60_000, 62_000, 63_000])
def test_the_limit_of_opcodes_counts_them_all(both: Shortcut, monkeypatch: pytest.MonkeyPatch, opcodes: int) -> None:
    """Where exactly a long pickle is refused depends on when the machine looks; whether it is does not."""
    data = pickled(state_dict(2500))
    executed = run(data, Storages())[3]
    monkeypatch.setattr(limits, "BATCH", 500)
    monkeypatch.setattr(limits, "OPCODES", opcodes)
    refused = opcodes < executed
    for read in (shortcut.read_tensors, lambda machine, position: None):
        monkeypatch.setattr(shortcut, "read_tensors", read)
        machine = Machine(data, 0, Reading("data.pkl", GlobalLog(), len(data)), Storages().load)
        if not refused:
            assert machine.execute().end == len(data)
            continue
        with pytest.raises(Malformed, match="instructions"):
            machine.execute()


def test_memory_is_looked_at_between_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickled(state_dict(2500))
    monkeypatch.setattr(limits, "BATCH", 10_000)
    monkeypatch.setattr(limits, "OBJECTS", 20_000)
    with pytest.raises(UnreadableCheckpoint, match="objects") as caught:
        read_pickle(data, label="data.pkl", load_storage=Storages().load, log=GlobalLog())
    assert int(str(caught.value).rpartition("(byte ")[2].partition(")")[0]) < len(data) // 2
