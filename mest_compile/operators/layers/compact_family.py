"""The compact family: whole filters or whole input channels live, so each phase is a dense convolution of the live ones
only.

Live channels stay where they are in memory and are listed; nobody writes or reads the others where the neighbours allow
it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import Target
from mest_compile.ir.program import Program
from mest_compile.operators.layers.family import INDEX_BYTES, KernelFamily, family
from mest_compile.operators.layers.gather import Epilogue, GatherConv, GatherGrad, Pass
from mest_compile.operators.layers.geometry import images_read, parity_passes, reaching_passes
from mest_compile.operators.layers.index import LayerIndex, Places, places_of
from mest_compile.operators.layers.turning import CopyValues
from mest_compile.operators.operator import Trace
from mest_compile.sparsity.scheme import Scheme, loads_shared

if TYPE_CHECKING:
    from mest_compile.ir.graph import LayerSpec, Node
    from mest_compile.ir.program import Activation, Buffer
    from mest_compile.sparsity.layer import Layer

Indexed = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]

LISTED_ROWS = (
    2  # listed rows that share their loads; more would be filled up more often, and two suffice for eight accumulators
)


@family("compact")
class CompactFamily(KernelFamily):
    """Rows of a group are listed live channels or neighbours, whichever side of the layer is whole; likewise their
    sources."""

    def takes(self, spec: LayerSpec) -> bool:
        return spec.groups == 1 and not spec.transposed

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
        rows, sources, rows_live, sources_live = _blocks(layer)
        passes = (Pass((result.image.height, result.image.width)),)
        problem = GatherConv(
            source.image,
            result.image,
            rows,
            sources,
            layer.spec.stride,
            passes,
            layer.section_channels,
            bias=bias,
            statistics=bool(statistics),
            epilogue=epilogue,
            rows_live=rows_live,
            sources_live=sources_live,
        )
        low.call(
            "compact.conv",
            problem,
            *self._index(layer, problem, low),
            self.hold(layer, low, "", "values"),
            *self._lists(layer, problem, source, low),
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
        rows, sources, rows_live, sources_live = _blocks(layer)
        problem = GatherGrad(
            source.image,
            delta.image,
            rows,
            sources,
            layer.spec.stride,
            layer.section_channels,
            rows_live=rows_live,
            sources_live=sources_live,
            adds=low.adds,
        )
        low.call(
            "compact.grad",
            problem,
            *self._index(layer, problem, low),
            *self._lists(layer, problem, source, low),
            source,
            delta,
            gradients,
            node=node,
            phase="grad_weight",
        )

    def grad_input(
        self, layer: Layer, delta: Activation, target: Activation, accumulate: bool, low: Trace, node: str
    ) -> None:
        rows, sources, rows_live, sources_live = _blocks(layer, transposed=True)
        passes = reaching_passes(layer.spec) if accumulate else parity_passes(layer.spec)
        problem = GatherConv(
            delta.image,
            target.image,
            rows,
            sources,
            (1, 1),
            passes,
            layer.transposed_section_channels,
            accumulate=accumulate,
            rows_live=rows_live,
            sources_live=sources_live,
        )
        values = self.turned(layer, low, node, "values.copy", CopyValues(), "transposed_from")
        low.call(
            "compact.conv",
            problem,
            *self._index(layer, problem, low, "transposed_"),
            values,
            *self._lists(layer, problem, delta, low, "transposed_"),
            delta,
            target,
            node=node,
            phase="grad_input",
        )

    def once(self, layer: Layer, transposed: bool, low: Trace) -> Buffer | None:
        """Where the last of listed rows fill their group up; the transposed copy has each weight once, from there."""
        if layer.scheme.spans[0] == 0:
            return None
        return self.hold(layer, low, "transposed_from" if transposed else "once", "indices")

    def written(self, node: Node, low: Trace) -> Buffer | None:
        layer = low.layer(node)
        bare = "bias" not in node.params and not node.attrs.get("folded")
        spared = bare and [consumer.op for consumer in low.consumers(node.name)] == ["batch_norm"]
        return self._alive(layer, low, layer.spec.weight_shape[0]) if spared and layer.scheme.spans[0] == 1 else None

    def read(self, node: Node, low: Trace) -> Buffer | None:
        layer = low.layer(node)
        return self._alive(layer, low, layer.spec.weight_shape[1]) if layer.scheme.spans[0] == 0 else None

    def indexer(self, layer: Layer, program: Program) -> Callable[[np.ndarray], LayerIndex]:
        spec, on_rows = layer.spec, layer.scheme.spans[0] == 1
        forward, backward = self.problems(layer, program)
        # A neighbour that has the flags does not touch what is dead; otherwise dead results are written, as 0.
        spared = any(
            buffer.layer == spec.name and buffer.role == "alive" for call in program.calls for buffer in call.buffers
        )
        listed_once = any(
            buffer.layer == spec.name and buffer.role == "once" for call in program.calls for buffer in call.buffers
        )
        here_indexed = _indexer(spec, forward, Places.forward(spec, forward))
        there_indexed = (
            None if backward is None else _indexer(spec, backward, Places.transposed(spec, backward), transposed=True)
        )

        def index(cells: np.ndarray) -> LayerIndex:
            alive = np.zeros(spec.weight_shape[0 if on_rows else 1], bool)
            alive[layer.scheme.units(spec, cells)] = True
            live, dead = np.flatnonzero(alive), np.flatnonzero(~alive)
            pointers, offsets, sort, places = here_indexed(live)
            assert places is not None
            arrays = {"pointers": pointers, "offsets": offsets, **_lists("", forward, live, dead, spared)}
            if listed_once:
                arrays["once"] = places.astype(np.int32)
            if spared:
                arrays["alive"] = alive.astype(np.int32)
            if there_indexed is not None and backward is not None:
                pointers, offsets, there, _ = there_indexed(live)
                arrays |= {
                    "transposed_pointers": pointers,
                    "transposed_offsets": offsets,
                    "transposed_from": places.take(there).astype(np.int32),
                    **_lists("transposed_", backward, live, dead, spared or backward.accumulate),
                }
            return LayerIndex(sort, places, arrays)

        return index

    def index_elems(self, layer: Layer, part: str, cells: int) -> int:
        if part == "once":
            return cells
        if part == "transposed_from":
            return self.turned_elems(layer, cells)
        rows, sources, _, _ = _blocks(layer, transposed=part.startswith("transposed"))
        return -(-cells // (rows * sources))

    def held_cells(self, layer: Layer, cells: int) -> int:
        if layer.scheme.spans[0] == 0:
            return cells
        filter_cells = layer.scheme.unit_cells(layer.spec)
        return (
            -(-cells // (filter_cells * LISTED_ROWS)) * LISTED_ROWS * filter_cells
        )  # rows are listed in groups, the last one filled up

    def turned_elems(self, layer: Layer, cells: int) -> int:
        """Rows that the input gradient lists are listed in groups, too."""
        if layer.scheme.spans[0] == 1:
            return cells
        channel_cells = layer.scheme.unit_cells(layer.spec)
        return -(-cells // (channel_cells * LISTED_ROWS)) * LISTED_ROWS * channel_cells

    def kept_bytes(self, layer: Layer, cells: int) -> int:
        """And the index of as many live channels, of the phase that lists its rows."""
        listed_rows = "offsets" if layer.scheme.spans[0] == 1 else "transposed_offsets"
        return super().kept_bytes(layer, cells) + INDEX_BYTES * (cells + self.index_elems(layer, listed_rows, cells))

    def sections(
        self, spec: LayerSpec, scheme: Scheme, target: Target, activations: str, caches: tuple[int, int] = (1, 1)
    ) -> tuple[int, int]:
        rule = backend_of(target).section_channels
        on_rows = scheme.spans[0] == 1
        source, delta = images_read(spec, target, activations)
        out, inputs = spec.weight_shape[:2]
        return (
            rule(
                source,
                spec.stride,
                spec.extent,
                (LISTED_ROWS, loads_shared(inputs)) if on_rows else (loads_shared(out), 1),
                target,
                caches[0],
            ),
            rule(
                delta,
                (1, 1),
                spec.extent,
                (loads_shared(inputs), 1) if on_rows else (LISTED_ROWS, loads_shared(out)),
                target,
                caches[1],
            ),
        )

    def _alive(self, layer: Layer, low: Trace, channels: int) -> Buffer:
        return self.hold(layer, low, "alive", "indices", channels)

    def _index(
        self, layer: Layer, problem: GatherConv | GatherGrad, low: Trace, prefix: str = ""
    ) -> tuple[Buffer, Buffer]:
        return (
            self.hold(layer, low, f"{prefix}pointers", "indices", problem.cells + 1),
            self.hold(layer, low, f"{prefix}offsets", "indices"),
        )

    def _lists(
        self, layer: Layer, problem: GatherConv | GatherGrad, source: Activation, low: Trace, prefix: str = ""
    ) -> list[Buffer]:
        found = []
        if problem.rows_live:
            found += [
                self.hold(layer, low, f"{prefix}channels", "indices", problem.groups * problem.row_block),
                self.hold(layer, low, f"{prefix}live_groups", "indices", 1),
            ]
        if problem.sources_live:
            assert source.image
            found.append(self.hold(layer, low, f"{prefix}sources", "indices", source.image.channels))
        return found


def _blocks(layer: Layer, transposed: bool = False) -> tuple[int, int, int, int]:
    """(rows of a group, sources of a unit, live rows, live sources) of the forward pass or of the input gradient; 0:
    not listed."""
    spec, on_rows = layer.spec, layer.scheme.spans[0] == 1
    live = layer.scheme.live_units(spec, layer.sparsity)
    out, inputs = spec.weight_shape[:2]
    rows, sources = (inputs, out) if transposed else (out, inputs)
    return (LISTED_ROWS, loads_shared(sources), live, 0) if on_rows != transposed else (loads_shared(rows), 1, 0, live)


def _indexer(
    spec: LayerSpec, problem: GatherConv, places: Places, transposed: bool = False
) -> Callable[[np.ndarray], Indexed]:
    """`_dense_index` of live channels. Where no sources are listed it is the same for all masks with as many of them,
    and kept."""
    if problem.sources_live:
        return lambda live: _dense_index(spec, problem, places, live, transposed)
    of_as_many = lru_cache(1)(lambda count: _dense_index(spec, problem, places, np.arange(count), transposed))
    return lambda live: of_as_many(len(live))


def _dense_index(spec: LayerSpec, problem: GatherConv, places: Places, live: np.ndarray, transposed: bool) -> Indexed:
    """(pointers, offsets, which of the live cells in order of place each value is, [unit, source channel, row], and, of
    a forward pass, `LayerIndex.places`) of a problem.

    Its units are every group of rows at each block of sources and each tap, those that are listed being the live ones.
    """
    taps = spec.weight_shape[2] * spec.weight_shape[3]
    result_channels = len(live) if problem.rows_live else problem.result.channels
    source_channels = len(live) if problem.sources_live else problem.source.channels
    by_row, by_source = (taps, result_channels * taps) if transposed else (source_channels * taps, taps)
    # The last group of listed rows is filled up with its last one.
    rows = np.minimum(np.arange(-(-result_channels // problem.row_block) * problem.row_block), result_channels - 1)
    rows, sources = rows.reshape(-1, problem.row_block), np.arange(source_channels).reshape(-1, problem.source_block)
    blocks = live if problem.sources_live else np.arange(len(sources))
    units = len(rows), len(sources), taps
    keys = places.group_key[: len(rows), None, None] + (places.block_key[blocks][:, None] + places.tap_key)
    offsets = np.broadcast_to(places.block_offset[blocks][:, None] + places.tap_offset, units)
    order, pointers, offsets = places.sort(keys.ravel(), offsets.ravel())
    there = (rows * by_row)[:, None, None, None] + ((sources * by_source)[:, None] + np.arange(taps)[:, None])[
        ..., None
    ]
    there = there.astype(np.int32).reshape(-1, problem.source_block * problem.row_block).take(order, axis=0).ravel()
    return pointers, offsets, there, None if transposed else places_of(there, result_channels * source_channels * taps)


def _lists(prefix: str, problem: GatherConv, live: np.ndarray, dead: np.ndarray, spared: bool) -> dict[str, np.ndarray]:
    """Lists of the live rows, then the dead ones, which are written without any unit unless they are spared, or of the
    live sources.

    Rows are listed in groups of LISTED_ROWS, the last live and the last dead group filled up with its last row.
    """
    if problem.sources_live:
        listed = np.empty(problem.source.channels, np.int32)
        listed[: len(live)], listed[len(live) :] = live, live[-1]
        return {f"{prefix}sources": listed}
    listed = np.empty(problem.groups * problem.row_block, np.int32)
    live_groups, dead_groups = (-(-len(rows) // LISTED_ROWS) for rows in (live, dead))
    for start, rows in ((0, live), (live_groups * LISTED_ROWS, dead)):
        if len(rows):
            listed[start : start + len(rows)], listed[start + len(rows) :] = rows, rows[-1]
    return {
        f"{prefix}channels": listed,
        f"{prefix}live_groups": np.array([live_groups + (0 if spared else dead_groups)], np.int32),
    }
