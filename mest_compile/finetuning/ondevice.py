"""A fine-tuning that goes on from an artifact: further images and classes, without a compiler.

A new class takes an output that was left for it (`mest.finetune(spare_classes=...)`), so that no kernel is another. The
whole net runs for every image, and what is replayed are pixels.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import StateError, UsageError
from mest_compile.base.files import write_json
from mest_compile.data import Split
from mest_compile.data.pictures import read_pictures
from mest_compile.finetuning.job import BUFFER_BYTES, VAL_SHARE
from mest_compile.finetuning.replay import Replay, kept, mixed, told_of
from mest_compile.finetuning.watching import Quiet, Watches
from mest_compile.models.inputs import Inputs, Reading
from mest_compile.opening import open_artifact
from mest_compile.runtime.artifact import MANIFEST, STATE, with_files
from mest_compile.runtime.library import RUNTIME
from mest_compile.training.loop import Trainer
from mest_compile.training.recipe import Recipe
from mest_compile.training.runfolder import RunFolder

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep

TOLD, REPLAY, ARTIFACT, RUN = "inputs.json", "replay.safetensors", "artifact", "run"
EPOCHS = 20


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a device has learnt.

    folder  run/, and artifact/, which is the artifact that it began with but for what was learnt: it predicts, and
            `learn` goes on from it
    tasks   as `Tuned` has them
    accuracy  of the new test examples and those that are kept of the tasks before
    """

    folder: Path
    step: TrainStep
    classes: tuple[str, ...]
    tasks: Sequence[Mapping[str, Any]]
    accuracy: float

    @property
    def artifact(self) -> Path:
        return self.folder / ARTIFACT

    def told(self) -> dict[str, Any]:
        """JSON-able."""
        said = {"folder": str(self.folder), "accuracy": self.accuracy}
        return {**said, "classes": list(self.classes), "tasks": list(self.tasks)}


def write_beside(
    artifact: Path, told: Mapping[str, Any], pixels: Split, budget_bytes: int, accuracy: float, before: Path | None
) -> None:
    """Writes into an artifact's folder what `learn` needs of a fine-tuning: classes, inputs, examples as pixels.

    told    "classes" and "inputs" of the fine-tuning, JSON-able
    pixels  what it was given to train on; accuracy: that it reached
    before  the artifact, if there is one, of the fine-tuning that it continues, whose examples stay
    """
    earlier = None if before is None or not (before / REPLAY).is_file() else Replay.read(before / REPLAY)
    tasks = () if earlier is None else earlier.told
    parts = kept(earlier, pixels, len(told["classes"]), budget_bytes, len(tasks), 0)
    task = {"classes": [told["classes"][label] for label in np.unique(pixels.train.labels)], "learnt": accuracy}
    write_json(artifact / TOLD, dict(told))
    Replay(*parts, told=(*tasks, task)).write(artifact / REPLAY)


def is_artifact(folder: Path) -> bool:
    """Whether `learn` goes on from it: an artifact, or a folder that `learn` left."""
    return (folder / MANIFEST).is_file() or ((folder / ARTIFACT / MANIFEST).is_file() and (folder / RUN).is_dir())


def learn(
    artifact: str | Path,
    data: Any,
    out: str | Path,
    *,
    test: Any = None,
    epochs: int = EPOCHS,
    lr: float | None = None,
    buffer_bytes: int | str = BUFFER_BYTES,
    threads: int | None = None,
    runtime: str | os.PathLike | None = None,
    seed: int = 0,
    watch: Watches | None = None,
) -> Learnt:
    """The model of an artifact that `mest.finetune(artifact=True)` left, taught further images where it runs, without a
    compiler; what was learnt before is replayed.

    artifact  its folder, or one that an earlier `learn` left
    data   images, as `data.pictures.read_pictures` takes them; classes that are new take outputs that were left for
           them
    test   the same; None: data's own test part, or a fifth of every class
    out    folder of what is learnt
    epochs  of training, each of the new images and as many of those that are replayed
    lr     highest learning rate of a cosine; None: the one of the artifact's optimizer
    buffer_bytes  that examples kept for later may take, and test examples once more
    threads, runtime  as in `mest.open_artifact`
    watch  is told what goes on
    Raises UsageError where no output is left for a class or `out` holds something, StateError where files are damaged
    or of something else, DataError, TargetError.
    """
    artifact, out, watch = Path(artifact), Path(out), watch or Quiet()
    if not (artifact / MANIFEST).is_file() and (artifact / ARTIFACT / MANIFEST).is_file():
        artifact = artifact / ARTIFACT
    epochs, buffer = checks.whole("epochs", epochs, 1), checks.size("buffer_bytes", buffer_bytes, at_least=0)
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} already holds something; give another folder")
    told, replay = _told(artifact), Replay.read(artifact / REPLAY)
    inputs = Inputs.from_json(told["inputs"])
    step = open_artifact(artifact, threads, runtime)
    watch.on_stage("reading images")
    pictures = read_pictures(data, inputs, test, seed, tuple(told["classes"]), val_share=VAL_SHARE)
    if len(pictures.classes) > step.classes:
        raise UsageError(
            f"no output is left for the class {pictures.classes[-1]!r}: the artifact tells {step.classes} apart; give "
            "spare_classes when the net is fine-tuned, or continue it there"
        )
    new = pictures.split
    split = mixed(new, replay)
    recipe = Recipe(epochs, "static", lr, augment=False, seed=seed, drop_last=True)
    watch.on_stage("training")
    trainer = Trainer(step, recipe, out / RUN, watch.of_training(step))
    trainer.judge.latest = True
    trainer.fit(split.train, val_set=split.val)
    best = RunFolder(out / RUN).best
    if best.is_file():
        step.restore(best)
    number = len(replay.told)
    right = step.predict(split.test.images).argmax(1) == split.test.labels
    tasks = np.concatenate([np.full(len(new.test), number), replay.test.tasks])
    names = [pictures.classes[label] for label in np.unique(new.train.labels)]
    named = [*replay.told, {"classes": names, "learnt": float(right[tasks == number].mean())}]
    parts = kept(replay, new, len(pictures.classes), buffer, number, seed)
    plain = replace(inputs, mean=(0.0,) * inputs.channels, std=(1.0,) * inputs.channels)  # the net scales pixels
    step.reading = Reading(pictures.classes, plain)

    def files(made: Path) -> None:
        step.save(made / STATE)
        Replay(*parts, told=tuple(named)).write(made / REPLAY)
        write_json(made / TOLD, {**told, "classes": list(pictures.classes)})
        if (artifact / RUNTIME).is_file():  # as it may lie there for a device
            shutil.copy2(artifact / RUNTIME, made / RUNTIME)

    with_files(artifact, files, out / ARTIFACT)
    return Learnt(out, step, pictures.classes, told_of(named, right, tasks), float(right.mean()))


def _told(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / TOLD).read_text(encoding="utf-8"))
        return {name: found[name] for name in ("classes", "inputs")}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise StateError(
            f"{folder} holds no {TOLD} of a fine-tuning ({problem}); give an artifact that finetune left, or a folder "
            "that it learnt into"
        ) from problem
