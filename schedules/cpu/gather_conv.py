"""The sparse convolution as a gather, on a CPU: one register tile of result pixels, all live units, then the next
tile."""

from __future__ import annotations

from dataclasses import dataclass

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image, overhang
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.layers.gather import GatherConv, Pass
from mest_compile.schedules.cpu.gather_sizes import KNOBS, register_tile, run_pixels, vectors_of
from mest_compile.schedules.cpu.pairs import add_pair, back, order_of, pairs, set_rounded, set_words, turn
from mest_compile.schedules.cpu.rows import narrowed, widened
from mest_compile.schedules.cpu.tiles import (
    TAPS,
    epilogue_arguments,
    finished,
    largest_divisor,
    listed,
    prefetch,
    recorded,
    vectors,
    widen,
    widens_once,
)


@schedule("pattern.conv", device="cpu", knobs=KNOBS)
@schedule("compact.conv", device="cpu", knobs=KNOBS)
@schedule("gather.conv", device="cpu", knobs=KNOBS)
def gather_conv(
    problem: GatherConv,
    target: Target,
    tile: tuple[int, int, int, int] | None,
    run: int | None,
    together: int,
    prefetch: str,
    once: bool | None,
) -> str:
    """Vectors over the examples of a slice, and over neighbouring pixels where these are few; accumulators stay in
    registers while a group's live units pass."""
    knobs = _Knobs(tile, run, together, prefetch, widens_once(problem.source, target, once))
    source, result = problem.source, problem.result
    block = problem.unit[0] * problem.row_block
    arguments = [
        f"pointers: T.Buffer(({len(problem.passes) * problem.sections * problem.groups + 1},), 'int32')",
        "offsets_handle: T.handle",
        "values_handle: T.handle",
        *listed(problem, source),
        *([f"bias: T.Buffer(({result.channels},), 'float32')"] if problem.bias else []),
        *epilogue_arguments(problem),
        f"source: T.Buffer(({source.elems},), '{source.array_dtype}')",
        f"result: T.Buffer(({result.elems},), '{result.array_dtype}')",
    ]
    if problem.statistics:
        elems = result.slices * problem.passes[0].grid[0] * 2 * result.channels * result.floats
        arguments.append(f"statistics: T.Buffer(({elems},), 'float32')")
    text = Text(*arguments)
    text(
        "units = T.int32()",
        "offsets = T.match_buffer(offsets_handle, (units,), 'int32')",
        "n_values = T.int32()",
        "values = T.match_buffer(values_handle, (n_values,), 'float32')",
    )
    if pairs(target, source):
        set_words(text, problem.unit[0], problem.row_block)
    elif source.dtype == "bfloat16":
        set_rounded(text, block)
    for index, grid_pass in enumerate(problem.passes):
        if min(grid_pass.grid) > 0:
            _write_pass(text, problem, index, grid_pass, target, knobs)
    return recorded(text)


@dataclass(frozen=True, slots=True)
class _Knobs:
    tile: tuple[int, int, int, int] | None
    run: int | None
    together: int
    prefetch: str
    once: bool


