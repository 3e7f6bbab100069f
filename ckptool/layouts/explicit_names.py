"""What the user asks of the clean names: to keep some, to drop some, to call some otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from ckptool.errors import PlanRefused
from ckptool.layouts.draft import Draft
from ckptool.layouts.rename import renamed
from ckptool.layouts.segments import any_glob, quoted
from ckptool.model.plans import KeyOptions


def filter_names(draft: Draft, options: KeyOptions) -> None:
    """Keep what ``--include`` asks for and drop what ``--exclude`` names, by clean name.

    :raises PlanRefused: nothing is included.
    """
    if options.include:
        wanted = any_glob(options.include)
        draft.drop([key for key, name in draft.names.items() if not wanted(name)], "not in --include")
        if not draft.names:
            raise PlanRefused("not-found", f"no clean name matches --include {quoted(options.include)}: see --tensors")
    if options.exclude:
        unwanted = any_glob(options.exclude)
        gone = [key for key, name in draft.names.items() if unwanted(name)]
        draft.drop(gone, f"--exclude {' '.join(options.exclude)}")
        if not gone:
            draft.note("exclude-unmatched", f"no clean name matches --exclude {quoted(options.exclude)}")


def apply_explicit_names(draft: Draft, options: KeyOptions) -> None:
    """Rename as the user says: substitutions, then the map (by source key or clean name), then a prefix.

    :raises PlanRefused: a substitution or the map cannot be carried out.
    """
    if options.rename:
        _rename_all(draft, options.rename)
    if options.mapping:
        _refuse_unknown_names(draft, list(options.mapping))
        targets = {key: options.mapping.get(key, options.mapping.get(name, name)) for key, name in draft.names.items()}
        draft.drop([key for key, target in targets.items() if target is None], "--map says so")
        draft.names = {key: target for key, target in targets.items() if target is not None}
    added = f"{options.add_prefix.rstrip('.')}." if options.add_prefix else ""
    if added:
        draft.names = {key: added + name for key, name in draft.names.items()}
    draft.rule = replace(draft.rule, rename=options.rename, mapping=options.mapping or {}, added=added)
    if options.rename or options.mapping or added:
        _refuse_bad_targets(draft)


def _rename_all(draft: Draft, rename: tuple[tuple[str, str], ...]) -> None:
    """Apply the substitutions to all names, one after the other.

    :raises PlanRefused: a pattern or replacement is no regular expression.
    """
    idle = []
    for substitution in rename:
        try:
            names = {key: renamed(name, [substitution]) for key, name in draft.names.items()}
        except (re.error, IndexError, OverflowError, RecursionError) as error:
            text = f"--rename {_written(rename)} is no regular expression ({error}): correct it"
            raise PlanRefused("bad-map", text) from error
        if names == draft.names:
            idle.append(substitution)
        draft.names = names
    if idle:
        draft.note("rename-unmatched", f"no clean name is changed by --rename {_written(idle)}")


def _written(rename: Iterable[tuple[str, str]]) -> str:
    return quoted([f"s/{pattern}/{replacement}/" for pattern, replacement in rename])


def _refuse_unknown_names(draft: Draft, names: list[str]) -> None:
    """Refuse a map that names keys which are not there.

    :raises PlanRefused: there is one.
    """
    known = {*draft.entries, *draft.names.values()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise PlanRefused("bad-map", f"--map names {quoted(unknown)}, which the state dict does not hold: correct it")


def _refuse_bad_targets(draft: Draft) -> None:
    """Refuse explicit names that are empty or have an empty segment.

    :raises PlanRefused: there is one.
    """
    bad = [f"{key} -> {name}" for key, name in draft.names.items() if not all(name.split("."))]
    if bad:
        raise PlanRefused(
            "bad-map", f"{quoted(bad)}: the name would have an empty segment; correct --rename, --map or --add-prefix"
        )
