"""Product of two activations: of one size, or a map and one number for each of its channels, as gates are
(squeeze-and-excitation)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.operator import Operator, Trace, operator


@dataclass(frozen=True, slots=True)
class Multiply:
    """Kernel "multiply.forward": a (a.elems,), b (b.elems,), y (y.elems,).

    b  has the pixels of a, or one
    """

    a: Image
    b: Image
    y: Image


@dataclass(frozen=True, slots=True)
class MultiplyBackward:
    """Kernel "multiply.backward": dy (dy.elems,), a (a.elems,) where `db` is, b (b.elems,) where `da` is, da
    (da.elems,), db (db.elems,), both as far as they are.

    accumulate  (da +=, db +=) instead
    """

    dy: Image
    a: Image | None
    b: Image | None
    da: Image | None
    db: Image | None
    accumulate: tuple[bool, bool] = (False, False)


def is_gate(image: Image, other: Image) -> bool:
    """Whether the other has one pixel for all of the image's."""
    return (other.height, other.width) == (1, 1) != (image.height, image.width)


def forward_reference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """y (C, H, W, N) in float64."""
    return a.astype(np.float64) * b


def backward_reference(dy: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(da, db) (C, H, W, N) in float64."""
    db = dy.astype(np.float64) * a
    return dy.astype(np.float64) * b, db.sum((1, 2), keepdims=True) if b.shape != a.shape else db


@operator("multiply")
class Product(Operator):
    """Inputs: a and b."""

    def forward(self, node: Node, low: Trace) -> None:
        a, b = (low.value(name) for name in node.inputs)
        y = low.output(node)
        low.call("multiply.forward", Multiply(a.image, b.image, y.image), a, b, y)

    def backward(self, node: Node, low: Trace) -> None:
        wanted = [low.needs_gradient(name) for name in node.inputs]
        if node.inputs[0] == node.inputs[1]:  # one gradient, which the second pass adds to
            self._pass_back(node, low, (wanted[0], False))
            self._pass_back(node, low, (False, wanted[0]))
        else:
            self._pass_back(node, low, (wanted[0], wanted[1]))

    @staticmethod
    def _pass_back(node: Node, low: Trace, wanted: tuple[bool, bool]) -> None:
        if not any(wanted):
            return
        dy = low.gradient(node)
        a, b = (low.value(name) if needed else None for name, needed in zip(node.inputs, wanted[::-1], strict=True))
        (da, first), (db, second) = (
            low.contribute(name) if needed else (None, False) for name, needed in zip(node.inputs, wanted, strict=True)
        )
        images = {name: one.image if one else None for name, one in (("a", a), ("b", b), ("da", da), ("db", db))}
        problem = MultiplyBackward(dy.image, **images, accumulate=(first, second))
        low.call("multiply.backward", problem, dy, *(one for one in (a, b, da, db) if one))

    def onnx(self, node: Node, writer: Writer) -> str:
        return writer.call("Mul", writer.inputs(node), node.shape)
