"""Text of CPU kernels that walk over the rows of images: what the memory-bound schedules share.

A row (width x vector elements) is contiguous in every image, and its length is the same whatever the halo, so one
offset within the row serves all images of a kernel; only the row's start differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mest_compile.ir.expressions import Expression
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.text import Text

PARALLEL_ELEMS = 16384  # below 64 KiB, waking the other threads costs as much as the work
UNROLL = 4  # vectors in flight: enough independent sums to hide an addition's latency, few enough for 16 registers


def buffer(name: str, elems: int, dtype: str = "float32") -> str:
    """An argument of the kernel: a flat buffer."""
    return f'{name}: T.Buffer(({elems},), "{dtype}")'


def array(name: str, image: Image) -> str:
    """An argument of the kernel: the elements of an image."""
    return buffer(name, image.elems, image.array_dtype)


def widened(image: Image, element: str) -> str:
    """The float32 that is computed with for an element of an array of `image`."""
    if image.dtype == "bfloat16":
        return f'T.reinterpret("float32", T.cast({element}, "uint32") << T.uint32(16))'
    return element if image.dtype == "float32" else f'T.cast({element}, "float32")'


def narrowed(image: Image, value: str) -> str:
    """A float32 as an array of `image` stores it, rounded to nearest."""
    if image.dtype == "bfloat16":
        return to_bfloat16(value)
    return value if image.dtype == "float32" else f'T.cast({value}, "{image.dtype}")'


def to_bfloat16(value: str) -> str:
    """The bits of a float32 that is rounded to nearest."""
    return f'T.call_intrin("uint16", "mest.to_bfloat16", {value})'


def spelled(expression: Expression, **names: str) -> str:
    """A scalar expression, of these texts for its variables."""
    return expression.text(names, lambda value: "T.float32(0)" if value == 0 else number(value))


def fenced(value: str) -> str:
    """A float32 as it is. Without the fence a Select that keeps or clears what it overwrites becomes masked stores,
    which take twice as long (0.30 ms instead of 0.13 for 128x8x8x64).
    """
    return f'T.call_llvm_pure_intrin("float32", "llvm.arithmetic.fence", {value})'


def number(value: float, dtype: str = "float32") -> str:
    return f"T.{dtype}({float(value)!r})"


def loop(extent: int, elems: int) -> str:
    """The outermost loop's range: threads share it when the kernel touches enough elements."""
    return f"T.parallel({extent})" if elems >= PARALLEL_ELEMS and extent > 1 else f"T.serial({extent})"


Body = Callable[[str, str, str | None], list[str]]


def walk_row(text: Text, image: Image, body: Body, fetched: Sequence[str] = (), after: Sequence[str] = ()) -> None:
    """Statements for every vector of a row, what is left of it in narrower ones: body(offset in the row, slot, live).

    `slot` numbers the float within UNROLL vectors of accumulators; `live` is None where all lanes hold examples,
    otherwise the condition under which the lane does.
    fetched  what `fetch` gives, before the vector at `{at}`
    after    statements on a vector of lanes `i` behind every UNROLL vectors, and behind those that are left over
    """

    def end() -> None:
        if after:
            with text.nest(f"for i in T.vectorized({vector})"):
                text(*after)

    vector, lane = image.floats, "i" if image.abreast == 1 else f"i % {image.vector}"
    live = None if image.batch == image.lanes else f"{lane} < examples"
    vectors, left = divmod(image.width * image.vector, vector)
    main, rest = divmod(vectors, UNROLL)
    if main:
        with text.nest(f"for t in T.serial({main})"):
            with text.nest(f"for j in T.unroll({UNROLL})"):
                text(*(statement.format(at=f"t * {UNROLL * vector} + j * {vector}") for statement in fetched))
                with text.nest(f"for i in T.vectorized({vector})"):
                    text(*body(f"t * {UNROLL * vector} + j * {vector} + i", f"j * {vector} + i", live))
            end()
    if rest:
        with text.nest(f"for j in T.unroll({rest})", f"for i in T.vectorized({vector})"):
            text(*body(f"{main * UNROLL * vector} + j * {vector} + i", f"j * {vector} + i", live))
    at, lanes = vectors * vector, vector // 2
    while left:  # in narrower vectors, down to one element
        if left >= lanes:
            with text.nest(f"for i in T.vectorized({lanes})"):
                text(*body(f"{at} + i", "i", live))
            at, left = at + lanes, left - lanes
        lanes //= 2
    if rest or at > vectors * vector:
        end()


