"""Trained models again: a step to look at, or a model to compile, out of a run folder, a checkpoint or an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import DeviceError, SpecError, UsageError
from mest_compile.frontend import import_model
from mest_compile.frontend.refusals import Refusals
from mest_compile.ir.graph import ForwardGraph
from mest_compile.models.sources import is_trained
from mest_compile.planning.facts import Facts, read_facts
from mest_compile.planning.freezing import thawed
from mest_compile.runtime import checkpoint
from mest_compile.runtime.compiled import Compiled
from mest_compile.runtime.step import TrainStep
from mest_compile.runtime.store import StoreRunner


def read_any(
    model: Any, input_shape: Sequence[Any], refusals: Refusals | None = None, output: str | int | None = None
) -> tuple[ForwardGraph, dict[str, np.ndarray]]:
    """As `frontend.import_model`, which it is but for models that are trained already: those have their graph, with
    what training froze able to train again, and weights that are zero where they are dead.

    Raises StateError, and SpecError where the trained model takes other images.
    """
    if not (isinstance(model, str | Path) and is_trained(model)):
        return import_model(model, input_shape, refusals, output)
    if output is not None:
        raise UsageError(f"output is {output!r}, and {model} was compiled with its logits alone; leave output out")
    step, (input_shape, _) = read_step(model), checks.shapes("input_shape", input_shape)
    if tuple(input_shape[1:]) != step.input_shape[1:]:
        raise SpecError(
            f"the model of {model} takes {step.input_shape[1:]} an example, not {tuple(input_shape[1:])}; give an "
            f"input_shape of (N, {', '.join(map(str, step.input_shape[1:]))})"
        )
    return thawed(step.graph).with_batch(input_shape[0]), step.state_dict()


def read_step(path: str | Path) -> TrainStep:
    """The step that `step.save` wrote with all its state and without kernels: to be looked at, not to be run. Raises
    StateError."""
    return step_of(*checkpoint.read(path), path)


def step_of(arrays: Mapping[str, np.ndarray], document: dict[str, Any], path: str | Path) -> TrainStep:
    """`read_step` of what a checkpoint holds; path: where it is from."""
    facts = read_facts(document, f"checkpoint {path}")
    runner = partial(StoreRunner, facts.target.name, "it was opened to be read")
    step = TrainStep(Compiled(facts, *facts.lower(), document, runner, no_dense_step), zeros(facts))
    step._restore(arrays, document, path)
    return step


def zeros(facts: Facts) -> dict[str, np.ndarray]:
    """A state to begin with, before that of a file takes its place."""
    return {name: np.zeros(shape, np.float32) for name, shape in facts.graph.state_shapes.items()}


def no_dense_step() -> NoReturn:
    raise DeviceError(
        "gradients of dead weights need a dense step, which an artifact does not have; use method em, em_s or set"
    )
