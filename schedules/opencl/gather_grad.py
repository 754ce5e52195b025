"""The weight gradient of a sparse convolution on OpenCL: dot products over pixels and examples, for live units only."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.operators.layers.gather import GatherGrad
from mest_compile.records.knob import Knob
from mest_compile.schedules.opencl.gather_conv import listed
from mest_compile.schedules.opencl.staging import ACCUMULATORS, THREADS, largest_divisor
from mest_compile.schedules.opencl.sums import ENOUGH_GROUPS, declare_totals, totals
from mest_compile.schedules.opencl.text import (
    DeviceText,
    image,
    plane_vectors,
    scalars,
    vector_type,
    whole_groups,
    zeros,
)

# parts of the pixels that a weight's gradient is summed over apart: scratch memory is as many times the gradient
MOST_SPLITS = 16


SPLITS = Knob(
    "splits",
    None,
    "parts of the pixels, each summed by work-groups of its own; None: enough to keep the device busy",
    (1, 4),
)
KNOBS = (ACCUMULATORS, THREADS, SPLITS)


@schedule("compact.grad", device="opencl", knobs=KNOBS)
@schedule("gather.grad", device="opencl", knobs=KNOBS)
def gather_grad(problem: GatherGrad, target: Target, accumulators: int, threads: int | None, splits: int | None) -> str:
    """A work-group has the units of one cell and some of the pixels: a few units at a time share what they read of
    delta, and a tree in local memory adds up what its threads found. A second device kernel adds up the parts. Each
    sum's order follows from sizes alone.
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
    splits = splits_of(problem.cells * parts * layers, places, size) if splits is None else min(splits, places)
    share = -(-places // splits)
    text = DeviceText(
        scalars("pointers", problem.cells + 1, "int32"),
        "offsets_handle: T.handle",
        *listed(problem, source),
        image("source", source),
        image("delta", delta),
        "gradients_handle: T.handle",
    )
    text.symbolic("units", {"offsets": ("units", "int32"), "gradients": (f"units * {block}", "float32")})
    if splits > 1:
        text.scratch("split_sums", splits * block, "units")

    with text.groups(size, problem.cells, parts * layers, splits):
        piece, split = ("block_y" if parts * layers > 1 else "0"), ("block_z" if splits > 1 else "0")
        row = f"block % {problem.groups} * {problem.row_block} + {piece} % {parts} * {rows} + j"
        for name, elems in ("sums", count), ("seen", rows), ("met", 1):
            text.private(name, elems, vector_type(vector))
        text.private("from_where", together, "int32")
        text.private("row", rows, "int32")
        declare_totals(text, count, size)
        text("begin: T.let = pointers[block]", "end: T.let = pointers[block + 1]")
        with text.nest(f"for j in T.unroll({rows})"):
            text(f"row[j] = {f'channels[{row}]' if problem.rows_live else row}")
        with text.nest(f"for several in T.serial((end - begin + {together - 1}) // {together})"):
            text(f"first: T.let = begin + several * {together}")
            with text.nest(f"for u in T.unroll({together})"):
                text(
                    f"from_where[u] = offsets[T.min(first + u, end - 1)] // {vector} + "
                    f"{piece} // {parts} * {depth * plane_vectors(source)}"
                )
            with text.nest(f"for e in T.unroll({count})"):
                text(f"sums[e] = {zeros(vector)}")
            with text.nest(f"for turn in T.serial({-(-share // size)})"):
                text(f"inside: T.let = turn * {size} + lane", f"place: T.let = {split} * {share} + inside")
                with text.nest(f"if inside < {share} and place < {places}"):
                    text(
                        f"s: T.let = place // {pixels}",
                        f"h: T.let = place % {pixels} // {delta.width}",
                        f"w: T.let = place % {delta.width}",
                        f"way: T.let = s * {source.channels * plane_vectors(source)} + h * "
                        f"{problem.source_step[0] * source.columns}"
                        f" + w * {problem.source_step[1]}",
                    )
                    with text.nest(f"for j in T.unroll({rows})"):
                        text(
                            f"seen[j] = delta[(s * {delta.channels} + row[j]) * {plane_vectors(delta)} + (h + "
                            f"{delta.halo[0]})"
                            f" * {delta.columns} + w + {delta.halo[1]}]"
                        )
                    with text.nest(f"for u in T.unroll({together})", f"for k in T.unroll({depth})"):
                        text(f"met[0] = source[from_where[u] + k * {plane_vectors(source)} + way]")
                        with text.nest(f"for j in T.unroll({rows})"):
                            total = f"sums[(u * {depth} + k) * {rows} + j]"
                            text(f"{total} = {total} + seen[j] * met[0]")
            inner = depth * rows
            weight = (
                f"(first + {{e}} // {inner}) * {block} + ({piece} // {parts} * {depth} + {{e}} % {inner} // {rows})"
                f" * {problem.row_block} + {piece} % {parts} * {rows} + {{e}} % {rows}"
            )
            goal = f"split_sums[{split} * units * {block} + {weight}]" if splits > 1 else f"gradients[{weight}]"
            totals(
                text,
                count,
                size,
                vector,
                lambda e, value: [stored(goal.format(e=e), value, problem.adds and splits == 1)],
                lambda e: f"first + {e} // {inner} < end",
            )
    if splits > 1:
        join_splits(text, splits, block, target, problem.adds)
    return str(text)


def stored(goal: str, value: str, adds: bool) -> str:
    """The line that puts a value there, or adds it to what is there."""
    return f"{goal} = {goal} + {value}" if adds else f"{goal} = {value}"


def splits_of(groups: int, places: int, size: int) -> int:
    """Parts of the pixels: as many as give the device enough work-groups, while each thread of one has several
    pixels."""
    return max(1, min(MOST_SPLITS, -(-4 * ENOUGH_GROUPS // groups), places // (4 * size)))


def join_splits(text: DeviceText, splits: int, block: int, target: Target, adds: bool) -> None:
    """The second pass: adds up what `split_sums` holds of every weight. adds: to what is in `gradients`."""
    with text.each_of(f"(units * {block})", ENOUGH_GROUPS, target.limits.threads):
        text.private("joined", 1)
        text("joined[0] = T.float32(0)")
        with text.nest(f"for k in T.serial({splits})"):
            text(f"joined[0] = joined[0] + split_sums[k * units * {block} + n]")
        text(stored("gradients[n]", "joined[0]", adds))
