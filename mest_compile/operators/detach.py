"""A value through which no gradient flows: torch's `detach`, and what was computed under `no_grad`."""

from __future__ import annotations

from typing import Any

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, reads
from mest_compile.frontend.values import Parameter
from mest_compile.ir.graph import Node
from mest_compile.operators.operator import Halo, Operator, Trace, operator


@operator("detach")
class Detach(Operator):
    """The value of its input, in its place in memory. What reads it contributes nothing to a gradient, so nothing comes
    back."""

    def source_halo(self, node: Node, low: Trace) -> Halo:
        return low.value_halo(node.name)

    def forward(self, node: Node, low: Trace) -> None:
        low.alias(node, node.inputs[0])

    def backward(self, node: Node, low: Trace) -> None:
        """Nothing: the gradient at hand is that of others who read the input."""

    def onnx(self, node: Node, writer: Writer) -> str:
        (value,) = writer.inputs(node)
        return value


@reads("relax.grad.no_grad", gives=("detach",), pointwise=True)
def read_no_grad(reader: Reader, call: Any, arguments: list) -> Any:
    value = arguments[0]
    if isinstance(value, Parameter):
        reader.detached.add(value.name)
        return value
    value = reader.activation(value)
    return value if value.draft < 0 else reader.add("detach", (value,), value.shape)
