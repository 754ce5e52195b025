"""What a second thread gains, operator by operator: `python benchmarks/threads.py NAME` writes
benchmarks/results/NAME.json.

Two steps of the wide ResNet-32 live in one process and take turns, one on one thread, one on two; every figure is a
median over all rounds.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from importlib import metadata
from typing import Any

from run import RESULTS, WIDE

from mest_compile.base.files import write_json
from mest_compile.measuring.benchmark import machine

THREADS = (1, 2)
SCHEMES = ("block:4x1", "unstructured")
LEAST_SHARE = 0.01  # of the step: operators below it are joined in one row


def measure(scheme: str, rounds: int) -> dict[str, Any]:
    """{"step": [seconds a thread count], "operators": {"kernel, phase": the same}}."""
    from mest_compile.compiling import compile_step
    from mest_compile.measuring.profiling import profile

    images, labels = WIDE.batch()
    model = WIDE.network()
    steps = [
        compile_step(model, WIDE.input_shape, WIDE.but(scheme=scheme, threads=threads).options) for threads in THREADS
    ]
    seen: list[list[dict[str, float]]] = [[] for _ in THREADS]
    for _ in range(rounds):
        for passes, step in zip(seen, steps):
            found = profile(step, images, labels, repeats=3)
            passes.append(
                {f"{row.kernel} {row.phase}".strip(): row.seconds for row in found.operators}
                | {"step": found.step_seconds}
            )
    medians = {name: [statistics.median(one[name] for one in passes) for passes in seen] for name in seen[0][0]}
    step_seconds = medians.pop("step")
    return {"step": step_seconds, "operators": medians}


def table(results: dict[str, Any]) -> str:
    """The markdown of docs/benchmarks.md."""
    lines = ["| scheme | operator | 1 thread ms | 2 threads ms | gain |", "|---|---|---:|---:|---:|"]
    for scheme, found in results["schemes"].items():
        whole = found["step"]
        large = {name: seconds for name, seconds in found["operators"].items() if seconds[0] >= LEAST_SHARE * whole[0]}
        others = [
            sum(seconds[side] for name, seconds in found["operators"].items() if name not in large)
            for side in range(len(THREADS))
        ]
        for name, (one, two) in ({"whole step": whole} | large | {"all others": others}).items():
            lines.append(f"| {scheme} | {name} | {one * 1e3:.1f} | {two * 1e3:.1f} | {one / two:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="of the file in benchmarks/results")
    parser.add_argument("--rounds", type=int, default=11)
    chosen = parser.parse_args()
    results = {
        "schemes": {scheme: measure(scheme, chosen.rounds) for scheme in SCHEMES},
        "machine": machine(),
        "command": shlex.join(["python", "benchmarks/threads.py", *sys.argv[1:]]),
        "versions": {name: metadata.version(name) for name in ("mest-compile", "apache-tvm", "torch", "numpy")},
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(RESULTS / f"{chosen.name}.json", results)
    print(table(results))


if __name__ == "__main__":
    main()
