"""Candidates for an OpenCL target on this machine's device, timed by its own clock; a driver that dies costs its trial
only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mest_compile.backends.opencl.code import OpenclKernel, compile_opencl
from mest_compile.backends.opencl.runner import _device, answer_of
from mest_compile.base.errors import BuildError, DeviceError
from mest_compile.hardware.target import Target
from mest_compile.kernels.source import KernelSource
from mest_compile.records.log import Measure, Outcome
from mest_compile.tuning.runner import Runner, RunnerOptions, Timing, runner
from mest_compile.tuning.task import Arrays, Task


@runner("opencl")
class OpenclTuningRunner(Runner):
    """One candidate at a time. What exceeds the target's limits, or what the driver refuses, is a build that failed."""

    measure = Measure.MEASURED

    def __init__(self, target: Target, options: RunnerOptions):
        from tvm.support.popen_pool import PopenWorker

        from mest_compile.backends.opencl.runner import machine

        super().__init__(target, options)
        self._machine = machine(target.limits.name)
        self._worker = PopenWorker()

    @property
    def cpu(self) -> str:
        return self._machine

    def build(self, source: KernelSource, folder: Path) -> Path:
        path = folder / f"{source.symbol}.json"
        self._worker.send(compile_to, (source, str(path)), timeout=self.patience_seconds)
        self._worker.recv()
        return path

    def run(self, task: Task, artifact: Path, symbol: str, repeats: int | None = None) -> Timing:
        return self._ask(
            run_and_time,
            task.kernel,
            task.problem,
            str(artifact),
            str(task.arrays),
            repeats or self.options.repeats,
            self.target.limits.name,
        )

    def _ask(self, what: Callable[..., tuple[str, str, list[float]]], *arguments: object) -> Timing:
        self._worker.send(what, arguments, timeout=self.patience_seconds)
        try:
            outcome, message, seconds = self._worker.recv()
        except TimeoutError:
            self.deadline.check()
            return Timing(Outcome.TIMED_OUT, message=f"no answer after {self.options.timeout_seconds} s")
        except ChildProcessError:
            return Timing(Outcome.CRASHED, message="the process that ran it died")
        return Timing(Outcome(outcome), tuple(seconds), message)

    def close(self) -> None:
        self._worker.kill()


def compile_to(source: KernelSource, path: str) -> None:
    """Writes an OpenclKernel as JSON. Raises BuildError."""
    try:
        found = compile_opencl(source.text, source.symbol, source.target)
    except BuildError:
        raise
    except Exception as problem:  # TVM raises many types
        raise BuildError(
            f"kernel {source.kernel} does not compile for {source.target.name}: {str(problem).strip()[-300:]}"
        ) from problem
    Path(path).write_text(found.to_json())


def run_and_time(
    kernel: str, problem: Any, built: str, arrays_path: str, repeats: int, name: str | None
) -> tuple[str, str, list[float]]:
    """(outcome, message, seconds of each run by the device's clock)."""
    arrays = Arrays.load(Path(arrays_path))
    try:
        device, names = _device(
            kernel, problem, OpenclKernel.from_json(Path(built).read_text()), arrays.arguments, name
        )
    except DeviceError as refusal:  # too much local memory for this device, or its compiler refuses the code
        return Outcome.BUILD_FAILED.value, str(refusal).splitlines()[0][:300], []
    after = answer_of(device, names, arrays.arguments)
    wrong = arrays.check(after)
    if wrong:
        return Outcome.WRONG.value, wrong, []
    return Outcome.OK.value, "", [sum(device.profile("train", 1).values()) for _ in range(repeats)]
