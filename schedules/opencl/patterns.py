"""Pattern convolutions on OpenCL. A thread has a run of pixels one below the other, and its neighbours stand beside it:
what two taps of a column read for two pixels is loaded once, and every load of the work-group is of neighbouring
vectors. (A run along the row, where half of the taps are neighbours too, would spread each load over as many cache
lines as it spares loads.)
"""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.layers.pattern_groups import GroupedConv, GroupedGrad, Shape
from mest_compile.records.knob import Knob
from mest_compile.schedules.opencl.gather_conv import (
    epilogue_arguments,
    finished,
    pieces_in_turn,
    pieces_of,
    statistics_of_result,
)
from mest_compile.schedules.opencl.gather_grad import SPLITS, join_splits, splits_of, stored
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
from mest_compile.schedules.opencl.sums import declare_totals, totals
from mest_compile.schedules.opencl.text import (
    DeviceText,
    full,
    image,
    plane_vectors,
    scalars,
    vector_type,
    vectors,
    whole_groups,
    zeros,
)


def reads(shape: Shape, run: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """What a run of pixels reads: (row, column, [(tap, pixel of the run) that use it]), distances from the first tap of
    the first pixel."""
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for pixel in range(run):
        for tap, (y, x) in enumerate(shape):
            places.setdefault((pixel + y, x), []).append((tap, pixel))
    return [(y, x, places[y, x]) for y, x in sorted(places, key=lambda place: (place[1], place[0]))]


RUN = Knob("run", 4, "most pixels of a thread's run", (2, 8))


@schedule("pattern_groups.conv", device="opencl", knobs=(ACCUMULATORS, RUN, THREADS, STAGED, PIECES))
def pattern_conv(
    problem: GroupedConv,
    target: Target,
    accumulators: int,
    run: int,
    threads: int | None,
    staged: int | None,
    pieces: int | None,
) -> str:
    gather = problem.gather
    source, result, vector = gather.source, gather.result, gather.result.vector
    (grid_pass,) = gather.passes
    high, wide = grid_pass.grid
    run = largest_divisor(high, min(run, accumulators))
    runs = result.slices * (high // run) * wide
    size = whole_groups(runs, threads or target.limits.threads)
    in_group = (
        gather.statistics and wide <= target.limits.most_threads
    )  # a group has whole rows of pixels, so that it can add them up
    if in_group:
        size = wide * max(size // wide, 1)
    each = max(min(accumulators // run, runs // size), 1)
    room = target.limits.local_bytes - (epilogue_bytes(size, run * each, vector) if in_group else 0)
    units = Stage.pick(problem.taps, room) if staged is None else staged
    stage = Stage(units, size, 1, problem.taps, problem.taps, problem.taps, vector)
    blocks = -(-runs // (size * each))
    turns = largest_divisor(gather.groups, pieces) if pieces else pieces_of(gather.groups, blocks)
    statistics = vectors("statistics", result.slices * high * 2 * result.channels * vector, vector)
    text = DeviceText(
        scalars("pointers", problem.runs + 1, "int32"),
        "offsets_handle: T.handle",
        "values_handle: T.handle",
        *([scalars("bias", result.channels)] if gather.bias else []),
        *epilogue_arguments(gather),
        image("source", source),
        image("result", result),
        *([statistics] if gather.statistics else []),
    )
    text.symbolic("units", {"offsets": ("units", "int32")})
    text.symbolic("n_values", {"values": ("n_values", "float32")})

    def place(layout: Image, start: tuple[int, int], q: str) -> str:
        """Distance in vectors from the first channel's start to the first pixel of run q, which is counted through all
        slices."""
        return (
            f"{q} // {high // run * wide} * {layout.channels * plane_vectors(layout)}"
            f" + ({q} // {wide} % {high // run} * {run} + {start[0]}) * {layout.columns} + {q} % {wide} + {start[1]}"
        )

    def written(q: str) -> str:
        return (
            f"result[part * {plane_vectors(result)} + "
            f"{place(result, (result.halo[0] + grid_pass.start[0], result.halo[1] + grid_pass.start[1]), q)} + p "
            f"* {result.columns}]"
        )

    with text.groups(size, gather.groups // turns, blocks):
        base = f"{'block_y' if blocks > 1 else '0'} * {size * each}"
        start_of = f"({base} + a * {size} + lane)"
        text.private("sums", run * each, vector_type(vector))
        text.private("met", 1, vector_type(vector))
        text.private("from_where", each, "int32")
        text.private("edges", len(problem.shapes) + 1, "int32")
        stage.declare(text)
        if in_group:
            declare_row_sums(text, size, run * each, vector)
        with text.nest(
            f"for a in T.unroll({each})"
        ):  # a thread behind the last run reads what the last one reads, and writes nothing
            text(f"q: T.let = T.min({start_of}, {runs - 1})", f"from_where[a] = {place(source, (0, 0), 'q')}")
        with pieces_in_turn(text, turns):
            with text.nest(f"for a in T.unroll({each})"):
                start = full("bias[part]", vector) if gather.bias else zeros(vector)
                if gather.accumulate:
                    text(f"q: T.let = T.min({start_of}, {runs - 1})")
                    start = written("q")
                with text.nest(f"for p in T.unroll({run})"):
                    text(f"sums[p * {each} + a] = {start}")
            with text.nest(f"for section in T.serial({gather.sections})"):
                with text.nest(f"for t in T.unroll({len(problem.shapes) + 1})"):
                    text(f"edges[t] = pointers[(section * {gather.groups} + part) * {len(problem.shapes)} + t]")
                with stage.chunks(text, "edges[0]", f"edges[{len(problem.shapes)}]", "0") as (first, many):
                    for number, shape in enumerate(problem.shapes):
                        low, end = f"edges[{number}]", f"edges[{number + 1}]"
                        if units:
                            low, end = f"T.max({low} - {first}, 0)", f"T.min({end} - {first}, {many})"
                        with stage.units_between(text, low, end):
                            stage.bring(text, "0", "0")
                            for a in range(each):
                                for y, x, uses in reads(shape, run):
                                    text(f"met[0] = source[way + from_where[{a}] + {y * source.columns + x}]")
                                    for tap, pixel in uses:
                                        total = f"sums[{pixel * each + a}]"
                                        text(f"{total} = {total} + {full(stage.weight(str(tap)), vector)} * met[0]")
            with text.nest(f"for a in T.unroll({each})", f"if {start_of} < {runs}", f"for p in T.unroll({run})"):
                summand = ""
                if gather.epilogue and (other := gather.epilogue.residual):
                    summand = f"{place(other, other.halo[:2], start_of)} + p * {other.columns}"
                text(f"{written(start_of)} = {finished(gather, f'sums[p * {each} + a]', 'part', summand)}")
            if in_group:
                here, chunks = size // wide, result.slices * (high // run)

                def chunk(number: str, part: str) -> str:
                    """Row of runs, counted through all slices."""
                    return f"(({base}) // {wide} + {number} % {each} * {here} + {part})"

                def store(number: str, part: str, power: int, value: str) -> list[str]:
                    row = f"{chunk(number, part)} * {run} + {number} // {each}"
                    return [f"statistics[(({row}) * 2 + {power}) * {result.channels} + part] = {value}"]

                row_sums(
                    text,
                    size,
                    wide,
                    run * each,
                    vector,
                    store,
                    lambda number, part: f"{chunk(number, part)} < {chunks}",
                )
    if gather.statistics and not in_group:
        statistics_of_result(text, gather.result, target)
    return str(text)


@schedule("pattern_groups.grad", device="opencl", knobs=(ACCUMULATORS, RUN, THREADS, SPLITS))
def pattern_grad(
    problem: GroupedGrad,
    target: Target,
    accumulators: int,
    run: int,
    threads: int | None,
    splits: int | None,
) -> str:
    """As "gather.grad", a run of pixels in the place of a pixel; units that pass together are of one shape."""
    gather = problem.gather
    source, delta, vector, taps = gather.source, gather.delta, gather.delta.vector, problem.taps
    together = max(accumulators // taps, 1)
    run = largest_divisor(delta.height, run)
    count = together * taps
    runs_high = delta.height // run
    places = delta.slices * runs_high * delta.width
    size = whole_groups(places, threads or target.limits.threads)
    splits = splits_of(gather.cells, places, size) if splits is None else min(splits, places)
    share = -(-places // splits)
    text = DeviceText(
        scalars("pointers", problem.runs + 1, "int32"),
        "offsets_handle: T.handle",
        image("source", source),
        image("delta", delta),
        "gradients_handle: T.handle",
    )
    text.symbolic("units", {"offsets": ("units", "int32"), "gradients": (f"units * {taps}", "float32")})
    if splits > 1:
        text.scratch("split_sums", splits * taps, "units")
    split = "block_y" if splits > 1 else "0"
    goal = f"split_sums[{split} * units * {taps} + {{}}]" if splits > 1 else "gradients[{}]"
    with text.groups(size, gather.cells, splits):
        for name, elems in ("sums", count), ("seen", run), ("met", 1):
            text.private(name, elems, vector_type(vector))
        text.private("from_where", together, "int32")
        declare_totals(text, count, size)
        for number, shape in enumerate(problem.shapes):
            begin, end = f"begin_{number}", f"end_{number}"
            text(
                *(
                    f"{name}: T.let = pointers[block * {len(problem.shapes)} + {number + step}]"
                    for step, name in enumerate((begin, end))
                )
            )
            with text.nest(f"for several in T.serial(({end} - {begin} + {together - 1}) // {together})"):
                text(f"first: T.let = {begin} + several * {together}")
                with text.nest(f"for u in T.unroll({together})"):
                    text(f"from_where[u] = offsets[T.min(first + u, {end} - 1)] // {vector}")
                with text.nest(f"for e in T.unroll({count})"):
                    text(f"sums[e] = {zeros(vector)}")
                with text.nest(f"for turn in T.serial({-(-share // size)})"):
                    text(f"inside: T.let = turn * {size} + lane", f"place: T.let = {split} * {share} + inside")
                    with text.nest(f"if inside < {share} and place < {places}"):
                        text(
                            f"s: T.let = place // {runs_high * delta.width}",
                            f"h: T.let = place // {delta.width} % {runs_high} * {run}",
                            f"w: T.let = place % {delta.width}",
                            f"way: T.let = s * {source.channels * plane_vectors(source)} + h * {source.columns} + w",
                        )
                        with text.nest(f"for p in T.unroll({run})"):
                            text(
                                f"seen[p] = delta[(s * {delta.channels} + block % {gather.groups}) * "
                                f"{plane_vectors(delta)}"
                                f" + (h + p + {delta.halo[0]}) * {delta.columns} + w + {delta.halo[1]}]"
                            )
                        for u in range(together):
                            for y, x, uses in reads(shape, run):
                                text(f"met[0] = source[from_where[{u}] + way + {y * source.columns + x}]")
                                for tap, pixel in uses:
                                    text(f"sums[{u * taps + tap}] = sums[{u * taps + tap}] + seen[{pixel}] * met[0]")
                _store_totals(text, count, size, vector, taps, goal, end, gather.adds and splits == 1)
    if splits > 1:
        join_splits(text, splits, taps, target, gather.adds)
    return str(text)


def _store_totals(
    text: DeviceText, count: int, size: int, vector: int, taps: int, goal: str, end: str, adds: bool
) -> None:
    """Totals of the units from `first` on, up to `end`. adds: to what is there."""
    totals(
        text,
        count,
        size,
        vector,
        lambda e, value: [stored(goal.format(f"first * {taps} + {e}"), value, adds)],
        lambda e: f"first + {e} // {taps} < {end}",
    )
