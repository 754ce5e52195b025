"""The sparse convolution as a gather, on a CPU: one register tile of result pixels, all live units, then the next tile."""

from __future__ import annotations

from mest_compile.hardware import Target
from mest_compile.operators.gather import GatherConv, Pass
from mest_compile.registry import schedule
from mest_compile.spec import FLOAT_BYTES, Image

LINE_BYTES = 64       # a cache line of every CPU we know
ACCUMULATORS = 0.5    # share of the vector registers: eight hide the latency of a multiply-add, ten and more gained nothing
TAPS = 3              # kernel height and width that tiles are chosen for


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor that is at most `most`."""
    return max(candidate for candidate in divisors(number) if candidate <= most)


def patch_lines(tile: tuple[int, int, int], step: tuple[int, int], kernel: tuple[int, int], vector: int) -> float:
    """Cache lines of one source channel that a tile of (rows, columns, slices) reads, on average over where it starts."""
    high, wide = ((tile[axis] - 1) * step[axis] + kernel[axis] for axis in (0, 1))
    return tile[2] * high * (wide * vector * FLOAT_BYTES / LINE_BYTES + 0.5)


def pick_tile(grid: tuple[int, int], slices: int, accumulators: int, step: tuple[int, int], vector: int) -> tuple[int, int, int]:
    """(grid rows, grid columns, slices) of a register tile, each a divisor; the product is at most `accumulators`.

    Most accumulators first, then the smallest patch: neighbouring pixels share most of what they read.
    """
    fits = [(high, wide, deep) for high in divisors(grid[0]) for wide in divisors(grid[1]) for deep in divisors(slices)
            if high * wide * deep <= accumulators]
    return max(fits, key=lambda tile: (tile[0] * tile[1] * tile[2], -patch_lines(tile, step, (TAPS, TAPS), vector)))


def section_channels(source: Image, source_step: tuple[int, int], kernel: tuple[int, int], source_block: int, target: Target) -> int:
    """Source channels of a section, a multiple of `source_block`: the patch that a tile of 2 x 4 pixels reads of them fills three
    quarters of the first-level cache, so that all groups of result channels read it from there.

    kernel  (height, width) of the taps, pixels
    """
    high, wide = (step * (size - 1) + taps for step, size, taps in zip(source_step, (2, 4), kernel, strict=True))
    patch_bytes = high * wide * source.vector * FLOAT_BYTES
    channels = target.l1_bytes * 3 // 4 // patch_bytes // source_block * source_block
    return min(max(channels, source_block), source.channels)


def nest(loops: list[tuple[str, int]], vector: int, body: str) -> list[str]:
    """Unrolled loops (name, extent) around a vector loop over `i` around one statement."""
    lines = [f"for {name} in T.unroll({extent}):" for name, extent in loops] + [f"for i in T.vectorized({vector}):", body]
    return ["    " * depth + line for depth, line in enumerate(lines)]


def indent(depth: int, lines: list[str]) -> list[str]:
    return ["    " * depth + line for line in lines]


@schedule("gather.conv", device="cpu", knobs={"tile": (None,)})
def gather_conv(problem: GatherConv, target: Target, tile: tuple[int, int, int] | None = None) -> str:
    """Vectors over the examples of a slice; accumulators stay in registers while a group's live units pass.

    tile  (grid rows, grid columns, slices) of a register tile, divisors of the grid and of the slices; None: chosen from the sizes
    """
    source, result = problem.source, problem.result
    block = problem.source_block * problem.row_block
    arguments = [
        f"pointers: T.Buffer(({len(problem.passes) * problem.sections * problem.groups + 1},), 'int32')",
        "offsets_handle: T.handle", "values_handle: T.handle",
        *([f"bias: T.Buffer(({result.channels},), 'float32')"] if problem.bias else []),
        f"source: T.Buffer(({source.elems},), 'float32')", f"result: T.Buffer(({result.elems},), 'float32')",
    ]
    if problem.statistics:
        elems = result.slices * problem.passes[0].grid[0] * 2 * result.channels * result.vector
        arguments.append(f"statistics: T.Buffer(({elems},), 'float32')")
    lines = ["@T.prim_func", f"def kernel({', '.join(arguments)}):", *indent(1, [
        "T.func_attr({'tirx.noalias': True})",
        "units = T.int32()",
        "offsets = T.match_buffer(offsets_handle, (units,), 'int32')",
        f"values = T.match_buffer(values_handle, (units * {block},), 'float32')"])]
    for index, grid_pass in enumerate(problem.passes):
        if min(grid_pass.grid) > 0:
            lines += indent(1, _pass_lines(problem, index, grid_pass, target, tile))
    return "\n".join(lines)


def _pass_lines(problem: GatherConv, index: int, grid_pass: Pass, target: Target, tile: tuple[int, int, int] | None) -> list[str]:
    """The loops of one pass over its grid of result pixels."""
    source, result, vector = problem.source, problem.result, problem.result.vector
    accumulators = max(int(target.registers * ACCUMULATORS), 1)
    rows = largest_divisor(problem.row_block, accumulators)
    parts = problem.row_block // rows
    high, wide, deep = tile or pick_tile(grid_pass.grid, result.slices, max(accumulators // rows, 1), problem.source_step, vector)
    down, across, layers = grid_pass.grid[0] // high, grid_pass.grid[1] // wide, result.slices // deep

    cell = f"({index * problem.sections * problem.groups} + section * {problem.groups} + part // {parts})"
    channel = f"(part * {rows} + j)"
    start = f"bias[{channel}]" if problem.bias else "T.float32(0)"
    value = (f"values[(pointers[{cell}] + unit) * {problem.source_block * problem.row_block} + k * {problem.row_block}"
             f" + part % {parts} * {rows} + j]")
    total = f"sums[(((j * {high} + a) * {wide} + c) * {deep} + v) * {vector} + i]"

    def pixel(image: Image, step: tuple[int, int]) -> str:
        return (f"(z * {deep} + v) * {image.slice_elems} + (y * {high} + a) * {step[0] * image.row_elems}"
                f" + (x * {wide} + c) * {step[1] * vector} + i")

    read = f"source[offsets[pointers[{cell}] + unit] + k * {source.channel_elems} + {pixel(source, problem.source_step)}]"
    first = result.origin + grid_pass.start[0] * result.row_elems + grid_pass.start[1] * vector
    write = f"result[{channel} * {result.channel_elems} + {first} + {pixel(result, grid_pass.step)}]"

    def each(body: str) -> list[str]:
        return nest([("j", rows), ("a", high), ("c", wide), ("v", deep)], vector, body)

    # Less than 1 KiB of scope "global": the stack, then registers. Scope "local" would be heap workspace.
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
    chunk = f"((z * {deep} + v) * {grid_pass.grid[0]} + y * {high} + a)"
    clear = []
    if problem.statistics:
        moment = f"statistics[(({chunk} * 2 + %d) * {result.channels} + {channel}) * {vector} + i]"
        inner += [f"if section == {problem.sections - 1}:", *indent(1, each(f"{moment % 0} = {moment % 0} + {total}")),
                  *indent(1, each(f"{moment % 1} = {moment % 1} + {total} * {total}"))]
        clear = [f"for v, a, s in T.grid({deep}, {high}, {2 * result.channels}):", f"    for i in T.vectorized({vector}):",
                 f"        statistics[({chunk} * {2 * result.channels} + s) * {vector} + i] = T.float32(0)"]
    return [f"for piece in T.parallel({layers * down}):",
            *indent(1, [f"z: T.let = piece // {down}", f"y: T.let = piece % {down}", *clear,
                        f"for x in T.serial({across}):", f"    for section in T.serial({problem.sections}):",
                        f"        for part in T.serial({problem.groups * parts}):", *indent(3, inner)])]


gather_conv.section_channels = section_channels  # the planner cuts a layer's index before any kernel of it exists
