"""Values made of several, element by element: products, gates, scales and shifts that are learned, differences.

A value with one channel, row or column stands for all of them, and a parameter stands for all examples. A formula says
what is computed; from it follow the kernels, the float64 reference and the gradients, which are summed over what a
value or a parameter stands for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader
from mest_compile.frontend.values import Fixed, Parameter, Value
from mest_compile.ir.arrangement import as_image
from mest_compile.ir.expressions import Expression, Variable
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.problem import ASIDE, SIZE
from mest_compile.ir.program import Buffer
from mest_compile.ir.wording import as_text, from_text
from mest_compile.operators.operator import Operator, Trace, operator

NAMES = tuple(f"x{place}" for place in range(64))  # variables of a formula: operand by operand


@dataclass(frozen=True, slots=True)
class Weights:
    """A parameter as kernels read it: float32, that of (channel, row, column) at channel * strides[0] + row *
    strides[1] + column * strides[2]; it stands for whatever its stride is 0 along."""

    elems: int = field(metadata=SIZE)
    strides: tuple[int, int, int] = field(metadata=ASIDE)


Operand = Image | Weights
Shape = tuple[int, ...]
Kept = tuple[bool, bool, bool, bool]


@dataclass(frozen=True, slots=True)
class Combine:
    """Kernel "combine.forward": the operands' arrays, y (y.elems,).

    formula     y, of the variables NAMES, one for each operand
    accumulate  y += instead
    """

    formula: str
    operands: tuple[Operand, ...]
    y: Image
    accumulate: bool = False


@dataclass(frozen=True, slots=True)
class Goal:
    """A gradient that is written: of the operand at that place, laid out like it. accumulate: += instead."""

    place: int
    layout: Operand
    accumulate: bool = False


@dataclass(frozen=True, slots=True)
class CombineBackward:
    """Kernel "combine.backward": dy (dy.elems,), the arrays of those operands that are not None, those of the goals.

    formula   as in Combine
    operands  None where no goal's gradient reads it
    goals     all that stand for several elements do so along the same axes
    """

    formula: str
    dy: Image
    operands: tuple[Operand | None, ...]
    goals: tuple[Goal, ...]

    def __post_init__(self) -> None:
        assert len({kept(goal.layout, self.dy) for goal in self.summed}) < 2, "sums over different axes"

    @property
    def summed(self) -> tuple[Goal, ...]:
        return tuple(goal for goal in self.goals if not all(kept(goal.layout, self.dy)))

    @property
    def kept(self) -> Kept:
        """What the sums do not go over."""
        return kept(self.summed[0].layout, self.dy) if self.summed else (True,) * 4

    def gradient(self, goal: Goal) -> Expression:
        """Of variables and `dy`."""
        return gradient(self.formula, goal.place)


def kept(operand: Operand, image: Image) -> Kept:
    """Whether it has an element of its own for each (slice and lane, channel, row, column) of the image."""
    if isinstance(operand, Weights):
        channels, rows, columns = (stride != 0 for stride in operand.strides)
        return False, channels, rows, columns
    pairs = zip((operand.channels, operand.height, operand.width), (image.channels, image.height, image.width))
    channels, rows, columns = (one == other for one, other in pairs)
    return True, channels, rows, columns


def formula_of(text: str) -> Expression:
    return from_text(text, NAMES)


def gradient(text: str, place: int) -> Expression:
    """Of the operand at that place, an expression of variables and `dy`."""
    return Variable("dy") * formula_of(text).derivative(NAMES[place])


def forward_reference(problem: Combine, *operands: np.ndarray) -> np.ndarray:
    """y (C, H, W, N) in float64; operands: images (C, H, W, N), weights flat."""
    y = problem.y
    values = _by_name(problem.operands, operands, y)
    return np.broadcast_to(formula_of(problem.formula).evaluate(**values), (y.channels, y.height, y.width, y.batch))


def backward_reference(problem: CombineBackward, dy: np.ndarray, *operands: np.ndarray | None) -> list[np.ndarray]:
    """The goals' gradients in float64, images (C, H, W, N), weights flat; operands: None where the problem has None."""
    values, found = _by_name(problem.operands, operands, problem.dy), []
    for goal in problem.goals:
        term = np.broadcast_to(problem.gradient(goal).evaluate(dy=dy, **values), dy.shape)
        examples, *axes = kept(goal.layout, problem.dy)
        summed = term.sum(tuple(axis for axis, own in enumerate((*axes, examples)) if not own), keepdims=True)
        if isinstance(goal.layout, Weights):
            flat = np.zeros(goal.layout.elems)
            flat[_places(goal.layout, summed.shape[:3])] = summed[..., 0]
            summed = flat
        found.append(summed)
    return found


