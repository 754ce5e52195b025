"""Depthwise convolution on a CPU: bound by memory, so all taps of a register tile of results pass at once.

A tile's sums stay in registers while the source pixels that any of them reads come by, each loaded once; a channel's
weights are read along with it, and stay in registers where there are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.layers.depthwise import (
    DepthwiseForward,
    DepthwiseGradInput,
    DepthwiseGradWeight,
    Window,
)
from mest_compile.records.knob import Knob
from mest_compile.schedules.cpu.gather_grad import halves
from mest_compile.schedules.cpu.rows import array, buffer, loop, narrowed, widened
from mest_compile.schedules.cpu.tiles import epilogue_arguments, finished, vectors

Tile = tuple[int, int]
Reads = dict[tuple[int, int], list[tuple[tuple[int, int], int]]]  # source pixel -> (result pixel, tap) that read it

REGISTER = 16  # floats of the widest
LARGE = 9  # taps, from where a tile of one row is enough to keep multiply-adds busy


def _columns(width: int, step: int, most: int) -> int:
    """Columns of a tile, a multiple of `step` or all: as few tiles as `most` columns allow, of about one size."""
    tiles = -(-width // most)
    return min(-(-width // tiles // step) * step, -(-width // step) * step)


def tile_of(result: Image, window: Window, step: tuple[int, int]) -> Tile:
    """Sums of two registers each, as those of 32 examples, would fill all of them with 8 columns: with 4 the forward
    pass of MobileNetV2's takes 0.93 of the time, EfficientNet-lite0's 0.91 (bfloat16, Zen 4)."""
    rows = step[0] if step[0] > 1 or window.taps > LARGE or result.height % 2 else 2
    return rows, _columns(result.width, step[1], 8 if result.vector <= REGISTER else 4)


def _tiles(problem: DepthwiseForward | DepthwiseGradInput, target: Target) -> list[Tile]:
    step = problem.window.stride if isinstance(problem, DepthwiseGradInput) else (1, 1)
    return [
        (rows * step[0], columns * step[1])
        for rows in (1, 2, 3)
        for columns in (2, 4, 6, 8)
        if rows * columns * step[0] * step[1] <= 24 and columns * step[1] < problem.result.width + step[1]
    ]


TILE = Knob(
    "tile",
    None,
    "(rows, columns) of results whose sums are in registers, multiples of the stride in the input gradient; None: "
    "chosen from the sizes",
    _tiles,
)


def _spans(size: int, tile: int) -> Iterator[tuple[int, int, int]]:
    """(tiles, size of one, where the first begins): those that are whole, then what is left."""
    whole, rest = divmod(size, tile)
    if whole:
        yield whole, tile, 0
    if rest:
        yield 1, rest, whole * tile


def reads_of(taps: Callable[[int, int], Iterator[tuple[int, int, int]]], window: Window, tile: Tile) -> Reads:
    """taps: Window.reached or Window.reaching."""
    found: Reads = {}
    for (ky, a, y), (kx, b, x) in product(taps(0, tile[0]), taps(1, tile[1])):
        found.setdefault((y, x), []).append(((a, b), ky * window.kernel[1] + kx))
    return dict(sorted(found.items()))


def nothing(rows: int) -> None:
    pass


def each_tile(
    text: Text,
    result: Image,
    tile: Tile,
    body: Callable[[Tile], None],
    begin: Callable[[int], None] = nothing,
    end: Callable[[int], None] = nothing,
) -> None:
    """Loops over the tiles of a channel: sets `h`, `w`, a tile's first pixel.

    begin, end  write what comes before and behind the tiles of the same rows; they are told how many rows these are
    """
    for down, rows, top in _spans(result.height, tile[0]):
        with text.nest(f"for y in T.serial({down})"):
            text(f"h: T.let = {top} + y * {rows}")
            begin(rows)
            for across, columns, left in _spans(result.width, tile[1]):
                with text.nest(f"for x in T.serial({across})"):
                    text(f"w: T.let = {left} + x * {columns}")
                    body((rows, columns))
            end(rows)


def add_up(text: Text, source: str, image: Image, start: str, reads: Reads, values: str) -> None:
    """Adds what a tile reads of a source plane to `sums_<row>`.

    start, values  where the source's pixel (0, 0) and the channel's taps are in their arrays
    """
    vector, lines = image.vector, []
    for number, ((y, x), readers) in enumerate(reads.items()):
        pixel = f"{source}[{start} + {y * image.row_elems + x * vector} + i]"
        lines.append(f"pixel_{number}: T.let = {widened(image, pixel)}")
        for (a, b), tap in readers:
            total = f"sums_{a}[{b * vector} + i]"
            lines.append(f"{total} = {total} + values[{values} + {tap}] * pixel_{number}")
    vectors(text, [], vector, *lines)


def start_sums(text: Text, tile: Tile, vector: int, first: Callable[[int, int], str]) -> None:
    """Declares `sums_<row>`, an array for each as LLVM takes only small ones into registers, and starts them."""
    for a in range(tile[0]):
        text.local(f"sums_{a}", tile[1] * vector)
        vectors(text, [], vector, *(f"sums_{a}[{b * vector} + i] = {first(a, b)}" for b in range(tile[1])))


@schedule("depthwise.forward", device="cpu", knobs=(TILE,))
def depthwise_forward(problem: DepthwiseForward, target: Target, tile: Tile | None) -> str:
    source, result, window, vector = problem.source, problem.result, problem.window, problem.result.vector
    statistics = result.slices * result.height * 2 * result.channels * vector
    text = Text(
        buffer("values", result.channels * window.taps),
        *([buffer("bias", result.channels)] if problem.bias else []),
        *epilogue_arguments(problem),
        array("source", source),
        array("result", result),
        *([buffer("statistics", statistics)] if problem.statistics else []),
    )

    with text.nest(f"for plane in {loop(result.slices * result.channels, result.elems)}"):
        text(
            f"c: T.let = plane % {result.channels}",
            f"source_plane: T.let = plane // {problem.multiplier} * {source.channel_elems} + {source.origin}",
            f"result_plane: T.let = plane * {result.channel_elems} + {result.origin}",
        )
        write_plane(text, problem, "source", tile)
    return str(text)


def write_plane(
    text: Text,
    problem: DepthwiseForward,
    name: str,
    tile: Tile | None,
    ready: Callable[[int], None] = nothing,
) -> None:
    """Writes the results of channel `c` at `result_plane` from the pixels at `source_plane` of the array `name`. ready:
    writes what comes before so many rows of them are written."""
    source, result, window, vector = problem.source, problem.result, problem.window, problem.result.vector

    def begin(rows: int) -> None:
        ready(rows)
        if problem.statistics:
            text.local("moments", 2 * rows * vector)
            vectors(text, [("m", 2 * rows)], vector, f"moments[m * {vector} + i] = T.float32(0)")

    def end(rows: int) -> None:
        if problem.statistics:
            place = f"((plane // {result.channels} * {result.height} + h + {{}}) * 2 + {{}}) * {result.channels} + c"
            for a, moment in product(range(rows), range(2)):
                at = f"({place.format(a, moment)}) * {vector} + i"
                vectors(text, [], vector, f"statistics[{at}] = moments[{(2 * a + moment) * vector} + i]")

    def one(tile: Tile) -> None:
        text(
            f"read: T.let = source_plane + h * {window.stride[0] * source.row_elems} + w * {window.stride[1] * vector}",
            f"write: T.let = result_plane + h * {result.row_elems} + w * {vector}",
        )
        start_sums(text, tile, vector, lambda a, b: "bias[c]" if problem.bias else "T.float32(0)")
        add_up(text, name, source, "read", reads_of(window.reached, window, tile), f"c * {window.taps}")
        for a in range(tile[0]):
            lines = []
            for b in range(tile[1]):
                summand = ""
                if problem.epilogue and problem.epilogue.residual:
                    other = problem.epilogue.residual
                    summand = (
                        f"{other.origin} + plane // {result.channels} * {other.slice_elems} + (h + {a}) * "
                        f"{other.row_elems} + (w + {b}) * {vector} + i"
                    )
                total = f"sums_{a}[{b * vector} + i]"
                made = narrowed(result, finished(problem, total, "c", summand))
                lines.append(f"result[write + {a * result.row_elems + b * vector} + i] = {made}")
                if problem.statistics:
                    stored, part = widened(result, narrowed(result, total)), f"moments[{2 * a * vector} + i]"
                    square = f"moments[{(2 * a + 1) * vector} + i]"
                    lines += [f"{part} = {part} + {stored}", f"{square} = {square} + {stored} * {stored}"]
            vectors(text, [], vector, *lines)

    each_tile(text, result, tile or tile_of(result, window, (1, 1)), one, begin, end)


@schedule("depthwise.grad_input", device="cpu", knobs=(TILE,))
def depthwise_grad_input(problem: DepthwiseGradInput, target: Target, tile: Tile | None) -> str:
    """All remainders of the stride in one pass over delta: a tile has whole steps of it."""
    delta, result, window, vector = problem.delta, problem.result, problem.window, problem.result.vector
    text = Text(buffer("values", delta.channels * window.taps), array("delta", delta), array("result", result))

    def one(tile: Tile) -> None:
        text(
            f"read: T.let = h // {window.stride[0]} * {delta.row_elems} + w // {window.stride[1]} * {vector}",
            f"write: T.let = result_plane + h * {result.row_elems} + w * {vector}",
        )

        def element(a: int, b: int) -> str:
            return f"result[write + {a * result.row_elems + b * vector} + i]"

        before = (lambda a, b: widened(result, element(a, b))) if problem.accumulate else (lambda a, b: "T.float32(0)")
        start_sums(text, tile, vector, before)
        reads = reads_of(window.reaching, window, tile)
        for m in range(problem.multiplier):
            text(
                f"channel_{m}: T.let = plane * {problem.multiplier} + {m}",
                f"read_{m}: T.let = channel_{m} * {delta.channel_elems} + {delta.origin} + read",
            )
            add_up(text, "delta", delta, f"read_{m}", reads, f"channel_{m} % {delta.channels} * {window.taps}")
        for a in range(tile[0]):
            stored = [f"{element(a, b)} = {narrowed(result, f'sums_{a}[{b * vector} + i]')}" for b in range(tile[1])]
            vectors(text, [], vector, *stored)

    with text.nest(f"for plane in {loop(result.slices * result.channels, result.elems)}"):
        text(f"result_plane: T.let = plane * {result.channel_elems} + {result.origin}")
        each_tile(text, result, tile or tile_of(result, window, window.stride), one)
    return str(text)


def start_taps(text: Text, window: Window, vector: int) -> None:
    """Starts `total`, the weight gradient of a channel by lanes."""
    text.local("total", window.taps * vector)
    vectors(text, [("k", window.taps)], vector, f"total[k * {vector} + i] = T.float32(0)")


def add_taps(
    text: Text,
    window: Window,
    source: Image,
    delta: Image,
    target: Target,
    arrays: tuple[str, str] = ("source", "delta"),
) -> None:
    """Adds a row's share to `total`. arrays: the names of what `source_row` and `delta_row` say the first elements
    of."""
    vector, (high, wide) = delta.vector, window.kernel
    together = max(1, min(high, (2 * target.registers - 6) // wide))  # rows of taps whose sums are in registers
    for first in range(0, high, together):
        rows = min(together, high - first)
        text(*(f"sums_{ky} = T.alloc_buffer(({wide * vector},), 'float32')" for ky in range(rows)))
        for ky in range(rows):
            vectors(text, [("k", wide)], vector, f"sums_{ky}[k * {vector} + i] = T.float32(0)")
        for across, columns, left in _spans(delta.width, _columns(delta.width, 1, 4)):
            lines = [
                f"delta_{b}: T.let = {widened(delta, f'{arrays[1]}[delta_row + w * {vector} + {b * vector} + i]')}"
                for b in range(columns)
            ]
            reads = reads_of(window.reached, window, (1, columns))
            for number, ((y, x), readers) in enumerate(reads.items()):
                mine = [(b, *divmod(tap, wide)) for (_, b), tap in readers if first <= tap // wide < first + rows]
                if mine:
                    at = f"source_row + w * {window.stride[1] * vector} + {y * source.row_elems + x * vector} + i"
                    lines.append(f"pixel_{number}: T.let = {widened(source, f'{arrays[0]}[{at}]')}")
                for b, ky, kx in mine:
                    total = f"sums_{ky - first}[{kx * vector} + i]"
                    lines.append(f"{total} = {total} + delta_{b} * pixel_{number}")
            with text.nest(f"for x in T.serial({across})"):
                text(f"w: T.let = {left} + x * {columns}")
                vectors(text, [], vector, *lines)
        for ky in range(rows):
            total = f"total[({(first + ky) * wide} + k) * {vector} + i]"
            vectors(text, [("k", wide)], vector, f"{total} = {total} + sums_{ky}[k * {vector} + i]")


def store_taps(text: Text, window: Window, vector: int) -> None:
    """Stores the weight gradient of channel `c`."""
    with text.nest(f"for k in T.serial({window.taps})"):
        sums = f"total[k * {vector}"
        for half in halves(vector):
            vectors(text, [], half, f"{sums} + i] = {sums} + i] + {sums} + {half} + i]")
        text(f"gradients[c * {window.taps} + k] = {sums}]")


@schedule("depthwise.grad_weight", device="cpu")
def depthwise_grad_weight(problem: DepthwiseGradWeight, target: Target) -> str:
    """A thread has channels: sums are the same on any number of them. Those of a row are added up by themselves, so
    that rounding grows with height + width and not with their product."""
    source, delta, window, vector = problem.source, problem.delta, problem.window, problem.delta.vector
    text = Text(buffer("gradients", delta.channels * window.taps), array("source", source), array("delta", delta))
    with text.nest(f"for c in {loop(delta.channels, delta.elems)}"):
        start_taps(text, window, vector)
        with text.nest(f"for s, h in T.grid({delta.slices}, {delta.height})"):
            text(
                f"delta_row: T.let = (s * {delta.channels} + c) * {delta.channel_elems} + {delta.origin} + h * "
                f"{delta.row_elems}",
                f"source_row: T.let = (s * {source.channels} + c // {problem.multiplier}) * {source.channel_elems} + "
                f"{source.origin} + h * {window.stride[0] * source.row_elems}",
            )
            add_taps(text, window, source, delta, target)
        store_taps(text, window, vector)
    return str(text)
