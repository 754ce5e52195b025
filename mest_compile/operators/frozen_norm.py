"""Batch normalisation in evaluation mode inside of a step that trains: a multiplication and an addition per channel.

Where nothing of it trains and a convolution gives its input, it ends that convolution's kernel (`folded`): y =
activation(scale * z + shift + residual), and z is never written. Else it is a pass over memory, as in prediction.
`scaling` is (2, channels) float32: shift and scale. `moments`, `affine` and `sums` are as in batch_norm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.problem import ASIDE, SIZE
from mest_compile.ir.program import Activation, Buffer
from mest_compile.operators.activation import activation_of
from mest_compile.operators.conversion import ImageCopy
from mest_compile.operators.layers.gather import Epilogue
from mest_compile.operators.operator import Trace


@dataclass(frozen=True, slots=True)
class FrozenNormScaling:
    """Kernel "frozen_norm.scaling": running_mean (channels,), running_var (channels,), affine, scaling."""

    channels: int = field(metadata=SIZE)
    eps: float = field(metadata=ASIDE)


@dataclass(frozen=True, slots=True)
class FrozenNormBackward:
    """Kernel "frozen_norm.backward": dy, scaling if `folded`, else moments and affine; z only if `z`, y only if `y`,
    sums only if `sums`, dz only if `dz`.

    activation  name of the one that follows: dy counts as often as its slope says, which is told by y, or without y by
                what z gives
    z     needed for the sums as well
    dz    where scale * dy goes: None where nothing before the operator needs a gradient
    accumulate  dz += instead; else the halo of dz becomes 0
    in_place    dy becomes dz, which is no argument then
    residual    dy becomes, in place, the gradient of what was added before the activation
    """

    dy: Image
    activation: str | None = None
    folded: bool = False
    z: Image | None = None
    y: Image | None = None
    dz: Image | None = None
    sums: bool = False
    accumulate: bool = False
    in_place: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        assert not (self.in_place and (self.dz or self.residual)), "in place there is no other dz"
        assert not (self.folded and self.z), "where it is folded z was not written"
        assert self.z or not self.sums, "sums are of z"
        assert not self.activation or self.y or self.z, "the activation's slope is told by y or z"
        assert self.sums or self.dz or self.in_place or (self.residual and self.activation), "nothing would be written"


@dataclass(frozen=True, slots=True)
class CopyPart:
    """Kernel "values.part": source (source_elems,), target (target_elems,): target[place + i] = source[start + i] for i
    < elems."""

    source_elems: int
    start: int
    target_elems: int
    place: int
    elems: int


def scaling_reference(running_mean: np.ndarray, running_var: np.ndarray, affine: np.ndarray, eps: float) -> np.ndarray:
    """scaling (2, C) in float64; affine (2, C)."""
    mean, variance = np.asarray(running_mean, np.float64), np.asarray(running_var, np.float64)
    bias, weight = np.asarray(affine, np.float64)
    scale = weight / np.sqrt(variance + eps)
    return np.stack([bias - mean * scale, scale])


def backward_reference(
    dy: np.ndarray, z: np.ndarray, moments: np.ndarray, weight: np.ndarray, activation: str | None, source: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dy before the activation, sums (2, C), dz) in float64; source (C, H, W, N): what the activation's slope is told
    from."""
    masked = activation_of(activation).backward_reference(dy, source) if activation else dy.astype(np.float64)
    mean, inverse, factor = (np.asarray(row, np.float64)[:, None, None, None] for row in (*moments[:2], weight))
    sums = np.stack([masked.sum((1, 2, 3)), (masked * ((z.astype(np.float64) - mean) * inverse)).sum((1, 2, 3))])
    return masked, sums, factor * inverse * masked


def finish(node: Node, low: Trace, scaled: bool) -> tuple[Epilogue | None, list[Buffer]]:
    """What a convolution's kernel does behind its sums, and the arrays that it takes for it. scaled: whether `scaling`
    was computed before in this step."""
    if not node.attrs.get("folded"):
        return None, []
    channels = node.shape[1]
    scaling = low.temporary(f"{node.name}.scaling", 2 * channels)
    if not scaled:
        low.call(
            "frozen_norm.scaling",
            FrozenNormScaling(channels, node.attrs["eps"]),
            low.parameter(node, "running_mean"),
            low.parameter(node, "running_var"),
            low.parameter(node, "norm_bias", "norm_weight"),
            scaling,
        )
    residual = [low.value(name) for name in node.inputs[1:]]
    return Epilogue(node.attrs["activation"], residual[0].image if residual else None), [scaling, *residual]


def unfolded(node: Node, low: Trace, halo: tuple[int, int, int, int], wanted: bool) -> Activation | None:
    """The gradient of what a folded convolution's sums are; that of its summand is recorded on the way.

    halo    zero pixels that are read around it
    wanted  whether anybody needs it; else None
    """
    dy, activation = low.gradient(node), node.attrs["activation"]
    y = low.value(node.name) if activation else None
    added = len(node.inputs) == 2 and low.needs_gradient(node.inputs[1])
    inner = low.scratch(f"{node.name}.inner", dy.image.haloed(halo)) if added and wanted else None
    if wanted or (added and activation):
        problem = FrozenNormBackward(
            dy.image,
            activation,
            True,
            y=y.image if y else None,
            dz=inner.image if inner else None,
            in_place=not added,
            residual=added,
        )
        facts = low.temporary(f"{node.name}.scaling", 2 * dy.image.channels)
        low.call(
            "frozen_norm.backward", problem, dy, facts, *([y] if y else []), *([inner] if inner else []), fills=inner
        )
    if added:
        pass_on(low, node.inputs[1], dy)
    return inner if added else dy


def pass_on(low: Trace, name: str, dy: Activation) -> None:
    """A finished gradient as that of `name` too: after dz, because from here on later contributions may be added to dy
    in place."""
    if not low.adopt(name, dy):
        result, accumulate = low.contribute(name)
        low.call("image.copy", ImageCopy(dy.image, result.image, accumulate), dy, result)
