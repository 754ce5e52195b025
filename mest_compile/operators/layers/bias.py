"""Gradient of a bias that a convolution or linear layer adds to every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mest_compile.ir.layouts.batch import Image


@dataclass(frozen=True, slots=True)
class BiasGradient:
    """Kernel "bias.gradient": dy (dy.elems,), dbias (channels,): the sum of dy over pixels and examples."""

    dy: Image


def gradient_reference(dy: np.ndarray) -> np.ndarray:
    """(C,) in float64 of dy (C, H, W, N)."""
    return dy.astype(np.float64).sum((1, 2, 3))
