"""The pattern family: units of two neighbouring taps in a row, which is what the scheme's patterns are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mest_compile.ir.program import Activation, Buffer, Program
from mest_compile.operators.layers.family import KernelFamily, family
from mest_compile.operators.layers.gather import Epilogue, GatherGrad
from mest_compile.operators.layers.gather_family import GatherFamily, forward_problem, gradient_problem
from mest_compile.operators.layers.index import LayerIndex, Places, Runs, divide, expand, inverse, places_of
from mest_compile.operators.operator import Trace
from mest_compile.sparsity.layer import Layer

PAIR = 2


@family("pattern")
class PatternFamily(GatherFamily):
    """The gather with one offset for two taps: half the index, and pixels that both taps read are loaded once. Stride 1
    only, where the input gradient's taps are neighbours as well, in reverse.
    """

    takes = KernelFamily.takes  # the pixels of two taps are neighbours, and all source channels are read

    def convolve(
        self,
        layer: Layer,
        source: Activation,
        result: Activation,
        others: list[Buffer],
        statistics: list[Buffer],
        low: Trace,
        node: str,
        phase: str,
        bias: bool,
        epilogue: Epilogue | None,
    ) -> None:
        problem = replace(
            forward_problem(layer, source.image, result.image, bias, bool(statistics), epilogue), taps=PAIR
        )
        low.call(
            "pattern.conv",
            problem,
            *self.index_arrays(layer, problem, low),
            self.hold(layer, low, "", "values"),
            *others,
            source,
            result,
            *statistics,
            node=node,
            phase=phase,
        )

    def grad_weight(
        self, layer: Layer, source: Activation, delta: Activation, gradients: Buffer, low: Trace, node: str
    ) -> None:
        problem = GatherGrad(
            source.image, delta.image, 1, 1, layer.spec.stride, layer.section_channels, taps=PAIR, adds=low.adds
        )
        low.call(
            "pattern.grad",
            problem,
            *self.index_arrays(layer, problem, low),
            source,
            delta,
            gradients,
            node=node,
            phase="grad_weight",
        )

    def grad_input(
        self, layer: Layer, delta: Activation, target: Activation, accumulate: bool, low: Trace, node: str
    ) -> None:
        problem = replace(gradient_problem(layer, delta.image, target.image, accumulate), taps=PAIR)
        values = self.transposed(layer, low, node)
        low.call(
            "pattern.conv",
            problem,
            *self.index_arrays(layer, problem, low, "transposed_"),
            values,
            delta,
            target,
            node=node,
            phase="grad_input",
        )

    def indexer(self, layer: Layer, program: Program) -> Callable[[np.ndarray], LayerIndex]:
        forward, backward = self.problems(layer, program)
        runs = Runs(layer.spec, forward)
        there_sorted = None if backward is None else Places.transposed(layer.spec, backward).of_swapped()
        forth = np.arange(PAIR)

        def index(cells: np.ndarray) -> LayerIndex:
            # The live cells of a row of a kernel are neighbours, so every second one in order of place is the left tap
            # of a pair.
            left = np.ascontiguousarray(cells[::PAIR])
            row, rest = divide(left, runs.row_cells)
            sort, pointers = runs.sort(left)
            rest = rest.take(sort)
            arrays = {"pointers": pointers, "offsets": runs.offsets.take(rest)}
            if there_sorted is not None:  # in reverse, the right tap comes first
                there, arrays["transposed_pointers"], arrays["transposed_offsets"] = there_sorted(
                    row.take(sort), rest + (PAIR - 1)
                )
                arrays["permutation"] = expand(inverse(there), forth[::-1])
            sort = expand(sort, forth)
            return LayerIndex(sort, places_of(sort, len(cells)), arrays)

        return index

    def index_elems(self, layer: Layer, part: str, cells: int) -> int:
        return cells if part == "permutation" else cells // PAIR
