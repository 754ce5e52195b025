"""The files of a fine-tuning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile import exporting
from mest_compile.base.errors import NotInstalled, StateError, UsageError
from mest_compile.base.files import write_json
from mest_compile.data.pictures import Pictures
from mest_compile.finetuning.job import Job
from mest_compile.finetuning.net import Net
from mest_compile.finetuning.ondevice import write_beside
from mest_compile.finetuning.page import write_page
from mest_compile.finetuning.replay import Replay
from mest_compile.finetuning.timing import Clock
from mest_compile.hardware.host import Lock, exclusive
from mest_compile.models.inputs import Inputs, Reading
from mest_compile.training.runfolder import RunFolder
from mest_compile.training.verdict import worst

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep


class TunedFolder:
    """finetune.json (what was asked)  given.json (which images and net it began with)  lock
    head/, blocks/ (runs of the classifier and of the last blocks)
    features/, pooled/ (what the frozen part gives; gone when all is done)

    checkpoint.safetensors (the whole net, for `mest.load`; its extra says classes and inputs)
    weights.safetensors (torch's names)  model.onnx  artifact/ (where it was asked for)
    replay.safetensors (examples that later fine-tunings replay, and what each task was learnt at)
    protected.safetensors (units that those before need, where it continues one)
    result.json (accuracy, by class, by task, confusion matrix, seconds)  report.html
    """

    def __init__(self, path: Path):
        self.path = path
        self.asked, self.given = path / "finetune.json", path / "given.json"
        self.head, self.blocks = path / "head", path / "blocks"
        self.features, self.pooled = path / "features", path / "pooled"
        self.checkpoint, self.weights = path / "checkpoint.safetensors", path / "weights.safetensors"
        self.onnx, self.artifact = path / "model.onnx", path / "artifact"
        self.replay, self.protected = path / "replay.safetensors", path / "protected.safetensors"
        self.result, self.page = path / "result.json", path / "report.html"

    def check(self, job: Job, resume: bool) -> None:
        """Before anything is done: that nothing is there, or that what is there was asked for likewise. Raises
        UsageError, StateError."""
        if resume and self.read() != job.to_json():
            raise StateError(
                f"{self.path} was asked for otherwise ({self.asked.name} says how); give the same to go on, or another "
                "--out"
            )
        if not resume and self._began:
            raise UsageError(f"{self.path} already holds a run; pass --resume or another --out")

    @property
    def _began(self) -> bool:
        """Whether there is anything that was trained; features alone are computed again."""
        return RunFolder(self.head).stamp() is not None

    def _goes_on(self, job: Job, given: dict[str, int]) -> bool:
        """Whether what is in the folder is of the same request, net and images."""
        try:
            return self.read() == job.to_json() and json.loads(self.given.read_text(encoding="utf-8")) == given
        except (StateError, FileNotFoundError, ValueError):
            return False

    def lock(self) -> Lock:
        """The right to be at work in the folder, which is made. Raises UsageError where it cannot be written and
        StateError where somebody else has it."""
        with self._refused():
            self.path.mkdir(parents=True, exist_ok=True)
            lock = exclusive(self.path / "lock")
        if lock is None:
            raise StateError(f"{self.path}: another fine-tuning is at work in this folder; let it end or stop it")
        return lock

    def begin(self, job: Job, net: Net, pictures: Pictures) -> None:
        """Writes what is asked and given, and removes what a run left that ended before anything was trained and had
        others. Raises UsageError where the folder cannot be written, StateError where training began with other images
        or another net, DataError."""
        given = {"images": pictures.crc32(), "net": net.crc32()}
        if not self._goes_on(job, given):
            if self._began:
                raise StateError(
                    f"{self.path} began with other images or another net; give those again, or pass another --out"
                )
            for folder in (self.features, self.pooled, self.head):
                shutil.rmtree(folder, ignore_errors=True)
        with self._refused():
            for folder in (self.features, self.pooled):
                folder.mkdir(exist_ok=True)
            write_json(self.asked, job.to_json())
            write_json(self.given, given)

    @contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise UsageError(f"cannot write to {self.path}: {problem.strerror}; pass another --out") from problem

    def read(self) -> dict[str, Any]:
        """What was asked. Raises StateError where there is nothing, or it is damaged."""
        try:
            found = json.loads(self.asked.read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise StateError(f"{self.path} holds no fine-tuning that can be gone on with ({problem})") from problem
        if not isinstance(found, dict):
            raise StateError(f"{self.asked} is damaged: it holds no table")
        return found

    def trained(self) -> tuple[str, ...]:
        """Names of the parameters that trained. Raises StateError where that is not done."""
        try:
            if not self.replay.is_file():
                raise FileNotFoundError(self.replay.name)
            return tuple(json.loads(self.result.read_text(encoding="utf-8"))["trainable"])
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise StateError(f"{self.path} is not done ({problem}); finish it with --resume {self.path}") from problem

    def finish(
        self,
        job: Job,
        step: TrainStep,
        inputs: Inputs,
        pictures: Pictures,
        logits: np.ndarray,
        verdict: dict[str, Any],
        reached: dict[str, Any],
        replay: Replay,
        clock: Clock,
    ) -> None:
        """Writes all that is left of the work, and removes what only it needed. reached: "head_accuracy", "kept",
        "trainable" and "tasks", as `Tuned` and `Work` have them."""
        told = {"classes": list(pictures.classes), "inputs": inputs.to_json()}
        plain = replace(inputs, mean=(0.0,) * inputs.channels, std=(1.0,) * inputs.channels)  # the net scales pixels
        step.reading = Reading(pictures.classes, plain)
        step.save(self.checkpoint, {"finetuned": told})
        exporting.to_safetensors(step, self.weights)
        try:
            exporting.to_onnx(step, self.onnx)
        except NotInstalled:
            self.onnx.unlink(missing_ok=True)  # the package onnx is not needed for the rest
        if job.artifact:
            step.export(self.artifact)
            pixels = None if job.continue_from is None else Path(job.continue_from) / self.artifact.name
            write_beside(self.artifact, told, pictures.split, job.buffer_bytes, verdict["accuracy"], pixels)
        replay.write(self.replay)
        result = {
            **verdict,
            **reached,
            "sparsity": step.sparsity(),
            "seconds": {**clock.seconds, "total": clock.total},
            **told,
        }
        write_json(self.result, {**result, "by_class": verdict["classes"]})
        self._write_page(step, pictures, logits, verdict, reached, clock)
        for folder in (self.features, self.pooled):
            shutil.rmtree(folder, ignore_errors=True)

    def _write_page(
        self,
        step: TrainStep,
        pictures: Pictures,
        logits: np.ndarray,
        verdict: dict[str, Any],
        reached: dict[str, Any],
        clock: Clock,
    ) -> None:
        test, names = pictures.test, pictures.classes
        shown = [
            (
                test[place : place + 1][0],
                f"{pictures.files[place]}: {names[test.labels[place]]}, called {names[called]}, {sure:.0%}",
            )
            for place, called, sure in worst(logits[: len(test)], test.labels)  # those of tasks before are features
        ]
        sparse = step.sparsity()
        rows = [
            ("accuracy", f"{verdict['accuracy']:.2%} of {verdict['examples']} test images"),
            ("accuracy with the classifier alone trained", f"{reached['head_accuracy']:.2%}"),
            ("kept, by validation images", f"the net with the {reached['kept']} trained"),
            ("images to train on", str(len(pictures.train))),
            (
                "sparse layers",
                f"{len(sparse)}, {min(sparse.values()):.3f} to {max(sparse.values()):.3f}" if sparse else "none",
            ),
            *(
                (
                    f"task {number} ({', '.join(task['classes'])})",
                    f"{task['accuracy']:.2%}, {task['learnt']:.2%} when it was learnt",
                )
                for number, task in enumerate(reached["tasks"], 1)
                if len(reached["tasks"]) > 1 and task["accuracy"] is not None
            ),
            *((f"seconds of {part}", f"{seconds:.1f}") for part, seconds in clock.seconds.items()),
        ]
        write_page(self.page, self.path.resolve().name, rows, verdict, shown)
