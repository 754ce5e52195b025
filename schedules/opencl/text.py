"""Text of OpenCL kernels: what their schedules share.

A slice's vector of examples is one OpenCL vector (float4), so images are declared as arrays of vectors and every
position below counts vectors. Neighbouring threads take neighbouring pixels of a row: their loads stand side by side.
There is no float64 and no atomic: sums go through a tree in local memory, in an order that follows from the sizes
alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from mest_compile.ir import expressions
from mest_compile.ir.expressions import Expression
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.text import Text

POSITION = "plane * {plane} + (h + {top}) * {columns} + w + {left}"


def vector_type(vector: int) -> str:
    return f"float32x{vector}" if vector > 1 else "float32"


def vectors(name: str, elems: int, vector: int) -> str:
    """An argument: a flat array of vectors."""
    return f'{name}: T.Buffer(({elems // vector},), "{vector_type(vector)}")'


def scalars(name: str, elems: int, dtype: str = "float32") -> str:
    """An argument: a flat array of single numbers."""
    return f'{name}: T.Buffer(({elems},), "{dtype}")'


def image(name: str, layout: Image) -> str:
    """An argument: an image as vectors."""
    return vectors(name, layout.elems, layout.vector)


def number(value: float) -> str:
    """A constant, exactly: TVM prints seven digits, and what they do not tell is given by its bits."""
    single = np.float32(value)
    if np.float32(f"{single:.6e}") == single:
        return f"T.float32({float(single)!r})"
    return f'T.call_pure_extern("float32", "as_float", T.uint32({int(single.view(np.uint32))}))'


def full(value: str, vector: int) -> str:
    """A vector whose lanes are all `value`."""
    return f"T.Broadcast({value}, {vector})" if vector > 1 else value


def zeros(vector: int) -> str:
    return full("T.float32(0)", vector)


def infinity(vector: int) -> str:
    return full('T.float32("inf")', vector)


def rectified(value: str, vector: int) -> str:
    """The value, or 0 where it is below; NaN and -0 stay."""
    return spelled(expressions.maximum(0, expressions.Variable("value")), vector, value=value)


# OpenCL's max and min may give either of NaN and a number; here, too, it is the second one where they cannot be
# compared.
SPELLINGS = expressions.SPELLINGS | {
    "maximum": "T.Select({1} < {0}, {0}, {1})",
    "minimum": "T.Select({1} > {0}, {0}, {1})",
}


TANH_IS_ONE = 9.25  # and all above


def spelled(expression: Expression, vector: int, **names: str) -> str:
    """A scalar expression in every lane, of these texts for its variables.

    OpenCL's tanh may fall short of 1 by a few units in the last place, which what is multiplied by 1 - tanh(x)**2 makes
    large: it is 1 here where float32 has nothing below that.
    """

    def constant(value: float) -> str:
        return zeros(vector) if value == 0 else full(number(value), vector)

    near_one = f"T.Select({{0}} < {constant(-TANH_IS_ONE)}, {constant(-1)}, T.tanh({{0}}))"
    tanh = f"T.Select({{0}} > {constant(TANH_IS_ONE)}, {constant(1)}, {near_one})"
    return expression.text(names, constant, SPELLINGS | {"tanh": tanh})


def finite(value: str, otherwise: str = "T.float32(0)") -> str:
    """A single number, or what stands in the place of NaN and infinity."""
    return f'T.Select(T.abs({value}) < T.float32("inf"), {value}, {otherwise})'


def slots(start: str, vector: int) -> str:
    """Index of `vector` single numbers from `start` on."""
    return f"T.Ramp({start}, 1, {vector})" if vector > 1 else start


def only_examples(layout: Image, slice_number: str, value: str) -> str:
    """A vector with 0 in lanes that hold no example."""
    if layout.batch == layout.lanes:
        return value
    vector = layout.vector
    left = full(f'T.cast({layout.batch} - ({slice_number}) * {vector}, "float32")', vector)
    return f"T.Select({left} > T.Ramp(T.float32(0), T.float32(1), {vector}), {value}, {zeros(vector)})"


def plane_vectors(layout: Image) -> int:
    """Vectors of one channel of one slice, halo included."""
    return layout.rows * layout.columns


def at(name: str, layout: Image) -> str:
    """The vector of the pixel (h, w) of `plane`."""
    top, left = layout.halo[:2]
    return f"{name}[{POSITION.format(plane=plane_vectors(layout), top=top, columns=layout.columns, left=left)}]"


def whole_groups(items: int, most: int) -> int:
    """Threads of a work-group: a power of two, at most `most`, not many more than there are items."""
    size = 1
    while size * 2 <= most and size < items:
        size *= 2
    return size


class DeviceText(Text):
    """A kernel that runs as device kernels: every `groups` or `each...` is one, and they run one after another."""

    def __init__(self, *arguments: str):
        super().__init__(*arguments)
        self._scratch: dict[str, tuple[str, int, int]] = {}

    def scratch(self, name: str, elems: int, per_symbol: str = "", dtype: str = "float32") -> None:
        """Global memory between the device kernels of one call: `elems` numbers, or as many for each of a symbol."""
        self._scratch[name] = (per_symbol, elems, 4)
        size = f"{per_symbol} * {elems}" if per_symbol else str(elems)
        self._declared.append(f'{name} = T.alloc_buffer(({size},), "{dtype}")')

    def private(self, name: str, elems: int, dtype: str = "float32") -> None:
        self(f'{name} = T.alloc_buffer(({elems},), "{dtype}", scope="local")')

    def shared(self, arrays: int, elems: int, dtype: str) -> None:
        """Local memory of a work-group: `shared_0`, `shared_1`, ... of `elems` each. TVM would put a barrier, which may
        not stand under a condition, between two statements on one array.
        """
        self(*(f'shared_{i} = T.alloc_buffer(({elems},), "{dtype}", scope="shared")' for i in range(arrays)))

    def barrier(self) -> None:
        self('T.tvm_storage_sync("shared")')

    @contextmanager
    def groups(self, size: int, x: int, y: int = 1, z: int = 1) -> Iterator[None]:
        """A device kernel of x * y * z work-groups of `size` threads: sets `block`, `block_y`, `block_z` where above 1,
        and `lane`."""
        axes = [(axis, name, count) for axis, name, count in (("z", "block_z", z), ("y", "block_y", y)) if count > 1]
        loops = [f'for {name} in T.thread_binding({count}, thread="blockIdx.{axis}")' for axis, name, count in axes]
        with self.nest(
            *loops,
            f'for block in T.thread_binding({x}, thread="blockIdx.x")',
            f'for lane in T.thread_binding({size}, thread="threadIdx.x")',
        ):
            yield

    @contextmanager
    def each(self, count: int, size: int) -> Iterator[None]:
        """A device kernel of one thread for each of `count` items: sets `n`."""
        size = whole_groups(count, size)
        blocks = -(-count // size)
        with self.groups(size, blocks):
            self(f"n: T.let = block * {size} + lane")
            guard = [f"if n < {count}"] if blocks * size != count else []
            with self.nest(*guard):
                yield

    @contextmanager
    def each_of(self, count: str, blocks: int, size: int) -> Iterator[None]:
        """A device kernel whose `blocks` work-groups share as many items as `count` says when it runs: sets `n`."""
        with (
            self.groups(size, blocks),
            self.nest(f"for turn in T.serial(({count} + {blocks * size - 1}) // {blocks * size})"),
        ):
            self(f"n: T.let = turn * {blocks * size} + block * {size} + lane")
            with self.nest(f"if n < {count}"):
                yield

    @contextmanager
    def each_pixel(self, layout: Image, size: int) -> Iterator[None]:
        """A thread for each vector of real pixels: sets `plane` (channel of a slice), `c` (channel), `h` and `w`."""
        pixels = layout.height * layout.width
        with self.each(layout.slices * layout.channels * pixels, size):
            self(
                f"plane: T.let = n // {pixels}",
                f"c: T.let = plane % {layout.channels}",
                f"h: T.let = n % {pixels} // {layout.width}",
                f"w: T.let = n % {layout.width}",
            )
            yield

    @contextmanager
    def each_framed(self, layout: Image, size: int) -> Iterator[str]:
        """As `each_pixel`, the halo's pixels too; gives the condition under which a pixel is real."""
        whole = plane_vectors(layout)
        with self.each(layout.slices * layout.channels * whole, size):
            self(
                f"plane: T.let = n // {whole}",
                f"c: T.let = plane % {layout.channels}",
                f"h: T.let = n % {whole} // {layout.columns} - {layout.halo[0]}",
                f"w: T.let = n % {layout.columns} - {layout.halo[1]}",
            )
            yield f"0 <= h and h < {layout.height} and 0 <= w and w < {layout.width}"

    def head(self) -> tuple[str, str]:
        facts = ", ".join(
            f"{name} {symbol or '-'} {elems * item}" for name, (symbol, elems, item) in self._scratch.items()
        )
        _, attributes = super().head()
        return "@T.prim_func(s_tir=True)", f'{attributes}, "mest.scratch": "{facts}"'
