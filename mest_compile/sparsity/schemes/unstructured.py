"""Any single weight may live or die."""

from dataclasses import dataclass

from mest_compile.ir.graph import LayerSpec
from mest_compile.sparsity.scheme import Scheme, scheme


@scheme("unstructured")
@dataclass(frozen=True, slots=True)
class Unstructured(Scheme):
    """A unit is one weight."""

    name = "unstructured"

    def block(self, layer: LayerSpec) -> tuple[int, int]:
        return 1, 1
