"""Mobile nets with squeeze-and-excitation: MobileNetV3-small and EfficientNet-B0, under torchvision's names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mest_compile.models.mobilenet import _multiple_of_8, _normed, _stem_stride

if TYPE_CHECKING:
    import torch
    from torch import nn


def _gate(channels: int, squeezed: int, inner: type[nn.Module], outer: type[nn.Module]) -> nn.Module:
    """A number for each channel that the map is multiplied by, from its means."""
    from torch import nn

    class SqueezeExcitation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
            self.activation, self.scale_activation = inner(), outer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
            return gate * x

    return SqueezeExcitation()


def _block(
    inputs: int,
    inner: int,
    outputs: int,
    kernel: int,
    stride: int,
    activation: type[nn.Module],
    gate: nn.Module | None,
) -> nn.Module:
    """Expand, depthwise, gate, project."""
    from torch import nn

    class InvertedResidual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            wide = [nn.Sequential(*_normed(inputs, inner, 1, 1, 1, activation))] if inner != inputs else []
            depthwise = nn.Sequential(*_normed(inner, inner, kernel, stride, inner, activation))
            self.block = nn.Sequential(
                *wide, depthwise, *([gate] if gate else []), nn.Sequential(*_normed(inner, outputs, 1))
            )
            self.residual = stride == 1 and inputs == outputs

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.block(x) if self.residual else self.block(x)

    return InvertedResidual()


def _mobilenetv3_small(input_shape: tuple[int, ...], classes: int, width: float) -> torch.nn.Module:
    """Source: Howard et al., arXiv:1905.02244; torchvision's mobilenet_v3_small."""
    from torch import nn

    def scaled(channels: int) -> int:
        return _multiple_of_8(channels * width / 16)

    class MobileNetV3(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels, last = scaled(16), scaled(1024)
            stem = nn.Sequential(*_normed(input_shape[1], channels, 3, _stem_stride(input_shape), 1, nn.Hardswish))
            parts: list[nn.Module] = [stem]
            for kernel, inner, outputs, gated, activation, stride in (
                (3, 16, 16, True, nn.ReLU, 2),
                (3, 72, 24, False, nn.ReLU, 2),
                (3, 88, 24, False, nn.ReLU, 1),
                (5, 96, 40, True, nn.Hardswish, 2),
                (5, 240, 40, True, nn.Hardswish, 1),
                (5, 240, 40, True, nn.Hardswish, 1),
                (5, 120, 48, True, nn.Hardswish, 1),
                (5, 144, 48, True, nn.Hardswish, 1),
                (5, 288, 96, True, nn.Hardswish, 2),
                (5, 576, 96, True, nn.Hardswish, 1),
                (5, 576, 96, True, nn.Hardswish, 1),
            ):
                wide, narrow = scaled(inner), scaled(outputs)
                gate = _gate(wide, _multiple_of_8(wide // 4), nn.ReLU, nn.Hardsigmoid) if gated else None
                parts.append(_block(channels, wide, narrow, kernel, stride, activation, gate))
                channels = narrow
            parts.append(nn.Sequential(*_normed(channels, 6 * channels, 1, 1, 1, nn.Hardswish)))
            self.features = nn.Sequential(*parts)
            self.classifier = nn.Sequential(
                nn.Linear(6 * channels, last), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(last, classes)
            )
            for part in self.modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.eps, part.momentum = 1e-3, 0.01

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.features(x).mean((2, 3)))

    return MobileNetV3()


def _efficientnet_b0(input_shape: tuple[int, ...], classes: int, width: float) -> torch.nn.Module:
    """Without the stochastic depth of torchvision's efficientnet_b0. Source: Tan and Le, arXiv:1905.11946."""
    from torch import nn

    def scaled(channels: int) -> int:
        return _multiple_of_8(channels * width / 32)

    class EfficientNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels, last = scaled(32), scaled(1280)
            parts: list[nn.Module] = [
                nn.Sequential(*_normed(input_shape[1], channels, 3, _stem_stride(input_shape), 1, nn.SiLU))
            ]
            for expand, kernel, stride, outputs, count in (
                (1, 3, 1, 16, 1),
                (6, 3, 2, 24, 2),
                (6, 5, 2, 40, 2),
                (6, 3, 2, 80, 3),
                (6, 5, 1, 112, 3),
                (6, 5, 2, 192, 4),
                (6, 3, 1, 320, 1),
            ):
                stage = []
                for index in range(count):
                    inner = channels * expand
                    gate = _gate(inner, max(1, channels // 4), nn.SiLU, nn.Sigmoid)
                    once = stride if index == 0 else 1
                    stage.append(_block(channels, inner, scaled(outputs), kernel, once, nn.SiLU, gate))
                    channels = scaled(outputs)
                parts.append(nn.Sequential(*stage))
            parts.append(nn.Sequential(*_normed(channels, last, 1, 1, 1, nn.SiLU)))
            self.features = nn.Sequential(*parts)
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.features(x).mean((2, 3)))

    return EfficientNet()
