"""A multi-layer perceptron."""

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
