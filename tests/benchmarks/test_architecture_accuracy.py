"""How often the right architecture is named, over the whole index. ``pytest -m benchmark -s tests/benchmarks/...``.

Counted are: the names that are among the answers (twins are answers together), the families that are right, and the
answers that are of the kind to be expected. Changed are what people change: classes and input channels, a dropout
before the head, one more prefix; the last blocks cut off; and, of transformers, the number of layers.
"""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.test_cost import CKPTOOL, rival, show
from test_architectures import Pairs, changed_at_the_ends, found_in, names_in, saved, tensors_of

from ckptool.operations.architectures.index import Entry, load_index

pytestmark = pytest.mark.benchmark

FEWEST = 8
CHANGES: dict[str, Callable[[Pairs, random.Random], Pairs]] = {
    "as it is": lambda pairs, _: pairs,
    "sorted by name": lambda pairs, _: sorted(pairs),
    "head and stem changed": changed_at_the_ends,
    "last fifth cut off": lambda pairs, _: pairs[: len(pairs) * 4 // 5],
}


def trees() -> Iterator[tuple[Entry, set[str], Pairs]]:
    """Give each distinct tree of the index once: an entry, the names of all entries, the tensors."""
    index = load_index()
    names: dict[int, set[str]] = defaultdict(set)
    for entry in index.entries:
        names[entry.root].add(entry.full_name)
    for root, entry in {entry.root: entry for entry in index.entries if entry.tensors >= FEWEST}.items():
        yield entry, names[root], list(index.tensors(root))


@pytest.mark.parametrize("change", CHANGES)
def test_accuracy_over_the_index(change: str) -> None:
    chance, counts, seconds = random.Random(0), defaultdict(Counter[str]), 0.0
    for entry, names, pairs in trees():
        changed = CHANGES[change](pairs, chance)
        start = time.perf_counter()
        match = found_in(changed)
        seconds += time.perf_counter() - start
        count = counts[entry.zoo]
        count["all"] += 1
        count["named"] += bool(names & set(names_in(match)))
        count["first"] += match is not None and match.name in names
        count["family"] += match is not None and match.family == entry.family
        count[match.kind if match else "none"] += 1
    for zoo, count in counts.items():
        shares = ", ".join(f"{name} {number / count['all']:.1%}" for name, number in count.items() if name != "all")
        print(f"\n{change}: {zoo}, {count['all']} trees: {shares}")
    total = sum(count["all"] for count in counts.values())
    print(f"{change}: {seconds / total * 1000:.1f} ms each")
    least = {"as it is": 1.0, "sorted by name": 1.0, "head and stem changed": 0.95, "last fifth cut off": 0.7}[change]
    assert sum(count["named"] for count in counts.values()) >= least * total


def smaller(config: Any) -> Any:
    """Halve the number of layers, as far as a configuration has that."""
    for name in ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"):
        with suppress(AttributeError, TypeError, ValueError):
            setattr(config, name, max(getattr(config, name) // 2, 1))
    return config


def test_accuracy_over_transformers_of_other_depths() -> None:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    known = [entry for entry in load_index().entries if entry.zoo == "transformers" and entry.name.endswith("Model")]
    counts: Counter[str] = Counter()
    for entry in known:
        try:
            with torch.device("meta"):
                model = getattr(transformers, entry.name)(smaller(CONFIG_MAPPING[entry.family]()))
        except Exception:  # not every configuration can be halved
            continue
        match = found_in([(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()])
        counts["all"] += 1
        counts["named"] += entry.full_name in names_in(match)
        counts["family"] += match is not None and match.family == entry.family
        counts[match.kind if match else "none"] += 1
    shares = ", ".join(f"{name} {number / counts['all']:.1%}" for name, number in counts.items() if name != "all")
    print(f"\ntransformers of other depths: {counts['all']} models: {shares}")
    assert counts["named"] >= 0.8 * counts["all"]


LARGEST_COST = 1.5  # of inspect, beside inspect --no-architecture


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["timm:resnet50", "timm:vit_base_patch16_224", "transformers:LlamaForCausalLM"])
def test_cost_of_the_architecture(name: str, change: str, tmp_path: Path) -> None:
    path = saved(tmp_path, CHANGES[change](tensors_of(name), random.Random(0)))
    ours, theirs = rival((*CKPTOOL, "inspect", path), (*CKPTOOL, "inspect", path, "--no-architecture"), None, 7)
    what = f"inspect {name} {change}"
    assert show(what, "cpu", ours.cpu, theirs.cpu, LARGEST_COST, ours.anon) <= LARGEST_COST
