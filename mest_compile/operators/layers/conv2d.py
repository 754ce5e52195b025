"""Convolution and linear layers in the training graph; their kernels are those of the family that the layer's scheme
names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _is_stored, _pair, _shape, padding_attrs, reads
from mest_compile.frontend.values import Fixed, Parameter
from mest_compile.ir.arrangement import Arrangement, image_shape, whole
from mest_compile.ir.graph import Node
from mest_compile.operators.attention_reading import product
from mest_compile.operators.chain import chain_of
from mest_compile.operators.layers.family import FAMILIES, KernelFamily
from mest_compile.operators.layers.geometry import gradient_halo, grid_abreast, reads_combed, source_halo
from mest_compile.operators.operator import Operator, Trace, operator
from mest_compile.operators.pad import without_padding

if TYPE_CHECKING:
    from mest_compile.ir.program import Buffer


def _kernels(node: Node, low: Trace) -> KernelFamily:
    return FAMILIES.find(low.layer(node).kernels)


@operator("conv2d")
class Conv2d(Operator):
    """Forward, input gradient and weight gradient at the live units. Saves its input, which the layer before keeps
    anyway."""

    def source_halo(self, node: Node, low: Trace) -> tuple[int, int, int, int]:
        spec = low.layer(node).spec
        if not _kernels(node, low).by_rows:
            return source_halo(spec)
        if reads_combed(spec, low.target):  # a copy with a halo of its own
            return (0, 0, 0, 0)
        return source_halo(spec, low.target.abreast(spec.output_size[1]))

    def gradient_halo(self, node: Node, low: Trace) -> tuple[int, int, int, int]:
        if chain_of(node, low) or not low.needs_gradient(node.inputs[0]):
            return (0, 0, 0, 0)
        spec = low.layer(node).spec
        return gradient_halo(spec, grid_abreast(spec, low.target) if _kernels(node, low).by_rows else 1)

    def forward(self, node: Node, low: Trace) -> None:
        _kernels(node, low).forward(node, low)

    def recompute(self, node: Node, low: Trace) -> None:
        _kernels(node, low).recompute(node, low)

    def backward(self, node: Node, low: Trace) -> None:
        _kernels(node, low).backward(node, low)

    def written(self, node: Node, low: Trace) -> Buffer | None:
        """Flags (channels,) of the channels of its value that are written; None: all are."""
        return _kernels(node, low).written(node, low)

    def read(self, node: Node, low: Trace) -> Buffer | None:
        """Flags (channels,) of the channels of its input that it reads; None: all."""
        return _kernels(node, low).read(node, low)

    def onnx(self, node: Node, writer: Writer) -> str:
        (x,), weight, bias = writer.inputs(node), writer.weight(node.params["weight"]), writer.parameters(node, "bias")
        series = len(writer.weights[weight].shape) == 3  # of one row, as ONNX convolves those that have no rows
        start = node.attrs["padding"]
        sides = [*start[series:], *node.attrs.get("padding_end", start)[series:]]
        attrs = {"strides": node.attrs["stride"][series:], "pads": sides}
        if "groups" in node.attrs:
            attrs["group"] = node.attrs["groups"]
        if "dilation" in node.attrs:
            attrs["dilations"] = node.attrs["dilation"][series:]
        if series:
            row = (*node.shape[:2], node.shape[3])
            made = writer.call("Conv", [writer.squeezed(x), weight, *bias], row, **attrs)
            return writer.call("Unsqueeze", [made, writer.axis(2)], node.shape)
        if not bias or len(writer.weights[bias[0]].shape) == 1:
            return writer.call("Conv", [x, weight, *bias], node.shape, **attrs)
        # A bias with the axes of an image, which came from an ONNX file, is none of Conv's.
        return writer.call("Add", [writer.call("Conv", [x, weight], node.shape, **attrs), *bias], node.shape)


@operator("linear")
class Linear(Conv2d):
    """A 1x1 convolution, of one pixel or more."""

    def onnx(self, node: Node, writer: Writer) -> str:
        inputs = [*writer.inputs(node), *writer.parameters(node, "weight", "bias")]
        if len(node.shape) == 2:
            return writer.call("Gemm", inputs, node.shape, transB=1)
        (value, weight, *bias), (batch, outputs, *pixels) = inputs, node.shape
        held, last = writer.weights[weight].shape, (batch, *pixels, outputs)
        value = writer.call("Transpose", [value], (batch, *pixels, held[1]), perm=(0, 2, 3, 1))
        value = writer.call("MatMul", [value, writer.turned(weight)], last)
        if bias:
            value = writer.call("Add", [value, *bias], last)
        return writer.call("Transpose", [value], node.shape, perm=(0, 3, 1, 2))


@reads("relax.nn.conv2d", gives=("conv2d",))
def read_conv2d(reader: Reader, call: Any, arguments: list) -> Any:
    attrs, weight = call.attrs, arguments[1]
    image = reader.activation(arguments[0])
    if not _is_stored(weight):
        raise reader.error("conv2d with a computed weight")
    image, around = without_padding(reader, image)
    sides = [int(size) + more for size, more in zip(attrs.padding, around, strict=True)]
    how: dict[str, Any] = {"stride": _pair(attrs.strides), **padding_attrs(sides)}
    if int(attrs.groups) != 1:
        how["groups"] = int(attrs.groups)
    if _pair(attrs.dilation) != (1, 1):
        how["dilation"] = _pair(attrs.dilation)
    return reader.add("conv2d", (image,), _shape(call), {"weight": weight.name}, how)


@reads("relax.nn.conv1d", gives=("conv1d",))
def read_conv1d(reader: Reader, call: Any, arguments: list) -> Any:
    """A convolution of one row."""
    attrs, weight = call.attrs, arguments[1]
    image, shape = reader.image(arguments[0]), _shape(call)
    if not _is_stored(weight):
        raise reader.error("conv1d with a computed weight")
    image, (top, left, bottom, right) = without_padding(reader, image)
    before, after = (int(size) for size in attrs.padding)
    sides = padding_attrs((top, before + left, bottom, after + right))
    how: dict[str, Any] = {"stride": (1, int(attrs.strides[0])), **sides}
    if int(attrs.groups) != 1:
        how["groups"] = int(attrs.groups)
    if int(attrs.dilation[0]) != 1:
        how["dilation"] = (1, int(attrs.dilation[0]))
    made = reader.add("conv2d", (image,), image_shape(shape), {"weight": weight.name}, how)
    return reader.viewed(made, Arrangement.plain(shape))


@reads("relax.matmul", gives=("linear", "matmul"), scores=True)
def read_matmul(reader: Reader, call: Any, arguments: list) -> Any:
    """A linear layer on the last axis; one of several pixels convolves them one by one."""
    value, weight = arguments
    if not isinstance(weight, Parameter) or len(reader.state_shapes[weight.name]) != 2:
        if isinstance(weight, Fixed):
            raise reader.error("linear with a weight that is no parameter")
        return product(reader, value, weight)
    features, arrangement = reader.channels_last(reader.seen(value))
    if weight.form == "" and weight.name not in reader.transposed:
        if not reader.may_transpose:
            raise reader.error(f"matmul with {weight.name} stored as (in, out)")
        reader.transposed.add(weight.name)
        reader.state_shapes[weight.name] = reader.state_shapes[weight.name][::-1]
    outputs = reader.state_shapes[weight.name][0]
    shape = (features.shape[0], outputs, *features.shape[2:])
    made = reader.add("linear", (features,), shape, {"weight": weight.name})
    return reader.viewed(made, Arrangement((*arrangement.axes[:-1], whole(shape)["C"])))
