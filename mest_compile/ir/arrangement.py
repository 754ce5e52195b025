"""What the axes of a tensor are made of, where it lies in memory as an image: reshaping and permuting move no number.

An image is (N, C, H, W). Tokens (N, T, C) are an image whose pixels are T; the heads of an attention are a part of C;
the windows of a Swin transformer are parts of H and W. An axis of a tensor is a product of such parts, the last of them
running fastest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np

DIMS = "NCHW"


class Part(NamedTuple):
    """Part of a dimension of an image: places `stride` apart, `size` of them."""

    dim: str
    size: int
    stride: int


Axis = tuple[Part, ...]


def image_shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(N, C, H, W) of the image that a tensor lies in as it is: features are channels of one pixel, and a series
    (N, C, L) is an image of one row. Of a weight (out, in) or (out, in, k) likewise."""
    batch, channels, *pixels = shape
    height, width = (*(1,) * (2 - len(pixels)), *pixels)
    return batch, channels, height, width


def as_image(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a value as the graph has it: features stay features."""
    return tuple(shape) if len(shape) == 2 else image_shape(shape)


def whole(shape: Sequence[int]) -> dict[str, Axis]:
    """Every dimension of an image (N, C, H, W) as an axis of its own."""
    return {dim: (Part(dim, size, 1),) if size > 1 else () for dim, size in zip(DIMS, image_shape(shape), strict=True)}


def merged(parts: Iterable[Part]) -> Axis:
    """The same axis in as few parts as say it."""
    found: list[Part] = []
    for part in parts:
        if found and found[-1].dim == part.dim and found[-1].stride == part.size * part.stride:
            found[-1] = Part(part.dim, found[-1].size * part.size, part.stride)
        elif part.size > 1:
            found.append(part)
    return tuple(found)


def cut(parts: Sequence[Part], sizes: Sequence[int]) -> list[Axis] | None:
    """Axes of those sizes, one behind another, that the parts make; None where a part would not come apart so."""
    left, axes = [part for part in parts if part.size > 1][::-1], []
    for size in sizes:
        axis: list[Part] = []
        while size > 1:
            if not left:
                return None
            part = left.pop()
            if size % part.size == 0:
                axis.append(part)
                size //= part.size
            elif part.size % size == 0:
                rest = part.size // size
                axis.append(Part(part.dim, size, part.stride * rest))
                left.append(Part(part.dim, rest, part.stride))
                size = 1
            else:
                return None
        axes.append(merged(axis))
    return None if left else axes


def size_of(axis: Axis) -> int:
    return prod(part.size for part in axis)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The axes of a tensor, each as parts of the image that it lies in."""

    axes: tuple[Axis, ...]

    @classmethod
    def plain(cls, shape: Sequence[int]) -> Arrangement:
        """Of a tensor (N, F), (N, C, L) or (N, C, H, W) that lies as it is."""
        dims = whole(shape)
        return cls(tuple(dims[dim] for dim in {2: "NC", 3: "NCW", 4: "NCHW"}[len(shape)]))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size_of(axis) for axis in self.axes)

    def reshaped(self, shape: Sequence[int]) -> Arrangement | None:
        """None where parts would not come apart so."""
        axes = cut([part for axis in self.axes for part in axis], shape)
        return None if axes is None else Arrangement(tuple(axes))

    def permuted(self, order: Sequence[int]) -> Arrangement:
        """Axis `order[k]` becomes axis k."""
        return Arrangement(tuple(self.axes[place] for place in order))

    def physical(self, array: np.ndarray, image: Sequence[int]) -> np.ndarray | None:
        """Numbers that are broadcast over the axes, as they are broadcast over the image (N, C, H, W) that the tensor
        lies in: (1, C or 1, H or 1, W or 1). None where they cannot be, or differ between examples."""
        if array.ndim > len(self.axes):
            return None
        axes = self.axes[len(self.axes) - array.ndim :]
        if any(size not in (1, size_of(axis)) for size, axis in zip(array.shape, axes, strict=True)):
            return None
        parts = [(part, size > 1) for size, axis in zip(array.shape, axes, strict=True) for part in axis]
        cut = array.reshape([part.size if varies else 1 for part, varies in parts])
        order = sorted(range(len(parts)), key=lambda k: (DIMS.index(parts[k][0].dim), -parts[k][0].stride))
        sizes = []
        for dim, size in zip(DIMS, image_shape(image), strict=True):
            varying = {part.size for part, varies in parts if part.dim == dim and varies}
            covered = prod(part.size for part, varies in parts if part.dim == dim and varies)
            if varying and (dim == "N" or covered != size):
                return None
            sizes.append(covered)
        return cut.transpose(order).reshape(sizes)

    def moved(self, image: Mapping[str, Axis]) -> Arrangement:
        """The same axes where the tensor lies in another image, whose dimensions are these parts, `merged`, of the one
        that it lies in."""
        return Arrangement(tuple(merged(new for part in axis for new in _places(part, image)) for axis in self.axes))


def _places(part: Part, image: Mapping[str, Axis]) -> Axis:
    """The part of a dimension as parts of an image whose dimensions are made of `image`'s parts."""
    found: dict[int, Part] = {}  # by how far apart they were
    for dim, axis in image.items():
        stride = 1
        for other in reversed(axis):
            low = max(part.stride, other.stride)
            high = min(part.stride * part.size, other.stride * other.size)
            if other.dim == part.dim and high > low:
                found[low] = Part(dim, high // low, low // other.stride * stride)
            stride *= other.size
    places = tuple(found[low] for low in sorted(found, reverse=True))
    assert size_of(places) == part.size, f"{part} is not in {image}"
    return places


def inverse(image: Mapping[str, Axis]) -> dict[str, Axis]:
    """The dimensions of an image as parts of another one, which is made of `image`'s parts of it."""
    found: dict[str, list[tuple[int, Part]]] = {dim: [] for dim in DIMS}
    for dim, axis in image.items():
        stride = 1
        for part in reversed(axis):
            found[part.dim].append((part.stride, Part(dim, part.size, stride)))
            stride *= part.size
    return {dim: merged(part for _, part in sorted(parts, reverse=True)) for dim, parts in found.items()}


def together(a: Sequence[Axis], b: Sequence[Axis]) -> tuple[list[Axis], list[Axis]] | None:
    """Axes of equal sizes, each pair cut into parts of equal sizes; None where that cannot be."""
    found: tuple[list[Axis], list[Axis]] = [], []
    for mine, others in zip(a, b, strict=True):
        sizes = _cuts(mine, others)
        if sizes is None:
            return None
        for axis, place in (mine, found[0]), (others, found[1]):
            pieces = cut(axis, sizes)
            if pieces is None or any(len(piece) != 1 for piece in pieces):
                return None
            place.append(tuple(piece[0] for piece in pieces))
    return found


def _cuts(a: Axis, b: Axis) -> list[int] | None:
    """The sizes of the pieces into which the cuts of both axes together cut them."""
    inner = {1}
    for axis in a, b:
        count = 1
        for part in reversed(axis):
            count *= part.size
            inner.add(count)
    ends = sorted(inner)
    steps = [high // low for low, high in pairwise(ends) if high % low == 0]
    return steps[::-1] if len(steps) == len(ends) - 1 else None
