"""Pieces of text that several schedules for processors share."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.text import Text
from mest_compile.operators.activation import activation_of
from mest_compile.operators.layers.depthwise import DepthwiseForward
from mest_compile.operators.layers.gather import GatherConv, GatherGrad
from mest_compile.records.knob import Knob
from mest_compile.schedules.cpu.rows import spelled, widened

LINE_BYTES = 64  # a cache line of every CPU we know
LEAST_TILE, MOST_TILE = 4, 28  # accumulators that tuning tries
TAPS = 3  # kernel height and width that tiles are chosen for
NEON_FLOATS, NEON_REGISTERS = 4, 32  # of a vector; of a 64-bit ARM core


def is_neon(vector: int, target: Target) -> bool:
    return vector == NEON_FLOATS and target.registers == NEON_REGISTERS


def widens_once(source: Image, target: Target, once: bool | None = None) -> bool:
    """Whether a kernel first makes a float32 copy of what it reads of a source that is stored in less, or widens at
    every read.

    A copy stays in the thread's caches. Where a conversion costs as much as four multiply-adds, as on ARM cores (2
    cycles on Neoverse N1, by LLVM's model), it is made up for by few reads; on x86 conversions run beside the
    multiply-adds, and the smaller source is near.
    """
    slow = is_neon(source.floats, target)
    return source.dtype != "float32" and not target.pairs and (slow if once is None else once)


ONCE = Knob(
    "once",
    None,
    "whether a source that is not stored in float32 is widened slice by slice before it is read; None: chosen by the "
    "target",
    lambda problem, target: () if problem.source.dtype == "float32" or target.pairs else (True, False),
)


def widen(text: Text, name: str, image: Image, start: str, elems: str) -> None:
    """Fills `wide` with `elems` elements from element `start` on."""
    at = f"t * {image.vector} + i"
    with text.nest(f"for t in T.serial({elems} // {image.vector})"):
        vectors(text, [], image.vector, f"wide[{at}] = " + widened(image, f"{name}[{start} + {at}]"))


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor that is at most `most`."""
    return max(candidate for candidate in divisors(number) if candidate <= most)


def vectors(text: Text, loops: list[tuple[str, int]], vector: int, *body: str) -> None:
    """Unrolled loops (name, extent) around a vector loop over `i` around statements."""
    with text.nest(
        *(f"for {name} in T.unroll({extent})" for name, extent in loops), f"for i in T.vectorized({vector})"
    ):
        text(*body)


def recorded(text: Text) -> str:
    """As the texts were written whose digests records hold: these quotes, no line end behind the last line."""
    return str(text).replace('"tirx.noalias"', "'tirx.noalias'").removesuffix("\n")


def listed(problem: GatherConv | GatherGrad, source: Image) -> list[str]:
    """Arguments that list live channels."""
    rows = [
        f"channels: T.Buffer(({problem.groups * problem.row_block},), 'int32')",
        "live_groups: T.Buffer((1,), 'int32')",
    ]
    return [
        *(rows if problem.rows_live else []),
        *([f"sources: T.Buffer(({source.channels},), 'int32')"] if problem.sources_live else []),
    ]


def epilogue_arguments(problem: GatherConv | DepthwiseForward) -> list[str]:
    if problem.epilogue is None:
        return []
    residual = problem.epilogue.residual
    return [
        f"scaling: T.Buffer(({2 * problem.result.channels},), 'float32')",
        *([f"residual: T.Buffer(({residual.elems},), '{residual.array_dtype}')"] if residual else []),
    ]


def finished(problem: GatherConv | DepthwiseForward, total: str, channel: str, residual: str) -> str:
    """What becomes of a sum. residual: where the summand of that pixel begins in its image, channel 0."""
    epilogue = problem.epilogue
    if epilogue is None:
        return total
    value = f"({total} * scaling[{problem.result.channels} + {channel}] + scaling[{channel}])"
    if epilogue.residual:
        element = f"residual[{channel} * {epilogue.residual.channel_elems} + {residual}]"
        value = f"({value} + {widened(epilogue.residual, element)})"
    if epilogue.activation:
        value = spelled(activation_of(epilogue.activation).formula, x=value)
    return value


def prefetch(
    text: Text,
    name: str,
    image: Image,
    channels: int,
    start: str,
    rows: tuple[int, int],
    columns: int,
    visit: str,
    visits: int,
    write: bool = False,
    planes: str | None = None,
) -> None:
    """Asks for `rows` (how many, distance) of `columns` pixels of `channels` channels from element `start` on, some
    cache lines at each of `visits` visits: all at once would hold up the loads behind them. A line too many does no
    harm, prefetches cannot fault.

    planes  buffer that lists the channels; None: the first ones
    Without this a layer whose activations come from memory waits for them half of its time (32x32x32, batch 64: 21 ->
    39 GFLOP/s).
    """
    line = LINE_BYTES // image.item_bytes
    lines = -(-columns * image.vector // line)
    share = -(-channels * rows[0] * lines // visits)
    at = f"({visit} * {share} + ahead)"
    channel = f"{at} // {rows[0] * lines}"
    if planes:
        channel = f"{planes}[T.min({channel}, {image.channels - 1})]"
    element = (
        f"{start} + {channel} * {image.channel_elems} + {at} // {lines} % {rows[0]} * {rows[1] * image.row_elems}"
        f" + {at} % {lines} * {line}"
    )
    with text.nest(f"for ahead in T.unroll({share})"):
        text(
            f"T.evaluate(T.call_llvm_intrin('void', 'llvm.prefetch', T.address_of({name}[{element}]), "
            f"{int(write)}, 2, 1))"
        )


def prefetch_run(text: Text, name: str, image: Image, start: str, elems: int) -> None:
    """Asks for `elems` elements from element `start` on."""
    line = LINE_BYTES // image.item_bytes
    with text.nest(f"for line in T.unroll({-(-elems // line)})"):
        text(
            f"T.evaluate(T.call_llvm_intrin('void', 'llvm.prefetch', T.address_of({name}[{start} + line * "
            f"{line}]), 0, 2, 1))"
        )
