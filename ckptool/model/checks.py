"""Every check that verify makes: its stable number and name, what it asks, and what to do about a finding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckKind:
    """Name one check: ``code`` (``CK401``) and ``id`` (``values.finite``) stay what they are in every version.

    ``asks`` is what it finds out, ``remedy`` what helps where it does not pass.
    """

    code: str
    id: str
    asks: str
    remedy: str

    @property
    def group(self) -> str:
        """Give the part of the id before its dot."""
        return self.id.partition(".")[0]


CHECKS = (
    CheckKind(
        "CK101", "integrity",
        "Every byte is what was written, as far as the file can prove it.",
        "Get the file again, and compare its checksum with the one at its source.",
    ),
    CheckKind(
        "CK102", "manifest",
        "The file is the one that a manifest describes.",
        "Take the file that was published with the manifest, or write a new manifest with ckptool convert --manifest.",
    ),
    CheckKind(
        "CK201", "safety",
        "Nothing in the file can run code when it is loaded.",
        "Load it with weights_only=True, or convert it to safetensors with ckptool convert.",
    ),
    CheckKind(
        "CK301", "keys",
        "The keys are those of the model itself, without the prefixes of training wrappers.",
        "Clean them with ckptool strip-prefixes.",
    ),
    CheckKind(
        "CK401", "values.finite",
        "No weight is NaN or infinite.",
        "Take an earlier checkpoint.",
    ),
    CheckKind(
        "CK402", "values.dead",
        "No weight matrix is all zero or constant where training leaves none so.",
        "Take an earlier checkpoint, or look for what was initialised and never loaded.",
    ),
    CheckKind(
        "CK403", "values.batchnorm",
        "Running statistics of batch normalisation are positive, finite and were updated.",
        "Save the whole state_dict() after training, buffers included.",
    ),
    CheckKind(
        "CK404", "values.outliers",
        "No weight is far larger than its neighbours of the same kind.",
        "Look at the values with ckptool inspect --stats.",
    ),
    CheckKind(
        "CK405", "values.duplicates",
        "No two trained tensors hold the same values by accident.",
        "Look for a layer that was loaded twice; tied weights are expected.",
    ),
    CheckKind(
        "CK406", "values.untrained",
        "The weights do not look freshly initialised.",
        "Load the checkpoint into the model before it is saved.",
    ),
    CheckKind(
        "CK501", "load.coverage",
        "Every parameter and buffer of the model is filled from the file, and nothing is left over.",
        "Strip prefixes, name the right model with --model, or permit names with --allow-missing and "
        "--allow-unexpected.",
    ),
    CheckKind(
        "CK502", "load.meta",
        "Every tensor of the model has memory after loading.",
        "Build the model on a real device.",
    ),
    CheckKind(
        "CK601", "output.finite",
        "The model answers with finite numbers.",
        "Look for overflow of the dtype, and for weights that are not finite.",
    ),
    CheckKind(
        "CK602", "output.constant",
        "The answers depend on the input.",
        "Look for weights that were not loaded; give inputs of your own with --images or --inputs.",
    ),
    CheckKind(
        "CK603", "output.diverse",
        "The model tells inputs apart: it has not collapsed to one answer.",
        "Look at load.coverage first; give inputs of your own with --images or --inputs.",
    ),
    CheckKind(
        "CK604", "output.determinism",
        "Two runs over the same inputs give the same answers.",
        "Look for layers that are random outside of training.",
    ),
    CheckKind(
        "CK605", "output.batch",
        "An input alone gets the answer that it gets in a batch.",
        "Look for layers that are still in training mode.",
    ),
    CheckKind(
        "CK701", "agreement.tensors",
        "The tensors are those of the checkpoint that --against names.",
        "Compare the two with ckptool diff.",
    ),
    CheckKind(
        "CK702", "agreement.outputs",
        "The answers are those of the checkpoint that --against names.",
        "Look at agreement.tensors for the tensors that differ.",
    ),
    CheckKind(
        "CK801", "accuracy",
        "The answers match the labels that were given.",
        "Check the order of the classes, and the preparation of the inputs.",
    ),
    CheckKind(
        "CK901", "speed",
        "The time that an answer takes was measured.",
        "Nothing: it is information.",
    ),
)  # fmt: skip
CHECK_IDS = tuple(kind.id for kind in CHECKS)
BY_ID = {kind.id: kind for kind in CHECKS}


def matching_checks(name: str) -> tuple[str, ...]:
    """Give the ids that a name stands for: an id, the part before its dot, a number, or the start of one (``CK4``)."""
    return tuple(
        kind.id
        for kind in CHECKS
        if name in (kind.id, kind.group) or (name.startswith("CK") and len(name) > 2 and kind.code.startswith(name))
    )
