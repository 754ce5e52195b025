"""Softmax cross-entropy, mean over the batch, with its gradient and which examples are right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mest_compile.spec import Image


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Kernel "loss.cross_entropy": logits (logits.elems,), labels (N,) int32, loss (1,), correct (N,) int32, dlogits (dlogits.elems,).

    correct[n] is 1 where the first largest logit is the label's. dlogits is 0 in lanes without an example.
    """

    logits: Image
    dlogits: Image


def cross_entropy_reference(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """(loss, correct (N,) bool, dlogits (classes, 1, 1, N)) in float64; logits (classes, 1, 1, N)."""
    scores = logits.astype(np.float64)[:, 0, 0]
    shifted = scores - scores.max(0)
    chosen = np.arange(len(scores))[:, None] == labels
    loss = (np.log(np.exp(shifted).sum(0)) - shifted[labels, np.arange(len(labels))]).mean()
    gradient = (np.exp(shifted) / np.exp(shifted).sum(0) - chosen) / len(labels)
    return float(loss), scores.argmax(0) == labels, gradient[:, None, None]


def lower_loss(low: Any, logits_name: str, labels: Any, loss: Any, correct: Any) -> None:
    """Records the loss of node `logits_name` and starts the backward pass. labels, loss, correct: buffers as in CrossEntropy."""
    logits = low.value(logits_name)
    dlogits, accumulate = low.contribute(logits_name)
    assert not accumulate, "the loss is the first to give the logits a gradient"
    low.call("loss.cross_entropy", CrossEntropy(logits.image, dlogits.image), logits, labels, loss, correct, dlogits)
