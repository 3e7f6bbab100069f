"""What verify is asked for, and what it found: checks with evidence, and one verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ckptool.model.checks import BY_ID
from ckptool.model.loading import LoadReport
from ckptool.model.plans import KeyOptions

CheckStatus = Literal["pass", "warn", "fail", "skip", "inconclusive"]
Verdict = Literal["pass", "fail", "inconclusive", "error"]
Task = Literal["classification", "multilabel", "regression", "language", "embedding", "segmentation", "detection"]


@dataclass(frozen=True, slots=True)
class Check:
    """State one thing that was looked at: a stable ``id``, what came out, one sentence, the numbers behind it.

    ``message`` says what was seen, then the likely cause; ``advice`` is the next command or option, empty where nothing
    is to be done. ``allowed`` is the reason for which a finding is accepted; it counts for no verdict then.
    """

    id: str
    status: CheckStatus
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""
    allowed: str = ""

    @property
    def code(self) -> str:
        """Give the number of this check (``CK401``)."""
        return BY_ID[self.id].code


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Hold every number that a verdict depends on; each is named in the report and can be set.

    ``mutual_information`` is normalised (0 to 1): below it, predictions do not tell inputs apart. ``share`` is that of
    the most frequent class. ``dependence`` is the input-dependent share of the logits' energy: below it the output is
    constant; below ``collapsed_dependence`` one class for everything needs no other proof. ``untrained_warn`` and
    ``untrained_fail`` are shares of the parameters that look never trained.
    ``cosine`` is the mean over pairs of vectors, ``vector_dependence`` their input dependence: more, or less, is one
    vector for everything. ``relative_range`` is that of the answers: below it they are constant. ``echo`` is the share
    of next tokens that repeat the last one. ``least_inputs`` is the number of inputs from which on a verdict is given.
    ``error_...`` is the largest relative error of outputs against those of ``--against``, ``top_1_...`` the least share
    of predictions that are equal or nearly tied, by the dtype that the weights were rounded to; ``..._elsewhere`` is
    for answers recorded on another device or with another torch.
    """

    mutual_information: float = 0.05
    share: float = 0.95
    dependence: float = 1e-6
    collapsed_dependence: float = 0.01
    flat_confidence: float = 3.0
    untrained_warn: float = 0.02
    untrained_fail: float = 0.20
    least_inputs: int = 32
    coverage: float = 1.0
    relative_range: float = 1e-5
    cosine: float = 0.9
    vector_dependence: float = 0.1
    echo: float = 0.95
    cross_entropy_fail: float = 0.9
    cross_entropy_warn: float = 0.7
    norm_outlier: float = 8.0
    error_float32: float = 1e-5
    error_float16: float = 2e-2
    error_bfloat16: float = 0.15
    error_float8: float = 0.5
    error_elsewhere: float = 1e-2
    top_1_float32: float = 0.99
    top_1_float16: float = 0.99
    top_1_bfloat16: float = 0.97
    top_1_float8: float = 0.8
    top_1_elsewhere: float = 0.99


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """Say what to verify against; each field is the command line's option of that name.

    ``num_samples`` None means all of what is labelled, and 48 inputs otherwise.
    """

    weights: str = "main"
    keys: KeyOptions = field(default_factory=KeyOptions)
    model: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    app_dir: Path | None = None
    trust_code: bool = False
    as_is: bool = False
    images: Path | None = None
    inputs: Path | None = None
    data: Path | None = None
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    batch_size: int = 16
    num_samples: int | None = None
    class_names: Path | None = None
    targets: Path | None = None
    tokenizer: Path | None = None
    task: Task | None = None
    expect_range: tuple[float, float] | None = None
    seed: int = 0
    against: Path | None = None
    manifest: Path | None = None
    save_golden: Path | None = None
    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()
    min_accuracy: float | None = None
    checks: tuple[str, ...] = ()
    skip_checks: tuple[str, ...] = ()
    device: str = "auto"
    bench: bool = False
    plot: Path | None = None
    top: int = 0
    thresholds: Thresholds = field(default_factory=Thresholds)


@dataclass(frozen=True, slots=True)
class Predictions:
    """Sum up what the model answered.

    ``inputs`` says how many and of what kind (``in-domain``, ``sample photos``, ``synthetic``); ``histogram`` counts
    predicted classes; ``statistics`` are the numbers that the verdict looked at, by name. ``top`` lists, for each input
    asked for, its name and (class, name, probability) from the likeliest on.
    """

    task: Task
    inputs: int
    kind: str
    classes: int | None
    histogram: Mapping[int, int] = field(default_factory=dict)
    statistics: Mapping[str, float | None] = field(default_factory=dict)
    top: tuple[tuple[str, tuple[tuple[int, str, float], ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Set the predictions of several checkpoints of one model for the same inputs beside each other.

    ``rows`` has, for each input, its name and a (class, probability) for each of ``paths``. ``agreements`` are, for
    each of them, the numbers of its agreement with the first, by name (``top_1_agreement``, ``relative_error``,
    ``mean_kl``, ``min_cosine``); None is undefined.
    """

    paths: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[int, float], ...]], ...]
    agreements: tuple[Mapping[str, float | None], ...]


@dataclass(frozen=True, slots=True)
class Verification:
    """Answer for one checkpoint: the checks, what loaded, what was predicted, measured and timed.

    ``metrics`` and ``speed`` carry the names that trainers' test scripts use; an undefined metric is None.
    ``suggestion`` is the ``--model`` option that the checkpoint itself suggests, where none was given. ``notes`` say
    what was taken for granted. ``error`` says why there is no answer, where the verdict is ``error``.
    """

    path: str
    verdict: Verdict
    checks: tuple[Check, ...]
    model: str | None = None
    device: str | None = None
    load: LoadReport | None = None
    predictions: Predictions | None = None
    metrics: Mapping[str, float | None] | None = None
    speed: Mapping[str, Any] | None = None
    suggestion: str | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)


def verdict_of(checks: tuple[Check, ...]) -> Verdict:
    """Conclude from the checks: fail outweighs inconclusive, inconclusive pass; what warns or is allowed passes."""
    statuses = {check.status for check in checks if not check.allowed}
    if "fail" in statuses:
        return "fail"
    return "inconclusive" if "inconclusive" in statuses else "pass"
