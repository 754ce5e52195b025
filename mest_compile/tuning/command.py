"""What `mest-compile tune` does: a model's step, its vector width, then its kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import numpy as np

from mest_compile.choosing import choose_vector, live_of, step_facts, widened
from mest_compile.compiling import compile as compile_step
from mest_compile.errors import UsageError
from mest_compile.frontend import import_model
from mest_compile.graph.fusing import fuse
from mest_compile.graph.lowering import lower
from mest_compile.hardware import Target, find_target
from mest_compile.models import build_model
from mest_compile.planning import plan_layers
from mest_compile.records import (
    STEP,
    FixedRecords,
    LogFile,
    Measure,
    Outcome,
    Record,
    Records,
    key_of,
    shipped,
    target_facts,
    text_digest,
    user_log,
)
from mest_compile.sparsity import parse_scheme
from mest_compile.tuning.runner import RunnerOptions, find_runner
from mest_compile.tuning.session import Progress, Session, SessionResult
from mest_compile.tuning.task import Task

STEP_ROUNDS = 7  # in which whole steps of every vector width take turns


@dataclass(frozen=True, slots=True)
class Request:
    """A step to tune.

    vectors  widths to compare by whole steps before anything is tuned; None: the width on record for such a step, else the target's
    runner   name of a runner; None: "rpc" where there is a tracker, else "local", or "opencl" for an OpenCL target
    log      where records go; None: the user's log of the target
    activations  what the step stores values as
    """

    model: str
    input_shape: tuple[int, ...]
    width: int | None = None
    scheme: str = "block"
    sparsity: float = 0.9
    distribution: str = "uniform"
    target: str = "local"
    runner: str | None = None
    vectors: Sequence[int] | None = None
    log: Path | None = None
    seed: int = 0
    activations: str = "float32"


def tune(request: Request, options: RunnerOptions, trials: int, time_limit: float | None = None,
         progress: Progress | None = None) -> SessionResult:
    """Raises MestError."""
    started = monotonic()
    target, scheme = find_target(request.target).for_batch(request.input_shape[0]), parse_scheme(request.scheme)
    kind = find_runner(request.runner or _usual_runner(target, options))
    log = LogFile(request.log or user_log(target))
    records = Records(target, [shipped(target), user_log(target), log.path] if request.log else [shipped(target), user_log(target)])
    graph, _ = import_model(build_model(request.model, request.input_shape, 10, request.width, request.seed), request.input_shape)

    def planned(target: Target):
        return plan_layers(graph, scheme, request.sparsity, request.distribution, None, target, request.activations)

    vectors = _vectors(request, target)
    if kind.measure is Measure.MEASURED and kind.whole_steps and len(vectors) > 1:
        _time_vectors(request, vectors, planned(target), target, records, log, progress)
        target = choose_vector(planned(target), target, records)
    else:
        target = widened(target, vectors[0]) if request.vectors else choose_vector(planned(target), target, records)
    layers = planned(target)
    train, _ = lower(fuse(graph), layers, target, activations=request.activations)
    runner = kind(target, options)
    try:
        left = None if time_limit is None else max(time_limit - (monotonic() - started), 0.0)
        timer = partial(time_in_steps, request, target) if kind.whole_steps else None
        session = Session(train, layers, target, runner, log, records.for_target(target), progress=progress, in_step=timer)
        return session.run(trials, left, request.seed)
    finally:
        runner.close()


def time_in_steps(request: Request, target: Target, choices: Sequence[Mapping[Task, Mapping[str, Any]]]) -> list[dict[Task, list[float]]]:
    """For every choice of knobs, {task: seconds of one of its calls in each round}. What a kernel finds in the caches is there what the
    kernels before it left, and how it leaves them counts in nobody's favour.
    """
    steps = [_compiled(request, target, FixedRecords(target, {key_of(task.kernel, task.problem, task.live): knobs
                                                              for task, knobs in choice.items()})) for choice in choices]
    images, labels = _batch(request)
    found: list[dict[Task, list[float]]] = [{task: [] for task in choice} for choice in choices]
    calls = {task: [call.name for call in steps[0].program.calls
                    if (call.kernel, call.problem, live_of(call, steps[0].layers)) == (task.kernel, task.problem, task.live)]
             for choice in choices for task in choice}
    for _ in range(STEP_ROUNDS):
        for step, seconds in zip(steps, found):
            profile = step.profile(images, labels, 1)
            for task, known in seconds.items():
                known.append(sum(profile[name] for name in calls[task]) / len(calls[task]))
    return found


def _compiled(request: Request, target: Target, records: Records) -> Any:
    return compile_step(build_model(request.model, request.input_shape, 10, request.width, request.seed), request.input_shape,
                        scheme=request.scheme, sparsity=request.sparsity, distribution=request.distribution, target=target, threads=1,
                        activations=request.activations, records=records)


def _batch(request: Request) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(request.seed)
    return rng.standard_normal(request.input_shape, np.float32), rng.integers(0, 10, request.input_shape[0])


def _usual_runner(target: Target, options: RunnerOptions) -> str:
    if options.tracker:
        return "rpc"
    return "opencl" if target.device == "opencl" else "local"


def _vectors(request: Request, target: Target) -> list[int]:
    batch = request.input_shape[0]
    for vector in request.vectors or ():
        if vector < 1 or vector & (vector - 1) or batch % vector:
            raise UsageError(f"vector width {vector}; wanted powers of two that divide the batch of {batch}")
    return list(request.vectors or [target.vector])


def _time_vectors(request: Request, vectors: Sequence[int], layers: Any, target: Target, records: Records, log: LogFile,
                  progress: Progress | None) -> None:
    """Records how long untuned whole steps take with each vector width; those of this very step that are on record are not timed again."""
    facts = step_facts(layers)
    known = records.trials(STEP, facts, 0)
    if known.seconds:
        return
    if progress:
        progress.on_stage("timing whole steps by vector width", 0, 1)
    wide = {vector: widened(target, vector) for vector in vectors}
    steps = {vector: _compiled(request, wide[vector], Records(wide[vector])) for vector in vectors}
    seconds = time_in_turns(steps, request)
    for vector, found in seconds.items():
        knobs = {} if vector == target.vector else {"vector": vector}
        record = Record(STEP, facts, 0, target_facts(target), records.cpu, knobs, Outcome.OK, Measure.MEASURED, found, text_digest(STEP))
        log.append(record)
        records.add(record)


def time_in_turns(steps: dict[int, Any], request: Request) -> dict[int, tuple[float, ...]]:
    """Seconds of training steps on random images, STEP_ROUNDS each after one that is not counted."""
    images, labels = _batch(request)
    seconds: dict[int, list[float]] = {name: [] for name in steps}
    for turn in range(STEP_ROUNDS + 1):
        for name, step in steps.items():
            start = perf_counter()
            step(images, labels)
            if turn:
                seconds[name].append(perf_counter() - start)
    return {name: tuple(found) for name, found in seconds.items()}


