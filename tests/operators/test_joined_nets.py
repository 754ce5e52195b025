"""Families of nets made of joined, cut, padded and resized images, in little: three steps of each are torch's."""

import numpy as np
import pytest
import torch
from test_frontend import KEEP, export, randomised
from test_joins import same_as_torch
from test_step import make_batches, masked_steps, relative
from torch import nn
from torch.nn import functional as F

import mest_compile as mest


def conv(inputs, outputs, kernel=3, stride=1, padding=None, groups=1):
    padding = kernel // 2 if padding is None else padding
    made = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(made, nn.BatchNorm2d(outputs), nn.ReLU())


class Dense(nn.Module):
    """DenseNet: every layer reads all before it, normalised."""

    def __init__(self):
        super().__init__()
        self.stem, widths = nn.Conv2d(3, 8, 3, padding=1, bias=False), (8, 12, 16)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(nn.Conv2d(width, 4, 3, padding=1, bias=False) for width in widths)
        self.norm, self.shrink, self.last = nn.BatchNorm2d(20), nn.Conv2d(20, 12, 1), nn.Linear(12, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.convs, strict=True):
            features.append(layer(norm(torch.cat(features, 1)).relu()))
        x = F.avg_pool2d(self.shrink(self.norm(torch.cat(features, 1)).relu()), 2)
        return self.last(x.mean((2, 3)))


