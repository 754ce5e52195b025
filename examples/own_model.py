"""Bring your own model: any torch module made of the supported operators compiles, whatever its class.

python examples/own_model.py            # 200 steps
python examples/own_model.py --quick    # 20 steps, for the tests
"""

import argparse

import numpy as np
import torch
from torch import nn

import mest_compile as mest


class Tiny(nn.Module):
    """Two convolutions of odd sizes with a shortcut around the second, for 17x17 images of 2 channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.body = nn.Conv2d(12, 12, 5, padding=2, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.body(x))
        return self.head(self.pool(x).mean((2, 3)))


def batches(count: int, batch: int):
    """Noise in which one of the two channels is brighter or darker: four labels."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        images = rng.standard_normal((batch, 2, 17, 17), dtype=np.float32)
        labels = rng.integers(0, 4, batch)
        images[np.arange(batch), labels % 2] += np.where(labels < 2, 0.5, -0.5)[:, None, None]
        yield images, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps")
    steps = 20 if parser.parse_args().quick else 200

    torch.manual_seed(0)
    model = Tiny()
    step = mest.compile(
        model,
        input_shape=(32, 2, 17, 17),
        scheme="block",
        sparsity=0.8,
        dense_layers=["stem.weight", "head.weight"],
        optimizer=mest.SGD(lr=0.05, momentum=0.9),
    )
    losses = [step(images, labels).loss for images, labels in batches(steps, 32)]
    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")

    mest.to_torch(step, model)
    zeros = (model.body.weight == 0).float().mean().item()
    print(f"body.weight in the torch module: {zeros:.0%} zeros")


if __name__ == "__main__":
    main()
