"""Convolution and linear layers in the training graph; their kernels are those of the family that the layer's scheme names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mest_compile.operators.family import KernelFamily
from mest_compile.registry import FAMILIES, operator
from mest_compile.sparsity.packing import gradient_halo, source_halo
from mest_compile.spec import Node

if TYPE_CHECKING:
    from mest_compile.graph.lowering import Lowering
    from mest_compile.graph.program import Buffer


def _kernels(node: Node, low: Lowering) -> KernelFamily:
    return FAMILIES.find(low.layer(node).kernels)


@operator("conv2d")
class Conv2d:
    """Forward, input gradient and weight gradient at the live units. Saves its input, which the layer before keeps anyway."""

    def source_halo(self, node: Node, low: Lowering) -> tuple[int, int, int, int]:
        return source_halo(low.layer(node).spec)

    def gradient_halo(self, node: Node, low: Lowering) -> tuple[int, int, int, int]:
        return gradient_halo(low.layer(node).spec) if low.needs_gradient(node.inputs[0]) else (0, 0, 0, 0)

    def forward(self, node: Node, low: Lowering) -> None:
        _kernels(node, low).forward(node, low)

    def recompute(self, node: Node, low: Lowering) -> None:
        _kernels(node, low).recompute(node, low)

    def backward(self, node: Node, low: Lowering) -> None:
        _kernels(node, low).backward(node, low)

    def written(self, node: Node, low: Lowering) -> Buffer | None:
        """Flags (channels,) of the channels of its value that are written; None: all are."""
        return _kernels(node, low).written(node, low)

    def read(self, node: Node, low: Lowering) -> Buffer | None:
        """Flags (channels,) of the channels of its input that it reads; None: all."""
        return _kernels(node, low).read(node, low)


@operator("linear")
class Linear(Conv2d):
    """A 1x1 convolution of a 1x1 image."""
