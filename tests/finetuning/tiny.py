"""A small net, and pictures whose classes their colours tell, mixed with noise."""

import numpy as np
import torch
from torch import nn

from mest_compile.models.inputs import Inputs

INPUTS = Inputs((12, 12), 1.0, (120.0, 125.0, 130.0), (60.0, 62.0, 64.0))
CLASSES = 3


class Tiny(nn.Module):
    """A stem, three residual blocks of two convolutions, and a classifier of 7 classes."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(self.block(width) for _ in range(3))
        self.fc = nn.Linear(width, 7)

    @staticmethod
    def block(width):
        return nn.Sequential(
            *(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()),
            *(nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.fc(x.mean((2, 3)))


def tiny(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tiny().eval()


def pictures(count, seed=0):
    """(images (count, 3, 12, 12) uint8, labels): the channel of its label is brighter."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 200, (count, 3, 12, 12)), np.arange(count) % CLASSES
    images[np.arange(count), labels] += 40
    return images.astype(np.uint8), labels


def scaled(images):
    """As the net was trained."""
    shape = (1, 3, 1, 1)
    return (images.astype(np.float32) - np.reshape(INPUTS.mean, shape)) / np.reshape(INPUTS.std, shape)
