"""Where a convolution's kernels read and write: halos, passes, shifts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mest_compile.ir.graph import LayerSpec
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.layers.gather import Pass


def parity_passes(layer: LayerSpec) -> tuple[Pass, ...]:
    """The input gradient of a strided convolution, cut by the input pixel's remainder: in each pass every tap is a
    plain shift."""
    height, width = layer.input_shape[2:]
    passes = [
        Pass((-(-(height - y) // layer.stride[0]), -(-(width - x) // layer.stride[1])), (y, x), layer.stride)
        for y in range(min(layer.stride[0], height))
        for x in range(min(layer.stride[1], width))
    ]
    return tuple(passes)


def shift(layer: LayerSpec, axis: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    """(does tap k reach inputs `start`, `start + stride`, ...; output minus grid position of tap k) for every k of an
    axis (0 is y)."""
    distance = start + layer.padding[axis] - np.arange(layer.weight_shape[2 + axis]) * layer.dilation[axis]
    return distance % layer.stride[axis] == 0, distance // layer.stride[axis]


def reaching_passes(layer: LayerSpec) -> tuple[Pass, ...]:
    """`parity_passes` with an empty grid for those that no tap reaches: what is added there is 0."""

    def reached(grid_pass: Pass) -> bool:
        return all(shift(layer, axis, grid_pass.start[axis])[0].any() for axis in (0, 1))

    return tuple(
        grid_pass if reached(grid_pass) else replace(grid_pass, grid=(0, 0)) for grid_pass in parity_passes(layer)
    )


def source_halo(layer: LayerSpec) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) zero pixels around the input that the forward pass reads."""
    last = [
        (out - 1) * step + extent - pad - size
        for out, step, extent, pad, size in zip(
            layer.output_size, layer.stride, layer.extent, layer.padding, layer.input_shape[2:]
        )
    ]
    return layer.padding[0], layer.padding[1], max(0, last[0]), max(0, last[1])


def gradient_halo(layer: LayerSpec) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) zero pixels around the output gradient that the input gradient reads."""
    halo = [0, 0, 0, 0]
    for grid_pass in parity_passes(layer):
        for axis in (0, 1):
            reached, by = shift(layer, axis, grid_pass.start[axis])
            if reached.any():
                last = grid_pass.grid[axis] - 1 + by[reached].max()
                halo[axis] = max(halo[axis], int(-by[reached].min()))
                halo[axis + 2] = max(halo[axis + 2], int(last - layer.output_size[axis] + 1))
    return tuple(halo)  # type: ignore[return-value]


def image_of(
    layer: LayerSpec, halo: tuple[int, int, int, int], vector: int, output: bool, dtype: str = "float32"
) -> Image:
    """The layer's input or output as it lies in memory."""
    batch, channels, height, width = layer.input_shape
    if output:
        channels, (height, width) = layer.weight_shape[0], layer.output_size
    return Image(channels, height, width, batch, halo, vector, dtype)
