"""Accuracy and time of training methods on all of Fashion-MNIST: `python benchmarks/accuracy.py`, hours of two cores.

Every run is a process of its own on one thread, `--jobs` of them at a time, seed by seed.
benchmarks/results/accuracy.json is written whole after each; what is in it is not run again, and a run that was stopped
goes on from its last epoch. `--pace` measures what an iteration of every kind of run costs, side by side on a machine
that should have nothing else to do: training that lasts for hours on a busy one says nothing about time. `--table`
writes the table in docs/results.md and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import documents

from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically, write_json
from mest_compile.measuring.benchmark import machine
from mest_compile.options import StepOptions
from mest_compile.sparsity import parse_scheme
from mest_compile.training.recipe import Recipe
from mest_compile.training.sieve import SieveRule

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "accuracy.json", ROOT / "docs" / "results.md"
embed = partial(documents.embed, what="accuracy table")
MODEL, WIDTH, BATCH, EPOCHS, LR, SEEDS = "resnet18", 32, 64, 8, 0.1, (0, 1, 2)
SIEVE = {"drop": 0.24, "after_epoch": 3}  # 24% of the examples in five of eight epochs: 15% of all iterations
PACE_ROUNDS, PACE_BATCHES = 7, 8
WITHIN = 0.005  # of dense accuracy: how far a run must come for "time to"


@dataclass(frozen=True, slots=True)
class Run:
    """One training. method "torch" is dense torch in channels_last on the same batches, learning rates and initial
    weights."""

    method: str
    scheme: str = "dense"
    sparsity: float = 0.0
    sieve: bool = False
    seed: int = 0
    activations: str = "float32"

    @property
    def row(self) -> str:
        """What its seeds have in common."""
        if self.method == "torch":
            return "dense torch"
        return f"{self.method} {self.scheme} {self.sparsity}{' sieve' if self.sieve else ''}{self.stored}"

    @property
    def stored(self) -> str:
        return "" if self.activations == "float32" else f" {self.activations}"

    @property
    def key(self) -> str:
        return f"{self.row} seed {self.seed}"


def runs() -> list[Run]:
    """What is published, in the order in which it is run."""
    rows = [
        ("torch", "dense", 0.0, False),
        ("em_s", "unstructured", 0.9, False),
        ("em_s", "block:4x1", 0.9, False),
        ("set", "unstructured", 0.9, False),
        ("em_s", "block:4x1", 0.9, True),
        ("em", "unstructured", 0.9, False),
        ("em_s", "unstructured", 0.9, True),
        ("static", "unstructured", 0.9, False),
        *(("em_s", scheme, 0.9, False) for scheme in ("pattern", "filter", "channel")),
        *((method, "unstructured", 0.95, False) for method in ("em_s", "em", "set", "static")),
    ]
    halves = [Run("em_s", "block:4x1", 0.9, sieve, activations="float16") for sieve in (False, True)]
    halves.append(Run("em_s", "block:4x1", 0.9, activations="bfloat16"))
    halves += [Run("em_s", "block:4x1", 0.95, activations=stored) for stored in ("float32", "float16", "bfloat16")]
    return [replace(run, seed=seed) for seed in SEEDS for run in [*(Run(*row) for row in rows), *halves]]


def recipe_of(run: Run) -> Recipe:
    """What the run is trained by."""
    return Recipe(
        EPOCHS,
        "static" if run.method == "torch" else run.method,
        lr=LR,
        seed=run.seed,
        sieve=SieveRule(**SIEVE) if run.sieve else None,
        drop_last=True,
    )  # type: ignore[arg-type]


def densities(recipe: Recipe, start: float) -> list[tuple[float, bool]]:
    """(sparsity, whether a mutation came before it) of every epoch of a resolved recipe whose model starts at sparsity
    `start`."""
    found = []
    for epoch in range(recipe.epochs):
        phase = recipe.mutation_at(epoch)
        start = phase.grow_to if phase else start
        found.append((start, phase is not None))
    return found


def kind(run: Run, sparsity: float) -> str:
    """What decides how long an iteration of the run takes while its model has that sparsity."""
    return "dense torch" if run.method == "torch" else f"{run.scheme} {run.sparsity:g} at {sparsity:g}{run.stored}"


def compiled(run: Run, shape: tuple[int, ...], classes: int) -> Any:
    """The run's step before training."""
    from mest_compile.compiling import compile_step
    from mest_compile.models.catalog import build_model

    model = build_model(MODEL, shape, classes, WIDTH, run.seed)
    if run.method == "torch":
        from torchstep import TorchStep

        return TorchStep(model, shape, classes, LR)
    options = StepOptions(parse_scheme(run.scheme), run.sparsity, threads=1, activations=run.activations)
    return compile_step(model, shape, recipe_of(run).step_options(options))


