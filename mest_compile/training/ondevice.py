"""Training from an artifact: what a device runs. Needs numpy, tvm_ffi and TVM's runtime library; no compiler, no torch,
no tvm package."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from mest_compile.base.errors import UsageError
from mest_compile.data import Split, load
from mest_compile.opening import open_artifact
from mest_compile.training.loop import Trainer
from mest_compile.training.recipe import Recipe

# Options of a run of an artifact, and of one that goes on; the artifact and the run have all others already.
WITH_RESUME = frozenset(("artifact", "runtime", "data", "data_folder", "threads", "resume", "epochs", "as_json"))
WITH_ARTIFACT = WITH_RESUME | {
    *("method", "epochs", "sieve", "freeze", "lr", "seed", "out", "recipe"),
    *("augment", "patience", "setting"),
}


@dataclass(frozen=True, slots=True)
class Job:
    """What to train on a device; the fields are the options of the same names.

    artifact  folder that `mest-compile build` wrote
    longer    epochs that a run that goes on is to have instead of its own
    """

    artifact: Path
    data: str
    out: Path
    recipe: Recipe
    data_folder: Path | None = None
    resume: Path | None = None
    threads: int | None = None
    runtime: Path | None = None
    longer: int | None = None


def open_job(job: Job) -> tuple[Trainer, Split]:
    """What trains and what it trains on. Raises MestError before anything is written when something does not fit."""
    split = load(job.data, job.data_folder)
    step = open_artifact(job.artifact, job.threads, job.runtime)
    if job.resume is not None:
        return Trainer.resume(job.resume, step, epochs=job.longer), split
    return Trainer(step, job.recipe, job.out), split


def check_artifact_options(given: Set[str]) -> None:
    """Raises UsageError for an option that would be dropped. given: names of those on the command line."""
    if others := sorted(given - WITH_ARTIFACT):
        raise UsageError(
            f"the artifact has its --{others[0].replace('_', '-')} already; leave it out, or build another artifact"
        )
    if "resume" in given and (others := sorted(given - WITH_RESUME)):
        raise UsageError(
            f"a resumed run keeps its settings; leave out --{others[0].replace('_', '-')} or start a new run"
        )
