"""Show one state dict of a checkpoint under clean names: what the Python API calls an opened checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any

from ckptool.errors import PlanRefused
from ckptool.formats import open_checkpoint
from ckptool.layouts import plan_keys, read_training, select
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.places import as_path
from ckptool.model.plans import KeyOptions, KeyPlan, Note, Selection, StateDict
from ckptool.model.values import OpaqueTensor, TensorSpec
from ckptool.operations.plain import to_plain
from ckptool.operations.ranks import other_ranks_text


@dataclass(frozen=True, eq=False)
class OpenedCheckpoint:
    """Look at one state dict of an open checkpoint; no tensor is read and nothing in the file is run.

    ``weights`` and ``keys`` say which one and under which names, as the options of the command line do.
    """

    checkpoint: Checkpoint
    weights: str = "main"
    keys: KeyOptions = field(default_factory=KeyOptions)

    def select(
        self,
        weights: str = "main",
        *,
        select: str | None = None,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
        keep_prefixes: bool = False,
    ) -> OpenedCheckpoint:
        """Look at other weights (``main``, ``ema``, ``raw`` or a path), or at some of the tensors only.

        ``select`` keeps a subtree of the keys, ``include`` and ``exclude`` are globs over clean names,
        ``keep_prefixes`` leaves all names as they are in the file. The file stays the same, and open.
        """
        keys = KeyOptions(select=select, include=include, exclude=exclude, keep_prefixes=keep_prefixes)
        return OpenedCheckpoint(self.checkpoint, weights, keys)

    @property
    def tensors(self) -> Mapping[str, TensorSpec | OpaqueTensor]:
        """Give the tensors by clean name, in file order.

        :raises PlanRefused: which weights are meant, or what their clean names are, is open.
        """
        found = self.state_dict.tensors
        return {target: found[source] for source, target in self.plan.kept.items() if source in found}

    @cached_property
    def hyper_parameters(self) -> Mapping[str, Any]:
        """Give what the training was configured with, as plain values; a foreign object is a mapping of its fields."""
        found: Mapping[str, Any] = to_plain(read_training(self.checkpoint, self.selection).hyper_parameters)
        return found

    @cached_property
    def selection(self) -> Selection:
        """List the state dicts of the file and the one that is meant."""
        return select(self.checkpoint, self.weights)

    @cached_property
    def state_dict(self) -> StateDict:
        """Give the state dict that is meant.

        :raises PlanRefused: there is none, or several are equal.
        """
        return _chosen_state_dict(self.checkpoint, self.selection)

    @cached_property
    def plan(self) -> KeyPlan:
        """Say what each key becomes.

        :raises PlanRefused: the evidence does not settle it.
        """
        return self.plan_for(self.keys)

    def plan_for(self, keys: KeyOptions) -> KeyPlan:
        """Say what each key becomes under other options.

        :raises PlanRefused: they do not settle it.
        """
        state_dict = self.state_dict
        try:
            return plan_keys(state_dict, self.selection.producer, keys)
        except PlanRefused as refusal:
            path = self.checkpoint.path
            where = other_ranks_text(path, self.state_dict.entries.values()) if refusal.code == "sharded" else ""
            raise PlanRefused(refusal.code, f"{path}: {refusal}{where}") from refusal

    def close(self) -> None:
        """Release the file; tensors that were loaded from it stay valid."""
        self.checkpoint.close()

    def __enter__(self) -> OpenedCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_path(path: str | os.PathLike[str]) -> OpenedCheckpoint:
    """Open a checkpoint as data: names, shapes and dtypes, no tensor read. Close it, or use it in a ``with``.

    The path may be an address (``https://``, ``s3://``, ``gs://``, ``hf://ORG/MODEL[@REVISION]/FILE``).

    :raises CkptoolError: it cannot be read.
    """
    return OpenedCheckpoint(open_checkpoint(as_path(path)))


def _chosen_state_dict(checkpoint: Checkpoint, selection: Selection) -> StateDict:
    """Give the state dict that is meant.

    :raises PlanRefused: there is none, or several are equal.
    """
    if selection.chosen is not None:
        return selection.chosen
    refusal = selection.refusal or Note("no-weights", "no state dict in this file")
    raise PlanRefused(refusal.code, f"{checkpoint.path}: {refusal.text}")
