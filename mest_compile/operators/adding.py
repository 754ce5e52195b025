"""Gradients of several passes, added up in the arrays of the gradients themselves. No array's size stands in these
kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHARE = "loss:share"  # what a pass's mean loss counts in that of the whole batch, (1,) float32


@dataclass(frozen=True, slots=True)
class Zero:
    """Kernel "gradients.zero": gradients (n,), which become 0, whatever was there. n is symbolic."""


@dataclass(frozen=True, slots=True)
class Add:
    """Kernel "gradients.add": part (n,), gradients (n,). gradients += part; n is symbolic."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Kernel "gradients.scale": gradients (n,), share (1,). gradients *= share; n is symbolic."""


def zero_reference(gradients: np.ndarray) -> np.ndarray:
    """New gradients in float64."""
    return np.zeros(gradients.shape)


def add_reference(part: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """New gradients in float64."""
    return gradients.astype(np.float64) + part


def scale_reference(gradients: np.ndarray, share: np.ndarray) -> np.ndarray:
    """New gradients in float64."""
    return gradients.astype(np.float64) * share
