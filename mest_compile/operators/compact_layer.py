"""The compact family: whole filters or whole input channels live, so each phase is a dense convolution of the live ones only.

Live channels stay where they are in memory and are listed; nobody writes or reads the others where the neighbours allow it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mest_compile.operators.family import KernelFamily, problem_of
from mest_compile.operators.gather import GatherConv, GatherGrad, Pass
from mest_compile.operators.optimizer import CopyValues
from mest_compile.registry import SCHEDULES, family
from mest_compile.sparsity.packing import (
    LayerIndex,
    by_place,
    forward_places,
    gradient_halo,
    image_of,
    parity_passes,
    pointers_of,
    reaching_passes,
    source_halo,
    transposed_places,
)
from mest_compile.sparsity.scheme import loads_shared

if TYPE_CHECKING:
    from mest_compile.graph.lowering import Lowering
    from mest_compile.graph.program import Buffer
    from mest_compile.sparsity.layer import Layer
    from mest_compile.spec import Node

LISTED_ROWS = 2  # listed rows that share their loads; more would be filled up more often, and two suffice for eight accumulators


@family("compact")
class CompactFamily(KernelFamily):
    """Rows of a group are listed live channels or neighbours, whichever side of the layer is whole; likewise their sources."""

    def convolve(self, layer, source, result, bias, statistics, low, name):
        rows, sources, rows_live, sources_live = _blocks(layer)
        passes = (Pass((result.image.height, result.image.width)),)
        problem = GatherConv(source.image, result.image, rows, sources, layer.spec.stride, passes, layer.section_channels, bias=bool(bias),
                             statistics=bool(statistics), rows_live=rows_live, sources_live=sources_live)
        low.call("compact.conv", problem, *self._index(layer, problem, low), self.hold(layer, low, "", "values"),
                 *self._lists(layer, problem, source, low), *bias, source, result, *statistics, name=name)

    def grad_weight(self, layer, source, delta, gradients, low, name):
        rows, sources, rows_live, sources_live = _blocks(layer)
        problem = GatherGrad(source.image, delta.image, rows, sources, layer.spec.stride, layer.section_channels, rows_live=rows_live,
                             sources_live=sources_live)
        low.call("compact.grad", problem, *self._index(layer, problem, low), *self._lists(layer, problem, source, low), source, delta,
                 gradients, name=name)

    def grad_input(self, layer, delta, target, accumulate, low, name):
        rows, sources, rows_live, sources_live = _blocks(layer, transposed=True)
        passes = reaching_passes(layer.spec) if accumulate else parity_passes(layer.spec)
        problem = GatherConv(delta.image, target.image, rows, sources, (1, 1), passes, layer.transposed_section_channels,
                             accumulate=accumulate, rows_live=rows_live, sources_live=sources_live)
        low.call("compact.conv", problem, *self._index(layer, problem, low, "transposed_"), self.hold(layer, low, "transposed", "values"),
                 *self._lists(layer, problem, delta, low, "transposed_"), delta, target, name=name)

    def update(self, layer, transposed, low, name):
        super().update(layer, transposed, low, name)
        if transposed:
            low.call_update("optimizer.copy", CopyValues(), self.hold(layer, low, "", "values"),
                            self.hold(layer, low, "transposed_from", "indices"), self.hold(layer, low, "transposed", "values"),
                            name=f"{layer.spec.name}.transpose")

    def written(self, node: Node, low: Lowering) -> Buffer | None:
        layer = low.layer(node)
        spared = [consumer.op for consumer in low.consumers(node.name)] == ["batch_norm"] and "bias" not in node.params
        return self._alive(layer, low, layer.spec.weight_shape[0]) if spared and layer.scheme.spans[0] == 1 else None

    def read(self, node: Node, low: Lowering) -> Buffer | None:
        layer = low.layer(node)
        return self._alive(layer, low, layer.spec.weight_shape[1]) if layer.scheme.spans[0] == 0 else None

    def index(self, layer, keep, program):
        spec, on_rows = layer.spec, layer.scheme.spans[0] == 1
        alive = keep[:, 0, 0, 0] if on_rows else keep[0, :, 0, 0]
        forward = problem_of(program, layer, "compact.conv", "pointers")
        backward = problem_of(program, layer, "compact.conv", "transposed_pointers")
        assert forward is not None, f"{spec.name} is not in program {program.name}"
        # A neighbour that has the flags does not touch what is dead; otherwise dead results are written, as 0.
        spared = any(buffer.name == f"{spec.name}:alive" for call in program.calls for buffer in call.buffers)
        weights = np.arange(keep.size).reshape(keep.shape)

        units = _Units(forward, alive, keep.shape[2:])
        cell, offsets = forward_places(spec, forward, units.group, units.first, units.y, units.x)
        sort = by_place(cell, offsets)
        order = weights[units.taps(units.row, units.source)][sort].ravel()
        arrays = {"pointers": pointers_of(cell, forward.cells), "offsets": offsets[sort].astype(np.int32),
                  **_lists("", forward, alive, spared), **({"alive": alive.astype(np.int32)} if spared else {})}
        if backward is None:
            return LayerIndex(order, arrays)

        units = _Units(backward, alive, keep.shape[2:])
        cell, offsets = transposed_places(spec, backward, units.group, units.first, units.y, units.x)
        sort = by_place(cell, offsets)
        place = np.zeros(keep.size, np.int32)
        place[order] = np.arange(len(order))
        return LayerIndex(order, arrays | {
            "transposed_pointers": pointers_of(cell, backward.cells), "transposed_offsets": offsets[sort].astype(np.int32),
            "transposed_from": place[weights[units.taps(units.source, units.row)][sort].ravel()],
            **_lists("transposed_", backward, alive, spared or backward.accumulate)})

    def index_elems(self, layer, part, cells):
        if part == "transposed_from":
            return cells
        rows, sources, _, _ = _blocks(layer, transposed=part.startswith("transposed"))
        return -(-cells // (rows * sources))

    def sections(self, spec, scheme, target):
        rule = SCHEDULES.find(f"{target.device}/gather.conv").section_channels
        on_rows = scheme.spans[0] == 1
        source = image_of(spec, source_halo(spec), target.vector, output=False)
        delta = image_of(spec, gradient_halo(spec), target.vector, output=True)
        out, inputs = spec.weight_shape[:2]
        return (rule(source, spec.stride, spec.weight_shape[2:], loads_shared(inputs) if on_rows else 1, target),
                rule(delta, (1, 1), spec.weight_shape[2:], 1 if on_rows else loads_shared(out), target))

    def _alive(self, layer: Layer, low: Lowering, channels: int) -> Buffer:
        return self.hold(layer, low, "alive", "indices", channels)

    def _index(self, layer: Layer, problem: GatherConv | GatherGrad, low: Lowering, prefix: str = "") -> tuple[Buffer, Buffer]:
        return (self.hold(layer, low, f"{prefix}pointers", "indices", problem.cells + 1),
                self.hold(layer, low, f"{prefix}offsets", "indices"))

    def _lists(self, layer: Layer, problem: GatherConv | GatherGrad, source: Buffer, low: Lowering, prefix: str = "") -> list[Buffer]:
        found = []
        if problem.rows_live:
            found += [self.hold(layer, low, f"{prefix}channels", "indices", problem.groups * problem.row_block),
                      self.hold(layer, low, f"{prefix}live_groups", "indices", 1)]
        if problem.sources_live:
            assert source.image
            found.append(self.hold(layer, low, f"{prefix}sources", "indices", source.image.channels))
        return found


def _blocks(layer: Layer, transposed: bool = False) -> tuple[int, int, int, int]:
    """(rows of a group, sources of a unit, live rows, live sources) of the forward pass or of the input gradient; 0: not listed."""
    spec, on_rows = layer.spec, layer.scheme.spans[0] == 1
    live = layer.scheme.live_units(spec, layer.sparsity)
    out, inputs = spec.weight_shape[:2]
    rows, sources = (inputs, out) if transposed else (out, inputs)
    return (LISTED_ROWS, loads_shared(sources), live, 0) if on_rows != transposed else (loads_shared(rows), 1, 0, live)


class _Units:
    """Every unit of a problem: each group of rows at each block of sources and each tap, those that are listed being the live ones.

    group, first, y, x (units,)  group of rows, first source channel, tap
    row (units, row_block), source (units, source_block)  their channels
    """

    def __init__(self, problem: GatherConv, alive: np.ndarray, taps: tuple[int, int]):
        rows = _pairs(alive) if problem.rows_live else np.arange(problem.result.channels).reshape(-1, problem.row_block)
        channels = np.flatnonzero(alive) if problem.sources_live else np.arange(problem.source.channels)
        sources = channels.reshape(-1, problem.source_block)
        self.group, block, self.y, self.x = (axis.ravel() for axis in np.indices((len(rows), len(sources), *taps)))
        self.row, self.source, self.first = rows[self.group], sources[block], sources[block, 0]

    def taps(self, out: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Where the units' weights are in (out, in, kh, kw), [unit, source channel, row]; `out` and `inputs` are `row` and `source`."""
        out, inputs = (side[:, None, :] if side is self.row else side[:, :, None] for side in (out, inputs))
        return out, inputs, self.y[:, None, None], self.x[:, None, None]


def _pairs(alive: np.ndarray) -> np.ndarray:
    """(groups, LISTED_ROWS): the live channels; the last one again where the last group is not full."""
    live = np.flatnonzero(alive)
    return np.concatenate([live, np.repeat(live[-1:], -len(live) % LISTED_ROWS)]).reshape(-1, LISTED_ROWS)


def _filled(channels: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([channels, np.repeat(channels[-1:], size - len(channels))]).astype(np.int32)


def _lists(prefix: str, problem: GatherConv, alive: np.ndarray, spared: bool) -> dict[str, np.ndarray]:
    """Lists of the live rows, then the dead ones, which are written without any unit unless they are spared, or of the live sources."""
    if problem.sources_live:
        return {f"{prefix}sources": _filled(np.flatnonzero(alive), problem.source.channels)}
    live, dead = _pairs(alive), _pairs(~alive)
    return {f"{prefix}channels": _filled(np.concatenate([live, dead]).ravel(), problem.groups * problem.row_block),
            f"{prefix}live_groups": np.array([len(live) + (0 if spared else len(dead))], np.int32)}
