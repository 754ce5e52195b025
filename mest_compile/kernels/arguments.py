"""Arrays to try a kernel on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mest_compile.ir.layouts.layout import to_stored
from mest_compile.ir.program import Buffer, Call, Program
from mest_compile.operators.layers.family import FAMILIES, masked_elems
from mest_compile.operators.layers.index import LayerIndex
from mest_compile.sparsity.layer import Layer


def call_arrays(call: Call, layer: Layer, program: Program, seed: int = 0) -> list[np.ndarray]:
    """Arrays that a layer's call takes: the index of a random legal mask at the layer's sparsity, random values, zero
    halos."""
    rng = np.random.default_rng(seed)
    keep = layer.scheme.start(
        layer.spec, rng.random(layer.scheme.grid(layer.spec)), layer.scheme.live_units(layer.spec, layer.sparsity), rng
    )
    index = FAMILIES.find(layer.kernels).index(layer, keep, program)
    return [_array(buffer, layer, index, rng) for buffer in call.buffers]


def _array(buffer: Buffer, layer: Layer, index: LayerIndex, rng: np.random.Generator) -> np.ndarray:
    if buffer.layer == layer.spec.name and buffer.role in index.arrays:
        return index.arrays[buffer.role]
    if buffer.image is not None:
        image = buffer.image
        return image.pack(
            to_stored(rng.standard_normal((image.channels, image.height, image.width, image.batch)), image.dtype)
        )
    if buffer.role == "transposed" and "transposed_from" in index.arrays:
        elems = len(index.arrays["transposed_from"])
    else:
        elems = len(index.sort) * layer.scheme.cell_elems(layer.spec) if buffer.elems is None else buffer.elems
    return rng.standard_normal(elems).astype(np.float32)


def any_arrays(call: Call, layers: Mapping[str, Layer], program: Program, seed: int = 0) -> list[np.ndarray]:
    """Arrays, flat, that any call of a program takes: as `call_arrays`, of layers that are indexed together, and what
    kernels divide by above 0."""
    rng, indices = np.random.default_rng(seed), dict[str, LayerIndex]()
    return [_argument(call, buffer, program, layers, indices, False, rng) for buffer in call.buffers]


def _argument(
    call: Call,
    buffer: Buffer,
    program: Program,
    layers: Mapping[str, Layer],
    indices: dict[str, LayerIndex],
    exact: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    name, role = call.layer if buffer.sharers else buffer.layer, buffer.role
    if name in layers and name not in indices:
        layer = layers[name]
        energy = rng.random(layer.scheme.grid(layer.spec))
        keep = layer.scheme.start(layer.spec, energy, layer.scheme.live_units(layer.spec, layer.sparsity), rng)
        indices[name] = FAMILIES.find(layer.kernels).index(layer, keep, program)
    if buffer.kind == "indices":
        return indices[name].arrays[role].ravel()
    if buffer.image:
        image = buffer.image
        return image.pack(
            to_stored(_whole(rng, (image.channels, image.height, image.width, image.batch)), image.dtype)
        ).ravel()
    if buffer.elems is None:
        order, there = indices[name].sort, indices[name].arrays.get("transposed_from")
        if there is None:
            return _whole(rng, masked_elems(buffer, layers, {name: len(order)}, name))
        # A cell may be held twice, to fill up a list of rows, and then with one value.
        return _whole(rng, int(order.max()) + 1).take(order.take(there) if role == "transposed" else order)
    if buffer.dtype == "int32":
        return rng.integers(0, 2, buffer.elems).astype(np.int32)
    return _whole(rng, buffer.elems) if exact else rng.uniform(0.5, 1.5, buffer.elems).astype(np.float32)


def _whole(rng: np.random.Generator, size: Any) -> np.ndarray:
    return rng.integers(-1, 2, size).astype(np.float32)
