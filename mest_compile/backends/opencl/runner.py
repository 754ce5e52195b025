"""Runs a step's programs on an OpenCL device through pyopencl: one in-order queue, uploads without waiting, one wait
per step.

The plan, the buffers and the kernels are those of the build; this module only holds memory and launches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from mest_compile.backends.opencl.code import Launch, OpenclKernel
from mest_compile.base.errors import DeviceError, NotInstalled
from mest_compile.base.interrupts import uninterrupted
from mest_compile.ir.program import Buffer, Call, Functions, Program

FLAGS = "-cl-std=CL1.2"
RESULTS = frozenset({"loss", "correct", "logits"})  # what a caller asks for behind a run


def _pyopencl() -> Any:
    try:
        import pyopencl
    except ImportError as problem:
        raise NotInstalled(
            f"an OpenCL target needs pyopencl ({problem}); run: pip install 'mest-compile[opencl]'"
        ) from problem
    return pyopencl


def find_device(name: str | None = None) -> Any:
    """The machine's OpenCL device: a GPU if there is one, else whatever there is; its driver must compile.

    name  that the device's or its platform's name holds, in capitals or not
    Raises NotInstalled with what was found instead.
    """
    cl = _pyopencl()
    try:
        platforms = cl.get_platforms()
    except cl.LogicError:  # the loader says so when it knows no driver
        platforms = []
    devices, passed = [], {}
    for platform in platforms:
        try:
            there = platform.get_devices()
        except cl.Error as problem:
            passed[f"platform {platform.name}"] = str(problem).splitlines()[0]
            continue
        devices += there
        if not there:
            passed[f"platform {platform.name}"] = "has no device"
    for device in sorted(devices, key=lambda device: not device.type & cl.device_type.GPU):
        described = f"{device.name} ({device.platform.version})"
        if name is not None and name.lower() not in f"{device.name}\n{device.platform.name}".lower():
            passed[described] = f"is not named {name!r}"
        elif said := _refusal(device):
            passed[described] = f"compiles nothing: {said}"
        else:
            return device
    found = "; ".join(f"{what} {why}" for what, why in passed.items()) or "no OpenCL driver found"
    advice = (
        f"; give gpu.name in the target's file the name of one of these, or none; {_ADVICE}"
        if name and devices
        else f"; {_ADVICE}"
    )
    raise NotInstalled(found + advice)


_ADVICE = (
    "install your GPU's driver, or PoCL, which computes on the CPU: apt install pocl-opencl-icd ocl-icd-libopencl1"
)


def describe_device(name: str | None = None) -> str:
    """The machine's OpenCL device and its driver, in a line. Raises NotInstalled."""
    device = find_device(name)
    return f"{device.name} by {device.platform.name} {device.version}"


def machine(name: str | None = None) -> str:
    """Whose times the device's times are, for records. Raises NotInstalled."""
    device = find_device(name)
    return f"{device.name} by {device.platform.name}"


@cache
def _refusal(device: Any) -> str | None:
    """What the driver's compiler says to a kernel that does nothing; None where it compiles. PoCL 3.0 refuses CPUs
    newer than itself."""
    cl = _pyopencl()
    try:
        cl.Program(cl.Context([device]), "__kernel void nothing(__global float* x) { x[0] = 0; }").build(FLAGS)
    except cl.Error as problem:
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
        return next((line for line in lines if "error" in line.lower() and "clBuildProgram" not in line), lines[0])
    return None


