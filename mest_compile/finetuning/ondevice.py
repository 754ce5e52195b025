"""A fine-tuning that goes on from an artifact: further images and classes, without a compiler.

A new class takes an output that was left for it (`mest.finetune(spare_classes=...)`), so that no kernel is another. The
whole net runs for every image, and what is replayed are pixels.
"""

from __future__ import annotations

import json
import os
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
from mest_compile.finetuning.job import BUFFER_BYTES
from mest_compile.finetuning.replay import Replay, kept, mixed, told_of
from mest_compile.models.inputs import Inputs, Reading
from mest_compile.opening import open_artifact
from mest_compile.training.loop import Trainer
from mest_compile.training.recipe import Recipe
from mest_compile.training.run import Silent

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep

TOLD, REPLAY, RUN, EPOCHS = "inputs.json", "replay.safetensors", "run", 20


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a device has learnt.

    folder  with checkpoint.safetensors, inputs.json and replay.safetensors: `learn` goes on from it as from an artifact
    tasks   as `Tuned` has them
    """

    folder: Path
    step: TrainStep
    classes: tuple[str, ...]
    tasks: Sequence[Mapping[str, Any]]


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
    train, test = kept(earlier, pixels, len(told["classes"]), budget_bytes, len(tasks), 0)
    task = {"classes": [told["classes"][label] for label in np.unique(pixels.train.labels)], "learnt": accuracy}
    write_json(artifact / TOLD, dict(told))
    Replay(train, test, (*tasks, task)).write(artifact / REPLAY)


def learn(
    artifact: str | Path,
    data: Any,
    out: str | Path,
    *,
    test: Any = None,
    since: str | Path | None = None,
    epochs: int = EPOCHS,
    lr: float | None = None,
    buffer_bytes: int | str = BUFFER_BYTES,
    threads: int | None = None,
    runtime: str | os.PathLike | None = None,
    seed: int = 0,
) -> Learnt:
    """The model of an artifact that `mest.finetune(artifact=True)` left, taught further images where it runs, without a
    compiler; what was learnt before is replayed.

    data   images, as `data.pictures.read_pictures` takes them; classes that are new take outputs that were left for
           them
    test   the same; None: data's own test part, or a fifth of every class
    out    folder of what is learnt
    since  folder that an earlier `learn` wrote, of the same artifact, to go on from; None: from the artifact
    epochs  of training, each of the new images and as many of those that are replayed
    lr     highest learning rate of a cosine; None: the one of the artifact's optimizer
    buffer_bytes  that examples kept for later may take, and test examples once more
    threads, runtime  as in `mest.open_artifact`
    Raises UsageError where no output is left for a class or `out` holds something, StateError where files are damaged
    or of something else, DataError, TargetError.
    """
    artifact, out, begun = Path(artifact), Path(out), Path(artifact if since is None else since)
    epochs = checks.whole("epochs", epochs, 1)
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} already holds something; give another folder")
    told, replay = _told(begun), Replay.read(begun / REPLAY)
    inputs = Inputs.from_json(told["inputs"])
    step = open_artifact(artifact, threads, runtime)
    if since is not None:
        step.restore(begun / "checkpoint.safetensors")
    pictures = read_pictures(data, inputs, test, seed, tuple(told["classes"]))
    if len(pictures.classes) > step.classes:
        raise UsageError(
            f"no output is left for the class {pictures.classes[-1]!r}: the artifact tells {step.classes} apart; give "
            "spare_classes when the net is fine-tuned, or continue it there"
        )
    new = pictures.split
    split = mixed(new, replay)
    trainer = Trainer(step, Recipe(epochs, "static", lr, augment=False, seed=seed, drop_last=True), out / RUN, Silent())
    trainer.fit(split.train, split.test)
    step.restore(trainer.folder.best)  # type: ignore[union-attr]  # it was given one
    number = len(replay.told)
    right = step.predict(split.test.images).argmax(1) == split.test.labels
    tasks = np.concatenate([np.full(len(new.test), number), replay.test.tasks])
    names = [pictures.classes[label] for label in np.unique(new.train.labels)]
    named = [*replay.told, {"classes": names, "learnt": float(right[tasks == number].mean())}]
    buffer = checks.size("buffer_bytes", buffer_bytes, at_least=0)
    train, tests = kept(replay, new, len(pictures.classes), buffer, number, seed)
    plain = replace(inputs, mean=(0.0,) * inputs.channels, std=(1.0,) * inputs.channels)  # the net scales pixels
    step.reading = Reading(pictures.classes, plain)
    step.save(out / "checkpoint.safetensors")
    Replay(train, tests, tuple(named)).write(out / REPLAY)
    write_json(out / TOLD, {**told, "classes": list(pictures.classes)})
    return Learnt(out, step, pictures.classes, told_of(named, right, tasks))


def _told(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / TOLD).read_text(encoding="utf-8"))
        return {name: found[name] for name in ("classes", "inputs")}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise StateError(
            f"{folder} holds no {TOLD} of a fine-tuning ({problem}); give an artifact that finetune left, or a folder "
            "that learn wrote"
        ) from problem
