"""What fits in how many bytes, and what it costs: `python benchmarks/memory.py measure [passes] [images]` times steps
of several passes in turns with the step of one pass, and takes steps on images of 224x224 apart by the size of what
their convolutions write, into results/memory.json; it writes the tables of docs/memory.md, without `measure` these
alone. One thread, processor time, ten minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from importlib import metadata
from typing import Any

import documents
import numpy as np
from depthwise import HERE, RESULTS, ratio, timed

import mest_compile as mest
from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically, write_json
from mest_compile.ir.program import PRODUCTS
from mest_compile.measuring.benchmark import machine
from mest_compile.measuring.profiling import profile
from mest_compile.models.catalog import build_model

FILE, DOCUMENT = RESULTS / "memory.json", HERE.parent / "docs" / "memory.md"
MODEL, WIDTH, SIZE = "resnet32", 32, (3, 32, 32)
BATCHES, FORMATS, CUTS = (64, 16), ("float32", "float16"), (1, 2, 4, 8)
SPARSE = {"scheme": "block", "sparsity": 0.9, "threads": 1}
NETS = {  # of 224x224: what is counted, and kernel sizes
    "resnet18": ("ResNet-18, 3x3 (112x112: the 7x7 stem)", (3, 7)),
    "mobilenetv2": ("MobileNetV2, sparse 1x1", (1,)),
}
IMAGES, MAPS = (4, 3, 224, 224), (112, 56, 28, 14, 7)
PHASES = {"forward": "forward", "grad_input": "input gradient", "grad_weight": "weight gradient"}
ROUNDS = 9


def measure_passes(batch: int, activations: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """{examples of a pass: seconds and planned bytes}."""
    shape, rng = (batch, *SIZE), np.random.default_rng(0)
    images, labels = rng.standard_normal(shape, np.float32), rng.integers(0, 10, batch)
    steps = {
        str(batch // cut): mest.compile(
            build_model(MODEL, shape, width=WIDTH), shape, microbatch=batch // cut, activations=activations, **SPARSE
        )
        for cut in CUTS
    }
    turns = {name: lambda step=step: step(images, labels, lr=0.01) for name, step in steps.items()}
    seconds = timed(turns, rounds)
    return {name: {"seconds": seconds[name], "planned_bytes": step.memory()["total"]} for name, step in steps.items()}


def measure_images(model: str, repeats: int = ROUNDS) -> dict[str, Any]:
    """Planned bytes, seconds of a step, and of the layers that count, by output size and phase, useful GFLOP/s."""
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal(IMAGES, np.float32), rng.integers(0, 10, IMAGES[0])
    step = mest.compile(build_model(model, IMAGES), IMAGES, **SPARSE)
    seconds = timed({"step": lambda: step(images, labels, lr=0.01)}, repeats)["step"]
    work: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for layer in profile(step, images, labels, repeats).layers:
        stem = layer.weight_shape[1] == IMAGES[1]
        counts = layer.weight_shape[-1] in NETS[model][1] and len(layer.weight_shape) == 4
        if counts and (layer.live_weights < np.prod(layer.weight_shape) or (stem and layer.weight_shape[-1] == 7)):
            for phase in PHASES.keys() & layer.seconds.keys():
                work[phase][str(layer.output_size[0])] += PRODUCTS[phase] * layer.flop
                spent[phase][str(layer.output_size[0])] += layer.seconds[phase]
    rates = {
        phase: {size: work[phase][size] / spent[phase][size] / 1e9 for size in sizes} for phase, sizes in work.items()
    }
    return {"planned_bytes": step.memory()["total"], "seconds": seconds, "gflops": rates}


def passes_table(found: dict[str, Any]) -> str:
    lines = ["| batch, activations | examples of a pass | planned MiB | of one pass | time |", "|---|" + "---:|" * 4]
    for case, passes in found.items():
        one = next(iter(passes.values()))
        for examples, told in passes.items():
            planned = told["planned_bytes"]
            share, times = planned / one["planned_bytes"], ratio(told["seconds"], one["seconds"])
            lines.append(f"| {case} | {examples} | {planned / 2**20:.1f} | {share:.2f} | {times:.2f} |")
    return "\n".join(lines) + "\n"


def images_table(found: dict[str, Any]) -> str:
    sizes = " | ".join(f"{size}x{size}" for size in MAPS)
    lines = [f"| net | planned MiB | step ms | phase | {sizes} |", "|---|---:|---:|---|" + "---:|" * len(MAPS)]
    for model, told in found.items():
        planned, milliseconds = told["planned_bytes"] / 2**20, statistics.median(told["seconds"]) * 1e3
        head = f"| {NETS[model][0]} | {planned:.0f} | {milliseconds:.0f}"
        for phase, name in PHASES.items():
            rates = told["gflops"][phase]
            cells = " | ".join(f"{rates[str(size)]:.0f}" if str(size) in rates else "" for size in MAPS)
            lines.append(f"{head} | {name} | {cells} |")
            head = "| | |"
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="*", help="measure, and passes or images; both by default")
    asked = parser.parse_args().what
    results: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    if unknown := set(asked) - {"measure", "passes", "images"}:
        parser.error(f"{', '.join(sorted(unknown))}: there are measure, passes and images")
    made_on = {
        "machine": machine(),
        "versions": {name: metadata.version(name) for name in ("mest-compile", "apache-tvm", "numpy")},
        "case": {"sparse": SPARSE, "model": MODEL, "width": WIDTH, "images": list(IMAGES)},
    }
    try:
        if "measure" in asked:
            wanted = [what for what in ("passes", "images") if what in asked] or ["passes", "images"]
            if "passes" in wanted:
                found = {
                    f"{batch}, {activations}": measure_passes(batch, activations)
                    for batch in BATCHES
                    for activations in FORMATS
                }
                results["passes"] = {"found": found, **made_on}
            if "images" in wanted:
                results["images"] = {"found": {model: measure_images(model) for model in NETS}, **made_on}
            results["command"] = "python benchmarks/memory.py measure"
            write_json(FILE, results)
    except MestError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    page = DOCUMENT.read_text()
    for what, table in {"passes": passes_table, "images": images_table}.items():
        page = documents.embed(page, table(results[what]["found"]), what)
    write_atomically(DOCUMENT, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
