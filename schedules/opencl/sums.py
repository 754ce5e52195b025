"""Sums over the pixels and examples of each channel on OpenCL: chunks in work-groups, then their sums in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.schedules.opencl.text import DeviceText, vector_type, whole_groups, zeros

ENOUGH_GROUPS = 64  # work-groups that keep every core of a phone's GPU busy: the largest have 24


def tree(text: DeviceText, sums: int, size: int) -> None:
    """Adds up the elements of each of `shared_0`, ..., `sums` in all, into its first. All threads must come here."""
    stride = size // 2
    text.barrier()
    while stride:
        with text.nest(f"if lane < {stride}"):
            text(*(f"shared_{s}[lane] = shared_{s}[lane] + shared_{s}[{stride} + lane]" for s in range(sums)))
        text.barrier()
        stride //= 2


def lane_of(value: str, lane: int, vector: int) -> str:
    """One lane of a vector that is at hand: a private element, because it is named as often as it is used."""
    return f"T.Shuffle([{value}], [{lane}])" if vector > 1 else value


def fold(value: str, vector: int) -> str:
    """The sum of the lanes of a vector that is at hand, pairwise."""
    parts = [lane_of(value, lane, vector) for lane in range(vector)]
    while len(parts) > 1:
        parts = [f"({' + '.join(parts[i : i + 2])})" for i in range(0, len(parts), 2)]
    return parts[0]


def _segments(count: int, size: int) -> int:
    """Threads that work on each of `count` sums in the tree's middle: a power of two."""
    segments = 1
    while segments * 2 * count <= size and segments * segments < size:
        segments *= 2
    return segments


def declare_totals(text: DeviceText, count: int, size: int) -> None:
    """Local memory of `totals`."""
    text.shared(1, count * size, "float32")
    text(f'middle = T.alloc_buffer(({count * _segments(count, size)},), "float32", scope="shared")')


def totals(
    text: DeviceText,
    count: int,
    size: int,
    vector: int,
    store: Callable[[str, str], list[str]],
    guard: Callable[[str], str],
) -> None:
    """Adds up the private vectors `sums` (count,) over their lanes and over the group's threads. All threads must come
    here.

    A thread adds up its lanes, then some threads a sum add up every so many of these, then one thread a sum: three
    levels, of which each has about as much to do, and two barriers; halving from 64 threads to one takes seven.
    store(e, value) gives the statements that keep sum e; guard(e), the condition that it is kept.
    """
    segments = _segments(count, size)
    text(*(f"shared_0[{e * size} + lane] = {fold(f'sums[{e}]', vector)}" for e in range(count)))
    text.barrier()
    text.private("total", 1)

    def level(items: int, body: Callable[[], None]) -> None:
        with text.nest(f"for round in T.serial({-(-items // size)})"):
            text(f"item: T.let = round * {size} + lane")
            with text.nest(f"if item < {items}"):
                text("total[0] = T.float32(0)")
                body()

    def middle() -> None:
        part = f"shared_0[item // {segments} * {size} + k * {segments} + item % {segments}]"
        with text.nest(
            f"for k in T.serial({-(-size // segments)})",
            *([] if size % segments == 0 else [f"if k * {segments} + item % {segments} < {size}"]),
        ):
            text(f"total[0] = total[0] + {part}")
        text("middle[item] = total[0]")

    def last() -> None:
        with text.nest(f"for k in T.serial({segments})"):
            text(f"total[0] = total[0] + middle[item * {segments} + k]")
        with text.nest(f"if {guard('item')}"):
            text(*store("item", "total[0]"))

    level(count * segments, middle)
    text.barrier()
    level(count, last)
    text.barrier()


