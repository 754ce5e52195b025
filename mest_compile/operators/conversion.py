"""Activations between NCHW at the model's border and our layout inside it, copies from one halo to another, and copies
of parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mest_compile.ir.layouts.batch import Image


@dataclass(frozen=True, slots=True)
class ImageImport:
    """Kernel "image.import": images (N, C, H, W) or as a step takes them, float32, result (result.elems,). Lanes
    without an example repeat the last one: what the network makes of them is finite where that is.
    """

    result: Image


@dataclass(frozen=True, slots=True)
class ImageExport:
    """Kernel "image.export": source (source.elems,), result (N, C, H, W) float32."""

    source: Image


@dataclass(frozen=True, slots=True)
class ZeroHalo:
    """Kernel "image.zero_halo": image (image.elems,). Writes 0 to the halo, touches nothing else."""

    image: Image


@dataclass(frozen=True, slots=True)
class ImageCopy:
    """Kernel "image.copy": source (source.elems,), result (result.elems,). Same pixels, halos may differ.

    accumulate  result += source
    """

    source: Image
    result: Image
    accumulate: bool = False


@dataclass(frozen=True, slots=True)
class ImageComb:
    """Kernel "image.comb": plain (plain.elems,), combed (combed.elems,): the same pixels with their rows combed; its
    columns that no pixel has become 0, its halo stays. Kernel "image.uncomb": combed, plain, the other way.

    accumulate  of "image.uncomb": plain += combed
    """

    plain: Image
    combed: Image
    accumulate: bool = False

    def __post_init__(self) -> None:
        assert self.plain.combed == 1 < self.combed.combed, "one side is combed"
        assert self.plain.dtype == self.combed.dtype != "bfloat16", "rows are combed in float32 and float16"
        assert not (self.accumulate and self.plain.dtype == "float16"), "gradients are float32"


@dataclass(frozen=True, slots=True)
class Grid:
    """Elements of an image, each (channel, row, column): the first, and how far one is from the next."""

    start: tuple[int, int, int] = (0, 0, 0)
    step: tuple[int, int, int] = (1, 1, 1)

    def index(self, size: tuple[int, int, int]) -> tuple[slice, ...]:
        """Of `size` elements in an array (C, H, W, N)."""
        return tuple(
            slice(first, first + (count - 1) * step + 1, step)
            for first, step, count in zip(self.start, self.step, size, strict=True)
        )


@dataclass(frozen=True, slots=True)
class ImagePart:
    """Kernel "image.part": source (source.elems,), result (result.elems,). What one grid has becomes the other's.

    size        (channels, rows, columns) of both grids
    taken, put  the grids in source and in result
    accumulate  result += source, there
    fill        what the other elements of the result become; None: they stay
    """

    source: Image
    result: Image
    size: tuple[int, int, int]
    taken: Grid = Grid()
    put: Grid = Grid()
    accumulate: bool = False
    fill: float | None = None

    def __post_init__(self) -> None:
        assert not self.accumulate or self.fill is None, "what is there cannot be added to and filled"
        for image, grid in (self.source, self.taken), (self.result, self.put):
            ends = [part.stop for part in grid.index(self.size)]
            assert min(grid.start) >= 0 and all(
                end <= most for end, most in zip(ends, (image.channels, image.height, image.width), strict=True)
            ), f"{grid} of {self.size} elements leaves {image}"


def import_reference(images: np.ndarray) -> np.ndarray:
    """(C, H, W, N) of images (N, C, H, W)."""
    return np.moveaxis(images, 0, -1)


def export_reference(source: np.ndarray) -> np.ndarray:
    """(N, C, H, W) of source (C, H, W, N)."""
    return np.moveaxis(source, -1, 0)


def part_reference(problem: ImagePart, source: np.ndarray, result: np.ndarray) -> np.ndarray:
    """(C, H, W, N) of source and result, in float64."""
    out = result.astype(np.float64) if problem.fill is None else np.full(result.shape, problem.fill)
    there, taken = problem.put.index(problem.size), source[problem.taken.index(problem.size)]
    out[there] = out[there] + taken if problem.accumulate else taken
    return out
