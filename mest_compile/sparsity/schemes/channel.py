"""Whole input channels of a layer live or die."""

from dataclasses import dataclass

from mest_compile.ir.graph import LayerSpec
from mest_compile.sparsity.scheme import Scheme, scheme


@scheme("channel")
@dataclass(frozen=True, slots=True)
class Channel(Scheme):
    """A unit is all weights on one input channel of the layer, of any kernel size; its score is their L2 norm."""

    name = "channel"
    spans = (0, 2, 3)

    def block(self, layer: LayerSpec) -> tuple[int, int]:
        return 1, 1

    def kernels(self, layer: LayerSpec) -> tuple[str, ...]:
        return ("compact", "gather")
