"""Ten steps beside masked dense torch: `python benchmarks/equal.py [scheme ...]` for batches 1 to 17 in
every scheme, of a net with 1x1, 3x3, 5x5 and 7x7 convolutions, strides of 2, odd maps and residuals. Prints how far
losses and weights are apart; ends with 1 where that is more than rounding. Kernels are not optimised by LLVM, so that
compiling all of them takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
from torch import nn

import mest_compile as mest
from mest_compile.hardware.target import find_target

BATCHES = range(1, 18)
SIZE, CLASSES, STEPS = (3, 17, 13), 12, 10
SCHEMES = {  # scheme, layers that it leaves dense
    "dense": [],
    "unstructured": [],
    "block": [],
    "block:1x4": ["conv1", "fc"],
    "pattern": ["conv1", "conv2", "shortcut", "fc"],
    "filter": ["conv1", "fc"],
    "channel": ["conv1", "fc"],
    "2:4": ["conv1"],
}
RULE = mest.SGD(lr=0.002, momentum=0.9, weight_decay=1e-3)  # slow: roundings grow with what a step moves
LOSS, WEIGHTS = 1e-4, 1e-3  # how far apart they may be, of the wanted, of the largest of a tensor
TRIES, NEAR = 20, 2e-6  # of 0, where roundings may move a number to the other side of a ReLU's jump


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 5, padding=2, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv4, self.bn4 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.shortcut, self.bn5 = nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        y = self.relu(self.bn3(self.conv3(x)))
        return self.fc(self.relu(self.bn4(self.conv4(y)) + self.bn5(self.shortcut(x))).mean((2, 3)))

    def relu(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


class Watched(Net):
    """Knows how near to 0, where its slope jumps, the last forward pass gave a number to a ReLU."""

    nearest = float("inf")

    def relu(self, x: torch.Tensor) -> torch.Tensor:
        there = x.detach().abs()[x.detach() != 0]  # a dead filter's are 0 on both sides
        self.nearest = min(self.nearest, float(there.min()) if len(there) else float("inf"))
        return x.relu()


def drawn(model: Watched, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Images that no rounding moves across a jump: two right steps would go different ways from there."""
    for _ in range(TRIES):
        images = rng.standard_normal(shape, np.float32)
        tried = deepcopy(model)  # whose statistics move
        tried.nearest = float("inf")
        tried(torch.from_numpy(images))
        if tried.nearest > NEAR:
            break
    return images


def apart(scheme: str, batch: int) -> tuple[float, float]:
    """(largest relative distance of a loss, of a weight or statistic from the largest of its tensor) after ten."""
    torch.manual_seed(batch)
    model, shape, rng = Net(), (batch, *SIZE), np.random.default_rng(batch)
    local = find_target("local")
    hasty = replace(local, llvm=(*local.llvm, ("opt-level", 0)))
    said = {} if scheme in ("dense", "2:4") else {"sparsity": 0.75}
    step = mest.compile(
        model, shape, scheme=scheme, dense_layers=SCHEMES[scheme], optimizer=RULE, target=hasty, threads=1, **said
    )
    model = Watched()
    mest.to_torch(step, model)
    masks = {name: torch.from_numpy(mask) for name, mask in step.masks().items()}
    model.train()
    rule = torch.optim.SGD(model.parameters(), RULE.lr, RULE.momentum, weight_decay=RULE.weight_decay)
    losses = 0.0
    for _ in range(STEPS):
        images, labels = drawn(model, shape, rng), rng.integers(0, CLASSES, batch)
        rule.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(labels))
        loss.backward()
        for name, parameter in model.named_parameters():
            if name in masks and parameter.grad is not None:
                parameter.grad *= masks[name]
        rule.step()
        losses = max(losses, abs(step(images, labels).loss / loss.item() - 1))
    state = step.state_dict()
    far = [
        np.abs(state[name] - value.numpy()).max() / max(np.abs(value.numpy()).max(), 1e-12)
        for name, value in model.state_dict().items()
    ]
    return losses, float(max(far))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("schemes", nargs="*", metavar="scheme", help="all by default")
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    arguments = parser.parse_args()
    failed = 0
    print("| scheme | batch | loss | weights |\n|---|---:|---:|---:|")
    for scheme in arguments.schemes or SCHEMES:
        for batch in arguments.batches:
            loss, weights = apart(scheme, batch)
            wrong = not (loss <= LOSS and weights <= WEIGHTS)
            failed += wrong
            print(f"| {scheme} | {batch} | {loss:.1e} | {weights:.1e} |{' TOO FAR' * wrong}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
