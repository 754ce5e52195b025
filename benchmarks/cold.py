"""How long convolution kernels wait for memory: each with its images in cache, and with images that have to be fetched.

    python benchmarks/cold.py

writes benchmarks/results/cold.json: per scheme and kind of kernel, milliseconds of a step's calls on one thread, called
again on the same arrays, on others in turn, more than the caches hold, and as tuning has them: on others of which is
cached what the call before touches.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

from mest_compile.base.files import write_json
from mest_compile.compiling import compile_step
from mest_compile.kernels.cache import Builder
from mest_compile.measuring.benchmark import machine
from mest_compile.measuring.case import Case
from mest_compile.tuning.task import Task, prepare, tasks_of
from mest_compile.tuning.worker import copies_of

CASE, SCHEMES, ROUNDS = Case("resnet32", width=32), ("block:4x1", "pattern", "unstructured"), 40
RESULT = Path(__file__).parent / "results" / "cold.json"
STATES = ("cached", "fetched", "as tuning has them")


def measure(scheme: str, rounds: int) -> dict[str, dict[str, float]]:
    """{kernel and phase: {state: ms of all its calls}} of the kernels that a step runs on."""
    builder = Builder()
    step = compile_step(CASE.network(), CASE.input_shape, CASE.but(scheme=scheme).options, builder=builder)
    phases = {call.name: call.phase or call.stage for call in step.program.calls}
    target, choices = step._compiled.facts.target, step.kernel_choices()
    found: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(STATES, 0.0))
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks_of(step.program, step.layers, target, Path(folder)):
            prepare(task, step.program, step.layers, builder)
            kernel = builder.function(task.source(choices[task.name].knobs))
            for state, seconds in _seconds(task, kernel, rounds).items():
                found[f"{task.kernel} {phases[task.name]}"][state] += 1e3 * task.calls * seconds
    return {kind: {state: round(times[state], 1) for state in STATES} for kind, times in found.items()}


def _seconds(task: Task, kernel: Any, rounds: int) -> dict[str, float]:
    import tvm

    tvm.get_global_func("runtime.config_threadpool")(1, 1)
    arrays, copies = copies_of(task.arrays)
    seconds: dict[str, list[float]] = {state: [] for state in STATES}
    for turn in range(rounds):
        for state, times in seconds.items():
            copy = copies[turn % len(copies)]
            if state == "cached":
                kernel(*copies[0])
                copy = copies[0]
            elif state == "as tuning has them":
                copy = copies[(turn + len(copies) // 2) % len(copies)]
                for place in arrays.warm:
                    copy[place].copyfrom(arrays.arguments[place])
            start = time.perf_counter()
            kernel(*copy)
            times.append(time.perf_counter() - start)
    return {state: statistics.median(times) for state, times in seconds.items()}


def main() -> None:
    found = {}
    for scheme in SCHEMES:
        found[scheme] = measure(scheme, ROUNDS)
        print(scheme, json.dumps(found[scheme], indent=1), flush=True)
    write_json(
        RESULT,
        {
            "command": "python benchmarks/cold.py",
            "machine": machine(),
            "rounds": ROUNDS,
            "milliseconds": found,
            "versions": {name: metadata.version(name) for name in ("mest-compile", "apache-tvm", "numpy")},
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


if __name__ == "__main__":
    main()
