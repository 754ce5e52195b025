"""Conversions of our own from torch to Relax, where TVM's importer has none or leaves out what torch computes with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from tvm import relax

from mest_compile.frontend.torch_cuts import RECURRENT
from mest_compile.frontend.torch_recurrent import recurrent

# Operators that torch's decompositions would take apart beyond recognition.
WHOLE = (
    *(f"{kind}.input" for kind in RECURRENT),
    "_upsample_nearest_exact2d.vec",
    "instance_norm.default",
    "prelu.default",
    "scaled_dot_product_attention.default",
)


def _upsample(method: str, coordinates: str, rounding: str) -> Callable[[Any, Any], Any]:
    def convert(node: Any, importer: Any) -> Any:
        """Arguments: value, size or None, of bilinear ones whether corners are aligned, factors or None. Sizes do not
        tell a factor that gives no whole ones: `roi` ends with their reciprocals, as torch computes with them."""
        aligned = method == "linear" and node.args[2]
        steps = [float(np.float32(1 / factor)) for factor in node.args[-1] or ()]
        resized = relax.op.image.resize2d(
            importer.env[node.args[0]],
            relax.ShapeExpr([int(size) for size in node.meta["val"].shape[2:]]),
            roi=[0.0, 0.0, *(steps or [0.0, 0.0])],
            layout="NCHW",
            method=method,
            coordinate_transformation_mode="align_corners" if aligned else coordinates,
            rounding_method=rounding,
        )
        return importer.block_builder.emit(resized)

    return convert


def _adaptive_max_pool2d(node: Any, importer: Any) -> Any:
    """(the mean's operator, whose reader is told what was called, no indices)."""
    pooled = relax.op.nn.adaptive_avg_pool2d(
        importer.env[node.args[0]], [int(size) for size in node.meta["val"][0].shape[2:]]
    )
    return importer.block_builder.emit(pooled), None


def _instance_norm(node: Any, importer: Any) -> Any:
    """A group_norm of as many groups as channels."""
    image, weight, bias, _, _, own, _, eps, _ = node.args
    if not own:
        raise NotImplementedError("instance_norm by running statistics, which training would not use")
    value, shape = importer.env[image], node.meta["val"].shape
    affine = [
        importer.env[one] if one is not None else relax.const(np.full(shape[1], usual, np.float32))
        for one, usual in ((weight, 1), (bias, 0))
    ]
    axes = list(range(2, len(shape)))
    normed = relax.op.nn.group_norm(value, *affine, num_groups=int(shape[1]), channel_axis=1, axes=axes, epsilon=eps)
    return importer.block_builder.emit(normed)


def _attention(node: Any, importer: Any) -> Any:
    """Of (N, heads, tokens, channels), which Relax has in another order."""
    named = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)) | node.kwargs
    if named.get("attn_mask") is not None:
        raise NotImplementedError("a mask")
    if named.get("dropout_p"):
        raise NotImplementedError(f"dropout_p={named['dropout_p']}, set it to 0")
    if named.get("enable_gqa"):
        raise NotImplementedError("enable_gqa=True")
    values = [importer.env[one] for one in node.args[:3]]
    if len(values[0].ty.shape) != 4:
        raise NotImplementedError(f"values of {len(values[0].ty.shape)} axes, 4 are wanted")
    emit = importer.block_builder.emit
    turned = [emit(relax.op.permute_dims(value, (0, 2, 1, 3))) for value in values]
    scale = named.get("scale")
    scale = float(int(values[0].ty.shape[-1])) ** -0.5 if scale is None else float(scale)
    masked = "TopLeft" if named.get("is_causal") else None
    found = emit(relax.op.nn.attention(*turned, scale=scale, causal_mask=masked))
    return emit(relax.op.permute_dims(found, (0, 2, 1, 3)))


def converters(importer: Any) -> dict[str, Callable[[Any], Any]]:
    """{name of an operator of torch: its conversion, of a node}, as TVM's importer has its own."""
    return {name: partial(convert, importer=importer) for name, convert in CONVERTERS.items()}


CONVERTERS: dict[str, Callable[..., Any]] = {
    **{f"{kind}.input": recurrent(kind) for kind in RECURRENT},
    "upsample_nearest2d.vec": _upsample("nearest_neighbor", "asymmetric", "floor"),
    "_upsample_nearest_exact2d.vec": _upsample("nearest_neighbor", "half_pixel", "round_prefer_ceil"),
    "upsample_bilinear2d.vec": _upsample("linear", "half_pixel", "floor"),
    "adaptive_max_pool2d.default": _adaptive_max_pool2d,
    "instance_norm.default": _instance_norm,
    "scaled_dot_product_attention.default": _attention,
}
