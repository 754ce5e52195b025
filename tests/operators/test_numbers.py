"""Random small nets on data that breaks formulas which are right on paper: offsets, constant channels, ties, parts
without use, overflow.

Loss, gradients and statistics against torch in float64; where float32 itself cannot do better, against what torch makes
of it.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import mest_compile as mest

LR, CLASSES = 1e-3, 3


class Net(nn.Module):
    """Convolution, batch norm and ReLU twice, the second with a residual; pooling; batch norm of a linear layer;
    classifier."""

    def __init__(self, rng: np.random.Generator, inputs: int):
        super().__init__()
        pick = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
        width = 4 * int(rng.integers(1, 4))
        self.first = nn.Conv2d(inputs, width, pick(1, 3), padding=pick(0, 1), bias=pick(False, True))
        self.norm = nn.BatchNorm2d(width, eps=pick(1e-5, 1e-3))
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=pick(False, True))
        self.second_norm = nn.BatchNorm2d(width) if pick(False, True, True) else nn.Identity()
        self.pool = pick(nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2))
        self.flat = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Linear(width, 8, bias=pick(False, True))
        self.hidden_norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, CLASSES)
        with torch.no_grad():  # a ReLU of exactly 0 is where rounding alone decides
            for norm in self.norm, self.second_norm, self.hidden_norm:
                for parameter in norm.parameters():
                    parameter.copy_(torch.from_numpy(rng.uniform(0.3, 1.2, parameter.shape)))
            self.first.weight[0] = 0  # its channel is constant

    def forward(self, x):
        x = functional.relu(self.norm(self.first(x)))
        x = functional.relu(self.second_norm(self.second(x)) + x)
        x = self.hidden_norm(self.hidden(self.flat(self.pool(x)).flatten(1)))
        return self.head(functional.relu(x))


def images_of(rng: np.random.Generator, shape: tuple, offset: float) -> np.ndarray:
    """With a channel that is constant and a tied region; `offset` is the mean in standard deviations."""
    images = rng.standard_normal(shape).astype(np.float32) + np.float32(offset)
    if shape[1] > 1:
        images[:, -1] = 0.5
    images[:, 0, :4, :4] = images[:, 0, :1, :1]
    return images


def torch_step(
    net: nn.Module, optimizer, images: np.ndarray, labels: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    """(loss, gradients) of one step, in the net's own precision."""
    kind = next(net.parameters()).dtype
    optimizer.zero_grad()
    loss = functional.cross_entropy(net(torch.from_numpy(images).to(kind)), torch.from_numpy(labels))
    loss.backward()
    found = {name: parameter.grad.double().numpy().copy() for name, parameter in net.named_parameters()}
    optimizer.step()
    return loss.item(), found


def check(got: np.ndarray, wanted: np.ndarray, told: np.ndarray, slack: float, what: str) -> None:
    """Within `slack` of the largest value, or within some times what torch is off in float32."""
    off, torchs = np.abs(got - wanted).max(), np.abs(told - wanted).max()
    assert off <= slack * np.abs(wanted).max() + 8 * torchs + 1e-7, (
        f"{what}: off by {off} of {np.abs(wanted).max()}, torch by {torchs}"
    )


