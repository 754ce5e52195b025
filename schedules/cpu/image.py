"""Layout at the model's border and between halos, on a CPU."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.conversion import ImageComb, ImageCopy, ImageExport, ImageImport, ImagePart, ZeroHalo
from mest_compile.schedules.cpu.rows import (
    array,
    buffer,
    each_row,
    frame_row,
    loop,
    narrowed,
    number,
    pointwise,
    walk_row,
    widened,
)


@schedule("image.import", device="cpu")
def image_import(problem: ImageImport, target: Target) -> str:
    """Transposes tiles of vector x vector elements in registers: loads run along a row of pixels, stores along the
    batch."""
    image, vector = problem.result, problem.result.vector
    example = image.channels * image.height * image.width
    text = Text(buffer("images", image.batch * example), array("result", image))

    def load(lane: str, pixel: str) -> str:
        number = lane if image.batch == image.lanes else f"T.min({lane}, examples - 1)"
        return (
            f"images[(plane // {image.channels} * {vector} + {number}) * {example}"
            f" + (c * {image.height} + h) * {image.width} + {pixel}]"
        )

    if vector == 1:  # an example a slice: rows are as they were
        with each_row(text, {"result": image}):
            first = f"(plane * {image.height} + h) * {image.width}"
            walk_row(
                text,
                image,
                lambda at, slot, live: [f"result[result_row + {at}] = {narrowed(image, f'images[{first} + {at}]')}"],
            )
        return str(text)
    with each_row(text, {"result": image}):
        text.local("tile", vector * vector)
        if image.width >= vector:
            with text.nest(f"for t in T.serial({image.width // vector})"):
                with text.nest(f"for j in T.unroll({vector})", f"for i in T.vectorized({vector})"):
                    text(f"tile[j * {vector} + i] = {load('j', f't * {vector} + i')}")
                with text.nest(f"for j in T.unroll({vector})", f"for i in T.vectorized({vector})"):
                    text(
                        f"result[result_row + (t * {vector} + j) * {vector} + i] = "
                        f"{narrowed(image, f'tile[i * {vector} + j]')}"
                    )
        with text.nest(f"for w in T.serial({image.width % vector})", f"for i in T.vectorized({vector})"):
            at = f"({image.width // vector * vector} + w)"
            text(f"result[result_row + {at} * {vector} + i] = {narrowed(image, load('i', at))}")
    return str(text)


@schedule("image.export", device="cpu")
def image_export(problem: ImageExport, target: Target) -> str:
    """Logits: a few kilobytes, so plain loops."""
    image = problem.source
    if image.height * image.width > 1:
        return _export_maps(image)
    text = Text(array("source", image), buffer("result", image.batch * image.channels))
    with text.nest(f"for n, c in T.grid({image.batch}, {image.channels})"):
        element = (
            f"source[n // {image.vector} * {image.slice_elems} + c * {image.channel_elems} + "
            f"{image.origin} + n % {image.vector}]"
        )
        text(f"result[n * {image.channels} + c] = {widened(image, element)}")
    return str(text)


def _export_maps(image: Image) -> str:
    pixels = image.height * image.width
    text = Text(array("source", image), buffer("result", image.batch * image.channels * pixels))
    with text.nest(
        f"for n in {loop(image.batch, image.elems)}",
        f"for c, h, w in T.grid({image.channels}, {image.height}, {image.width})",
    ):
        element = (
            f"source[n // {image.vector} * {image.slice_elems} + c * {image.channel_elems} + {image.origin} + "
            f"h * {image.row_elems} + w * {image.vector} + n % {image.vector}]"
        )
        text(f"result[(n * {image.channels} + c) * {pixels} + h * {image.width} + w] = {widened(image, element)}")
    return str(text)


@schedule("image.zero_halo", device="cpu")
def image_zero_halo(problem: ZeroHalo, target: Target) -> str:
    text = Text(array("image", problem.image))
    with each_row(text, {"image": problem.image}):
        frame_row(text, "image", problem.image)
    return str(text)


@schedule("image.copy", device="cpu")
def image_copy(problem: ImageCopy, target: Target) -> str:
    return pointwise({"source": problem.source, "result": problem.result}, "result", "{source}", problem.accumulate)


def _comb(problem: ImageComb, back: bool) -> str:
    """Windows of as many vectors as a combed row has parts are turned in registers, what is left of a row pixel by
    pixel."""
    plain, combed, parts = problem.plain, problem.combed, problem.combed.combed
    images = {"plain": plain, "combed": combed}
    text = Text(*(array(name, images[name]) for name in (reversed(images) if back else images)))
    each, done = combed.vector, plain.width // (combed.abreast * parts)
    with each_row(text, images):
        if done:
            with text.nest(f"for t in T.serial({done})"):
                _turn_window(text, problem, back)
        for x in range(done * combed.abreast * parts, plain.width if back else -(-plain.width // parts) * parts):
            tooth, pixel = f"combed[combed_row + {combed.column(x)} + i]", f"plain[plain_row + {x * each} + i]"
            with text.nest(f"for i in T.vectorized({each})"):
                if back:
                    text(f"{pixel} = {pixel} + {tooth}" if problem.accumulate else f"{pixel} = {tooth}")
                else:
                    text(f"{tooth} = {pixel if x < plain.width else narrowed(combed, 'T.float32(0)')}")
    return str(text)


def _turn_window(text: Text, problem: ImageComb, back: bool) -> None:
    """One vector of each part, and as many of the plain row."""
    combed, parts = problem.combed, range(problem.combed.combed)
    each, floats, several = combed.vector, combed.floats, len(parts)
    pixels = [f"plain[T.ramp(plain_row + (t * {several} + {part}) * {floats}, 1, {floats})]" for part in parts]
    teeth = [f"combed[T.ramp(combed_row + {combed.column(part)} + t * {floats}, 1, {floats})]" for part in parts]
    for part in parts:
        if back:
            found = [divmod(part * floats + i, each) for i in range(floats)]
            places = [x % several * floats + x // several * each + lane for x, lane in found]
            turned = f"T.Shuffle([{', '.join(teeth)}], {places})"
            text(f"{pixels[part]} = " + (f"{pixels[part]} + {turned}" if problem.accumulate else turned))
        else:
            places = [(i // each * several + part) * each + i % each for i in range(floats)]
            text(f"{teeth[part]} = T.Shuffle([{', '.join(pixels)}], {places})")


@schedule("image.comb", device="cpu")
def image_comb(problem: ImageComb, target: Target) -> str:
    return _comb(problem, back=False)


@schedule("image.uncomb", device="cpu")
def image_uncomb(problem: ImageComb, target: Target) -> str:
    return _comb(problem, back=True)


@schedule("image.part", device="cpu")
def image_part(problem: ImagePart, target: Target) -> str:
    source, result, (channels, rows, columns) = problem.source, problem.result, problem.size
    text = Text(array("source", source), array("result", result))
    if problem.fill is not None and problem.size != (result.channels, result.height, result.width):
        fill = narrowed(result, number(problem.fill))
        with each_row(text, {"result": result}):
            walk_row(text, result, lambda at, slot, live: [f"result[result_row + {at}] = {fill}"])
    turns = result.slices * channels * rows
    with text.nest(f"for turn in {loop(turns, turns * columns * result.vector)}"):
        text(f"plane: T.let = turn // {rows}", f"h: T.let = turn % {rows}")
        for name, image, grid in ("source", source, problem.taken), ("result", result, problem.put):
            (first, row, column), (apart, down, _) = grid.start, grid.step
            place = f"plane // {channels} * {image.channels} + plane % {channels} * {apart} + {first}"
            left = image.origin + row * image.row_elems + column * image.vector
            text(f"{name}_row: T.let = ({place}) * {image.channel_elems} + h * {down * image.row_elems} + {left}")
        with text.nest(f"for w in T.serial({columns})", f"for i in T.vectorized({result.vector})"):
            element = f"result[result_row + w * {problem.put.step[2] * result.vector} + i]"
            value = widened(source, f"source[source_row + w * {problem.taken.step[2] * source.vector} + i]")
            value = f"{widened(result, element)} + {value}" if problem.accumulate else value
            text(f"{element} = {narrowed(result, value)}")
    return str(text)
