"""What a mutation of the wide ResNet-32 costs the thread that trains, beside a step. Steps and mutations take turns in
one run.

    python benchmarks/reindex.py

writes benchmarks/results/reindex.json: milliseconds of a mutation that moves 2% of all weights, of what it takes to
re-index every layer once the units are chosen, and of a step.
"""

from __future__ import annotations

import json
import time
from importlib import metadata
from pathlib import Path
from statistics import median

import numpy as np

import mest_compile as mest
from mest_compile.base.files import write_json
from mest_compile.measuring.benchmark import machine
from mest_compile.models.catalog import build_model

SHAPE, WIDTH, SPARSITY, PRUNE_TO = (64, 3, 32, 32), 32, 0.9, 0.92
SCHEMES, THREADS, TURNS, WARM = ("unstructured", "block:4x1", "pattern", "filter", "channel"), (1, 2), 40, 5
RESULT = Path(__file__).parent / "results" / "reindex.json"


def measure(scheme: str, threads: int) -> dict[str, float]:
    step = mest.compile(
        build_model("resnet32", SHAPE, 10, WIDTH), SHAPE, scheme=scheme, sparsity=SPARSITY, threads=threads
    )
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal(SHAPE, np.float32), rng.integers(0, 10, SHAPE[0])
    steps, mutations, reindexed = [], [], []
    for _ in range(WARM + TURNS):
        start = time.perf_counter()
        step(images, labels, lr=1e-3)
        steps.append(time.perf_counter() - start)
        report = step.mutate(PRUNE_TO, SPARSITY)
        assert "recompiled" not in report.layers.values() and "re-indexed" in report.layers.values()
        mutations.append(report.seconds)
        reindexed.append(report.reindex_seconds)
    step_seconds, found = median(steps[WARM:]), {"step_ms": round(1e3 * median(steps[WARM:]), 1)}
    for what, all_seconds in (("reindex", reindexed[WARM:]), ("mutation", mutations[WARM:])):
        found |= {
            f"{what}_ms": round(1e3 * median(all_seconds), 2),
            f"{what}_ratio": round(median(all_seconds) / step_seconds, 3),
            f"{what}_lowest_ms": round(1e3 * min(all_seconds), 2),
            f"{what}_highest_ms": round(1e3 * max(all_seconds), 2),
        }
    return found


def main() -> None:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for threads in THREADS:
        for scheme in SCHEMES:
            found.setdefault(f"{threads} threads", {})[scheme] = measure(scheme, threads)
            print(threads, scheme, json.dumps(found[f"{threads} threads"][scheme]), flush=True)
    write_json(
        RESULT,
        {
            "command": "python benchmarks/reindex.py",
            "machine": machine(),
            "turns": TURNS,
            "threads": found,
            "versions": {name: metadata.version(name) for name in ("mest-compile", "apache-tvm", "numpy")},
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


if __name__ == "__main__":
    main()
