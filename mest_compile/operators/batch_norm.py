"""Batch normalisation with an addition and an activation that may follow it: one operator, one kernel each way.

y = activation(weight * (z - mean) * inverse_deviation + bias + residual); the addition and the activation are optional.
Nothing but z (and y where both follow) is kept for the backward pass: the normalised value and the activation's slope
are computed again.

`moments` is (3, channels) float32: mean, 1 / sqrt(biased variance + eps), unbiased variance.
`affine` is (2, channels) float32: bias and weight, in this order; `sums` their gradients, likewise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mest_compile.base.errors import SpecError
from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, Refused, _is_stored, _single, reads
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.problem import ASIDE, SIZE
from mest_compile.ir.program import Activation, Buffer
from mest_compile.operators.activation import ACTIVATIONS
from mest_compile.operators.conversion import ImageCopy
from mest_compile.operators.operator import Operator, Trace, operator

# Squared mean over variance up to which a variance may come from float32 sums of squares. Rounding of these is at most
# 1e-6 of them, and of the variance as many times that; channels of nets on standardised data stay below, so that the
# second look at z costs them nothing.
FAR = 64


@dataclass(frozen=True, slots=True)
class BatchNormMoments:
    """Kernel "batch_norm.moments": z (z.elems,), moments; with `chunks`: statistics (chunks, 2, channels, vector), z,
    moments.

    chunks  where not 0, statistics holds, per chunk and lane, the sum of z and the sum of its squares; z is only read
            where these do not say how far values are from each other: of channels whose mean is more than sqrt(FAR)
            standard deviations from 0
    alive   a last argument, (channels,) int32: z of a channel that is 0 there was not written and counts as 0
    """

    z: Image
    eps: float = field(metadata=ASIDE)
    chunks: int = field(default=0, metadata=SIZE)
    alive: bool = False

    def __post_init__(self) -> None:
        if self.count < 2:
            raise SpecError(
                f"batch_norm needs more than 1 value per channel when training, got batch {self.z.batch} of "
                f"{self.z.height}x{self.z.width} pixels; use a larger batch"
            )

    @property
    def count(self) -> int:
        """Values of a channel."""
        return self.z.batch * self.z.height * self.z.width


@dataclass(frozen=True, slots=True)
class BatchNormRunning:
    """Kernel "batch_norm.running": moments, running_mean (channels,), running_var (channels,); the last two in place.

    momentum  share of the new statistics, as torch has it
    """

    channels: int = field(metadata=SIZE)
    momentum: float = field(metadata=ASIDE)


@dataclass(frozen=True, slots=True)
class BatchNormFrozen:
    """Kernel "batch_norm.frozen": running_mean (channels,), running_var (channels,), moments: what evaluation
    normalises with."""

    channels: int = field(metadata=SIZE)
    eps: float = field(metadata=ASIDE)


@dataclass(frozen=True, slots=True)
class BatchNormForward:
    """Kernel "batch_norm.forward": z, moments, affine, residual only if there is one, y, alive only if `alive`, read
    only if `read`.

    The halo of y becomes 0.
    activation  name of the one that follows
    alive  (channels,) int32: z of a channel that is 0 there was not written and counts as 0
    read   (channels,) int32: a channel of y that is 0 there is read by nobody and not written
    """

    z: Image
    y: Image
    activation: str | None = None
    residual: Image | None = None
    alive: bool = False
    read: bool = False


@dataclass(frozen=True, slots=True)
class BatchNormBackward:
    """Kernel "batch_norm.backward": dy, z, moments, affine, y only if `y`, sums, dz only if `dz`, alive only if
    `alive`, read only if `read`.

    activation  name of the one that follows: dy counts as often as its slope says
    y     needed when a residual was added before the activation; dy then becomes, in place, the residual's gradient.
          Without it, what the activation took is computed again from z.
    dz    None where nothing before the operator needs a gradient
    accumulate  dz += the gradient; else the halo of dz becomes 0
    in_place    dy becomes dz, which is no argument then: half of the memory is written without being fetched first
    alive       (channels,) int32: z of a channel that is 0 there was not written and counts as 0; its dz is not written
    read        (channels,) int32: dy of a channel that is 0 there was not written and counts as 0
    """

    dy: Image
    z: Image
    dz: Image | None = None
    activation: str | None = None
    y: Image | None = None
    accumulate: bool = False
    in_place: bool = False
    alive: bool = False
    read: bool = False

    def __post_init__(self) -> None:
        assert self.activation or self.y is None, "y is only read for the activation's slope"
        assert not (self.in_place and (self.dz or self.y)), (
            "in place there is no dz, and dy is not needed for a residual"
        )


def _by_channel(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float64)[:, None, None, None]


def moments_reference(z: np.ndarray, eps: float) -> np.ndarray:
    """moments (3, C) in float64 of z (C, H, W, N)."""
    flat = z.astype(np.float64).reshape(len(z), -1)
    return np.stack([flat.mean(1), 1 / np.sqrt(flat.var(1) + eps), flat.var(1, ddof=1)])


def running_reference(
    moments: np.ndarray, running_mean: np.ndarray, running_var: np.ndarray, momentum: float
) -> tuple[np.ndarray, np.ndarray]:
    """New (running_mean, running_var) in float64."""
    return tuple(
        (1 - momentum) * np.asarray(old, np.float64) + momentum * moments[row]
        for old, row in ((running_mean, 0), (running_var, 2))
    )  # type: ignore


def frozen_reference(running_mean: np.ndarray, running_var: np.ndarray, eps: float) -> np.ndarray:
    """moments (3, C) in float64."""
    mean, variance = np.asarray(running_mean, np.float64), np.asarray(running_var, np.float64)
    return np.stack([mean, 1 / np.sqrt(variance + eps), variance])


def forward_reference(
    z: np.ndarray,
    moments: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    residual: np.ndarray | None = None,
    activation: str | None = None,
) -> np.ndarray:
    """y (C, H, W, N) in float64."""
    y = (z.astype(np.float64) - _by_channel(moments[0])) * _by_channel(moments[1]) * _by_channel(weight) + _by_channel(
        bias
    )
    if residual is not None:
        y = y + residual
    return ACTIVATIONS.find(activation).forward_reference(y) if activation else y


def backward_reference(
    dy: np.ndarray,
    z: np.ndarray,
    moments: np.ndarray,
    weight: np.ndarray,
    activation: str | None = None,
    source: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dy before the activation, sums (2, C), dz) in float64; source (C, H, W, N): what the activation's slope is told
    from, its result or what it took.
    """
    masked = ACTIVATIONS.find(activation).backward_reference(dy, source) if activation else dy.astype(np.float64)
    normal = (z.astype(np.float64) - _by_channel(moments[0])) * _by_channel(moments[1])
    sums = np.stack([masked.sum((1, 2, 3)), (masked * normal).sum((1, 2, 3))])
    mean_dy, mean_dyz = (_by_channel(row / normal[0].size) for row in sums)
    return masked, sums, _by_channel(weight) * _by_channel(moments[1]) * (masked - mean_dy - normal * mean_dyz)


