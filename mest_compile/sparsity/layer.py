"""A weight's layer with the decisions made for it."""

from __future__ import annotations

from dataclasses import dataclass

from mest_compile.base.errors import CapacityError
from mest_compile.ir.graph import LayerSpec
from mest_compile.sparsity.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight's layer as it is compiled: its facts, scheme, target sparsity, and how its index is cut.

    kernels           name of the kernel family that it runs on
    section_channels, transposed_section_channels  source channels of a section in the forward pass and in the input
                                                   gradient
    capacity          units of the scheme that the layer has room for: its densest phase; None: nobody set a bound
    frozen            whether its weight stays as it is: so does its mask, unless somebody sets another
    """

    spec: LayerSpec
    scheme: Scheme
    sparsity: float
    kernels: str
    section_channels: int
    transposed_section_channels: int
    capacity: int | None = None
    frozen: bool = False

    def check_room(self, units: int, sparsity: float) -> None:
        """Raises CapacityError when the live units that `sparsity` stands for are more than the layer has room for."""
        if self.capacity is not None and units > self.capacity:
            raise CapacityError(
                f"{self.spec.name}: {units} units live at a sparsity of {sparsity:g}, but memory is planned for "
                f"{self.capacity}; compile the step with grow_to={sparsity:g}, or keep the mask sparser"
            )


def live_cells(layer: Layer) -> int:
    return layer.scheme.live_cells(layer.spec, layer.sparsity)
