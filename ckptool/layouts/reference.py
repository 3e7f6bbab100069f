"""Which one rule leads from the names in a file to the names of a reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckptool.errors import PlanRefused
from ckptool.layouts.draft import Draft
from ckptool.layouts.rename import clean_name
from ckptool.layouts.segments import (
    PRIVATE_SEGMENTS,
    Names,
    first_segments,
    quoted,
    removable_segments,
    without_inner,
)
from ckptool.layouts.segments import without as without_segments
from ckptool.model.plans import KeyRule
from ckptool.model.values import OpaqueTensor, TensorSpec

Shape = tuple[int, ...] | None
Reference = Mapping[str, Shape]

COUNTER = "num_batches_tracked"
DEEPEST_PREFIX = 3  # segments: deeper ones are parts of the network, not wrappers around it
LEFT_OVER = "not among the names of the reference"  # why a key is dropped
RULES_TRIED = 8  # per way of cleaning: those with the most matching names


@dataclass(frozen=True, slots=True)
class Trial:
    """Say how well one rule does: names matched with equal shape, keys left over, segments taken out or put in."""

    rule: KeyRule
    targets: dict[str, str]
    extras: int
    cost: int

    @property
    def score(self) -> tuple[int, int, int]:
        """Order trials: the higher the better."""
        return len(self.targets), -self.extras, -self.cost


def follow_reference(draft: Draft, reference: Reference, keep: Iterable[str] = ()) -> None:
    """Bring the names to those of the reference by one global rule; what it does not know is dropped, listed.

    :raises PlanRefused: two rules do equally well, or none reaches every name.
    """
    reference = _expected(draft, reference)
    best = _best_trial(draft, reference, "", frozenset(keep))
    front = _shared_front(reference)
    if front and len(best.targets) < len(reference):
        best = max(best, _best_trial(draft, reference, front, frozenset(keep)), key=lambda trial: trial.score)
    if len(best.targets) < len(reference):
        raise PlanRefused("ref-missing", _missing_message(best, reference))
    extras = [source for source in draft.names if source not in best.targets]
    draft.drop(extras, LEFT_OVER)
    _record_wrappers(draft, best.rule)
    draft.names = {source: best.targets[source] for source in draft.names}
    draft.rule, draft.certainty = best.rule, "reference"
    if best.rule.removed or not Names(draft.names).private_segments():
        draft.rule = replace(best.rule, removed=removable_segments(keep))
    draft.note("by-reference", f"{describe(best.rule)} matches all {len(reference)} names of the reference")


def _expected(draft: Draft, reference: Reference) -> Reference:
    """Leave the counters of batch norm out where the file is too old to have any (PyTorch before 0.4.1)."""
    if any(name.endswith(COUNTER) for name in draft.names):
        return reference
    return {name: shape for name, shape in reference.items() if not name.endswith(COUNTER)}


def _record_wrappers(draft: Draft, rule: KeyRule) -> None:
    """Name the wrappers that the rule takes off."""
    for segment in (*rule.removed, *rule.inner):
        count = sum(f".{segment}." in f".{name}" for name in draft.names.values())
        if count:
            draft.found(PRIVATE_SEGMENTS.get(segment, "DataParallel/DDP"), segment, count, "reference")
    for segment in rule.leading:
        draft.found("prefix", segment, len(draft.names), "reference")


def _best_trial(draft: Draft, reference: Reference, prepended: str, keep: frozenset[str]) -> Trial:
    """Find the rule that does best, among those that put this text before every name.

    :raises PlanRefused: two rules with different outcomes do equally well.
    """
    shapes = {source: shape_of(draft.entries[source]) for source in draft.names}
    best = Trial(KeyRule(), {}, len(shapes), 0)
    equals: list[Trial] = []
    for rule, votes in rules(list(draft.names), reference, prepended, keep):
        if votes < len(best.targets):
            break  # a rule reaches at most as many names as voted for it
        trial = _try_rule(rule, shapes, reference)
        if len(set(trial.targets.values())) < len(trial.targets) or trial.score < best.score:
            continue
        equals = [*equals, trial] if trial.score == best.score else [trial]
        best = equals[0]
    rivals = [trial for trial in equals if trial.targets != best.targets]
    if rivals and len(best.targets) == len(reference):
        raise PlanRefused("ref-tie", _tie_message([best, *rivals]))
    return best


def shape_of(value: Any) -> Shape:
    """Give the shape of a tensor, None of anything else."""
    return value.shape if isinstance(value, TensorSpec | OpaqueTensor) else None


def rules(keys: list[str], reference: Reference, prepended: str, keep: frozenset[str]) -> list[tuple[KeyRule, int]]:
    """List the global rules that could lead to the reference, with how many names each may reach, most first.

    They are few, and each is simple enough to be said in a sentence.
    """
    private = Names(keys).private_segments(keep)
    inners: list[tuple[str, ...]] = [(), ("module",)] if _has_inner(keys, "module", keep) else [()]
    found = [
        voted
        for removed in dict.fromkeys([(), private])
        for inner in inners
        for voted in _rules_by_prefix(KeyRule(removed, (), inner, prepended), keys, reference)
    ]
    return sorted(found, key=lambda voted: -voted[1])


def _has_inner(keys: list[str], segment: str, keep: frozenset[str]) -> bool:
    return segment not in keep and any(f".{segment}." in key for key in keys)


def _shared_front(reference: Reference) -> str:
    """Give the path that all reference names lie below, at most ``DEEPEST_PREFIX`` deep, with its dot."""
    names, front = Names(reference), ""
    for _ in range(DEEPEST_PREFIX):
        root = names.shared_root
        if root is None:
            break
        front += f"{root}."
        names = names.cut(root)
    return front


def _rules_by_prefix(rule: KeyRule, keys: list[str], reference: Reference) -> list[tuple[KeyRule, int]]:
    """Count which prefixes, taken off, leave a name of the reference, and give the most frequent ones."""
    votes: Counter[str] = Counter()
    for key in keys:
        name, start = without_segments(key, rule.removed) if rule.removed else key, 0
        for _ in range(DEEPEST_PREFIX + 1):
            tail = without_inner(name[start:], rule.inner) if rule.inner else name[start:]
            if rule.prepended + tail in reference:
                votes[name[:start]] += 1
            start = name.find(".", start) + 1
            if not start:
                break
    return [
        (KeyRule(rule.removed, tuple(front.split(".")[:-1]), rule.inner, rule.prepended), count)
        for front, count in votes.most_common(RULES_TRIED)
    ]


def _try_rule(rule: KeyRule, shapes: Mapping[str, Shape], reference: Reference) -> Trial:
    """Apply one rule to every key and count what it reaches."""
    targets: dict[str, str] = {}
    for source, shape in shapes.items():
        name = clean_name(rule, source)
        if name is not None and name in reference and fits(shape, reference[name]):
            targets[source] = name
    cost = len(rule.removed) + len(rule.leading) + len(rule.inner) + rule.prepended.count(".")
    return Trial(rule, targets, len(shapes) - len(targets), cost)


def fits(shape: Shape, wanted: Shape) -> bool:
    """Tell whether two shapes agree, as far as both are known."""
    return shape is None or wanted is None or tuple(shape) == tuple(wanted)


def describe(rule: KeyRule) -> str:
    """Say a rule in words."""
    parts = [
        f"removing {quoted(rule.removed)}" if rule.removed else "",
        f'stripping "{".".join(rule.leading)}."' if rule.leading else "",
        f"removing inner {quoted(rule.inner)}" if rule.inner else "",
        f'adding "{rule.prepended}"' if rule.prepended else "",
    ]
    return " and ".join(part for part in parts if part) or "leaving the names as they are"


def _missing_message(best: Trial, reference: Reference) -> str:
    reached = set(best.targets.values())
    missing = [name for name in reference if name not in reached]
    return (
        f"{quoted(missing)}: in the reference, not in this state dict; the closest rule ({describe(best.rule)}) "
        f"matches {len(reached)} of {len(reference)} names and shapes: give the reference of the same model"
    )


def _tie_message(trials: list[Trial]) -> str:
    fronts = first_segments(".".join(trial.rule.leading) or "." for trial in trials)
    ways = " or ".join(dict.fromkeys(describe(trial.rule) for trial in trials))
    return f"{ways}: each matches the reference equally well; choose with --select {' or '.join(fronts)}"
