"""What the sizes of a sparse convolution decide on a CPU: its register tile, the sections of its index, and what tuning
may choose instead."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.layouts.layout import FLOAT_BYTES
from mest_compile.operators.layers.gather import GatherConv, Pass
from mest_compile.records.knob import Knob
from mest_compile.schedules.cpu.pairs import pairs
from mest_compile.schedules.cpu.tiles import LEAST_TILE, MOST_TILE, ONCE, divisors, largest_divisor

ACCUMULATORS = (
    0.5  # share of the vector registers: eight hide the latency of a multiply-add, ten and more gained nothing
)
SHARING = 4  # results of a group that make it worth it that a load comes from farther away
LEAST_ROW = 6  # pixels of a tile: with fewer sums multiply-adds wait for one another
PIXELS = 8  # of a row, or vectors of several: what sections are cut for
ROW = 48  # pixels of a row at a time: 16 to 96 channels of 48x48 take 1.9 ms and not 3.2 with 4 (Zen 4)
STACK_BYTES = 1024  # what TVM keeps on the stack, from where LLVM takes it into registers


def pick_tile(grid: tuple[int, int], slices: int, accumulators: int, registers: int = 0) -> tuple[int, int, int]:
    """(grid rows, grid columns, slices) of a register tile, each a divisor; the product is at most `accumulators`.

    Most accumulators first, then the longest row: it reads whole cache lines (1 x 8 beats 2 x 4 by 5-10% when these are
    not in cache). A row that has no such divisor but one of at most `registers` has that: 13 of 65 tokens take half
    the time of one of 8 slices.
    """
    longest = max((wide for wide in divisors(grid[1]) if wide <= registers), default=1)
    if longest > accumulators and not any(LEAST_ROW <= wide <= accumulators for wide in divisors(grid[1])):
        return 1, longest, 1
    fits = [
        (high, wide, deep)
        for high in divisors(grid[0])
        for wide in divisors(grid[1])
        for deep in divisors(slices)
        if high * wide * deep <= accumulators
    ]
    return max(fits, key=lambda tile: (tile[0] * tile[1] * tile[2], tile[1], tile[0]))


def register_tile(problem: GatherConv, grid: tuple[int, int], target: Target) -> tuple[int, int, int, int]:
    """(rows of a group, grid rows, grid columns, slices) of a tile whose sums are accumulators.

    Where a row is odd and no tile of all rows divides it, what half or a quarter of them leave registers for may: of 65
    tokens five and two rows take 0.7 of the time of one, two slices and four rows; three of 3x3 pixels and four rows
    0.85 (Zen 3).
    """
    rows, most = rows_and_pixels(problem, target)
    paired = pairs(target, problem.source)
    free = target.registers - 3 if rows == 1 and not paired else 0  # beside a weight, what it is multiplied by, a start
    tile = pick_tile(grid, problem.result.slices, most, free)
    if tile[1] == 1 and grid[1] % 2 and not (paired or problem.rows_live):
        for fewer in reversed(divisors(rows)):
            wide = max(size for size in divisors(grid[1]) if size <= max((target.registers - 4) // fewer, 1))
            if wide > 1:
                return fewer, 1, wide, 1
    return rows, *tile


def vectors_of(problem: GatherConv, grid_pass: Pass) -> tuple[int, tuple[int, int]]:
    """Of a pass: how many of its grid's pixels are a vector, those that lie side by side in the result; and the grid
    (rows, vectors)."""
    pixels = problem.result.abreast if grid_pass.step[1] == problem.result.combed else 1
    return pixels, (grid_pass.grid[0], -(-grid_pass.grid[1] // pixels))


def rows_and_pixels(problem: GatherConv, target: Target) -> tuple[int, int]:
    """Of a register tile whose sums are accumulators: rows of a group, and the most vectors for each of them."""
    accumulators = max(int(target.registers * ACCUMULATORS), 1)
    rows = largest_divisor(problem.row_block, accumulators)
    most = max(accumulators // rows, 1)
    if pairs(target, problem.source):
        most = min(most, STACK_BYTES // 2 // (problem.result.floats * FLOAT_BYTES))
    return rows, most


def section_channels(
    source: Image,
    source_step: tuple[int, int],
    kernel: tuple[int, int],
    unit: tuple[int, int],
    target: Target,
    caches: int,
) -> int:
    """Source channels of a section, a multiple of the unit's: what a tile of 1 x 8 vectors reads of them fits in so
    many first-level caches, so that all groups of result channels read it from there. Sections of a layer are of about
    the same size. Tiles of pairs have 4 pixels at most; where several results share what is read the second-level cache
    is near enough, and there are no sections (Zen 4, block:4x1: forward a tenth faster).

    kernel  (height, width) of the taps, pixels
    unit    (result channels, source channels)
    """
    paired, source_block = pairs(target, source), unit[1]
    if paired and unit[0] >= SHARING:
        return source.channels
    cache_bytes = caches * target.l1_bytes * (2 if paired else 1)
    columns = (PIXELS * source.abreast - 1) * source_step[1] + kernel[1]
    patch_bytes = kernel[0] * columns * source.vector * source.item_bytes
    blocks = source.channels // source_block
    sections = -(-blocks // max(cache_bytes // patch_bytes // source_block, 1))
    return -(-blocks // sections) * source_block


def run_pixels(problem: GatherConv, target: Target) -> int:
    """Pixels of a row that a group passes over before the next group comes. Where a section of an example slice stays
    in the second-level cache these are several tiles: its weights are at hand, and the loop's length is foreseen.
    Images from memory want their prefetches spread more evenly. A tap that reads the pixel itself shares nothing with
    its neighbours' and has whole rows: fewer, longer stretches of memory at a time."""
    source = problem.source
    if not any(source.halo):
        return ROW
    if pairs(target, source):
        return 2 * PIXELS if problem.row_block >= SHARING else 1
    near = min(problem.section_channels, source.channels) * source.channel_elems * source.item_bytes <= target.l2_bytes
    return PIXELS if near else 1