def fetch(ahead: int, images: dict[str, Image], written: str | None = None) -> list[str]:
    """Asks for what images hold `ahead` bytes behind a vector, as `walk_row` takes it; 0: nothing. written: which one
    is to be written."""

    def one(name: str) -> str:
        element = f"{name}[{name}_row + {{at}} + {ahead // images[name].item_bytes}]"
        return (
            f"T.evaluate(T.call_llvm_intrin('void', 'llvm.prefetch', T.address_of({element}), "
            f"{int(name == written)}, 3, 1))"
        )

    return [one(name) for name in images] if ahead else []


@contextmanager
def each_row(text: Text, images: dict[str, Image]) -> Iterator[None]:
    """A loop over the rows of images of one size: sets `plane` (channel of a slice), `c` (channel), `h` (row) and what
    `set_rows` sets.

    The last slice comes first: the convolution before wrote it last, and the one behind, which begins with the first
    slice, finds that in cache (5% of a step of the wide ResNet-32 where a stage's activations are larger than the
    last-level cache).
    """
    image = next(iter(images.values()))
    rows = image.channels * image.height
    with text.nest(f"for turn in {loop(image.slices * rows, image.elems)}"):
        text(
            f"n: T.let = ({image.slices - 1} - turn // {rows}) * {rows} + turn % {rows}",
            f"plane: T.let = n // {image.height}",
            f"c: T.let = plane % {image.channels}",
            f"h: T.let = n % {image.height}",
        )
        set_rows(text, images)
        yield


def set_rows(text: Text, images: dict[str, Image]) -> None:
    """Sets `<name>_row`, the element where row `h` of `plane` starts, for every image, and what `set_examples` sets."""
    text(
        *(
            f"{name}_row: T.let = plane * {image.channel_elems} + h * {image.row_elems} + {image.origin}"
            for name, image in images.items()
        )
    )
    set_examples(text, next(iter(images.values())))


def set_examples(text: Text, image: Image) -> None:
    """Sets `examples`, those in the slice of `plane`, where not all slices are full."""
    if image.batch < image.lanes:
        text(f"examples: T.let = {image.batch} - plane // {image.channels} * {image.vector}")


def frame_row(text: Text, name: str, image: Image) -> None:
    """Zeroes the halo that borders row `h` of `plane`: both its sides, all above the first row and all below the
    last."""
    top, left, bottom, right = (
        size * unit
        for size, unit in zip(image.halo, (image.row_elems, image.vector, image.row_elems, image.vector), strict=True)
    )

    def strip(start: str, elems: int) -> None:
        if elems:
            with text.nest(f"for t in T.serial({elems // image.vector})", f"for i in T.vectorized({image.vector})"):
                text(f"{name}[{start} + t * {image.vector} + i] = {narrowed(image, 'T.float32(0)')}")

    for part in range(image.combed):
        row = (
            f"plane * {image.channel_elems} + {top + part * image.part_columns * image.vector} + h * {image.row_elems}"
        )
        strip(row, left)
        strip(f"{row} + {image.part_columns * image.vector - right}", right)
    if top:
        with text.nest("if h == 0"):
            strip(f"plane * {image.channel_elems}", top)
    if bottom:
        with text.nest(f"if h == {image.height - 1}"):
            strip(f"plane * {image.channel_elems} + {image.channel_elems - image.gap - bottom}", bottom)


def pointwise(images: dict[str, Image], result: str, value: str, accumulate: bool = False) -> str:
    """A kernel `result = value` on every element, arguments in the order of `images`.

    `value` is an expression with `{x}` for the element of image x; `accumulate` adds it to the result.
    """
    text = Text(*(array(name, image) for name, image in images.items()))

    def body(at: str, slot: str, live: str | None) -> list[str]:
        elements = {name: f"{name}[{name}_row + {at}]" for name in images}
        read = {name: widened(images[name], element) for name, element in elements.items()}
        made = value.format(**read)
        if accumulate:
            made = f"{read[result]} + {made}"
        return [f"{elements[result]} = {narrowed(images[result], made)}"]

    with each_row(text, images):
        walk_row(text, images[result], body)
    return str(text)


