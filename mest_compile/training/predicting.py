"""What a trained model answers: to pictures in files, and to a whole data set. Needs no compiler and no torch."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from mest_compile.base.errors import DataError, InputError, UsageError
from mest_compile.data import Dataset
from mest_compile.data.sampling import check_shape
from mest_compile.data.sources.folder import SUFFIXES, read_picture
from mest_compile.hardware.target import is_foreign
from mest_compile.opening import load, open_artifact
from mest_compile.planning.facts import read_facts
from mest_compile.runtime import checkpoint
from mest_compile.runtime.artifact import MANIFEST
from mest_compile.training.judging import check_targets
from mest_compile.training.metrics import Score, compared, metrics_of
from mest_compile.training.verdict import calibration, judged, probabilities, sigmoid

if TYPE_CHECKING:
    from mest_compile.models.inputs import Inputs, Reading
    from mest_compile.runtime.step import TrainStep

ARRAYS = ".npy"
TOP = 5  # answers told of a picture


def open_step(
    path: str | os.PathLike, threads: int | None = None, runtime: str | os.PathLike | None = None
) -> TrainStep:
    """The step of a run folder (its last whole epoch), a checkpoint or an artifact, to answer here: what was trained on
    another kind of device is compiled for this machine. Raises what `mest.load` and `mest.open_artifact` raise."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return open_artifact(path, threads, runtime)
    if runtime is not None:
        raise UsageError("a runtime belongs to an artifact; a step that is compiled here finds TVM by itself")
    foreign = is_foreign(read_facts(checkpoint.read(path)[1], f"checkpoint {path}").target)
    return load(path, threads, target="local" if foreign else None)


