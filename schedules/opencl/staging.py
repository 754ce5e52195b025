"""What sparse convolutions on OpenCL share: how a work-group gets at its units' offsets and weights, and the sums of
its results' rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mest_compile.ir.layouts.layout import FLOAT_BYTES
from mest_compile.records.knob import Knob
from mest_compile.schedules.opencl.text import DeviceText, slots, vector_type, zeros

STAGE_BYTES = 2048  # of local memory: sixteen work-groups of a core of 32 KiB have room for theirs
MOST_STAGED = 64  # units: as many as the threads that load them
EPILOGUE_BYTES = 4096  # of local memory for rows of results
LANES = (2, 4, 8, 16)  # of OpenCL's vector types

ACCUMULATORS = Knob(
    "accumulators", 8, "vectors of results, or of weights' sums, that a thread keeps in registers", (4, 16)
)
THREADS = Knob("threads", None, "of a work-group; None: what the target prefers", (32, 128))
STAGED = Knob(
    "staged",
    None,
    "units whose offsets and weights are in local memory at a time, 0: none are; None: as many as there is room for",
    (0, 32, 128),
)
PIECES = Knob(
    "pieces",
    None,
    "groups of result channels that a work-group computes one after another; None: chosen from the sizes",
    (1, 2, 8),
)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor that is at most `most`."""
    return max(candidate for candidate in range(1, most + 1) if number % candidate == 0)


@dataclass(frozen=True, slots=True)
class Stage:
    """A loop over units. Their offsets and weights come to local memory, `units` at a time: the work-group loads each
    of them once, side by side, and all of its threads read them there. With 0 units each thread asks global memory for
    what its neighbours ask for.

    depth, rows    weights of a unit that count here: `depth` times `rows` neighbours
    block, pitch   weights of a whole unit; distance of one row of `rows` from the next
    divisor        elements of a vector: offsets become numbers of vectors
    """

    units: int
    size: int
    depth: int
    rows: int
    block: int
    pitch: int
    divisor: int

    @staticmethod
    def pick(weights: int, room_bytes: int) -> int:
        """Units, as many as `STAGE_BYTES` and `room_bytes` have room for, of so many weights each; 0 where there is no
        room for eight."""
        units = MOST_STAGED
        while units >= 8 and units * (1 + weights) * FLOAT_BYTES > min(STAGE_BYTES, room_bytes):
            units //= 2
        return units if units >= 8 else 0

    def declare(self, text: DeviceText) -> None:
        if self.units:
            text(
                f'staged_offsets = T.alloc_buffer(({self.units},), "int32", scope="shared")',
                f'staged_values = T.alloc_buffer(({self.units * self.depth * self.rows},), "float32", scope="shared")',
            )
        if self.rows in LANES:
            text.private("weights", 1, f"float32x{self.rows}")
        else:
            text.private("weights", self.rows)

    def load(self, text: DeviceText, first: str, many: str, start: str) -> None:
        """Brings `many` units from `first` on to local memory. start: a unit's first weight that counts. All threads
        must come here."""
        each = self.depth * self.rows
        place = (
            f"({first} + e // {each}) * {self.block} + {start} + e % {each} // {self.rows} * {self.pitch} + "
            f"e % {self.rows}"
        )
        for count, line in (
            (1, f"staged_offsets[e] = offsets[{first} + e] // {self.divisor}"),
            (each, f"staged_values[e] = values[{place}]"),
        ):
            with text.nest(f"for turn in T.unroll({-(-self.units * count // self.size)})"):
                text(f"e: T.let = turn * {self.size} + lane")
                with text.nest(f"if e < ({many}) * {count}"):
                    text(line)
        text.barrier()

    @contextmanager
    def chunks(self, text: DeviceText, begin: str, end: str, start: str) -> Iterator[tuple[str, str]]:
        """A loop over what is in local memory at a time, in which `units_between` loops; gives names of its first unit
        and its size."""
        if not self.units:
            yield "0", "0"
            return
        with text.nest(f"for chunk in T.serial(({end} - {begin} + {self.units - 1}) // {self.units})"):
            text(f"first: T.let = {begin} + chunk * {self.units}", f"many: T.let = T.min({self.units}, {end} - first)")
            self.load(text, "first", "many", start)
            yield "first", "many"
            text.barrier()

    @contextmanager
    def units_between(self, text: DeviceText, low: str, high: str) -> Iterator[None]:
        """A loop over units, counted from the chunk's first one where there are chunks: sets `unit`, and `way`, its
        offset in vectors."""
        with text.nest(f"for turn in T.serial(T.max({high} - {low}, 0))"):
            text(
                f"unit: T.let = {low} + turn",
                "way: T.let = staged_offsets[unit]" if self.units else f"way: T.let = offsets[unit] // {self.divisor}",
            )
            yield

    @contextmanager
    def each(self, text: DeviceText, begin: str, end: str, start: str) -> Iterator[None]:
        """A loop over the units from begin to end, as `units_between`."""
        with self.chunks(text, begin, end, start) as (_, many):  # noqa: SIM117
            with self.units_between(text, *(("0", many) if self.units else (begin, end))):
                yield

    def bring(self, text: DeviceText, k: str, start: str) -> None:
        """Gets `weight` the weights of row k of the unit."""
        if self.units:
            name, place = "staged_values", f"(unit * {self.depth} + {k}) * {self.rows}"
        else:
            name, place = "values", f"unit * {self.block} + {start} + {k} * {self.pitch}"
        if self.rows in LANES:
            text(f"weights[0] = {name}[{slots(place, self.rows)}]")
        else:
            with text.nest(f"for j in T.unroll({self.rows})"):
                text(f"weights[j] = {name}[{place} + j]")

    def weight(self, j: str) -> str:
        return f"T.Shuffle([weights[0]], [{j}])" if self.rows in LANES else f"weights[{j}]"


