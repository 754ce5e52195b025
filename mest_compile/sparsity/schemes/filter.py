"""Whole output filters live or die."""

from dataclasses import dataclass

from mest_compile.ir.graph import LayerSpec
from mest_compile.sparsity.scheme import Scheme, scheme


@scheme("filter")
@dataclass(frozen=True, slots=True)
class Filter(Scheme):
    """A unit is all weights of one output channel, of any kernel size; its score is their L2 norm."""

    name = "filter"
    spans = (1, 2, 3)

    def block(self, layer: LayerSpec) -> tuple[int, int]:
        return 1, 1

    def kernels(self, layer: LayerSpec) -> tuple[str, ...]:
        return ("compact", "gather")
