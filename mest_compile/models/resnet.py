"""ResNets for small images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def _resnet(blocks: tuple[int, ...]) -> Callable[[tuple[int, ...], int, int], Any]:
    """A residual net of two-convolution blocks with a 3x3 stem; each stage has twice the channels and half the size."""

    def make(input_shape: tuple[int, ...], classes: int, width: int) -> torch.nn.Module:
        from torch import nn

        class Block(nn.Module):
            def __init__(self, inputs: int, outputs: int, stride: int):
                super().__init__()
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
                y = self.bn1(self.conv1(x)).relu()
                return (self.bn2(self.conv2(y)) + shortcut).relu()

        class ResNet(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv1 = nn.Conv2d(input_shape[1], width, 3, 1, 1, bias=False)
                self.bn1 = nn.BatchNorm2d(width)
                channels = width
                for stage, count in enumerate(blocks):
                    outputs, parts = width << stage, []
                    for index in range(count):
                        parts.append(Block(channels, outputs, 2 if stage and index == 0 else 1))
                        channels = outputs
                    self.add_module(f"layer{stage + 1}", nn.Sequential(*parts))
                self.fc = nn.Linear(channels, classes)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.bn1(self.conv1(x)).relu()
                for stage in range(len(blocks)):
                    x = self.get_submodule(f"layer{stage + 1}")(x)
                return self.fc(x.mean((2, 3)))

        return ResNet()

    return make
