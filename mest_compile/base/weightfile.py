"""Safetensors files of weights and their masks: every weight, or only the live ones and where they are.

Whole: the array NAME and its mask, the bool array "mask:NAME". Compressed: "live:NAME", the weights that live in the
order of C, and "bits:NAME", uint8, a bit for each weight in that order, the lowest of a byte first, 1 where it lives;
the shapes are the JSON text "shapes" of the header. A bit a weight is less than an int32 index for each live one down
to a density of 1/32, and the same for every scheme.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod

import numpy as np

from mest_compile.base import tensorfile

MASK, LIVE, BITS, SHAPES = "mask:", "live:", "bits:", "shapes"

Arrays = dict[str, np.ndarray]


def pieces(
    state: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray], texts: Mapping[str, str], compressed: bool
) -> list[bytes | memoryview]:
    """A file's content, one piece behind another. masks: of some of the state's arrays, bool, in their shapes; what is
    dead is 0."""
    if not compressed:
        return tensorfile.pieces({**state, **{f"{MASK}{name}": mask for name, mask in masks.items()}}, texts)
    arrays = {name: array for name, array in state.items() if name not in masks}
    for name, mask in masks.items():
        arrays[f"{LIVE}{name}"] = state[name][mask]
        arrays[f"{BITS}{name}"] = np.packbits(mask.reshape(-1), bitorder="little")
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    return tensorfile.pieces(arrays, {**texts, SHAPES: json.dumps(shapes)})


def unpack(content: bytes) -> tuple[Arrays, Arrays]:
    """(state, masks) of a file's content, in either form, or of any safetensors file, which has no masks. Raises
    ValueError when it is damaged."""
    arrays, texts = tensorfile.unpack(content)
    masks = {name.removeprefix(MASK): arrays.pop(name) for name in list(arrays) if name.startswith(MASK)}
    for name, shape in json.loads(texts.get(SHAPES, "{}")).items():
        try:
            bits, live = arrays.pop(f"{BITS}{name}"), arrays.pop(f"{LIVE}{name}")
        except KeyError as problem:
            raise ValueError(f"{name} is not all there") from problem
        if len(bits) != -(-prod(shape) // 8):
            raise ValueError(f"the mask of {name} is not of shape {shape}")
        mask = np.unpackbits(bits, count=prod(shape), bitorder="little").astype(bool).reshape(shape)
        if mask.sum() != len(live):
            raise ValueError(f"{name} has {len(live)} live weights, and its mask {mask.sum()}")
        arrays[name], masks[name] = np.zeros(shape, live.dtype), mask
        arrays[name][mask] = live
    return arrays, masks
