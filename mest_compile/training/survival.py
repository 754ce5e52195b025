"""How masks have moved in a run: what lives since its start, and how sparse layers are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mest_compile.sparsity.distributions import together


class Survival:
    """Of the masks of a step, from now on.

    first_live  {layer: weights that lived at the start}
    """

    def __init__(self, step: Any):
        self._step = step
        self._survivors = {name: mask.ravel() for name, mask in step.masks().items()}
        self.first_live = {name: int(mask.sum()) for name, mask in self._survivors.items()}
        self._last = self._survivors

    def restore(self, arrays: Mapping[str, np.ndarray], first_live: Mapping[str, int]) -> None:
        """What `arrays` and `first_live` were of the run that goes on."""
        self.first_live = dict(first_live)
        self._survivors = {
            name: np.unpackbits(arrays[f"survivors.{name}"], count=mask.size).astype(bool)
            for name, mask in self._survivors.items()
        }

    def arrays(self) -> dict[str, np.ndarray]:
        return {f"survivors.{name}": np.packbits(mask) for name, mask in self._survivors.items()}

    def mutated(self) -> float:
        """After every mutation. Returns the share of the live weights that did not live before it."""
        masks = {name: mask.ravel() for name, mask in self._step.masks().items()}
        new = sum(int((mask & ~self._last[name]).sum()) for name, mask in masks.items())
        live = sum(int(mask.sum()) for mask in masks.values())
        self._survivors = {name: self._survivors[name] & mask for name, mask in masks.items()}
        self._last = masks
        return new / live if live else 0.0

    def describe(self) -> dict[str, Any]:
        """Of every sparse layer the share of its first weights that have lived ever since, and its sparsity; that of
        all of them together, weighted by their weights; None when there are none."""
        layers = self._step.sparsity()
        elems = {name: mask.size for name, mask in self._survivors.items()}
        return {
            "survival": {name: int(mask.sum()) / self.first_live[name] for name, mask in self._survivors.items()},
            "sparsity": layers,
            "overall_sparsity": together(layers, elems) if layers else None,
        }
