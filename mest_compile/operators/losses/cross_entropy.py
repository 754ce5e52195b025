"""Softmax cross-entropy, mean over the batch, with its gradient and which examples are right.

With label smoothing the label's class is wanted with 1 - smoothing, and all classes share the rest (Szegedy et al., arXiv:1512.00567).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.operator import Trace


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Kernel "loss.cross_entropy": logits (logits.elems,), labels (N,) int32, loss (1,), correct (N,) int32, dlogits (dlogits.elems,).

    correct[n] is 1 where the first largest logit is the label's; NaN is larger than any number. dlogits is 0 in lanes without an example.
    """

    logits: Image
    dlogits: Image
    smoothing: float = 0.0


def cross_entropy_reference(logits: np.ndarray, labels: np.ndarray, smoothing: float = 0.0) -> tuple[float, np.ndarray, np.ndarray]:
    """(loss, correct (N,) bool, dlogits (classes, 1, 1, N)) in float64; logits (classes, 1, 1, N)."""
    scores = logits.astype(np.float64)[:, 0, 0]
    shifted = scores - scores.max(0)
    wanted = (np.arange(len(scores))[:, None] == labels) * (1 - smoothing) + smoothing / len(scores)
    chosen = np.where(wanted > 0, shifted * wanted, 0).sum(0)  # what is not wanted does not count, however small it is
    loss = (np.log(np.exp(shifted).sum(0)) - chosen).mean()
    gradient = (np.exp(shifted) / np.exp(shifted).sum(0) - wanted) / len(labels)
    return float(loss), scores.argmax(0) == labels, gradient[:, None, None]


def lower_loss(low: Trace, logits_name: str, labels: Any, loss: Any, correct: Any, smoothing: float = 0.0) -> None:
    """Records the loss of node `logits_name` and starts the backward pass. labels, loss, correct: buffers as in CrossEntropy."""
    logits = low.value(logits_name)
    dlogits, accumulate = low.contribute(logits_name)
    assert not accumulate, "the loss is the first to give the logits a gradient"
    low.call("loss.cross_entropy", CrossEntropy(logits.image, dlogits.image, smoothing), logits, labels, loss, correct, dlogits)
