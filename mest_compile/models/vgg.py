"""VGG nets for small images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def _vgg(stages: tuple[int, ...]) -> Callable[[tuple[int, ...], int, int], Any]:
    """VGG with BatchNorm: `stages` counts the 3x3 convolutions between pools; channels are width times 1, 2, 4, 8,
    8."""

    def make(input_shape: tuple[int, ...], classes: int, width: int) -> torch.nn.Module:
        from torch import nn

        class VGG(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                parts: list[nn.Module] = []
                channels, size = input_shape[1], min(input_shape[2:])
                for stage, count in enumerate(stages):
                    for _ in range(count):
                        outputs = width * min(8, 2**stage)
                        parts += [nn.Conv2d(channels, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                        channels = outputs
                    if size > 1:  # 8x8 and 28x28 images are down to one pixel before the last stage
                        parts.append(nn.MaxPool2d(2))
                        size //= 2
                self.features = nn.Sequential(*parts)
                self.classifier = nn.Linear(channels, classes)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.classifier(self.features(x).mean((2, 3)))

        return VGG()

    return make
