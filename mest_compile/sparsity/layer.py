"""A weight's layer with the decisions made for it."""

from __future__ import annotations

from dataclasses import dataclass

from mest_compile.sparsity.scheme import Scheme
from mest_compile.spec import LayerSpec


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight's layer as it is compiled: its facts, scheme, target sparsity, and how its index is cut.

    kernels           name of the kernel family that it runs on
    section_channels, transposed_section_channels  source channels of a section in the forward pass and in the input gradient
    """

    spec: LayerSpec
    scheme: Scheme
    sparsity: float
    kernels: str
    section_channels: int
    transposed_section_channels: int
