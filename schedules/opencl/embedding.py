"""Rows of a table on OpenCL: a thread for each number that is taken, and for gradients one for each number of the
table, which looks at all that name its row: nothing is scattered, so nothing needs an atomic."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.embedding import Embedding, EmbeddingBackward
from mest_compile.schedules.opencl.text import DeviceText, scalars


def _set_row(text: DeviceText, x: Image, rows: int) -> None:
    """Sets `row`, which pixel `k` of the example in lane `i` of slice `s` names."""
    named = f"x[(s * {x.channels} + k) * {x.channel_elems} + {x.origin} + i]"
    text(f'row: T.let = T.min(T.max(T.cast({named}, "int32"), 0), {rows - 1})')


@schedule("embedding.forward", device="opencl")
def embedding_forward(problem: Embedding, target: Target) -> str:
    x, y, rows = problem.x, problem.y, problem.rows
    text = DeviceText(scalars("x", x.elems), scalars("weight", rows * y.channels), scalars("y", y.elems))
    inner = x.channels * y.vector
    with text.each(y.slices * y.channels * inner, target.limits.threads):
        text(
            f"s: T.let = n // {y.channels * inner}",
            f"c: T.let = n // {inner} % {y.channels}",
            f"k: T.let = n // {y.vector} % {x.channels}",
            f"i: T.let = n % {y.vector}",
        )
        _set_row(text, x, rows)
        at = f"(s * {y.channels} + c) * {y.channel_elems} + {y.origin} + k * {y.vector} + i"
        text(f"y[{at}] = weight[row * {y.channels} + c]")
    return str(text)


@schedule("embedding.backward", device="opencl")
def embedding_backward(problem: EmbeddingBackward, target: Target) -> str:
    x, dy, rows = problem.x, problem.dy, problem.rows
    text = DeviceText(scalars("dy", dy.elems), scalars("x", x.elems), scalars("dweight", rows * dy.channels))
    with text.each(rows * dy.channels, target.limits.threads):
        text(f"mine: T.let = n // {dy.channels}", f"c: T.let = n % {dy.channels}")
        text.private("total", 1)
        text("total[0] = T.float32(0)")
        loops = (f"for s in T.serial({x.slices})", f"for k in T.serial({x.channels})", f"for i in T.serial({x.vector})")
        with text.nest(*loops):
            _set_row(text, x, rows)
            with text.nest("if row == mine" + (f" and row != {problem.padding}" if problem.padding >= 0 else "")):
                at = f"(s * {dy.channels} + c) * {dy.channel_elems} + {dy.origin} + k * {dy.vector} + i"
                text(f"total[0] = total[0] + dy[{at}]")
        text("dweight[n] = total[0]")
    return str(text)
