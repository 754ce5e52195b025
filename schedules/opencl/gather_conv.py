"""The sparse convolution as a gather, on OpenCL.

A work-group has some groups of result channels, one after another, and neighbouring pixels: what it reads of a group's
weights and offsets serves all of its threads, and every load of activations is of neighbouring vectors. Work-groups on
the same pixels run side by side, so that all groups of result channels meet the same activations in the device's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.activation import activation_of
from mest_compile.operators.layers.depthwise import DepthwiseForward
from mest_compile.operators.layers.gather import GatherConv, GatherGrad, Pass
from mest_compile.schedules.opencl.staging import (
    ACCUMULATORS,
    PIECES,
    STAGED,
    THREADS,
    Stage,
    declare_row_sums,
    epilogue_bytes,
    largest_divisor,
    row_sums,
)
from mest_compile.schedules.opencl.sums import ENOUGH_GROUPS
from mest_compile.schedules.opencl.text import (
    DeviceText,
    full,
    image,
    plane_vectors,
    scalars,
    spelled,
    vector_type,
    vectors,
    whole_groups,
    zeros,
)

MOST_PIECES = 4  # groups of channels that a work-group computes one after another: they share where its pixels are


def section_channels(
    source: Image,
    source_step: tuple[int, int],
    kernel: tuple[int, int],
    unit: tuple[int, int],
    target: Target,
    caches: int,
) -> int:
    """All source channels are one section: a GPU hides the way to memory behind other work-groups, not in a cache."""
    return source.channels


def listed(problem: GatherConv | GatherGrad, source: Image) -> list[str]:
    """Arguments that list live channels. `sources` is not read: nothing is prefetched."""
    rows = [scalars("channels", problem.groups * problem.row_block, "int32"), scalars("live_groups", 1, "int32")]
    return [
        *(rows if problem.rows_live else []),
        *([scalars("sources", source.channels, "int32")] if problem.sources_live else []),
    ]


def epilogue_arguments(problem: GatherConv | DepthwiseForward) -> list[str]:
    if problem.epilogue is None:
        return []
    residual = problem.epilogue.residual
    return [scalars("scaling", 2 * problem.result.channels), *([image("residual", residual)] if residual else [])]


def finished(problem: GatherConv | DepthwiseForward, total: str, channel: str, residual: str) -> str:
    """What becomes of a vector of sums. residual: the place of its summand in channel 0, in vectors."""
    ends, vector = problem.epilogue, problem.result.vector
    if ends is None:
        return total
    shift, scale = (full(f"scaling[{row * problem.result.channels} + {channel}]", vector) for row in range(2))
    value = f"({total} * {scale} + {shift})"
    if ends.residual:
        value = f"({value} + residual[{channel} * {plane_vectors(ends.residual)} + {residual}])"
    return spelled(activation_of(ends.activation).formula, vector, x=value) if ends.activation else value


def pieces_of(groups: int, blocks: int) -> int:
    """Groups of channels of a work-group: several, where there are more work-groups than keep the device busy."""
    return largest_divisor(groups, max(1, min(MOST_PIECES, groups * blocks // (4 * ENOUGH_GROUPS))))


@contextmanager
def pieces_in_turn(text: DeviceText, turns: int) -> Iterator[None]:
    """A loop over a work-group's groups of channels: sets `part`, the number of one."""
    with text.nest(*([f"for piece in T.serial({turns})"] if turns > 1 else [])):
        text(f"part: T.let = block * {turns} + piece" if turns > 1 else "part: T.let = block")
        yield


KNOBS = (ACCUMULATORS, THREADS, STAGED, PIECES)


