"""Products of activations, matrix by matrix, where they are not an attention's: every channel of an example is a
matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mest_compile.base.errors import SpecError
from mest_compile.frontend.onnx_writer import Writer
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.operator import Operator, Trace, operator


@dataclass(frozen=True, slots=True)
class Product:
    """Kernel "matmul.forward": a (a.elems,), b (b.elems,), y (y.elems,): y = a b, channel by channel, of matrices as
    high and wide as the images. Both gradients are such products.

    turned      whether a is transposed first, whether b is
    accumulate  y += instead
    """

    a: Image
    b: Image
    y: Image
    turned: tuple[bool, bool] = (False, False)
    accumulate: bool = False

    def __post_init__(self) -> None:
        (rows, inner), (other, columns) = (
            (one.width, one.height) if turned else (one.height, one.width)
            for one, turned in zip((self.a, self.b), self.turned, strict=True)
        )
        alike = self.a.channels == self.b.channels == self.y.channels
        if not alike or inner != other or (rows, columns) != (self.y.height, self.y.width):
            raise SpecError(f"{self.a} and {self.b}, turned {self.turned}, do not make a product {self.y}")

    @property
    def depth(self) -> int:
        """Products in a sum."""
        return self.a.height if self.turned[0] else self.a.width


def reference(problem: Product, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """y (C, H, W, N) in float64 of a and b (C, H, W, N)."""
    axes = "ckin" if problem.turned[0] else "cikn", "cjkn" if problem.turned[1] else "ckjn"
    with np.errstate(invalid="ignore"):
        return np.einsum(f"{','.join(axes)}->cijn", a.astype(np.float64), b.astype(np.float64))


@operator("matmul")
class MatmulOperator(Operator):
    def forward(self, node: Node, low: Trace) -> None:
        a, b = (low.value(name) for name in node.inputs)
        y = low.output(node)
        low.call("matmul.forward", Product(a.image, b.image, y.image), a, b, y)

    def backward(self, node: Node, low: Trace) -> None:
        a, b = node.inputs
        if low.needs_gradient(a):
            dy, other = low.gradient(node), low.value(b)
            da, more = low.contribute(a)
            low.call("matmul.forward", Product(dy.image, other.image, da.image, (False, True), more), dy, other, da)
        if low.needs_gradient(b):
            dy, other = low.gradient(node), low.value(a)
            db, more = low.contribute(b)
            low.call("matmul.forward", Product(other.image, dy.image, db.image, (True, False), more), other, dy, db)

    def onnx(self, node: Node, writer: Writer) -> str:
        return writer.call("MatMul", writer.inputs(node), node.shape)
