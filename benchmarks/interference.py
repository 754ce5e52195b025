"""What a step of the wide ResNet-32, the compile workers and torch's data loading beside it cost each other. They take
turns in one run.

    python benchmarks/interference.py

writes benchmarks/results/interference.json: milliseconds a step alone, beside workers that compile, beside a
DataLoader, beside both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import mest_compile as mest
from mest_compile.kernels.source import KernelSource
from mest_compile.kernels.workers import SHARE, Workers
from mest_compile.measuring.benchmark import machine
from mest_compile.models.catalog import build_model

SHAPE, WIDTH, SPARSITY = (64, 3, 32, 32), 32, 0.9
ROUNDS, STEPS = 11, 30
RESULT = Path(__file__).parent / "results" / "interference.json"


class Images(torch.utils.data.Dataset):
    """Shifted and mirrored, as training sets usually are."""

    def __init__(self):
        self.images = torch.randn(4096, 3, 40, 40)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        image = self.images[number]
        return torch.flip(image[:, number % 8 : number % 8 + 32, :32], (2,)), number % 10


def batches():
    """Without end, from a process that is spawned: a fork would copy TVM's thread pool without its threads."""
    loader = torch.utils.data.DataLoader(
        Images(), SHAPE[0], drop_last=True, num_workers=1, multiprocessing_context="spawn", persistent_workers=True
    )
    while True:
        yield from loader


def busy(sources: list[KernelSource], workers: Workers, turn: int) -> None:
    """More than they will have done at the end of the turn."""
    workers.ask(
        KernelSource(source.kernel, source.text + "\n" * turn, source.target, source.checked) for source in sources
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--shares", default=f"{SHARE}", help="of the time that workers run, separated by commas")
    shares = list(map(float, options.parse_args().shares.split(",")))
    step = mest.compile(build_model("resnet32", SHAPE, 10, WIDTH), SHAPE, scheme="filter", sparsity=SPARSITY)
    sources = step._new_specializer(None).candidates(step.masks())
    rng = np.random.default_rng(0)
    fixed = rng.standard_normal(SHAPE).astype(np.float32), rng.integers(0, 10, SHAPE[0])
    loaded = batches()
    next(loaded)
    modes = [("alone", None, False), ("loader", None, True)]
    modes += [(f"workers {share:g}", share, False) for share in shares] + [
        (f"workers {shares[0]:g} and loader", shares[0], True)
    ]
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in modes}
    loads: dict[str, list[float]] = {name: [] for name, _, _ in modes}
    for turn in range(ROUNDS):
        for place, (name, share, loading) in enumerate(modes):
            with tempfile.TemporaryDirectory() as folder:
                workers = Workers(Path(folder), share=share or 1.0)
                if share:
                    workers.wait([KernelSource(sources[0].kernel, sources[0].text, sources[0].target)])
                    for more in range(1, 4):
                        busy(sources, workers, more)
                for number in range(STEPS):
                    start = time.perf_counter()
                    batch = next(loaded) if loading else fixed
                    begun = time.perf_counter()
                    step(*batch)
                    if turn and number > 4:
                        seconds[name].append(time.perf_counter() - begun)
                        loads[name].append(begun - start)
                if share and turn and place:
                    assert workers._asked, "the workers had nothing to do at the end"
                workers.close()
    found = {}
    for name, each in seconds.items():
        middle, mean = float(np.median(each)), float(np.mean(each))
        found[name] = {
            "milliseconds": round(middle * 1e3, 2),
            "ratio": round(middle / float(np.median(seconds["alone"])), 3),
            "mean_milliseconds": round(mean * 1e3, 2),
            "mean_ratio": round(mean / float(np.mean(seconds["alone"])), 3),
            "waiting_for_data_milliseconds": round(float(np.median(loads[name])) * 1e3, 2),
        }
    for name, each in found.items():
        print(name, each, flush=True)
    RESULT.write_text(
        json.dumps({"command": "python benchmarks/interference.py", "machine": machine(), "modes": found}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
