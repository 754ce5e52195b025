"""MobileNets of depthwise convolutions: version 1 and 2, EfficientNet-lite, and MLPerf Tiny's DS-CNN."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

SMALL = 64  # pixels: the stem of smaller images has a stride of 1, as they are halved four times behind it


def _stem_stride(input_shape: tuple[int, ...]) -> int:
    return 2 if min(input_shape[2:]) >= SMALL else 1


def _multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8 that is 8 or more and not more than a tenth below. Source: MobileNetV2's reference
    code."""
    found = max(8, int(channels + 4) // 8 * 8)
    return found + 8 if found < 0.9 * channels else found


def _normed(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: type[nn.Module] | None = None
) -> list[nn.Module]:
    """Convolution, batch normalisation and an activation; padded alike on all sides."""
    from torch import nn

    parts: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return [*parts, activation()] if activation else parts


def _mobilenetv1(input_shape: tuple[int, ...], classes: int, width: int) -> torch.nn.Module:
    """Source: Howard et al., arXiv:1704.04861; with ReLU, as MLPerf Tiny has it."""
    from torch import nn

    class MobileNetV1(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(*_normed(input_shape[1], width, 3, _stem_stride(input_shape), 1, nn.ReLU))
            blocks, channels = [], width
            # (times the width, stride)
            for times, stride in ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), *[(16, 1)] * 5, (32, 2), (32, 1)):
                depthwise = _normed(channels, channels, 3, stride, channels, nn.ReLU)
                blocks.append(nn.Sequential(*depthwise, *_normed(channels, times * width, 1, 1, 1, nn.ReLU)))
                channels = times * width
            self.blocks = nn.Sequential(*blocks)
            self.fc = nn.Linear(channels, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.blocks(self.stem(x)).mean((2, 3)))

    return MobileNetV1()


def _mobilenetv2(input_shape: tuple[int, ...], classes: int, width: float) -> torch.nn.Module:
    """torchvision's names; without its dropout. Source: Sandler et al., arXiv:1801.04381."""
    from torch import nn

    def scaled(channels: int) -> int:
        return _multiple_of_8(channels * width / 32)

    class InvertedResidual(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int, expand: int):
            super().__init__()
            inner = inputs * expand
            wide = [nn.Sequential(*_normed(inputs, inner, 1, 1, 1, nn.ReLU6))] if expand > 1 else []
            depthwise = nn.Sequential(*_normed(inner, inner, 3, stride, inner, nn.ReLU6))
            self.conv = nn.Sequential(*wide, depthwise, *_normed(inner, outputs, 1))
            self.residual = stride == 1 and inputs == outputs

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.conv(x) if self.residual else self.conv(x)

    class MobileNetV2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels, last = scaled(32), _multiple_of_8(1280 * max(1.0, width / 32))
            parts: list[nn.Module] = [
                nn.Sequential(*_normed(input_shape[1], channels, 3, _stem_stride(input_shape), 1, nn.ReLU6))
            ]
            for expand, outputs, count, stride in (
                (1, 16, 1, 1),
                (6, 24, 2, 2),
                (6, 32, 3, 2),
                (6, 64, 4, 2),
                (6, 96, 3, 1),
                (6, 160, 3, 2),
                (6, 320, 1, 1),
            ):
                for index in range(count):
                    parts.append(InvertedResidual(channels, scaled(outputs), stride if index == 0 else 1, expand))
                    channels = scaled(outputs)
            parts.append(nn.Sequential(*_normed(channels, last, 1, 1, 1, nn.ReLU6)))
            self.features = nn.Sequential(*parts)
            self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(last, classes))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.features(x).mean((2, 3)))

    return MobileNetV2()


