"""Conversions of our own from ONNX to Relax, where those of TVM's importer say another thing or say it in a way that
cannot be read: Pad becomes a function without a name there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from mest_compile.frontend.onnx_recurrent import DIRECTIONS, KIND, REFUSED
from mest_compile.frontend.recurrent_calls import call_directions, states


def _numbers(value: Any, what: str) -> list[Any]:
    if not hasattr(value, "value"):
        raise ValueError(f"{what} must be known when the model is compiled")
    return value.value.numpy().reshape(-1).tolist()


def _pad(x: Any, rest: list[Any], attrs: dict[str, Any]) -> Any:
    """Inputs beside x: pads, value, axes; before opset 11 the first two are attributes."""
    pads, fill, axes = [*rest, None, None, None][:3]
    widths = list(attrs["pads"]) if pads is None else _numbers(pads, "pads")
    value = attrs.get("value", 0.0) if fill is None else _numbers(fill, "the value of a pad")[0]
    rank, half = len(x.ty.shape), len(widths) // 2
    sides = [0] * (2 * rank)
    for place, axis in enumerate(range(rank) if axes is None else _numbers(axes, "axes")):
        sides[2 * (axis % rank)], sides[2 * (axis % rank) + 1] = widths[place], widths[half + place]
    return relax.op.nn.pad(x, sides, attrs.get("mode", b"constant").decode(), float(value))


def _resize(x: Any, rest: list[Any], attrs: dict[str, Any]) -> Any:
    """Inputs beside x: roi, scales, sizes. TVM knows the sizes alone; here `roi` ends with the scales' reciprocals,
    0 where the sizes tell them."""
    _, scales, sizes = [*rest, None, None, None][:3]
    text = {name: value.decode() for name, value in attrs.items() if isinstance(value, bytes)}
    mode = text.get("mode", "nearest")
    before, rank = [int(size) for size in x.ty.shape], len(x.ty.shape)
    if attrs.get("antialias") or attrs.get("axes") or text.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise ValueError("antialias, axes and a kept aspect ratio are not supported")
    by = [] if scales is None else _numbers(scales, "scales")
    made = [int(size * scale) for size, scale in zip(before, by)] if by else _numbers(sizes, "sizes")
    if rank != 4 or made[:2] != before[:2]:
        raise ValueError(f"it gives {tuple(made)} of {tuple(before)}; only rows and columns may change")
    return _resized(
        x,
        made[2:],
        mode,
        text.get("coordinate_transformation_mode", "half_pixel"),
        text.get("nearest_mode", "round_prefer_floor"),
        [float(np.float32(1) / np.float32(scale)) for scale in by[2:]],
    )


def _upsample(x: Any, rest: list[Any], attrs: dict[str, Any]) -> Any:
    """What Resize was called before opset 10."""
    by = list(attrs["scales"]) if "scales" in attrs else _numbers(rest[0], "scales")
    scales = relax.const(np.array(by, np.float32))
    asymmetric = {"coordinate_transformation_mode": b"asymmetric", "nearest_mode": b"floor"}
    return _resize(x, [None, scales], {"mode": attrs.get("mode", b"nearest"), **asymmetric})


def _gather(x: Any, rest: list[Any], attrs: dict[str, Any]) -> Any:
    """One place of an axis of a value; None, which leaves it to TVM, where it is of several, or of sizes."""
    (index,) = rest
    if not isinstance(x, relax.Var) or not hasattr(index, "value") or index.value.numpy().shape != ():
        return None
    axis = int(attrs.get("axis", 0)) % len(x.ty.shape)
    place, size = int(index.value.numpy()), int(x.ty.shape[axis])
    return relax.op.take(x, relax.const(place % size, "int64"), axis=axis)


def _instance_norm(x: Any, rest: list[Any], attrs: dict[str, Any]) -> Any:
    """A group_norm of as many groups as channels: TVM's own formula loses digits far from 0."""
    rank, channels = len(x.ty.shape), int(x.ty.shape[1])
    how = {"channel_axis": 1, "axes": list(range(2, rank)), "epsilon": float(attrs.get("epsilon", 1e-5))}
    return relax.op.nn.group_norm(x, *rest, num_groups=channels, **how)


def _resized(x: Any, size: list[int], mode: str, coordinates: str, rounding: str, scale: list[float]) -> Any:
    return relax.op.image.resize2d(
        x,
        relax.ShapeExpr(size),
        roi=[0.0, 0.0, *(scale or [0.0, 0.0])],
        layout="NCHW",
        method="nearest_neighbor" if mode == "nearest" else mode,
        coordinate_transformation_mode=coordinates,
        rounding_method=rounding,
    )


def recurrent(emit: Callable[[Any], Any], x: Any, rest: list[Any], attrs: dict[str, Any]) -> Any:
    """What `onnx_recurrent` made of an LSTM, a GRU or an RNN: (values (T, directions, N, H), last states (directions,
    N, H)) of x (T, N, inputs). emit: of a block builder."""
    if REFUSED in attrs:
        raise ValueError(attrs[REFUSED].decode())
    steps, batch, _ = (int(size) for size in x.ty.shape)
    names = DIRECTIONS[attrs.get("direction", b"forward")]
    weights = {name: [one for one in rest[4 * place :][:4] if one is not None] for place, name in enumerate(names)}
    value = emit(relax.op.permute_dims(x, (1, 0, 2)))
    found, last = call_directions(emit, attrs[KIND].decode(), value, weights)
    found = emit(relax.op.reshape(found, (batch, steps, len(names), int(found.ty.shape[2]) // len(names))))
    return relax.Tuple([emit(relax.op.permute_dims(found, (1, 2, 0, 3))), states(emit, last)])


NAMED = ("InstanceNormalization",)  # operators of OWN that take parameters: these stay what they are
# ONNX operator -> function (first input, the others: constants, or None where one is left out; attributes), which may
# give None: then TVM's conversion is taken
OWN: dict[str, Callable[[Any, list[Any], dict[str, Any]], Any]] = {
    "Gather": _gather,
    "InstanceNormalization": _instance_norm,
    "Pad": _pad,
    "Resize": _resize,
    "Upsample": _upsample,
}
