"""Models made on the spot, sound and damaged, and what the judge says of each of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_diabetes
from support.digits import EXAMPLES, training_script
from torch import Tensor, nn
from torch.nn import functional

from ckptool.errors import CkptoolError
from ckptool.model.loading import LoadReport
from ckptool.model.verification import Check, Predictions, Thresholds, VerifyOptions
from ckptool.verification import statistics
from ckptool.verification.judge import judge
from ckptool.verification.outputs import run_model
from ckptool.verification.tasks.case import Background

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"))


@dataclass
class Given:
    """Inputs as the judge is given them."""

    data: Tensor | dict[str, Tensor] | tuple[Tensor, ...]
    kind: str = "in-domain"
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    modality: str = "image"
    size: int = 16
    assumed_scale: bool = False

    @property
    def count(self) -> int:
        first = (
            self.data
            if isinstance(self.data, Tensor)
            else next(iter(self.data.values()))
            if isinstance(self.data, dict)
            else self.data[0]
        )
        return len(first)

    @property
    def names(self) -> list[str]:
        return [f"input {index}" for index in range(self.count)]

    def batches(self):
        for start in range(0, self.count, self.size):
            rows = slice(start, start + self.size)
            if isinstance(self.data, Tensor):
                yield self.data[rows]
            elif isinstance(self.data, dict):
                yield {name: each[rows] for name, each in self.data.items()}
            else:
                yield tuple(each[rows] for each in self.data)


@dataclass
class Judged:
    checks: dict[str, Check]
    predictions: Predictions

    def __getitem__(self, name: str) -> Check:
        return self.checks[f"output.{name}"]

    @property
    def statuses(self) -> dict[str, str]:
        return {name.removeprefix("output."): check.status for name, check in self.checks.items()}


def judged(model, inputs, device=CPU, make=None, load=None, untrained=None, **options) -> Judged:
    outputs = run_model(model, inputs, device)
    background = Background(make, load, untrained)
    checks, predictions = judge(model, inputs, outputs, VerifyOptions(**options), device, background)
    return Judged({check.id: check for check in checks}, predictions)


# The digits network: real weights, real images.


@pytest.fixture(scope="module")
def script():
    return training_script()


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    state = torch.load(EXAMPLES / "digits.ckpt", weights_only=True)["state_dict"]
    return {key.removeprefix("model._orig_mod."): value for key, value in state.items()}


@pytest.fixture(scope="module")
def digits(script) -> tuple[Tensor, Tensor]:
    images, labels = script.split_digits()[1].tensors
    return images[:48], labels[:48]


@pytest.fixture(scope="module")
def fresh(script):
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return script.DigitsNet()

    return make


@pytest.fixture(scope="module")
def net(fresh, weights):
    """Build the network with the given change made to its weights; None drops a tensor."""

    def build(change=lambda name, value: value) -> nn.Module:
        model = fresh(0)
        changed = {name: change(name, value.clone()) for name, value in weights.items()}
        model.load_state_dict({name: value for name, value in changed.items() if value is not None}, strict=False)
        return model

    return build


def synthetic(kind: str = "synthetic", count: int = 48) -> Given:
    return Given(torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)), kind)


def lose_statistics(name, value):
    return (
        torch.zeros_like(value)
        if "running_mean" in name
        else torch.ones_like(value)
        if "running_var" in name
        else value
    )


def spike(name, value):
    return value + 50 * torch.eye(10)[3] if name == "fc.bias" else value


def collapse(name, value):
    return value * (1e-2 if name == "fc.weight" else 1) + (torch.eye(10)[2] * 9 if name == "fc.bias" else 0)


def poison(name, value):
    return torch.full_like(value, math.nan) if name == "blocks.1.conv1.weight" else value


def sink(name, value):
    return -torch.ones_like(value) if name == "blocks.0.bn2.running_var" else value


def blank(name, value):
    return torch.zeros_like(value) if name == "fc.weight" else value


def lose_half(name, value):
    return value if hash_of(name) % 2 else None


def hash_of(name: str) -> int:
    return sum(name.encode())


def lose_all(_name, _value):
    return None


HEALTHY = {"finite": "pass", "constant": "pass", "diverse": "pass", "determinism": "pass", "batch": "pass"}
# name: (change, the check that fails on in-domain inputs, what its message names)
DAMAGES = {
    "collapsed head": (collapse, "diverse", "fc.bias is 9"),
    "bias spike": (spike, "diverse", "fc.bias is 50"),
    "NaN layer": (poison, "finite", "blocks.1.conv1 (Conv2d), whose weight holds NaN"),
    "negative variance": (sink, "finite", "blocks.0.bn2 (BatchNorm2d), whose running_var holds negative values"),
    "zero head": (blank, "constant", "fc.weight"),
    "BatchNorm statistics lost": (lose_statistics, "diverse", "5 of 5"),
    "half of the tensors": (lose_half, "diverse", "does not tell its inputs apart"),
    "nothing loaded": (lose_all, "diverse", "3 freshly initialised copies answer just like it"),
}


def test_the_real_network_passes_with_real_images(net, digits, fresh):
    found = judged(net(), Given(*digits[:1], labels=digits[1]), make=fresh)
    assert found.statuses == HEALTHY
    assert found.predictions.task == "classification"
    assert found.predictions.classes == 10
    assert sum(found.predictions.histogram.values()) == 48
    assert found.predictions.statistics["mutual_information"] > 0.8


@pytest.mark.parametrize("kind", ["in-domain", "synthetic"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_never_passed_and_fails_with_real_images(net, digits, fresh, name, kind):
    change, check, cause = DAMAGES[name]
    found = judged(net(change), Given(digits[0], kind), make=fresh)
    unsettled = kind == "synthetic" and check == "diverse" and change is not lose_all
    assert found[check].status == ("inconclusive" if unsettled else "fail")
    if kind == "in-domain":
        assert cause in found[check].message
    if unsettled:
        assert "--images" in found[check].advice
        assert "These inputs are not your data" in found[check].message


def test_half_precision_passes(net, digits, fresh):
    inputs = Given(digits[0].bfloat16())
    assert judged(net().bfloat16(), inputs, make=fresh).statuses == HEALTHY
    assert judged(net().half(), replace(inputs, data=digits[0].half()), make=fresh).statuses == HEALTHY


class IsItSeven(nn.Module):
    """A detector of a rare class, out of a network that knows ten."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        others = torch.cat((logits[:, :7], logits[:, 8:]), dim=1).logsumexp(dim=1)
        return torch.stack((others, logits[:, 7]), dim=1)


