"""ResNets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mest_compile.models.mobilenet import SMALL

if TYPE_CHECKING:
    import torch


def _resnet(blocks: tuple[int, ...], bottleneck: bool = False) -> Callable[[tuple[int, ...], int, int], Any]:
    """A residual net; each stage has twice the channels and half the size. The stem is a 3x3 convolution, that of
    larger images torchvision's, which shrinks them by 4.

    blocks      of each stage
    bottleneck  blocks are of three convolutions, the stride in the second, with four times the channels between them
    """

    def make(input_shape: tuple[int, ...], classes: int, width: int) -> torch.nn.Module:
        from torch import nn

        class Block(nn.Module):
            def __init__(self, inputs: int, inner: int, stride: int):
                super().__init__()
                outputs = inner * (4 if bottleneck else 1)
                if bottleneck:
                    self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
                    self.bn1 = nn.BatchNorm2d(inner)
                    self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
                    self.bn2 = nn.BatchNorm2d(inner)
                    self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
                    self.bn3 = nn.BatchNorm2d(outputs)
                else:
                    self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
                    self.bn1 = nn.BatchNorm2d(outputs)
                    self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
                    self.bn2 = nn.BatchNorm2d(outputs)
                self.downsample = None
                if stride != 1 or inputs != outputs:
                    self.downsample = nn.Sequential(
                        nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                    )

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                shortcut = x if self.downsample is None else self.downsample(x)
                y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
                if bottleneck:
                    y = self.bn3(self.conv3(y.relu()))
                return (y + shortcut).relu()

        class ResNet(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                large = min(input_shape[2:]) >= SMALL
                self.conv1 = nn.Conv2d(input_shape[1], width, *((7, 2, 3) if large else (3, 1, 1)), bias=False)
                self.bn1 = nn.BatchNorm2d(width)
                self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
                channels = width
                for stage, count in enumerate(blocks):
                    inner, parts = width << stage, []
                    for index in range(count):
                        parts.append(Block(channels, inner, 2 if stage and index == 0 else 1))
                        channels = inner * (4 if bottleneck else 1)
                    self.add_module(f"layer{stage + 1}", nn.Sequential(*parts))
                self.fc = nn.Linear(channels, classes)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.maxpool(self.bn1(self.conv1(x)).relu())
                for stage in range(len(blocks)):
                    x = self.get_submodule(f"layer{stage + 1}")(x)
                return self.fc(x.mean((2, 3)))

        return ResNet()

    return make
