"""How long compiling every sparse layer of the wide ResNet-32 again takes: two warm workers, nothing in the cache.

    python benchmarks/recompile.py

writes benchmarks/results/recompile.json: kernels, seconds until the last one is there, seconds of processor time.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

import mest_compile as mest
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import KernelSource
from mest_compile.kernels.workers import Workers
from mest_compile.measuring.benchmark import machine
from mest_compile.models.catalog import build_model

SHAPE, WIDTH, SPARSITY = (64, 3, 32, 32), 32, 0.9
REPEATS = 3
RESULT = Path(__file__).parent / "results" / "recompile.json"


def cpu_seconds(pid: int) -> float:
    """Of a process and the linkers that it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def specialized_kernels(scheme: str) -> list[KernelSource]:
    step = mest.compile(build_model("resnet32", SHAPE, 10, WIDTH), SHAPE, scheme=scheme, sparsity=SPARSITY)
    return step._new_specializer(None).candidates(step.masks())


def measure(sources: list[KernelSource]) -> dict[str, float]:
    """Of two workers that have compiled something before."""
    with tempfile.TemporaryDirectory() as folder:
        workers = Workers(Path(folder), count=2)
        try:
            workers.wait(
                [
                    KernelSource(source.kernel, source.text + "\n" * (1 + place), source.target)
                    for place, source in enumerate(sources[:2])
                ]
            )
            before = sum(cpu_seconds(process.pid) for process in workers.processes)
            start = time.perf_counter()
            built = workers.wait(sources)
            seconds = time.perf_counter() - start
            used = sum(cpu_seconds(process.pid) for process in workers.processes) - before
            assert not any(one.problem for one in built)
            start = time.perf_counter()
            Builder(Path(folder)).build(sources)
            return {"seconds": seconds, "cpu_seconds": used, "load_seconds": time.perf_counter() - start}
        finally:
            workers.close()


def main() -> None:
    found: dict[str, object] = {}
    for scheme in ("filter", "channel"):  # the schemes whose layers have a structure to bake in
        sources = specialized_kernels(scheme)
        rounds = [measure(sources) for _ in range(REPEATS)]
        medians = {name: round(float(np.median([each[name] for each in rounds])), 3) for name in rounds[0]}
        found[scheme] = {"kernels": len(sources)} | medians
        print(scheme, found[scheme], flush=True)
    RESULT.write_text(
        json.dumps({"command": "python benchmarks/recompile.py", "machine": machine(), "schemes": found}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
