"""mest.tune: the fastest right kernels for a model's step on a device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mest_compile.base import checks
from mest_compile.base.errors import UsageError
from mest_compile.operators.losses.cross_entropy import CrossEntropy
from mest_compile.options import StepOptions, find_loss, find_optimizer
from mest_compile.sparsity import parse_schemes
from mest_compile.tuning.command import Request
from mest_compile.tuning.command import tune as run
from mest_compile.tuning.runner import RunnerOptions
from mest_compile.tuning.session import Progress, SessionResult


def tune(
    model: Any,
    input_shape: Sequence[int],
    trials: int = 64,
    time_limit: float | None = None,
    tracker: str | None = None,
    key: str | None = None,
    runner: str | None = None,
    vectors: Sequence[int] | None = None,
    timeout: float = 30.0,
    devices: int | None = None,
    log: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SessionResult:
    """Searches the fastest kernels of the step that `mest.compile(model, input_shape, **options)` would make.

    Every candidate's answer is checked, every trial is recorded at once; a search that was stopped goes on where it
    was, and `compile` uses the best records.
    model, input_shape  as in `compile`
    trials         candidates of each kernel, those of earlier searches among them
    time_limit     seconds; None: until all have their trials
    tracker, key   "host:port" and name of devices that measure
    runner         who measures: "local", "rpc", or for an ARM target without a device "model" or "instructions"; None:
                   as there is a tracker or not
    vectors        widths of vectors to compare first; None: those that the CPU may gain from
    timeout        seconds that one candidate may take to compile, and to run
    devices        that may measure at once; None: all of that key
    log            file of records; None: the user's of the target
    options        those of `compile`: scheme, sparsity, distribution, target, activations, ...
    Raises UsageError, UnknownName, TargetError, DeviceError, and what `compile` does.
    """
    trials = checks.whole("trials", trials, 1)
    taken = {
        **options,
        "scheme": parse_schemes(options.get("scheme", "block")),
        "loss": find_loss(options.get("loss", CrossEntropy())),
        "optimizer": find_optimizer(options.get("optimizer"), model),
    }
    try:
        said = StepOptions(**taken)
    except TypeError as problem:
        raise UsageError(f"{problem}; tune takes its own options and those of mest.compile") from problem
    path = None if log is None else Path(log)
    request = Request(model, checks.shape("input_shape", input_shape), None, said, runner, vectors, path)
    about = RunnerOptions(tracker, key, timeout, devices=devices)
    return run(request, about, trials, time_limit, progress)