def measure_pace(data_folder: Path | None) -> dict[str, Any]:
    """Seconds of an iteration of every kind, data preparation included, and of a mutation of every scheme.

    All kinds take turns of PACE_BATCHES iterations of the training loop in one process; medians over PACE_ROUNDS
    rounds, and the spread.
    """
    from mest_compile.data import load
    from mest_compile.training.given import Given
    from mest_compile.training.loop import Trainer

    split = load("fashion-mnist", data_folder)
    few = replace(
        split.train,
        images=split.train.images[: PACE_BATCHES * BATCH],
        labels=split.train.labels[: PACE_BATCHES * BATCH],
    )
    shape, trainers, mutations = (BATCH, *few.images.shape[1:]), {}, {}
    for run in runs():
        for sparsity in {sparsity for sparsity, _ in densities(recipe_of(run).resolved(run.sparsity), run.sparsity)}:
            if kind(run, sparsity) in trainers:
                continue
            step = compiled(run, shape, few.classes)
            if sparsity != run.sparsity:
                again = [step.mutate(run.sparsity, sparsity).seconds for _ in range(3)]
                mutations[f"{run.scheme} {run.sparsity:g}{run.stored}"] = statistics.median(again)
            trainers[kind(run, sparsity)] = Trainer(step, Recipe(1, "static", lr=1e-3))
            trainers[kind(run, sparsity)]._train(0, Given(few))  # warms up
    turns: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(PACE_ROUNDS):
        for name in list(trainers)[:: 1 if number % 2 else -1]:
            turns[name].append(trainers[name]._train(0, Given(few))["train_seconds"] / PACE_BATCHES)
    return {
        "seconds": {name: statistics.median(found) for name, found in turns.items()},
        "lowest": {name: min(found) for name, found in turns.items()},
        "highest": {name: max(found) for name, found in turns.items()},
        "mutation_seconds": mutations,
        "rounds": PACE_ROUNDS,
        "batches": PACE_BATCHES,
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def train(run: Run, folder: Path, data_folder: Path | None) -> dict[str, Any]:
    """The run's entry of the results; goes on with a run that is in `folder`."""
    from mest_compile.data import load
    from mest_compile.training.loop import Trainer

    split = load("fashion-mnist", data_folder)
    step = compiled(run, (BATCH, *split.train.images.shape[1:]), split.train.classes)
    begun = (folder / "checkpoint.safetensors").exists()
    trainer = Trainer.resume(folder, step) if begun else Trainer(step, recipe_of(run), folder)
    history = trainer.fit(split.train, split.test).history
    kept = ("epoch", "loss", "test_accuracy", "train_seconds", "iterations", "iterations_saved")
    sizes = {name: mask.size for name, mask in trainer.step.masks().items()}
    zeros = sum(history[-1]["sparsity"][name] * size for name, size in sizes.items())
    return {
        "run": asdict(run),
        "epochs": [{name: metrics[name] for name in kept} for metrics in history],
        "test_accuracy": history[-1]["test_accuracy"],
        "train_seconds": sum(metrics["train_seconds"] for metrics in history),
        "sparsity": zeros / sum(sizes.values()) if sizes else 0.0,
        "recipe": trainer.recipe.to_dict(),
        "machine": machine(),
        "versions": {name: metadata.version(name) for name in ("mest-compile", "apache-tvm", "torch", "numpy")},
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def paced(entry: Mapping[str, Any], pace: Mapping[str, Any]) -> bool:
    """Whether that pace has every kind of iteration that the entry's run passed through."""
    run, recipe = Run(**entry["run"]), Recipe.from_dict(entry["recipe"])
    return all(kind(run, sparsity) in pace["seconds"] for sparsity, _ in densities(recipe, run.sparsity))


def seconds_to(entry: Mapping[str, Any], pace: Mapping[str, Any], accuracy: float | None) -> float | None:
    """Seconds of training at the measured pace until the end of the first epoch whose test accuracy is at least
    `accuracy`.

    Iterations of every epoch at the pace of the sparsity that the model had then, and mutations. accuracy: None is the
    whole run. None: the accuracy was never met.
    """
    run, recipe, passed = Run(**entry["run"]), Recipe.from_dict(entry["recipe"]), 0.0
    for metrics, (sparsity, mutated) in zip(entry["epochs"], densities(recipe, run.sparsity), strict=True):
        passed += metrics["iterations"] * pace["seconds"][kind(run, sparsity)]
        passed += pace["mutation_seconds"][f"{run.scheme} {run.sparsity:g}{run.stored}"] if mutated else 0.0
        if accuracy is not None and metrics["test_accuracy"] >= accuracy:
            return passed
    return passed if accuracy is None else None


def table(results: Mapping[str, Any]) -> str:
    """The markdown between the markers of docs/results.md."""
    by_row: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs():
        if run.key in results["entries"]:
            by_row.setdefault(run.row, {})[run.seed] = results["entries"][run.key]
    dense, pace = by_row.get("dense torch", {}), results.get("pace")
    lines = [
        "| run | seeds | test accuracy % | spread | beside dense | sparsity | iterations saved | training, times "
        "shorter | "
        "time to dense - 0.5, times shorter |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row, seeds in by_row.items():
        entries = list(seeds.values())
        found = [100 * entry["test_accuracy"] for entry in entries]
        spread = f"{statistics.stdev(found):.2f}" if len(found) > 1 else "-"
        saved = sum(metrics["iterations_saved"] for metrics in entries[0]["epochs"])
        share = saved / (saved + sum(metrics["iterations"] for metrics in entries[0]["epochs"]))
        common = [seed for seed in seeds if seed in dense]
        beside, whole, faster = "-", "-", "-"
        if common and row != "dense torch":
            apart = [100 * (seeds[seed]["test_accuracy"] - dense[seed]["test_accuracy"]) for seed in common]
            beside = f"{statistics.mean(apart):+.2f}"
        if common and pace and row != "dense torch" and paced(entries[0], pace):
            wanted = statistics.mean(entry["test_accuracy"] for entry in dense.values()) - WITHIN
            whole = f"{statistics.median(_ratio(dense[seed], seeds[seed], pace, None) or 0.0 for seed in common):.2f}"
            reached = [ratio for seed in common if (ratio := _ratio(dense[seed], seeds[seed], pace, wanted))]
            faster = f"{statistics.median(reached):.2f} ({len(reached)} of {len(common)})" if reached else "not reached"
        lines.append(
            f"| {row} | {len(found)} | {statistics.mean(found):.2f} | {spread} | {beside} | "
            f"{statistics.mean(entry['sparsity'] for entry in entries):.3f} | {share:.1%} | "
            f"{whole} | {faster} |"
        )
    return "\n".join(lines) + "\n"


def _ratio(
    dense: Mapping[str, Any], ours: Mapping[str, Any], pace: Mapping[str, Any], accuracy: float | None
) -> float | None:
    """Dense torch's seconds over ours; None: one of them never had that accuracy."""
    theirs, own = (seconds_to(entry, pace, accuracy) for entry in (dense, ours))
    return theirs / own if theirs and own else None


def run_all(chosen: argparse.Namespace, every: Sequence[Any], script: str, options: Sequence[str] = ()) -> None:
    """Trains those of `every` that are chosen and not in the results yet, each by a process of that script."""
    results = json.loads(chosen.results.read_text(encoding="utf-8")) if chosen.results.exists() else {"entries": {}}
    results["command"] = f"python benchmarks/{Path(script).name}"
    wanted = [run for run in every if chosen.only in run.key and run.key not in results["entries"]]
    folders = ["--runs", str(chosen.runs), *(["--data-folder", str(chosen.data_folder)] if chosen.data_folder else [])]

    def start(run: Any) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, script, *folders, *options, "--train", run.key], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise MestError(f"{run.key}: its process ended with code {done.returncode}")
        return json.loads(done.stdout)

    with ThreadPoolExecutor(chosen.jobs) as workers:
        waiting = {workers.submit(start, run): run for run in wanted}
        for done in as_completed(waiting):
            run = waiting[done]
            results["entries"][run.key] = done.result()
            order = {one.key: number for number, one in enumerate(every)}
            results["entries"] = dict(
                sorted(results["entries"].items(), key=lambda item: order.get(item[0], len(order)))
            )
            write_json(chosen.results, results)
            print(f"{run.key}: {results['entries'][run.key]['test_accuracy']:.2%}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="runs whose key contains this")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default 2)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "accuracy", help="where run folders go")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--data-folder", type=Path, help="of Fashion-MNIST's four files")
    parser.add_argument("--pace", action="store_true", help="measure what an iteration costs, train nothing")
    parser.add_argument("--table", action="store_true", help="write the table in docs/results.md, run nothing")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.table:
        text = table(json.loads(RESULTS.read_text(encoding="utf-8")))
        write_atomically(DOCUMENT, embed(DOCUMENT.read_text(encoding="utf-8"), text))
    elif chosen.pace:
        write_json(
            chosen.results,
            json.loads(chosen.results.read_text(encoding="utf-8")) | {"pace": measure_pace(chosen.data_folder)},
        )
    elif chosen.train:
        run = next(run for run in runs() if run.key == chosen.train)
        print(json.dumps(train(run, chosen.runs / run.key.replace(" ", "-").replace(":", ""), chosen.data_folder)))
    else:
        run_all(chosen, runs(), __file__)


if __name__ == "__main__":
    try:
        main()
    except MestError as error:
        sys.exit(f"error: {error}")
