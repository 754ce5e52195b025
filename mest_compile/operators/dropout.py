"""Dropout while a step trains; in evaluation it is nothing.

What is dropped follows from the seed, the number of the update, the operator's name and the element's place in torch's
order, by whole numbers alone: a run that goes on from a checkpoint, and another device, drop the same.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _single, reads
from mest_compile.frontend.values import Refused
from mest_compile.ir.graph import ForwardGraph, Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.operator import Halo, Operator, Trace, operator

# A mixer of 32 bits in which every bit of the input moves every bit of the result: multiply, after shifts of these many
# bits. Source: Wellons, "Prospecting for hash functions", 2018, the one with two rounds and least bias.
SHIFTS, FACTORS = (16, 15, 16), (0x7FEB352D, 0x846CA68B)
DIGITS = 24  # of a drawn number that are compared: what a float32 has
# What a function of torch's, or of frontend/torch_depth.py, drops as a whole; others drop single elements.
WHOLE = dict.fromkeys(("dropout1d", "dropout2d", "dropout3d", "feature_dropout"), "channel")
WHOLE |= {"drop_path": "example", "drop_batch": "batch"}


@dataclass(frozen=True, slots=True)
class Dropout:
    """Kernel "dropout.forward": draw (1,) int32, x (x.elems,), y (y.elems,): y = x / (1 - p) where an element stays,
    else 0 (NaN where x is not finite, as torch has it). The gradient takes the same way.

    p           share that is dropped, 0 < p <= 1
    whole       what is dropped as a whole: of an example an "element" or a "channel", or an "example", or the "batch"
    accumulate  y += instead
    """

    x: Image
    y: Image
    p: float
    whole: str = "element"
    accumulate: bool = False

    @property
    def scale(self) -> float:
        """What an element that stays is multiplied by."""
        return 1 / (1 - self.p) if self.p < 1 else 0.0

    @property
    def threshold(self) -> int:
        """Drawn numbers below it drop, of DIGITS bits."""
        return round(self.p * 2**DIGITS)


def mixed(bits: np.ndarray) -> np.ndarray:
    """uint32 to uint32."""
    bits = np.asarray(bits, np.uint32)
    for shift, factor in zip(SHIFTS, (*FACTORS, 1), strict=True):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return bits


def draws(graph: ForwardGraph, seed: int, update: int, turn: int = 0) -> dict[str, np.ndarray]:
    """{buffer: (1,) int32} of every dropout of the graph at an update, counted from 1, in a pass of it, counted from
    0."""
    found = {}
    for node in graph.nodes:
        if node.op == "dropout":
            key = np.zeros(1, np.uint32)
            for part in (
                seed & 0xFFFFFFFF,
                seed >> 32 & 0xFFFFFFFF,
                update & 0xFFFFFFFF,
                zlib.crc32(node.name.encode()),
                *([turn] if turn else []),
            ):
                key = mixed(key ^ np.uint32(part)) + np.uint32(1)
            found[_draw(node)] = key.view(np.int32)
    return found


def stays(draw: int, shape: tuple[int, ...], p: float, whole: str = "element") -> np.ndarray:
    """Which elements of a value (N, C, H, W) or (N, C) stay, bool. draw: of the int32 that `draws` gave."""
    axes = {"element": len(shape), "channel": 2, "example": 1, "batch": 0}[whole]
    covered = shape[:axes] + (1,) * (len(shape) - axes)
    places = np.arange(np.prod(covered), dtype=np.uint32).reshape(covered)
    drawn = mixed(places ^ np.int64(draw).astype(np.uint32)) >> np.uint32(32 - DIGITS)
    return np.broadcast_to(drawn >= round(p * 2**DIGITS), shape)


def reference(problem: Dropout, draw: int, x: np.ndarray) -> np.ndarray:
    """y (C, H, W, N) in float64."""
    kept = stays(draw, (x.shape[-1], *x.shape[:3]), problem.p, problem.whole)
    return x.astype(np.float64) * (np.moveaxis(kept, 0, -1) * problem.scale)


@operator("dropout")
class DropoutOperator(Operator):
    """attrs: p, whole (only if it is not "element")."""

    def source_halo(self, node: Node, low: Trace) -> Halo:
        return (0, 0, 0, 0) if low.training else low.value_halo(node.name)

    def forward(self, node: Node, low: Trace) -> None:
        if not low.training:
            low.alias(node, node.inputs[0])
            return
        x, y = low.value(node.inputs[0]), low.output(node)
        low.call("dropout.forward", Dropout(x.image, y.image, **node.attrs), _held(node, low), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        if low.needs_gradient(node.inputs[0]):
            dy = low.gradient(node)
            dx, accumulate = low.contribute(node.inputs[0])
            problem = Dropout(dy.image, dx.image, **node.attrs, accumulate=accumulate)
            low.call("dropout.forward", problem, _held(node, low), dy, dx)

    def onnx(self, node: Node, writer: Writer) -> str:
        (value,) = writer.inputs(node)
        return value


def _draw(node: Node) -> str:
    return f"{node.name}:draw"


def _held(node: Node, low: Trace) -> Any:
    return low.hold(_draw(node), 1, "batch", "int32")


@reads("relax.nn.dropout", gives=("dropout",), pointwise=True)
def read_dropout(reader: Reader, call: Any, arguments: list) -> Any:
    value, p = reader.activation(arguments[0]), _single(call.attrs.rate)
    if p:
        attrs = {"p": p} | ({"whole": WHOLE[reader.name]} if reader.name in WHOLE else {})
        value = reader.add("dropout", (value,), value.shape, attrs=attrs)
    return value, Refused(reader.error("dropout's mask used as a value"))
