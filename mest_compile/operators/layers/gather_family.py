"""The gather family: any cells, one offset each. It serves every scheme and every convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import Target
from mest_compile.ir.graph import LayerSpec
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.program import Program
from mest_compile.operators.layers.family import KernelFamily, family, problem_of
from mest_compile.operators.layers.gather import Epilogue, GatherConv, GatherGrad, Pass
from mest_compile.operators.layers.geometry import images_read, parity_passes, reaching_passes
from mest_compile.operators.layers.index import LayerIndex, Places, Runs, divide, inverse, places_of
from mest_compile.operators.layers.turning import TurnUnits
from mest_compile.operators.operator import Trace
from mest_compile.sparsity.scheme import Scheme

if TYPE_CHECKING:
    from mest_compile.ir.program import Activation, Buffer
    from mest_compile.sparsity.layer import Layer


def forward_problem(
    layer: Layer,
    source: Image,
    result: Image,
    bias: bool = False,
    statistics: bool = False,
    epilogue: Epilogue | None = None,
    accumulate: bool = False,
) -> GatherConv:
    rows, sources = layer.scheme.block(layer.spec)
    return GatherConv(
        source,
        result,
        rows,
        sources,
        layer.spec.stride,
        (Pass((result.height, result.width)),),
        layer.section_channels,
        accumulate=accumulate,
        bias=bias,
        statistics=statistics,
        epilogue=epilogue,
    )


def gradient_problem(layer: Layer, delta: Image, result: Image, accumulate: bool, bias: bool = False) -> GatherConv:
    """The input gradient: the same gather on the output gradient, with the roles of the unit's sides swapped."""
    rows, sources = layer.scheme.block(layer.spec)
    passes = reaching_passes(layer.spec) if accumulate else parity_passes(layer.spec)
    return GatherConv(
        delta,
        result,
        sources,
        rows,
        (1, 1),
        passes,
        layer.transposed_section_channels,
        accumulate=accumulate,
        bias=bias,
    )


def _transposed_problems(layer: Layer, program: Program) -> tuple[GatherConv | GatherGrad, GatherConv]:
    """(one that reads the index of the convolution, the transposed convolution's own in `program`)."""
    own = problem_of(program, layer, "transposed_pointers")
    assert own is not None, f"{layer.spec.name} is not in program {program.name}"
    if (back := problem_of(program, layer, "pointers")) is not None:
        return back, own
    calls = [call for call in program.calls if call.layer == layer.spec.name and isinstance(call.problem, GatherGrad)]
    # Without either nothing reads that index; its order follows from the layer alone.
    return calls[0].problem if calls else forward_problem(layer, own.result, own.source), own


def gather_indexer(
    spec: LayerSpec, forward: GatherConv | GatherGrad, backward: GatherConv | None
) -> Callable[[np.ndarray], LayerIndex]:
    """(cells,) int32, the live cells of a grid (groups, sources, kh, kw), ascending -> their index."""
    runs, there_sorted = (
        Runs(spec, forward),
        None if backward is None else Places.transposed(spec, backward).of_swapped(spec.groups),
    )

    def index(cells: np.ndarray) -> LayerIndex:
        row, rest = divide(cells, runs.row_cells)
        sort, pointers = runs.sort(cells)
        rest = rest.take(sort)
        offsets = runs.offsets.take(rest)
        if runs.starts is not None:
            offsets += runs.starts.take(row.take(sort))
        arrays = {"pointers": pointers, "offsets": offsets}
        if there_sorted is not None:  # roles swap: output channels are the source now
            there, arrays["transposed_pointers"], arrays["transposed_offsets"] = there_sorted(row.take(sort), rest)
            arrays["permutation"] = inverse(there)
        return LayerIndex(sort, places_of(sort, len(cells)), arrays)

    return index


@family("gather")
class GatherFamily(KernelFamily):
    """Three gathers over the live cells. The input gradient reads a copy of the values in its own order.

    Groups of channels change which channel a cell means, nothing else.
    """

    def takes(self, spec: LayerSpec) -> bool:
        return True

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
        problem = forward_problem(layer, source.image, result.image, bias, bool(statistics), epilogue)
        low.call(
            "gather.conv",
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
        rows, sources = layer.scheme.block(layer.spec)
        problem = GatherGrad(
            source.image, delta.image, rows, sources, layer.spec.stride, layer.section_channels, adds=low.adds
        )
        low.call(
            "gather.grad",
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
        problem = gradient_problem(layer, delta.image, target.image, accumulate)
        values = self.transposed(layer, low, node)
        low.call(
            "gather.conv",
            problem,
            *self.index_arrays(layer, problem, low, "transposed_"),
            values,
            delta,
            target,
            node=node,
            phase="grad_input",
        )

    def transposed(self, layer: Layer, low: Trace, node: str) -> Buffer:
        """The layer's values as kernels read them that are given its transposed index, from now on."""
        rows, sources = layer.scheme.block(layer.spec)
        return self.turned(layer, low, node, "values.turn", TurnUnits(sources, rows), "permutation")

    def indexer(self, layer: Layer, program: Program) -> Callable[[np.ndarray], LayerIndex]:
        if layer.spec.transposed:
            return gather_indexer(layer.spec, *_transposed_problems(layer, program))
        return gather_indexer(layer.spec, *self.problems(layer, program))

    def index_elems(self, layer: Layer, part: str, cells: int) -> int:
        return cells

    def sections(
        self, spec: LayerSpec, scheme: Scheme, target: Target, activations: str, caches: tuple[int, int] = (1, 1)
    ) -> tuple[int, int]:
        if spec.groups > 1:  # a group of result channels reads its own few source channels anyhow
            return spec.input_shape[1], spec.weight_shape[0]
        rule = backend_of(target).section_channels
        rows, sources = scheme.block(spec)
        source, delta = images_read(spec, target, activations)
        return (
            rule(source, spec.stride, spec.extent, (rows, sources), target, caches[0]),
            rule(delta, (1, 1), spec.extent, (sources, rows), target, caches[1]),
        )

    def index_arrays(
        self, layer: Layer, problem: GatherConv | GatherGrad, low: Trace, prefix: str = ""
    ) -> tuple[Buffer, Buffer]:
        """(pointers, offsets) that the problem's kernel reads. prefix: "transposed_" where roles are swapped."""
        return (
            self.hold(layer, low, f"{prefix}pointers", "indices", problem.cells + 1),
            self.hold(layer, low, f"{prefix}offsets", "indices"),
        )
