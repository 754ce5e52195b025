"""Losses: what each declares, and steps that are compiled with one: targets, gradients, files, refusals."""

import hashlib
import inspect

import losses
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import InputError, SpecError, UnknownName, UsageError
from mest_compile.hardware.target import find_target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import kernel_source
from mest_compile.operators.losses.cross_entropy import SoftmaxCrossEntropy
from mest_compile.operators.losses.loss import LOSSES, read_loss
from mest_compile.planning.facts import Facts

SHAPE = (7, 3, 8, 8)


class Small(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, outputs)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def compiled(outputs=5, **options):
    torch.manual_seed(1)
    model = Small(outputs)
    return mest.compile(
        model,
        SHAPE,
        **{"sparsity": 0.75, "dense_layers": ["conv1", "fc"], "optimizer": mest.SGD(0.01), "threads": 1, **options},
    ), model


def batches(count, outputs=5, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal(SHAPE).astype(np.float32), rng.standard_normal((SHAPE[0], outputs)).astype(np.float32))
        for _ in range(count)
    ]


class Torch:
    """The masked model in torch."""

    def __init__(self, model, step, loss=F.mse_loss):
        self.loss = loss
        self.model, self.parameters = model.train(), dict(model.named_parameters())
        self.masks = {name: torch.from_numpy(mask) for name, mask in step.masks().items()}
        rule = step.optimizer
        self.rule = torch.optim.SGD(
            model.parameters(), lr=rule.lr, momentum=rule.momentum, weight_decay=rule.weight_decay
        )
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.parameters[name] *= mask

    def gradients(self, images, targets):
        self.rule.zero_grad()
        loss = self.loss(self.model(torch.from_numpy(images)).double(), losses.tensors(targets))
        loss.backward()
        for name, mask in self.masks.items():
            self.parameters[name].grad *= mask
        return loss.item()

    def step(self, images, targets):
        loss = self.gradients(images, targets)
        self.rule.step()
        return loss


@pytest.mark.parametrize("kind", [LOSSES.find(name) for name in LOSSES.names()])
def test_a_loss_is_whole_and_read_as_it_was_written(kind):
    loss = kind()
    assert LOSSES.find(loss.name) is kind and getattr(mest, kind.__name__) is kind and inspect.getdoc(kind)
    assert read_loss({"loss": loss.to_json()}) == loss


def test_facts_without_a_loss_are_of_cross_entropy():
    assert read_loss({"label_smoothing": 0.25}) == mest.CrossEntropy(0.25) and read_loss({}) == mest.CrossEntropy()


@pytest.mark.parametrize(("target", "digest"), [("arm_cpu", "ba5b6709e1c8bd84"), ("opencl", "cbe8fd4d4f23071f")])
def test_the_text_of_cross_entropys_kernels_is_what_it_was(target, digest):
    problems = [
        SoftmaxCrossEntropy(
            Image(classes, 1, 1, batch, (0, 0, 0, 0), 4), Image(classes, 1, 1, batch, halo, 4), smoothing
        )
        for classes, batch, halo in ((10, 7, (0, 0, 0, 0)), (13, 64, (1, 0, 0, 1)), (300, 64, (0, 0, 0, 0)))
        for smoothing in (0.0, 0.1)
    ]
    texts = [kernel_source("loss.cross_entropy", problem, find_target(target)).text for problem in problems]
    assert hashlib.sha256("".join(texts).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("target", ["local", "opencl"])
@pytest.mark.parametrize("outputs", [1, 5])
def test_steps_of_mean_squared_error_equal_torch(target, outputs):
    if target == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    step, model = compiled(outputs, loss=mest.MSE(), target=target)
    twin, given = Torch(model, step), batches(6, outputs)
    got = step.gradients(*given[0])
    twin.gradients(*given[0])
    for name, parameter in twin.parameters.items():
        gradient = parameter.grad.numpy()
        assert np.abs(got[name] - gradient).max() <= 1e-4 * np.abs(gradient).max(), name
    twin.model.load_state_dict(
        {name: torch.from_numpy(array) for name, array in step.state_dict().items()}, strict=False
    )
    results = [step(*batch) for batch in given]
    np.testing.assert_allclose([result.loss for result in results], [twin.step(*batch) for batch in given], rtol=1e-4)
    assert all(result.correct is None and result.outputs.shape == (SHAPE[0], outputs) for result in results)
    twin.model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(
            step.predict(given[0][0]), twin.model(torch.from_numpy(given[0][0])).numpy(), rtol=1e-3, atol=1e-4
        )


def test_one_output_takes_flat_targets_and_torch_tensors():
    (step, _), (images, targets) = compiled(1, loss="mse"), batches(1, 1)[0]
    found = [
        compiled(1, loss="mse")[0](images, given).loss for given in (targets, targets[:, 0], torch.from_numpy(targets))
    ]
    assert found == [step(images, targets.astype(np.float64)).loss] * 3


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.zeros((7, 4)), r"targets have shape \(7, 4\); mest.MSE takes numbers of shape \(7, 5\)"),
        (np.zeros(7), r"targets have shape \(7,\)"),
        (np.full((7, 5), np.nan), "35 targets are NaN or infinite"),
        (np.full((7, 5), 1e39), "35 targets are NaN"),
        (np.full((7, 5), "a"), "wanted real numbers"),
    ],
)
def test_targets_that_do_not_fit_are_refused_and_change_nothing(targets, message):
    step, _ = compiled(loss=mest.MSE())
    before = step.state_dict()
    with pytest.raises(InputError, match=message) as caught:
        step(batches(1)[0][0], targets)
    assert "\n" not in str(caught.value)
    for name, array in step.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