def test_a_detector_of_a_rare_class_does_not_fail(net, digits, fresh):
    make = lambda seed: IsItSeven(fresh(seed))  # noqa: E731
    model = IsItSeven(net())
    assert judged(model, Given(digits[0]), make=make)["diverse"].status == "pass"
    found = judged(model, synthetic(), make=make)["diverse"]
    assert found.status == "inconclusive"
    assert "freshly initialised copies answer differently" in found.message.lower()


def test_a_detector_that_sees_no_rare_input_is_settled_by_the_labels(net, script, fresh):
    images, labels = script.split_digits()[1].tensors
    chosen = images[labels != 7][:48]
    model = IsItSeven(net())
    unlabelled = judged(model, Given(chosen))["diverse"]
    assert (unlabelled.status, "inputs that are all of one kind" in unlabelled.message) == ("inconclusive", True)
    assert "--targets" in unlabelled.advice
    found = judged(model, Given(chosen, labels=torch.zeros(48, dtype=torch.int64)))["diverse"]
    assert (found.status, found.advice) == ("inconclusive", "give inputs of other classes too")


def test_labels_speak_for_a_model_of_a_vague_world():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 3, generator=generator)
    labels = (torch.rand(2000, generator=generator) < torch.sigmoid(0.4 * x[:, 0] - 1.5)).long()
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0, 0], [0.4, 0, 0]]))
        model.bias.copy_(torch.tensor([0.0, -1.5]))
    inputs = Given(x, labels=labels, modality="tabular", size=500)
    assert judged(model, inputs)["diverse"].status == "pass"
    assert judged(model, replace(inputs, labels=None))["diverse"].status == "inconclusive"
    with torch.no_grad():
        model.bias[1] = -9.0
    assert judged(model, inputs)["diverse"].status == "fail"


def test_labels_that_have_nothing_to_do_with_the_answers_settle_nothing(net, digits):
    shuffled = digits[1][torch.randperm(48, generator=torch.Generator().manual_seed(1))]
    found = judged(net(), Given(digits[0], labels=shuffled))["diverse"]
    assert found.status == "inconclusive"
    assert "labels" in found.message


