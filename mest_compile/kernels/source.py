"""A kernel's text, and what decides its code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, update_wrapper
from importlib import metadata
from typing import Any, TypeVar

from mest_compile.base.registry import Registry
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import Target
from mest_compile.kernels.linkers import scratch_folder
from mest_compile.records.knob import Knob


@dataclass(frozen=True)  # without slots, for cached_property: keys are asked for at every mutation
class KernelSource:
    """The text of one kernel and what it is for.

    kernel  "batch_norm.forward"
    text    TVMScript of one PrimFunc named `kernel`
    target  the device it is compiled for
    checked  whether code for a CPU looks at its arguments' types and shapes: a fifth of what there is to compile
    """

    kernel: str
    text: str
    target: Target
    checked: bool = True

    @cached_property
    def key(self) -> str:
        """64 hex digits; equal for equal code."""
        how = backend_of(self.target).key_parts(self.target, self.checked)
        facts = json.dumps([self.text, self.target.tvm_fields, _tvm_version(), *how], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def symbol(self) -> str:
        """The function's name in its library."""
        return "mest_" + self.key[:24]


def kernel_source(kernel: str, problem: Any, target: Target, **knobs: Any) -> KernelSource:
    """The text that `target`'s schedule gives for `problem`. Raises UnknownName when that kind of device has no such
    kernel."""
    schedule = SCHEDULES.find(f"{target.device}/{kernel}")
    return KernelSource(kernel, schedule(problem, target, **knobs), target)


def knob_space(kernel: str, problem: Any, target: Target) -> dict[str, tuple]:
    """{knob: values that it may take for `problem`, the default first} of `target`'s schedule. Raises UnknownName."""
    knobs = SCHEDULES.find(f"{target.device}/{kernel}").knobs
    return {knob.name: knob.values(problem, target) for knob in knobs}


def object_code(library: Any) -> bytes:
    """Of a TVM module of machine code."""
    with scratch_folder() as scratch:
        path = scratch / "kernel.o"
        library.write_to_file(str(path))
        return path.read_bytes()


@cache  # looking it up reads all of a file of the package's, and every key asks
def _tvm_version() -> str:
    return metadata.version("apache-tvm")


SCHEDULES = Registry("schedule", "mest_compile.schedules")


class Schedule:
    """What gives the text of a kernel for a kind of device.

    write  the function of (problem, target, one argument a knob) that was decorated; its module and name are this one's
    knobs  what tuning may choose: how fast the kernel is, never what it computes
    """

    def __init__(self, write: Callable[..., str], knobs: tuple[Knob, ...] = ()):
        update_wrapper(self, write)
        self.write, self.knobs = write, knobs

    def __call__(self, problem: Any, target: Target, **knobs: Any) -> str:
        """TVMScript text of one PrimFunc. Knobs that are not named have their defaults."""
        return self.write(problem, target, **({knob.name: knob.default for knob in self.knobs} | knobs))


W = TypeVar("W", bound=Callable[..., str])


def schedule(kernel: str, device: str, knobs: tuple[Knob, ...] = ()) -> Callable[[W], W]:
    """Function decorator: registers the code that runs `kernel` ("conv.forward") on a kind of device ("cpu").

    The function takes (problem, target, **knobs), every knob, and returns TVMScript text of one PrimFunc named
    `kernel`.
    """

    def register(function: W) -> W:
        SCHEDULES.add(f"{device}/{kernel}", Schedule(function, knobs))
        return function

    return register
