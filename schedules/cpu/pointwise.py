"""Elementwise kernels and the gradient of a bias, on a CPU."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.activation import (
    ACTIVATIONS,
    FORMULA,
    ActivationBackward,
    ActivationForward,
    activation_of,
)
from mest_compile.operators.add import AddForward
from mest_compile.operators.layers.bias import BiasGradient
from mest_compile.schedules.cpu.rows import (
    Chunks,
    array,
    buffer,
    channel_sums,
    pointwise,
    spelled,
    widened,
)


def _activation_kernels(name: str) -> None:
    @schedule(f"{name}.forward", device="cpu")
    def forward(problem: ActivationForward, target: Target) -> str:
        row = activation_of(getattr(problem, "formula", name))
        return pointwise({"x": problem.x, "y": problem.y}, "y", spelled(row.formula, x="{x}"))

    @schedule(f"{name}.backward", device="cpu")
    def backward(problem: ActivationBackward, target: Target) -> str:
        row = activation_of(getattr(problem, "formula", name))
        source = "y" if row.from_result else "x"
        images = {"dy": problem.dy, source: problem.source, "dx": problem.dx}
        return pointwise(images, "dx", spelled(row.gradient, x=f"{{{source}}}", dy="{dy}"), problem.accumulate)


for each in (*ACTIVATIONS.load(), FORMULA):
    _activation_kernels(each)


@schedule("add.forward", device="cpu")
def add_forward(problem: AddForward, target: Target) -> str:
    return pointwise({"a": problem.a, "b": problem.b, "y": problem.y}, "y", "{a} + {b}")


@schedule("bias.gradient", device="cpu")
def bias_gradient(problem: BiasGradient, target: Target) -> str:
    image, chunks = problem.dy, Chunks(problem.dy)
    text = Text(array("dy", image), buffer("dbias", image.channels))
    text(f'chunk_sums = T.alloc_buffer(({image.channels * chunks.count},), "float64")')
    with chunks.each(text):
        channel_sums(
            text,
            chunks,
            {"dy": image},
            1,
            lambda at, slot, live: [f"partial[{slot}] = partial[{slot}] + {widened(image, f'dy[dy_row + {at}]')}"],
        )
    with text.nest(f"for c in T.serial({image.channels})"):
        text.local("joined", 1, "float64")
        text("joined[0] = T.float64(0)")
        with text.nest(f"for k in T.serial({chunks.count})"):
            text(f"joined[0] = joined[0] + chunk_sums[c * {chunks.count} + k]")
        text('dbias[c] = T.cast(joined[0], "float32")')
    return str(text)