def test_what_is_known_of_the_weights_turns_doubt_into_failure(net):
    inputs = synthetic()
    assert judged(net(spike), inputs)["diverse"].status == "inconclusive"
    found = judged(net(spike), inputs, untrained=0.28)["diverse"]
    assert (found.status, "28 % of the parameters look never trained" in found.message) == ("fail", True)
    load = LoadReport(Path("x"), "", "certain", ("a",), (), (), ("b", "c"), (), (), (), (), 0.4)
    found = judged(net(spike), inputs, load=load)["diverse"]
    assert (found.status, "only 1 of the model's 3 tensors (40 % of its elements)" in found.message) == ("fail", True)
    assert judged(net(spike), inputs, load=replace(load, coverage=1.0, missing=()))["diverse"].status == "inconclusive"


def test_a_sound_model_needs_no_fresh_copies_and_a_constructor_with_weights_gives_none(net, digits):
    built = []

    def make(seed):
        built.append(seed)
        return net()

    assert judged(net(), Given(digits[0]), make=make)["diverse"].status == "pass"
    assert built == []
    assert judged(net(spike), synthetic(), make=make)["diverse"].status == "inconclusive"
    assert len(built) == 2


def test_few_inputs_settle_nothing_and_the_number_is_an_option(net, digits):
    few = Given(digits[0][:12])
    found = judged(net(), few)["diverse"]
    assert (found.status, found.message[:29]) == ("inconclusive", "12 inputs are too few to tell")
    assert judged(net(), few, thresholds=Thresholds(least_inputs=12))["diverse"].status == "pass"


def test_the_same_image_again_and_again_is_no_collapse(net, digits):
    found = judged(net(), Given(digits[0][:1].expand(40, -1, -1, -1)))
    assert (found["constant"].status, found["diverse"].status) == ("inconclusive", "inconclusive")
    assert "fail" not in found.statuses.values()


def test_the_likeliest_classes_are_named_and_their_probabilities_sum_to_one(net, digits):
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    inputs = Given(digits[0], class_names=names)
    found = judged(net(), inputs, top=10).predictions.top
    wanted = net().eval()(digits[0]).softmax(dim=1)
    assert [name for name, _ in found] == inputs.names
    for (_, row), probabilities in zip(found, wanted, strict=True):
        assert [index for index, _, _ in row] == probabilities.argsort(descending=True).tolist()
        assert all(name == names[index] for index, name, _ in row)
        assert math.fsum(share for _, _, share in row) == pytest.approx(1)
    assert judged(net(), inputs).predictions.top == ()
    assert len(judged(net(), inputs, top=5).predictions.top[0][1]) == 5


class Answer(nn.Module):
    """Wrap a network, and answer in another form."""

    def __init__(self, network: nn.Module, form) -> None:
        super().__init__()
        self.network, self.form = network, form

    def forward(self, x: Tensor):
        return self.form(self.network(x))


def masked(logits):
    return torch.cat((torch.full_like(logits[:, :1], -math.inf), logits), dim=1)


FORMS = {
    "probabilities": lambda logits: logits.softmax(dim=1),
    "log-probabilities": lambda logits: logits.log_softmax(dim=1),
    "classes": lambda logits: logits.argmax(dim=1),
    "a mapping": lambda logits: {"features": logits * 0, "logits": logits, "loss": logits.sum(), "cache": (logits,)},
    "a tuple": lambda logits: (logits, [logits], None),
    "a masked class": masked,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_answer_is_judged_alike(net, digits, name):
    found = judged(Answer(net(), FORMS[name]), Given(digits[0]))
    assert found.predictions.task == "classification"
    assert found.statuses == HEALTHY
    broken = judged(Answer(net(spike), FORMS[name]), Given(digits[0]))
    assert "fail" in broken.statuses.values()


def test_a_mask_shifts_no_class(net, digits):
    plain, shifted = (judged(each, Given(digits[0])).predictions for each in (net(), Answer(net(), masked)))
    assert shifted.histogram == {index + 1: count for index, count in plain.histogram.items()}
    assert shifted.statistics["input_dependence"] == pytest.approx(plain.statistics["input_dependence"])


def test_saturated_probabilities_of_inputs_that_are_not_yours_prove_nothing(net, digits):
    certain = Answer(net(), lambda logits: (torch.tensor([40.0] + [0.0] * 9) + 0 * logits).softmax(dim=1))
    assert judged(certain, synthetic())["constant"].status == "inconclusive"
    assert judged(certain, Given(digits[0]))["constant"].status == "fail"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda logits: logits.sum(), "nothing in its answer is a tensor with a row for each input"),
        (lambda logits: "cat", "nothing in its answer is a tensor with a row for each input"),
        (lambda logits: logits[:, :, :, :, 0], "IndexError"),
        (lambda logits: logits[:, : len(logits)], "differ in shape between batches"),
    ],
)
def test_answers_that_cannot_be_judged_are_refused_in_one_sentence(net, digits, answer, message):
    with pytest.raises(CkptoolError, match=message) as caught:
        judged(Answer(net(), answer), Given(digits[0][:40], size=6))
    assert "\n" not in str(caught.value)


