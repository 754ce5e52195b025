"""Sum of two activations of one size, where no batch_norm could take it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mest_compile.operators.image import ImageCopy
from mest_compile.registry import operator
from mest_compile.spec import Image, Node


@dataclass(frozen=True, slots=True)
class AddForward:
    """Kernel "add.forward": a (a.elems,), b (b.elems,), y (y.elems,)."""

    a: Image
    b: Image
    y: Image


def forward_reference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) + b


@operator("add")
class Add:
    """Its gradient goes to both inputs as it is."""

    def forward(self, node: Node, low: Any) -> None:
        a, b = (low.value(name) for name in node.inputs)
        y = low.output(node)
        low.call("add.forward", AddForward(a.image, b.image, y.image), a, b, y)

    def backward(self, node: Node, low: Any) -> None:
        dy = low.gradient(node)
        names = [name for name in node.inputs if low.needs_gradient(name)]
        # The last one may adopt dy, because later contributions may then be added to dy in place.
        for name in names:
            if name is names[-1] and low.adopt(name, dy):
                continue
            result, accumulate = low.contribute(name)
            low.call("image.copy", ImageCopy(dy.image, result.image, accumulate), dy, result)
