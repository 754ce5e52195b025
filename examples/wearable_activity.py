"""Wearable activity: a 1-D CNN tells four motions apart by a watch's accelerometer and gyroscope, 80% of the weights
zero.

python examples/wearable_activity.py            # BasicMotions, which aeon ships (pip install "mest-compile[series]")
python examples/wearable_activity.py --quick    # drawn motions of the same shape, two epochs, for the tests
python examples/wearable_activity.py --picture motions.png
"""

import argparse
from itertools import pairwise

import numpy as np
import torch
from torch import nn

import mest_compile as mest

MOTIONS = ("badminton", "running", "standing", "walking")
CHANNELS, LENGTH = 6, 100  # three axes of each sensor; ten seconds

Series = tuple[np.ndarray, np.ndarray]  # (n, CHANNELS, LENGTH) float32, labels (n,)


class Net(nn.Module):
    """Three convolutions over time, halved after each, and a linear layer on the mean."""

    def __init__(self, width: int = 32):
        super().__init__()
        sizes = (CHANNELS, width, 2 * width, 2 * width)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv1d(a, b, 5, padding=2, bias=False), nn.BatchNorm1d(b), nn.ReLU(), nn.MaxPool1d(2))
                for a, b in pairwise(sizes)
            )
        )
        self.fc = nn.Linear(sizes[-1], len(MOTIONS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(x).mean(2))


def drawn(count: int, rng: np.random.Generator) -> Series:
    """Motions that swing as fast and as far as those that were measured, more or less."""
    labels = np.arange(count) % len(MOTIONS)
    time = np.arange(LENGTH) / 10
    swings, sizes = np.array([1.2, 2.5, 0.1, 1.6])[labels], np.array([8.0, 10.0, 0.3, 3.0])[labels]
    phase = rng.uniform(0, 2 * np.pi, (count, CHANNELS, 1))
    series = sizes[:, None, None] * np.sin(2 * np.pi * swings[:, None, None] * time + phase)
    return (series + rng.normal(0, 0.5, series.shape)).astype(np.float32), labels


def measured(part: str) -> Series:
    """BasicMotions' training or test part, 40 series each."""
    from aeon.datasets import load_basic_motions

    series, names = load_basic_motions(split=part)
    return series.astype(np.float32), np.array([MOTIONS.index(name) for name in names])


def draw(train: Series, path: str) -> None:
    """A series of each motion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.2), layout="constrained")
    for label, axes in enumerate(figure.subplots(1, len(MOTIONS), sharey=True)):
        axes.plot(train[0][train[1] == label][0].T, linewidth=0.8)
        axes.set(title=MOTIONS[label], xticks=[])
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="drawn motions, two epochs")
    parser.add_argument("--picture", help="PNG file for a series of each motion")
    given = parser.parse_args()

    rng = np.random.default_rng(0)
    train, test = (drawn(40, rng), drawn(40, rng)) if given.quick else (measured("train"), measured("test"))
    if given.picture:
        draw(train, given.picture)
    mean, std = (f(train[0], axis=(0, 2), keepdims=True) for f in (np.mean, np.std))  # each sensor by its own
    train, test = (((series - mean) / std, labels) for series, labels in (train, test))
    torch.manual_seed(0)
    step = mest.compile(Net(), (8, CHANNELS, LENGTH), scheme="block", sparsity=0.8)
    recipe = mest.Recipe(epochs=2 if given.quick else 40, method="em", lr=0.02, augment=False)
    run = mest.Trainer(step, recipe).fit(train, test)
    print(f"test accuracy {run.test_accuracy:.1%} of {len(test[1])} series, sparsity {step.sparsity()}")
    print(f"a step holds {step.memory()['total'] / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
