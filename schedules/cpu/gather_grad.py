"""The weight gradient of a sparse convolution, on a CPU: dot products of delta and source for live units only."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.layers.gather import GatherGrad
from mest_compile.records.knob import Knob
from mest_compile.schedules.cpu.pairs import SUMS, dot, pairs, run_of
from mest_compile.schedules.cpu.rows import widened
from mest_compile.schedules.cpu.strips import UNROLLED_COLUMNS, across_of, is_at_once, pick_strip
from mest_compile.schedules.cpu.tiles import (
    LEAST_TILE,
    MOST_TILE,
    ONCE,
    TAPS,
    divisors,
    is_neon,
    largest_divisor,
    listed,
    prefetch_run,
    recorded,
    vectors,
    widen,
    widens_once,
)

BURST = 3  # runs of a row that are prefetched at once without holding up the loads behind them


def _batches(most: int) -> list[int]:
    """How many units pass together: as many as have accumulators, then halves for what remains, down to one."""
    sizes = [most]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def halves(lanes: int) -> list[int]:
    """Steps of a sum over a power of two of lanes: each adds its upper half to its lower one."""
    return [lanes >> step for step in range(1, lanes.bit_length())]


def keeps_sums(problem: GatherGrad, target: Target) -> bool:
    """Whether the kernel keeps vectors of sums of all units in memory."""
    return not is_at_once(problem, pick_strip(problem, prod(_shared(problem, target)) > 1, target), target)


def _strips(problem: GatherGrad, target: Target) -> list[tuple[int, int]]:
    delta, across = problem.delta, across_of(problem)
    return [
        (high, wide)
        for high in divisors(delta.height)
        for wide in divisors(across)
        if wide in (across, 4, 8, 16) and wide <= 2 * UNROLLED_COLUMNS and high <= 16
    ]


def _several(problem: GatherGrad, target: Target) -> list[int]:
    each = prod(_shared(problem, target))
    return [units for units in range(1, MOST_TILE // each + 1) if units * each >= LEAST_TILE]


def _of_pixels(knob: Knob) -> Knob:
    """The knob without a choice for images of one pixel, whose kernel has no use for it."""

    def others(problem: GatherGrad, target: Target) -> tuple[Any, ...]:
        return knob.values(problem, target)[1:] if problem.delta.height * problem.delta.width > 1 else ()

    return replace(knob, others=others)


KNOBS = (
    _of_pixels(ONCE),
    _of_pixels(
        Knob(
            "strip", None, "(rows, columns) of result pixels, divisors of delta's; None: chosen from the sizes", _strips
        )
    ),
    Knob("several", None, "units that pass together; None: chosen from the registers", _several),
    _of_pixels(Knob("prefetch", True, "whether the next strip is asked for ahead", (False,))),
)


def _shared(problem: GatherGrad, target: Target) -> tuple[int, int]:
    """(rows, reads) of a unit that pass together."""
    most = SUMS if pairs(target, problem.source, problem.delta) else max(target.registers - 4, 1)
    rows = largest_divisor(problem.row_block, most)
    return rows, largest_divisor(problem.unit[0], most // rows)


@schedule("pattern.grad", device="cpu", knobs=KNOBS)
@schedule("compact.grad", device="cpu", knobs=KNOBS)
@schedule("gather.grad", device="cpu", knobs=KNOBS)
def gather_grad(
    problem: GatherGrad,
    target: Target,
    strip: tuple[int, int] | None,
    several: int | None,
    prefetch: bool,
    once: bool | None,
) -> str:
    """Several units of a group at a time, so that they share what they read of delta.

    Strip by strip, each unit's sums are kept as a vector in `scratch`; they are added up across lanes at the end. A
    thread owns strips, and sums of its own: were it groups, each thread would read all of source. What a thread owns
    follows from the target's cores, so results are the same on any number of threads.
    """
    source, delta, vector = problem.source, problem.delta, problem.delta.floats
    paired = pairs(target, source, delta)
    lanes = vector // 2 if paired else vector  # of a vector of sums
    most = max(target.registers - 4, 1)
    rows, depth = _shared(problem, target)
    reads, distance = problem.unit
    parts, layers = problem.row_block // rows, reads // depth
    each = rows * depth
    # A unit of neighbouring pixels also holds those that its next pixel reads again.
    most_units = max(target.registers // (2 * each), 1) if each == 1 or problem.taps > 1 else most // each
    if is_neon(vector, target) and problem.taps == 1:
        # LLVM loads neighbouring vectors in pairs on ARM: beside a unit's sums, two of what it reads and two of each
        # row are in registers.
        # More than eight units gain nothing; sixteen spill (64x16x16 in docs/arm.md's model: 39% of the multiply-add
        # floor, eight 59%).
        most_units = max(min((target.registers - 2 * rows) // (each + 2 * depth), 8), 1)
    if paired:
        most_units = max(SUMS // each, 1)
    most_units = several or most_units
    sizes = _batches(most_units)
    block = reads * problem.row_block
    high, wide = strip or pick_strip(problem, each > 1, target)
    columns = across_of(problem)
    down, across = delta.height // high, columns // wide
    apart = source.apart(problem.source_step[1], delta.abreast)
    strips_each = delta.slices * down * across  # of a section
    chunks = min(target.cores, strips_each)
    share = -(-strips_each // chunks)

    at_once = is_at_once(problem, (high, wide), target)
    examples = [f"for z in T.serial({delta.slices})"] if at_once and delta.slices > 1 else []
    prefetch = prefetch and not at_once

    if delta.height * delta.width == 1:
        return _of_one_pixel(problem, rows, depth, sizes)
    cell = f"(section * {problem.groups} + group)"
    count = f"(pointers[{cell} + 1] - pointers[{cell}])"

    text = _begun(problem)
    section_elems, copied = problem.section_channels * source.channel_elems, widens_once(source, target, once)

    def together(units: int, first: str) -> None:
        """Adds one strip's share of `units` units from `first` on."""
        total = f"sums_%u[(k * {rows} + j) * {lanes} + i]"
        weight = (
            f"((chunk * units + {first} + %u) * {block} + (layer * {depth} + k) * {problem.row_block} + "
            f"part * {rows} + j)"
        )
        place = (
            f"(layer * {depth} + k) * {distance} + %s + (y * {high} + a) * {problem.source_step[0] * source.row_elems}"
            f" + (x * {wide} + c) * {apart} + i"
        )
        where = f"offsets[{first} + %u] + " + place.replace(
            "%s", f"section * -{section_elems}" if copied else f"z * {source.slice_elems}"
        )
        read = f"wide[{where}]" if copied else widened(source, f"source[{where}]")
        if columns * delta.abreast > delta.width:  # what is beyond the row is multiplied by 0, and may be infinite
            inside = f"(x * {wide} + c) * {vector} + i < {delta.width * delta.vector}"
            read = f"T.Select({inside}, {read}, T.float32(0))"
        row = f"(group * {problem.row_block} + part * {rows} + j)"
        there = (
            f"{f'channels[{row}]' if problem.rows_live else row} * {delta.channel_elems} + {delta.origin}"
            f" + z * {delta.slice_elems} + (y * {high} + a) * {delta.row_elems} + (x * {wide} + c) * {vector} + i"
        )
        against = widened(delta, f"delta[{there}]")
        loops = [("k", depth), ("j", rows)]

        def per_unit(loops: list[tuple[str, int]], body: str) -> None:
            """What a row reads of delta is used by all units at once. Each has an array of its own: larger ones are not
            in registers."""
            vectors(text, loops, lanes, *(body.replace("%u", str(unit)) for unit in range(units)))

        def add() -> None:
            if not paired:
                per_unit([("c", wide), *loops], f"{total} = {total} + {against} * {read}")
                return
            at = f"source[{run_of(where, vector)}]"
            with text.nest(*(f"for {name} in T.unroll({extent})" for name, extent in [("c", wide), *loops])):
                text(f"d: T.let = T.reinterpret('uint32x{lanes}', delta[{run_of(there, vector)}])")
                sums = f"sums_%u[T.ramp((k * {rows} + j) * {lanes}, 1, {lanes})]"
                text(*(dot(lanes, sums, at, "d").replace("%u", str(unit)) for unit in range(units)))

        text(*(f"sums_{unit} = T.alloc_buffer(({each * lanes},), 'float32')" for unit in range(units)))
        per_unit(loops, f"{total} = " + ("T.float32(0)" if at_once else f"scratch[{weight} * {lanes} + i]"))
        with text.nest(*examples, f"for a in T.serial({high})"):
            add()
        if not at_once:
            per_unit(loops, f"scratch[{weight} * {lanes} + i] = {total}")
            return
        for unit, k, j in product(range(units), range(depth), range(rows)):
            start = (k * rows + j) * lanes
            for half in halves(lanes):
                at = f"sums_{unit}[{start} + i]"
                vectors(text, [], half, f"{at} = {at} + sums_{unit}[{start + half} + i]")
            place = (
                f"({first} + {unit}) * {block} + (layer * {depth} + {k}) * {problem.row_block} + part * {rows} + {j}"
            )
            before = f"gradients[{place}] + " if problem.adds else ""
            text(f"gradients[{place}] = {before}sums_{unit}[{start}]")

    read = -(-problem.sources_live // problem.sections) or min(problem.section_channels, source.channels)
    runs = {
        "source": (read, high * problem.source_step[0] + TAPS - 1, wide * apart // source.vector, source),
        "delta": (problem.rows_live or delta.channels, high, wide * delta.abreast, delta),
    }
    if copied:
        del runs["source"]
    lists = {
        "source": f"sources[T.min(section * {read} + %s, {source.channels - 1})]" if problem.sources_live else "%s",
        "delta": f"channels[T.min(%s, {delta.channels - 1})]" if problem.rows_live else "%s",
    }
    expected = -(-problem.rows_live // problem.row_block) or problem.groups

    def fetch(name: str, first: str, many: str) -> None:
        """Asks for `many` runs of the next strip, each a row's share, from run `first` on."""
        _channels, rows_each, pixels, image = runs[name]
        run = f"({first} + ahead)"
        channel = lists[name].replace("%s", f"{run} // {rows_each}")
        start = f"{name}_ahead + {channel} * {image.channel_elems} + {run} % {rows_each} * {image.row_elems}"
        with text.nest(f"for ahead in T.serial({many})"):
            prefetch_run(text, name, image, start, pixels * image.vector)

    per_group = {name: -(-channels * rows_each // expected) for name, (channels, rows_each, _, _) in runs.items()}
    if not prefetch:
        per_group = {}
    spread = {name: many for name, many in per_group.items() if many > BURST}

    def strips() -> None:
        """A strip's share of all units of a group."""
        left = count
        for units in sizes:
            ahead = spread if units == most_units else {}
            if ahead:
                text(f"times: T.let = T.max({left} // {units}, 1)")
            for name, many in ahead.items():
                text(f"{name}_runs: T.let = ({many} + times - 1) // times")
            with text.nest(f"for several in T.serial({left} // {units})"):
                for name, many in reversed(ahead.items()):
                    fetch(name, f"(group * {many} + several * {name}_runs)", f"{name}_runs")
                together(units, f"(pointers[{cell} + 1] - {left} + several * {units})")
            left = f"({left} % {units})"

    if at_once:  # threads share groups, which have what a section reads from a near cache
        with text.nest(
            f"for section in T.serial({problem.sections})",
            f"for group in T.parallel({'live_groups[0]' if problem.rows_live else problem.groups})",
            f"for layer, part in T.grid({layers}, {parts})",
        ):
            text(*([] if examples else ["z: T.let = 0"]), "y: T.let = 0", "x: T.let = 0")
            strips()
        return recorded(text)

    place = {"z": (down * across, delta.slices), "y": (across, down), "x": (1, across)}
    where = [f"{name}: T.let = strip // {size} % {extent}" for name, (size, extent) in place.items()]
    then = [f"next_{name}: T.let = (strip + 1) // {size} % {extent}" for name, (size, extent) in place.items()]
    tall, broad = high * problem.source_step[0], wide * apart
    starts = [
        f"source_ahead: T.let = next_z * {source.slice_elems} + section * "
        f"{0 if problem.sources_live else section_elems}"
        f" + next_y * {tall * source.row_elems} + next_x * {broad}",
        f"delta_ahead: T.let = next_z * {delta.slice_elems} + {delta.origin} + next_y * {high * delta.row_elems}"
        f" + next_x * {wide * vector}",
    ]
    mine = f"T.min({share}, {strips_each} - chunk * {share})"
    of_owners = " + ".join(f"scratch[({owner} * units * {block} + weight) * {lanes} + i]" for owner in range(chunks))
    text(f"scratch = T.alloc_buffer(({chunks} * units * {block * lanes},), 'float32')")
    with text.nest(f"for chunk in T.parallel({chunks})"):
        if copied:
            text(f"wide = T.alloc_buffer(({min(section_elems, source.slice_elems)},), 'float32')")
        with text.nest(f"for weight in T.serial(units * {block})"):
            vectors(text, [], lanes, f"scratch[(chunk * units * {block} + weight) * {lanes} + i] = T.float32(0)")
        with text.nest(f"for section, turn in T.grid({problem.sections}, {mine})"):
            text(f"strip: T.let = chunk * {share} + turn", *where, *then, *starts)
            if copied:
                elems = f"T.min({section_elems}, {source.slice_elems} - section * {section_elems})"
                with text.nest(f"if turn == 0 or strip % {down * across} == 0"):
                    widen(text, "source", source, f"z * {source.slice_elems} + section * {section_elems}", elems)
            with text.nest(f"for group in T.serial({'live_groups[0]' if problem.rows_live else problem.groups})"):
                for name, many in per_group.items():
                    if name not in spread:
                        fetch(name, f"group * {many}", str(many))
                with text.nest(f"for layer, part in T.grid({layers}, {parts})"):
                    strips()
    with text.nest(f"for weight in T.parallel(units * {block})"):
        text(f"total = T.alloc_buffer(({lanes},), 'float32')")
        vectors(text, [], lanes, f"total[i] = {of_owners}")
        for half in halves(lanes):
            vectors(text, [], half, f"total[i] = total[i] + total[{half} + i]")
        text(f"gradients[weight] = {'gradients[weight] + ' if problem.adds else ''}total[0]")
    return recorded(text)


def _begun(problem: GatherGrad) -> Text:
    """The kernel's text up to its first loop."""
    source, delta, block = problem.source, problem.delta, problem.unit[0] * problem.row_block
    text = Text(
        f"pointers: T.Buffer(({problem.sections * problem.groups + 1},), 'int32')",
        "offsets_handle: T.handle",
        *listed(problem, source),
        f"source: T.Buffer(({source.elems},), '{source.array_dtype}')",
        f"delta: T.Buffer(({delta.elems},), '{delta.array_dtype}')",
        "gradients_handle: T.handle",
    )
    text(
        "units = T.int32()",
        "offsets = T.match_buffer(offsets_handle, (units,), 'int32')",
        f"gradients = T.match_buffer(gradients_handle, (units * {block},), 'float32')",
    )
    return text


def _of_one_pixel(problem: GatherGrad, rows: int, depth: int, sizes: list[int]) -> str:
    """A linear layer: the sums of some units over all examples fit in registers, so threads share groups and nothing is
    kept between.

    rows, depth  of a unit, that pass together; sizes: units that do
    """
    source, delta, vector = problem.source, problem.delta, problem.delta.vector
    reads, distance = problem.unit
    parts, block = problem.row_block // rows, reads * problem.row_block
    groups = "live_groups[0]" if problem.rows_live else problem.groups
    row = f"(group * {problem.row_block} + part * {rows} + j)"
    cell = f"(section * {problem.groups} + group)"
    left, text = f"(pointers[{cell} + 1] - pointers[{cell}])", _begun(problem)

    def together(units: int) -> None:
        first = f"(pointers[{cell} + 1] - {left} + several * {units})"
        total = f"sums[((u * {depth} + k) * {rows} + j) * {vector}"
        read = widened(
            source, f"source[offsets[{first} + u] + (layer * {depth} + k) * {distance} + z * {source.slice_elems} + i]"
        )
        against = widened(
            delta,
            f"delta[{f'channels[{row}]' if problem.rows_live else row} * {delta.channel_elems} + {delta.origin}"
            f" + z * {delta.slice_elems} + i]",
        )
        loops = [("k", depth), ("j", rows), ("u", units)]
        lanes = " + ".join(f"{total} + {lane}]" for lane in range(vector))
        with text.nest(f"for several in T.serial({left} // {units})"):
            text(f"sums = T.alloc_buffer(({units * depth * rows * vector},), 'float32')")
            vectors(text, loops, vector, f"{total} + i] = T.float32(0)")
            with text.nest(f"for z in T.serial({delta.slices})"):
                vectors(text, loops, vector, f"{total} + i] = {total} + i] + {against} * {read}")
            with text.nest(f"for k, j, u in T.grid({depth}, {rows}, {units})"):
                goal = (
                    f"gradients[({first} + u) * {block} + (layer * {depth} + k) * {problem.row_block} + part "
                    f"* {rows} + j]"
                )
                text(f"{goal} = {f'{goal} + ' if problem.adds else ''}{lanes}")

    with text.nest(
        f"for group in T.parallel({groups})",
        f"for section, layer, part in T.grid({problem.sections}, {reads // depth}, {parts})",
    ):
        for units in sizes:
            together(units)
            left = f"({left} % {units})"
    return recorded(text)
