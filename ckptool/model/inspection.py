"""What inspect found: one frozen value per checkpoint, ready for every report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ckptool.model.checkpoint import Shard
from ckptool.model.plans import Certainty, KeyMove, KeyOptions, Note, Producer, Wrapper
from ckptool.model.training import Training
from ckptool.model.values import GlobalUse

if TYPE_CHECKING:  # few read the values
    from ckptool.model.results import TensorStatistics

Verdict = Literal["clean", "unknown", "dangerous"]
MatchKind = Literal["exact", "head", "nearest", "structure"]
SortOrder = Literal["file", "name", "size", "dtype", "shape"]


@dataclass(frozen=True, slots=True)
class InspectOptions:
    """Say what to look at.

    ``weights`` names the state dict, ``keys`` the clean names. ``architecture`` asks what network it is; ``tensors``
    and ``tree`` ask for the lists, ``statistics`` for a read of every value; ``include`` and ``exclude`` are globs over
    clean names for these three.
    """

    weights: str = "main"
    keys: KeyOptions = field(default_factory=KeyOptions)
    architecture: bool = True
    tensors: bool = False
    tree: bool = False
    statistics: bool = False
    sort: SortOrder = "file"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def lists_tensors(self) -> bool:
        """Tell whether the tensors are listed: statistics are shown in that list."""
        return self.tensors or self.statistics


@dataclass(frozen=True, slots=True)
class DiskUse:
    """Split the file by content, in bytes; where nothing is compressed the five add up to the file.

    A storage counts once, for the first group that shows it. ``hidden`` counts the storage bytes that no tensor of
    the file shows (at least: views that overlap in steps are taken as disjoint). ``other`` is the rest: further
    tensors, values, the container itself.
    """

    weights: int
    ema: int
    optimizer: int
    other: int
    hidden: int


@dataclass(frozen=True, slots=True)
class DTypeShare:
    """Count what one element type holds: tensors, elements and dense bytes."""

    dtype: str
    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StateDictSummary:
    """Describe one state dict.

    ``path`` joins the steps with dots (empty: the file itself). ``tensors`` counts names; ``parameters`` counts
    elements as ``sum(p.numel() for p in model.parameters())`` does: a tied tensor once, well-known buffers
    (running statistics, counters, position ids) not; ``elements`` counts every element under every name.
    ``nbytes`` is the dense size in bytes, a tied tensor once.
    """

    path: str
    role: str
    selected: bool
    reason: str
    tensors: int
    parameters: int
    elements: int
    nbytes: int
    dtypes: tuple[DTypeShare, ...]


@dataclass(frozen=True, slots=True)
class KeySummary:
    """Say what the keys of the selected state dict are and would become.

    ``already_clean`` is None where no plan could be made; ``refusal`` then says why. ``examples`` are the first
    keys that change, one for each way of changing; ``renamed`` counts them all; ``dropped`` lists what would go.
    """

    already_clean: bool | None
    certainty: Certainty | None = None
    wrappers: tuple[Wrapper, ...] = ()
    renamed: int = 0
    examples: tuple[KeyMove, ...] = ()
    dropped: tuple[KeyMove, ...] = ()
    refusal: Note | None = None


@dataclass(frozen=True, slots=True)
class Safety:
    """Judge what the pickle names, not what it holds: ``dangerous`` if anything in it could run a command."""

    verdict: Verdict
    globals: tuple[GlobalUse, ...]


class PartRow(NamedTuple):
    """List one dense part of a tensor that is no dense array; ``nbytes`` is its size as stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class TensorRow(NamedTuple):
    """List one tensor: clean name (None: dropped from clean output) and name in the file, dense size in bytes.

    A named tuple, because 50,000 of them have to cost next to nothing.
    """

    key: str | None
    source_key: str
    dtype: str
    shape: tuple[int, ...] | None
    nbytes: int
    statistics: TensorStatistics | None = None


@dataclass(frozen=True, slots=True)
class SpecialTensor:
    """Describe one tensor that is no dense array; ``key`` is its clean name (None: dropped from clean output).

    ``kind`` and ``detail`` are those of ``OpaqueTensor``; ``facts`` are plain values by name: ``stored``, ``density``
    (stored elements by all), ``block``, ``coalesced``, ``index_dtype`` of a sparse tensor; ``scale``, ``zero_point``,
    or ``axis``, ``channels``, of a quantized one; ``tensors`` of a nested one; ``rank``, ``ranks``, ``placements``,
    ``local_shapes`` of a distributed one. ``nbytes`` and ``parts`` are what is stored.
    """

    key: str | None
    source_key: str
    kind: str
    detail: str
    dtype: str | None
    shape: tuple[int, ...] | None
    nbytes: int
    facts: Mapping[str, Any]
    parts: tuple[PartRow, ...]


