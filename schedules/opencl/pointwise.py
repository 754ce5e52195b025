"""Elementwise kernels and the gradient of a bias, on OpenCL."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.activation import (
    ACTIVATIONS,
    FORMULA,
    ActivationBackward,
    ActivationForward,
    activation_of,
)
from mest_compile.operators.add import AddForward
from mest_compile.operators.conversion import Grid, ImageCopy, ImageExport, ImageImport, ImagePart, ZeroHalo
from mest_compile.operators.layers.bias import BiasGradient
from mest_compile.schedules.opencl.sums import ChannelSums
from mest_compile.schedules.opencl.text import (
    DeviceText,
    at,
    full,
    image,
    number,
    plane_vectors,
    scalars,
    spelled,
    zeros,
)


def pointwise(images: dict[str, Image], result: str, value: str, target: Target, accumulate: bool = False) -> str:
    """A kernel `result = value` on every pixel; `value` has `{x}` for the vector of image x, `accumulate` adds it to
    the result."""
    text = DeviceText(*(image(name, layout) for name, layout in images.items()))
    with text.each_pixel(images[result], target.limits.threads):
        elements = {name: at(name, layout) for name, layout in images.items()}
        text(f"{elements[result]} = " + (f"{elements[result]} + " if accumulate else "") + value.format(**elements))
    return str(text)


def _activation_kernels(name: str) -> None:
    @schedule(f"{name}.forward", device="opencl")
    def forward(problem: ActivationForward, target: Target) -> str:
        row = activation_of(getattr(problem, "formula", name))
        return pointwise({"x": problem.x, "y": problem.y}, "y", spelled(row.formula, problem.y.vector, x="{x}"), target)

    @schedule(f"{name}.backward", device="opencl")
    def backward(problem: ActivationBackward, target: Target) -> str:
        row = activation_of(getattr(problem, "formula", name))
        source = "y" if row.from_result else "x"
        images = {"dy": problem.dy, source: problem.source, "dx": problem.dx}
        value = spelled(row.gradient, problem.dx.vector, x=f"{{{source}}}", dy="{dy}")
        return pointwise(images, "dx", value, target, problem.accumulate)


for each in (*ACTIVATIONS.load(), FORMULA):
    _activation_kernels(each)


@schedule("add.forward", device="opencl")
def add_forward(problem: AddForward, target: Target) -> str:
    return pointwise({"a": problem.a, "b": problem.b, "y": problem.y}, "y", "{a} + {b}", target)


@schedule("image.copy", device="opencl")
def image_copy(problem: ImageCopy, target: Target) -> str:
    return pointwise(
        {"source": problem.source, "result": problem.result}, "result", "{source}", target, problem.accumulate
    )


@schedule("image.part", device="opencl")
def image_part(problem: ImagePart, target: Target) -> str:
    source, result, (channels, rows, columns) = problem.source, problem.result, problem.size
    text = DeviceText(image("source", source), image("result", result))
    if problem.fill is not None and problem.size != (result.channels, result.height, result.width):
        with text.each_pixel(result, target.limits.threads):
            text(f"{at('result', result)} = {full(number(problem.fill), result.vector)}")
    with text.each(result.slices * channels * rows * columns, target.limits.threads):
        text(
            f"plane: T.let = n // {rows * columns}",
            f"h: T.let = n % {rows * columns} // {columns}",
            f"w: T.let = n % {columns}",
        )

        def element(name: str, layout: Image, grid: Grid) -> str:
            (first, row, column), (apart, down, right) = grid.start, grid.step
            place = f"plane // {channels} * {layout.channels} + plane % {channels} * {apart} + {first}"
            pixel = (
                f"(h * {down} + {row + layout.halo[0]}) * {layout.columns} + w * {right} + {column + layout.halo[1]}"
            )
            return f"{name}[({place}) * {plane_vectors(layout)} + {pixel}]"

        here, value = element("result", result, problem.put), element("source", source, problem.taken)
        text(f"{here} = {here} + {value}" if problem.accumulate else f"{here} = {value}")
    return str(text)


@schedule("bias.gradient", device="opencl")
def bias_gradient(problem: BiasGradient, target: Target) -> str:
    layout = problem.dy
    sums = ChannelSums(layout, target)
    text = DeviceText(image("dy", layout), scalars("dbias", layout.channels))
    sums.collect(text, 1, lambda: [f"sums[0] = sums[0] + {at('dy', layout)}"])
    with text.each(layout.channels, target.limits.threads):
        sums.join(text, 1, "n")
        text("dbias[n] = joined[0]")
    return str(text)


@schedule("image.import", device="opencl")
def image_import(problem: ImageImport, target: Target) -> str:
    """Neighbouring threads read neighbouring pixels of an example, and write neighbouring vectors."""
    layout = problem.result
    example = layout.channels * layout.height * layout.width
    text = DeviceText(scalars("images", layout.batch * example), scalars("result", layout.elems))
    with text.each_pixel(layout, target.limits.threads):
        text(
            f"first: T.let = plane // {layout.channels} * {layout.vector}",
            f"start: T.let = (plane * {plane_vectors(layout)} + (h + {layout.halo[0]}) * {layout.columns} + w + "
            f"{layout.halo[1]})"
            f" * {layout.vector}",
        )
        with text.nest(f"for i in T.unroll({layout.vector})"):
            lane = "first + i" if layout.batch == layout.lanes else f"T.min(first + i, {layout.batch - 1})"
            value = f"images[({lane}) * {example} + (c * {layout.height} + h) * {layout.width} + w]"
            text(f"result[start + i] = {value}")
    return str(text)


@schedule("image.export", device="opencl")
def image_export(problem: ImageExport, target: Target) -> str:
    layout = problem.source
    if layout.height * layout.width > 1:
        return _export_maps(layout, target)
    text = DeviceText(scalars("source", layout.elems), scalars("result", layout.batch * layout.channels))
    with text.each(layout.batch * layout.channels, target.limits.threads):
        text(
            f"example: T.let = n // {layout.channels}",
            f"c: T.let = n % {layout.channels}",
            f"result[n] = source[example // {layout.vector} * {layout.slice_elems} + c * {layout.channel_elems} "
            f"+ {layout.origin}"
            f" + example % {layout.vector}]",
        )
    return str(text)


def _export_maps(layout: Image, target: Target) -> str:
    pixels = layout.height * layout.width
    count = layout.batch * layout.channels * pixels
    text = DeviceText(scalars("source", layout.elems), scalars("result", count))
    with text.each(count, target.limits.threads):
        text(
            f"example: T.let = n // {layout.channels * pixels}",
            f"c: T.let = n // {pixels} % {layout.channels}",
            f"h: T.let = n % {pixels} // {layout.width}",
            f"w: T.let = n % {layout.width}",
            f"result[n] = source[example // {layout.vector} * {layout.slice_elems} + c * {layout.channel_elems} "
            f"+ {layout.origin} + h * {layout.row_elems} + w * {layout.vector} + example % {layout.vector}]",
        )
    return str(text)


@schedule("image.zero_halo", device="opencl")
def image_zero_halo(problem: ZeroHalo, target: Target) -> str:
    """A thread for each vector of the halo: rows above, rows below, then both sides."""
    layout = problem.image
    top, left, bottom, right = layout.halo
    above, below, sides = top * layout.columns, bottom * layout.columns, left + right
    count = above + below + layout.height * sides
    assert count, "an image without a halo has none to clear"
    text = DeviceText(image("image", layout))
    with text.each(layout.slices * layout.channels * count, target.limits.threads):
        text(f"plane: T.let = n // {count}", f"k: T.let = n % {count}")
        place = f"k + {(top + layout.height) * layout.columns - above}"
        if sides:
            side = f"(k - {above + below})"
            column = f"{side} % {sides} + T.Select({side} % {sides} < {left}, 0, {layout.width})"
            place = f"T.Select(k < {above + below}, {place}, ({side} // {sides} + {top}) * {layout.columns} + {column})"
        text(f"image[plane * {plane_vectors(layout)} + T.Select(k < {above}, k, {place})] = {zeros(layout.vector)}")
    return str(text)