def _places(weights: Weights, shape: tuple[int, ...]) -> np.ndarray:
    """(C, H, W): where each element of an image finds its weight."""
    return np.tensordot(weights.strides, np.indices(shape), 1)


def _by_name(
    layouts: Sequence[Operand | None], arrays: Sequence[np.ndarray | None], image: Image
) -> dict[str, np.ndarray]:
    """{variable: float64 array that broadcasts against (C, H, W, N)} of the operands that are there."""
    found = {}
    for name, layout, array in zip(NAMES, layouts, arrays, strict=False):
        if array is not None:
            if isinstance(layout, Weights):
                array = array.ravel()[_places(layout, (image.channels, image.height, image.width))][..., None]
            found[name] = np.asarray(array, np.float64)
    return found


@operator("combine")
class Combination(Operator):
    """Inputs: the formula's first operands; params: the next, each under its variable. attrs: formula; constants: the
    last operands, flat, only if there are some; strides (of each parameter and constant)."""

    def constants(self, node: Node) -> dict[str, np.ndarray]:
        held = enumerate(node.attrs.get("constants", ()))
        return {_constant(node, place): np.array(one, np.float32) for place, one in held}

    def forward(self, node: Node, low: Trace) -> None:
        operands, buffers = _operands(node, low, NAMES)
        y = low.output(node)
        low.call("combine.forward", Combine(node.attrs["formula"], operands, y.image), *buffers, y)  # type: ignore

    def backward(self, node: Node, low: Trace) -> None:
        """A call for each set of axes that gradients are summed over; the first also writes those that are not."""
        wanted = [place for place, name in enumerate(node.inputs) if low.needs_gradient(name)]
        wanted += [len(node.inputs) + place for place, role in enumerate(node.params) if low.trains(node, role)]
        whole: list[int] = []
        groups: dict[Kept, list[int]] = defaultdict(list)
        for place in wanted:
            axes = _own_axes(node, low, place)
            (whole if all(axes) else groups[axes]).append(place)
        for places in groups.values() or [[]]:
            self._pass_back(node, low, [*whole, *places])
            whole = []

    @staticmethod
    def _pass_back(node: Node, low: Trace, places: Sequence[int]) -> None:
        formula, dy = node.attrs["formula"], low.gradient(node)
        read = frozenset[str]().union(*(gradient(formula, place).variables for place in places))
        operands, buffers = _operands(node, low, read)
        goals, results = [], []
        for place in places:
            if place < len(node.inputs):
                activation, accumulate = low.contribute(node.inputs[place])
                goals.append(Goal(place, activation.image, accumulate))
                results.append(activation)
            else:
                goals.append(Goal(place, _weights(node, low)[place - len(node.inputs)]))
                results.append(low.parameter_gradient(node, NAMES[place]))  # type: ignore[arg-type]
        if goals:
            problem = CombineBackward(formula, dy.image, operands, tuple(goals))
            low.call("combine.backward", problem, dy, *buffers, *results)

    def onnx(self, node: Node, writer: Writer) -> str:
        values = dict(zip(NAMES, writer.inputs(node), strict=False))
        sizes = [
            [size if stride else 1 for size, stride in zip(node.shape[1:], strides, strict=False)]
            for strides in node.attrs["strides"]
        ]
        each = zip(node.params.values(), sizes, node.attrs["strides"], strict=False)
        held = [_written(writer, name, size, strides) for name, size, strides in each]
        fixed = zip(self.constants(node).values(), sizes[len(held) :], strict=True)
        held += [writer.constant(one.reshape(size), "constant") for one, size in fixed]
        values |= dict(zip(NAMES[len(values) :], held, strict=False))
        made = writer.expression(formula_of(node.attrs["formula"]), values, node.shape)
        return made if node.inputs else writer.repeated(made, node.shape)