@dataclass(frozen=True, slots=True)
class ModuleNode:
    """Fold the tensors below one module; ``repeats`` equal siblings in a row are one node (``layer1.[0-2]``).

    ``elements`` and ``nbytes`` (dense bytes) count all the repeats. ``dtype`` and ``shape`` are those of a tensor that
    ends here; without one, ``dtype`` is empty.
    """

    name: str
    repeats: int
    tensors: int
    elements: int
    nbytes: int
    dtype: str = ""
    shape: tuple[int, ...] | None = None
    children: tuple[ModuleNode, ...] = ()


class Layer(NamedTuple):
    """Name one layer by its weight: what kind its shape suggests, and how many channels go in and out."""

    name: str
    kind: str
    inputs: int
    outputs: int
    shape: tuple[int, ...]


class Stage(NamedTuple):
    """Describe one stack of alike blocks.

    ``blocks`` counts them, ``kind`` is empty where they are of no known kind, ``width`` is how many channels the last
    one puts out, ``heads`` how many attention heads it has.
    """

    name: str
    blocks: int
    kind: str
    width: int | None
    heads: int | None


@dataclass(frozen=True, slots=True)
class Structure:
    """Say how a network is built; None where its names and shapes do not tell.

    ``kind`` is that of most blocks, or ``MLP`` or ``CNN`` of a network of plain layers; ``depth`` counts the blocks of
    all stages, or those layers. ``width`` and ``heads`` are those that all transformer blocks have. ``positions`` are
    the entries of an image model's table of positions, ``grid`` the patches along an edge of the image where they make
    up a square; ``context`` is how many tokens of text have a position. ``lora_rank`` is the rank of the adapters.
    """

    kind: str | None = None
    stages: tuple[Stage, ...] = ()
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    patch_size: tuple[int, ...] | None = None
    positions: int | None = None
    grid: int | None = None
    context: int | None = None
    lora_rank: int | None = None


@dataclass(frozen=True, slots=True)
class ArchitectureMatch:
    """Name the published architecture that a network is or is close to.

    ``kind`` says what agrees: every name and shape; all but the head and the stem; most of them; or only the names of
    the modules (``name`` is None then). ``score`` is the share of the tensors of both that agree, 0 to 1.
    ``alternatives`` agree as well, or, of the nearest, a little less. ``differences`` are phrases.
    """

    kind: MatchKind
    name: str | None
    family: str | None
    score: float
    alternatives: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Architecture:
    """Say what names and shapes alone tell about the network; None and empty mean that they do not tell.

    ``layers`` counts weights by the kind that their shape suggests. ``widths`` are the distinct output channels
    before the last layer, in order of appearance. ``classes`` are the outputs of a final layer with a classifier's
    name, ``vocabulary`` the entries of a language model's head or table of tokens.
    """

    layers: Mapping[str, int]
    first: Layer | None
    last: Layer | None
    widths: tuple[int, ...]
    input_channels: int | None
    classes: int | None
    vocabulary: int | None
    blocks: tuple[ModuleNode, ...]
    structure: Structure = field(default_factory=Structure)
    match: ArchitectureMatch | None = None


@dataclass(frozen=True, slots=True)
class NextStep:
    """Suggest one command, ready for a POSIX shell (bash where a name needs escapes), and say why."""

    command: str
    reason: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """Hold everything inspect says about one file.

    ``hyper_parameters`` are plain values (mappings, lists, text, numbers); a foreign object is a mapping of its
    fields with its class under ``$class``. ``ties`` are groups of clean names that share the very same tensor.
    ``tensors`` and ``tree`` are None unless asked for. ``shards`` are the files of a checkpoint in several.
    ``not_dense`` are the tensors that are no dense arrays, each with what it holds.
    """

    path: str
    format: str
    file_bytes: int
    facts: Mapping[str, str]
    metadata: Mapping[str, str]
    producer: Producer
    disk: DiskUse
    state_dicts: tuple[StateDictSummary, ...]
    keys: KeySummary
    training: Training
    hyper_parameters: Any
    ties: tuple[tuple[str, ...], ...]
    safety: Safety
    architecture: Architecture | None
    notes: tuple[Note, ...]
    next: NextStep
    tensors: tuple[TensorRow, ...] | None = None
    tree: ModuleNode | None = field(default=None)
    shards: tuple[Shard, ...] = ()
    not_dense: tuple[SpecialTensor, ...] = ()

    @property
    def selected(self) -> StateDictSummary | None:
        """Give the state dict that is meant, or None where there is none or several are equal."""
        return next((summary for summary in self.state_dicts if summary.selected), None)