def epilogue_bytes(size: int, sums: int, vector: int) -> int:
    """Local memory that `row_sums` takes."""
    each = size * vector * FLOAT_BYTES
    return max(min(EPILOGUE_BYTES // each, sums), 1) * each


def declare_row_sums(text: DeviceText, size: int, sums: int, vector: int) -> None:
    """Local memory of `row_sums`, as single numbers: TVM gives it the place of what the stage does not need any
    more."""
    text(
        f'row_values = T.alloc_buffer(({epilogue_bytes(size, sums, vector) // FLOAT_BYTES},), "float32", '
        'scope="shared")'
    )


def row_sums(
    text: DeviceText,
    size: int,
    wide: int,
    sums: int,
    vector: int,
    store: Callable[[str, str, int, str], list[str]],
    guard: Callable[[str, str], str],
) -> None:
    """Sums and sums of squares over runs of `wide` threads, of each of the private vectors `sums`, some at a time
    through local memory:
    then each run has a thread of its own, which adds it up in order. `declare_row_sums` came before.

    store(number of the sum, run, 0 or 1 for the power, value) gives the statements that keep one; guard, the condition
    that it is kept.
    """
    runs = size // wide
    together = epilogue_bytes(size, sums, vector) // (size * vector * FLOAT_BYTES)
    for name in "row_sum", "row_squares":
        text.private(name, 1, vector_type(vector))
    for first in range(0, sums, together):
        here = min(together, sums - first)
        text.barrier()
        text(
            *(
                f"row_values[{slots(f'({e * size} + lane) * {vector}', vector)}] = sums[{first + e}]"
                for e in range(here)
            )
        )
        text.barrier()
        for turn in range(-(-here * runs // size)):
            text(f"run_{first}_{turn}: T.let = {turn * size} + lane")
            run = f"run_{first}_{turn}"
            number, part = f"({first} + {run} // {runs})", f"({run} % {runs})"
            with text.nest(f"if {run} < {here * runs} and {guard(number, part)}"):
                text(f"row_sum[0] = {zeros(vector)}", f"row_squares[0] = {zeros(vector)}")
                with text.nest(f"for w in T.serial({wide})"):
                    value = (
                        f"row_values[{slots(f'({run} // {runs} * {size} + {part} * {wide} + w) * {vector}', vector)}]"
                    )
                    text(f"row_sum[0] = row_sum[0] + {value}", f"row_squares[0] = row_squares[0] + {value} * {value}")
                for power, name in enumerate(("row_sum", "row_squares")):
                    text(*store(number, part, power, f"{name}[0]"))
