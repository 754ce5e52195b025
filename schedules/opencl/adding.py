"""Gradients of several passes on OpenCL, for any number of parameters."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.operators.adding import Add, Scale, Zero
from mest_compile.schedules.opencl.sums import ENOUGH_GROUPS
from mest_compile.schedules.opencl.text import DeviceText, scalars


def _each(text: DeviceText, names: tuple[str, ...], line: str, target: Target) -> str:
    text.symbolic("n_elems", dict.fromkeys(names, ("n_elems", "float32")))
    with text.each_of("n_elems", ENOUGH_GROUPS, target.limits.threads):
        text(line)
    return str(text)


@schedule("gradients.zero", device="opencl")
def zero(problem: Zero, target: Target) -> str:
    return _each(DeviceText("gradients_handle: T.handle"), ("gradients",), "gradients[n] = T.float32(0)", target)


@schedule("gradients.add", device="opencl")
def add(problem: Add, target: Target) -> str:
    text = DeviceText("part_handle: T.handle", "gradients_handle: T.handle")
    return _each(text, ("part", "gradients"), "gradients[n] = gradients[n] + part[n]", target)


@schedule("gradients.scale", device="opencl")
def scale(problem: Scale, target: Target) -> str:
    text = DeviceText("gradients_handle: T.handle", scalars("share", 1))
    return _each(text, ("gradients",), "gradients[n] = gradients[n] * share[0]", target)
