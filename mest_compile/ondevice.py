"""The command line of a device without typer and rich. Needs numpy, tvm_ffi and TVM's runtime library; no compiler, no
torch, no tvm package."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from mest_compile.base.commandline import INTERRUPTED, guarded, print_result, refuse_empty, results_alone
from mest_compile.base.errors import UsageError
from mest_compile.finetuning.job import BUFFER_BYTES
from mest_compile.finetuning.ondevice import EPOCHS, learn
from mest_compile.finetuning.watching import Quiet
from mest_compile.opening import open_artifact
from mest_compile.training.metrics import main_metric
from mest_compile.training.ondevice import Job, check_artifact_options, open_job
from mest_compile.training.predicting import TOP, answers, pictures_in, write_csv
from mest_compile.training.recipe import Recipe


class Lines:
    """One line an epoch on stderr."""

    def on_batch(self, epoch: int, epochs: int, batch: int, batches: int, loss: float, correct: float) -> None:
        pass

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        metric = main_metric(metrics)
        trained, tested = (metric.shown(metrics[f"{part}_{metric.name}"]) for part in ("train", "test"))
        said = f"epoch {metrics['epoch']}  loss {metrics['loss']:.4f}  train {trained}  test {tested}"
        if mutation := metrics["mutation"]:
            said += f"  mutated in {mutation['seconds']:.2f} s"
        print(said, file=sys.stderr, flush=True)


class _Stages(Quiet):
    """Tells what begins, too."""

    def on_stage(self, what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    def of_training(self, step: object) -> Lines:
        return Lines()


def main(arguments: Sequence[str] | None = None) -> int:
    """`mest-compile train --artifact DIR --data NAME`, and what else an artifact is enough for."""
    parser = argparse.ArgumentParser(
        "mest-compile",
        description="Train from an artifact, and predict. The other commands need: pip install typer rich, "
        "and a machine with the compiler.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="say what an artifact's model sees in pictures")
    predict.add_argument("model", type=Path, help="artifact")
    predict.add_argument("images", type=Path, nargs="+", help="pictures, or folders of them")
    predict.add_argument("--top", type=int, default=TOP, help="classes to tell, the most probable first")
    train = commands.add_parser("train", help="train from an artifact")
    train.add_argument("--artifact", type=Path, required=True, help="folder that `mest-compile build` wrote")
    train.add_argument(
        "--data", default="digits", help="digits (the default), fashion-mnist, cifar10, cifar100, arrays, folder"
    )
    train.add_argument("--data-folder", type=Path)
    train.add_argument("--recipe", type=Path, help="recipe as TOML; options given beside it override it")
    train.add_argument("--method", help="em (the default), em_s, set or static")
    train.add_argument("--epochs", type=int, help="passes over the training set, 10 by default; with --resume: more")
    train.add_argument("--lr", type=float, help="highest learning rate; default: the artifact's")
    train.add_argument("--seed", type=int, help="of shuffling, augmentation and mutation, 0 by default")
    train.add_argument("--out", type=Path, help="run folder, by default: run")
    train.add_argument("--resume", type=Path, help="continue the run in this folder")
    tuned = commands.add_parser("finetune", help="teach the model of an artifact further images and classes")
    tuned.add_argument(
        "--continue", type=Path, required=True, dest="artifact", help="artifact, or folder of an earlier --continue"
    )
    tuned.add_argument(
        "--data-folder", type=Path, required=True, help="folder of images for each class, or CSV file of file and label"
    )
    tuned.add_argument("--epochs", type=int, default=EPOCHS)
    tuned.add_argument("--buffer", default=BUFFER_BYTES, help="bytes of examples that are kept, 16MiB by default")
    tuned.add_argument("--out", type=Path, required=True, help="folder of what is learnt")
    for command in (train, predict, tuned):
        command.add_argument("--threads", type=int)
        command.add_argument("--runtime", type=Path, help="TVM's libtvm_runtime.so")
        command.add_argument(
            "--json", action="store_true", dest="as_json", help="print the result as one JSON document"
        )
    arguments = sys.argv[1:] if arguments is None else arguments

    def run() -> int:
        refuse_empty(arguments)
        given = parser.parse_args(arguments)
        with results_alone() if given.as_json else nullcontext():
            return {"train": _train, "predict": _predict, "finetune": _learn}[given.command](given)

    return guarded(run)


def _predict(given: argparse.Namespace) -> int:
    if given.top < 1:
        raise UsageError(f"--top is {given.top}; wanted 1 or more")
    step = open_artifact(given.model, given.threads, given.runtime)
    found = list(answers(step, pictures_in(given.images), given.top))
    if given.as_json:
        print_result(json.dumps(found))
    else:
        write_csv(sys.stdout, found)
    return 0


def _train(given: argparse.Namespace) -> int:
    said = {name: value for name, value in vars(given).items() if value not in (None, False) and name != "command"}
    check_artifact_options(said.keys())
    if given.threads is not None and given.threads < 1:
        raise UsageError(f"--threads is {given.threads}; wanted 1 or more")
    settings = {name: said[name] for name in ("epochs", "method", "lr", "seed") if name in said}
    recipe = (
        replace(Recipe.from_file(given.recipe), **settings) if given.recipe else Recipe(**{"epochs": 10, **settings})
    )
    trainer, split = open_job(
        Job(
            given.artifact,
            given.data,
            given.out or Path("run"),
            recipe,
            given.data_folder,
            given.resume,
            given.threads,
            given.runtime,
            None if given.resume is None else given.epochs,
        )
    )
    trainer.progress = Lines()
    parts = split.train, split.known_test, split.val
    print(trainer.about(*parts), file=sys.stderr, flush=True)
    try:
        run = trainer.fit(*parts)
    except KeyboardInterrupt:
        if trainer.folder is None or trainer.folder.stamp() is None:
            raise
        print(f"interrupted; continue with --resume {trainer.folder.path}", file=sys.stderr)
        return INTERRUPTED
    if given.as_json:
        score = {f"test_{run.metric.name}": run.test_score}
        print_result(json.dumps({"folder": str(run.folder), **score, "epochs": run.history}))
    else:
        tested = "" if run.test_score is None else f"test {run.metric.label} {run.metric.shown(run.test_score)}; "
        print(f"{tested}run folder {run.folder}")
    return 0


def _learn(given: argparse.Namespace) -> int:
    asked = {"epochs": given.epochs, "buffer_bytes": given.buffer, "threads": given.threads, "runtime": given.runtime}
    found = learn(given.artifact, given.data_folder, given.out, **asked, watch=_Stages())
    if given.as_json:
        print_result(json.dumps(found.told()))
    else:
        print(f"accuracy {found.accuracy:.2%}; folder {found.folder}")
    return 0
