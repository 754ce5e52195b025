"""The weight gradient of a sparse convolution, on a CPU: dot products of delta and source for live units only."""

from __future__ import annotations

from mest_compile.hardware import Target
from mest_compile.operators.gather import GatherGrad
from mest_compile.registry import schedule
from mest_compile.schedules.cpu_gather_conv import TAPS, divisors, indent, largest_divisor, nest, prefetch
from mest_compile.spec import FLOAT_BYTES

UNROLLED_COLUMNS = 8


def _batches(most: int) -> list[int]:
    """How many units pass together: as many as have accumulators, then halves for what remains, down to one."""
    sizes = [most]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def pick_strip(problem: GatherGrad, accumulators: int, target: Target) -> tuple[int, int]:
    """(rows, columns) of result pixels that pass over all units before the next strip.

    What a section's channels have under a strip is to stay in the first-level cache while all groups read it; where several rows of
    a unit share what they read, it may be that many times as large.
    """
    wide = largest_divisor(problem.delta.width, UNROLLED_COLUMNS)
    channels = min(problem.section_channels, problem.source.channels)

    def strip_bytes(high: int) -> int:
        rows, columns = ((size - 1) * step + 3 for size, step in zip((high, wide), problem.source_step, strict=True))
        return channels * rows * columns * problem.source.vector * FLOAT_BYTES

    fits = [high for high in divisors(problem.delta.height) if strip_bytes(high) <= target.l1_bytes * 4 // 3 * accumulators]
    return max(fits, default=1), wide


@schedule("gather.grad", device="cpu", knobs={"strip": (None,)})
def gather_grad(problem: GatherGrad, target: Target, strip: tuple[int, int] | None = None) -> str:
    """Several units of a group at a time, so that they share what they read of delta; a thread owns whole groups.

    Strip by strip, each unit's sums are kept as a vector in `scratch`; they are added up across lanes at the end.

    strip  (rows, columns) of result pixels, divisors of delta's size; None: chosen from the sizes
    """
    source, delta, vector = problem.source, problem.delta, problem.delta.vector
    most = max(target.registers - 4, 1)
    rows = largest_divisor(problem.row_block, most)
    depth = largest_divisor(problem.source_block, most // rows)
    parts, layers = problem.row_block // rows, problem.source_block // depth
    each = rows * depth
    sizes = _batches(most // each if each > 1 else max(target.registers // 2, 1))
    block = problem.source_block * problem.row_block
    high, wide = strip or pick_strip(problem, rows, target)
    down, across = delta.height // high, delta.width // wide
    chunks = min(target.cores, problem.groups)
    share = -(-problem.groups // chunks)

    cell = f"(section * {problem.groups} + chunk * {share} + group)"
    groups = f"T.min({share}, {problem.groups} - chunk * {share})"
    count = f"(pointers[{cell} + 1] - pointers[{cell}])"

    def together(units: int, first: str) -> list[str]:
        """Adds one strip's share of `units` units from `first` on."""
        total = f"sums[((u * {depth} + k) * {rows} + j) * {vector} + i]"
        weight = f"(({first} + u) * {block} + (layer * {depth} + k) * {problem.row_block} + part * {rows} + j)"
        read = (f"source[offsets[{first} + u] + (layer * {depth} + k) * {source.channel_elems} + z * {source.slice_elems}"
                f" + (y * {high} + a) * {problem.source_step[0] * source.row_elems}"
                f" + (x * {wide} + c) * {problem.source_step[1] * vector} + i]")
        against = (f"delta[((chunk * {share} + group) * {problem.row_block} + part * {rows} + j) * {delta.channel_elems} + {delta.origin}"
                   f" + z * {delta.slice_elems} + (y * {high} + a) * {delta.row_elems} + (x * {wide} + c) * {vector} + i]")
        loops = [("u", units), ("k", depth), ("j", rows)]
        return [f"sums = T.alloc_buffer(({units * each * vector},), 'float32')",
                *nest(loops, vector, f"{total} = scratch[{weight} * {vector} + i]"),
                f"for a in T.serial({high}):",
                *indent(1, nest([("c", wide), *loops], vector, f"{total} = {total} + {against} * {read}")),
                *nest(loops, vector, f"scratch[{weight} * {vector} + i] = {total}")]

    strips, left = [], count
    for units in sizes:
        strips += [f"for several in T.serial({left} // {units}):",
                   *indent(1, together(units, f"(pointers[{cell} + 1] - {left} + several * {units})"))]
        left = f"({left} % {units})"
    weights = f"for weight in T.serial({count} * {block}):"
    here = f"(pointers[{cell}] * {block} + weight)"
    lanes = " + ".join(f"scratch[{here} * {vector} + {lane}]" for lane in range(vector))
    pieces = delta.slices * problem.sections * down * across
    steps = {"z": (problem.sections * down * across, delta.slices), "section": (down * across, problem.sections),
             "y": (across, down), "x": (1, across)}
    where = [f"{name}: T.let = piece // {size} % {count_of}" for name, (size, count_of) in steps.items()]
    then = [f"next_{name}: T.let = (piece + 1) // {size} % {count_of}" for name, (size, count_of) in steps.items()]
    tall, broad = high * problem.source_step[0], wide * problem.source_step[1]
    starts = [
        f"source_ahead: T.let = next_z * {source.slice_elems} + next_section * {problem.section_channels * source.channel_elems}"
        f" + next_y * {tall * source.row_elems} + next_x * {broad * vector}",
        f"delta_ahead: T.let = next_z * {delta.slice_elems} + chunk * {share * problem.row_block * delta.channel_elems} + {delta.origin}"
        f" + next_y * {high * delta.row_elems} + next_x * {wide * vector}"]
    channels = min(problem.section_channels, source.channels)
    ahead = [*prefetch("source", source, channels, "source_ahead", (tall + TAPS - 1, 1), broad, "group", share),
             *prefetch("delta", delta, share * problem.row_block, "delta_ahead", (high, 1), wide, "group", share)]
    lines = [
        f"for chunk in T.parallel({chunks}):",
        *indent(1, [
            f"for section, group in T.grid({problem.sections}, {groups}):", f"    {weights}", f"        for i in T.vectorized({vector}):",
            f"            scratch[{here} * {vector} + i] = T.float32(0)",
            f"for piece in T.serial({pieces}):", *indent(1, [
                *where, *then, *starts, f"for group in T.serial({groups}):", *indent(1, ahead),
                f"    for layer, part in T.grid({layers}, {parts}):", *indent(2, strips)]),
            f"for section, group in T.grid({problem.sections}, {groups}):", f"    {weights}", f"        gradients[{here}] = {lanes}"])]
    return "\n".join([
        "@T.prim_func",
        f"def kernel(pointers: T.Buffer(({problem.sections * problem.groups + 1},), 'int32'), offsets_handle: T.handle, "
        f"source: T.Buffer(({source.elems},), 'float32'), delta: T.Buffer(({delta.elems},), 'float32'), gradients_handle: T.handle):",
        *indent(1, [
            "T.func_attr({'tirx.noalias': True})",
            "units = T.int32()",
            "offsets = T.match_buffer(offsets_handle, (units,), 'int32')",
            f"gradients = T.match_buffer(gradients_handle, (units * {block},), 'float32')",
            f"scratch = T.alloc_buffer((units * {block * vector},), 'float32')", *lines])])
