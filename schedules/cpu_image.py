"""Layout at the model's border and between halos, on a CPU."""

from __future__ import annotations

from mest_compile.hardware import Target
from mest_compile.operators.image import ImageCopy, ImageExport, ImageImport, ZeroHalo
from mest_compile.registry import schedule
from mest_compile.schedules.cpu_rows import Text, buffer, each_row, loop, pointwise


@schedule("image.import", device="cpu")
def image_import(problem: ImageImport, target: Target) -> str:
    """Transposes tiles of vector x vector elements in registers: loads run along a row of pixels, stores along the batch."""
    image, vector = problem.result, problem.result.vector
    example = image.channels * image.height * image.width
    text = Text(buffer("images", image.batch * example), buffer("result", image.elems))

    def tile(block: str, examples: int) -> None:
        """Examples from `block * vector`, of which `examples` exist."""
        source = f"({block} * {vector} + {{}}) * {example} + n * {image.width}"
        result = f"result_row + {block} * {vector} + i"
        if image.width >= vector:
            with text.nest(f"for t in T.serial({image.width // vector})"):
                with text.nest(f"for j in T.unroll({vector})", f"for i in T.vectorized({vector})"):
                    loaded = f"images[{source.format(f'T.min(j, {examples - 1})')} + t * {vector} + i]"
                    if examples < vector:
                        loaded = f"T.Select(j < {examples}, {loaded}, T.float32(0))"
                    text(f"tile[j * {vector} + i] = {loaded}")
                with text.nest(f"for j in T.unroll({vector})", f"for i in T.vectorized({vector})"):
                    text(f"result[{result} + (t * {vector} + j) * {image.lanes}] = tile[i * {vector} + j]")
        with text.nest(f"for w in T.serial({image.width % vector})", f"for i in T.vectorized({vector})"):
            at = f"({image.width // vector * vector} + w)"
            loaded = f"images[{source.format(f'T.min(i, {examples - 1})')} + {at}]"
            text(f"result[{result} + {at} * {image.lanes}] = T.Select(i < {examples}, {loaded}, T.float32(0))")

    with each_row(text, {"result": image}):
        text.local("tile", vector * vector)
        full, rest = divmod(image.batch, vector)
        if full:
            with text.nest(f"for b in T.serial({full})"):
                tile("b", vector)
        if rest:
            tile(str(full), rest)
    return str(text)


@schedule("image.export", device="cpu")
def image_export(problem: ImageExport, target: Target) -> str:
    """Logits: a few kilobytes, so plain loops."""
    image = problem.source
    text = Text(buffer("source", image.elems), buffer("result", image.batch * image.channels))
    with text.nest(f"for n, c in T.grid({image.batch}, {image.channels})"):
        text(f"result[n * {image.channels} + c] = source[c * {image.channel_elems} + {image.origin} + n]")
    return str(text)


@schedule("image.zero_halo", device="cpu")
def image_zero_halo(problem: ZeroHalo, target: Target) -> str:
    """Four strips a channel; strips of no size have no code."""
    image = problem.image
    top, left, bottom, right = (size * unit for size, unit in
                                zip(image.halo, (image.row_elems, image.lanes, image.row_elems, image.lanes), strict=True))
    text = Text(buffer("image", image.elems))

    def strip(start: str, elems: int) -> None:
        if elems:
            with text.nest(f"for t in T.serial({elems // image.vector})", f"for i in T.vectorized({image.vector})"):
                text(f"image[{start} + t * {image.vector} + i] = T.float32(0)")

    with text.nest(f"for c in {loop(image.channels, image.elems)}"):
        strip(f"c * {image.channel_elems}", top)
        strip(f"(c + 1) * {image.channel_elems - bottom} + c * {bottom}", bottom)
        if left or right:
            with text.nest(f"for h in T.serial({image.height})"):
                start = f"c * {image.channel_elems} + {top} + h * {image.row_elems}"
                strip(start, left)
                strip(f"{start} + {image.row_elems - right}", right)
    return str(text)


@schedule("image.copy", device="cpu")
def image_copy(problem: ImageCopy, target: Target) -> str:
    return pointwise({"source": problem.source, "result": problem.result}, "result", "{source}", problem.accumulate)
