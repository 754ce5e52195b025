"""Losses that are a mean over elements of outputs and numbers: their kernels follow from one expression."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from mest_compile.ir.expressions import Expression
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.losses.loss import LABELS, WEIGHTS, Loss, Shape, numbers, spread_out


@dataclass(frozen=True, slots=True)
class Elementwise:
    """Kernel "loss.elementwise": output (output.elems,), targets (N * k * H * W,), weights (k,) where `weighted`, loss
    (1,), gradient (gradient.elems,).

    term   of `output`, `target` and, where weighted, the output's `weight`. The loss is its mean over all elements
    slope  the term's derivative by `output`; the gradient is 0 in lanes without an example
    """

    output: Image
    gradient: Image
    term: Expression
    slope: Expression
    weighted: bool = False


class ElementwiseLoss(Loss):
    """A mean over all elements of outputs and float targets of the same shape, or (N,) of one output; it does not say
    which examples are right.
    """

    __slots__ = ()
    kernel = "loss.elementwise"
    reads = (("targets", np.float32),)
    tells_correct = False
    metrics = ("mae", "mse")

    @property
    @abstractmethod
    def term(self) -> Expression:
        """Of `output` and `target`, and of the output's `weight` where there are weights."""

    @property
    def slope(self) -> Expression:
        """The term's derivative by `output`."""
        return self.term.derivative("output")

    def weights(self) -> tuple[float, ...] | None:
        """One number for each output; None: the term has no `weight`."""
        return None

    def arrays(self, shape: Shape) -> dict[str, tuple[int, str]]:
        weights = {} if self.weights() is None else {WEIGHTS: (shape[1], "float32")}
        return {LABELS: (prod(shape), "float32"), **weights}

    def targets(self, *given: np.ndarray, shape: Shape) -> dict[str, np.ndarray]:
        return {LABELS: numbers(given[0], shape, "targets", type(self).__name__)}

    def constants(self, shape: Shape) -> dict[str, np.ndarray]:
        weights = self.weights()
        return {} if weights is None else {WEIGHTS: np.array(weights, np.float32)}

    def problem(self, output: Image, gradient: Image) -> Elementwise:
        return Elementwise(output, gradient, self.term, self.slope, self.weights() is not None)

    def reference(
        self, output: np.ndarray, arrays: Mapping[str, np.ndarray]
    ) -> tuple[float, np.ndarray | None, np.ndarray]:
        values = output.astype(np.float64)
        known = {"output": values, "target": spread_out(arrays[LABELS], output)}
        if WEIGHTS in arrays:
            known["weight"] = arrays[WEIGHTS][:, None, None, None]
        slope = np.broadcast_to(self.slope.evaluate(**known), values.shape)
        return float(np.mean(self.term.evaluate(**known))), None, slope / values.size
