"""Candidates on this machine, in a worker process of their own: one that crashes or hangs is killed and costs its trial
only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mest_compile.base.errors import BuildError, UsageError
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import Target
from mest_compile.kernels.source import KernelSource
from mest_compile.records.log import Measure, Outcome
from mest_compile.tuning.runner import Runner, RunnerOptions, Timing, runner
from mest_compile.tuning.task import Task
from mest_compile.tuning.worker import check_and_time, compile_check_and_time, compile_kernel


@runner("local")
class LocalRunner(Runner):
    """One candidate at a time, so that none disturbs another; on one thread."""

    measure = Measure.MEASURED
    whole_steps = True

    def __init__(self, target: Target, options: RunnerOptions):
        from tvm.support.popen_pool import PopenWorker

        super().__init__(target, options)
        if not backend_of(target).processor:
            raise UsageError(
                f"the local runner measures on CPUs, target {target.name!r} is of kind {target.device!r}; leave out "
                "--runner"
            )
        self._worker = PopenWorker()

    def build(self, source: KernelSource, folder: Path) -> Path:
        path = folder / f"{source.symbol}.so"
        self._worker.send(compile_kernel, (source, str(path)), timeout=self.patience_seconds)
        self._worker.recv()
        return path

    def run(self, task: Task, artifact: Path, symbol: str, repeats: int | None = None) -> Timing:
        return self._ask(check_and_time, str(task.arrays), str(artifact), symbol, repeats or self.options.repeats, 1)

    def attempt(self, task: Task, source: KernelSource, folder: Path, repeats: int | None = None) -> Timing:
        return self._ask(compile_check_and_time, source, str(task.arrays), repeats or self.options.repeats, 1)

    def _ask(self, what: Callable[..., tuple[str | None, list[float]]], *arguments: object) -> Timing:
        self._worker.send(what, arguments, timeout=self.patience_seconds)
        try:
            wrong, seconds = self._worker.recv()
        except BuildError as problem:
            return Timing(Outcome.BUILD_FAILED, message=str(problem))
        except TimeoutError:
            self.deadline.check()
            return Timing(Outcome.TIMED_OUT, message=f"no answer after {self.options.timeout_seconds} s")
        except ChildProcessError:
            return Timing(Outcome.CRASHED, message="the process that compiled and ran it died")
        return Timing(Outcome.WRONG, message=wrong) if wrong else Timing(Outcome.OK, tuple(seconds))

    def close(self) -> None:
        self._worker.kill()