FILED = ["mse", "smoothed", "all three", "soft, weighted", "distill", "bce, weighted one by one"]


@pytest.mark.parametrize("name", FILED)
def test_files_hold_the_loss(name, tmp_path):
    loss, draw, _ = losses.rules(5)[name]
    step, _ = compiled(loss=loss, optimizer=mest.AdamW())
    rng = np.random.default_rng(3)
    given = [(images, draw(rng, (7, 5))) for images, _ in batches(3)]
    step(*given[0])
    step.save(tmp_path / "a.safetensors")
    step.export(tmp_path / "artifact")
    others = [mest.load(tmp_path / "a.safetensors"), mest.open_artifact(tmp_path / "artifact")]
    for other in others:
        assert other.describe()["loss"] == loss.to_json()
    for batch in given[1:]:
        found = [one(*batch).loss for one in (step, *others)]
        assert found == found[:1] * 3


def test_label_smoothing_is_short_for_a_loss_object():
    short, _ = compiled(label_smoothing=0.1)
    given = batches(1)[0][0], np.arange(7) % 5
    assert (
        short(*given).loss
        == compiled(loss=mest.CrossEntropy(0.1))[0](*given).loss
        != compiled(loss="cross_entropy")[0](*given).loss
    )
    assert isinstance(short._compiled.facts, Facts) and short.describe()["label_smoothing"] == 0.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "hinge"}, UnknownName, "no loss 'hinge'; there are: bce, cross_entropy, distill, huber, mse, "),
        (
            {"loss": nn.MSELoss()},
            UsageError,
            r"loss is MSELoss\(\); wanted one of mest.BCE\(pos_weight\), mest.CrossEntropy\(smoothing, weight, ignore_",
        ),
        (
            {"loss": mest.MSE(), "label_smoothing": 0.1},
            UsageError,
            r"short for loss=mest.CrossEntropy\(smoothing=...\), and the loss is MSE",
        ),
        ({"loss": mest.CrossEntropy(0.2), "label_smoothing": 0.1}, UsageError, "leave one out"),
        ({"outputs": 1}, SpecError, r"one logit.*loss=mest.BCE\(\) for yes and no, with loss=mest.MSE\(\)"),
        ({"outputs": 1, "loss": mest.Distill()}, SpecError, "one logit"),
        ({"loss": mest.CrossEntropy(weight=[1, 2])}, SpecError, "weight has 2 numbers, the model 5 outputs"),
        ({"loss": mest.BCE(pos_weight=[1, 2])}, SpecError, "pos_weight has 2 numbers, the model 5 outputs"),
        ({"loss": "cross_entropy:smooth=0.1"}, UsageError, "no option 'smooth'; did you mean 'smoothing'"),
        ({"loss": "mse:smoothing=0.1"}, UsageError, "loss 'mse' has no option 'smoothing'; there are: none"),
        ({"loss": "bce:pos_weight"}, UsageError, "cannot be read .*; write it as name:option=value"),
        ({"loss": {"smoothing": 0.1}}, UsageError, "wanted a name, or a table with the key name"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message) as caught:
        compiled(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mest.CrossEntropy(smoothing=1), "CrossEntropy: smoothing is 1; wanted"),
        (lambda: mest.CrossEntropy(weight=3), "weight is 3; wanted a list of numbers, one a class"),
        (lambda: mest.CrossEntropy(weight=[1, -1]), r"weight\[1\] is -1; wanted"),
        (lambda: mest.CrossEntropy(ignore_index=0.5), "ignore_index is 0.5; wanted a whole number"),
        (lambda: mest.BCE(pos_weight="a"), "pos_weight is 'a'"),
        (lambda: mest.BCE(pos_weight=[]), r"pos_weight is \[\]"),
        (lambda: mest.SmoothL1(-1), "beta is -1"),
        (lambda: mest.Huber(0), r"delta is 0; wanted a number above 0, or mest.SmoothL1\(beta=0\)"),
        (lambda: mest.Distill(0), "temperature is 0"),
        (lambda: mest.Distill(mix=1.5), "mix is 1.5; wanted a share of the teacher"),
    ],
)
def test_an_option_that_cannot_be_is_refused(make, message):
    with pytest.raises(SpecError, match=message):
        make()