def test_a_task_that_does_not_fit_is_refused(net, digits):
    inputs = Given(digits[0])
    for task in ("language", "segmentation"):
        with pytest.raises(CkptoolError, match=f"--task {task}: does not fit answers of the shape"):
            judged(net(), inputs, task=task)
    assert judged(net(), inputs, task="regression").predictions.task == "regression"


def test_a_program_is_judged_and_its_culprit_not_guessed(net, digits):
    program, broken = (torch.jit.trace(net(change).eval(), digits[0][:2]) for change in (lambda _, v: v, poison))
    assert judged(program, Given(digits[0])).statuses == HEALTHY
    assert "cannot be told of a TorchScript program" in judged(broken, Given(digits[0]))["finite"].message
    exported = torch.export.export(net(poison).eval(), (digits[0][:16],)).module()
    found = judged(exported, Given(digits[0]))["finite"]
    assert (found.status, "holds NaN" in found.message) == ("fail", True)


def test_numbers_that_are_no_classes_are_counted_all_the_same(net, digits):
    codes = Answer(net(), lambda logits: logits.argmax(dim=1) * 1_000_003 - 5)
    found = judged(codes, Given(digits[0]), task="classification")
    assert found["diverse"].status == "pass"
    assert len(found.predictions.histogram) == 9


# Other tasks.


