"""Products of matrices on a CPU: a tile of rows and columns at a time, vectors of examples throughout."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.matmul import Product
from mest_compile.schedules.cpu.rows import array, loop, narrowed, widened, zero

ROWS, COLUMNS = 2, 4  # of a tile: eight sums and what they are made of fit sixteen registers


def _tiles(size: int, most: int) -> list[tuple[str, int, int]]:
    """(variable's loop, tiles of it, size) of whole tiles and of one that is left over."""
    whole, rest = divmod(size, most)
    return [(f"* {most}", whole, most)] * (whole > 0) + [(f"+ {whole * most}", 1, rest)] * (rest > 0)


@schedule("matmul.forward", device="cpu")
def matmul(problem: Product, target: Target) -> str:
    images = {"a": problem.a, "b": problem.b, "y": problem.y}
    y, vector = problem.y, problem.y.vector

    def at(name: str, row: str, column: str) -> str:
        one = images[name]
        return f"{name}[{name}_first + ({row}) * {one.row_elems} + ({column}) * {one.vector} + i]"

    def read(name: str, row: str, column: str, turned: bool) -> str:
        return widened(images[name], at(name, column, row) if turned else at(name, row, column))

    text = Text(*(array(name, one) for name, one in images.items()))
    work = y.elems * problem.depth
    lanes = f"for i in T.vectorized({vector})"
    with text.nest(f"for n in {loop(y.slices * y.channels, work)}"):
        for name, one in images.items():
            plane = f"n // {one.channels} * {one.slice_elems} + n % {one.channels} * {one.channel_elems}"
            text(f"{name}_first: T.let = {plane} + {one.origin}")
        for (row, many_rows, rows), (column, many, columns) in (
            (r, c) for r in _tiles(y.height, ROWS) for c in _tiles(y.width, COLUMNS)
        ):
            tile = f"for r in T.unroll({rows})", f"for j in T.unroll({columns})", lanes
            place = f"h {row} + r", f"w {column} + j"
            total = f"total[(r * {columns} + j) * {vector} + i]"
            with text.nest(f"for h in T.serial({many_rows})", f"for w in T.serial({many})"):
                text.local("total", rows * columns * vector)
                zero(text, "total", rows * columns * vector, vector)
                with text.nest(f"for k in T.serial({problem.depth})", *tile):
                    a, b = read("a", place[0], "k", problem.turned[0]), read("b", "k", place[1], problem.turned[1])
                    text(f"{total} = {total} + {a} * {b}")
                with text.nest(*tile):
                    before = f"{widened(y, at('y', *place))} + " if problem.accumulate else ""
                    text(f"{at('y', *place)} = {narrowed(y, before + total)}")
    return str(text)
