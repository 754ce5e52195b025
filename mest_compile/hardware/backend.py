"""What a kind of device has to answer: which kernels it has, and how their code is made, kept, loaded, linked and run.

Each kind is a folder in `backends/`, whose `backend.py` registers one instance; a target's `device` names it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mest_compile.base.errors import TargetError
from mest_compile.base.registry import Registry
from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.program import Functions, Program

BACKENDS = Registry("kind of device", "mest_compile.backends", each="backend")


B = TypeVar("B", bound="type[Backend]")


def backend(device: str) -> Callable[[B], B]:
    """Class decorator: registers a kind of device (one instance serves all targets of the kind)."""

    def register(cls: B) -> B:
        BACKENDS.add(device, cls())
        return cls

    return register


def backend_of(target: Target) -> Backend:
    """That of the target's kind of device. Raises UnknownName, and TargetError where the target has not what its kind
    needs."""
    kind: Backend = BACKENDS.find(target.device)
    if kind.processor != (target.gpu is None):
        wanted = "no table [gpu], which is for others" if kind.processor else "a table [gpu]"
        raise TargetError(f"target {target.name!r}: device is {target.device!r}, which has {wanted}")
    return kind


class Backend(ABC):
    """One kind of device.

    suffix      of a kernel's entry in the cache
    device_type  DLPack's number of the kind
    tuner       name of the runner that tunes kernels on this machine's device of the kind
    processor   whether it is one: what runs on a machine's processor, torch and artifacts, runs there
    activations  what its kernels store values between layers as
    whole_buffers  whether what a kernel takes has to be an allocation from its start, as memory has no addresses
    """

    suffix: ClassVar[str]
    device_type: ClassVar[int]
    tuner: ClassVar[str]
    processor: ClassVar[bool]
    activations: ClassVar[tuple[str, ...]]
    whole_buffers: ClassVar[bool] = False

    # Planning.

    @abstractmethod
    def has(self, kernel: str) -> bool:
        """Whether there is a schedule of that kernel."""

    @abstractmethod
    def section_channels(
        self,
        source: Image,
        source_step: tuple[int, int],
        kernel: tuple[int, int],
        unit: tuple[int, int],
        target: Target,
        caches: int = 1,
    ) -> int:
        """How many source channels a section of a gather's index has, of which a tile may read so many first-level
        caches full. unit: (result channels, source channels) that share what they read, are read together."""

    def widens_once(self, source: Image, target: Target) -> bool:
        """Whether a kernel makes a float32 copy of what it reads of a source that is stored in less."""
        return False

    def keeps_sums(self, problem: Any, target: Target) -> bool:
        """Whether the kernel of a weight gradient (GatherGrad) keeps vectors of sums of all live weights in memory."""
        return True

    @property
    def recomputes_norms(self) -> bool:
        """Whether what batch_norm gives is computed again in the backward pass whatever the budget."""
        return False

    def check(self, programs: Iterable[Program], target: Target) -> None:  # noqa: B027
        """Raises BuildError when a program needs what the device does not have."""

    # Code.

    @abstractmethod
    def key_parts(self, target: Target, checked: bool) -> list[Any]:
        """What decides a kernel's code beside its text, the target's fields and TVM's version; ready for JSON."""

    @abstractmethod
    def compile(self, text: str, symbol: str, target: Target, checked: bool = True) -> Any:
        """The code of one kernel. Raises what TVM does, BuildError."""

    @abstractmethod
    def dump(self, code: Any, target: Target) -> bytes:
        """What the cache keeps of it."""

    @abstractmethod
    def load(self, content: bytes, symbol: str, folders: Sequence[Path] = ()) -> Any:
        """What runs the kernel, from what `dump` gave. folders: where files may lie meanwhile, before the system's own
        place."""

    @abstractmethod
    def link_kernel(
        self, symbol: str, text: str, target: Target, checked: bool, path: Path, system_calls: Collection[str]
    ) -> None:
        """Writes a shared library of one kernel. system_calls: functions of libc that it may call. Raises BuildError,
        NotInstalled."""

    @abstractmethod
    def link_step(
        self,
        functions: Functions,
        symbol: Callable[[Program, str], str],
        sources: Collection[Any],
        target: Target,
        builder: Any,
    ) -> bytes:
        """A shared library with all of a step's code. sources: KernelSource of every kernel. Raises BuildError,
        NotInstalled."""

    # Running.

    def find_device(self, target: Target) -> None:  # noqa: B027
        """Raises NotInstalled where this machine has no device that `runner` could run on."""

    @abstractmethod
    def runner(
        self, kernels: Mapping[str, Mapping[str, Any]], functions: Functions, target: Target, threads: int
    ) -> Any:
        """What holds a step's arrays in this process and runs its programs (runtime.runner.Runner)."""

    @abstractmethod
    def machine(self, target: Target) -> str:
        """Whose times this machine's device's are, for records. Raises NotInstalled."""

    def describe_device(self, target: Target) -> dict[str, str]:
        """Facts of this machine's device that its target does not know, such as its driver. Raises NotInstalled."""
        return {}
