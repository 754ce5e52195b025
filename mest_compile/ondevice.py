"""Training from an artifact: what a device runs. Needs numpy, tvm_ffi and TVM's runtime library; no compiler, no torch, no tvm package."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mest_compile.data import Split, load
from mest_compile.errors import MestError, UsageError
from mest_compile.recipe import Recipe
from mest_compile.runtime.artifact import open_artifact
from mest_compile.training import Trainer


@dataclass(frozen=True, slots=True)
class Job:
    """What to train on a device; the fields are the options of the same names. artifact: folder that `mest-compile build` wrote."""

    artifact: Path
    data: str
    out: Path
    recipe: Recipe
    data_folder: Path | None = None
    resume: Path | None = None
    threads: int | None = None
    runtime: Path | None = None


def open_job(job: Job) -> tuple[Trainer, Split]:
    """What trains and what it trains on. Raises MestError before anything is written when something does not fit."""
    split = load(job.data, job.data_folder)
    step = open_artifact(job.artifact, job.threads, job.runtime)
    return Trainer(step, job.recipe, job.out) if job.resume is None else Trainer.resume(job.resume, step), split


class Lines:
    """One line an epoch on stderr."""

    def on_batch(self, epoch: int, epochs: int, batch: int, batches: int, loss: float, correct: float) -> None:
        pass

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        tested = metrics["test_accuracy"]
        said = f"epoch {metrics['epoch']}  loss {metrics['loss']:.4f}  train {metrics['train_accuracy']:.2%}  "
        said += "test -" if tested is None else f"test {tested:.2%}"
        if mutation := metrics["mutation"]:
            said += f"  mutated in {mutation['seconds']:.2f} s"
        print(said, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of a device without typer and rich: `mest-compile train --artifact DIR --data NAME`."""
    parser = argparse.ArgumentParser("mest-compile", description="Train from an artifact. The other commands need: pip install typer rich, "
                                                                 "and a machine with the compiler.")
    train = parser.add_subparsers(dest="command", required=True).add_parser("train", help="train from an artifact")
    train.add_argument("--artifact", type=Path, required=True, help="folder that `mest-compile build` wrote")
    train.add_argument("--data", default="digits", help="digits, fashion-mnist, cifar10, cifar100, arrays, folder")
    train.add_argument("--data-folder", type=Path)
    train.add_argument("--recipe", type=Path, help="recipe as TOML; options given beside it are not used")
    train.add_argument("--method", default="em", help="em, em_s, set or static")
    train.add_argument("--epochs", type=int, default=10)
    train.add_argument("--lr", type=float, default=0.1)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--out", type=Path, default=Path("run"), help="run folder")
    train.add_argument("--resume", type=Path, help="continue the run in this folder")
    train.add_argument("--threads", type=int)
    train.add_argument("--runtime", type=Path, help="TVM's libtvm_runtime.so")
    train.add_argument("--json", action="store_true", help="print the result as one JSON document")
    given = parser.parse_args(arguments)
    try:
        recipe = Recipe.from_file(given.recipe) if given.recipe else Recipe(given.epochs, given.method, lr=given.lr, seed=given.seed)
        if given.threads is not None and given.threads < 1:
            raise UsageError(f"--threads is {given.threads}; wanted 1 or more")
        trainer, split = open_job(Job(given.artifact, given.data, given.out, recipe, given.data_folder, given.resume, given.threads,
                                      given.runtime))
        trainer.progress = Lines()
        run = trainer.fit(split.train, split.test)
    except MestError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"interrupted; continue with --resume {given.resume or given.out}", file=sys.stderr)
        return 130
    if given.json:
        print(json.dumps({"folder": str(run.folder), "test_accuracy": run.test_accuracy, "epochs": run.history}))
    else:
        tested = "" if run.test_accuracy is None else f"test accuracy {run.test_accuracy:.2%}; "
        print(f"{tested}run folder {run.folder}")
    return 0