def _write_pass(text: Text, problem: GatherConv, index: int, grid_pass: Pass, target: Target, knobs: _Knobs) -> None:
    """The loops of one pass over its grid of result pixels."""
    source, result = problem.source, problem.result
    pixels, grid = vectors_of(problem, grid_pass)
    vector, over = pixels * result.vector, overhang(grid_pass.grid[1], pixels)
    paired = pairs(target, source)
    rows, high, wide, deep = knobs.tile or register_tile(problem, grid, target)
    parts = problem.row_block // rows
    down, across, layers = grid[0] // high, grid[1] // wide, result.slices // deep
    assert grid_pass.grid[1] + over <= result.part_columns - result.halo[1], "the last vector of a row ends in its halo"

    run = largest_divisor(across, max((knobs.run or run_pixels(problem, target)) // wide, 1))

    cell = f"({index * problem.sections * problem.groups} + section * {problem.groups} + part // {parts})"
    channel = f"channels[part * {rows} + %j]" if problem.rows_live else f"(part * {rows} + %j)"
    groups = "live_groups[0]" if problem.rows_live else problem.groups
    start = f"bias[{channel}]" if problem.bias else "T.float32(0)"
    reads, distance = problem.unit
    weights = "rounded" if source.dtype == "bfloat16" else "values"
    value = (
        f"{weights}[(pointers[{cell}] + %unit) * {reads * problem.row_block} + k * {problem.row_block}"
        f" + part % {parts} * {rows} + %j]"
    )
    total = f"sums_%j[((a * {wide} + c) * {deep} + v) * {vector} + i]"

    def pixel(image: Image, step: tuple[int, int], first: str = "z") -> str:
        return (
            f"({first} * {deep} + v) * {image.slice_elems} + (y * {high} + a) * {step[0] * image.row_elems}"
            f" + (x * {wide} + c) * {image.apart(step[1], pixels)} + i"
        )

    if knobs.once:
        read = (
            f"wide[offsets[pointers[{cell}] + %unit] + k * {distance} + "
            f"{pixel(source, problem.source_step, first='0')}]"
        )
    else:
        read = widened(
            source, f"source[offsets[pointers[{cell}] + %unit] + k * {distance} + {pixel(source, problem.source_step)}]"
        )
    first = result.origin + grid_pass.start[0] * result.row_elems + result.column(grid_pass.start[1])
    write = f"result[{channel} * {result.channel_elems} + {first} + {pixel(result, grid_pass.step)}]"
    # Between sections sums stay float32: where the result is narrower, beside it.
    stretch_elems = problem.groups * parts * run * rows * high * wide * deep * vector
    beside = problem.sections > 1 and (paired or result.dtype != "float32")
    partial = (
        write
        if not beside
        else f"partial[((((part * {run} + tile) * {rows} + %j) * {high} + a) * {wide} + c) * {deep * vector} + v "
        f"* {vector} + i]"
    )

    summand = ""
    if problem.epilogue and problem.epilogue.residual:
        image = problem.epilogue.residual
        summand = f"{image.origin} + {pixel(image, (1, 1))}"

    def each(body: str) -> None:
        """Every row's accumulators; each row has an array of its own, as what is larger than STACK_BYTES would not be
        in registers."""
        for j in range(rows):
            vectors(text, [("a", high), ("c", wide), ("v", deep)], vector, body.replace("%j", str(j)))

    def pair(*units: str) -> None:
        """The sums of a unit, or of two that read one source each."""
        place = f"((a * {wide} + c) * {deep} + v) * {vector}"
        each_pair = -(-reads // 2)
        for q in range(each_pair):
            sources = (
                [(unit, 0) for unit in units]
                if reads == 1
                else [(units[0], k) for k in (2 * q, 2 * q + 1) if k < reads]
            )
            places = [
                f"offsets[pointers[{cell}] + {unit}] + {k * distance} + {pixel(source, problem.source_step)}"
                for unit, k in sources
            ]
            first = (
                f"((pointers[{cell}] + {units[0]}) * {each_pair} + {q}) * {problem.row_block} + part % {parts} * {rows}"
            )
            words = [f"words[{first} + {j}]" for j in range(rows)]
            if len(places) == 1:
                words = [f"{word} % T.uint32(65536)" for word in words]
            loops = [("a", high), ("c", wide), ("v", deep)]
            add_pair(text, loops, vector, places, place, words)

    def units(unit: str) -> None:
        with text.nest(f"for k in T.unroll({reads})"):
            each(f"{total} = {total} + {value} * {read}".replace("%unit", unit))

    def reorder(order: list[int]) -> None:
        if paired and order != sorted(order):
            for j in range(rows):
                turn(text, f"sums_{j}", high * wide * deep, vector, order)

    def tile() -> None:
        """The sums of a tile over a section's units."""
        for j in range(rows):
            # Less than 1 KiB of scope "global": the stack, then registers. Scope "local" would be heap workspace.
            text(f"sums_{j} = T.alloc_buffer(({high * wide * deep * vector},), 'float32')")
        begin = f"{total} = {widened(result, write) if problem.accumulate else start}"
        if problem.accumulate and not beside:
            each(begin)
            reorder(order_of(vector))
        else:
            with text.nest("if section == 0"):
                each(begin)
                if problem.accumulate:
                    reorder(order_of(vector))
            if problem.sections > 1:
                with text.nest("else"):
                    each(f"{total} = {partial}")
        count, several = f"(pointers[{cell} + 1] - pointers[{cell}])", knobs.together
        if paired and reads == 1:
            with text.nest(f"for two in T.serial({count} // 2)"):
                pair("two * 2", "(two * 2 + 1)")
            with text.nest(f"for odd in T.serial({count} % 2)"):
                pair(f"({count} - 1)")
        elif paired:
            with text.nest(f"for unit in T.serial({count})"):
                pair("unit")
        elif several > 1:
            with text.nest(f"for round in T.serial({count} // {several})"):
                for unit in range(several):
                    units(f"(round * {several} + {unit})")
            with text.nest(f"for unit in T.serial({count} % {several})"):
                units(f"({count} // {several} * {several} + unit)")
        else:
            with text.nest(f"for unit in T.serial({count})"):
                units("unit")
        value = finished(problem, total, channel, summand)
        if over:
            inside = f"(x * {wide} + c) * {vector} + i < {grid_pass.grid[1] * result.vector}"
            value = f"T.Select({inside}, {value}, T.float32(0))"
        done = f"{write} = {narrowed(result, value)}"
        if beside or (problem.epilogue and problem.sections > 1):
            with text.nest(f"if section == {problem.sections - 1}"):
                reorder(back(vector))
                each(done)
            with text.nest("else"):
                each(f"{partial} = {total}")
        else:
            reorder(back(vector))
            each(done)

    expected = -(-problem.rows_live // problem.row_block) or problem.groups
    visits = f"((section * {expected * parts} + part) * {run} + tile)", problem.sections * expected * parts * run
    strip = high * problem.source_step[0], run * wide * source.apart(problem.source_step[1], pixels)
    window = high * grid_pass.step[0], run * wide * result.apart(grid_pass.step[1], pixels)

    def fetch() -> None:
        """Asks for what comes after a piece."""
        if knobs.prefetch in ("both", "source") and not knobs.once:
            prefetch(
                text,
                "source",
                source,
                problem.sources_live or source.channels,
                "source_ahead",
                (strip[0], 1),
                strip[1] // source.vector,
                *visits,
                planes="sources" if problem.sources_live else None,
            )
        if knobs.prefetch in ("both", "result"):
            prefetch(
                text,
                "result",
                result,
                problem.rows_live or result.channels,
                "result_ahead",
                (high, grid_pass.step[0]),
                window[1] // result.vector,
                *visits,
                write=True,
                planes="channels" if problem.rows_live else None,
            )

    def piece() -> None:
        """All groups of a piece of rows."""
        text(
            f"next_z: T.let = (piece + 1) // {down}",
            f"next_y: T.let = (piece + 1) % {down}",
            f"new_row: T.let = T.Select(next_y == 0, 0, next_y * {strip[0]} + {TAPS - 1})",
        )
        with text.nest(f"for stretch in T.serial({across // run})"):
            text(
                f"source_ahead: T.let = next_z * {deep * source.slice_elems} + new_row * {source.row_elems}"
                f" + stretch * {strip[1]}",
                f"result_ahead: T.let = z * {deep * result.slice_elems} + {first} + y * {window[0] * result.row_elems}"
                f" + (stretch + 1) * {window[1]}",
            )
            with text.nest(
                f"for section in T.serial({problem.sections})",
                f"for part in T.serial({groups} * {parts})",
                f"for tile in T.serial({run})",
            ):
                text(f"x: T.let = stretch * {run} + tile")
                fetch()
                tile()
        if problem.statistics:
            _write_statistics(text, problem, high, deep)

    with text.nest(f"for z in T.parallel({layers})" if knobs.once else f"for piece in T.parallel({layers * down})"):
        if beside:
            text(f"partial = T.alloc_buffer(({stretch_elems},), 'float32')")
        if knobs.once:
            elems = deep * source.slice_elems
            text(f"wide = T.alloc_buffer(({elems},), 'float32')")
            widen(text, "source", source, f"z * {elems}", str(elems))
            with text.nest(f"for y in T.serial({down})"):
                text(f"piece: T.let = z * {down} + y")
                piece()
        else:
            text(f"z: T.let = piece // {down}", f"y: T.let = piece % {down}")
            piece()


def _write_statistics(text: Text, problem: GatherConv, high: int, deep: int) -> None:
    """Sums of a piece's rows, which are still in cache. Within a tile's own loop they cost twice as much."""
    result, vector, across = problem.result, problem.result.floats, vectors_of(problem, problem.passes[0])[1][1]
    lanes = next(size for size in (4, 2, 1) if across % size == 0)  # independent sums hide an addition's latency
    element = widened(
        result,
        f"result[(z * {deep} + v) * {result.slice_elems} + channel * {result.channel_elems} + {result.origin}"
        f" + (y * {high} + a) * {result.row_elems} + (c * {lanes} + lane) * {vector} + i]",
    )
    part, square = f"moments[lane * {vector} + i]", f"moments[({lanes} + lane) * {vector} + i]"
    chunk = f"((z * {deep} + v) * {result.height} + y * {high} + a)"
    live = problem.rows_live
    channels = f"row in T.grid({deep}, {high}, live_groups[0] * {problem.row_block})"
    with text.nest(f"for v, a, {channels if live else f'channel in T.grid({deep}, {high}, {result.channels})'}"):
        if live:
            text("channel: T.let = channels[row]")
        text(f"moments = T.alloc_buffer(({2 * lanes * vector},), 'float32')")
        vectors(text, [("lane", 2 * lanes)], vector, f"{part} = T.float32(0)")
        with text.nest(f"for c in T.serial({across // lanes})"):
            vectors(
                text,
                [("lane", lanes)],
                vector,
                f"{part} = {part} + {element}",
                f"{square} = {square} + {element} * {element}",
            )
        for moment in range(2):
            total = " + ".join(f"moments[{(moment * lanes + lane) * vector} + i]" for lane in range(lanes))
            at = f"(({chunk} * 2 + {moment}) * {result.channels} + channel) * {vector} + i"
            vectors(text, [], vector, f"statistics[{at}] = {total}")