class Squeeze(nn.Module):
    """SqueezeNet: a narrow layer, two wide ones side by side, pools that round up."""

    def __init__(self):
        super().__init__()
        self.stem, self.narrow = nn.Conv2d(3, 8, 3, 2), nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(16, 4, 1)])
        self.points = nn.ModuleList(nn.Conv2d(4, 8, 1) for _ in range(2))
        self.wide = nn.ModuleList(nn.Conv2d(4, 8, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        for narrow, point, wide in zip(self.narrow, self.points, self.wide, strict=True):
            x = narrow(F.max_pool2d(x, 3, 2, ceil_mode=True)).relu()
            x = torch.cat([point(x).relu(), wide(x).relu()], 1)
        return self.last(x).relu().mean((2, 3))


class Plain(nn.Module):
    """VGG on images that its pools do not divide, to a head of a fixed size."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 8), nn.MaxPool2d(2, 2), conv(8, 8), nn.MaxPool2d(2, 2, ceil_mode=True))
        self.head, self.last = nn.Linear(8 * 4, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.last(self.head(F.adaptive_avg_pool2d(self.body(x), 2).flatten(1)).relu())


class Ghost(nn.Module):
    """GhostNet: half of the channels are made of the others by cheap layers, and some are cut off again."""

    def __init__(self):
        super().__init__()
        self.stem, self.primary, self.cheap = conv(3, 8, stride=2), conv(8, 8, 1), conv(8, 8, groups=8)
        self.point, self.last = nn.Conv2d(8, 8, 1, bias=False), nn.Linear(10, 5)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.stem(x)
        y = self.primary(x)
        y = torch.cat([y, self.cheap(y)], 1)[:, :10]
        return self.last(torch.cat([y[:, :8] + self.norm(self.point(x)), y[:, 8:]], 1).mean((2, 3)))


class Halves(nn.Module):
    """ShuffleNet without its shuffle: one half of the channels passes by."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = conv(3, 8), nn.Linear(16, 5)
        self.branch = nn.Sequential(conv(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), conv(4, 4, 1))
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), conv(8, 8, 1))
        self.right = nn.Sequential(conv(8, 8, 1), nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), conv(8, 8, 1))

    def forward(self, x):
        kept, worked = self.stem(x).chunk(2, 1)
        x = torch.cat([kept, self.branch(worked)], 1)
        return self.last(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


class Ladder(nn.Module):
    """U-Net: down, up again by both ways, and joined with what was there before; a class for each pixel."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = conv(3, 8), conv(8, 8), conv(8, 12)
        self.up, self.out, self.last = conv(20, 8), conv(16, 8), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = self.first(x)
        y = self.second(F.max_pool2d(x, 2))
        z = F.interpolate(self.third(F.max_pool2d(y, 2, ceil_mode=True)), size=y.shape[2:], mode="bilinear")
        y = self.up(torch.cat([z, y], 1))
        return self.last(self.out(torch.cat([F.interpolate(y, scale_factor=2), x], 1)))


class Atrous(nn.Module):
    """DeepLab and LR-ASPP: layers that see ever further side by side, and one that sees all; a gate of all pixels; an
    image as large as the first, a class for each pixel."""

    def __init__(self):
        super().__init__()
        self.stem, self.points = conv(3, 8, stride=2), conv(8, 8, 1)
        self.far = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=rate, dilation=rate) for rate in (2, 3))
        self.all, self.gate = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.mix, self.last = conv(32, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        size, x = x.shape[2:], self.stem(x)
        pooled = F.adaptive_avg_pool2d(x, 1)
        known = F.interpolate(self.all(pooled).relu(), size=x.shape[2:], mode="bilinear")
        seen = torch.cat([self.points(x), *(far(x).relu() for far in self.far), known], 1)
        y = self.last(self.mix(seen) * self.gate(pooled).sigmoid())
        return F.interpolate(y, size=size, mode="bilinear")


class Tensorflow(nn.Module):
    """A MobileNet with TensorFlow's padding: with stride 2 and even sizes one pixel more below and right."""

    def __init__(self):
        super().__init__()
        self.stem, self.deep = conv(3, 8, stride=2, padding=0), conv(8, 8, stride=2, padding=0, groups=8)
        self.point, self.wide = conv(8, 12, 1), conv(12, 12, 5, 2, padding=0, groups=12)
        self.out, self.last = conv(12, 12, 1), nn.Linear(12, 5)

    @staticmethod
    def same(x, kernel):
        total = [max(((size + 1) // 2 - 1) * 2 + kernel - size, 0) for size in x.shape[:1:-1]]
        return F.pad(x, [side for both in total for side in (both // 2, both - both // 2)])

    def forward(self, x):
        x = self.point(self.deep(self.same(self.stem(self.same(x, 3)), 3)))
        return self.last(self.out(self.wide(self.same(x, 5))).mean((2, 3)))


NETS = {  # net, pixels of its images
    "densenet": (Dense, 6),
    "squeezenet": (Squeeze, 18),
    "vgg": (Plain, 14),
    "ghostnet": (Ghost, 8),
    "shufflenet": (Halves, 8),
    "tensorflow": (Tensorflow, 20),
}


def schemes(model):
    """Two in turns, where both fit."""
    weights = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.ndim > 1}
    return {
        name: "block:4x1" if place % 2 and shape[0] % 4 == 0 and shape[1] > 1 else "unstructured"
        for place, (name, shape) in enumerate(weights.items())
    }


def drawn(kind):
    """Statistics and scales that are not 0 and 1: else a scale before another normalisation has no gradient but
    rounding."""
    torch.manual_seed(0)
    return randomised(kind())


@pytest.mark.parametrize("name", NETS)
def test_a_family_trains_as_torch_does(name, tmp_path):
    kind, size = NETS[name]
    model = drawn(kind)
    same_as_torch(model, model, (3, 3, size, size), tmp_path, scheme=schemes(model), dense_layers=None)


@pytest.mark.parametrize("kind", [Ladder, Atrous])
def test_a_net_of_maps_trains_as_torch_does_and_in_float16_nearly(kind):
    model, shape = drawn(kind), (3, 3, 10, 10)
    made = {"scheme": schemes(model), "sparsity": 0.5}
    step = mest.compile(model, shape, **made)
    batches = make_batches(shape, 5, 3)
    labels = np.random.default_rng(0).integers(0, 5, (3, *shape[:1], 10, 10))
    batches = [(images, given) for (images, _), given in zip(batches, labels, strict=True)]
    found = step.gradients(*batches[0])
    halved = {"activations": "float16", **made} if kind is Ladder else None
    rounded = mest.compile(model, shape, **halved).gradients(*batches[0]) if halved else None
    losses, gradients = masked_steps(model, step.masks(), batches, 0.01, mest.SGD())
    for key, wanted in gradients.items():
        assert relative(found[key], wanted) < 1e-4, key
        assert rounded is None or 0 < relative(rounded[key], found[key]) < 0.1, key
    np.testing.assert_allclose([step(*batch, lr=0.01).loss for batch in batches], losses, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_family_on_opencl_from_onnx(tmp_path):
    pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    model, shape = drawn(Tensorflow), (3, 3, 20, 20)
    path = export(model, shape, tmp_path / "net.onnx", **KEEP)
    same_as_torch(model, path, shape, tmp_path, "opencl", scheme=schemes(model), dense_layers=None)
