"""What the judge of a task looks at, and the sentences that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ckptool.model.loading import LoadReport
from ckptool.model.verification import Check, CheckStatus, Task, VerifyOptions
from ckptool.verification.outputs import Inputs, Outputs
from ckptool.verification.suspects import name_suspects

ID = "output.diverse"
IN_DOMAIN = "in-domain"
LOAD_ADVICE = "see load.coverage and keys: what was loaded, and the command that brings the rest"

_KINDS = {
    IN_DOMAIN: "in-domain inputs",
    "sample photos": "sample images",
    "sample text": "sample texts",
    "synthetic": "synthetic inputs",
}
_MORE_INPUTS = {
    "image": "confirm with --images DIR (at least {least} of your own images)",
    "tokens": "confirm with --tokenizer DIR (text instead of random tokens), or --inputs FILE",
}
_OTHER_INPUTS = "confirm with --inputs FILE (at least {least} of your own inputs)"


@dataclass(frozen=True, slots=True)
class Background:
    """Hold what is known of a model besides its answers; nothing of it has to be.

    ``make`` builds a fresh model under a seed, ``load`` says what came out of the file, ``untrained`` is the share of
    the file's parameters that look never trained.
    """

    make: Callable[[int], nn.Module] | None = None
    load: LoadReport | None = None
    untrained: float | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """Hold the numbers of one task: ``statistics`` by name; where there are classes, how often each was predicted."""

    statistics: Mapping[str, float]
    classes: int | None = None
    histogram: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FreshCopies:
    """Hold what freshly initialised copies of the model measure; ``alike`` is None where there is nothing to compare.

    ``reason`` says why there is nothing.
    """

    alike: bool | None
    statistics: tuple[Mapping[str, float], ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """Hold all that a verdict on the answers depends on; ``fresh`` builds and runs the copies when first asked."""

    task: Task
    model: nn.Module
    inputs: Inputs
    outputs: Outputs
    options: VerifyOptions
    background: Background
    causal: bool
    fresh: Callable[[], FreshCopies]

    @property
    def in_domain(self) -> bool:
        """Tell whether the inputs are the user's own."""
        return self.inputs.kind == IN_DOMAIN

    @property
    def fed(self) -> str:
        """Say how many inputs of what kind there were: ``48 synthetic inputs``."""
        return f"{self.inputs.count} {_KINDS.get(self.inputs.kind, 'inputs')}"

    @property
    def advice(self) -> str:
        """Say which inputs would settle it."""
        text = _MORE_INPUTS.get(self.inputs.modality, _OTHER_INPUTS)
        return text.format(least=self.options.thresholds.least_inputs)


def conclude(case: Case, status: CheckStatus, message: str, evidence: Mapping[str, Any], advice: str = "") -> Check:
    """Give the check of a task, with the task and the kind of the inputs among its evidence."""
    return Check(ID, status, message, {"task": case.task, "inputs": case.inputs.kind, **evidence}, advice)


def conclude_told_apart(
    case: Case, numbers: Mapping[str, Any], seen: str, *, told_apart: bool, unusual: str = "", unsettled: CheckStatus
) -> Check:
    """Decide by one question: told apart, else untrained where something speaks for that, else ``unsettled``.

    ``seen`` says what was answered; ``unusual`` goes on with what is odd about it.
    """
    few = too_few(case)
    if few:
        return conclude(case, "inconclusive", f"{few}: {seen}.", numbers, case.advice)
    if told_apart:
        return conclude(case, "pass", f"{seen}.", numbers)
    reasons = corroborations(case)
    if reasons:
        return conclude(case, "fail", f"{seen}{unusual}: {join_words(reasons)}.", numbers, LOAD_ADVICE)
    return conclude(case, unsettled, f"{seen}{unusual}.{exonerations(case)}", numbers, case.advice)


def too_few(case: Case) -> str | None:
    """Say that there are not enough inputs for a verdict."""
    least = case.options.thresholds.least_inputs
    if case.inputs.count >= least:
        return None
    return f"{case.inputs.count} inputs are too few to tell ({least} are needed)"


def corroborations(case: Case) -> list[str]:
    """Say what else speaks for weights that were never loaded or trained, most direct evidence first."""
    known = [_say_missing(case), _say_untrained(case)]
    copies = case.fresh()
    if copies.alike:
        known.append(f"{len(copies.statistics)} freshly initialised copies answer just like it")
    return [reason for reason in known if reason]


def _say_missing(case: Case) -> str | None:
    load = case.background.load
    if load is None or 1 - load.coverage < case.options.thresholds.untrained_warn:
        return None
    loaded = len(load.matched) + len(load.tied)
    total = loaded + len(load.defaulted) + len(load.missing) + len(load.mismatched)
    if not loaded:
        return f"none of the model's {total} tensors was loaded"
    return f"only {loaded} of the model's {total} tensors ({percent(load.coverage)} of its elements) were loaded"


def _say_untrained(case: Case) -> str | None:
    share = case.background.untrained
    if share is None or share < case.options.thresholds.untrained_warn:
        return None
    return f"{percent(share)} of the parameters look never trained"


def causes(case: Case, otherwise: str) -> str:
    """Say what in the weights looks like the cause, or what it is ``otherwise`` likely to be."""
    return join_words(name_suspects(case.model)) or otherwise


def exonerations(case: Case) -> str:
    """Say what speaks for the weights: that all were loaded, that none looks untrained, that fresh copies differ."""
    load, untrained = case.background.load, case.background.untrained
    warn = case.options.thresholds.untrained_warn
    known = [
        f"all {len(load.matched) + len(load.tied)} tensors were loaded" if load and load.coverage >= 1 else "",
        "none of the weights looks untrained" if untrained is not None and untrained < warn else "",
        "freshly initialised copies answer differently" if case.fresh().alike is False else "",
    ]
    said = join_words([each for each in known if each])
    return f" {said[0].upper()}{said[1:]}." if said else ""


def join_words(words: list[str]) -> str:
    """Join with commas and one "and"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def name_class(case: Case, index: int) -> str:
    """Name a class as a person would: ``class 3 (cat)``."""
    names = case.inputs.class_names
    name = names[index] if names and index < len(names) else str(index)
    return f"class {index}" if name == str(index) else f"class {index} ({name})"


def percent(share: float) -> str:
    """Show a share: ``97 %``."""
    return f"{share * 100:.3g} %"