def pictures_in(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The files as given, and of folders all pictures in them and below, in the order of their names. Raises
    DataError."""
    found: list[Path] = []
    for path in map(Path, paths):
        there = [path]
        if path.is_dir():
            there = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not there:
                raise DataError(f"{path} holds no {', '.join(SUFFIXES)} files")
        elif not path.is_file():
            raise DataError(f"no picture {path}; give files, or folders of them")
        found += there
    return found


def answers(step: TrainStep, files: Sequence[Path], top: int = TOP) -> Iterator[dict[str, Any]]:
    """What the model says of each picture, a file or one of uint8 pixels (n, C, height, width) in an .npy file,
    JSON-able: {"file", "class", "probability", "top": [{"class", "probability"}, ...]}; of a model of yes and no
    {"file", "classes": [those above a half], "probabilities": {name: share}}, of one of numbers {"file", "outputs":
    {name: number}}.

    top  classes told, the most probable first
    Raises UsageError where nobody says how pictures become the step's images, DataError where one cannot be read.
    """
    inputs, reading = readable(step)
    rest = (one for file in files for one in _pictures(file, inputs))
    while part := list(islice(rest, step.batch)):
        for (name, _), outputs in zip(
            part, predict_pixels(step, np.stack([pixels for _, pixels in part])), strict=True
        ):
            yield {"file": name, **_answer(step, reading, outputs, top)}


def _pictures(file: Path, inputs: Inputs) -> Iterator[tuple[str, np.ndarray]]:
    """(name, pixels (C, height, width) uint8) of a picture, or of each in a file of arrays."""
    if file.suffix != ARRAYS:
        yield str(file), read_picture(file, inputs)
        return
    try:
        images = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as problem:
        raise DataError(f"{file} cannot be read ({problem}); write it with np.save(file, images)") from problem
    shape = (inputs.channels, *inputs.size)
    if images.ndim == 3 and shape[0] == 1:
        images = images[:, None]
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise DataError(
            f"{file} holds {images.dtype} {images.shape}; wanted uint8 pixels (n, {', '.join(map(str, shape))})"
        )
    for place, pixels in enumerate(images):
        yield f"{file}[{place}]", pixels


def readable(step: TrainStep) -> tuple[Inputs, Reading]:
    """How pictures become what a step is fed. Raises UsageError where nobody says that."""
    reading = step.reading
    if reading is None or reading.inputs is None:
        raise UsageError(
            "nobody says how pictures become this model's images: it was not trained on pixels by a Trainer. Give "
            "step.reading, a mest.Reading(classes, mest.Inputs(size, crop, mean, std)), before it is saved"
        )
    if reading.inputs.channels not in (1, 3):
        raise UsageError(
            f"the model takes images of {reading.inputs.channels} channels, and pictures have 1 or 3; use step.predict"
        )
    if len(step.output_shape) > 2:
        raise UsageError(f"the model's answers are maps, {step.output_shape[1:]} an example; use step.predict")
    return reading.inputs, reading


def predict_pixels(step: TrainStep, pixels: np.ndarray) -> np.ndarray:
    """Outputs (n, classes) for pixels (n, channels, height, width) 0 to 255, scaled as those that the step was trained
    on. Raises UsageError."""
    inputs, _ = readable(step)
    return step.predict(inputs.scaled(pixels).reshape(len(pixels), *step.input_shape[1:]))


def _answer(step: TrainStep, reading: Reading, outputs: np.ndarray, top: int) -> dict[str, Any]:
    names = [reading.name(place) for place in range(len(outputs))]
    if step.loss.yes_or_no:
        sure = dict(zip(names, sigmoid(outputs).tolist(), strict=True))
        return {"classes": [name for name, share in sure.items() if share > 0.5], "probabilities": sure}
    if not step.loss.tells_correct:
        return {"outputs": dict(zip(names, outputs.tolist(), strict=True))}
    shares = probabilities(outputs[None])[0]
    best = [
        {"class": names[place], "probability": float(shares[place])}
        for place in np.argsort(-shares, kind="stable")[:top]
    ]
    return {**best[0], "top": best}


def by_name(answer: dict[str, Any]) -> dict[str, float]:
    """{name: what is told of that output} of an answer without "top"."""
    found: dict[str, float] = answer.get("probabilities") or answer["outputs"]
    return found


def write_csv(file: TextIO, told: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> None:
    """A line an answer: file, class and probability of each place, or the probabilities or outputs by name."""
    writer = csv.writer(file)
    for number, one in enumerate(told):
        ranked = one.get("top", ())
        if number == 0:
            places = [
                ("class", "probability"),
                *((f"class {n}", f"probability {n}") for n in range(2, len(ranked) + 1)),
            ]
            names = [name for pair in places for name in pair] if ranked else list(by_name(one))
            writer.writerow(["file", *names])
        values = [value for best in ranked for value in best.values()] if ranked else by_name(one).values()
        writer.writerow([one["file"], *values])


def evaluated(step: TrainStep, data: Dataset) -> dict[str, Any]:
    """How good the answers for a data set are, JSON-able: {"examples", metric: value, ...}; where an example has a
    class also "classes" and "confusion" as `verdict.judged` has them, and "calibration".

    data  of uint8 images is scaled as the data that the step was trained on, where that is known
    Raises InputError where the step does not take such data.
    """
    if (reading := step.reading) is not None:
        data = _as_trained(data, reading)
    check_shape(data, step.input_shape)
    if data.numbers != step.loss.takes_numbers or (not data.numbers and data.classes > step.classes):
        raise InputError(
            f"{data.name} has {'numbers' if data.numbers else f'{data.classes} classes'}, the model gives "
            f"{f'{step.classes} numbers' if step.loss.takes_numbers else f'{step.classes} classes'}; give other data"
        )
    # What has no label does not count here, whether or not the loss leaves it out.
    counting = data if data.numbers else replace(data, labels=np.maximum(data.labels, 0))
    check_targets(step.loss, counting, (len(data), *step.output_shape[1:]))
    images = data.normalise(data.images).reshape(len(data), *step.input_shape[1:])
    outputs, score = step.predict(images), Score(metrics_of(step.loss, step.classes))
    score.add(outputs, compared(step.loss, data.labels))
    found: dict[str, Any] = {"examples": len(data), **score.values("")}
    if step.loss.tells_correct and data.labels.ndim == 1 and not data.numbers:
        counted = (data.labels >= 0) & (data.labels < step.classes)
        names = [reading.name(place) if reading else str(place) for place in range(step.classes)]
        about = judged(outputs[counted], data.labels[counted], names)
        found |= {name: about[name] for name in ("classes", "confusion")}
        found["calibration"] = calibration(outputs[counted], data.labels[counted])
    return found


def _as_trained(data: Dataset, reading: Reading) -> Dataset:
    """Raises InputError where its classes are called otherwise."""
    if data.names and reading.classes and data.names != reading.classes:
        odd = next(iter(sorted(set(data.names) ^ set(reading.classes))), data.names[0])
        raise InputError(f"{data.name} has other classes than the model, or in another order: {odd!r} is one")
    return data.scaled_as(reading)
