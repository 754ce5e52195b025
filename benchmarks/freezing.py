"""What freezing and sieving spare of EM&S, and what accuracy they leave: `python benchmarks/freezing.py`, hours of two
cores on Fashion-MNIST.

Runs, files and `--jobs` are as those of benchmarks/accuracy.py, to which `--pace` and `--table` are alike too: `--pace`
measures an iteration of every state that a run passes through, in turns on a quiet machine, and the table of
docs/results.md counts a run's time by it. `--quick` is a small net on digits, in a minute or two: that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import accuracy
import documents

from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically, write_json
from mest_compile.measuring.benchmark import machine
from mest_compile.options import StepOptions
from mest_compile.sparsity import parse_scheme
from mest_compile.training.freezer import Freezer
from mest_compile.training.freezing import FreezeRule
from mest_compile.training.recipe import Recipe
from mest_compile.training.sieve import SieveRule

RESULTS, DOCUMENT = accuracy.RESULTS.parent / "freezing.json", accuracy.DOCUMENT
embed = partial(documents.embed, what="freezing table")
SCHEME, SPARSITY = "block:4x1", 0.9
FREEZE = FreezeRule(0.2, begin=0.6)  # later than by default: where epochs are few, each that all layers train counts
SIEVE = {"drop": 0.23, "after_epoch": 1, "every": 2}  # 23% of the examples in seven of eight epochs: 20% of iterations


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs have in common."""

    data: str = "fashion-mnist"
    model: str = accuracy.MODEL
    width: int = accuracy.WIDTH
    epochs: int = accuracy.EPOCHS
    seeds: tuple[int, ...] = accuracy.SEEDS
    rounds: int = accuracy.PACE_ROUNDS


FULL, QUICK = Setting(), Setting("digits", "resnet20", 8, 5, (0,), 2)


@dataclass(frozen=True, slots=True)
class Run:
    """One training."""

    freeze: bool
    sieve: bool
    seed: int

    @property
    def row(self) -> str:
        """What its seeds have in common."""
        return f"em_s {SCHEME} {SPARSITY}{' freeze' * self.freeze}{' sieve' * self.sieve}"

    @property
    def key(self) -> str:
        return f"{self.row} seed {self.seed}"


def runs(setting: Setting) -> list[Run]:
    """In the order in which they are run."""
    kinds = [(False, False), (True, True), (True, False), (False, True)]
    return [Run(*kind, seed) for seed in setting.seeds for kind in kinds]


def recipe_of(run: Run, setting: Setting) -> Recipe:
    return Recipe(
        setting.epochs,
        "em_s",
        lr=accuracy.LR,
        seed=run.seed,
        sieve=SieveRule(**SIEVE) if run.sieve else None,  # type: ignore[arg-type]
        freeze=FREEZE if run.freeze else None,
        drop_last=True,
    )


def compiled(run: Run, setting: Setting, shape: tuple[int, ...], classes: int) -> Any:
    """The run's step before training."""
    from mest_compile.compiling import compile_step
    from mest_compile.models.catalog import build_model

    model = build_model(setting.model, shape, classes, setting.width, run.seed)
    options = StepOptions(parse_scheme(SCHEME), SPARSITY, threads=1)
    return compile_step(model, shape, recipe_of(run, setting).step_options(options))


def load(setting: Setting, folder: Path | None) -> Any:
    from mest_compile.data import load

    return load(setting.data, folder)


