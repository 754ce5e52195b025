"""What a model gets right and wrong: by class, as a matrix, how sure it is beside how right, and the worst examples."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from mest_compile.training.exhibits import png_of

WORST = 12  # examples shown
DARK = 64  # the largest value of pixels that are not in 0 to 255, as of scikit-learn's digits
BINS = 10  # of probabilities, for calibration


def probabilities(logits: np.ndarray) -> np.ndarray:
    """(n, classes) float64, each row's softmax."""
    shares = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """float64 of the same shape, each the probability of a yes."""
    shares = np.exp(-np.abs(logits.astype(np.float64)))  # at most 1: no overflow
    return np.where(logits < 0, shares, 1) / (1 + shares)


def judged(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """JSON-able: accuracy, confusion matrix (a row a class as it is, a column as it was called), and by class the
    share of its examples that was found (recall) and of its answers that were right (precision); None of nothing.

    logits (n, classes) float32; labels (n,) int64
    """
    count = len(classes)
    confusion = np.zeros((count, count), np.int64)
    np.add.at(confusion, (labels, logits.argmax(1)), 1)
    right, there, called = confusion.diagonal(), confusion.sum(1), confusion.sum(0)

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    return {
        "accuracy": float(right.sum() / len(labels)),
        "examples": len(labels),
        "confusion": confusion.tolist(),
        "classes": {
            name: {
                "examples": int(there[place]),
                "recall": share(int(right[place]), int(there[place])),
                "precision": share(int(right[place]), int(called[place])),
            }
            for place, name in enumerate(classes)
        },
    }


def worst(logits: np.ndarray, labels: np.ndarray) -> list[tuple[int, int, float]]:
    """(example, class that it was called, its probability) of wrong answers, the surest first; at most WORST."""
    sure = probabilities(logits)
    answers = logits.argmax(1)
    wrong = np.flatnonzero(answers != labels)
    order = wrong[np.argsort(-sure[wrong, answers[wrong]], kind="stable")][:WORST]
    return [(int(place), int(answers[place]), float(sure[place, answers[place]])) for place in order]


def calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """JSON-able: the expected calibration error, and of every tenth of the probabilities that answers had how many
    there were, their mean probability and the share that was right.

    logits (n, classes) float32; labels (n,) int64
    Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599.
    """
    shares = probabilities(logits)
    sure, right = shares.max(1), shares.argmax(1) == labels
    places = np.minimum((sure * BINS).astype(int), BINS - 1)
    rows = [
        {
            "from": place / BINS,
            "examples": int(mine.sum()),
            "probability": float(sure[mine].mean()),
            "accuracy": float(right[mine].mean()),
        }
        for place in range(BINS)
        if (mine := places == place).any()
    ]
    error = sum(row["examples"] * abs(row["probability"] - row["accuracy"]) for row in rows) / len(labels)
    return {"error": error, "bins": rows}


def verdict_of(outputs: np.ndarray, data: Any, classes: Sequence[str], part: str, epoch: int) -> dict[str, Any]:
    """JSON-able, what a run keeps of an evaluation: `judged`, "calibration" and the surest wrong answers, with their
    pictures where there are some.

    outputs  (n, classes) float32 for the examples of `data`, a Dataset or a Stream's (labels alone)
    part     "test" or "val"
    """
    counted = np.flatnonzero((data.labels >= 0) & (data.labels < len(classes)))
    outputs, labels = outputs[counted], data.labels[counted]
    return {
        "part": part,
        "epoch": epoch,
        **judged(outputs, labels, classes),
        "calibration": calibration(outputs, labels),
        "worst": [
            {
                "example": int(counted[place]),
                "class": classes[labels[place]],
                "called": classes[called],
                "sure": sure,
                "png": _picture(data, int(counted[place])),
            }
            for place, called, sure in worst(outputs, labels)
        ],
    }


def _picture(data: Any, place: int) -> str | None:
    """A picture as PNG in base64; None of what is none, and where Pillow is not installed."""
    images = getattr(data, "images", None)
    if images is None or images.dtype != np.uint8 or images.shape[1] not in (1, 3) or not find_spec("PIL"):
        return None
    stretch = 255 // max(1, int(images[place].max())) if images.max() < DARK else 1
    return base64.b64encode(png_of(images[place] * np.uint8(stretch))).decode()
