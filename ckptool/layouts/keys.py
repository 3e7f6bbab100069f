"""What the keys of a state dict become: wrappers off, the network's own names left, nothing dropped unlisted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from operator import ne

from ckptool.errors import PlanRefused
from ckptool.layouts.distributed import holds_opaque, is_shard, share_text
from ckptool.layouts.draft import Draft
from ckptool.layouts.explicit_names import apply_explicit_names, filter_names
from ckptool.layouts.reference import follow_reference
from ckptool.layouts.roots import strip_roots, take_side_keys
from ckptool.layouts.segments import (
    FLAT_LEAVES,
    PRIVATE_SEGMENTS,
    Names,
    quoted,
    removable_segments,
    without,
)
from ckptool.model.plans import KeyMove, KeyOptions, KeyPlan, KeyRule, Producer, StateDict
from ckptool.model.rows import make_rows

DEFAULT_OPTIONS = KeyOptions()


def plan_keys(state_dict: StateDict, producer: Producer, options: KeyOptions = DEFAULT_OPTIONS) -> KeyPlan:
    """Say what every key of a state dict becomes.

    :raises PlanRefused: the evidence does not settle it; the message names the option that would.
    """
    mapping = options.mapping or {}
    draft = Draft(state_dict, producer.container, {key: key for key in state_dict.entries})
    _refuse_bad_names(Names([key for key in draft.names if key not in mapping]) if mapping else draft.listing)
    _refuse_shards(draft, keep_prefixes=options.keep_prefixes)
    _clean_names(draft, options)
    _note_idle_keep(draft, options.keep)
    filter_names(draft, options)
    apply_explicit_names(draft, options)
    _refuse_collisions(draft)
    return finish(draft)


def _clean_names(draft: Draft, options: KeyOptions) -> None:
    """Bring the names to clean ones: by the user's word, by the reference, or by the evidence, in that order."""
    if options.keep_prefixes or all(key in (options.mapping or {}) for key in draft.names):
        _keep_names(draft, options)
    elif options.reference is not None:
        _select_subtree(draft, options.select, options.keep, strip=False)
        follow_reference(draft, options.reference, options.keep)
    elif options.prefix is not None:
        _strip_prefix(draft, options.prefix, options.keep)
    else:
        _clean_by_evidence(draft, options)


def _note_idle_keep(draft: Draft, keep: Iterable[str]) -> None:
    """Say which protected segments no key has: a typing error would strip what was meant to stay."""
    idle = [segment for segment in keep if not any(f".{segment}." in f".{key}" for key in draft.entries)]
    if idle:
        draft.note("keep-unmatched", f"no key has the segment {quoted(idle)} of --keep")


def _keep_names(draft: Draft, options: KeyOptions) -> None:
    """Leave all names as they are.

    :raises PlanRefused: a prefix is to be stripped as well.
    """
    if options.prefix is not None:
        raise PlanRefused("bad-map", "--prefix and --keep-prefixes contradict each other: give one of them")
    _select_subtree(draft, options.select, options.keep, strip=False)
    draft.certainty = "explicit"


def _clean_by_evidence(draft: Draft, options: KeyOptions) -> None:
    """Remove private segments, then either keep the subtree asked for or look at the roots."""
    _remove_private_segments(draft, options.keep)
    if options.select is not None:
        _select_subtree(draft, options.select, options.keep, strip=True)
    elif not draft.state_dict.is_clean:
        strip_roots(draft, options.keep)


def _refuse_bad_names(keys: Names) -> None:
    """Refuse empty names and names with an empty segment.

    :raises PlanRefused: there is one.
    """
    text = keys.text
    if ".." in text or "\n." in text or ".\n" in text or "\n\n" in text:
        bad = [key for key in keys if not all(key.split("."))]
        if bad:
            raise PlanRefused("bad-key", f"{quoted(bad)}: a name with an empty segment; give it another with --map")


def _refuse_shards(draft: Draft, *, keep_prefixes: bool) -> None:
    """Refuse what holds one rank's part only: flattened parameters, sharded tensors, parts of a DTensor.

    :raises PlanRefused: there is one.
    """
    if not keep_prefixes and "flat_param" in draft.listing.text:
        flat = [key for key in draft.names if key.rpartition(".")[2] in FLAT_LEAVES]
        if flat:
            raise PlanRefused(
                "flat-param",
                f"{quoted(flat)}: FSDP flattened whole modules into one buffer, their names are not in the file; save "
                "a full state dict (FULL_STATE_DICT)",
            )
    shards = [key for key, value in draft.entries.items() if is_shard(value)] if holds_opaque(draft.entries) else []
    if shards:
        share = share_text(draft.entries[shards[0]]) or "the rest is in those of the other ranks"
        raise PlanRefused(
            "sharded",
            f"{quoted(shards)}: only one rank's shard is in this file ({share}); save a full state dict, or convert "
            "the folder with torch.distributed.checkpoint.format_utils",
        )


