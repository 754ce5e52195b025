"""What a loss is: which outputs and targets it takes, what it tells of a batch, and how its gradient starts the
backward pass.

A loss is a file in this folder with one class. One that is a mean over elements is an expression, from which its
kernels follow (`elementwise.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any, ClassVar, TypeVar

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import InputError, SpecError
from mest_compile.base.options import made, plain
from mest_compile.base.registry import Registry
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.conversion import ImageExport
from mest_compile.operators.operator import Trace

LOSSES = Registry("loss", "mest_compile.operators.losses")
L = TypeVar("L", bound="Loss")
Shape = tuple[int, ...]  # of outputs: (N, k), or (N, k, H, W) of maps
LABELS, WEIGHTS, SCALES, SOFT = "labels", "loss:weights", "loss:scales", "loss:soft"  # arrays that kernels read


def loss(name: str) -> Callable[[type[L]], type[L]]:
    """Class decorator: registers a loss under the name that users and files have for it."""

    def register(cls: type[L]) -> type[L]:
        cls.name = name
        LOSSES.add(name, cls)
        return cls

    return register


@dataclass(frozen=True, slots=True)
class Loss(ABC):
    """Base of the losses, of outputs (N, k) or maps (N, k, H, W) and targets. Fields are what users choose, each with a
    default.

    name    for users and in files
    kernel  "loss.cross_entropy", of `problem`: outputs, `arrays`, loss (1,), correct (answers,) int32 where it tells
            that, gradient of the outputs
    reads   what callers give as targets of a batch: (name, numpy's type) of each array, several of them as a tuple
    tells_correct  whether it says which answers are right
    metrics  what models that are trained with it are judged by (training/metrics.py), the first decides which is best
    forgets  what a forgetting event of an example is, for the data sieve; "": there is none
    yes_or_no  whether each output is a question of its own, whose probability of a yes is the output's sigmoid
    """

    name: ClassVar[str]
    kernel: ClassVar[str]
    reads: ClassVar[tuple[tuple[str, type], ...]]
    tells_correct: ClassVar[bool]
    metrics: ClassVar[tuple[str, ...]]
    forgets: ClassVar[str] = ""
    yes_or_no: ClassVar[bool] = False

    @property
    def takes_numbers(self) -> bool:
        """Whether labels are numbers, not classes."""
        return self.reads[0][1] is not np.int64

    @property
    def labels(self) -> dict[str, Any]:
        """Of which kind labels are, as `as_dataset` is told."""
        return {"numbers": self.takes_numbers, **({} if self.ignored is None else {"ignored": self.ignored})}

    @property
    def ignored(self) -> int | None:
        """Label of what does not count; None: every label is a class."""
        return None

    def check(self, shape: Shape) -> None:  # noqa: B027
        """Raises SpecError when it is none of outputs of that shape."""

    @abstractmethod
    def arrays(self, shape: Shape) -> dict[str, tuple[int, str]]:
        """Name -> (elements, dtype) of what kernels read beside outputs of that shape, in their order."""

    @abstractmethod
    def targets(self, *given: np.ndarray, shape: Shape) -> dict[str, np.ndarray]:
        """Those of `arrays` that a batch brings, flat. given: of the types that `reads` says. Raises InputError where
        they are none for outputs of that shape."""

    def constants(self, shape: Shape) -> dict[str, np.ndarray]:
        """Those of `arrays` that are the same for every batch."""
        return {}

    @abstractmethod
    def problem(self, output: Image, gradient: Image) -> Any:
        """What its kernel solves."""

    @abstractmethod
    def reference(
        self, output: np.ndarray, arrays: Mapping[str, np.ndarray]
    ) -> tuple[float, np.ndarray | None, np.ndarray]:
        """(loss, correct (N, H, W) bool or None, gradient) in float64; output and gradient (k, H, W, N), arrays as
        kernels take them."""

    def right(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray | None:
        """(N,) bool, which examples of a batch were answered rightly, where it does not tell; None: there is no such
        thing. outputs and targets (N, k)."""
        return None

    def lower(self, low: Trace, output: str) -> None:
        """Records the loss of node `output` and starts the backward pass. Where it does not tell what is right, the
        outputs come out of the step, too."""
        value = low.value(output)
        image = value.image
        shape = shape_of(image)
        read = [low.hold(name, elems, "batch", dtype) for name, (elems, dtype) in self.arrays(shape).items()]
        told = [low.hold("loss", 1, "batch")]
        if self.tells_correct:
            told.append(low.hold("correct", answers(shape), "batch", "int32"))
        else:
            low.call("image.export", ImageExport(image), value, low.hold("logits", prod(shape), "batch"))
        gradient, accumulate = low.contribute(output)
        assert not accumulate, "the loss is the first to give the outputs a gradient"
        low.call(self.kernel, self.problem(image, gradient.image), value, *read, *told, gradient)

    @classmethod
    def signature(cls) -> str:
        """How users make one."""
        return f"mest.{cls.__name__}({', '.join(field.name for field in fields(cls))})"

    def to_json(self) -> dict[str, Any]:
        """Its name and what users chose."""
        return {"name": self.name, **plain(asdict(self))}


def read_loss(document: Mapping[str, Any]) -> Loss:
    """The loss of a step's facts; those without one are of cross-entropy, as before there were others. Raises
    UnknownName, UsageError, SpecError.
    """
    usual = {"name": "cross_entropy", "smoothing": document.get("label_smoothing", 0.0)}
    return named_loss(document.get("loss", usual))


def named_loss(value: Any) -> Loss:
    """The loss that a name, "name:option=value,...", or a table {"name": ..., option: ...} tells of. Raises
    UnknownName, UsageError, SpecError."""
    return made(LOSSES, value)


def answers(shape: Shape) -> int:
    """How many labels outputs of that shape have: one an example, or one a pixel."""
    return shape[0] * prod(shape[2:])


def shape_of(image: Image) -> Shape:
    """Of outputs: (N, k), or (N, k, H, W) of more pixels than one."""
    pixels = (image.height, image.width)
    return (image.batch, image.channels, *(pixels if pixels != (1, 1) else ()))


def weights_of(name: str, value: Any) -> tuple[float, ...] | None:
    """Weights as a tuple, of any list of numbers of 0 or more. Raises SpecError."""
    if value is None:
        return None
    found = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise SpecError(f"{name} is {checks.shown(value)}; wanted a list of numbers, one a class")
    return tuple(checks.number(f"{name}[{place}]", one, error=SpecError) for place, one in enumerate(found))


def check_weights(name: str, weights: tuple[float, ...] | None, shape: Shape) -> None:
    """Raises SpecError unless there are as many weights as outputs."""
    if weights is not None and len(weights) != shape[1]:
        raise SpecError(f"{name} has {len(weights)} numbers, the model {shape[1]} outputs; wanted one for each")


def check_classes(shape: Shape) -> None:
    """Raises SpecError for a model that tells no two classes apart."""
    if shape[1] < 2:
        raise SpecError(
            "the model gives one logit: softmax cross-entropy over one class is 0 for ever. Compile with "
            "loss=mest.BCE() for yes and no, with loss=mest.MSE() for a number, or give the model an output for each "
            "class"
        )


def class_labels(given: np.ndarray, shape: Shape, ignored: int | None = None) -> np.ndarray:
    """Labels of outputs of that shape as kernels take them, flat int32, -1 where they are `ignored`. Raises
    InputError."""
    wanted, classes = (shape[0], *shape[2:]), shape[1]
    if given.shape != wanted:
        raise InputError(f"labels have shape {given.shape}; wanted {wanted}")
    counted = given if ignored is None else given[given != ignored]
    if counted.size and (counted.min() < 0 or counted.max() >= classes):
        remedy = "" if ignored is None else f", and {ignored} is ignored"
        if ignored is None and (counted[(counted < 0) | (counted >= classes)] == -100).all():
            remedy = "; to leave out those of -100 compile with loss=mest.CrossEntropy(ignore_index=-100)"
        raise InputError(
            f"labels go from {counted.min()} to {counted.max()}; the model has classes 0 to {classes - 1}{remedy}"
        )
    return (given if ignored is None else np.where(given == ignored, -1, given)).astype(np.int32).ravel()


def numbers(given: np.ndarray, shape: Shape, what: str, taker: str) -> np.ndarray:
    """Finite numbers, one for each output, flat. Raises InputError."""
    flat = shape[1] == 1 and given.shape == (shape[0], *shape[2:])
    if given.shape != shape and not flat:
        also = f" or {(shape[0], *shape[2:])}" if shape[1] == 1 else ""
        raise InputError(f"{what} have shape {given.shape}; mest.{taker} takes numbers of shape {shape}{also}")
    if bad := int(np.count_nonzero(~np.isfinite(given))):
        raise InputError(f"{bad} {what} are NaN or infinite; clean the data first")
    return given.ravel()


def spread_out(flat: np.ndarray, output: np.ndarray) -> np.ndarray:
    """Targets (N, k, H, W), flat, in the order of `output` (k, H, W, N)."""
    width, height, columns, batch = output.shape
    return np.moveaxis(flat.reshape(batch, width, height, columns), 0, -1)
