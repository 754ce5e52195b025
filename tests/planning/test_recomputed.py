"""What the backward pass computes again is what was there: the same bits, in less memory, over odd sizes."""

import numpy as np
import pytest
import torch
from test_step import make_batches
from torch import nn

import mest_compile as mest
from mest_compile.frontend import from_torch
from mest_compile.lowering.fusing import fuse
from mest_compile.options import StepOptions
from mest_compile.planning import memory, plan
from mest_compile.planning.plan import plan_step


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

    def usual(graph, layers, target):
        return frozenset() if level is None else memory.recomputable(graph, layers)[level]

    with monkeypatch.context() as patch:
        patch.setattr(plan, "usually_recomputed", usual)
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
        pytest.param("gelu", (5, 3, 4, 5), {"target": "opencl"}, marks=pytest.mark.opencl),
        pytest.param("bottleneck", (6, 3, 4, 3), {"target": "opencl"}, marks=pytest.mark.opencl),
    ],
    ids=str,
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


def chosen(net, level, **options):
    graph, _ = from_torch(NETS[net](), (4, 3, 6, 6))
    facts = plan_step(graph, StepOptions("block:2x1", 0.5, **options)).facts
    return memory.recomputable(fuse(facts.graph), facts.layers)[level], facts


def test_what_is_light_and_what_is_kept():
    """GELU's layer widens and is light; ReLU's slope needs its result, and so nothing of it is computed again."""
    passes, light = (chosen("gelu", level)[0] for level in (0, 1))
    assert {"norm", "again"} <= passes and any("gelu" in name for name in passes) and light - passes == {"widen"}
    assert chosen("relu", 1)[0] == {"norm", "again"}
    passes, light = (chosen("bottleneck", level)[0] for level in (0, 1))
    assert {"first", "second"} <= passes and "third" not in passes and light - passes == {"expand"}


def test_a_layer_of_many_products_is_kept(monkeypatch):
    monkeypatch.setattr(memory, "FEW_PRODUCTS", 4)  # of 10 inputs half are alive: 5
    assert "widen" not in chosen("gelu", 1)[0]


@pytest.mark.parametrize(("target", "level"), [("local", 1), ("opencl", None)])
def test_what_is_computed_again_whatever_the_budget_is_for_the_device_to_say(target, level):
    found, facts = chosen("gelu", level or 0, target=target)
    assert facts.recomputed == (frozenset() if level is None else found)