def _tiles(problem: GatherConv, target: Target) -> list[tuple[int, int, int, int]]:
    """Tiles of more accumulators than a target has registers for are among them where it may have more: with AVX-512
    there are 32 registers, half of them unused by what the rules choose."""
    grids = _grids(problem)
    if len(grids) != 1:
        return []
    (grid,) = grids
    # A row that is listed twice must be read and written by one tile, or what the first wrote is added to once more.
    registers = 2 if pairs(target, problem.source) else 1  # of a vector of sums
    return [
        (rows, high, wide, deep)
        for rows in ([problem.row_block] if problem.rows_live else divisors(problem.row_block))
        for high in divisors(grid[0])[:2]
        for wide in divisors(grid[1])
        for deep in divisors(problem.result.slices)[:3]
        if LEAST_TILE <= rows * high * wide * deep * registers <= MOST_TILE
        and high * wide * deep * problem.result.floats * FLOAT_BYTES < STACK_BYTES
    ]


def _runs(problem: GatherConv, target: Target) -> list[int]:
    widest = max((grid[1] for grid in _grids(problem)), default=1)
    return [pixels for pixels in (1, 8, 16, 32) if pixels <= widest]


def _grids(problem: GatherConv) -> set[tuple[int, int]]:
    """Those that are not empty, (rows, vectors)."""
    return {vectors_of(problem, grid_pass)[1] for grid_pass in problem.passes if min(grid_pass.grid) > 0}


KNOBS = (
    ONCE,
    Knob(
        "tile",
        None,
        "(rows of the group, grid rows, grid columns, slices) of a register tile, divisors of the group, the grid and "
        "the slices; None: chosen from the sizes",
        _tiles,
    ),
    Knob(
        "run",
        None,
        "pixels of a row that a group passes over before the next group comes; None: chosen from the sizes",
        _runs,
    ),
    Knob(
        "together",
        1,
        "units per round of the innermost loop",
        lambda problem, target: () if pairs(target, problem.source) else (2, 4),
    ),
    Knob("prefetch", "both", "what is asked for ahead", ("source", "result", "none")),
)
