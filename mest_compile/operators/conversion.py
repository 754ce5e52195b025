"""Activations between NCHW at the model's border and our layout inside it, and copies from one halo to another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mest_compile.ir.layouts.batch import Image


@dataclass(frozen=True, slots=True)
class ImageImport:
    """Kernel "image.import": images (N, C, H, W) float32, result (result.elems,). Lanes without an example repeat the
    last one:
    what the network makes of them is finite where that is.
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


def import_reference(images: np.ndarray) -> np.ndarray:
    """(C, H, W, N) of images (N, C, H, W)."""
    return np.moveaxis(images, 0, -1)


def export_reference(source: np.ndarray) -> np.ndarray:
    """(N, C, H, W) of source (C, H, W, N)."""
    return np.moveaxis(source, -1, 0)
