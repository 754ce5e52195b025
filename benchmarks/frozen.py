"""What frozen blocks spare: `python benchmarks/frozen.py measure` times whole steps of which the last blocks train in
turns with full ones, in seconds of the processor, as others use the machine, too; `--only NAME` those of one net. They
go into results/frozen.json and the table of docs/finetuning.md; without `measure` the table alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import documents
import numpy as np
import torch
from neon import HERE
from run import RESULTS
from torch import nn

from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically, write_json
from mest_compile.measuring.benchmark import machine
from mest_compile.models.catalog import build_model

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep

FILE, DOCUMENT = RESULTS / "frozen.json", HERE.parent / "docs" / "finetuning.md"
embed = partial(documents.embed, what="frozen")
SHAPE, SCHEME, SPARSITY, CLASSES = (16, 3, 96, 96), "block", 0.9, 10
TRAINED = (None, "last:5", "last:3")  # None: all
ROUNDS = 15
LITE_WIDTHS = (16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320)
LITE_STRIDES = {1: 2, 3: 2, 5: 2, 11: 2}


class Block(nn.Module):
    """Two 3x3 convolutions, and what went in."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.downsample(x)).relu()


def resnet18() -> nn.Module:
    """ResNet-18 with its 7x7 stem and its pool."""
    blocks, inputs = [], 64
    for stage in range(4):
        for index in range(2):
            outputs = 64 << stage
            blocks.append(Block(inputs, outputs, 2 if stage and not index else 1))
            inputs = outputs
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inputs, CLASSES),
    )


class FusedBlock(nn.Module):
    """A 3x3 convolution to six times the channels, a 1x1 convolution to the result, and what went in where it fits: the
    block of dense convolutions that stands for EfficientNet's in its later kin (Tan and Le, arXiv:2104.00298)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int):
        super().__init__()
        inner = inputs * expand
        self.expand, self.bn1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.project, self.bn2 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.act, self.same = nn.ReLU6(), stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.project(self.act(self.bn1(self.expand(x)))))
        return y + x if self.same else y


def lite() -> nn.Module:
    """EfficientNet-lite0's sixteen blocks, widths and strides, of dense convolutions."""
    blocks, inputs = [], 32
    for number, outputs in enumerate(LITE_WIDTHS):
        blocks.append(FusedBlock(inputs, outputs, LITE_STRIDES.get(number, 1), 6 if number else 1))
        inputs = outputs
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(),
        *blocks,
        nn.Conv2d(inputs, 1280, 1, bias=False),
        nn.BatchNorm2d(1280),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1280, CLASSES),
    )


def lite0() -> nn.Module:
    """EfficientNet-lite0 itself, with its depthwise convolutions."""
    return build_model("efficientnet-lite0", SHAPE, CLASSES)


MODELS = {"ResNet-18": resnet18, "EfficientNet-lite0": lite0, "EfficientNet-lite0, dense": lite}


def measure(name: str, shape: tuple[int, ...] = SHAPE, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of the processor of every round of each step, one thread, and planned bytes."""
    import mest_compile as mest

    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal(shape, np.float32), rng.integers(0, CLASSES, shape[0])
    steps = {}
    for trained in TRAINED:
        torch.manual_seed(0)
        steps[trained or "all"] = mest.compile(
            MODELS[name](), shape, scheme=SCHEME, sparsity=SPARSITY, threads=1, trainable=trained
        )
    seconds = in_turns(steps, images, labels, rounds, process_time)
    memory = {trained: step.memory() for trained, step in steps.items()}
    return {"seconds": seconds, "memory": memory, "machine": machine()}


def in_turns(
    steps: Mapping[str, TrainStep],
    images: Any,
    labels: Any,
    rounds: int,
    now: Callable[[], float] = perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every round of each step, by the clock `now`."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            begun = now()
            step(images, labels, lr=0.01)
            if turn > 1:
                seconds[name].append(now() - begun)
    return seconds


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every model and what of it trains: milliseconds, MiB, and their shares of the full step's."""
    found = []
    for name, one in results["models"].items():
        full_seconds, full = one["seconds"]["all"], one["memory"]["all"]
        for trained, seconds in one["seconds"].items():
            memory = one["memory"][trained]
            found.append(
                {
                    "model": name,
                    "trained": trained,
                    "milliseconds": statistics.median(seconds) * 1e3,
                    "time_share": statistics.median(mine / theirs for mine, theirs in zip(seconds, full_seconds)),
                    "activations_share": memory["activations"] / full["activations"],
                    "optimizer_share": memory["optimizer"] / full["optimizer"],
                    "total_mib": memory["total"] / 2**20,
                }
            )
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| model | trained | ms a step | of the full step | its activations | its optimizer state | planned MiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows(results):
        lines.append(
            f"| {row['model']} | {row['trained']} | {row['milliseconds']:.1f} | {row['time_share']:.2f} | "
            f"{row['activations_share']:.3f} | {row['optimizer_share']:.2f} | {row['total_mib']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=["measure"])
    parser.add_argument("--only", choices=[*MODELS], help="measure this net alone; the others stay as they are")
    results: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    try:
        if (chosen := parser.parse_args()).what:
            names = [chosen.only] if chosen.only else [*MODELS]
            found = results.get("models", {}) | {name: measure(name) for name in names}
            results = {
                "command": "python benchmarks/frozen.py measure",
                "case": {"input_shape": SHAPE, "scheme": SCHEME, "sparsity": SPARSITY, "threads": 1},
                "tvm": metadata.version("apache-tvm"),
                "models": {name: found[name] for name in MODELS if name in found},
            }
            write_json(FILE, results)
    except MestError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    write_atomically(DOCUMENT, embed(DOCUMENT.read_text(), table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