def _remove_private_segments(draft: Draft, keep: Iterable[str]) -> None:
    """Take the private names of frameworks out of every key, at any depth."""
    draft.rule = KeyRule(removed=removable_segments(keep))
    listing = draft.listing
    # A pair, or a segment below a removed one, only shows once the others are gone: removal sees them all.
    present = listing.private_segments(keep)
    cleaned = listing.without(present) if present else listing
    changed = sum(map(ne, listing, cleaned))
    counts = {present[0]: changed} if len(present) == 1 else {name: listing.count_holding(name) for name in present}
    draft.rename(cleaned)
    for segment, count in counts.items():
        if count:
            draft.found(PRIVATE_SEGMENTS[segment], segment, count, "certain")
    if changed:
        found = quoted([wrapper.segment for wrapper in draft.wrappers], 8)
        draft.note("wrapper-segments", f"{found} removed from {changed} of {len(cleaned)} keys")


def _select_subtree(draft: Draft, select: str | None, keep: Iterable[str], *, strip: bool) -> None:
    """Keep the keys below a path, written as in the file or without the private segments.

    :raises PlanRefused: there are none.
    """
    if select is None:
        return
    draft.certainty = "explicit"
    segments = removable_segments(keep)
    path = without(f"{select.rstrip('.')}.*", segments).removesuffix("*").rstrip(".")
    listing = draft.listing.without(segments)
    names = dict(zip(draft.names, listing, strict=True))
    full_path = _locate(listing, path)
    if full_path is None:
        groups = quoted(draft.roots, 8)
        raise PlanRefused("not-found", f'no key lies below "{select}": --select takes one of {groups}, or a path below')
    front = f"{full_path}."
    draft.drop([source for source, name in names.items() if not name.startswith(front)], f"outside --select {select}")
    if strip:
        draft.strip(full_path)
        draft.rule = replace(draft.rule, leading=tuple(full_path.split(".")))
        take_side_keys(draft, keep)
        if draft.shared_root == "module":
            draft.note("still-module", f'"module." is still on every key: --select {full_path}.module takes it off')


def _locate(names: Names, path: str) -> str | None:
    """Find a path in the names, also below first segments that all of them share (which a listing does not show)."""
    above = ""
    while names:
        if path and names.any_below(path):
            return above + path
        root = names.shared_root
        if root is None:
            return None
        above += f"{root}."
        names = names.cut(root)
    return None


def _strip_prefix(draft: Draft, prefix: str, keep: Iterable[str]) -> None:
    """Take off a prefix that every key must have, and private segments with it.

    :raises PlanRefused: some keys do not have it.
    """
    path = prefix.rstrip(".")
    front = path
    if draft.outside(path):
        _remove_private_segments(draft, keep)
        take_side_keys(draft, keep)
        _refuse_partial_prefix(draft, path)
        draft.strip(path)
    else:  # as written, private segments included
        draft.strip(path)
        _remove_private_segments(draft, keep)
        front = without(f"{path}.*", removable_segments(keep)).removesuffix("*").rstrip(".")
    draft.certainty = "explicit"
    draft.found("prefix", path, len(draft.names), "explicit")
    draft.rule = replace(draft.rule, leading=tuple(front.split(".")) if front else ())


def _refuse_partial_prefix(draft: Draft, path: str) -> None:
    """Refuse a prefix that only some keys have.

    :raises PlanRefused: a key does not have it.
    """
    outside, total = draft.outside(path), len(draft.names)
    if len(outside) == total:
        groups = quoted(draft.roots, 8)
        raise PlanRefused("not-found", f'no key lies below "{path}": --prefix takes one of {groups}, or a path below')
    if outside:
        raise PlanRefused(
            "partial-prefix",
            f'only {total - len(outside)} of {total} keys start with "{path}.", not {quoted(outside)}: '
            f"--select {path} would drop the others",
        )


def _refuse_collisions(draft: Draft) -> None:
    """Refuse where two keys would get one name.

    :raises PlanRefused: there are such keys.
    """
    if len(set(draft.names.values())) == len(draft.names):
        return
    by_target: dict[str, list[str]] = {}
    for source, name in draft.names.items():
        by_target.setdefault(name, []).append(source)
    met = [f"{' and '.join(sources[:4])} -> {name}" for name, sources in by_target.items() if len(sources) > 1]
    raise PlanRefused(
        "collision",
        f"{quoted(met)}: two keys would get one name; protect a segment with --keep, choose with --select, "
        "or use --map",
    )


def finish(draft: Draft) -> KeyPlan:
    """Make the plan: one move for every entry, in file order."""
    names, dropped = draft.names, draft.dropped
    moves = (
        [KeyMove(key, names.get(key), dropped.get(key, "")) for key in draft.entries]
        if dropped
        else make_rows(KeyMove, names, names.values(), [""] * len(names))
    )
    return KeyPlan(
        moves=tuple(moves),
        certainty=draft.certainty,
        wrappers=tuple(draft.wrappers),
        notes=tuple(draft.notes),
        is_ema=draft.is_ema or draft.state_dict.role == "ema",
        rule=draft.rule,
    )