class Noisy(nn.Module):
    """Forget to switch dropout off."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(self.network(x), 0.2)


def test_random_answers_are_a_warning(net, digits):
    found = judged(Noisy(net()), Given(digits[0]))
    assert found.statuses == HEALTHY | {"determinism": "warn", "batch": "skip"}


def test_statistics_of_the_batch_are_a_warning(net, digits):
    model = net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    assert judged(model, Given(digits[0])).statuses == HEALTHY | {"batch": "warn"}


class Stubborn(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(True)


def test_a_module_that_refuses_eval_is_named_and_modes_are_put_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Stubborn(8), nn.Dropout(0.5), nn.Linear(8, 3))
    inputs = Given(torch.randn(48, 4), modality="tabular")
    found = judged(model, inputs)
    assert found["batch"].status == "warn"
    assert "1 stay in training mode" in found["batch"].message
    assert model.training
    assert model[2].training


@pytest.fixture(scope="module")
def diabetes() -> tuple[nn.Module, Tensor]:
    data = load_diabetes()
    x, y = (torch.tensor(each, dtype=torch.float32) for each in (data.data, data.target))
    weights = torch.linalg.lstsq(torch.cat((x, torch.ones(len(x), 1)), dim=1), y.unsqueeze(1)).solution
    model = nn.Linear(10, 1)
    with torch.no_grad():
        model.weight.copy_(weights[:-1].T)
        model.bias.copy_(weights[-1])
    return model, x[:64]


def seeded(build):
    def make(seed):
        torch.manual_seed(seed)
        return build()

    return make


def test_a_regression_passes_and_its_range_is_checked(diabetes):
    model, x = diabetes
    inputs = Given(x, modality="tabular")
    make = seeded(lambda: nn.Linear(10, 1))
    found = judged(model, inputs, make=make)
    assert (found.predictions.task, found.statuses) == ("regression", HEALTHY)
    assert judged(model, inputs, expect_range=(0, 400))["diverse"].status == "pass"
    assert judged(model, inputs, expect_range=(0, 1))["diverse"].status == "fail"
    assert judged(model, replace(inputs, kind="synthetic"), expect_range=(0, 1))["diverse"].status == "inconclusive"
    fresh = make(5)
    assert judged(fresh, inputs, make=make)["diverse"].status == "warn"
    assert judged(fresh, inputs, make=make, untrained=1.0)["diverse"].status == "fail"


def test_a_large_offset_is_no_constant(diabetes):
    model, x = diabetes
    prices = Answer(model, lambda values: values + 1_000_000)
    assert judged(prices, Given(x, modality="tabular"))["constant"].status == "pass"
    dead = Answer(model, lambda values: values * 0 + 152)
    assert judged(dead, Given(x, modality="tabular"))["constant"].status == "fail"


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.picture, self.table = nn.Linear(6, 1), nn.Linear(4, 1)

    def forward(self, picture: Tensor, table: Tensor, mask: Tensor | None = None) -> Tensor:
        answer = self.picture(picture) + self.table(table)
        return answer if mask is None else answer * mask


@pytest.mark.parametrize("named", [True, False])
def test_a_dead_modality_is_named(named):
    torch.manual_seed(0)
    rows = {"picture": torch.randn(40, 6), "table": torch.randn(40, 4), "mask": torch.ones(40, 1)}
    inputs = Given(rows if named else tuple(rows.values()), modality="multi")
    model = TwoInputs()
    assert judged(model, inputs).statuses == HEALTHY
    nn.init.zeros_(model.table.weight)
    found = judged(model, inputs)["constant"]
    assert (found.status, found.evidence["dead_inputs"]) == ("fail", ["table" if named else "1"])
    assert judged(model, replace(inputs, kind="synthetic"))["constant"].status == "inconclusive"


def test_embeddings(net, digits):
    def features(change=lambda name, value: value):
        model = net(change)
        model.fc = nn.Identity()
        return Answer(model, lambda values: functional.normalize(values - values.mean(dim=1, keepdim=True), dim=1))

    found = judged(features(), Given(digits[0]))
    assert (found.predictions.task, found.statuses) == ("embedding", HEALTHY)
    lost = features(lose_statistics)
    assert judged(lost, Given(digits[0]))["diverse"].status == "warn"
    assert judged(lost, synthetic())["diverse"].status == "inconclusive"
    assert judged(lost, Given(digits[0]), untrained=0.5)["diverse"].status == "fail"


def test_several_labels_for_each_input():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Sigmoid())
    inputs = Given(torch.randn(48, 5), modality="tabular")
    found = judged(model, inputs)
    assert (found.predictions.task, found.statuses) == ("multilabel", HEALTHY)
    with torch.no_grad():
        model[0].weight.mul_(2e-3)
    assert judged(model, inputs)["diverse"].status == "inconclusive"
    assert judged(model, inputs, untrained=0.5)["diverse"].status == "fail"


def test_pictures_of_classes_warn_at_most():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 3, padding=1)
    nn.init.normal_(model.weight, std=2)
    inputs = Given(torch.randn(40, 3, 12, 12))
    found = judged(model, inputs)
    assert (found.predictions.task, found.statuses) == ("segmentation", HEALTHY)
    with torch.no_grad():
        model.bias[2] += 60
    assert judged(model, inputs)["diverse"].status == "warn"
    assert judged(model, inputs, untrained=0.5)["diverse"].status == "fail"


class Detector(nn.Module):
    """Answer as torchvision's detectors do, with as many boxes as the picture is bright."""

    def __init__(self, boxes: bool) -> None:
        super().__init__()
        self.boxes = boxes

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        counts = [int(10 * image.mean()) if self.boxes else 0 for image in images]
        return [{"boxes": torch.rand(n, 4), "scores": torch.ones(n), "labels": torch.ones(n).long()} for n in counts]


def test_detections_are_finite_and_not_constant():
    inputs = Given(torch.rand(40, 1, 1, 1).expand(-1, 3, 8, 8))
    found = judged(Detector(True), inputs)
    assert found.predictions.task == "detection"
    assert (found["finite"].status, found["constant"].status, found["diverse"].status) == ("pass", "pass", "skip")
    assert judged(Detector(False), inputs)["constant"].status == "skip"


TEXT = "the cat sat on the mat and the dog lay in the hall while the rain fell on the roof of the old house. "
LETTERS = sorted(set(TEXT))


