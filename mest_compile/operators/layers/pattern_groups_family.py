"""The pattern_groups family: a unit is a whole kernel, and the units of a row are sorted by the shape of their
pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mest_compile.ir.program import Activation, Buffer
from mest_compile.operators.layers.family import KernelFamily, family
from mest_compile.operators.layers.gather import Epilogue, GatherGrad
from mest_compile.operators.layers.gather_family import GatherFamily, forward_problem, gradient_problem
from mest_compile.operators.layers.index import LayerIndex, Places, divide, expand, inverse, places_of
from mest_compile.operators.layers.pattern_groups import GroupedConv, GroupedGrad, Shape, shape_of
from mest_compile.operators.operator import Trace
from mest_compile.sparsity.schemes.pattern import PATTERNS

if TYPE_CHECKING:
    from mest_compile.ir.program import Program
    from mest_compile.sparsity.layer import Layer


def _shapes() -> tuple[tuple[Shape, ...], np.ndarray]:
    """(the shapes of all patterns, which one a kernel has by the sum of 2^tap over its live taps). Turned by half a
    circle, as the input gradient sees it, a pattern of two pairs has its own shape again.
    """
    of = [shape_of(np.argwhere(pattern)) for pattern in PATTERNS]
    assert of == [shape_of(np.argwhere(pattern[::-1, ::-1])) for pattern in PATTERNS]
    shapes = tuple(sorted(set(of)))
    numbers = np.zeros(1 << PATTERNS[0].size, np.int64)
    for pattern, shape in zip(PATTERNS, of, strict=True):
        numbers[(1 << np.flatnonzero(pattern)).sum()] = shapes.index(shape)
    return shapes, numbers


SHAPES, _SHAPE_OF = _shapes()
TAPS = len(SHAPES[0])


def _problem_of(program: Program, layer: Layer, part: str) -> GroupedConv | None:
    """The problem of the layer's convolution that reads the index buffer `part` first, or None."""
    return next(
        (
            call.problem
            for call in program.calls
            if isinstance(call.problem, GroupedConv) and call.layer == layer.spec.name and call.buffers[0].role == part
        ),
        None,
    )


def _sorted(
    problem: GroupedConv, places: Places, group: np.ndarray, channel: np.ndarray, tap: np.ndarray, shape: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order that sorts the units, pointers, offsets in that order); the arrays say what each unit is, `tap` its
    first."""
    gather = problem.gather
    run = (channel // gather.section_channels * gather.groups + group).astype(np.int64) * len(SHAPES) + shape
    offsets = places.block_offset[channel] + places.tap_offset[tap]
    order = np.argsort(run * gather.source.slice_elems + offsets)  # offsets lie in the first slice
    pointers = np.concatenate([[0], np.cumsum(np.bincount(run, minlength=problem.runs))]).astype(np.int32)
    return order, pointers, offsets[order].astype(np.int32)


@family("pattern_groups")
class PatternGroupsFamily(GatherFamily):
    """The gather with one offset for the taps of a whole kernel, whose places are constants of the code. Stride 1
    only."""

    takes = KernelFamily.takes  # as PatternFamily's

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
        problem = GroupedConv(
            forward_problem(layer, source.image, result.image, bias, bool(statistics), epilogue), SHAPES
        )
        low.call(
            "pattern_groups.conv",
            problem,
            *self._runs(layer, problem, low),
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
        problem = GroupedGrad(
            GatherGrad(source.image, delta.image, 1, 1, layer.spec.stride, layer.section_channels, adds=low.adds),
            SHAPES,
        )
        low.call(
            "pattern_groups.grad",
            problem,
            *self._runs(layer, problem, low),
            source,
            delta,
            gradients,
            node=node,
            phase="grad_weight",
        )

    def grad_input(
        self, layer: Layer, delta: Activation, target: Activation, accumulate: bool, low: Trace, node: str
    ) -> None:
        problem = GroupedConv(gradient_problem(layer, delta.image, target.image, accumulate), SHAPES)
        values = self.transposed(layer, low, node)
        low.call(
            "pattern_groups.conv",
            problem,
            *self._runs(layer, problem, low, "transposed_"),
            values,
            delta,
            target,
            node=node,
            phase="grad_input",
        )

    def indexer(self, layer: Layer, program: Program) -> Callable[[np.ndarray], LayerIndex]:
        forward, backward = (_problem_of(program, layer, part) for part in ("pointers", "transposed_pointers"))
        assert forward is not None, f"{layer.spec.name} is not in program {program.name}"
        places = Places.forward(layer.spec, forward.gather)
        transposed = None if backward is None else Places.transposed(layer.spec, backward.gather)

        inputs, kernel_cells, forth = layer.spec.weight_shape[1], PATTERNS[0].size, np.arange(TAPS)

        def index(cells: np.ndarray) -> LayerIndex:
            kernel, tap = (
                array.reshape(-1, TAPS) for array in divide(cells, kernel_cells)
            )  # of each live kernel, in reading order
            row, channel = divide(kernel[:, 0], inputs)
            shape = _SHAPE_OF[(1 << tap).sum(1)]
            sort, pointers, offsets = _sorted(forward, places, row, channel, tap[:, 0], shape)
            arrays = {"pointers": pointers, "offsets": offsets}
            if backward is not None and transposed is not None:  # in reverse, the last tap comes first
                there, arrays["transposed_pointers"], arrays["transposed_offsets"] = _sorted(
                    backward, transposed, channel, row, tap[:, -1], shape
                )
                arrays["permutation"] = expand(inverse(there)[sort], forth[::-1])
            sort = expand(sort, forth)
            return LayerIndex(sort, places_of(sort, len(cells)), arrays)

        return index

    def index_elems(self, layer: Layer, part: str, cells: int) -> int:
        return cells if part == "permutation" else cells // TAPS

    def _runs(
        self, layer: Layer, problem: GroupedConv | GroupedGrad, low: Trace, prefix: str = ""
    ) -> tuple[Buffer, ...]:
        return (
            self.hold(layer, low, f"{prefix}pointers", "indices", problem.runs + 1),
            self.hold(layer, low, f"{prefix}offsets", "indices"),
        )
