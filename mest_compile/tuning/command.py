"""What `mest-compile tune` does: a model's step, its layout, then its kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from mest_compile.base.errors import UsageError
from mest_compile.compiling import compile_step
from mest_compile.deciding import decided
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import Target, find_target, obstacle
from mest_compile.kernels.choosing import live_of
from mest_compile.models.sources import find_model
from mest_compile.options import StepOptions
from mest_compile.planning.layout import VECTOR, section_knobs, step_facts
from mest_compile.planning.plan import plan_step
from mest_compile.records.log import FixedRecords, LogFile, Measure, Records, key_of, shipped, user_log
from mest_compile.runtime.trained import read_any
from mest_compile.tuning.deadline import Deadline, TimedBuilder
from mest_compile.tuning.layout import time_sections, time_vectors
from mest_compile.tuning.runner import Runner, RunnerOptions, find_runner
from mest_compile.tuning.session import Progress, Session, SessionResult
from mest_compile.tuning.task import Task

FINAL_ROUNDS = 5  # of each draw, in which whole steps take turns


@dataclass(frozen=True, slots=True)
class Request:
    """A step to tune.

    model    a name, see models.sources, with so many classes and the width and weights that it is to have; or a
             torch.nn.Module
    options  of the step; its seed is that of the model and of the search too
    vectors  widths to compare by whole steps before anything is tuned; None: all that the target may use
    runner   name of a runner; None: "rpc" where there is a tracker, else "local", or "opencl" for an OpenCL target
    log      where records go; None: the user's log of the target
    """

    model: Any
    input_shape: tuple[int, ...]
    width: float | None = None
    options: StepOptions = field(default_factory=StepOptions)
    runner: str | None = None
    vectors: Sequence[int] | None = None
    log: Path | None = None
    classes: int = 10
    weights: str | Path | None = None

    def network(self) -> Any:
        if not isinstance(self.model, str):
            return self.model
        seed = self.options.seed
        return find_model(self.model, self.input_shape, self.classes, self.width, seed, weights=self.weights)


def tune(
    request: Request,
    options: RunnerOptions,
    trials: int,
    time_limit: float | None = None,
    progress: Progress | None = None,
) -> SessionResult:
    """What can be refused is refused before anything is built; what there was no time for is in the result. Raises
    MestError.

    time_limit  seconds from now
    """
    started, deadline = monotonic(), Deadline.after(time_limit)
    request = replace(request, options=decided(request.options, request.input_shape[0]))
    target = find_target(request.options.target).storing(request.options.activations).for_batch(request.input_shape[0])
    kind = find_runner(request.runner or _usual_runner(target, options))
    if kind.whole_steps and (why := obstacle(target)):
        raise UsageError(
            f"--target {request.options.target} is not this machine ({why}); give the --tracker and --key of a device "
            "that it is, or "
            "without one, for an ARM core, --measure model"
        )
    _check_vectors(request)
    runner = kind(target, options)
    try:
        result = _tune(request, target, runner, trials, deadline, progress)
        return replace(result, seconds=monotonic() - started)
    finally:
        runner.close()


def _tune(
    request: Request,
    target: Target,
    runner: Runner,
    trials: int,
    deadline: Deadline,
    progress: Progress | None,
) -> SessionResult:
    options, log = request.options, LogFile(request.log or user_log(target))
    left_out: list[str] = []
    paths = [shipped(target), user_log(target), log.path] if request.log else [shipped(target), user_log(target)]
    records = Records(target, paths, runner.cpu if runner.measure is Measure.MEASURED else None)
    graph, _ = read_any(request.network(), request.input_shape, output=options.output)
    request = replace(request, classes=graph.nodes[-1].shape[1])  # of a model that has its own
    by_steps = runner.measure is Measure.MEASURED and runner.whole_steps
    builder = TimedBuilder(deadline=deadline)
    compiled, batch = partial(_compiled, request, builder), _batch(request)
    layers = plan_step(graph, options, vector=target.vector).layers
    vectors = list(request.vectors or VECTOR.values(step_facts(layers), target)[1:])
    if by_steps and len(vectors) > 1:
        with deadline.noting("comparing vector widths", left_out):
            time_vectors(vectors, layers, target, compiled, batch, log, records, progress, deadline)
    told = vectors[0] if request.vectors and (len(vectors) == 1 or not by_steps) else None
    plan = plan_step(graph, options, lambda _: records, told)
    target, records = plan.target, plan.records
    if by_steps:
        with deadline.noting("comparing sizes of sections", left_out):
            time_sections(
                plan.train,
                plan.layers,
                options.activations,
                target,
                compiled,
                batch,
                log,
                records,
                progress,
                deadline,
            )
        plan = plan_step(graph, replace(options, target=target), lambda _: records, target.vector)
    runner.target = target
    sections = section_knobs(plan.layers, records, options.activations)
    timer = partial(time_in_steps, request, builder, target, sections) if runner.whole_steps else None
    result = Session(plan.train, plan.layers, target, runner, log, records, builder, progress, timer).run(
        trials, deadline, options.seed
    )
    return replace(result, finished=result.finished and not left_out, left_out=(*left_out, *result.left_out))


def time_in_steps(
    request: Request,
    builder: TimedBuilder,
    target: Target,
    sections: Mapping[tuple[str, str, int], Mapping[str, Any]],
    choices: Sequence[Mapping[Task, Mapping[str, Any]]],
) -> list[dict[Task, list[float]]]:
    """For every choice of knobs, {task: seconds of one of its calls in each round}. What a kernel finds in the caches
    is there what the kernels before it left, and how it leaves them counts in nobody's favour.

    sections  `section_knobs` of the step
    Raises OutOfTime.
    """
    knobs = [
        {key_of(task.kernel, task.problem, task.live): knobs for task, knobs in choice.items()} for choice in choices
    ]
    steps = [_compiled(request, builder, target, FixedRecords(target, {**sections, **found})) for found in knobs]
    images, labels = _batch(request)
    found: list[dict[Task, list[float]]] = [{task: [] for task in choice} for choice in choices]
    calls = {
        task: [
            call.name
            for call in steps[0].program.calls
            if (call.kernel, call.problem, live_of(call, steps[0].layers)) == (task.kernel, task.problem, task.live)
        ]
        for choice in choices
        for task in choice
    }
    for _ in range(FINAL_ROUNDS):
        for step, seconds in zip(steps, found):
            builder.deadline.check()
            profile = step.profile(images, labels, 1)
            for task, known in seconds.items():
                known.append(sum(profile[name] for name in calls[task]) / len(calls[task]))
    return found


def _compiled(request: Request, builder: TimedBuilder, target: Target, records: Records) -> Any:
    options = replace(request.options, target=target, threads=1)
    return compile_step(request.network(), request.input_shape, options, builder=builder, records=records)


def _batch(request: Request) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(request.options.seed)
    return rng.standard_normal(request.input_shape, np.float32), rng.integers(
        0, request.classes, request.input_shape[0]
    )


def _usual_runner(target: Target, options: RunnerOptions) -> str:
    if options.tracker:
        return "rpc"
    return backend_of(target).tuner


def _check_vectors(request: Request) -> None:
    batch = request.input_shape[0]
    for vector in request.vectors or ():
        if vector < 1 or vector & (vector - 1) or batch % vector:
            raise UsageError(f"vector width {vector}; wanted powers of two that divide the batch of {batch}")
