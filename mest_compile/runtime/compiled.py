"""What the compiler hands to a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.ir.graph import ForwardGraph
from mest_compile.ir.program import Program
from mest_compile.operators.optimizers.optimizer import Optimizer
from mest_compile.planning.facts import Facts
from mest_compile.runtime.runner import Runner
from mest_compile.sparsity.layer import Layer

if TYPE_CHECKING:
    from mest_compile.kernels.cache import Builder
    from mest_compile.kernels.source import KernelSource
    from mest_compile.records.record import Choice


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler hands to a step.

    train, predict   the two programs
    document  JSON from which the same step is compiled again
    runner    makes what holds the arrays and runs the programs
    library   makes the shared library with all of the step's code; None: an artifact has no more to give
    sources   (program name, call name) -> what its kernel was compiled from
    builder   compiled them; None: nothing can be compiled here
    choices   call name of the training program -> its kernel's knobs and where they are from
    """

    facts: Facts
    train: Program
    predict: Program
    document: Mapping[str, Any]
    runner: Callable[[], Runner]
    library: Callable[[], bytes] | None = None
    sources: Mapping[tuple[str, str], KernelSource] = field(default_factory=dict)
    builder: Builder | None = None
    choices: Mapping[str, Choice] = field(default_factory=dict)

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