@schedule("compact.conv", device="opencl", knobs=KNOBS)
@schedule("gather.conv", device="opencl", knobs=KNOBS)
def gather_conv(
    problem: GatherConv,
    target: Target,
    accumulators: int,
    threads: int | None,
    staged: int | None,
    pieces: int | None,
) -> str:
    """A device kernel for each pass. A thread's results are of the rows of a unit, which share what they read, times
    pixels."""
    source, result, vector = problem.source, problem.result, problem.result.vector
    bias = [scalars("bias", result.channels)] if problem.bias else []
    statistics = []
    if problem.statistics:
        elems = result.slices * problem.passes[0].grid[0] * 2 * result.channels * vector
        statistics = [vectors("statistics", elems, vector)]
    text = DeviceText(
        scalars("pointers", problem.cells + 1, "int32"),
        "offsets_handle: T.handle",
        "values_handle: T.handle",
        *listed(problem, source),
        *bias,
        *epilogue_arguments(problem),
        image("source", source),
        image("result", result),
        *statistics,
    )
    text.symbolic("units", {"offsets": ("units", "int32")})
    text.symbolic("n_values", {"values": ("n_values", "float32")})
    for index, grid_pass in enumerate(problem.passes):
        if min(grid_pass.grid) > 0:
            _conv_pass(
                text, problem, index, grid_pass, target, accumulators, threads or target.limits.threads, staged, pieces
            )
    return str(text)


