"""Rectified linear unit, where no batch_norm before it could take it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mest_compile.frontend.relax_graph import Reader, reads
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.operator import Operator, Trace, operator


@dataclass(frozen=True, slots=True)
class ReluForward:
    """Kernel "relu.forward": x (x.elems,), y (y.elems,)."""

    x: Image
    y: Image


@dataclass(frozen=True, slots=True)
class ReluBackward:
    """Kernel "relu.backward": dy (dy.elems,), y (y.elems,), dx (dx.elems,). dx = 0 where y <= 0, else dy: behind a NaN too, as torch
    has it.

    accumulate  dx += instead
    """

    dy: Image
    y: Image
    dx: Image
    accumulate: bool = False


def forward_reference(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, 0, x.astype(np.float64))  # of -0 and NaN torch makes what they are


def backward_reference(dy: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(y <= 0, 0, dy.astype(np.float64))


@operator("relu")
class Relu(Operator):
    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        low.call("relu.forward", ReluForward(x.image, y.image), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        if low.needs_gradient(node.inputs[0]):
            dy, y = low.gradient(node), low.value(node.name)
            dx, accumulate = low.contribute(node.inputs[0])
            low.call("relu.backward", ReluBackward(dy.image, y.image, dx.image, accumulate), dy, y, dx)


@reads("relax.nn.relu")
def read_relu(reader: Reader, call: Any, arguments: list) -> Any:
    image = reader.activation(arguments[0])
    return reader.add("relu", (image,), image.shape)
