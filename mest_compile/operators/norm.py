"""Normalisation of each example by itself: over groups of channels and their pixels (group_norm, instance_norm), or
over groups of channels pixel by pixel (layer_norm of channels; a token is a pixel).

y = weight * (x - mean) * inverse_deviation + bias; weight and bias are one number a channel, either may be missing.
`moments` is (2, slices, groups, pixels or 1, vector) float32: mean and 1 / sqrt(biased variance + eps).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _single, reads
from mest_compile.frontend.values import Fixed, Parameter, Value, View
from mest_compile.ir.arrangement import Arrangement, merged, whole
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.problem import ASIDE, SIZE
from mest_compile.ir.program import Buffer
from mest_compile.operators.operator import Operator, Trace, operator

ROLES = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class Norm:
    """Kernel "norm.forward": x (x.elems,), weight (channels,) if `weight`, bias (channels,) if `bias`, moments, y
    (y.elems,).

    groups  of neighbouring channels that have moments of their own
    pixels  moments are of all pixels of a group; else each pixel has its own
    """

    x: Image
    y: Image
    groups: int = field(metadata=SIZE)
    pixels: bool
    eps: float = field(metadata=ASIDE)
    weight: bool = False
    bias: bool = False


@dataclass(frozen=True, slots=True)
class NormBackward:
    """Kernel "norm.backward": dy (dy.elems,), x (x.elems,), weight (channels,) if `weight`, moments, dx (dx.elems,).

    groups, pixels  as in Norm
    accumulate      dx += instead
    """

    dy: Image
    x: Image
    dx: Image
    groups: int = field(metadata=SIZE)
    pixels: bool
    weight: bool = False
    accumulate: bool = False


@dataclass(frozen=True, slots=True)
class NormParameters:
    """Kernel "norm.parameters": dy (dy.elems,), x and moments if `weight`, dweight (channels,) if `weight`, dbias
    (channels,) if `bias`.

    groups, pixels  as in Norm
    """

    dy: Image
    x: Image
    groups: int = field(metadata=SIZE)
    pixels: bool
    weight: bool = True
    bias: bool = True


def moments_elems(x: Image, groups: int, pixels: bool) -> int:
    return 2 * x.lanes * groups * (1 if pixels else x.height * x.width)


def count_of(x: Image, groups: int, pixels: bool) -> int:
    """Values that a mean is of."""
    return x.channels // groups * (x.height * x.width if pixels else 1)


def normal_reference(x: np.ndarray, groups: int, pixels: bool, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(normalised, inverse deviation, which spreads over it), (C, H, W, N) in float64, of x (C, H, W, N)."""
    grouped = x.astype(np.float64).reshape(groups, -1, *x.shape[1:])
    axes = (1, 2, 3) if pixels else (1,)
    inverse = 1 / np.sqrt(grouped.var(axes, keepdims=True) + eps)
    normal = (grouped - grouped.mean(axes, keepdims=True)) * inverse
    return normal.reshape(x.shape), np.broadcast_to(inverse, grouped.shape).reshape(x.shape)


def moments_reference(x: np.ndarray, layout: Image, groups: int, pixels: bool, eps: float) -> np.ndarray:
    """`moments` in float64; 0 in lanes without an example."""
    grouped = x.astype(np.float64).reshape(groups, -1, *x.shape[1:])
    axes = (1, 2, 3) if pixels else (1,)
    found = np.stack([grouped.mean(axes), 1 / np.sqrt(grouped.var(axes) + eps)]).reshape(2, groups, -1, x.shape[-1])
    lanes = np.zeros((*found.shape[:-1], layout.lanes))
    lanes[..., : layout.batch] = found
    return np.moveaxis(lanes.reshape(*found.shape[:-1], layout.slices, layout.vector), 3, 1)


def forward_reference(
    x: np.ndarray, groups: int, pixels: bool, eps: float, weight: np.ndarray | None, bias: np.ndarray | None
) -> np.ndarray:
    """y (C, H, W, N) in float64; weight, bias (C,)."""
    y, _ = normal_reference(x, groups, pixels, eps)
    y = y if weight is None else y * weight[:, None, None, None]
    return y if bias is None else y + bias[:, None, None, None]


