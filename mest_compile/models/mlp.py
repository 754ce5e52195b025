"""Nets of linear layers: a multi-layer perceptron, and MLPerf Tiny's autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def _mlp(input_shape: tuple[int, ...], classes: int, width: int) -> torch.nn.Module:
    from math import prod

    from torch import nn

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(prod(input_shape[1:]), width)
            self.fc2 = nn.Linear(width, width)
            self.fc3 = nn.Linear(width, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.fc1(x.flatten(1)).relu()
            return self.fc3(self.fc2(x).relu())

    return MLP()


def _autoencoder(input_shape: tuple[int, ...], classes: int, width: int) -> torch.nn.Module:
    """MLPerf Tiny's anomaly detector, of 640 features of sound, which it learns to give back. Source: Banbury et al.,
    arXiv:2106.07597, after DCASE 2020's baseline."""
    from itertools import pairwise
    from math import prod

    from torch import nn

    features = [prod(input_shape[1:]), *[width] * 4, max(1, width // 16), *[width] * 4]
    hidden = [
        part
        for inputs, outputs in pairwise(features)
        for part in (nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())
    ]
    flat = [nn.Flatten()] if len(input_shape) > 2 else []
    return nn.Sequential(*flat, *hidden, nn.Linear(width, classes))