def combination(
    reader: Reader, formula: Expression, operands: Sequence[Value | Parameter | Fixed], shape: Shape
) -> Value:
    """The value of a formula of NAMES, one for each operand, which has that shape; constants are arrays. Raises
    UnsupportedOperator.

    Axes are lined up from the last one, as torch does it, and spread where they have one element or are not there.
    """
    values = tuple(dict.fromkeys(one for one in operands if isinstance(one, Value)))
    held = tuple(dict.fromkeys(one for one in operands if isinstance(one, Parameter)))
    fixed = [one for one in operands if isinstance(one, Fixed)]
    arrays = [np.asarray(one.array, np.float32) for one in fixed]
    sizes = [reader.shape_of(one) for one in held] + [array.shape for array in arrays]
    shapes = [value.shape for value in values] + sizes
    fits = values and len(shape) in (2, 4) and all(len(value.shape) == len(shape) for value in values)
    fits = fits and all(len(size) < len(shape) or (len(size) == len(shape) and size[0] == 1) for size in sizes)
    if not fits or np.broadcast_shapes(*shapes) != shape:
        raise reader.error(f"{reader.name or 'an operation'} of shapes {' and '.join(map(str, shapes))}")
    places = {id(one): place for place, one in enumerate([*values, *held, *fixed])}
    firsts = {one: places[id(one)] for one in (*values, *held)}  # what comes twice is one operand
    mine = [places[id(one)] if isinstance(one, Fixed) else firsts[one] for one in operands]
    formula = formula.of(**{name: Variable(NAMES[place]) for name, place in zip(NAMES, mine, strict=False)})
    params = {NAMES[len(values) + place]: one.name for place, one in enumerate(held)}
    strides = tuple(
        one.strides
        if isinstance(one, Parameter) and one.form == "laid"
        else _strides(size, len(shape), isinstance(one, Parameter) and one.form == "transposed")
        for one, size in zip([*held, *fixed], sizes, strict=True)
    )
    attrs: dict[str, Any] = {"formula": as_text(formula), "strides": strides}
    if arrays:
        attrs["constants"] = tuple(tuple(map(float, array.ravel())) for array in arrays)
    return reader.add("combine", values, shape, params, attrs)


def standing(reader: Reader, held: Parameter, shape: Shape) -> Value:
    """A parameter as a value beside others of that many axes, the same for every example: a class token. Raises
    UnsupportedOperator."""
    sizes = reader.shape_of(held)
    sizes = (1,) * (len(shape) - len(sizes)) + sizes
    if held.form not in ("", "channel", "shaped") or len(sizes) != len(shape) or sizes[0] != 1:
        raise reader.error(f"{reader.called} of {held.name}, {sizes}, and values of {len(shape)} axes")
    image = as_image(sizes)
    strides = _strides(image, len(image), False)
    attrs = {"formula": NAMES[0], "strides": (strides,)}
    return reader.add("combine", (), (reader.input_shape[0], *image[1:]), {NAMES[0]: held.name}, attrs)


