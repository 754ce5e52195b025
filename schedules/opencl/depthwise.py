"""Depthwise convolution on OpenCL: a thread for each vector of results, which reads its taps; a work-group for each row
of a channel's taps in the weight gradient.

Neighbouring threads have neighbouring pixels, so that taps of one are in the cache from another's. Nothing is kept in
registers between results: a channel's weights are few, and a GPU has them in its cache.
"""

from __future__ import annotations

from itertools import product

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.layers.depthwise import DepthwiseForward, DepthwiseGradInput, DepthwiseGradWeight
from mest_compile.schedules.opencl.gather_conv import epilogue_arguments, finished, statistics_of_result
from mest_compile.schedules.opencl.sums import declare_totals, totals
from mest_compile.schedules.opencl.text import (
    DeviceText,
    at,
    full,
    image,
    plane_vectors,
    scalars,
    vector_type,
    vectors,
    whole_groups,
    zeros,
)


def _place(layout: Image, plane: str, row: str, column: str) -> str:
    """The vector of a real pixel, counted from the array's start."""
    return (
        f"({plane}) * {plane_vectors(layout)} + ({row} + {layout.halo[0]}) * {layout.columns} + {column} + "
        f"{layout.halo[1]}"
    )


@schedule("depthwise.forward", device="opencl")
def depthwise_forward(problem: DepthwiseForward, target: Target) -> str:
    source, result, window, vector = problem.source, problem.result, problem.window, problem.result.vector
    statistics = result.slices * result.height * 2 * result.channels * vector
    text = DeviceText(
        scalars("values", result.channels * window.taps),
        *([scalars("bias", result.channels)] if problem.bias else []),
        *epilogue_arguments(problem),
        image("source", source),
        image("result", result),
        *([vectors("statistics", statistics, vector)] if problem.statistics else []),
    )
    with text.each_pixel(result, target.limits.threads):
        text.private("total", 1, vector_type(vector))
        text(f"total[0] = {full('bias[c]', vector) if problem.bias else zeros(vector)}")
        with text.nest(f"for ky in T.unroll({window.kernel[0]})", f"for kx in T.unroll({window.kernel[1]})"):
            row, column = (
                f"{pixel} * {window.stride[axis]} + {tap} * {window.dilation[axis]} - {window.padding[axis]}"
                for axis, (pixel, tap) in enumerate((("h", "ky"), ("w", "kx")))
            )
            weight = full(f"values[c * {window.taps} + ky * {window.kernel[1]} + kx]", vector)
            read = _place(source, f"plane // {problem.multiplier}", row, column)
            text(f"total[0] = total[0] + {weight} * source[{read}]")
        summand = ""
        if problem.epilogue and (other := problem.epilogue.residual):
            summand = _place(other, f"plane // {result.channels} * {result.channels}", "h", "w")
        text(f"{at('result', result)} = {finished(problem, 'total[0]', 'c', summand)}")
    if problem.statistics:
        statistics_of_result(text, result, target)
    return str(text)


@schedule("depthwise.grad_input", device="opencl")
def depthwise_grad_input(problem: DepthwiseGradInput, target: Target) -> str:
    delta, result, window, vector = problem.delta, problem.result, problem.window, problem.result.vector
    text = DeviceText(scalars("values", delta.channels * window.taps), image("delta", delta), image("result", result))
    here = at("result", result)
    with text.each_pixel(result, target.limits.threads):
        text.private("total", 1, vector_type(vector))
        text(f"total[0] = {here if problem.accumulate else zeros(vector)}")
        for m, ky, kx in product(range(problem.multiplier), *map(range, window.kernel)):
            away = [
                f"({pixel} + {pad - tap * apart})"
                for pixel, tap, pad, apart in zip(("h", "w"), (ky, kx), window.padding, window.dilation, strict=True)
            ]
            steps = list(zip(away, window.stride, strict=True))
            reached = " and ".join(f"{distance} % {step} == 0" for distance, step in steps if step > 1)
            row, column = (f"{distance} // {step}" if step > 1 else distance for distance, step in steps)
            weight = f"values[(c * {problem.multiplier} + {m}) * {window.taps} + {ky * window.kernel[1] + kx}]"
            read = _place(delta, f"plane * {problem.multiplier} + {m}", row, column)
            with text.nest(*([f"if {reached}"] if reached else [])):
                text(f"total[0] = total[0] + {full(weight, vector)} * delta[{read}]")
        text(f"{here} = total[0]")
    return str(text)


@schedule("depthwise.grad_weight", device="opencl")
def depthwise_grad_weight(problem: DepthwiseGradWeight, target: Target) -> str:
    """A work-group's threads share the pixels of all slices; a tree in local memory adds up what they found."""
    source, delta, window, vector = problem.source, problem.delta, problem.window, problem.delta.vector
    high, wide = window.kernel
    pixels = delta.height * delta.width
    places = delta.slices * pixels
    size = whole_groups(places, target.limits.threads)
    text = DeviceText(
        scalars("gradients", delta.channels * window.taps), image("source", source), image("delta", delta)
    )
    with text.groups(size, delta.channels, high):
        tap = "block_y" if high > 1 else "0"
        text.private("sums", wide, vector_type(vector))
        text.private("seen", 1, vector_type(vector))
        declare_totals(text, wide, size)
        with text.nest(f"for kx in T.unroll({wide})"):
            text(f"sums[kx] = {zeros(vector)}")
        with text.nest(f"for turn in T.serial({-(-places // size)})"):
            text(f"place: T.let = turn * {size} + lane")
            with text.nest(f"if place < {places}"):
                text(
                    f"plane: T.let = place // {pixels} * {delta.channels} + block",
                    f"h: T.let = place % {pixels} // {delta.width}",
                    f"w: T.let = place % {delta.width}",
                    f"seen[0] = {at('delta', delta)}",
                )
                row = f"h * {window.stride[0]} + {tap} * {window.dilation[0]} - {window.padding[0]}"
                column = f"w * {window.stride[1]} + kx * {window.dilation[1]} - {window.padding[1]}"
                with text.nest(f"for kx in T.unroll({wide})"):
                    read = _place(source, f"plane // {problem.multiplier}", row, column)
                    text(f"sums[kx] = sums[kx] + seen[0] * source[{read}]")
        goal = f"gradients[block * {window.taps} + {tap} * {wide} + {{e}}]"
        totals(text, wide, size, vector, lambda e, value: [f"{goal.format(e=e)} = {value}"], lambda e: f"{e} < {wide}")
    return str(text)
