"""Candidates on this machine, in a worker process of their own: one that crashes or hangs is killed and costs its trial only."""

from __future__ import annotations

from pathlib import Path

from mest_compile.building import KernelSource
from mest_compile.hardware import Target
from mest_compile.records import Measure, Outcome
from mest_compile.tuning.runner import Runner, RunnerOptions, Timing, runner
from mest_compile.tuning.task import Task
from mest_compile.tuning.worker import check_and_time, compile_kernel


@runner("local")
class LocalRunner(Runner):
    """One candidate at a time, so that none disturbs another; on one thread."""

    measure = Measure.MEASURED
    whole_steps = True

    def __init__(self, target: Target, options: RunnerOptions):
        from tvm.support.popen_pool import PopenWorker

        super().__init__(target, options)
        self._worker = PopenWorker()

    def build(self, source: KernelSource, folder: Path) -> Path:
        path = folder / f"{source.symbol}.so"
        self._worker.send(compile_kernel, (source, str(path)), timeout=self.options.timeout_seconds)
        self._worker.recv()
        return path

    def run(self, task: Task, artifact: Path, symbol: str, repeats: int | None = None) -> Timing:
        self._worker.send(check_and_time, (str(task.arrays), str(artifact), symbol, repeats or self.options.repeats, 1),
                          timeout=self.options.timeout_seconds)
        try:
            wrong, seconds = self._worker.recv()
        except TimeoutError:
            return Timing(Outcome.TIMED_OUT, message=f"no answer after {self.options.timeout_seconds} s")
        except ChildProcessError:
            return Timing(Outcome.CRASHED, message="the process that ran it died")
        return Timing(Outcome.WRONG, message=wrong) if wrong else Timing(Outcome.OK, tuple(seconds))

    def close(self) -> None:
        self._worker.kill()
