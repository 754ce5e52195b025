"""What a runner is: it builds a candidate's kernel, runs it on a device, checks its answer and times it.

To add one (a modelled clock, OpenCL, another way to reach a device), put a file into runners/:

    @runner("modelled")
    class ModelledRunner(Runner):
        measure = Measure.MODELLED
        def __init__(self, target, options): ...           # options: RunnerOptions, what the command line was given
        def build(self, source, folder): ...               # the default compiles a shared library for the target
        def run(self, task, artifact): ...                 # -> Timing; must not raise for what a candidate did

A candidate's failures are results: `attempt` turns what `build` raises into one. `task.arguments()` are valid arrays,
`task.check(arrays)` says what is wrong with the arrays after a run, None when they are right; a runner whose device
computes answers must call it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from mest_compile.base.errors import BuildError
from mest_compile.base.registry import Registry
from mest_compile.hardware.target import Target
from mest_compile.kernels.source import KernelSource
from mest_compile.records.log import Measure, Outcome, cpu_of
from mest_compile.tuning.deadline import Deadline

if TYPE_CHECKING:
    from mest_compile.tuning.task import Task

RUNNERS = Registry("tuning runner", "mest_compile.tuning.runners")


R = TypeVar("R", bound="type[Runner]")


def runner(name: str) -> Callable[[R], R]:
    """Class decorator: registers a runner."""

    def register(cls: R) -> R:
        RUNNERS.add(name, cls)
        return cls

    return register


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """What a runner may need to know.

    tracker, key     "host:port" of an RPC tracker, and the key that devices are listed under
    timeout_seconds  of one candidate's build, and of its run
    repeats          timed runs of a candidate
    devices          candidates that may be timed at once; a runner takes fewer when it has fewer devices. None: every
                     device that a tracker has, else one
    """

    tracker: str | None = None
    key: str | None = None
    timeout_seconds: float = 30.0
    repeats: int = 7
    devices: int | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """How a candidate did: seconds of each run when the outcome is OK, else a message."""

    outcome: Outcome
    seconds: tuple[float, ...] = ()
    message: str = ""


class Runner(ABC):
    """measure: where its seconds come from; devices: how many candidates it times at once; whole_steps: whether
    training steps run there in this process, so that vector widths can be compared; deadline: of the session that it
    works for.
    """

    measure: Measure
    whole_steps: ClassVar[bool] = False

    def __init__(self, target: Target, options: RunnerOptions):
        self.target, self.options = target, options
        self.devices, self.deadline = 1, Deadline()

    @property
    def cpu(self) -> str:
        """The machine for the records."""
        return cpu_of(self.target)

    @property
    def patience_seconds(self) -> float:
        """How long a candidate may take. Raises OutOfTime. One that is ended by the session's deadline is no result:
        check that first."""
        self.deadline.check()
        return min(self.options.timeout_seconds, self.deadline.left)

    @abstractmethod
    def build(self, source: KernelSource, folder: Path) -> Path:
        """Compiles a kernel to a file in `folder`. Raises BuildError; TimeoutError, ChildProcessError when the compiler
        hung or died."""

    @abstractmethod
    def run(self, task: Task, artifact: Path, symbol: str, repeats: int | None = None) -> Timing:
        """Runs and checks a built kernel. Raises OutOfTime, or DeviceError when the device, not the candidate, is at
        fault."""

    def close(self) -> None:  # noqa: B027  # a runner that starts nothing ends nothing
        """Ends what the runner started."""

    def attempt(self, task: Task, source: KernelSource, folder: Path, repeats: int | None = None) -> Timing:
        """Builds and runs, whatever happens."""
        try:
            artifact = self.build(source, folder)
        except (BuildError, ChildProcessError) as problem:
            return Timing(Outcome.BUILD_FAILED, message=str(problem))
        except TimeoutError:
            self.deadline.check()
            return Timing(Outcome.TIMED_OUT, message=f"no library after {self.options.timeout_seconds} s")
        try:
            return self.run(task, artifact, source.symbol, repeats)
        finally:
            artifact.unlink(missing_ok=True)


def find_runner(name: str) -> type[Runner]:
    """Raises UnknownName with the names there are."""
    return RUNNERS.find(name)
