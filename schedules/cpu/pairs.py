"""Text of sums of products of pairs of bfloat16: an instruction adds both products of a pair to a float32.

A gather pairs what two units read, or two source channels of one, whatever their taps: two vectors of examples become,
within 128 bits, pairs of the lower and of the upper half of their elements, which takes an instruction each that runs
beside the products. Sums are then of examples in another order, and are put back when a tile is done. Weights are
rounded and paired once a call, in the order of the index: that is a ten-thousandth of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.text import Text
from mest_compile.schedules.cpu.rows import to_bfloat16
from mest_compile.schedules.cpu.tiles import vectors

SUMS = 16  # registers of sums of a weight gradient's tile: of 32, what else is read has room
WORDS = 8  # of 128 bits
LANES = 16  # that weights are rounded at once


def pairs(target: Target, *images: Image) -> bool:
    """Whether products of elements of these images, or of one and weights, are made so."""
    return target.pairs and all(image.dtype == "bfloat16" and image.vector >= WORDS for image in images)


def halves_of(vector: int) -> tuple[list[int], list[int]]:
    """Which elements of two vectors, one behind the other, are the pairs of the lower halves and of the upper ones."""
    low = [
        side * vector + start + element for start in range(0, vector, WORDS) for element in range(4) for side in (0, 1)
    ]
    return low, [element + 4 for element in low]


def order_of(vector: int) -> list[int]:
    """The example of every sum of a vector."""
    low, high = halves_of(vector)
    return low[::2] + high[::2]


def turn(text: Text, sums: str, count: int, vector: int, order: Sequence[int]) -> None:
    """Puts `count` vectors in the order of examples (`back`) or in that of sums (`order_of`)."""
    for place in range(count):
        at = f"{sums}[T.ramp({place * vector}, 1, {vector})]"
        text(f"{at} = T.Shuffle([{at}], {list(order)})")


def back(vector: int) -> list[int]:
    order = order_of(vector)
    return sorted(range(vector), key=order.__getitem__)


def run_of(place: str, lanes: int) -> str:
    """Places from the one on that a text has for its lane 0."""
    return f"T.ramp({place.removesuffix(' + i')}, 1, {lanes})"


def dot(lanes: int, sums: str, x: str, y: str) -> str:
    """The statement that adds products of words of x and y to a vector of sums."""
    return f"{sums} = T.call_pure_extern('float32x{lanes}', 'mest_dot_{lanes}', {sums}, {x}, {y})"


def set_rounded(text: Text, block: int) -> None:
    """`rounded`: the weights as float32 with the digits of bfloat16."""
    text(f"rounded = T.alloc_buffer((units * {block},), 'float32')")
    _each(
        text,
        f"units * {block}",
        lambda at: [f"rounded[{at}] = T.reinterpret('float32', T.cast({_bits(at)}, 'uint32') << T.uint32(16))"],
    )


def _bits(at: str) -> str:
    return to_bfloat16(f"values[{at}]")


def _word(first: str, second: str) -> str:
    return f"T.cast({_bits(first)}, 'uint32') + (T.cast({_bits(second)}, 'uint32') << T.uint32(16))"


def _each(text: Text, count: str, body: Callable[[str], list[str]]) -> None:
    """Statements at every place below `count`."""
    with text.nest(f"for t in T.serial({count} // {LANES})"):
        vectors(text, [], LANES, *body(f"t * {LANES} + i"))
    with text.nest(f"for t in T.serial({count} % {LANES})"):
        text(*body(f"({count} // {LANES} * {LANES} + t)"))


def set_words(text: Text, reads: int, rows: int) -> None:
    """`words`: pairs of weights, the first one in the lower half, for each of `rows` results. Where a unit reads one
    source at unit u those of u and u + 1, which may be another group's; else of its sources 2q and 2q + 1."""
    each = -(-reads // 2)
    text(f"words = T.alloc_buffer((units * {each * rows},), 'uint32')")
    if reads == 1:
        begun = f"T.max(units - 1, 0) * {rows}"
        _each(text, begun, lambda at: [f"words[{at}] = {_word(at, f'{at} + {rows}')}"])
        with text.nest(f"for t in T.serial(T.min(units, 1) * {rows})"):
            last = f"{begun} + t"
            text(f"words[{last}] = T.cast({_bits(last)}, 'uint32')")
    else:
        with text.nest(
            "for unit_of in T.serial(units)", f"for q in T.unroll({reads // 2})", f"for j in T.unroll({rows})"
        ):
            first = f"(unit_of * {reads} + 2 * q) * {rows} + j"
            text(f"words[(unit_of * {each} + q) * {rows} + j] = {_word(first, f'{first} + {rows}')}")
        if reads % 2:
            with text.nest("for unit_of in T.serial(units)", f"for j in T.unroll({rows})"):
                last = f"(unit_of * {reads} + {reads - 1}) * {rows} + j"
                text(f"words[(unit_of * {each} + {each - 1}) * {rows} + j] = T.cast({_bits(last)}, 'uint32')")


def add_pair(
    text: Text,
    loops: Sequence[tuple[str, int]],
    vector: int,
    reads: Sequence[str],
    sums: str,
    words: Sequence[str],
) -> None:
    """Adds the products of what is read from the one or two places `reads` of the source and the weights of each row,
    `words`, to the vectors of sums at place `sums` of its array."""
    lanes, (low, high) = vector // 2, halves_of(vector)
    with text.nest(*(f"for {name} in T.unroll({extent})" for name, extent in loops)):
        text(f"these: T.let = source[{run_of(reads[0], vector)}]")
        second = f"source[{run_of(reads[1], vector)}]" if len(reads) > 1 else f"T.broadcast(T.uint16(0), {vector})"
        text(f"those: T.let = {second}")
        text(f"low: T.let = T.Shuffle([these, those], {low})", f"high: T.let = T.Shuffle([these, those], {high})")
        for row, word in enumerate(words):
            for half, pair in enumerate(("low", "high")):
                at = f"sums_{row}[T.ramp({sums} + {half * lanes}, 1, {lanes})]"
                text(dot(lanes, at, pair, f"T.broadcast({word}, {lanes})"))
