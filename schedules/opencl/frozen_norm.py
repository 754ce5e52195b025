"""Batch normalisation in evaluation mode within a training step, on OpenCL."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.operators.activation import activation_of
from mest_compile.operators.frozen_norm import CopyPart, FrozenNormBackward, FrozenNormScaling
from mest_compile.schedules.opencl.sums import ChannelSums
from mest_compile.schedules.opencl.text import DeviceText, at, full, image, number, scalars, spelled, zeros


@schedule("frozen_norm.scaling", device="opencl")
def scaling(problem: FrozenNormScaling, target: Target) -> str:
    channels = problem.channels
    text = DeviceText(
        scalars("running_mean", channels),
        scalars("running_var", channels),
        scalars("affine", 2 * channels),
        scalars("scaling", 2 * channels),
    )
    with text.each(channels, target.limits.threads):
        text(
            f"scale: T.let = affine[{channels} + n] / T.sqrt(running_var[n] + {number(problem.eps)})",
            "scaling[n] = affine[n] - running_mean[n] * scale",
            f"scaling[{channels} + n] = scale",
        )
    return str(text)


@schedule("values.part", device="opencl")
def copy_part(problem: CopyPart, target: Target) -> str:
    text = DeviceText(scalars("source", problem.source_elems), scalars("target", problem.target_elems))
    with text.each(problem.elems, target.limits.threads):
        text(f"target[{problem.place} + n] = source[{problem.start} + n]")
    return str(text)


@schedule("frozen_norm.backward", device="opencl")
def backward(problem: FrozenNormBackward, target: Target) -> str:
    """The sums chunk by chunk, joined channel by channel; then what is written, pixel by pixel."""
    dy, z, y, channels, vector = problem.dy, problem.z, problem.y, problem.dy.channels, problem.dy.vector
    dz, goal = (dy, "dy") if problem.in_place else (problem.dz, "dz")
    text = DeviceText(
        image("dy", dy),
        *([scalars("scaling", 2 * channels)] if problem.folded else []),
        *([] if problem.folded else [scalars("moments", 3 * channels), scalars("affine", 2 * channels)]),
        *(image(name, layout) for name, layout in (("z", z), ("y", y)) if layout),
        *([scalars("sums_out", 2 * channels)] if problem.sums else []),
        *([image("dz", problem.dz)] if problem.dz else []),
    )
    facts = (
        [f"scale: T.let = scaling[{channels} + c]"]
        if problem.folded
        else [
            "mean: T.let = moments[c]",
            f"scale: T.let = affine[{channels} + c] * moments[{channels} + c]",
            "shift: T.let = affine[c]",
        ]
    )
    centred = f"({at('z', z)} - {full('mean', vector)})" if z else ""
    value = at("dy", dy)
    if problem.activation:
        told = at("y", y) if y else f"({centred} * {full('scale', vector)} + {full('shift', vector)})"
        value = spelled(activation_of(problem.activation).gradient, vector, x=told, dy=value)
    if problem.sums:
        cut = ChannelSums(dy, target)
        cut.collect(
            text,
            2,
            lambda: [f"sums[0] = sums[0] + {value}", f"sums[1] = sums[1] + {value} * {centred}"],
            before=tuple(facts),
        )
        with text.each(channels, target.limits.threads):
            cut.join(text, 2, "n")
            text("sums_out[n] = joined[0]", f"sums_out[{channels} + n] = joined[1] * moments[{channels} + n]")
    kept = [f"{at('dy', dy)} = {value}"] if problem.residual and problem.activation else []
    if problem.dz and not problem.accumulate:
        with text.each_framed(problem.dz, target.limits.threads) as real:
            with text.nest(f"if {real}"):
                text(*facts, f"{at('dz', problem.dz)} = {value} * {full('scale', vector)}", *kept)
            with text.nest("else"):
                text(f"{at('dz', problem.dz)} = {zeros(vector)}")
    elif dz is not None or kept:
        with text.each_pixel(dy, target.limits.threads):
            if dz is not None:
                before = f"{at(goal, dz)} + " if problem.accumulate else ""
                text(*facts, f"{at(goal, dz)} = {before}{value} * {full('scale', vector)}", *kept)
            else:
                text(*facts, *kept)
    return str(text)
