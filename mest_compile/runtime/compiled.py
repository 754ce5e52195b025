"""What the compiler hands to a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mest_compile.ir.graph import ForwardGraph
from mest_compile.ir.program import Functions, Program
from mest_compile.operators.optimizers.optimizer import Optimizer
from mest_compile.planning.facts import Facts
from mest_compile.runtime.runner import Runner
from mest_compile.sparsity.layer import Layer

if TYPE_CHECKING:
    from mest_compile.kernels.cache import Builder
    from mest_compile.kernels.source import KernelSource
    from mest_compile.records.record import Choice

Knobs = Mapping[str, Mapping[str, Mapping[str, Any]]]  # program -> call -> what a checkpoint noted of its kernel


class Recompiles(Protocol):
    """Compiles a step's model anew for other facts. Kernels that the step has stay what they are, and so does their
    code."""

    def knobs(self, facts: Facts) -> Knobs:
        """Those of the kernels; nothing is compiled."""

    def ahead(self, coming: Sequence[tuple[Facts, Knobs]]) -> None:
        """Begins to compile the kernels of all of them in other processes, the first ones first, where that is of use.
        Waits for nothing."""

    def compiled(self, facts: Facts, knobs: Knobs) -> Compiled: ...


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler hands to a step.

    train, predict   the two programs
    document  JSON from which the same step is compiled again
    runner    makes what holds the arrays and runs the programs
    dense     compiles the same step with all weights alive, a TrainStep
    library   makes the shared library with all of the step's code, and of that of the steps that it will become, which
              are its argument; None: an artifact has no more to give
    sources   (program name, call name) -> what its kernel was compiled from
    builder   compiled them; None: nothing can be compiled here
    choices   call name of the training program -> its kernel's knobs and where they are from
    again     compiles the model anew; None: there is no compiler here
    fewer     compiles a training program for so many examples: what `Extends.extend` takes; None: there is no compiler
    """

    facts: Facts
    train: Program
    predict: Program
    document: Mapping[str, Any]
    runner: Callable[[], Runner]
    dense: Callable[[], Any]
    library: Callable[..., bytes] | None = None
    sources: Mapping[tuple[str, str], KernelSource] = field(default_factory=dict)
    builder: Builder | None = None
    choices: Mapping[str, Choice] = field(default_factory=dict)
    again: Recompiles | None = None
    fewer: Callable[[int], tuple[Functions, Any]] | None = None

    @property
    def graph(self) -> ForwardGraph:
        """As imported, before fusing."""
        return self.facts.graph

    @property
    def layers(self) -> Mapping[str, Layer]:
        return self.facts.layers

    @property
    def optimizer(self) -> Optimizer:
        return self.facts.optimizer


@dataclass(frozen=True, slots=True)
class StepResult:
    """loss: of the batch, as the step was compiled with; correct: (N,) bool, whether the largest logit is the label's,
    of maps (N, H, W). None of a loss that does not tell that (MSE), which tells outputs: (N, outputs) float32.
    """

    loss: float
    correct: np.ndarray | None
    outputs: np.ndarray | None = None