def train(run: Run, setting: Setting, folder: Path, data_folder: Path | None) -> dict[str, Any]:
    """The run's entry of the results; goes on with a run that is in `folder`."""
    from mest_compile.training.loop import Trainer

    split = load(setting, data_folder)
    step = compiled(run, setting, (accuracy.BATCH, *split.train.images.shape[1:]), split.train.classes)
    begun = (folder / "checkpoint.safetensors").exists()
    trainer = Trainer.resume(folder, step) if begun else Trainer(step, recipe_of(run, setting), folder)
    history = trainer.fit(split.train, split.test).history
    kept = ("epoch", "loss", "test_accuracy", "train_seconds", "iterations", "iterations_saved", "overall_sparsity")
    return {
        "run": asdict(run),
        "epochs": [
            {name: metrics[name] for name in kept}
            | {
                "state": state_of(metrics),
                "memory_bytes": metrics["memory_bytes"]["total"],
                "saved": metrics.get("freeze", {"saved": 0.0})["saved"],
                "exchange_seconds": metrics.get("freeze", {"seconds": 0.0})["seconds"]
                + (metrics["mutation"]["seconds"] if metrics["mutation"] else 0.0),
            }
            for metrics in history
        ],
        "test_accuracy": history[-1]["test_accuracy"],
        "recipe": trainer.recipe.to_dict(),
        "machine": machine(),
        "versions": {name: metadata.version(name) for name in ("mest-compile", "apache-tvm", "numpy")},
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def state_of(metrics: Mapping[str, Any]) -> str:
    """What decides how long an iteration takes in an epoch: how sparse all layers are, and how many parts have
    frozen."""
    return f"sparsity {metrics['overall_sparsity']:.3f}, {metrics.get('freeze', {'parts': 0})['parts']} parts frozen"


def measure_pace(setting: Setting, data_folder: Path | None) -> dict[str, Any]:
    """Seconds of an iteration in every state, data preparation included: all take turns of a few iterations of the
    training loop in one process; medians over the rounds, and the spread."""
    import mest_compile as mest
    from mest_compile.sparsity.distributions import together
    from mest_compile.training.given import Given
    from mest_compile.training.loop import Trainer

    split = load(setting, data_folder)
    few = accuracy.PACE_BATCHES * accuracy.BATCH
    data = replace(split.train, images=split.train.images[:few], labels=split.train.labels[:few])
    shape, trainers = (accuracy.BATCH, *data.images.shape[1:]), {}
    for run in runs(setting)[:4]:
        step = compiled(run, setting, shape, data.classes)
        recipe, told = recipe_of(run, setting).resolved(SPARSITY, accuracy.LR), {}
        freezer = Freezer.of_run(recipe, step)
        elems = {name: mask.size for name, mask in step.masks().items()}
        for epoch in range(setting.epochs):  # nothing is trained: what counts is how many weights live
            if frozen := freezer.freeze(step, recipe, epoch):
                told = {"freeze": frozen}
            if phase := recipe.mutation_at(epoch):
                step.mutate(phase.prune_to, phase.grow_to)
                freezer.settle(step, recipe, epoch)
            state = state_of({**told, "overall_sparsity": together(step.sparsity(), elems)})
            if state not in trainers:
                with tempfile.TemporaryDirectory() as folder:
                    step.save(path := Path(folder) / "step.safetensors")
                    trainers[state] = Trainer(mest.load(path), Recipe(1, "static", lr=1e-3))
                trainers[state]._train(0, Given(data))  # warms up
    turns: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(setting.rounds):
        for name in list(trainers)[:: 1 if number % 2 else -1]:
            turns[name].append(trainers[name]._train(0, Given(data))["train_seconds"] / accuracy.PACE_BATCHES)
    return {
        "seconds": {name: statistics.median(found) for name, found in turns.items()},
        "lowest": {name: min(found) for name, found in turns.items()},
        "highest": {name: max(found) for name, found in turns.items()},
        "rounds": setting.rounds,
        "batches": accuracy.PACE_BATCHES,
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def seconds(entry: Mapping[str, Any], pace: Mapping[str, Any]) -> float:
    """Of a run's training: its iterations at the pace of the state that each epoch was in, its mutations and
    freezes."""
    return sum(
        metrics["iterations"] * pace["seconds"][metrics["state"]] + metrics["exchange_seconds"]
        for metrics in entry["epochs"]
    )


def table(results: Mapping[str, Any], setting: Setting = FULL) -> str:
    """The markdown between the markers of docs/results.md."""
    by_row: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs(setting):
        if run.key in results["entries"]:
            by_row.setdefault(run.row, {})[run.seed] = results["entries"][run.key]
    plain, pace = by_row.get(Run(False, False, 0).row, {}), results.get("pace")
    lines = [
        "| run | seeds | test accuracy % | spread | beside em_s | operations spared | iterations saved | "
        "training time | memory in the end |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row, seeds in by_row.items():
        found = [100 * entry["epochs"][-1]["test_accuracy"] for entry in seeds.values()]
        spread = f"{statistics.stdev(found):.2f}" if len(found) > 1 else "-"
        epochs = next(iter(seeds.values()))["epochs"]
        made, left = (sum(metrics[name] for metrics in epochs) for name in ("iterations", "iterations_saved"))
        spared = sum(metrics["iterations"] * metrics["saved"] for metrics in epochs) / made
        common = [seed for seed in seeds if seed in plain]
        beside, spent, need = "-", "-", "-"
        if common:
            apart = [
                100 * (seeds[seed]["epochs"][-1]["test_accuracy"] - plain[seed]["epochs"][-1]["test_accuracy"])
                for seed in common
            ]
            beside = f"{statistics.mean(apart):+.2f}"
            bytes_of = [seeds[seed]["epochs"][-1]["memory_bytes"] for seed in common]
            whole = [plain[seed]["epochs"][-1]["memory_bytes"] for seed in common]
            need = f"{statistics.median(mine / theirs for mine, theirs in zip(bytes_of, whole, strict=True)):.2f}"
        if common and pace:
            shares = [seconds(seeds[seed], pace) / seconds(plain[seed], pace) for seed in common]
            spent = f"{statistics.median(shares):.2f}"
        lines.append(
            f"| {row} | {len(found)} | {statistics.mean(found):.2f} | {spread} | {beside} | {spared:.1%} | "
            f"{left / (made + left):.1%} | {spent} | {need} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="runs whose key contains this")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default 2)")
    parser.add_argument("--runs", type=Path, default=accuracy.ROOT / "runs" / "freezing", help="where run folders go")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--data-folder", type=Path, help="of Fashion-MNIST's four files")
    parser.add_argument("--pace", action="store_true", help="measure what an iteration costs, train nothing")
    parser.add_argument("--table", action="store_true", help="write the table in docs/results.md, run nothing")
    parser.add_argument("--quick", action="store_true", help="a small net on digits; its table is printed")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    setting = QUICK if chosen.quick else FULL

    def results() -> dict[str, Any]:
        return json.loads(chosen.results.read_text(encoding="utf-8"))

    if chosen.table and chosen.quick:
        print(table(results(), setting), end="")
    elif chosen.table:
        write_atomically(DOCUMENT, embed(DOCUMENT.read_text(encoding="utf-8"), table(results())))
    elif chosen.pace:
        write_json(chosen.results, results() | {"pace": measure_pace(setting, chosen.data_folder)})
    elif chosen.train:
        run = next(run for run in runs(setting) if run.key == chosen.train)
        folder = chosen.runs / run.key.replace(" ", "-").replace(":", "")
        print(json.dumps(train(run, setting, folder, chosen.data_folder)))
    else:
        accuracy.run_all(chosen, runs(setting), __file__, ["--quick"] * chosen.quick)


if __name__ == "__main__":
    try:
        main()
    except MestError as error:
        sys.exit(f"error: {error}")
