"""What a sparsity scheme is: which units a layer's weight falls into, and which sets of live units are legal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from mest_compile.errors import SparsityError, StateError, UsageError
from mest_compile.mutation import grow, prune
from mest_compile.spec import LayerSpec


class Scheme(ABC):
    """Base of all schemes. A scheme is a frozen value; units of a layer form a grid (groups, sources, kh, kw) of bools `keep`."""

    name: ClassVar[str]

    @classmethod
    def parse(cls, arguments: str) -> Scheme:
        """The scheme from the text behind its name's colon; most schemes take none. Raises UsageError."""
        if arguments:
            raise UsageError(f"scheme {cls.name!r} takes no arguments, got {arguments!r}")
        return cls()

    @abstractmethod
    def block(self, layer: LayerSpec) -> tuple[int, int]:
        """(output channels, input channels) that one unit spans."""

    def check(self, layer: LayerSpec) -> None:
        """Raises SparsityError when the layer cannot be cut into this scheme's units."""
        rows, sources = self.block(layer)
        out, inputs = layer.weight_shape[:2]
        if out % rows or inputs % sources:
            raise SparsityError(f"{layer.name}: scheme {self} needs multiples of {rows} output and {sources} input channels, the layer "
                                f"has {out} and {inputs}; choose another block, or list the layer in dense_layers")

    def grid(self, layer: LayerSpec) -> tuple[int, int, int, int]:
        """Shape of the layer's unit grid."""
        rows, sources = self.block(layer)
        out, inputs, height, width = layer.weight_shape
        return out // rows, inputs // sources, height, width

    def unit_elems(self, layer: LayerSpec) -> int:
        """Weights of one unit."""
        rows, sources = self.block(layer)
        return rows * sources

    def live_units(self, layer: LayerSpec, sparsity: float) -> int:
        """Units that live at `sparsity`, rounded to the nearest; 0 <= sparsity < 1. Raises SparsityError."""
        if not 0.0 <= sparsity < 1.0:
            raise SparsityError(f"{layer.name}: sparsity is {sparsity}; wanted 0 <= sparsity < 1 (0.9 keeps one weight in ten)")
        return max(1, round(int(np.prod(self.grid(layer))) * (1.0 - sparsity)))

    def scores(self, layer: LayerSpec, importance: np.ndarray) -> np.ndarray:
        """Score of every unit: the L2 norm of its weights' importance. (out, in, kh, kw) -> grid. Source: MEST, section 3."""
        rows, sources = self.block(layer)
        groups, blocks, height, width = self.grid(layer)
        return np.sqrt(np.square(importance, dtype=np.float64).reshape(groups, rows, blocks, sources, height, width).sum((1, 3)))

    def prune(self, layer: LayerSpec, keep: np.ndarray, scores: np.ndarray, live: int) -> np.ndarray:
        """The `live` best-scored units of those in `keep`; grid in, grid out."""
        return prune(keep.ravel(), scores.ravel(), live).reshape(keep.shape)

    def grow(self, layer: LayerSpec, keep: np.ndarray, live: int, rng: np.random.Generator) -> np.ndarray:
        """`keep` with units drawn evenly from the dead ones added until `live` live."""
        return grow(keep.ravel(), live, rng).reshape(keep.shape)

    def expand(self, layer: LayerSpec, keep: np.ndarray) -> np.ndarray:
        """Weight mask (out, in, kh, kw) bool of a unit grid."""
        rows, sources = self.block(layer)
        return np.repeat(np.repeat(keep, rows, axis=0), sources, axis=1)

    def collapse(self, layer: LayerSpec, mask: np.ndarray) -> np.ndarray:
        """Unit grid of a weight mask. Raises StateError when the mask cuts a unit in two."""
        if mask.shape != layer.weight_shape:
            raise StateError(f"{layer.name}: the mask has shape {mask.shape}, the weight {layer.weight_shape}")
        rows, sources = self.block(layer)
        keep = mask[::rows, ::sources].astype(bool)
        if not np.array_equal(self.expand(layer, keep), mask.astype(bool)):
            raise StateError(f"{layer.name}: the mask is not made of whole units of scheme {self}; build it with the scheme's own mutation")
        return keep
