"""Rows combed by a stride, for convolutions whose vectors cover neighbouring pixels: a copy of what they read, and a
gradient that is put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mest_compile.operators.conversion import ImageComb
from mest_compile.operators.layers.geometry import combed_halo, grid_abreast
from mest_compile.operators.operator import Trace

if TYPE_CHECKING:
    from mest_compile.hardware.target import Target
    from mest_compile.ir.graph import LayerSpec
    from mest_compile.ir.layouts.batch import Image
    from mest_compile.ir.program import Activation


def read_source(name: str, spec: LayerSpec, readers: Sequence[LayerSpec], low: Trace) -> Activation:
    """The value of `name` combed by that layer's stride. All of its readers whose kernels take rows share a copy, one
    in the forward pass and one in the backward pass."""
    plain, by = low.value(name), spec.stride[1]
    key = f"{name}.combed{by}", low.stage
    if key not in low.copies:
        assert plain.image
        alike = [one for one in readers if combed_halo(one, by, low.target)]
        image = combed_image(plain.image, alike, low.target)
        low.copies[key] = low.scratch(key[0], image)
        low.call("image.comb", ImageComb(plain.image, image), plain, low.copies[key])
    return low.copies[key]


def combed_image(plain: Image, specs: Sequence[LayerSpec], target: Target) -> Image:
    """How a copy of `plain` lies that these layers, of one stride, read."""
    by = specs[0].stride[1]
    halos = [halo for spec in specs if (halo := combed_halo(spec, by, target))]
    top, left, bottom, right = (max(sides) for sides in zip(*halos, strict=True))
    pixels = max(target.abreast(spec.output_size[1]) for spec in specs)
    return replace(plain, combed=by, abreast=pixels).haloed((top, left, bottom, right))


def gradient_goal(name: str, target: Activation, spec: LayerSpec, low: Trace) -> Activation:
    """Where the input gradient of that layer goes, at first: `target`, or pixels with their rows combed."""
    assert target.image
    by, pixels = spec.stride[1], grid_abreast(spec, low.target)
    if by == 1 or pixels == 1:
        return target
    image = replace(target.image, combed=by, abreast=pixels).haloed((0, 0, 0, 0))
    return low.scratch(f"{name}.combed", image)
