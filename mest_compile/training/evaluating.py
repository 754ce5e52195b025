"""How good a step's answers are, after an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import numpy as np

from mest_compile.data import Dataset, Stream, parts
from mest_compile.training.given import Given
from mest_compile.training.judging import Judge
from mest_compile.training.runfolder import RunFolder
from mest_compile.training.verdict import verdict_of

MOST_ANSWERS = 2**25  # numbers that are held of an evaluation, 128 MiB


def evaluate(
    step: Any, judge: Judge, data: Dataset | Stream, part: str = "test", kept: list[np.ndarray] | None = None
) -> dict[str, Any]:
    """Metrics of what the step answers for data, called after the part that they are. kept: gets the outputs too."""
    began = perf_counter()

    def answered() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in parts(data, step.batch):
            outputs = np.asarray(step.predict(images.reshape(len(images), *step.input_shape[1:])))
            if kept is not None:
                kept.append(outputs)
            yield outputs, labels

    return {**judge.tested(answered(), part), "evaluation_seconds": perf_counter() - began}


def judge_all(step: Any, judge: Judge, given: Given, epoch: int, folder: RunFolder | None, now: bool) -> dict[str, Any]:
    """Metrics of each part that the run is judged by; None where it is not this time, or there is no test set. The
    folder gets what the last part's classes were called. epoch: whole ones by now."""
    names = [f"{part}_{metric.name}" for part in {**given.judging, "test": None} for metric in judge.metrics]
    found: dict[str, Any] = {**dict.fromkeys(names), "evaluation_seconds": 0.0}
    for part, data in given.judging.items() if now else ():
        classes = step.reading.classes
        classed = isinstance(data, Dataset) and data.labels.ndim == 1 and not data.numbers
        whole = classed and len(data) * len(classes) <= MOST_ANSWERS
        keeps = folder is not None and judge.loss.tells_correct and len(judge.shape) == 2 and whole
        kept: list[np.ndarray] | None = [] if keeps else None
        answered = evaluate(step, judge, data, part, kept)
        found |= answered | {"evaluation_seconds": found["evaluation_seconds"] + answered["evaluation_seconds"]}
        if kept and folder is not None:
            folder.write_verdict(verdict_of(np.concatenate(kept), data, classes, part, epoch))
    return found
