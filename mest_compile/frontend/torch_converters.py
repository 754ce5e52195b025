"""Conversions of our own from torch to Relax, where TVM's importer has none or leaves out what torch computes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
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
    "addcmul.default",
    "roll.default",
    "im2col.default",
    "col2im.default",
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


def _attention(node: Any, importer: Any, constants: Mapping[str, torch.Tensor]) -> Any:
    """Of (..., tokens, channels). Without a mask it is Relax's, of values of four axes, which it has in another order;
    else two products with a softmax between them."""
    named = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)) | node.kwargs
    if named.get("dropout_p"):
        raise NotImplementedError(f"dropout_p={named['dropout_p']}, set it to 0")
    emit, values = importer.block_builder.emit, [importer.env[one] for one in node.args[:3]]
    shapes = [[int(size) for size in one.meta["val"].shape] for one in node.args[:3]]
    scale = named.get("scale")
    scale = shapes[0][-1] ** -0.5 if scale is None else float(scale)
    mask = _mask(importer, named.get("attn_mask"), constants)
    heads = [shape[-3] if len(shape) > 2 else 1 for shape in shapes]
    shared = heads[0] // heads[1] if named.get("enable_gqa") or heads[1:] == [1, 1] else 1
    if shared > 1:  # queries that share a head of keys are more tokens of that head
        if mask is not None or named.get("is_causal"):
            raise NotImplementedError("a mask of queries that share heads of keys")
        queries = (*shapes[0][:-3], shapes[1][-3], shared * shapes[0][-2], shapes[0][-1])
        values[0] = emit(relax.op.reshape(values[0], queries))
    if mask is None and len(shapes[0]) == 4:
        turned = [emit(relax.op.permute_dims(value, (0, 2, 1, 3))) for value in values]
        masked = "TopLeft" if named.get("is_causal") else None
        found = emit(relax.op.nn.attention(*turned, scale=scale, causal_mask=masked))
        found = emit(relax.op.permute_dims(found, (0, 2, 1, 3)))
    elif named.get("is_causal"):
        raise NotImplementedError(f"is_causal=True of values of {len(shapes[0])} axes, 4 are wanted")
    else:
        rank = len(shapes[0])
        keys = emit(relax.op.permute_dims(values[1], (*range(rank - 2), rank - 1, rank - 2)))
        scores = emit(relax.op.multiply(emit(relax.op.matmul(values[0], keys)), relax.const(scale, "float32")))
        scores = scores if mask is None else emit(relax.op.add(scores, mask))
        found = emit(relax.op.matmul(emit(relax.op.nn.softmax(scores, -1)), values[2]))
    return emit(relax.op.reshape(found, node.meta["val"].shape)) if shared > 1 else found


def _mask(importer: Any, mask: Any, constants: Mapping[str, torch.Tensor]) -> Any:
    """What is added to scores; None: nothing."""
    if mask is None:
        return None
    held = constants.get(mask.name)
    if held is None:
        if mask.meta["val"].dtype == torch.bool:
            raise NotImplementedError("a mask that is computed from the input")
        return importer.env[mask]
    if held.dtype == torch.bool:
        held = torch.zeros(held.shape).masked_fill(~held, -np.inf)
    if (held == -np.inf).all(-1).any():
        raise NotImplementedError("a mask that hides all keys of a query")
    return relax.const(held.float().numpy()) if held.any() else None


def _addcmul(node: Any, importer: Any) -> Any:
    value, one, other = (importer.env[source] for source in node.args[:3])
    emit, factor = importer.block_builder.emit, node.kwargs.get("value", 1)
    product = emit(relax.op.multiply(one, other))
    if factor != 1:
        product = emit(relax.op.multiply(product, relax.const(float(factor), "float32")))
    return emit(relax.op.add(value, product))


def _roll(node: Any, importer: Any) -> Any:
    """The end of each axis, then what was before it."""
    value, emit = importer.env[node.args[0]], importer.block_builder.emit
    shifts, axes, sizes = list(node.args[1]), list(node.args[2]) if len(node.args) > 2 else [], node.meta["val"].shape
    if not axes:
        raise NotImplementedError("roll of all elements, say with dims along which axes")
    for shift, axis in zip(shifts, axes, strict=True):
        size = int(sizes[axis])
        if cut := -shift % size:
            parts = [
                emit(relax.op.strided_slice(value, [axis % len(sizes)], [first], [end], [1]))
                for first, end in ((cut, size), (0, cut))
            ]
            value = emit(relax.op.concat(parts, axis % len(sizes)))
    return value


def _patches(node: Any, named: Mapping[str, int]) -> tuple[int, int]:
    """(height, width) of patches that do not overlap and leave nothing out."""
    given = {name: tuple(node.args[place]) for name, place in named.items()}
    if given["stride"] != given["kernel"] or set(given["padding"]) != {0} or set(given["dilation"]) != {1}:
        raise NotImplementedError("unfold and fold of patches that overlap")
    return given["kernel"]


def _im2col(node: Any, importer: Any) -> Any:
    """(N, C * kh * kw, patches) of (N, C, H, W)."""
    emit, (batch, channels, height, width) = importer.block_builder.emit, node.args[0].meta["val"].shape
    high, wide = _patches(node, {"kernel": 1, "dilation": 2, "padding": 3, "stride": 4})
    if height % high or width % wide:
        raise NotImplementedError("unfold of patches that leave something out")
    cut = (batch, channels, height // high, high, width // wide, wide)
    value = emit(relax.op.permute_dims(emit(relax.op.reshape(importer.env[node.args[0]], cut)), (0, 1, 3, 5, 2, 4)))
    return emit(relax.op.reshape(value, node.meta["val"].shape))


def _col2im(node: Any, importer: Any) -> Any:
    """(N, C, H, W) of (N, C * kh * kw, patches)."""
    emit, (batch, channels, height, width) = importer.block_builder.emit, node.meta["val"].shape
    high, wide = _patches(node, {"kernel": 2, "dilation": 3, "padding": 4, "stride": 5})
    cut = (batch, channels, high, wide, height // high, width // wide)
    value = emit(relax.op.permute_dims(emit(relax.op.reshape(importer.env[node.args[0]], cut)), (0, 1, 4, 2, 5, 3)))
    return emit(relax.op.reshape(value, node.meta["val"].shape))


def converters(importer: Any, constants: Mapping[str, torch.Tensor]) -> dict[str, Callable[[Any], Any]]:
    """{name of an operator of torch: its conversion, of a node}, as TVM's importer has its own. constants: by node."""
    found = {name: partial(convert, importer=importer) for name, convert in CONVERTERS.items()}
    return found | {"scaled_dot_product_attention.default": partial(_attention, importer=importer, constants=constants)}


