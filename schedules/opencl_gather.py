"""The sparse convolution and its weight gradient as gathers, on OpenCL.

A work-group has one group of result channels, so all its threads read the same weights and offsets: one load that the hardware
broadcasts. Its threads stand on neighbouring pixels, so every load of activations is of neighbouring vectors.
"""

from __future__ import annotations

from mest_compile.hardware import Target
from mest_compile.operators.gather import GatherConv, GatherGrad, Pass
from mest_compile.registry import schedule
from mest_compile.schedules.opencl_sums import ENOUGH_GROUPS, fold, tree
from mest_compile.schedules.opencl_text import Text, full, image, plane_vectors, scalars, vector_type, vectors, whole_groups, zeros
from mest_compile.spec import Image

MOST_SPLITS = 16  # parts of the pixels that a weight's gradient is summed over apart: scratch memory is as many times the gradient


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor that is at most `most`."""
    return max(candidate for candidate in range(1, most + 1) if number % candidate == 0)


def section_channels(source: Image, source_step: tuple[int, int], kernel: tuple[int, int], source_block: int, target: Target) -> int:
    """All source channels are one section: a GPU hides the way to memory behind other work-groups, not in a cache."""
    return source.channels


@schedule("gather.conv", device="opencl", knobs={"accumulators": (8, 4, 16), "threads": (None, 32, 128)}, section_channels=section_channels)
def gather_conv(problem: GatherConv, target: Target, accumulators: int = 8, threads: int | None = None) -> str:
    """A device kernel for each pass.

    accumulators  vectors of results that a thread keeps in registers: rows of a unit, which share what they read, times pixels
    threads       of a work-group; None: what the target prefers
    """
    source, result, vector = problem.source, problem.result, problem.result.vector
    bias = [scalars("bias", result.channels)] if problem.bias else []
    statistics = []
    if problem.statistics:
        elems = result.slices * problem.passes[0].grid[0] * 2 * result.channels * vector
        statistics = [vectors("statistics", elems, vector)]
    text = Text(scalars("pointers", problem.cells + 1, "int32"), "offsets_handle: T.handle", "values_handle: T.handle", *bias,
                image("source", source), image("result", result), *statistics)
    block = problem.source_block * problem.row_block
    text.symbolic("units", {"offsets": ("units", "int32"), "values": (f"units * {block}", "float32")})
    for index, grid_pass in enumerate(problem.passes):
        if min(grid_pass.grid) > 0:
            _conv_pass(text, problem, index, grid_pass, target, accumulators, threads or target.limits.threads)
    return str(text)


def _conv_pass(text: Text, problem: GatherConv, index: int, grid_pass: Pass, target: Target, accumulators: int, threads: int) -> None:
    source, result, vector = problem.source, problem.result, problem.result.vector
    high, wide = grid_pass.grid
    pixels = result.slices * high * wide
    rows = largest_divisor(problem.row_block, accumulators)
    parts = problem.row_block // rows
    size = whole_groups(pixels, threads)
    in_group = problem.statistics and wide <= target.limits.most_threads  # a group has whole rows of pixels, so that it can add them up
    if in_group:
        size = wide * max(size // wide, 1)
    each = max(min(accumulators // rows, pixels // size), 1)
    block = problem.source_block * problem.row_block

    def place(layout: Image, start: tuple[int, int], step: tuple[int, int], q: str) -> str:
        """Distance in vectors from the first channel's start to grid pixel q, which is counted through all slices."""
        return (f"{q} // {high * wide} * {layout.channels * plane_vectors(layout)} + ({q} // {wide} % {high} * {step[0]} + {start[0]})"
                f" * {layout.columns} + {q} % {wide} * {step[1]} + {start[1]}")

    target_start = result.halo[0] + grid_pass.start[0], result.halo[1] + grid_pass.start[1]
    group_count = problem.groups * parts
    with text.groups(size, -(-pixels // (size * each)), group_count):
        part = "block_y" if group_count > 1 else "0"
        for name in "sums", "seen":
            text.private(name, rows * each if name == "sums" else each, vector_type(vector))
        text.private("from_where", each, "int32")
        if in_group:
            text.shared(2, size, vector_type(vector))

        def pixel(a: str) -> str:
            return f"(block * {size * each} + {a} * {size} + lane)"

        def written(j: str, a: str) -> str:
            return (f"result[({part} * {rows} + {j}) * {plane_vectors(result)} + "
                    f"{place(result, target_start, grid_pass.step, pixel(a))}]")

        with text.nest(f"for a in T.unroll({each})"):  # a thread behind the last pixel reads what the last one reads, and writes nothing
            text(f"q: T.let = T.min({pixel('a')}, {pixels - 1})",
                 f"from_where[a] = {place(source, (0, 0), problem.source_step, 'q')}")
        start = full(f"bias[{part} * {rows} + j]", vector) if problem.bias else zeros(vector)
        with text.nest(f"for j in T.unroll({rows})", f"for a in T.unroll({each})"):
            text(f"sums[j * {each} + a] = {start}")
        cell = f"({index * problem.sections * problem.groups} + section * {problem.groups} + {part} // {parts})"
        with text.nest(f"for section in T.serial({problem.sections})"):
            text(f"begin: T.let = pointers[{cell}]", f"end: T.let = pointers[{cell} + 1]")
            deep = "T.unroll" if problem.source_block <= 8 else "T.serial"
            with text.nest("for turn in T.serial(end - begin)", f"for k in {deep}({problem.source_block})"):
                text("unit: T.let = begin + turn",
                     f"way: T.let = offsets[unit] // {vector} + k * {plane_vectors(source)}")
                with text.nest(f"for a in T.unroll({each})"):
                    text("seen[a] = source[way + from_where[a]]")
                with text.nest(f"for j in T.unroll({rows})"):
                    text(f"weight: T.let = values[unit * {block} + k * {problem.row_block} + {part} % {parts} * {rows} + j]")
                    with text.nest(f"for a in T.unroll({each})"):
                        text(f"sums[j * {each} + a] = sums[j * {each} + a] + {full('weight', vector)} * seen[a]")
        with text.nest(f"for a in T.unroll({each})", f"if {pixel('a')} < {pixels}", f"for j in T.unroll({rows})"):
            old = f"{written('j', 'a')} + " if problem.accumulate else ""
            text(f"{written('j', 'a')} = {old}sums[j * {each} + a]")
        if in_group:
            _row_sums(text, problem, size, each, rows, part, wide, result.slices * high)
    if problem.statistics and not in_group:
        _statistics_of_result(text, problem, high, wide, target)


def _row_sums(text: Text, problem: GatherConv, size: int, each: int, rows: int, part: str, wide: int, chunks: int) -> None:
    """Sums and sums of squares of every row of pixels in the group, one thread for each."""
    here = size // wide
    for a in range(each):
        chunk = f"block * {here * each} + {a * here} + lane"
        for j in range(rows):
            text.barrier()
            text(f"shared_0[lane] = sums[{j * each + a}]", f"shared_1[lane] = sums[{j * each + a}] * sums[{j * each + a}]")
            text.barrier()
            for s in range(2):
                with text.nest(f"if lane < {here} and {chunk} < {chunks}"):
                    text.private(f"row_sum_{s}", 1, vector_type(problem.result.vector))
                    text(f"row_sum_{s}[0] = {zeros(problem.result.vector)}")
                    with text.nest(f"for w in T.serial({wide})"):
                        text(f"row_sum_{s}[0] = row_sum_{s}[0] + shared_{s}[lane * {wide} + w]")
                    text(f"statistics[(({chunk}) * 2 + {s}) * {problem.result.channels} + {part} * {rows} + {j}] = row_sum_{s}[0]")


def _statistics_of_result(text: Text, problem: GatherConv, high: int, wide: int, target: Target) -> None:
    """The same by a device kernel of its own: a row has more pixels than a work-group may have threads."""
    result, vector = problem.result, problem.result.vector
    with text.each(result.slices * result.channels * high, target.limits.threads):
        text.private("row_sums", 2, vector_type(vector))
        text(f"c: T.let = n % {result.channels}", f"chunk: T.let = n // {result.channels}",
             f"row_start: T.let = (chunk // {high} * {result.channels} + c) * {plane_vectors(result)} + "
             f"(chunk % {high} + {result.halo[0]}) * {result.columns} + {result.halo[1]}",
             f"row_sums[0] = {zeros(vector)}", f"row_sums[1] = {zeros(vector)}")
        with text.nest(f"for w in T.serial({wide})"):
            text("row_sums[0] = row_sums[0] + result[row_start + w]",
                 "row_sums[1] = row_sums[1] + result[row_start + w] * result[row_start + w]")
        text(*(f"statistics[(chunk * 2 + {s}) * {result.channels} + c] = row_sums[{s}]" for s in range(2)))


@schedule("gather.grad", device="opencl", knobs={"accumulators": (8, 4, 16), "threads": (None, 32, 128)})
def gather_grad(problem: GatherGrad, target: Target, accumulators: int = 8, threads: int | None = None) -> str:
    """A work-group has the units of one cell and some of the pixels: a few units at a time share what they read of delta, and a tree in
    local memory adds up what its threads found. A second device kernel adds up the parts. Each sum's order follows from sizes alone.
    """
    source, delta, vector = problem.source, problem.delta, problem.delta.vector
    block = problem.source_block * problem.row_block
    rows = largest_divisor(problem.row_block, accumulators)
    depth = largest_divisor(problem.source_block, accumulators // rows)
    parts, layers = problem.row_block // rows, problem.source_block // depth
    together = max(accumulators // (rows * depth), 1)
    count = together * depth * rows
    pixels = delta.height * delta.width
    places = delta.slices * pixels
    size = whole_groups(places, threads or target.limits.threads)
    splits = max(1, min(MOST_SPLITS, -(-4 * ENOUGH_GROUPS // (problem.cells * parts * layers)), places // (4 * size)))
    share = -(-places // splits)
    text = Text(scalars("pointers", problem.cells + 1, "int32"), "offsets_handle: T.handle", image("source", source), image("delta", delta),
                "gradients_handle: T.handle")
    text.symbolic("units", {"offsets": ("units", "int32"), "gradients": (f"units * {block}", "float32")})
    if splits > 1:
        text.scratch("split_sums", splits * block, "units")

    with text.groups(size, problem.cells, parts * layers, splits):
        piece, split = ("block_y" if parts * layers > 1 else "0"), ("block_z" if splits > 1 else "0")
        row = f"(block % {problem.groups} * {problem.row_block} + {piece} % {parts} * {rows} + j)"
        for name, elems in ("sums", count), ("seen", rows):
            text.private(name, elems, vector_type(vector))
        text.private("from_where", together, "int32")
        text.shared(count, size, vector_type(vector))
        text("begin: T.let = pointers[block]", "end: T.let = pointers[block + 1]")
        with text.nest(f"for several in T.serial((end - begin + {together - 1}) // {together})"):
            text(f"first: T.let = begin + several * {together}")
            with text.nest(f"for u in T.unroll({together})"):
                text(f"from_where[u] = offsets[T.min(first + u, end - 1)] // {vector} + "
                     f"{piece} // {parts} * {depth * plane_vectors(source)}")
            with text.nest(f"for e in T.unroll({count})"):
                text(f"sums[e] = {zeros(vector)}")
            with text.nest(f"for turn in T.serial({-(-share // size)})"):
                text(f"inside: T.let = turn * {size} + lane", f"place: T.let = {split} * {share} + inside")
                with text.nest(f"if inside < {share} and place < {places}"):
                    text(f"s: T.let = place // {pixels}", f"h: T.let = place % {pixels} // {delta.width}",
                         f"w: T.let = place % {delta.width}",
                         f"way: T.let = s * {source.channels * plane_vectors(source)} + h * {problem.source_step[0] * source.columns}"
                         f" + w * {problem.source_step[1]}")
                    with text.nest(f"for j in T.unroll({rows})"):
                        text(f"seen[j] = delta[(s * {delta.channels} + {row}) * {plane_vectors(delta)} + (h + {delta.halo[0]})"
                             f" * {delta.columns} + w + {delta.halo[1]}]")
                    with text.nest(f"for u in T.unroll({together})", f"for k in T.unroll({depth})", f"for j in T.unroll({rows})"):
                        total = f"sums[(u * {depth} + k) * {rows} + j]"
                        text(f"{total} = {total} + seen[j] * source[from_where[u] + k * {plane_vectors(source)} + way]")
            text(*(f"shared_{e}[lane] = sums[{e}]" for e in range(count)))
            tree(text, count, size)
            for e in range(count):
                unit, inner = divmod(e, depth * rows)
                with text.nest(f"if lane == {e % size} and first + {unit} < end"):
                    total = fold(text, f"lanes_{e}", f"shared_{e}[0]", vector)
                    weight = (f"(first + {unit}) * {block} + ({piece} // {parts} * {depth} + {inner // rows}) * {problem.row_block}"
                              f" + {piece} % {parts} * {rows} + {inner % rows}")
                    text(f"split_sums[{split} * units * {block} + {weight}] = {total}" if splits > 1 else f"gradients[{weight}] = {total}")
            text.barrier()
    if splits > 1:
        with text.each_of(f"(units * {block})", ENOUGH_GROUPS, target.limits.threads):
            text.private("joined", 1)
            text("joined[0] = T.float32(0)")
            with text.nest(f"for k in T.serial({splits})"):
                text(f"joined[0] = joined[0] + split_sums[k * units * {block} + n]")
            text("gradients[n] = joined[0]")
    return str(text)
