"""What a loss is: which outputs and targets it takes, what it tells of a batch, and how its gradient starts the
backward pass.

A loss is a file in this folder with one class. One that is a mean over elements is an expression, from which its
kernels follow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

import numpy as np

from mest_compile.base.errors import InputError
from mest_compile.base.registry import Registry
from mest_compile.ir.expressions import Expression
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.operator import Trace

LOSSES = Registry("loss", "mest_compile.operators.losses")
L = TypeVar("L", bound="Loss")


def loss(name: str) -> Callable[[type[L]], type[L]]:
    """Class decorator: registers a loss under the name that users and files have for it."""

    def register(cls: type[L]) -> type[L]:
        cls.name = name
        LOSSES.add(name, cls)
        return cls

    return register


@dataclass(frozen=True, slots=True)
class Loss(ABC):
    """Base of the losses, of outputs (N, k) and targets. Fields are what users choose, each with a default.

    name    for users and in files
    kernel  "loss.cross_entropy", of `problem`: outputs, targets, loss (1,), correct (N,) int32 where it tells that,
            gradient of the outputs
    reads   numpy's type of the targets that callers give
    dtype   what kernels take them as
    tells_correct  whether it says which examples are right
    """

    name: ClassVar[str]
    kernel: ClassVar[str]
    reads: ClassVar[type]
    dtype: ClassVar[str]
    tells_correct: ClassVar[bool]

    def check(self, shape: tuple[int, int]) -> None:  # noqa: B027
        """Raises SpecError when it is none of outputs of that shape (N, k)."""

    @abstractmethod
    def target_elems(self, shape: tuple[int, int]) -> int:
        """Numbers of the targets of outputs of that shape."""

    @abstractmethod
    def targets(self, given: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """What kernels take, flat, of targets of type `reads`. Raises InputError where they are none for outputs of
        that shape."""

    @abstractmethod
    def problem(self, output: Image, gradient: Image) -> Any:
        """What its kernel solves."""

    @abstractmethod
    def reference(self, output: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray | None, np.ndarray]:
        """(loss, correct (N,) bool or None, gradient) in float64; output and gradient (k, 1, 1, N), targets as kernels
        take them."""

    def lower(self, low: Trace, output: str) -> None:
        """Records the loss of node `output` and starts the backward pass."""
        value = low.value(output)
        batch, width = value.image.batch, value.image.channels
        targets = low.hold("labels", self.target_elems((batch, width)), "batch", self.dtype)
        told = [
            low.hold("loss", 1, "batch"),
            *([low.hold("correct", batch, "batch", "int32")] if self.tells_correct else []),
        ]
        gradient, accumulate = low.contribute(output)
        assert not accumulate, "the loss is the first to give the outputs a gradient"
        low.call(self.kernel, self.problem(value.image, gradient.image), value, targets, *told, gradient)

    @classmethod
    def signature(cls) -> str:
        """How users make one."""
        return f"mest.{cls.__name__}({', '.join(field.name for field in fields(cls))})"

    def to_json(self) -> dict[str, Any]:
        """Its name and what users chose."""
        return {"name": self.name, **asdict(self)}


def read_loss(document: Mapping[str, Any]) -> Loss:
    """The loss of a step's facts; those without one are of cross-entropy, as before there were others. Raises
    UnknownName, TypeError, SpecError.
    """
    chosen = dict(document.get("loss", {"name": "cross_entropy", "smoothing": document.get("label_smoothing", 0.0)}))
    return LOSSES.find(chosen.pop("name"))(**chosen)


@dataclass(frozen=True, slots=True)
class Elementwise:
    """Kernel "loss.elementwise": output (output.elems,), targets (N * k,), loss (1,), gradient (gradient.elems,).

    term  of `output` and `target`. The loss is its mean over all elements; the gradient is 0 in lanes without an
          example.
    """

    output: Image
    gradient: Image
    term: Expression

    @property
    def slope(self) -> Expression:
        return self.term.derivative("output")


class ElementwiseLoss(Loss):
    """A mean over all elements of outputs and float targets (N, k), or (N,) of one output; it does not say which
    examples are right.

    term  of `output` and `target`
    """

    __slots__ = ()
    kernel = "loss.elementwise"
    reads = np.float32
    dtype = "float32"
    tells_correct = False

    @property
    @abstractmethod
    def term(self) -> Expression:
        """Of `output` and `target`."""

    def target_elems(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1]

    def targets(self, given: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        if given.shape != shape and not (shape[1] == 1 and given.shape == shape[:1]):
            raise InputError(
                f"targets have shape {given.shape}; mest.{type(self).__name__} takes numbers of shape {shape}"
                + (f" or {shape[:1]}" if shape[1] == 1 else "")
            )
        if bad := int(np.count_nonzero(~np.isfinite(given))):
            raise InputError(f"{bad} targets are NaN or infinite; clean the data first")
        return given.ravel()

    def problem(self, output: Image, gradient: Image) -> Elementwise:
        return Elementwise(output, gradient, self.term)

    def reference(self, output: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray | None, np.ndarray]:
        values = output.astype(np.float64)
        known = {"output": values, "target": targets.reshape(values.shape[3], -1).T[:, None, None]}
        slope = np.broadcast_to(self.term.derivative("output").evaluate(**known), values.shape)
        return float(np.mean(self.term.evaluate(**known))), None, slope / values.size
