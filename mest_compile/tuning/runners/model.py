"""Candidates for an ARM target without one: run and checked under emulation, ranked by modelled cycles or by executed
instructions.

Their "seconds" are cycles, or instructions, in units of 1e-9: a scale, not a time. Records say "modelled" and lose to
any measured one.
"""

from __future__ import annotations

import time
from pathlib import Path

from mest_compile.base.errors import DeviceError
from mest_compile.devices import cycles, emulation
from mest_compile.hardware.target import Target
from mest_compile.kernels.source import KernelSource
from mest_compile.records.log import Measure, Outcome
from mest_compile.records.record import COUNTED, MODEL_UNIT
from mest_compile.tuning.runner import Runner, RunnerOptions, Timing, runner
from mest_compile.tuning.task import Task


@runner("instructions")
class InstructionsRunner(Runner):
    """Fewest executed instructions win. Emulators run beside each other, and a figure is exact: one run is enough."""

    measure = Measure.MODELLED

    def __init__(self, target: Target, options: RunnerOptions):
        super().__init__(target, options)
        emulation.check_tools(emulation.machine_of(target))
        self.devices = options.devices or 1

    @property
    def cpu(self) -> str:
        return f"{COUNTED} under qemu"

    def build(self, source: KernelSource, folder: Path) -> Path:
        path = folder / f"{source.symbol}-{time.monotonic_ns()}.so"
        emulation.build(source, path)
        return path

    def run(self, task: Task, artifact: Path, symbol: str, repeats: int | None = None) -> Timing:
        try:
            execution = emulation.execute(artifact, symbol, task.arguments(), self.target, self.patience_seconds)
        except emulation.EmulationTimeout as problem:
            self.deadline.check()
            return Timing(Outcome.TIMED_OUT, message=str(problem))
        except DeviceError as problem:
            return Timing(Outcome.CRASHED, message=str(problem))
        wrong = task.check(execution.arrays)
        return (
            Timing(Outcome.WRONG, message=wrong)
            if wrong
            else Timing(Outcome.OK, (self._count(execution) * MODEL_UNIT,))
        )

    def _count(self, execution: emulation.Execution) -> float:
        return execution.instructions


@runner("model")
class ModelRunner(InstructionsRunner):
    """Fewest modelled cycles win."""

    def __init__(self, target: Target, options: RunnerOptions):
        super().__init__(target, options)
        self._core = cycles.core_of(target)
        cycles.check_tools()

    @property
    def cpu(self) -> str:
        return f"{self._core}, LLVM {cycles.VERSION}'s model"

    def _count(self, execution: emulation.Execution) -> float:
        return cycles.model(execution, self.target, 0).cycles