@dataclass(frozen=True, slots=True)
class Chunks:
    """How a sum over the pixels and examples of each channel is cut, so that few channels still occupy all threads.

    The rows of a channel are counted through all slices. The cut follows from the image alone, never from the number of
    threads: sums are then the same on any number of them.
    """

    image: Image

    @property
    def all_rows(self) -> int:
        """Rows of a channel."""
        return self.image.slices * self.image.height

    @property
    def rows(self) -> int:
        """Rows of a chunk; the last one of a channel may have fewer."""
        return -(-self.all_rows // min(self.all_rows, -(-16 // self.image.channels)))

    @property
    def count(self) -> int:
        """Chunks of a channel."""
        return -(-self.all_rows // self.rows)

    def values(self, first: str, rows: str) -> str:
        """Expression: how many values `rows` rows from row `first` hold."""
        image = self.image
        if image.batch == image.lanes:
            return f"({rows} * {image.width * image.vector})"
        full = f"T.max(0, T.min({rows}, {(image.slices - 1) * image.height} - {first}))"
        return (
            f"(({rows}) * {image.width * (image.batch % image.vector)} + {full} * "
            f"{image.width * (image.lanes - image.batch)})"
        )

    def set_row(self, text: Text, row: str, images: dict[str, Image]) -> None:
        """Sets `plane`, `h` and what `set_rows` sets for row `row` of channel `c`."""
        text(
            f"plane: T.let = ({row}) // {self.image.height} * {self.image.channels} + c",
            f"h: T.let = ({row}) % {self.image.height}",
        )
        set_rows(text, images)

    @contextmanager
    def each(self, text: Text) -> Iterator[None]:
        """A loop over all chunks: sets `n` (chunk), `c` (channel), `first` (row) and `rows`."""
        image = self.image
        with text.nest(f"for n in {loop(image.channels * self.count, image.elems)}"):
            text(
                f"c: T.let = n // {self.count}",
                f"first: T.let = n % {self.count} * {self.rows}",
                f"rows: T.let = T.min({self.rows}, {self.all_rows} - first)",
            )
            yield


def zero(text: Text, name: str, elems: int, vector: int, dtype: str = "float32") -> None:
    with text.nest(f"for j in T.unroll({elems // vector})", f"for i in T.vectorized({vector})"):
        text(f"{name}[j * {vector} + i] = T.{dtype}(0)")


def fold(text: Text, sums: int, vector: int, of: str = "") -> None:
    """Adds the float32 `partial` (sums, UNROLL, vector) to the float64 `total` (sums, vector), which holds all rows so
    far. of: what their names end with."""
    with text.nest(f"for s in T.unroll({sums})", f"for j in T.unroll({UNROLL})", f"for i in T.vectorized({vector})"):
        text(
            f"total{of}[s * {vector} + i] = total{of}[s * {vector} + i] + T.cast(partial{of}[s * {UNROLL * vector} + "
            f'j * {vector} + i], "float64")'
        )


def channel_sums(text: Text, chunks: Chunks, images: dict[str, Image], sums: int, body: Body) -> None:
    """Fills the float64 `chunk_sums` (channels * chunks, sums): `body` adds to `partial` (sums, UNROLL, vector) along
    each row."""
    image, vector = chunks.image, chunks.image.floats
    text.local("partial", sums * UNROLL * vector)
    text.local("total", sums * vector, "float64")
    zero(text, "total", sums * vector, vector, "float64")
    with text.nest("for r in T.serial(rows)"):
        chunks.set_row(text, "first + r", images)
        zero(text, "partial", sums * UNROLL * vector, vector)
        walk_row(text, image, body)
        fold(text, sums, vector)
    with text.nest(f"for s in T.unroll({sums})"):
        text(f"chunk_sums[n * {sums} + s] = T.float64(0)")
        with text.nest(f"for i in T.serial({vector})"):
            text(f"chunk_sums[n * {sums} + s] = chunk_sums[n * {sums} + s] + total[s * {vector} + i]")
