"""The sparse convolution as a gather, on a CPU: one register tile of result pixels, all live units, then the next tile."""

from __future__ import annotations

from mest_compile.hardware import Target
from mest_compile.operators.gather import GatherConv, Pass
from mest_compile.registry import schedule
from mest_compile.spec import FLOAT_BYTES, Image


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def rows_at_once(problem_rows: int, most: int) -> int:
    """The largest share of a unit's result channels that has its own accumulators at the same time."""
    return max(rows for rows in divisors(problem_rows) if rows <= most)


def pick_tile(grid: tuple[int, int], vectors: int, accumulators: int) -> tuple[int, int, int]:
    """(grid rows, grid columns, vectors of the batch) of a register tile, each a divisor; the product is at most `accumulators`.

    Most accumulators first, then the squarest patch: neighbouring pixels share most of what they read.
    """
    fits = [(high, wide, deep) for high in divisors(grid[0]) for wide in divisors(grid[1]) for deep in divisors(vectors)
            if high * wide * deep <= accumulators]
    return max(fits, key=lambda tile: (tile[0] * tile[1] * tile[2], -(tile[0] + 2) * (tile[1] + 2) * tile[2]))


def section_channels(source: Image, source_step: tuple[int, int], kernel: tuple[int, int], source_block: int, target: Target) -> int:
    """Source channels of a section, a multiple of `source_block`: the patch that a tile of 2 x 2 pixels and 2 vectors reads of them
    fills no more than half of the first-level cache.

    kernel  (height, width) of the taps, pixels
    """
    tile = pick_tile((2, 2), max(1, source.lanes // source.vector), 8)
    high, wide = ((tile[axis] - 1) * source_step[axis] + kernel[axis] for axis in (0, 1))
    patch_bytes = high * wide * tile[2] * source.vector * FLOAT_BYTES
    channels = target.l1_bytes // 2 // patch_bytes // source_block * source_block
    return min(max(channels, source_block), source.channels)


@schedule("gather.conv", device="cpu", knobs={"tile": (None,)}, section_channels=section_channels)
def gather_conv(problem: GatherConv, target: Target, tile: tuple[int, int, int] | None = None) -> str:
    """Vectors over the batch; accumulators stay in registers while a group's live units pass.

    tile  (grid rows, grid columns, vectors) of a register tile, divisors of the grid and of the lanes; None: chosen from the sizes
    """
    elems = {"source": problem.source.elems, "result": problem.result.elems}
    statistics = f", statistics: T.Buffer(({problem.passes[0].grid[0] * 2 * problem.result.channels * problem.result.vector},), 'float32')"
    bias = f"bias: T.Buffer(({problem.result.channels},), 'float32'), "
    lines = [
        "@T.prim_func",
        f"def kernel(pointers: T.Buffer(({len(problem.passes) * problem.sections * problem.groups + 1},), 'int32'), "
        f"offsets_handle: T.handle, values_handle: T.handle, {bias if problem.bias else ''}"
        f"source: T.Buffer(({elems['source']},), 'float32'), result: T.Buffer(({elems['result']},), 'float32')"
        f"{statistics if problem.statistics else ''}):",
        "    T.func_attr({'tirx.noalias': True})",
        "    units = T.int32()",
        "    offsets = T.match_buffer(offsets_handle, (units,), 'int32')",
        f"    values = T.match_buffer(values_handle, (units * {problem.source_block * problem.row_block},), 'float32')",
    ]
    for index, grid_pass in enumerate(problem.passes):
        if min(grid_pass.grid) > 0:
            lines += ["    " + line for line in _pass_lines(problem, index, grid_pass, target, tile)]
    if len(lines) == 6:
        lines.append("    T.evaluate(0)")
    return "\n".join(lines)


def nest(loops: list[tuple[str, int]], vector: int, body: str) -> list[str]:
    """Unrolled loops (name, extent) around a vector loop over `i` around one statement."""
    lines = [f"for {name} in T.unroll({extent}):" for name, extent in loops] + [f"for i in T.vectorized({vector}):", body]
    return ["    " * depth + line for depth, line in enumerate(lines)]


def indent(depth: int, lines: list[str]) -> list[str]:
    return ["    " * depth + line for line in lines]


def _pass_lines(problem: GatherConv, index: int, grid_pass: Pass, target: Target, tile: tuple[int, int, int] | None) -> list[str]:
    """The loops of one pass over its grid of result pixels."""
    source, result, vector = problem.source, problem.result, problem.result.vector
    rows = rows_at_once(problem.row_block, max(target.registers // 2, 1))
    parts, vectors = problem.row_block // rows, result.lanes // vector
    high, wide, deep = tile or pick_tile(grid_pass.grid, vectors, max(target.registers // 2 // rows, 1))
    down, across, layers = grid_pass.grid[0] // high, grid_pass.grid[1] // wide, vectors // deep
    if problem.statistics:  # a grid row has one writer
        y, x, z, depth = "y", "x", "z", 3
        lines = [f"for y in T.parallel({down}):", f"    for s in T.serial({high * 2 * result.channels}):",
                 f"        for i in T.vectorized({vector}):",
                 f"            statistics[(y * {high * 2 * result.channels} + s) * {vector} + i] = T.float32(0)",
                 f"    for x in T.serial({across}):", f"        for z in T.serial({layers}):"]
    else:
        y, x, z, depth = f"(piece // {across * layers})", f"(piece // {layers} % {across})", f"(piece % {layers})", 1
        lines = [f"for piece in T.parallel({down * across * layers}):"]

    cell = f"({index * problem.sections * problem.groups} + section * {problem.groups} + part // {parts})"
    channel = f"(part * {rows} + j)"
    start = f"bias[{channel}]" if problem.bias else "T.float32(0)"
    value = (f"values[(pointers[{cell}] + unit) * {problem.source_block * problem.row_block} + k * {problem.row_block}"
             f" + part % {parts} * {rows} + j]")
    total = f"sums[(((j * {high} + a) * {wide} + c) * {deep} + v) * {vector} + i]"

    def pixel(row_elems: int, pixel_elems: int) -> str:
        return f"({y} * {high} + a) * {row_elems} + ({x} * {wide} + c) * {pixel_elems} + ({z} * {deep} + v) * {vector} + i"

    read = (f"source[offsets[pointers[{cell}] + unit] + k * {source.channel_elems}"
            f" + {pixel(problem.source_step[0] * source.row_elems, problem.source_step[1] * source.lanes)}]")
    first = result.origin + grid_pass.start[0] * result.row_elems + grid_pass.start[1] * result.lanes
    write = (f"result[{channel} * {result.channel_elems} + {first}"
             f" + {pixel(grid_pass.step[0] * result.row_elems, grid_pass.step[1] * result.lanes)}]")

    def each(body: str) -> list[str]:
        return nest([("j", rows), ("a", high), ("c", wide), ("v", deep)], vector, body)

    inner = [f"sums = T.alloc_buffer(({rows * high * wide * deep * vector},), 'float32')"]
    if problem.accumulate:
        inner += each(f"{total} = {write}")
    else:
        inner += ["if section == 0:", *indent(1, each(f"{total} = {start}"))]
        if problem.sections > 1:
            inner += ["else:", *indent(1, each(f"{total} = {write}"))]
    inner += [f"for unit in T.serial(pointers[{cell} + 1] - pointers[{cell}]):", f"    for k in T.unroll({problem.source_block}):",
              *indent(2, each(f"{total} = {total} + {value} * {read}"))]
    inner += each(f"{write} = {total}")
    if problem.statistics:
        moment = f"statistics[((({y} * {high} + a) * 2 + %d) * {result.channels} + {channel}) * {vector} + i]"
        inner += [f"if section == {problem.sections - 1}:", *indent(1, each(f"{moment % 0} = {moment % 0} + {total}")),
                  *indent(1, each(f"{moment % 1} = {moment % 1} + {total} * {total}"))]
    lines += indent(depth, [f"for section in T.serial({problem.sections}):", f"    for part in T.serial({problem.groups * parts}):",
                            *indent(2, inner)])
    return lines


gather_conv.section_channels = section_channels  # the planner cuts a layer's index before any kernel of it exists
