"""Losses: what each declares, and steps that are compiled with one: targets, gradients, files, refusals."""

import hashlib
import inspect

import numpy as np
import pytest
import torch
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
    """The masked model in torch, on mean squared error."""

    def __init__(self, model, step):
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
        loss = nn.MSELoss()(self.model(torch.from_numpy(images)), torch.from_numpy(targets))
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
    assert all(result.correct is None for result in results)
    twin.model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(
            step.predict(given[0][0]), twin.model(torch.from_numpy(given[0][0])).numpy(), rtol=1e-3, atol=1e-4
        )


def test_one_output_takes_flat_targets_and_torch_tensors():
    (step, _), (images, targets) = compiled(1, loss="mse"), batches(1, 1)[0]
    losses = [
        compiled(1, loss="mse")[0](images, given).loss for given in (targets, targets[:, 0], torch.from_numpy(targets))
    ]
    assert losses == [step(images, targets.astype(np.float64)).loss] * 3


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


@pytest.mark.parametrize("loss", [mest.MSE(), mest.CrossEntropy(smoothing=0.1)])
def test_files_hold_the_loss(loss, tmp_path):
    step, _ = compiled(loss=loss, optimizer=mest.AdamW())
    given = batches(3)
    if loss.tells_correct:
        given = [(images, targets.argmax(1)) for images, targets in given]
    step(*given[0])
    step.save(tmp_path / "a.safetensors")
    step.export(tmp_path / "artifact")
    others = [mest.load(tmp_path / "a.safetensors"), mest.open_artifact(tmp_path / "artifact")]
    for other in others:
        assert other.describe()["loss"] == loss.to_json()
    for batch in given[1:]:
        losses = [one(*batch).loss for one in (step, *others)]
        assert losses == losses[:1] * 3


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
        ({"loss": "hinge"}, UnknownName, "no loss 'hinge'; there are: cross_entropy, mse"),
        (
            {"loss": nn.MSELoss()},
            UsageError,
            r"loss is MSELoss\(\); wanted one of mest.CrossEntropy\(smoothing\), mest.MSE\(\), or 'cross_en",
        ),
        (
            {"loss": mest.MSE(), "label_smoothing": 0.1},
            UsageError,
            r"short for loss=mest.CrossEntropy\(smoothing=...\), and the loss is MSE",
        ),
        ({"loss": mest.CrossEntropy(0.2), "label_smoothing": 0.1}, UsageError, "leave one out"),
        ({"outputs": 1}, SpecError, r"one logit.*loss=mest.MSE\(\)"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message) as caught:
        compiled(**options)
    assert "\n" not in str(caught.value)


def test_smoothing_that_is_no_share_is_refused():
    with pytest.raises(SpecError, match="CrossEntropy: smoothing is 1; wanted"):
        mest.CrossEntropy(smoothing=1)


def test_a_trainer_wants_a_loss_that_tells_what_is_right():
    with pytest.raises(UsageError, match="a Trainer counts right answers, of which mest.MSE tells nothing; call step"):
        mest.Trainer(compiled(loss=mest.MSE())[0], mest.Recipe(1, "static"))
