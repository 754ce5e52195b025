"""(C, H, W) to C * H * W channels of one pixel, in torch's order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mest_compile.registry import operator
from mest_compile.spec import Image, Node


@dataclass(frozen=True, slots=True)
class Flatten:
    """Kernel "flatten.forward": x (x.elems,), y (y.elems,); "flatten.backward": dy (y.elems,), dx (x.elems,).

    accumulate  backward only: dx +=
    """

    x: Image
    y: Image
    accumulate: bool = False


def forward_reference(x: np.ndarray) -> np.ndarray:
    """(C * H * W, 1, 1, N) of x (C, H, W, N)."""
    return x.reshape(-1, 1, 1, x.shape[-1])


@operator("flatten")
class FlattenOperator:
    def forward(self, node: Node, low: Any) -> None:
        x = low.value(node.inputs[0])
        if x.image.height == x.image.width == 1:
            low.alias(node, node.inputs[0])
            return
        y = low.output(node)
        low.call("flatten.forward", Flatten(x.image, y.image), x, y)

    def backward(self, node: Node, low: Any) -> None:
        x = low.value(node.inputs[0])
        if x.image.height == x.image.width == 1 or not low.needs_gradient(node.inputs[0]):
            return
        dy = low.gradient(node)
        dx, accumulate = low.contribute(node.inputs[0])
        low.call("flatten.backward", Flatten(dx.image, dy.image, accumulate), dy, dx)
