"""Activations in float16 against float32: `python benchmarks/float16.py PART ...` measures parts of
results/float16.json and writes the tables of docs/memory.md.

accuracy  whole trainings on Fashion-MNIST with the same seeds
speed     whole steps of the wide ResNet-32 in turns, two processes; the machine should have nothing else to do
cycles    modelled cycles on a Cortex-A76
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Any

import documents
from neon import HERE, LAYERS, TARGET
from run import RESULTS, WIDE

from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically, write_json
from mest_compile.measuring.benchmark import compare, machine
from mest_compile.options import StepOptions

FILE, DOCUMENT = RESULTS / "float16.json", HERE.parent / "docs" / "memory.md"
embed = partial(documents.embed, what="float16")
ACTIVATIONS = ("float32", "float16")
SCHEMES = ("block:4x1", "pattern", "unstructured")
DATA, MODEL, BATCH, EPOCHS, SEEDS = "fashion-mnist", "resnet20", 64, 2, (0, 1, 2)
ROUNDS = 9


def accuracy(names: Sequence[str] = ACTIVATIONS, data: str = DATA, epochs: int = EPOCHS) -> dict[str, Any]:
    """Test accuracy of every seed and what the batches' losses were at the end."""
    import mest_compile as mest
    from mest_compile.compiling import compile_step
    from mest_compile.data import load
    from mest_compile.models.catalog import build_model

    split = load(data)
    shape = (BATCH, *split.train.images.shape[1:])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in SEEDS:
        for name, runs in found.items():
            recipe = mest.Recipe(epochs=epochs, method="em_s", lr=0.1, seed=seed, drop_last=True)
            options = recipe.step_options(StepOptions(threads=1, activations=name))
            step = compile_step(build_model(MODEL, shape, 10, None, seed), shape, options)
            run = mest.Trainer(step, recipe).fit(split.train, split.test)
            runs.append({"seed": seed, "test_accuracy": run.test_accuracy, "loss": run.history[-1]["loss"]})
            print(f"seed {seed}, {name}: {run.test_accuracy:.4f}", file=sys.stderr)
    return {
        "data": data,
        "model": MODEL,
        "scheme": "block:4x1",
        "sparsity": 0.9,
        "method": "em_s",
        "epochs": epochs,
        "runs": found,
    }


def speed() -> dict[str, Any]:
    """Comparisons with ourselves in float32, and planned bytes."""
    return {
        "comparisons": [
            compare(
                WIDE.but(scheme=scheme, threads=threads, activations="float16"), "mest-float32", repeats=ROUNDS
            ).to_dict()
            for scheme in SCHEMES[::2]
            for threads in (1, 2)
        ]
    }


def modelled() -> dict[str, Any]:
    from mest_compile.frontend import import_model
    from mest_compile.measuring.analysis import analyse

    few = replace(WIDE, input_shape=(8, *WIDE.input_shape[1:])).but(target=TARGET)
    graph, _ = import_model(few.network(), few.input_shape)
    return {
        "target": TARGET,
        "layers": LAYERS,
        "schemes": {
            scheme: {
                name: analyse(graph, few.but(scheme=scheme, activations=name).options, LAYERS).to_dict()["totals"]
                for name in ACTIVATIONS
            }
            for scheme in SCHEMES
        },
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"accuracy": accuracy, "speed": speed, "cycles": modelled}


def accuracies(trained: dict[str, Any]) -> list[str]:
    """Lines of what `accuracy` found."""
    lines = [
        "",
        f"| {trained['model']}, {trained['data']}, {trained['epochs']} epochs | test accuracy of seeds "
        f"{', '.join(str(run['seed']) for run in trained['runs']['float32'])} | mean |",
        "|---|---|---:|",
    ]
    for name, runs in trained["runs"].items():
        found = [run["test_accuracy"] for run in runs]
        lines.append(f"| {name} | {', '.join(f'{one:.2%}' for one in found)} | {statistics.mean(found):.2%} |")
    return lines


def table(results: dict[str, Any]) -> str:
    """Markdown: what is gained on this machine, then accuracy, then modelled cycles."""
    lines = [
        "| scheme | threads | float32 ms | float16 ms | times as fast | interval | planned MiB | instead of | "
        "peak MiB | instead of |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in results["speed"]["comparisons"]:
        ours, rival, (low, high, _) = one["ours"], one["rival"], one["ratio_interval"]
        lines.append(
            f"| {one['case']['scheme']} | {one['case']['threads']} | {rival['median_seconds'] * 1e3:.1f} | "
            f"{ours['median_seconds'] * 1e3:.1f} | {one['ratio']:.2f} | {low:.2f} to {high:.2f} | "
            + " | ".join(
                f"{side[kind] / 2**20:.0f}"
                for kind in ("planned_bytes", "training_peak_bytes")
                for side in (ours, rival)
            )
            + " |"
        )
    lines += accuracies(results["accuracy"])
    lines += [
        "",
        f"| modelled cycles, {results['cycles']['target']} | forward | input gradient | weight gradient | all |",
        "|---|---:|---:|---:|---:|",
    ]
    for scheme, found in results["cycles"]["schemes"].items():
        phases = ("forward", "grad_input", "grad_weight", "all")
        shares = [
            found["float16"][phase]["sparse_cycles"] / found["float32"][phase]["sparse_cycles"] for phase in phases
        ]
        lines.append(f"| {scheme}, float16 over float32 | {' | '.join(f'{share:.2f}' for share in shares)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "parts", nargs="*", help=f"to measure: {', '.join(PARTS)}; none: the tables are written from what is there"
    )
    wanted = parser.parse_args().parts
    if unknown := set(wanted) - PARTS.keys():
        parser.error(f"there is no part {min(unknown)}")
    results: dict[str, Any] = {"command": "python benchmarks/float16.py accuracy speed cycles", "case": WIDE.to_json()}
    if FILE.exists():
        results = json.loads(FILE.read_text())
    try:
        for part in wanted:
            results |= {part: PARTS[part](), "machine": machine(), "tvm": metadata.version("apache-tvm")}
            write_json(FILE, results)
    except MestError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    if PARTS.keys() <= results.keys():
        write_atomically(DOCUMENT, embed(DOCUMENT.read_text(), table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
