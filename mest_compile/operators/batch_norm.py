"""Batch normalisation with an addition and an activation that may follow it: one operator, one kernel each way.

y = activation(weight * (z - mean) * inverse_deviation + bias + residual); the addition and the activation are optional.
Nothing but z (and y where both follow) is kept for the backward pass: the normalised value and the activation's slope
are computed again.

`moments` is (3, channels) float32: mean, 1 / sqrt(biased variance + eps), unbiased variance.
`affine` is (2, channels) float32: bias and weight, in this order; `sums` their gradients, likewise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mest_compile.base.errors import SpecError
from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _is_stored, _single, reads
from mest_compile.frontend.values import Refused
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.problem import ASIDE, SIZE
from mest_compile.ir.program import Buffer
from mest_compile.operators.activation import activation_of
from mest_compile.operators.chain import chain_of
from mest_compile.operators.frozen_norm import CopyPart, FrozenNormBackward, pass_on
from mest_compile.operators.norm import changes_nothing, channels_of
from mest_compile.operators.operator import Operator, Trace, operator

# Squared mean over variance up to which a variance may come from float32 sums of squares. Rounding of these is at most
# 1e-6 of them, and of the variance as many times that; channels of nets on standardised data stay below, so that the
# second look at z costs them nothing.
FAR = 64
AFFINE = ("bias", "weight")  # roles, in the order of `affine`
ROLES = ("weight", "bias", "running_mean", "running_var")


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
    return activation_of(activation).forward_reference(y) if activation else y


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
    masked = dy.astype(np.float64)
    if activation and source is not None:
        masked = activation_of(activation).backward_reference(dy, source)
    normal = (z.astype(np.float64) - _by_channel(moments[0])) * _by_channel(moments[1])
    sums = np.stack([masked.sum((1, 2, 3)), (masked * normal).sum((1, 2, 3))])
    mean_dy, mean_dyz = (_by_channel(row / normal[0].size) for row in sums)
    return masked, sums, _by_channel(weight) * _by_channel(moments[1]) * (masked - mean_dy - normal * mean_dyz)


@operator("batch_norm")
class BatchNorm(Operator):
    """Inputs: z and, where an addition was fused, the residual. params: ROLES, or without weight and bias, which are 1
    and 0 then; attrs: eps, momentum, activation."""

    def constants(self, node: Node) -> dict[str, np.ndarray]:
        if "weight" in node.params:
            return {}
        channels = node.shape[1]
        return {f"{node.name}:affine": np.repeat(np.array([0, 1], np.float32), channels)}

    def gradient_halo(self, node: Node, low: Trace) -> tuple[int, int, int, int]:
        """That of its input's gradient where it can take its place: convolutions write it, nobody else needs it."""
        alone = len(node.inputs) == 1 and all(consumer.op == "conv2d" for consumer in low.consumers(node.name))
        return low.gradient_halo(node.inputs[0]) if alone and low.needs_gradient(node.inputs[0]) else (0, 0, 0, 0)

    def forward(self, node: Node, low: Trace) -> None:
        z = low.value(node.inputs[0])
        channels, eps = z.image.channels, node.attrs["eps"]
        moments = low.temporary(f"{node.name}.moments", 3 * channels)
        running = low.parameter(node, "running_mean"), low.parameter(node, "running_var")
        if _is_split(node, low):
            for place, role in enumerate(AFFINE):
                part = low.parameter(node, role)
                low.call(
                    "values.part",
                    CopyPart(channels, 0, 2 * channels, place * channels, channels),
                    part,
                    _affine(node, low),
                )
        if low.training and not node.attrs.get("evaluating"):
            statistics = low.statistics(node.inputs[0])
            image, chunks = z.image, 0
            if statistics:  # of as many pixels a vector as the convolution has
                chunks = image.slices * image.height
                lanes = (statistics.elems or 0) // (chunks * 2 * channels)
                image = replace(image, abreast=lanes // image.vector)
            alive, _ = _flags(node, low)
            low.call(
                "batch_norm.moments",
                BatchNormMoments(image, eps, chunks, bool(alive)),
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
        chain = chain_of(node, low)
        if chain is None or chain.before is not node:
            self._normalise(node, low)

    def recompute(self, node: Node, low: Trace) -> None:
        """y once more from z and the moments, which are kept."""
        self._normalise(node, low)

    @staticmethod
    def _normalise(node: Node, low: Trace) -> None:
        z, residual = low.value(node.inputs[0]), low.value(node.inputs[1]) if len(node.inputs) == 2 else None
        moments, y = low.temporary(f"{node.name}.moments", 3 * z.image.channels), low.output(node)
        alive, read = _flags(node, low)
        problem = BatchNormForward(
            z.image,
            y.image,
            node.attrs.get("activation"),
            residual.image if residual else None,
            bool(alive),
            bool(read),
        )
        low.call(
            "batch_norm.forward",
            problem,
            z,
            moments,
            _affine(node, low),
            *([residual] if residual else []),
            y,
            *(flags for flags in (alive, read) if flags),
            fills=y,
        )

    def backward(self, node: Node, low: Trace) -> None:
        if (chain := chain_of(node, low)) and chain.behind is node:  # the convolution before it takes dy as it is
            adopted = low.adopt(node.inputs[0], low.gradient(node))
            assert adopted, "nothing else is before a normalisation in a chain"
            return
        activation, added = node.attrs.get("activation"), len(node.inputs) == 2
        dy, wanted = low.gradient(node), low.needs_gradient(node.inputs[0])
        trained = [role for role in AFFINE if low.trains(node, role)]
        evaluating = node.attrs.get("evaluating", False)
        channels, summed = dy.image.channels, not evaluating or bool(trained)
        # In evaluation mode z is only read for sums, and where it tells the activation's slope.
        z = low.value(node.inputs[0]) if summed or (activation and not added) else None
        y = low.value(node.name) if activation and added else None
        masks = bool(y) and low.needs_gradient(node.inputs[1])
        sums = _sums(node, low, trained, channels) if summed else None
        in_place = wanted and not added and low.adopt(node.inputs[0], dy)
        dz, accumulate = low.contribute(node.inputs[0]) if wanted and not in_place else (None, False)
        alive, read = _flags(node, low)
        images = {name: one.image if one else None for name, one in (("z", z), ("y", y), ("dz", dz))}
        shared: dict[str, Any] = {"activation": activation, "accumulate": accumulate, "in_place": in_place, **images}
        problem: Any
        if evaluating:
            problem = FrozenNormBackward(dy.image, sums=summed, residual=masks, **shared)
        else:
            problem = BatchNormBackward(dy.image, alive=bool(alive), read=bool(read), **shared)
        if summed or wanted or masks:
            low.call(
                "frozen_norm.backward" if evaluating else "batch_norm.backward",
                problem,
                dy,
                *([z] if z and not evaluating else []),
                low.temporary(f"{node.name}.moments", 3 * channels),
                _affine(node, low),
                *([z] if z and evaluating else []),
                *(one for one in (y, sums, dz, alive, read) if one),
                fills=dz,
            )
        if len(trained) == 1 and sums:
            (role,) = trained
            gradient, place = low.parameter_gradient(node, role), AFFINE.index(role)
            low.call("values.part", CopyPart(2 * channels, place * channels, channels, 0, channels), sums, gradient)
        if added and low.needs_gradient(node.inputs[1]):
            pass_on(low, node.inputs[1], dy)

    def onnx(self, node: Node, writer: Writer) -> str:
        held = [writer.weight(node.params[role]) for role in ROLES if role in node.params]
        if len(held) < len(ROLES):
            bias, weight = self.constants(node)[f"{node.name}:affine"].reshape(2, -1)
            held = [writer.constant(weight, "ones"), writer.constant(bias, "zeros"), *held]
        return writer.call("BatchNormalization", [*writer.inputs(node), *held], node.shape, epsilon=node.attrs["eps"])


def _is_split(node: Node, low: Trace) -> bool:
    """Whether one of bias and weight trains and the other does not: they then lie apart, and side by side in a copy."""
    return low.trains(node, "bias") != low.trains(node, "weight")


def _affine(node: Node, low: Trace) -> Buffer:
    if "weight" not in node.params:
        return low.hold(f"{node.name}:affine", 2 * node.shape[1], "batch")
    if not _is_split(node, low):
        return low.parameter(node, *AFFINE)
    return low.temporary(f"{node.name}.affine", 2 * node.shape[1])


def _sums(node: Node, low: Trace, trained: list[str], channels: int) -> Buffer:
    """Where the gradients of bias and weight go: where both train, those of the parameters."""
    if len(trained) == 2:
        return low.parameter_gradient(node, *AFFINE)
    return low.temporary(f"{node.name}.sums", 2 * channels)


def _flags(node: Node, low: Trace) -> tuple[Buffer | None, Buffer | None]:
    """(alive, read) as the kernels take them. In evaluation mode neighbours spare nothing."""
    if node.attrs.get("evaluating"):
        return None, None
    return low.written(node.inputs[0]), None if len(node.inputs) == 2 else low.read(node.name)


@reads("relax.nn.batch_norm", gives=("batch_norm",))
def read_batch_norm(reader: Reader, call: Any, arguments: list) -> Any:
    attrs = call.attrs
    image, axes = channels_of(reader, arguments[0])
    given = dict(zip(ROLES, arguments[1:], strict=True))
    if all(changes_nothing(given[role], role) for role in AFFINE):
        given = {role: held for role, held in given.items() if role not in AFFINE}
    if int(attrs.axis) != 1 or not _is_stored(*given.values()):
        raise reader.error("batch_norm without running statistics, or of numbers that are no parameters of its own")
    params = {role: parameter.name for role, parameter in given.items()}
    normalised = reader.add(
        "batch_norm",
        (image,),
        image.shape,
        params,
        {"eps": _single(attrs.epsilon), "momentum": _single(attrs.momentum)},
    )
    statistics = Refused(reader.error("batch_norm's running statistics used as values"))
    return reader.viewed(normalised, axes), statistics, statistics
