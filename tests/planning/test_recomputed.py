"""What the backward pass computes again is what was there: the same bits, in less memory, over odd sizes."""

import numpy as np
import pytest
import torch
from test_step import make_batches
from torch import nn

import mest_compile as mest
from mest_compile.planning import memory, plan


class Tokens(nn.Module):
    """LayerNorm, linear, activation, linear, beside what it is added to."""

    def __init__(self, activation, channels=10):
        super().__init__()
        self.inside = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm, self.again = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.widen, self.narrow = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)
        self.activation, self.head = activation, nn.Linear(channels, 10)

    def forward(self, x):
        x = self.inside(x).flatten(2).transpose(1, 2)
        x = x + self.narrow(self.activation(self.widen(self.norm(x))))
        return self.head(self.again(x).mean(1))


class Bottleneck(nn.Module):
    """A block whose last 1x1 convolution is normalised and added to a longer path, with a gate."""

    def __init__(self, channels=8):
        super().__init__()
        self.inside, self.first = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.reduce, self.second = nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.expand, self.third = nn.Conv2d(4, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.gate, self.behind = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, 6, 1)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        x = self.first(self.inside(x)).relu()
        y = nn.functional.hardswish(self.second(self.reduce(x)))
        x = (x + self.third(self.expand(y))).relu()
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(self.behind(x).mean((2, 3)))


NETS = {
    "gelu": lambda: Tokens(nn.GELU()),
    "formula": lambda: Tokens(lambda x: x * torch.tanh(2 * x)),
    "relu": lambda: Tokens(nn.ReLU()),
    "bottleneck": Bottleneck,
}


def compiled(monkeypatch, net, shape, level, **options):
    """A step that computes again what `recomputable` has at that place; None: nothing."""

    def chosen(graph, layers, target):
        return frozenset() if level is None else memory.recomputable(graph, layers)[level]

    with monkeypatch.context() as patch:
        patch.setattr(plan, "usually_recomputed", chosen)
        torch.manual_seed(3)
        return mest.compile(NETS[net](), shape, scheme="block:2x1", sparsity=0.5, threads=1, **options)


@pytest.mark.parametrize(
    ("net", "shape", "options"),
    [
        ("gelu", (5, 3, 6, 6), {}),
        ("gelu", (8, 3, 5, 3), {"activations": "float16"}),
        ("formula", (12, 3, 4, 9), {"microbatch": 6}),
        ("relu", (16, 3, 5, 7), {}),
        ("bottleneck", (16, 3, 5, 7), {}),
        ("bottleneck", (6, 3, 4, 3), {"activations": "float16"}),
    ],
    ids=[
        "gelu of an odd batch",
        "gelu in float16",
        "a formula in passes",
        "relu",
        "bottleneck",
        "bottleneck in float16",
    ],
)
def test_a_step_computes_the_same_bits_in_less_memory(monkeypatch, net, shape, options):
    steps = [compiled(monkeypatch, net, shape, level, **options) for level in (None, 0, 1, 3)]
    needs = [step.memory()["activations"] for step in steps]
    assert needs == sorted(needs, reverse=True) and needs[-1] < needs[0]
    for batch in make_batches(shape, 10, 3):
        assert len({step(*batch).loss for step in steps}) == 1
    for name, value in steps[0].state_dict().items():
        for step in steps[1:]:
            np.testing.assert_array_equal(step.state_dict()[name], value, err_msg=name)
