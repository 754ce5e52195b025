"""Softmax over the channels of every pixel, where it is not an attention's: y = exp(x) / the sum of all exp(x)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, reads
from mest_compile.frontend.values import Scores
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.attention_reading import shared
from mest_compile.operators.operator import Operator, Trace, operator


@dataclass(frozen=True, slots=True)
class Softmax:
    """Kernel "softmax.forward": x (x.elems,), y (y.elems,)."""

    x: Image
    y: Image


@dataclass(frozen=True, slots=True)
class SoftmaxBackward:
    """Kernel "softmax.backward": dy (dy.elems,), y (y.elems,), dx (dx.elems,). accumulate: dx += instead."""

    dy: Image
    y: Image
    dx: Image
    accumulate: bool = False


def forward_reference(x: np.ndarray) -> np.ndarray:
    """(C, H, W, N) in float64."""
    with np.errstate(invalid="ignore"):
        powers = np.exp(x.astype(np.float64) - x.max(0, keepdims=True))
        return powers / powers.sum(0, keepdims=True)


def backward_reference(dy: np.ndarray, y: np.ndarray) -> np.ndarray:
    """dx (C, H, W, N) in float64."""
    y = y.astype(np.float64)
    return y * (dy - (dy * y).sum(0, keepdims=True))


@operator("softmax")
class SoftmaxOperator(Operator):
    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        low.call("softmax.forward", Softmax(x.image, y.image), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        if low.needs_gradient(node.inputs[0]):
            dy, y = low.gradient(node), low.value(node.name)
            dx, accumulate = low.contribute(node.inputs[0])
            low.call("softmax.backward", SoftmaxBackward(dy.image, y.image, dx.image, accumulate), dy, y, dx)

    def onnx(self, node: Node, writer: Writer) -> str:
        return writer.call("Softmax", writer.inputs(node), node.shape, axis=1)


@reads("relax.nn.softmax", gives=("softmax",), scores=True)
def read_softmax(reader: Reader, call: Any, arguments: list) -> Any:
    """Over any axis, which is then the channels of an image; or of attention's scores."""
    if isinstance(arguments[0], Scores) and (shares := shared(reader, call, arguments[0])) is not None:
        return shares
    value = reader.seen(arguments[0])
    rank = len(value.shape)
    axis = int(call.attrs.axis) % rank
    if axis == 0:
        raise reader.error("softmax over examples")
    order = [*(place for place in range(rank) if place != axis), axis]
    turned = reader.viewed(reader.bare(value), reader.arrangement(value).permuted(order))
    image, arrangement = reader.channels_last(turned)
    back = [order.index(place) for place in range(rank)]
    return reader.viewed(reader.add("softmax", (image,), image.shape), arrangement.permuted(back))