def backward_reference(
    dy: np.ndarray, x: np.ndarray, groups: int, pixels: bool, eps: float, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dx (C, H, W, N), dweight (C,), dbias (C,)) in float64."""
    normal, inverse = normal_reference(x, groups, pixels, eps)
    scaled = dy.astype(np.float64) * (1 if weight is None else weight[:, None, None, None])

    def mean(values: np.ndarray) -> np.ndarray:
        grouped = values.reshape(groups, -1, *x.shape[1:])
        found = grouped.mean((1, 2, 3) if pixels else (1,), keepdims=True)
        return np.broadcast_to(found, grouped.shape).reshape(x.shape)

    dx = inverse * (scaled - mean(scaled) - normal * mean(scaled * normal))
    return dx, (dy * normal).sum((1, 2, 3)), dy.astype(np.float64).sum((1, 2, 3))


@operator("norm")
class NormOperator(Operator):
    """params: weight?, bias?; attrs: groups, pixels, eps."""

    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        held = [low.parameter(node, role) for role in ROLES if role in node.params]
        problem = Norm(x.image, y.image, **node.attrs, **{role: True for role in ROLES if role in node.params})
        low.call("norm.forward", problem, x, *held, _moments(node, low, x.image), y)

    def backward(self, node: Node, low: Trace) -> None:
        dy, x = low.gradient(node), low.value(node.inputs[0])
        how = {"groups": node.attrs["groups"], "pixels": node.attrs["pixels"]}
        moments = _moments(node, low, x.image)
        trained = [role for role in ROLES if low.trains(node, role)]
        if trained:
            problem = NormParameters(dy.image, x.image, **how, **{role: role in trained for role in ROLES})
            results = [low.parameter_gradient(node, role) for role in trained]
            low.call("norm.parameters", problem, dy, *([x, moments] if problem.weight else []), *results)
        if low.needs_gradient(node.inputs[0]):
            dx, accumulate = low.contribute(node.inputs[0])
            weight = [low.parameter(node, "weight")] if "weight" in node.params else []
            back = NormBackward(dy.image, x.image, dx.image, **how, weight=bool(weight), accumulate=accumulate)
            low.call("norm.backward", back, dy, x, *weight, moments, dx)

    def onnx(self, node: Node, writer: Writer) -> str:
        """By means, differences and products, which every version of ONNX has."""
        (x,), channels, groups = writer.inputs(node), node.shape[1], node.attrs["groups"]
        rest = tuple(node.shape[2:])
        parted = ("N", groups, channels // groups, *rest)
        x = _reshaped(writer, x, (0, groups, channels // groups, *rest), parted)
        axes = list(range(2, len(parted))) if node.attrs["pixels"] else [2]
        few = tuple(1 if axis in axes else size for axis, size in enumerate(parted))
        share = writer.number(1 / int(np.prod([parted[axis] for axis in axes])))

        def mean(value: str) -> str:
            total = writer.call("ReduceSum", [value, writer.constant(np.array(axes), "axes")], few, keepdims=1)
            return writer.call("Mul", [total, share], few)

        away = writer.call("Sub", [x, mean(x)], parted)
        variance = mean(writer.call("Mul", [away, away], parted))
        root = writer.call("Sqrt", [writer.call("Add", [variance, writer.number(node.attrs["eps"])], few)], few)
        y = _reshaped(writer, writer.call("Div", [away, root], parted), (0, channels, *rest), node.shape)
        for role, name in (("weight", "Mul"), ("bias", "Add")):
            if role in node.params:
                held = writer.shaped(node.params[role], (channels, *[1] * len(rest)))
                y = writer.call(name, [y, held], node.shape)
        return y


def _reshaped(writer: Writer, value: str, sizes: tuple[int, ...], shape: Any) -> str:
    return writer.call("Reshape", [value, writer.constant(np.array(sizes), "sizes")], shape)


def _moments(node: Node, low: Trace, x: Image) -> Buffer:
    elems = moments_elems(x, node.attrs["groups"], node.attrs["pixels"])
    return low.temporary(f"{node.name}.moments", elems)


def changes_nothing(value: Any, role: str) -> bool:
    """Whether it is a constant, 1 as a "weight", 0 as a "bias"."""
    return isinstance(value, Fixed) and value.array is not None and bool(np.all(value.array == (role == "weight")))


def channels_of(reader: Reader, value: Any) -> tuple[Value, Arrangement]:
    """(the image whose channels are normalised, what the axes of its normal are): of tokens of all examples,
    (N * T, C), one whose pixels are the tokens."""
    if isinstance(value, View) and len(value.shape) == 2 and len(value.arrangement.axes[0]) > 1:
        examples, tokens = value.arrangement.axes[0][:1], value.arrangement.axes[0][1:]
        if examples == whole(value.bare.shape)["N"]:
            image, axes = reader.channels_last(
                View(value.bare, Arrangement((examples, tokens, value.arrangement.axes[1])))
            )
            return image, Arrangement((merged(axes.axes[0] + axes.axes[1]), axes.axes[2]))
    return reader.image(value), Arrangement.plain(value.shape)


def normalised(reader: Reader, image: Value, groups: int, pixels: bool, eps: float, affine: dict[str, Any]) -> Value:
    """`image` normalised. affine: {"weight": ..., "bias": ...}, parameters of one number a channel, or constants that
    change nothing. Raises UnsupportedOperator."""
    params = {}
    for role, held in affine.items():
        if isinstance(held, Parameter) and reader.shape_of(held) == (image.shape[1],):
            params[role] = held.name
        elif not changes_nothing(held, role):
            raise reader.error(f"{reader.name or 'a norm'} whose {role} is not one parameter a channel,")
    attrs = {"groups": groups, "pixels": pixels, "eps": _single(eps)}
    return reader.add("norm", (image,), image.shape, params, attrs)


@reads("relax.nn.group_norm", gives=("group_norm", "instance_norm"))  # the importers make one of the other
def read_group_norm(reader: Reader, call: Any, arguments: list) -> Any:
    attrs, value, groups = call.attrs, reader.seen(arguments[0]), int(call.attrs.num_groups)
    if int(attrs.channel_axis) != 1:
        raise reader.error("group_norm of other channels than the second axis")
    affine = dict(zip(ROLES, arguments[1:], strict=True))
    idle = all(changes_nothing(one, role) for role, one in affine.items())
    if isinstance(value, View) and value.shape[1] == groups and idle and _are_groups(value):
        made = normalised(reader, reader.activation(value.bare), groups, True, attrs.epsilon, affine)
        return reader.viewed(made, value.arrangement)
    return normalised(reader, reader.activation(value), groups, True, attrs.epsilon, affine)


def _are_groups(value: View) -> bool:
    """Whether the second axis of three is of groups of channels, as exporters write a group_norm."""
    shape = value.bare.shape
    whole_groups = len(value.shape) == 3 and shape[1] % value.shape[1] == 0
    return whole_groups and value.arrangement == Arrangement.plain(shape).reshaped(value.shape)


@reads("relax.nn.layer_norm", gives=("layer_norm",))
def read_layer_norm(reader: Reader, call: Any, arguments: list) -> Any:
    """Over the last axis, which are then the channels of an image: pixel by pixel."""
    attrs, value = call.attrs, reader.seen(arguments[0])
    axes = [int(axis) % len(value.shape) for axis in attrs.axes]
    if axes != [len(value.shape) - 1]:
        raise reader.error(f"layer_norm of {value.shape} over axes {axes}, which are not the last one,")
    image, arrangement = reader.channels_last(value)
    affine = dict(zip(ROLES, arguments[1:], strict=True))
    return reader.viewed(normalised(reader, image, 1, False, attrs.epsilon, affine), arrangement)