LABELS = np.arange(7) % 5
REFUSED = [
    ("cross_entropy", np.where(LABELS == 3, -100, LABELS), r"go from -100 to 4; .*ignore_index=-100"),
    ("cross_entropy", LABELS - 1, r"go from -1 to 3; the model has classes 0 to 4$"),
    ("cross_entropy:ignore_index=-100", LABELS - 1, r"from -1 to 3; .* 0 to 4, and -100 is ignored"),
    ("cross_entropy:ignore_index=-100", np.zeros((7, 5), int), r"shape \(7, 5\); wanted \(7,\)"),
    ("cross_entropy", np.ones((7, 5)) / 5, "type float64; wanted whole numbers"),
    ("soft_cross_entropy", LABELS, r"labels have shape \(7,\); mest.SoftCrossEntropy takes numbers of shape \(7, 5\)"),
    ("soft_cross_entropy", np.full((7, 5), -0.5), "labels go down to -0.5; .* takes probabilities"),
    ("bce", np.full((7, 5), 2), "targets go from 2 to 2; mest.BCE takes 0 for no, 1 for yes"),
    ("bce", LABELS, r"targets have shape \(7,\); mest.BCE takes numbers of shape \(7, 5\)"),
    ("distill", LABELS, "labels are ndarray; mest.Distill takes a tuple of labels and the teacher's logits"),
    ("distill", (LABELS, np.zeros((7, 4))), r"the teacher's logits have shape \(7, 4\)"),
    ("distill", (LABELS, np.full((7, 5), np.inf)), "35 the teacher's logits are NaN or infinite"),
]


@pytest.mark.parametrize(("loss", "targets", "message"), REFUSED)
def test_targets_of_another_kind_are_refused_with_what_is_wanted(loss, targets, message, builder):
    step, _ = compiled(loss=loss, builder=builder)
    with pytest.raises(InputError, match=message) as caught:
        step(batches(1)[0][0], targets)
    assert "\n" not in str(caught.value)


class Maps(nn.Module):
    """Gives each pixel of half the size its logits."""

    def __init__(self, outputs):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, outputs, 1)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.head((self.bn2(self.conv2(x)) + x).relu())


@pytest.mark.parametrize("target", ["local", "opencl"])
@pytest.mark.parametrize("name", losses.NAMES)
@pytest.mark.parametrize("kind", [Small, Maps])
def test_steps_of_every_loss_equal_torch(kind, name, target, builder):
    if target == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
        if name not in ("all three", "distill", "bce, weighted one by one"):
            pytest.skip("one loss of every kernel; its kernels are tested one by one")
    torch.manual_seed(1)
    model, (loss, draw, theirs) = kind(5), losses.rules(5)[name]
    step = mest.compile(
        model,
        SHAPE,
        sparsity=0.5,
        dense_layers=["conv1", "fc" if kind is Small else "head"],
        optimizer=mest.SGD(0.01),
        threads=1,
        loss=loss,
        target=target,
        builder=builder,
    )
    twin, rng = Torch(model, step, theirs), np.random.default_rng(4)
    given = [(images, draw(rng, step.output_shape)) for images, _ in batches(4)]
    got = step.gradients(*given[0])
    twin.gradients(*given[0])
    for parameter_name, parameter in twin.parameters.items():
        gradient = parameter.grad.numpy()
        assert np.abs(got[parameter_name] - gradient).max() <= 1e-4 * np.abs(gradient).max(), parameter_name
    twin.model.load_state_dict(
        {name: torch.from_numpy(array) for name, array in step.state_dict().items()}, strict=False
    )
    results = [step(*batch) for batch in given]
    np.testing.assert_allclose([result.loss for result in results], [twin.step(*batch) for batch in given], rtol=1e-4)
    twin.model.eval()
    images = given[-1][0]
    with torch.no_grad():
        wanted = twin.model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(step.predict(images), wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(step.predict(images[:3]), wanted[:3], rtol=1e-3, atol=1e-4)
    if loss.tells_correct:
        assert results[-1].correct.shape == (SHAPE[0], *wanted.shape[2:]) and results[-1].outputs is None
    else:
        assert results[-1].outputs.shape == wanted.shape and results[-1].correct is None