@operator("batch_norm")
class BatchNorm(Operator):
    """Inputs: z and, where an addition was fused, the residual. attrs: eps, momentum, activation."""

    def gradient_halo(self, node: Node, low: Trace) -> tuple[int, int, int, int]:
        """That of its input's gradient where it can take its place: convolutions write it, nobody else needs it."""
        alone = len(node.inputs) == 1 and all(consumer.op == "conv2d" for consumer in low.consumers(node.name))
        return low.gradient_halo(node.inputs[0]) if alone and low.needs_gradient(node.inputs[0]) else (0, 0, 0, 0)

    def forward(self, node: Node, low: Trace) -> None:
        z, y = low.value(node.inputs[0]), low.output(node)
        residual = low.value(node.inputs[1]) if len(node.inputs) == 2 else None
        channels, eps = z.image.channels, node.attrs["eps"]
        moments = low.temporary(f"{node.name}.moments", 3 * channels)
        running = low.parameter(node, "running_mean"), low.parameter(node, "running_var")
        if low.training:
            statistics = low.statistics(node.inputs[0])
            chunks = (statistics.elems or 0) // (2 * channels * z.image.vector) if statistics else 0
            alive = low.written(node.inputs[0])
            low.call(
                "batch_norm.moments",
                BatchNormMoments(z.image, eps, chunks, bool(alive)),
                *([statistics] if statistics else []),
                z,
                moments,
                *([alive] if alive else []),
            )
            low.call_statistics(
                "batch_norm.running", BatchNormRunning(channels, node.attrs["momentum"]), moments, *running
            )
        else:
            low.call("batch_norm.frozen", BatchNormFrozen(channels, eps), *running, moments)
        self._normalise(node, low, z, moments, residual, y)

    def recompute(self, node: Node, low: Trace) -> None:
        """y once more from z and the moments, which are kept."""
        z, residual = low.value(node.inputs[0]), low.value(node.inputs[1]) if len(node.inputs) == 2 else None
        self._normalise(
            node, low, z, low.temporary(f"{node.name}.moments", 3 * z.image.channels), residual, low.output(node)
        )

    @staticmethod
    def _normalise(
        node: Node, low: Trace, z: Activation, moments: Buffer, residual: Activation | None, y: Activation
    ) -> None:
        alive, read = low.written(node.inputs[0]), None if residual else low.read(node.name)
        problem = BatchNormForward(
            z.image,
            y.image,
            node.attrs.get("activation"),
            residual.image if residual else None,
            bool(alive),
            bool(read),
        )
        affine = low.parameter(node, "bias", "weight")
        low.call(
            "batch_norm.forward",
            problem,
            z,
            moments,
            affine,
            *([residual] if residual else []),
            y,
            *(flags for flags in (alive, read) if flags),
            fills=y,
        )

    def backward(self, node: Node, low: Trace) -> None:
        dy, z = low.gradient(node), low.value(node.inputs[0])
        activation, added = node.attrs.get("activation"), len(node.inputs) == 2
        y = low.value(node.name) if activation and added else None
        facts = z, low.temporary(f"{node.name}.moments", 3 * z.image.channels), low.parameter(node, "bias", "weight")
        sums = low.parameter_gradient(node, "bias", "weight")
        wanted = low.needs_gradient(node.inputs[0])
        in_place = wanted and not added and low.adopt(node.inputs[0], dy)
        dz, accumulate = low.contribute(node.inputs[0]) if wanted and not in_place else (None, False)
        alive, read = low.written(node.inputs[0]), None if added else low.read(node.name)
        problem = BatchNormBackward(
            dy.image,
            z.image,
            dz.image if dz else None,
            activation,
            y.image if y else None,
            accumulate,
            in_place,
            bool(alive),
            bool(read),
        )
        low.call(
            "batch_norm.backward",
            problem,
            dy,
            *facts,
            *([y] if y else []),
            sums,
            *([dz] if dz else []),
            *(flags for flags in (alive, read) if flags),
            fills=dz,
        )
        # After dz, because from here on later contributions may be added to dy in place.
        if added and low.needs_gradient(node.inputs[1]) and not low.adopt(node.inputs[1], dy):
            result, accumulate = low.contribute(node.inputs[1])
            low.call("image.copy", ImageCopy(dy.image, result.image, accumulate), dy, result)

    def onnx(self, node: Node, writer: Writer) -> str:
        held = [writer.weight(node.params[role]) for role in ("weight", "bias", "running_mean", "running_var")]
        return writer.call("BatchNormalization", [*writer.inputs(node), *held], node.shape, epsilon=node.attrs["eps"])


@reads("relax.nn.batch_norm", gives=("batch_norm",))
def read_batch_norm(reader: Reader, call: Any, arguments: list) -> Any:
    attrs = call.attrs
    image = reader.activation(arguments[0])
    if int(attrs.axis) != 1 or not _is_stored(*arguments[1:]):
        raise reader.error("batch_norm without its own weight, bias and running statistics")
    roles = ("weight", "bias", "running_mean", "running_var")
    params = {role: parameter.name for role, parameter in zip(roles, arguments[1:], strict=True)}
    normalised = reader.add(
        "batch_norm",
        (image,),
        image.shape,
        params,
        {"eps": _single(attrs.epsilon), "momentum": _single(attrs.momentum)},
    )
    statistics = Refused(reader.error("batch_norm's running statistics used as values"))
    return normalised, statistics, statistics