def _efficientnet_lite(
    depth: float = 1.0, times: float = 1.0
) -> Callable[[tuple[int, ...], int, float], torch.nn.Module]:
    """timm's efficientnet_lite0 and deeper ones: their names, their padding alike on all sides; without dropout. Stem
    and head are as wide whatever the width, and stages of one block stay so. Source: Tan and Le, arXiv:1905.11946; the
    lite variants are tensorflow/tpu's.

    depth  what the blocks of a stage are multiplied by; times: what their channels are
    """

    def make(input_shape: tuple[int, ...], classes: int, width: float) -> torch.nn.Module:
        from torch import nn

        class DepthwiseSeparable(nn.Module):
            def __init__(self, inputs: int, outputs: int):
                super().__init__()
                self.conv_dw, self.bn1, self.act1 = _normed(inputs, inputs, 3, 1, inputs, nn.ReLU6)
                self.conv_pw, self.bn2 = _normed(inputs, outputs, 1)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.bn2(self.conv_pw(self.act1(self.bn1(self.conv_dw(x)))))

        class InvertedResidual(nn.Module):
            def __init__(self, inputs: int, outputs: int, kernel: int, stride: int):
                super().__init__()
                inner = 6 * inputs
                self.conv_pw, self.bn1, self.act1 = _normed(inputs, inner, 1, 1, 1, nn.ReLU6)
                self.conv_dw, self.bn2, self.act2 = _normed(inner, inner, kernel, stride, inner, nn.ReLU6)
                self.conv_pwl, self.bn3 = _normed(inner, outputs, 1)
                self.residual = stride == 1 and inputs == outputs

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.act2(self.bn2(self.conv_dw(self.act1(self.bn1(self.conv_pw(x))))))
                y = self.bn3(self.conv_pwl(y))
                return x + y if self.residual else y

        class EfficientNetLite(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv_stem, self.bn1, self.act1 = _normed(
                    input_shape[1], 32, 3, _stem_stride(input_shape), 1, nn.ReLU6
                )
                channels = _multiple_of_8(16 * times * width / 32)
                stages: list[nn.Module] = [nn.Sequential(DepthwiseSeparable(32, channels))]
                for count, kernel, stride, outputs in (
                    (2, 3, 2, 24),
                    (2, 5, 2, 40),
                    (3, 3, 2, 80),
                    (3, 5, 1, 112),
                    (4, 5, 2, 192),
                    (1, 3, 1, 320),
                ):
                    wide, blocks = _multiple_of_8(outputs * times * width / 32), []
                    for index in range(count if count == 1 else ceil(depth * count)):
                        blocks.append(InvertedResidual(channels, wide, kernel, stride if index == 0 else 1))
                        channels = wide
                    stages.append(nn.Sequential(*blocks))
                self.blocks = nn.Sequential(*stages)
                self.conv_head, self.bn2, self.act2 = _normed(channels, 1280, 1, 1, 1, nn.ReLU6)
                self.classifier = nn.Linear(1280, classes)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.blocks(self.act1(self.bn1(self.conv_stem(x))))
                return self.classifier(self.act2(self.bn2(self.conv_head(x))).mean((2, 3)))

        return EfficientNetLite()

    return make


def _ds_cnn(input_shape: tuple[int, ...], classes: int, width: int) -> torch.nn.Module:
    """MLPerf Tiny's keyword spotter for 1x49x10 cepstra, without its dropout, and padded alike on both sides. Source:
    Zhang et al., arXiv:1711.07128."""
    from torch import nn

    class DSCNN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(input_shape[1], width, (10, 4), (2, 2), (5, 1), bias=False)
            self.bn = nn.BatchNorm2d(width)
            self.blocks = nn.Sequential(
                *(
                    nn.Sequential(
                        *_normed(width, width, 3, 1, width, nn.ReLU), *_normed(width, width, 1, 1, 1, nn.ReLU)
                    )
                    for _ in range(4)
                )
            )
            self.fc = nn.Linear(width, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.blocks(self.bn(self.conv(x)).relu()).mean((2, 3)))

    return DSCNN()