def _conv_pass(
    text: DeviceText,
    problem: GatherConv,
    index: int,
    grid_pass: Pass,
    target: Target,
    accumulators: int,
    threads: int,
    staged: int | None,
    pieces: int | None,
) -> None:
    source, result, vector = problem.source, problem.result, problem.result.vector
    high, wide = grid_pass.grid
    pixels = result.slices * high * wide
    rows = largest_divisor(problem.row_block, accumulators)
    parts = problem.row_block // rows
    size = whole_groups(pixels, threads)
    in_group = (
        problem.statistics and wide <= target.limits.most_threads
    )  # a group has whole rows of pixels, so that it can add them up
    if in_group:
        size = wide * max(size // wide, 1)
    each = max(min(accumulators // rows, pixels // size), 1)
    room = target.limits.local_bytes - (epilogue_bytes(size, rows * each, vector) if in_group else 0)
    units = Stage.pick(problem.source_block * rows, room) if staged is None else staged
    stage = Stage(
        units, size, problem.source_block, rows, problem.source_block * problem.row_block, problem.row_block, vector
    )
    blocks = -(-pixels // (size * each))
    turns = largest_divisor(problem.groups * parts, pieces) if pieces else pieces_of(problem.groups * parts, blocks)
    target_start = result.halo[0] + grid_pass.start[0], result.halo[1] + grid_pass.start[1]

    def place(layout: Image, start: tuple[int, int], step: tuple[int, int], q: str) -> str:
        """Distance in vectors from the first channel's start to grid pixel q, which is counted through all slices."""
        return (
            f"{q} // {high * wide} * {layout.channels * plane_vectors(layout)} + ({q} // {wide} % {high} * "
            f"{step[0]} + {start[0]})"
            f" * {layout.columns} + {q} % {wide} * {step[1]} + {start[1]}"
        )

    with text.groups(size, problem.groups * parts // turns, blocks):
        base = f"{'block_y' if blocks > 1 else '0'} * {size * each}"
        pixel = f"({base} + a * {size} + lane)"
        text.private("sums", rows * each, vector_type(vector))
        text.private("seen", 1, vector_type(vector))
        text.private("from_where", each, "int32")
        stage.declare(text)
        if in_group:
            declare_row_sums(text, size, rows * each, vector)
        with text.nest(
            f"for a in T.unroll({each})"
        ):  # a thread behind the last pixel reads what the last one reads, and writes nothing
            text(
                f"q: T.let = T.min({pixel}, {pixels - 1})",
                f"from_where[a] = {place(source, (0, 0), problem.source_step, 'q')}",
            )
        with pieces_in_turn(text, turns):
            channel = f"channels[part * {rows} + j]" if problem.rows_live else f"(part * {rows} + j)"
            written = (
                f"result[{channel} * {plane_vectors(result)} + {place(result, target_start, grid_pass.step, '{q}')}]"
            )
            start = full(f"bias[{channel}]", vector) if problem.bias else zeros(vector)
            with text.nest(f"for a in T.unroll({each})"):
                if problem.accumulate:
                    text(f"q: T.let = T.min({pixel}, {pixels - 1})")
                    start = written.format(q="q")
                with text.nest(f"for j in T.unroll({rows})"):
                    text(f"sums[j * {each} + a] = {start}")
            cell = f"({index * problem.sections * problem.groups} + section * {problem.groups} + part // {parts})"
            row = f"part % {parts} * {rows}"
            with text.nest(f"for section in T.serial({problem.sections})"):
                text(f"begin: T.let = pointers[{cell}]", f"end: T.let = pointers[{cell} + 1]")
                deep = "T.unroll" if problem.source_block <= 8 else "T.serial"
                with stage.each(text, "begin", "end", row), text.nest(f"for k in {deep}({problem.source_block})"):
                    stage.bring(text, "k", row)
                    with text.nest(f"for a in T.unroll({each})"):
                        text(f"seen[0] = source[way + k * {plane_vectors(source)} + from_where[a]]")
                        with text.nest(f"for j in T.unroll({rows})"):
                            text(
                                f"sums[j * {each} + a] = sums[j * {each} + a] + "
                                f"{full(stage.weight('j'), vector)} * seen[0]"
                            )
            alive = [f"part // {parts} < live_groups[0]"] if problem.rows_live else []
            with text.nest(
                f"for a in T.unroll({each})",
                f"if {' and '.join([f'{pixel} < {pixels}', *alive])}",
                f"for j in T.unroll({rows})",
            ):
                summand = ""
                if (ends := problem.epilogue) and ends.residual:
                    summand = place(ends.residual, ends.residual.halo[:2], (1, 1), pixel)
                text(f"{written.format(q=pixel)} = {finished(problem, f'sums[j * {each} + a]', channel, summand)}")
            if in_group:
                here, chunks = size // wide, result.slices * high

                def chunk(number: str, run: str) -> str:
                    """Row of pixels, counted through all slices."""
                    return f"({base}) // {wide} + {number} % {each} * {here} + {run}"

                def store(number: str, run: str, power: int, value: str) -> list[str]:
                    row = channel.replace("+ j", f"+ {number} // {each}")
                    return [f"statistics[(({chunk(number, run)}) * 2 + {power}) * {result.channels} + {row}] = {value}"]

                row_sums(
                    text,
                    size,
                    wide,
                    rows * each,
                    vector,
                    store,
                    lambda number, run: " and ".join([f"{chunk(number, run)} < {chunks}", *alive]),
                )
    if problem.statistics and not in_group:
        listed = problem.groups * problem.row_block if problem.rows_live else 0
        statistics_of_result(text, result, target, listed, f"live_groups[0] * {problem.row_block}")


def statistics_of_result(text: DeviceText, result: Image, target: Target, listed: int = 0, live: str = "") -> None:
    """The same by a device kernel of its own: a row has more pixels than a work-group may have threads.

    listed  channels in the list of those that are written, the first `live` of them; 0: all are written
    """
    rows, vector = listed or result.channels, result.vector
    with text.each(result.slices * rows * result.height, target.limits.threads):
        text.private("row_sums", 2, vector_type(vector))
        text(
            f"c: T.let = channels[n % {rows}]" if listed else f"c: T.let = n % {rows}",
            f"chunk: T.let = n // {rows}",
            f"row_start: T.let = (chunk // {result.height} * {result.channels} + c) * {plane_vectors(result)} + "
            f"(chunk % {result.height} + {result.halo[0]}) * {result.columns} + {result.halo[1]}",
            f"row_sums[0] = {zeros(vector)}",
            f"row_sums[1] = {zeros(vector)}",
        )
        with text.nest(*([f"if n % {rows} < {live}"] if listed else [])):
            with text.nest(f"for w in T.serial({result.width})"):
                text(
                    "row_sums[0] = row_sums[0] + result[row_start + w]",
                    "row_sums[1] = row_sums[1] + result[row_start + w] * result[row_start + w]",
                )
            text(*(f"statistics[(chunk * 2 + {s}) * {result.channels} + c] = row_sums[{s}]" for s in range(2)))
