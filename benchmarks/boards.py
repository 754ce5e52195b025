"""What people train on boards, as they write it: the nets of benchmarks/coverage.py that no package has."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 10
BOARDS: dict[str, tuple[str, tuple[Any, ...], Callable[[], nn.Module]]] = {}  # name -> (family, input_shape, maker)


def board(family: str, *shape: Any, name: str = "") -> Callable[[Any], Any]:
    """Decorator: a class without arguments, or a function, makes a net of the family for such inputs."""

    def register(make: Any) -> Any:
        BOARDS[name or make.__name__.lower()] = family, shape, make
        return make

    return register


class Net(nn.Module):
    """Parts by name, and a forward pass of them."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: Any = nn.ReLU) -> Any:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        act(),
    )


def conv1d(inputs: int, outputs: int, kernel: int = 5, **more: Any) -> Any:
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2 * more.get("dilation", 1), **more),
        nn.BatchNorm1d(outputs),
        nn.ReLU(),
    )


def head(features: int, pool: Any = nn.AdaptiveAvgPool2d) -> Any:
    return nn.Sequential(pool(1), nn.Flatten(), nn.Linear(features, CLASSES))


def separable(inputs: int, outputs: int, stride: int = 1, act: Any = nn.ReLU) -> Any:
    return nn.Sequential(conv(inputs, inputs, 3, stride, inputs, act), conv(inputs, outputs, 1, act=act))


@board("resnet-8", 8, 3, 32, 32, name="MLPerf Tiny ResNet-8")
def resnet8() -> nn.Module:
    def block(self: Any, x: Any) -> Any:
        return F.relu(self.b(self.a(x)) + self.s(x))

    def make(inputs: int, outputs: int, stride: int) -> nn.Module:
        side = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)
        return Net(block, a=conv(inputs, outputs, 3, stride), b=conv(outputs, outputs, act=nn.Identity), s=side)

    return nn.Sequential(conv(3, 16), make(16, 16, 1), make(16, 32, 2), make(32, 64, 2), head(64))


@board("ds-cnn", 8, 1, 49, 10, name="MLPerf Tiny DS-CNN")
def ds_cnn() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(1, 64, (10, 4), 2, (5, 1), bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(stem, nn.Dropout(0.2), *(separable(64, 64) for _ in range(4)), nn.Dropout(0.4), head(64))


@board("mobilenet v1", 4, 3, 96, 96, name="MLPerf Tiny MobileNetV1")
def mobilenetv1() -> nn.Module:
    widths = [8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256]
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    blocks = [separable(a, b, s) for (a, b), s in zip(pairwise(widths), strides)]
    return nn.Sequential(conv(3, 8, 3, 2), *blocks, head(256))


@board("autoencoder", 16, 640, name="MLPerf Tiny autoencoder")
def autoencoder() -> nn.Module:
    sizes = [640, 128, 128, 128, 128, 8, 128, 128, 128, 128]
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(128, 640))


def lenet(act: Any) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), act(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), act(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), act(), nn.Linear(120, 84), act(), nn.Linear(84, CLASSES)),
    )


board("lenet", 8, 1, 28, 28, name="LeNet-5")(lambda: lenet(nn.ReLU))
board("lenet", 8, 1, 28, 28, name="LeNet-5, tanh")(lambda: lenet(nn.Tanh))


@board("mlp", 16, 20, name="MLP with BatchNorm")
def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)
    )


@board("mlp", 16, 20, name="MLP with dropout")
def mlp_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 5))


@board("mlp", 16, 8, name="regression to one number")
def regression() -> nn.Module:
    inner = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
    return Net(lambda self, x: self.inner(x).squeeze(-1), inner=inner)


@board("conv1d as 2d", 8, 6, 1, 128, name="accelerometer CNN as Conv2d(1, k)")
def conv1d_as_2d() -> nn.Module:
    def step(a: int, b: int) -> Any:
        return nn.Sequential(nn.Conv2d(a, b, (1, 5), padding=(0, 2)), nn.ReLU(), nn.MaxPool2d((1, 2)))

    return nn.Sequential(step(6, 16), step(16, 32), head(32))


