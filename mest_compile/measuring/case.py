"""What is timed: one training step, the same for every contestant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base.errors import UsageError
from mest_compile.hardware.host import cores
from mest_compile.operators.optimizers.sgd import SGD
from mest_compile.options import StepOptions

if TYPE_CHECKING:
    import torch

PROGRAM, STEP = "model.pt2", "step.safetensors"  # what a folder given as Case.model holds


def usual() -> StepOptions:
    """What a case is compiled with that says no other."""
    return StepOptions(threads=1, optimizer=SGD(lr=0.01))


@dataclass(frozen=True, slots=True)
class Case:
    """What both sides compute: a step on random images.

    model        a model's name, see models.sources, or a folder with a torch.export program of it in training mode and
                 our compiled step
    input_shape  (N, C, H, W), (N, C, L) or (N, features), elements
    width        channels of the first stage; None is the model's own
    weights      file of them
    options      of our step. Threads, seed, optimizer and loss are the other side's as well; dense contestants ignore
                 what is said of sparsity, all but ours what is said of memory
    """

    model: str
    input_shape: tuple[int, ...] = (64, 3, 32, 32)
    width: float | None = None
    classes: int = 10
    weights: str | None = None
    options: StepOptions = field(default_factory=usual)

    def but(self, **options: Any) -> Case:
        """The same with other options of the step."""
        return replace(self, options=replace(self.options, **options))

    @property
    def threads(self) -> int:
        """Of both sides."""
        return self.options.threads or cores()

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """(images of input_shape float32, labels (N,) int64), the same in every process."""
        rng = np.random.default_rng(self.options.seed)
        images = rng.standard_normal(self.input_shape, dtype=np.float32)
        return images, rng.integers(0, self.classes, self.input_shape[0])

    def source(self) -> torch.nn.Module | str:
        """The model, with the weights that every contestant starts from; of an .onnx file, a run folder, a checkpoint
        or an artifact its path, which our steps are compiled from."""
        from mest_compile.models.sources import find_model

        return find_model(
            self.model, self.input_shape, self.classes, self.width, self.options.seed, weights=self.weights
        )

    def network(self) -> torch.nn.Module:
        """The same for sides that train modules alone. Raises UsageError for a file."""
        found = self.source()
        if isinstance(found, str):
            raise UsageError(
                f"model is {found!r}; torch cannot train an .onnx file, a run folder, a checkpoint or an artifact: "
                "compare it with our own dense step, --vs mest-dense, or give a torch.nn.Module, as file.py:FACTORY"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """JSON-able, the options beside the rest; `from_json` gives an equal case back."""
        given = {} if self.weights is None else {"weights": self.weights}
        rest = {"model": self.model, "input_shape": list(self.input_shape)}
        return {**rest, "width": self.width, "classes": self.classes, **given, **self.options.to_json()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Case:
        """Raises KeyError, TypeError and MestError when the document is none."""
        options = dict(document)
        model, shape, width, classes = (options.pop(name) for name in ("model", "input_shape", "width", "classes"))
        weights = options.pop("weights", None)
        return cls(model, tuple(shape), width, classes, weights, StepOptions.from_json(options))


@dataclass(frozen=True, slots=True)
class Built:
    """A training step that returns its loss, and what its builder knows about it.

    planned_bytes  memory that the step says it needs, None where it does not say
    cold           whether something was compiled that a second process would find ready; the harness then starts a
                   second one, because a compiler leaves memory behind that is no part of training
    notes          what a reader must know to judge the comparison
    """

    step: Callable[[], float]
    planned_bytes: int | None = None
    cold: bool = False
    notes: tuple[str, ...] = ()
