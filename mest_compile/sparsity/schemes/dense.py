"""Every weight lives: the layers that stay dense, and the dense baseline on our own kernels."""

from dataclasses import dataclass

import numpy as np

from mest_compile.base.errors import SparsityError
from mest_compile.ir.graph import LayerSpec
from mest_compile.sparsity.scheme import Scheme, loads_shared, scheme


@scheme("dense")
@dataclass(frozen=True, slots=True)
class Dense(Scheme):
    """Units of 4x1 weights (2x1, 1x1 where channels are odd), so that four output channels share the loads; all of them
    live. Of a depthwise layer they are single weights, as no two channels share anything."""

    name = "dense"

    @property
    def fixed(self) -> float:
        return 0.0

    def block(self, layer: LayerSpec) -> tuple[int, int]:
        if layer.depthwise:
            return 1, 1
        return loads_shared(layer.weight_shape[0] // layer.groups), loads_shared(layer.weight_shape[1])

    def kernels(self, layer: LayerSpec) -> tuple[str, ...]:
        return ("depthwise", "gather") if layer.depthwise else ("gather",)

    def fault(self, layer: LayerSpec, mask: np.ndarray) -> str | None:
        return None if mask.all() else f"has {np.count_nonzero(~mask)} zeros, and scheme dense none"

    def live_units(self, layer: LayerSpec, sparsity: float) -> int:
        if sparsity != 0.0:
            raise SparsityError(
                f"{layer.name}: scheme dense has sparsity 0, not {sparsity}; choose another scheme for a sparse layer"
            )
        groups, sources, height, width = self.grid(layer)
        return groups * sources * height * width