@dataclass(frozen=True, slots=True)
class ChannelSums:
    """How a sum over a channel is cut. `collect` leaves each chunk's sums in scratch memory, `join` adds a channel's
    up."""

    image: Image
    target: Target

    @property
    def vectors(self) -> int:
        """Vectors of pixels of a channel, all slices."""
        return self.image.slices * self.image.height * self.image.width

    @property
    def size(self) -> int:
        """Threads of a work-group."""
        return whole_groups(self.vectors, self.target.limits.threads)

    @property
    def share(self) -> int:
        """Vectors of a chunk; the last one of a channel may have fewer."""
        chunks = min(-(-ENOUGH_GROUPS // self.image.channels), -(-self.vectors // self.size))
        return -(-self.vectors // chunks)

    @property
    def count(self) -> int:
        """Chunks of a channel."""
        return -(-self.vectors // self.share)

    def walk(self, text: DeviceText, body: Callable[[], list[str]], condition: str = "") -> None:
        """`body` at every vector of chunk `block`, if `condition` holds: sets `plane`, `h`, `w`. Neighbouring threads
        take neighbouring pixels.
        """
        image, pixels = self.image, self.image.height * self.image.width
        with text.nest(f"for turn in T.serial({-(-self.share // self.size)})"):
            text(
                f"inside: T.let = turn * {self.size} + lane",
                f"place: T.let = block % {self.count} * {self.share} + inside",
            )
            with text.nest(
                f"if {' and '.join([f'inside < {self.share}', f'place < {self.vectors}', *filter(None, [condition])])}"
            ):
                text(
                    f"plane: T.let = place // {pixels} * {image.channels} + block // {self.count}",
                    f"h: T.let = place % {pixels} // {image.width}",
                    f"w: T.let = place % {image.width}",
                )
                text(*body())

    def start(self, text: DeviceText, sums: int) -> None:
        """Sets the private vectors `sums` to 0."""
        with text.nest(f"for s in T.unroll({sums})"):
            text(f"sums[s] = {zeros(self.image.vector)}")

    def share_out(self, text: DeviceText, sums: int) -> None:
        """Brings the group's totals to the first elements of `shared_0`, ..."""
        text(*(f"shared_{s}[lane] = sums[{s}]" for s in range(sums)))
        tree(text, sums, self.size)

    def collect(
        self,
        text: DeviceText,
        sums: int,
        body: Callable[[], list[str]],
        before: tuple[str, ...] = (),
        condition: str = "",
    ) -> None:
        """A device kernel in which `body` adds to the private vectors `sums`; fills the scratch array `chunk_sums`."""
        vector = self.image.vector
        text.scratch("chunk_sums", self.image.channels * self.count * sums)
        with text.groups(self.size, self.image.channels * self.count):
            text.private("sums", sums, vector_type(vector))
            text.shared(sums, self.size, vector_type(vector))
            text(f"c: T.let = block // {self.count}", *before)
            self.start(text, sums)
            self.walk(text, body, condition)
            self.share_out(text, sums)
            with text.nest("if lane == 0"):
                for s in range(sums):
                    text(
                        f"sums[{s}] = shared_{s}[0]", f"chunk_sums[block * {sums} + {s}] = {fold(f'sums[{s}]', vector)}"
                    )

    def join(self, text: DeviceText, sums: int, channel: str) -> None:
        """Sets the private `joined` (sums,) to the sums of a channel."""
        text.private("joined", sums)
        with text.nest(f"for s in T.unroll({sums})"):
            text("joined[s] = T.float32(0)")
        with text.nest(f"for k in T.serial({self.count})", f"for s in T.unroll({sums})"):
            text(f"joined[s] = joined[s] + chunk_sums[({channel} * {self.count} + k) * {sums} + s]")

    def collect_exactly(
        self, text: DeviceText, body: Callable[[], list[str]], before: tuple[str, ...] = (), condition: str = ""
    ) -> None:
        """As `collect`, of two sums, of which float32 leaves nothing out of the first: `body` adds to `sums[0]`, with
        `add_exactly`, and to `sums[1]`; what the first leaves out is `sums[2]`. `join_exactly` adds a channel's up.
        """
        vector, segments = self.image.vector, _segments(1, self.size)
        text.scratch("chunk_sums", self.image.channels * self.count * 4)
        with text.groups(self.size, self.image.channels * self.count):
            text.private("sums", 3, vector_type(vector))
            text.private("joined", 4)
            text.shared(4, self.size, "float32")
            text(f'middle = T.alloc_buffer(({4 * segments},), "float32", scope="shared")')
            text(f"c: T.let = block // {self.count}", *before)
            self.start(text, 3)
            self.walk(text, body, condition)
            text("joined[0] = T.float32(0)", f"joined[2] = {fold('sums[2]', vector)}")
            for lane in range(vector):
                text(*add_exactly("joined[0]", "joined[2]", lane_of("sums[0]", lane, vector), f"_{lane}"))
            text(f"joined[1] = {fold('sums[1]', vector)}", "joined[3] = T.abs(joined[0])")
            text(*(f"shared_{s}[lane] = joined[{s}]" for s in range(4)))
            text.barrier()
            with text.nest(f"if lane < {segments}"):
                _join(text, self.size // segments, lambda s: f"shared_{s}[k * {segments} + lane]")
                text(*(f"middle[{s * segments} + lane] = joined[{s}]" for s in range(4)))
            text.barrier()
            with text.nest("if lane == 0"):
                _join(text, segments, lambda s: f"middle[{s * segments} + k]")
                text(*(f"chunk_sums[block * 4 + {s}] = joined[{s}]" for s in range(4)))

    def join_exactly(self, text: DeviceText, channel: str) -> None:
        """Sets the private `joined` (4,) to a channel's two sums, what float32 leaves out of the first, and the sum of
        its threads' absolute values, which is hardly below that of any term."""
        text.private("joined", 4)
        _join(text, self.count, lambda s: f"chunk_sums[({channel} * {self.count} + k) * 4 + {s}]")


def add_exactly(total: str, rest: str, value: str, tag: str = "") -> list[str]:
    """Statements: adds `value` to `total`, and to `rest` what rounding left out (Knuth's two-sum).

    tag  ends the names of what is between, where several stand in one block
    """
    added, result, part = f"added{tag}", f"result{tag}", f"part{tag}"
    return [
        f"{added}: T.let = {value}",
        f"{result}: T.let = {total} + {added}",
        f"{part}: T.let = {result} - {total}",
        f"{rest} = {rest} + (({total} - ({result} - {part})) + ({added} - {part}))",
        f"{total} = {result}",
    ]


def _join(text: DeviceText, items: int, part: Callable[[int], str]) -> None:
    """Sets the private `joined` (4,) to the sums of part(s) over `items` k."""
    text(*(f"joined[{s}] = T.float32(0)" for s in range(4)))
    with text.nest(f"for k in T.serial({items})"):
        text(*(f"joined[{s}] = joined[{s}] + {part(s)}" for s in (1, 2, 3)))
        text(*add_exactly("joined[0]", "joined[2]", part(0)))
