"""A block each of PoolFormer, StarNet, MobileOne and RepViT, with learned scales and squeeze-and-excitation, in one
net."""

import numpy as np
import pytest
import torch
from test_step import make_batches, masked_steps, relative
from torch import nn
from torch.nn import functional as F

import mest_compile as mest

BATCH = (3, 3, 10, 10)
GAPS = (9, 3, 16, 16)  # whose maps of 8x8 lie in memory with gaps between channels


class Pooling(nn.Module):
    """PoolFormer's: what pooling changes, and a perceptron, each behind a norm and scaled."""

    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(2))
        self.scales = nn.ParameterList(nn.Parameter(torch.full((width, 1, 1), 0.5)) for _ in range(2))
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.wide, self.narrow = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        y = self.norms[0](x)
        x = x + self.scales[0] * (self.pool(y) - y)
        return x + self.scales[1] * self.narrow(F.gelu(self.wide(self.norms[1](x))))


class Star(nn.Module):
    """StarNet's: the product of two projections."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(width, width, 7, padding=3, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.left, self.right = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, 2 * width, 1)
        self.back, self.last = nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.norm(self.first(x))
        return x + self.last(self.back(F.relu6(self.left(y)) * self.right(y)))


class Branches(nn.Module):
    """MobileOne's: a sum of normalised branches, begun with 0, behind it a learned scale and shift as HGNetV2 has."""

    def __init__(self, width):
        super().__init__()
        self.large = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.small = nn.Conv2d(width, width, 1, groups=width, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.scale, self.shift = nn.Parameter(torch.tensor([0.8])), nn.Parameter(torch.tensor([0.1]))

    def forward(self, x):
        made = [norm(one) for norm, one in zip(self.norms, (x, self.large(x), self.small(x)), strict=True)]
        return self.scale * F.relu(sum(made)) + self.shift


class Squeezed(nn.Module):
    """RepViT's: a gate of channels before the perceptron."""

    def __init__(self, width):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, width // 2, 1), nn.Conv2d(width // 2, width, 1)
        self.wide, self.narrow = nn.Conv2d(width, 2 * width, 1, bias=False), nn.Conv2d(2 * width, width, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(2 * width), nn.BatchNorm2d(width)])

    def forward(self, x):
        x = x * self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.norms[1](self.narrow(F.gelu(self.norms[0](self.wide(x)))))


class Blocks(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.blocks = nn.Sequential(*(kind(width) for kind in (Pooling, Star, Branches, Squeezed)))
        self.last = nn.Linear(width, 5)

    def forward(self, x):
        return self.last(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("scheme", "activations", "shape"),
    [("block", "float32", BATCH), ("unstructured", "float16", BATCH), ("block", "float32", GAPS)],
)
def test_three_steps_equal_torchs(scheme, activations, shape):
    torch.manual_seed(0)
    model, optimizer = Blocks(), mest.SGD(lr=0.05, momentum=0.9, weight_decay=1e-3)
    named = {"scheme": scheme, "sparsity": 0.5, "activations": activations}
    step = mest.compile(model, shape, optimizer=optimizer, **named)
    batches, exact = make_batches(shape, 5, 3), activations == "float32"
    found = step.gradients(*batches[0])
    losses, gradients = masked_steps(model, step.masks(), batches, 0.05, optimizer)
    for key, wanted in gradients.items():
        assert relative(found[key], wanted) < (1e-4 if exact else 0.05) or np.abs(wanted).max() < 1e-6, key
    np.testing.assert_allclose([step(*batch).loss for batch in batches], losses, rtol=1e-5 if exact else 2e-3)
    if exact:
        state = step.state_dict()
        for name, value in model.state_dict().items():  # a norm's bias that pooling takes off again stays 0
            assert relative(state[name], value.numpy()) < 1e-3 or abs(value).max() < 1e-6, name
        images = batches[0][0]
        assert relative(step.predict(images), model.eval()(torch.from_numpy(images)).detach().numpy()) < 1e-3