def _embedding(node: Any, importer: Any) -> Any:
    given = dict(zip(("weight", "numbers", "padding", "by_frequency"), node.args, strict=False))
    if given.get("by_frequency"):
        raise NotImplementedError("scale_grad_by_freq=True")
    shape = [int(size) for size in node.meta["val"].shape]
    values = [
        importer.env[given["weight"]],
        importer.env[given["numbers"]],
        relax.const(float(given.get("padding", -1))),
    ]
    kind = relax.TensorType(shape, "float32")
    return importer.block_builder.emit(relax.op.call_pure_packed("mest.embedding", *values, ty_args=kind))


CONVERTERS: dict[str, Callable[..., Any]] = {
    "embedding.default": _embedding,
    **{f"{kind}.input": recurrent(kind) for kind in RECURRENT},
    "upsample_nearest2d.vec": _upsample("nearest_neighbor", "asymmetric", "floor"),
    "_upsample_nearest_exact2d.vec": _upsample("nearest_neighbor", "half_pixel", "round_prefer_ceil"),
    "upsample_bilinear2d.vec": _upsample("linear", "half_pixel", "floor"),
    "adaptive_max_pool2d.default": _adaptive_max_pool2d,
    "instance_norm.default": _instance_norm,
    "addcmul.default": _addcmul,
    "roll.default": _roll,
    "im2col.default": _im2col,
    "col2im.default": _col2im,
}