def check_net(seed: int, target: str, offset: float, batch: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    shape = (batch, int(rng.integers(1, 4)), 8, 8)
    net = Net(rng, shape[1]).train()
    images, labels = images_of(rng, shape, offset), rng.integers(0, CLASSES, batch)
    said = f"seed {seed}, offset {offset}, {shape}"
    print(said, net)
    step = mest.compile(net, shape, scheme="dense", sparsity=0, threads=1, target=target, optimizer=mest.SGD(lr=LR))
    twins = [copy.deepcopy(net).double(), copy.deepcopy(net)]
    rules = [torch.optim.SGD(twin.parameters(), LR, 0.9, weight_decay=1e-4) for twin in twins]
    for turn in range(1 if abs(offset) > 10 else 2):  # roundings of a step times 1e4 are another net in the next
        gradients = step.gradients(images, labels)
        loss = step(images, labels).loss
        (wanted, exact), (told, rounded) = (
            torch_step(twin, rule, images, labels) for twin, rule in zip(twins, rules, strict=True)
        )
        check(np.array(loss), np.array(wanted), np.array(told), 1e-4, f"{said}: loss of step {turn}")
        largest = max(np.abs(gradient).max() for gradient in exact.values())
        for name, gradient in exact.items():
            check(
                gradients[name],
                gradient,
                rounded[name],
                1e-3,
                f"{said}: gradient of {name} in step {turn}, of {largest} in all",
            )
    exact, rounded = (twin.state_dict() for twin in twins)
    for name, array in step.state_dict().items():
        check(array, exact[name].numpy(), rounded[name].double().numpy(), 1e-3, f"{said}: {name} afterwards")


@pytest.mark.parametrize(("seed", "offset", "batch"), [(0, 10.0, 7), (9, -3e4, 16), (4, 3e4, 13), (3, 1e5, 32)])
def test_a_random_net_on_awkward_data_trains_as_in_float64(seed, offset, batch):
    check_net(seed, "local", offset, batch)


@pytest.mark.parametrize("target", ["local", pytest.param("opencl", marks=pytest.mark.opencl)])
def test_statistics_that_a_linear_layer_left_serve_data_far_from_zero(target):
    if target == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)).train()
    images, labels = (
        (2e4 + np.random.default_rng(0).standard_normal((32, 4))).astype(np.float32),
        np.arange(32) % CLASSES,
    )
    step, twin = mest.compile(net, (32, 4), scheme="dense", sparsity=0, target=target), copy.deepcopy(net).double()
    gradients, loss = step.gradients(images, labels), step(images, labels).loss
    wanted, exact = torch_step(twin, torch.optim.SGD(twin.parameters(), LR), images, labels)
    assert abs(loss - wanted) < 0.01 * wanted  # z is known to 3e-3 of its deviation
    assert np.allclose(step.state_dict()["1.running_var"], twin[1].running_var.numpy(), rtol=0.02, atol=0)
    for name in ("1.weight", "1.bias", "2.weight", "2.bias"):
        assert np.abs(gradients[name] - exact[name]).max() < 0.05 * np.abs(exact[name]).max(), name


def overflowing() -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """(net, images, labels): all finite, but one filter's sums are infinite, and so what the next layer makes of them
    NaN."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )
    with torch.no_grad():
        net[0].weight[0], net[2].weight[1, 0] = 3e38, torch.tensor([[1.0, -1.0, 1.0]]).repeat(3, 1)
    return net, np.full((4, 1, 8, 8), 10.0, np.float32), np.arange(4) % CLASSES


def test_what_overflows_is_nan_to_the_end_as_in_torch():
    net, images, labels = overflowing()
    step = mest.compile(net, images.shape, scheme="dense", sparsity=0, threads=1)
    with torch.no_grad():
        wanted = net(torch.from_numpy(images)).numpy()
    assert np.isnan(wanted).all()
    np.testing.assert_array_equal(step.predict(images), wanted)
    gradients, (loss, exact) = (
        step.gradients(images, labels),
        torch_step(net, torch.optim.SGD(net.parameters(), LR), images, labels),
    )
    assert np.isnan(loss) and np.isnan(step(images, labels, lr=0.0).loss)
    for name, gradient in exact.items():
        np.testing.assert_array_equal(np.isfinite(gradients[name]), np.isfinite(gradient), name)


def test_a_norm_that_is_nan_clips_every_gradient_to_nan_as_torchs_does():
    net, images, labels = overflowing()
    step = mest.compile(net, images.shape, scheme="dense", sparsity=0, threads=1)
    step(images, labels, clip_norm=1.0)
    assert all(np.isnan(array).all() for array in step.state_dict().values())