def joined(inner: Node, outer: Node) -> Node:
    """`outer` with what `inner` computes in the place of its value."""

    def listed(node: Node) -> list[tuple[str, Any]]:
        return [*((name, ()) for name in node.inputs), *zip(node.params.values(), node.attrs["strides"], strict=True)]

    every = dict.fromkeys([one for one in listed(outer) if one[0] != inner.name] + listed(inner))
    inputs = [one for one in every if not one[1]]
    params = [one for one in every if one[1]]
    known: dict[tuple[str, Any], Expression] = {
        one: Variable(name) for name, one in zip(NAMES, inputs + params, strict=False)
    }
    for node in inner, outer:
        variables = {name: known[one] for name, one in zip(NAMES, listed(node), strict=False)}
        known[node.name, ()] = formula_of(node.attrs["formula"]).of(**variables)
    attrs = {"formula": as_text(known[outer.name, ()]), "strides": tuple(strides for _, strides in params)}
    roles = {NAMES[len(inputs) + place]: name for place, (name, _) in enumerate(params)}
    return replace(outer, inputs=tuple(name for name, _ in inputs), params=roles, attrs=attrs)


def _strides(sizes: Shape, rank: int, transposed: bool) -> tuple[int, ...]:
    """As Weights has them, of an array with these axes, in memory turned round, that is spread over values of so many
    axes."""
    array = np.empty(sizes[::-1], np.int8).T if transposed else np.empty(sizes, np.int8)
    along = [stride if size > 1 else 0 for stride, size in zip(array.strides, array.shape, strict=True)]
    behind = [0, 0, 0, *along][-(rank - 1) :]
    return (*behind, 0, 0)[:3]


def _written(writer: Writer, name: str, sizes: list[int], strides: Shape) -> str:
    """A parameter that is spread over the axes behind the batch, whose numbers lie in the order of their strides."""
    order = sorted(range(len(sizes)), key=lambda axis: -strides[axis] if strides[axis] else -axis)
    varying = [axis for axis in order if strides[axis]]
    if varying == sorted(varying):
        return writer.shaped(name, sizes)
    lies = [sizes[axis] for axis in order]
    perm = [order.index(axis) for axis in range(len(sizes))]
    return writer.call("Transpose", [writer.shaped(name, lies)], tuple(sizes), perm=perm)


def _constant(node: Node, place: int) -> str:
    return f"{node.name}:constant {place}"


def _weights(node: Node, low: Trace) -> list[Weights]:
    """Layouts of its parameters and constants."""
    elems = [prod(low.graph.state_shapes[name]) for name in node.params.values()]
    elems += map(len, node.attrs.get("constants", ()))
    return [Weights(*facts) for facts in zip(elems, node.attrs["strides"], strict=True)]


def _operands(node: Node, low: Trace, read: Collection[str]) -> tuple[tuple[Operand | None, ...], list[Buffer]]:
    """(layouts, None of what is not read; arrays of the others)."""
    layouts: list[Operand | None] = []
    buffers: list[Buffer] = []
    for name, source in zip(NAMES, node.inputs, strict=False):
        layouts.append(None)
        if name in read:
            value = low.value(source)
            layouts[-1] = value.image
            buffers.append(value)
    count = len(node.inputs)
    for name, weights in zip(NAMES[count:], _weights(node, low), strict=False):
        layouts.append(weights if name in read else None)
        if name in read and name in node.params:
            buffers.append(low.parameter(node, name))
        elif name in read:
            constant = _constant(node, len(layouts) - 1 - count - len(node.params))
            buffers.append(low.hold(constant, weights.elems, "batch"))
    return tuple(layouts), buffers


def _own_axes(node: Node, low: Trace, place: int) -> Kept:
    """As `kept` has it, of the operand at that place."""
    if place >= len(node.inputs):
        channels, rows, columns = (stride != 0 for stride in _weights(node, low)[place - len(node.inputs)].strides)
        return False, channels, rows, columns
    shape = low.shape(node.inputs[place])
    sizes = zip((*shape[1:], 1, 1)[:3], (*node.shape[1:], 1, 1)[:3], strict=True)
    channels, rows, columns = (one == other for one, other in sizes)
    return True, channels, rows, columns