class Letters(nn.Module):
    """Predict the next letter from the three before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), 24)
        self.convolution = nn.Conv1d(24, 64, 3)
        self.head = nn.Linear(64, len(LETTERS))

    def forward(self, idx: Tensor) -> Tensor:
        x = functional.pad(self.embedding(idx).transpose(1, 2), (2, 0))
        return self.head(functional.gelu(self.convolution(x)).transpose(1, 2))


@pytest.fixture(scope="module")
def letters() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    ids = torch.tensor([LETTERS.index(letter) for letter in TEXT * 4])
    rows = ids.unfold(0, 24, 3)[:64]
    model = Letters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
    return model, rows[:48]


def test_a_language_model_is_judged_by_the_likelihood_of_text(letters):
    model, rows = letters
    inputs = Given({"idx": rows}, "sample text", modality="tokens")
    found = judged(model, inputs, make=seeded(Letters))
    assert (found.predictions.task, found.statuses) == ("language", HEALTHY)
    logits = model(rows).detach()
    kept = [round(step * 23 / 15) for step in range(15)]
    losses = functional.cross_entropy(logits[:, kept].flatten(0, 1), rows[:, [each + 1 for each in kept]].flatten())
    assert found.predictions.statistics["cross_entropy"] == pytest.approx(losses.item(), rel=1e-4)
    broken = judged(Letters(), inputs, make=seeded(Letters))["diverse"]
    assert (broken.status, "freshly initialised" in broken.message) == ("fail", True)


def test_a_model_that_repeats_the_last_token_fails(letters):
    _, rows = letters

    class Echo(nn.Module):
        def forward(self, idx: Tensor) -> Tensor:
            return functional.one_hot(idx, len(LETTERS)).float() * 2

    found = judged(Echo(), Given(rows, "sample text", modality="tokens"))["diverse"]
    assert (found.status, found.evidence["echo"]) == ("fail", 1.0)


def test_random_tokens_only_show_collapse(letters):
    model, rows = letters
    random = torch.randint(len(LETTERS), rows.shape, generator=torch.Generator().manual_seed(0))
    inputs = Given(random, "synthetic", modality="tokens")
    assert judged(model, inputs, make=seeded(Letters))["diverse"].status == "pass"
    assert judged(Letters(), inputs, make=seeded(Letters))["diverse"].status == "fail"
    with torch.no_grad():
        silent = Letters()
        silent.head.weight.mul_(1e-3)
    found = judged(silent, inputs)["diverse"]
    assert (found.status, "--tokenizer" in found.advice) == ("inconclusive", True)


def test_a_transformer_of_transformers_is_a_language_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    make = seeded(lambda: transformers.GPT2LMHeadModel(config))
    ids = torch.randint(60, (40, 20), generator=torch.Generator().manual_seed(0))
    inputs = Given({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "synthetic", modality="tokens")
    found = judged(make(0), inputs, make=make)
    assert found.predictions.task == "language"
    assert found.statuses == HEALTHY | {"diverse": "fail"}
    with torch.no_grad():
        broken = make(0)
        broken.transformer.h[1].mlp.c_fc.bias[3] = math.nan
    assert "transformer.h.1.mlp.c_fc (Conv1D), whose bias holds NaN" in judged(broken, inputs)["finite"].message


@pytest.mark.parametrize("device", [CUDA])
def test_the_verdicts_are_the_same_on_a_gpu(net, digits, fresh, device):
    where = torch.device(device)
    for change in (lambda name, value: value, spike, poison):
        here, there = (judged(net(change).to(each), Given(digits[0]), each, make=fresh) for each in (CPU, where))
        assert here.statuses == there.statuses


# The numbers.


def test_the_bound_of_a_share_is_that_of_clopper_and_pearson():
    beta = pytest.importorskip("scipy.stats").beta
    for count, total in [(48, 48), (32, 32), (30, 48), (1, 48), (950, 1000)]:
        assert statistics.share_bound(count, total) == pytest.approx(beta.ppf(0.05, count, total - count + 1), abs=1e-9)
    assert statistics.share_bound(0, 48) == 0


def test_mutual_information_has_its_two_ends():
    assert statistics.mutual_information(torch.eye(8, dtype=torch.float64)) == pytest.approx(1)
    assert statistics.mutual_information(torch.full((8, 8), 1 / 8, dtype=torch.float64)) == pytest.approx(0, abs=1e-12)
    assert statistics.mutual_information(torch.eye(8, dtype=torch.float64)[[2] * 8]) == 0


def test_the_mean_cosine_is_that_of_all_pairs():
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    pairs = [functional.cosine_similarity(one, other, dim=0).item() for one, other in itertools.combinations(rows, 2)]
    assert statistics.mean_cosine(rows) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_input_dependence_is_scale_free_and_blind_to_what_a_softmax_is_blind_to():
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    value = statistics.input_dependence(rows)
    assert 0 < value < 1
    assert statistics.input_dependence(rows * 100 + torch.arange(12.0).unsqueeze(1)) == pytest.approx(value)
    assert statistics.input_dependence(rows[:1].expand(12, -1)) == pytest.approx(0)