class OpenclRunner:
    """Memory and kernels of one step on one device.

    kernels   program name -> call name -> OpenclKernel
    programs  what `run` runs, by name: a program and the stages of it
    device    what `find_device` gave
    """

    uploaded_bytes = 0  # the device shares this machine's memory

    def __init__(
        self,
        kernels: Mapping[str, Mapping[str, OpenclKernel]],
        programs: Functions,
        device: Any,
    ):
        self._cl = cl = _pyopencl()
        self._device = device
        self._programs, self._kernels = dict(programs), dict(kernels)
        with self._errors("the device cannot be opened"):
            self._context = cl.Context([self._device])
            self._queue = cl.CommandQueue(self._context)
        self._check_limits()
        self._code: dict[str, Any] = {}  # name of what is launched -> the program of OpenCL that has it
        self._build()
        slots = next(program.slots for program, _ in programs.values())  # all have the same
        with self._errors("the arena cannot be allocated"):
            self._slots = [self._new(size) for size in slots]
        self._scratch: dict[str, Any] = {}
        self._held: dict[str, Any] = {}
        self._elems: dict[str, tuple[int, np.dtype]] = {}
        self._ready: dict[str, list[tuple[Any, Launch, str]]] = {}
        self._transfers: list[
            Any
        ] = []  # events of pyopencl, which wait when they are let go: so not before the queue is done
        self._results: dict[str, np.ndarray] = {}
        self._arrived = True

    # State.

    def put(self, name: str, array: np.ndarray) -> None:
        """Copies a flat array to the device under that name, without waiting. A new size makes a new buffer."""
        flat = np.array(array).ravel()  # a copy: the caller may change the array before it is on the device
        if self._elems.get(name) != (flat.size, flat.dtype):
            self._elems.pop(
                name, None
            )  # until there is one: an interruption leaves none that is not what is said of it
            self._ready.clear()
            with self._errors(f"{name} cannot be allocated"):
                self._held[name] = self._new(flat.nbytes)
            self._elems[name] = flat.size, flat.dtype
        self._results.pop(name, None)
        if flat.size:
            with self._errors(f"{name} cannot be uploaded"):
                done = self._cl.command_execution_status.COMPLETE
                self._transfers = [event for event in self._transfers if event.command_execution_status != done]
                self._transfers.append(self._cl.enqueue_copy(self._queue, self._held[name], flat, is_blocking=False))

    def get(self, name: str) -> np.ndarray:
        """A copy of the array of that name, after all that was asked for before is done."""
        if name in self._results:
            if not self._arrived:
                self._finish(f"{name} cannot be read")
            return self._results[name].copy()
        size, dtype = self._elems[name]
        array = np.empty(size, dtype)
        if size:
            with self._errors(f"{name} cannot be read"):
                self._cl.enqueue_copy(self._queue, array, self._held[name])
        else:
            self._finish(f"{name} cannot be read")
        return array

    def run(self, name: str) -> None:
        """Starts "train", "gradients" or "predict" and, behind it, the way back of its results: the first `get` waits,
        others need not."""
        if name not in self._ready:
            self._ready[name] = self._prepare(name)
        with uninterrupted():
            for kernel, launch, call in self._ready[name]:
                with self._errors(f"{call} ({launch.name}) cannot be launched"):
                    self._launch(kernel, launch)
        self._results, self._arrived = {}, False
        program, stages = self._programs[name]
        there = {buffer.name for call in program.calls if call.stage in stages for buffer in call.buffers}
        with self._errors(f"{name} cannot be started"):
            for result in sorted(there.intersection(RESULTS) & self._elems.keys()):
                self._results[result] = np.empty(*self._elems[result])
                self._transfers.append(
                    self._cl.enqueue_copy(self._queue, self._results[result], self._held[result], is_blocking=False)
                )
            self._queue.flush()

    def extend(self, programs: Functions, kernels: Mapping[str, Mapping[str, OpenclKernel]]) -> None:
        """Lets `run` run more, of the same arrays and in the same memory. kernels: as at first."""
        self._kernels |= kernels
        self._check_limits()
        self._build()
        for program, _ in programs.values():
            with self._errors("the arena cannot be allocated"):
                self._slots += [self._new(size) for size in program.slots[len(self._slots) :]]
        self._programs |= programs

    def forget(self, functions: Iterable[str]) -> None:
        """Lets go of what `extend` brought, but for what its driver compiled."""
        for name in functions:
            program, _ = self._programs.pop(name)
            self._ready.pop(name, None)
            self._kernels.pop(program.name, None)

    def profile(self, name: str, repeats: int) -> dict[str, float]:
        """{call: seconds of its launches, from the device's clock}, the median of `repeats` runs."""
        cl, usual = self._cl, self._queue
        self._results = {}
        self._queue = cl.CommandQueue(self._context, properties=cl.command_queue_properties.PROFILING_ENABLE)
        passes: list[dict[str, float]] = []
        try:
            with self._errors("what was asked for before cannot be finished"):
                usual.finish()
            ready = self._prepare(name)
            for _ in range(repeats):
                with self._errors(f"{name} cannot be profiled"):
                    events = [(call, self._launch(kernel, launch)) for kernel, launch, call in ready]
                    self._queue.finish()
                    found: dict[str, float] = {}
                    for call, event in events:
                        found[call] = found.get(call, 0.0) + (event.profile.end - event.profile.start) * 1e-9
                    passes.append(found)
        finally:
            self._queue = usual
        return {call: float(np.median([one[call] for one in passes])) for call in passes[0]} | {"rest": 0.0}

    # Internal.

    def _finish(self, what: str) -> None:
        with self._errors(what):
            self._queue.finish()
        self._transfers.clear()
        self._arrived = True

    def _launch(self, kernel: Any, launch: Launch) -> Any:
        sizes = [groups * threads for groups, threads in zip(launch.groups, launch.threads, strict=True)]
        return self._cl.enqueue_nd_range_kernel(self._queue, kernel, sizes, launch.threads)

    def _sources(self) -> Iterator[OpenclKernel]:
        yield from {kernel.source: kernel for calls in self._kernels.values() for kernel in calls.values()}.values()

    def _check_limits(self) -> None:
        """The build kept to the target's limits; this device may have tighter ones."""
        device = self._device
        for launch in (launch for kernel in self._sources() for launch in kernel.launches):
            threads = math.prod(launch.threads)
            if threads > device.max_work_group_size or launch.local_bytes > device.local_mem_size:
                raise DeviceError(
                    f"{launch.name} needs work-groups of {threads} threads and {launch.local_bytes} bytes of "
                    "local memory; "
                    f"{device.name} has {device.max_work_group_size} and {device.local_mem_size}: write a target file "
                    "with these limits and compile for it"
                )

    def _build(self) -> None:
        """Compiles what was not before."""
        kernels = [kernel for kernel in self._sources() if kernel.launches[0].name not in self._code]
        if not kernels:
            return
        source = "\n".join(kernel.source for kernel in kernels)
        with self._errors("the driver's compiler refuses the kernels"):
            code = self._cl.Program(self._context, source).build(FLAGS)
        self._code |= {launch.name: code for kernel in kernels for launch in kernel.launches}

    def _new(self, size_bytes: int) -> Any:
        if size_bytes > self._device.max_mem_alloc_size:
            raise DeviceError(
                f"a buffer of {size_bytes} bytes is wanted; {self._device.name} allows "
                f"{self._device.max_mem_alloc_size}: "
                "use a smaller batch"
            )
        return self._cl.Buffer(self._context, self._cl.mem_flags.READ_WRITE, max(size_bytes, 16))

    def _prepare(self, name: str) -> list[tuple[Any, Launch, str]]:
        """Kernels with their arguments set, in the order of the program. A kernel does not keep its arguments' memory:
        we do."""
        program, stages = self._programs[name]
        calls = [(call, self._kernels[program.name][call.name]) for call in program.calls if call.stage in stages]
        self._reserve_scratch(calls)
        ready = []
        for call, kernel in calls:
            arguments = self._arguments(kernel, call, program)
            for launch in kernel.launches:
                with self._errors(f"{call.name} cannot be prepared"):
                    code = self._cl.Kernel(self._code[launch.name], launch.name)
                    code.set_args(*(arguments[argument] for argument in launch.arguments))
                ready.append((code, launch, call.name))
        return ready

    def _reserve_scratch(self, calls: Iterable[tuple[Call, OpenclKernel]]) -> None:
        """Memory for every name of scratch; calls run one after another, so all use the same."""
        wanted: dict[str, int] = {}
        for call, kernel in calls:
            for scratch in kernel.scratch:
                wanted[scratch.name] = max(wanted.get(scratch.name, 0), scratch.size_bytes(self._symbols(kernel, call)))
        for name, size_bytes in wanted.items():
            if name not in self._scratch or self._scratch[name].size < size_bytes:
                with self._errors(f"{name} cannot be allocated"):
                    self._scratch[name] = self._new(size_bytes)
                self._ready.clear()

    def _symbols(self, kernel: OpenclKernel, call: Call) -> dict[str, int]:
        return {name: self._size(call.buffers[position]) for name, position in kernel.symbols.items()}

    def _arguments(self, kernel: OpenclKernel, call: Call, program: Program) -> dict[str, Any]:
        found: dict[str, Any] = {name: np.int32(value) for name, value in self._symbols(kernel, call).items()}
        for name, buffer in zip(kernel.parameters, call.buffers, strict=True):
            found[name] = self._held[buffer.name] if buffer.held else self._slots[program.places[buffer][0]]
        return found | {scratch.name: self._scratch[scratch.name] for scratch in kernel.scratch}

    def _size(self, buffer: Buffer) -> int:
        return buffer.elems if buffer.elems is not None else self._elems[buffer.name][0]

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._cl.Error as problem:
            raise DeviceError(
                f"OpenCL device {self._device.name}: {what}: {problem}. What the step held on the device is "
                "lost; go on from "
                "the last checkpoint"
            ) from problem


def _device(
    kernel: str, problem: Any, built: OpenclKernel, arguments: list[np.ndarray], name: str | None
) -> tuple[Any, list[str]]:

    buffers = tuple(
        Buffer(f"argument {place}", array.size, str(array.dtype), "values") for place, array in enumerate(arguments)
    )
    program = Program("train", [Call("call", kernel, problem, buffers, "forward")])
    runner = OpenclRunner({"train": {"call": built}}, {"train": (program, ("forward",))}, find_device(name))
    return runner, [buffer.name for buffer in buffers]


def answer_of(device: Any, names: list[str], arguments: list[np.ndarray]) -> list[np.ndarray]:
    """All arguments as they are after a run on the device."""
    for name, array in zip(names, arguments, strict=True):
        device.put(name, array)
    device.run("train")
    return [device.get(name) for name in names]


def answer_here(
    kernel: str, problem: Any, built: OpenclKernel, arguments: list[np.ndarray], name: str | None
) -> list[np.ndarray]:
    """The same from nothing, in this process."""
    return answer_of(*_device(kernel, problem, built, arguments, name), arguments)
