"""Transposed convolution: the input gradient of a convolution as a forward pass. That convolution is its input
gradient, and its weight gradient is the convolution's with source and result exchanged.
"""

from __future__ import annotations

from typing import Any

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _is_stored, _pair, _shape, padding_attrs, reads
from mest_compile.ir.arrangement import Arrangement, image_shape
from mest_compile.ir.graph import Node
from mest_compile.operators.layers.bias import BiasGradient
from mest_compile.operators.layers.family import FAMILIES
from mest_compile.operators.layers.gather_family import GatherFamily, forward_problem, gradient_problem
from mest_compile.operators.layers.geometry import gradient_halo, source_halo
from mest_compile.operators.operator import Operator, Trace, operator
from mest_compile.sparsity.layer import Layer


def _kernels(layer: Layer) -> GatherFamily:
    found = FAMILIES.find(layer.kernels)
    assert isinstance(found, GatherFamily), f"{layer.spec.name}: {layer.kernels} takes no transposed convolution"
    return found


@operator("conv_transpose2d")
class ConvTranspose2d(Operator):
    """At the live units. Saves its input, which the layer before keeps anyway. attrs: as conv2d's."""

    def source_halo(self, node: Node, low: Trace) -> tuple[int, int, int, int]:
        return gradient_halo(low.layer(node).spec)

    def gradient_halo(self, node: Node, low: Trace) -> tuple[int, int, int, int]:
        return source_halo(low.layer(node).spec)

    def forward(self, node: Node, low: Trace) -> None:
        layer, x, y = low.layer(node), low.value(node.inputs[0]), low.output(node)
        bias = (low.parameter(node, "bias"),) if "bias" in node.params else ()
        kernels, problem = _kernels(layer), gradient_problem(layer, x.image, y.image, False, bool(bias))
        kernels.hold(layer, low, "", "values")  # of which what is read here is a copy
        values = kernels.transposed(layer, low, node.name)
        index = kernels.index_arrays(layer, problem, low, "transposed_")
        low.call("gather.conv", problem, *index, values, *bias, x, y, node=node.name, phase="forward")

    def backward(self, node: Node, low: Trace) -> None:
        layer, x, dy = low.layer(node), low.value(node.inputs[0]), low.gradient(node)
        kernels, trains = _kernels(layer), low.trains(node, "weight")
        if trains:
            gradients = kernels.hold(layer, low, "gradient", "gradients")
            kernels.grad_weight(layer, dy, x, gradients, low, node.name)
        if low.trains(node, "bias"):
            found = low.parameter_gradient(node, "bias")
            low.call("bias.gradient", BiasGradient(dy.image), dy, found, node=node.name, phase="grad_bias")
        if low.needs_gradient(node.inputs[0]):
            dx, accumulate = low.contribute(node.inputs[0])
            problem = forward_problem(layer, dy.image, dx.image, accumulate=accumulate)
            index, values = kernels.index_arrays(layer, problem, low), kernels.hold(layer, low, "", "values")
            low.call("gather.conv", problem, *index, values, dy, dx, node=node.name, phase="grad_input")
        if trains:
            kernels.update(layer, low)

    def onnx(self, node: Node, writer: Writer) -> str:
        (x,), weight, bias = writer.inputs(node), writer.weight(node.params["weight"]), writer.parameters(node, "bias")
        series = len(writer.weights[weight].shape) == 3
        start, stride = node.attrs["padding"], node.attrs["stride"]
        end, apart = node.attrs.get("padding_end", start), node.attrs.get("dilation", (1, 1))
        taps = image_shape(writer.weights[weight].shape)[2:]
        sizes = zip(node.shape[2:], writer.shape(x)[2:], taps, stride, apart, start, end, strict=True)
        more = [made - (given - 1) * step + a + b - (k - 1) * d - 1 for made, given, k, step, d, a, b in sizes]
        attrs: dict[str, Any] = {"strides": stride[series:], "pads": [*start[series:], *end[series:]]}
        attrs |= {"output_padding": more[series:], "dilations": apart[series:], "group": node.attrs.get("groups", 1)}
        if not series:
            return writer.call("ConvTranspose", [x, weight, *bias], node.shape, **attrs)
        row = (*node.shape[:2], node.shape[3])
        made = writer.call("ConvTranspose", [writer.squeezed(x), weight, *bias], row, **attrs)
        return writer.call("Unsqueeze", [made, writer.axis(2)], node.shape)


@reads(
    "relax.nn.conv2d_transpose",
    "relax.nn.conv1d_transpose",
    gives=("conv_transpose1d", "conv_transpose2d"),
)
def read_conv_transpose(reader: Reader, call: Any, arguments: list) -> Any:
    """One of a series convolves one row."""
    attrs, weight = call.attrs, arguments[1]
    image, shape = reader.image(arguments[0]), image_shape(_shape(call))
    if not _is_stored(weight):
        raise reader.error("conv_transpose with a computed weight")
    series = len(attrs.strides) == 1
    stride, dilation = (_pair((1, *sizes) if series else sizes) for sizes in (attrs.strides, attrs.dilation))
    how: dict[str, Any] = {"stride": stride, **padding_attrs(attrs.padding)}
    if int(attrs.groups) != 1:
        how["groups"] = int(attrs.groups)
    if dilation != (1, 1):
        how["dilation"] = dilation
    made = reader.add("conv_transpose2d", (image,), shape, {"weight": weight.name}, how)
    return reader.viewed(made, Arrangement.plain(_shape(call)))