@board("conv1d", 8, 6, 128, name="accelerometer CNN")
def accelerometer() -> nn.Module:
    return nn.Sequential(
        conv1d(6, 16), nn.MaxPool1d(2), conv1d(16, 32), nn.MaxPool1d(2), head(32, nn.AdaptiveAvgPool1d)
    )


@board("conv1d", 8, 1, 4000, name="raw audio CNN (M5)")
def raw_audio() -> nn.Module:
    first = nn.Sequential(nn.Conv1d(1, 32, 80, stride=16), nn.BatchNorm1d(32), nn.ReLU(), nn.MaxPool1d(4))
    return nn.Sequential(first, conv1d(32, 64, 3), nn.MaxPool1d(4), head(64, nn.AdaptiveAvgPool1d))


@board("tcn", 8, 8, 64, name="temporal convolutions")
def tcn() -> nn.Module:
    def block(self: Any, x: Any) -> Any:
        return F.relu(self.side(x) + self.dropout(self.body(x))[..., : x.shape[-1]])

    def make(a: int, b: int, apart: int) -> nn.Module:
        body = nn.Sequential(nn.Conv1d(a, b, 3, padding=2 * apart, dilation=apart), nn.ReLU())
        return Net(block, body=body, side=nn.Conv1d(a, b, 1), dropout=nn.Dropout(0.1))

    return nn.Sequential(make(8, 16, 1), make(16, 16, 2), make(16, 16, 4), head(16, nn.AdaptiveAvgPool1d))


def recurrent(kind: Any, **more: Any) -> nn.Module:
    width = 32 * (1 + more.get("bidirectional", False))
    return Net(
        lambda self, x: self.fc(self.rnn(x)[0][:, -1]),
        rnn=kind(16, 32, batch_first=True, **more),
        fc=nn.Linear(width, CLASSES),
    )


board("rnn", 8, 12, 16, name="GRU keyword spotter")(lambda: recurrent(nn.GRU))
board("rnn", 8, 12, 16, name="LSTM keyword spotter")(lambda: recurrent(nn.LSTM))
board("rnn", 8, 12, 16, name="bidirectional LSTM")(lambda: recurrent(nn.LSTM, bidirectional=True))
board("rnn", 8, 12, 16, name="GRU of two layers")(lambda: recurrent(nn.GRU, num_layers=2))


@board("crnn", 4, 1, 40, 24, name="CRNN keyword spotter")
def crnn() -> nn.Module:
    def forward(self: Any, x: Any) -> Any:
        maps = self.conv(x).permute(0, 3, 1, 2).flatten(2)
        return self.fc(self.rnn(maps)[0][:, -1])

    return Net(forward, conv=conv(1, 8, 3, 2), rnn=nn.GRU(160, 32, batch_first=True), fc=nn.Linear(32, CLASSES))


@board("unet", 2, 3, 32, 32, name="U-Net")
def unet() -> nn.Module:
    def forward(self: Any, x: Any) -> Any:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        b = self.d(torch.cat([self.up2(c), b], 1))
        return self.last(self.e(torch.cat([self.up1(b), a], 1)))

    return Net(
        forward,
        **{"a": conv(3, 16), "b": conv(16, 32), "c": conv(32, 64), "d": conv(64, 32), "e": conv(32, 16)},
        **{"up1": nn.ConvTranspose2d(32, 16, 2, 2), "up2": nn.ConvTranspose2d(64, 32, 2, 2)},
        last=nn.Conv2d(16, 4, 1),
    )


@board("unet", 2, 3, 32, 32, name="U-Net with upsampling")
def unet_up() -> nn.Module:
    def forward(self: Any, x: Any) -> Any:
        a = self.a(x)
        up = F.interpolate(self.b(F.max_pool2d(a, 2)), scale_factor=2, mode="nearest")
        return self.last(torch.cat([up, a], 1))

    return Net(forward, a=conv(3, 16), b=conv(16, 16), last=nn.Conv2d(32, 4, 1))


@board("heat maps", 4, 3, 48, 48, name="FOMO-like detector")
def fomo() -> nn.Module:
    return nn.Sequential(conv(3, 16, 3, 2), separable(16, 32, 2), separable(32, 64, 2), nn.Conv2d(64, 3, 1))


