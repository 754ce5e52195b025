"""Where a convolution's kernels read and write: halos, passes, shifts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mest_compile.hardware.target import Target
from mest_compile.ir.graph import LayerSpec
from mest_compile.ir.layouts.batch import Image, overhang
from mest_compile.ir.layouts.layout import gradients_of
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


def source_halo(layer: LayerSpec, abreast: int = 1, combed: int = 1) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) zero pixels around the input that the forward pass reads, in vectors of `abreast`
    result pixels; of a combed row's parts where there are several."""
    (height, width), out = layer.output_size, layer.input_shape[2:]
    last = [
        (made - 1) * step + extent - pad - size
        for made, step, extent, pad, size in zip(
            (height, width + overhang(width, abreast)), layer.stride, layer.extent, layer.padding, out
        )
    ]
    bottom, right = max(0, last[0]), max(0, last[1])
    if combed > 1:
        assert combed == layer.stride[1], "what a stride reads stands together"
        return layer.padding[0], -(-layer.padding[1] // combed), bottom, -(-right // combed)
    return layer.padding[0], layer.padding[1], bottom, right


def reads_combed(layer: LayerSpec, target: Target) -> bool:
    """Whether the forward pass and the weight gradient read a copy whose rows are combed by the stride: where vectors
    cover several pixels."""
    return layer.stride[1] > 1 and target.abreast(layer.output_size[1]) > 1


def combed_halo(layer: LayerSpec, by: int, target: Target) -> tuple[int, int, int, int] | None:
    """The halo of a copy combed by `by` that the layer reads; None: it reads none."""
    if layer.stride[1] != by or not reads_combed(layer, target):
        return None
    return source_halo(layer, target.abreast(layer.output_size[1]), by)


def grid_abreast(layer: LayerSpec, target: Target) -> int:
    """How many pixels, a stride apart, a vector of the input gradient covers."""
    return target.abreast(-(-layer.input_shape[3] // layer.stride[1]))


def gradient_halo(layer: LayerSpec, abreast: int = 1) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) zero pixels around the output gradient that the input gradient reads, in vectors of
    `abreast` input pixels, stride apart."""
    halo = [0, 0, 0, 0]
    for grid_pass in parity_passes(layer):
        for axis, pixels in ((0, 1), (1, abreast)):
            reached, by = shift(layer, axis, grid_pass.start[axis])
            if reached.any():
                size = grid_pass.grid[axis]
                last = size + overhang(size, pixels) - 1 + by[reached].max()
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


def images_read(layer: LayerSpec, target: Target, activations: str) -> tuple[Image, Image]:
    """(the input as the forward pass reads it, the output's gradient as the input gradient does), as far as sections of
    an index depend on them: rows are not combed. activations: what the input is stored as."""
    forward, backward = target.abreast(layer.output_size[1]), grid_abreast(layer, target)
    source = image_of(layer, source_halo(layer, forward), target.slice_examples, False, activations)
    delta = image_of(layer, gradient_halo(layer, backward), target.slice_examples, True, gradients_of(activations))
    return replace(source, abreast=forward), replace(delta, abreast=backward)