@board("mcunet", 4, 3, 64, 64, name="MCUNet-like")
def mcunet() -> nn.Module:
    def block(self: Any, x: Any) -> Any:
        return x + self.body(x) if self.same else self.body(x)

    def make(a: int, b: int, kernel: int, stride: int, expand: int) -> nn.Module:
        body = nn.Sequential(
            conv(a, a * expand, 1, act=nn.ReLU6),
            conv(a * expand, a * expand, kernel, stride, a * expand, nn.ReLU6),
            conv(a * expand, b, 1, act=nn.Identity),
        )
        made = Net(block, body=body)
        made.same = a == b and stride == 1  # type: ignore[assignment]
        return made

    blocks = [make(16, 8, 3, 1, 1), make(8, 16, 7, 2, 3), make(16, 16, 3, 1, 4), make(16, 24, 5, 2, 5)]
    return nn.Sequential(conv(3, 16, 3, 2, act=nn.ReLU6), *blocks, head(24))


@board("shufflenet", 4, 3, 32, 32, name="ShuffleNet-like")
def shuffle() -> nn.Module:
    return nn.Sequential(
        conv(3, 24, 3, 2), conv(24, 48, 1, groups=3), nn.ChannelShuffle(3), conv(48, 48, 3, 2, 48), head(48)
    )


@board("darknet", 4, 3, 64, 64, name="YOLO-like backbone")
def yolo() -> nn.Module:
    def leaky() -> nn.Module:
        return nn.LeakyReLU(0.1)

    return nn.Sequential(
        *(conv(3, 16, act=leaky), nn.MaxPool2d(2), conv(16, 32, act=leaky), nn.MaxPool2d(2), conv(32, 64, act=leaky)),
        head(64),
    )


@board("vit", 4, 3, 32, 32, name="CCT-like")
def cct() -> nn.Module:
    def forward(self: Any, x: Any) -> Any:
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.positions
        tokens = self.norm(self.encoder(tokens))
        weights = F.softmax(self.pool(tokens), dim=1)
        return self.fc((weights.transpose(-1, -2) @ tokens).squeeze(-2))

    stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 4, 1))
    layer = nn.TransformerEncoderLayer(64, 2, 128, 0.1, "gelu", batch_first=True, norm_first=True)
    made = Net(
        forward,
        stem=stem,
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        norm=nn.LayerNorm(64),
        pool=nn.Linear(64, 1),
        fc=nn.Linear(64, CLASSES),
    )
    made.positions = nn.Parameter(0.02 * torch.randn(1, 64, 64))
    return made


@board("transformer", 4, 16, 32, name="sensor transformer")
def sensor_transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    return Net(
        lambda self, x: self.fc(self.encoder(x).mean(1)),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        fc=nn.Linear(32, CLASSES),
    )


@board("text", 4, 12, name="text classifier")
def text() -> nn.Module:
    return Net(
        lambda self, x: self.fc(self.table(x.long()).mean(1)), table=nn.Embedding(50, 32), fc=nn.Linear(32, CLASSES)
    )


@board("several inputs", (4, 3, 32, 32), (4, 4), name="image and numbers")
def two_inputs() -> nn.Module:
    return Net(
        lambda self, x, y: self.fc(torch.cat([self.body(x).mean((2, 3)), y], 1)),
        body=conv(3, 16),
        fc=nn.Linear(20, CLASSES),
    )


@board("several outputs", 4, 3, 32, 32, name="two heads")
def two_heads() -> nn.Module:
    def forward(self: Any, x: Any) -> Any:
        features = self.body(x).mean((2, 3))
        return self.one(features), self.two(features)

    return Net(forward, body=conv(3, 16), one=nn.Linear(16, CLASSES), two=nn.Linear(16, 3))


@board("plain norm", 4, 3, 32, 32, name="BatchNorm without weight and bias")
def plain_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, affine=False), nn.ReLU(), head(16))


@board("plain convolutions", 4, 3, 32, 32, name="plain CNN")
def plain() -> nn.Module:
    return nn.Sequential(conv(3, 16, 3, 2), conv(16, 32, 3, 2), nn.Dropout(0.2), head(32))
