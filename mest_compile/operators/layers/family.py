"""Kernel families: which kernels a convolution runs on, and how a mask becomes their index. One file each; a scheme
names its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from mest_compile.base.registry import Registry
from mest_compile.hardware.backend import backend_of
from mest_compile.ir.graph import LayerSpec, Node
from mest_compile.ir.layouts.layout import ITEM_BYTES
from mest_compile.ir.program import Activation, Buffer
from mest_compile.operators.conversion import ImageComb
from mest_compile.operators.frozen_norm import finish, unfolded
from mest_compile.operators.layers.bias import BiasGradient
from mest_compile.operators.layers.combing import gradient_goal, read_source
from mest_compile.operators.layers.gather import Epilogue, GatherConv
from mest_compile.operators.layers.geometry import gradient_halo, grid_abreast, reads_combed
from mest_compile.operators.layers.turning import TURNED
from mest_compile.operators.layers.values import cell_type, cells_of
from mest_compile.operators.operator import Trace
from mest_compile.operators.optimizers.optimizer import Update
from mest_compile.sparsity.layer import Layer

if TYPE_CHECKING:
    from mest_compile.hardware.target import Target
    from mest_compile.ir.program import Program
    from mest_compile.operators.layers.index import LayerIndex
    from mest_compile.sparsity.layer import Layer
    from mest_compile.sparsity.scheme import Scheme


INDEX_BYTES = ITEM_BYTES["int32"]


class KernelFamily(ABC):
    """Records the kernel calls of one layer's phases. Stateless; one instance serves all layers.

    Held buffers of a layer: its weight's name (values of the live cells), ":gradient", ":" and each of the optimizer's
    states, and one a `LayerIndex` array.
    """

    def forward(self, node: Node, low: Trace) -> None:
        # Statistics in the epilogue spare batch_norm a pass over memory; lanes without an example would count in them.
        result = low.output(node)
        assert result.image
        statistics = []
        normed = any(
            consumer.op == "batch_norm" and not consumer.attrs.get("evaluating")
            for consumer in low.consumers(node.name)
        )
        lanes = result.image.floats if self.by_rows else result.image.vector
        bare, image = "bias" not in node.params and not node.attrs.get("folded"), result.image
        if low.training and normed and bare and image.batch == image.lanes:
            statistics = [
                low.temporary(f"{node.name}.statistics", image.slices * image.height * 2 * image.channels * lanes)
            ]
        self._convolve(node, low, result, statistics, "forward")

    def recompute(self, node: Node, low: Trace) -> None:
        """The forward pass once more, for a value that was not kept."""
        self._convolve(node, low, low.output(node), [], "recompute")

    def backward(self, node: Node, low: Trace) -> None:
        """What of it trains gets a gradient and an update; what only a gradient passes through has neither, nor what
        these would need."""
        layer, trains = low.layer(node), low.trains(node, "weight")
        transposed = low.needs_gradient(node.inputs[0])
        delta: Activation | None = low.gradient(node)
        if node.attrs.get("folded"):
            pixels = grid_abreast(layer.spec, low.target) if self.by_rows else 1
            halo = gradient_halo(layer.spec, pixels) if transposed else (0, 0, 0, 0)
            delta = unfolded(node, low, halo, trains or low.trains(node, "bias") or transposed)
        if delta is None:
            return
        if trains:
            gradients = self.hold(layer, low, "gradient", "gradients")
            source = self._source(node, low)
            self.grad_weight(layer, source, delta, gradients, low, node.name)
        if low.trains(node, "bias"):
            low.call(
                "bias.gradient",
                BiasGradient(delta.image),
                delta,
                low.parameter_gradient(node, "bias"),
                node=node.name,
                phase="grad_bias",
            )
        if transposed:
            target, accumulate = low.contribute(node.inputs[0])
            goal = gradient_goal(node.name, target, layer.spec, low) if self.by_rows else target
            self.grad_input(layer, delta, goal, accumulate and goal is target, low, node.name)
            if goal is not target:
                low.call("image.uncomb", ImageComb(target.image, goal.image, accumulate), goal, target)
        if trains:
            self.update(layer, low)

    def update(self, layer: Layer, low: Trace) -> None:
        """Records the optimizer's step."""
        low.call_update(
            "optimizer.update",
            Update(low.optimizer.rule_name),
            *self.state(layer, low),
            name=f"{layer.spec.name}.update",
        )

    def turned(self, layer: Layer, low: Trace, node: str, kernel: str, problem: Any, places: str) -> Buffer:
        """The layer's values in the order of its transposed index. Where they train they are put there now, into an
        array that layers share; what is frozen has its own. kernel: what puts them there, by the index array
        `places`."""
        found = low.node(node)
        assert found is not None, f"{node} is no node"
        if not low.trains(found, "weight"):
            return self.hold(layer, low, "transposed", "values")
        shared = low.hold(TURNED, None, "values")
        shared.role, shared.sharers = "transposed", tuple(dict.fromkeys((*shared.sharers, layer.spec.name)))
        index = self.hold(layer, low, places, "indices")
        low.call(kernel, problem, self.hold(layer, low, "", "values"), index, shared)
        return shared

    def state(self, layer: Layer, low: Trace) -> tuple[Buffer, ...]:
        """(values, gradients, each state, hyper): what the optimizer works on."""
        return (
            self.hold(layer, low, "", "values"),
            self.hold(layer, low, "gradient", "gradients"),
            *(self.hold(layer, low, state, "optimizer") for state in low.optimizer.state),
            low.hyper(layer.spec.name),
        )

    def once(self, layer: Layer, transposed: bool, low: Trace) -> Buffer | None:
        """Places (n,) int32 that name each live weight of the value array once; None: no weight stands there twice.
        transposed: whether the layer has an input gradient."""
        return None

    @staticmethod
    def hold(layer: Layer, low: Trace, part: str, kind: str, elems: int | None = None) -> Buffer:
        """The layer's held buffer of that part; elems None: its size depends on the mask."""
        weight = layer.spec.name
        buffer = low.hold(
            f"{weight}:{part}" if part else weight, elems, kind, "int32" if kind == "indices" else "float32"
        )
        buffer.layer, buffer.role = weight, part
        return buffer

    def _source(self, node: Node, low: Trace) -> Activation:
        """Its input as its kernels read it."""
        name, spec = node.inputs[0], low.layer(node).spec
        if not (self.by_rows and reads_combed(spec, low.target)):
            return low.value(name)
        layers = [low.layer(reader) for reader in low.consumers(name) if reader.op == "conv2d"]
        return read_source(name, spec, [one.spec for one in layers if FAMILIES.find(one.kernels).by_rows], low)

    def _convolve(self, node: Node, low: Trace, result: Activation, statistics: list[Buffer], phase: str) -> None:
        bias = [low.parameter(node, "bias")] if "bias" in node.params else []
        epilogue, others = finish(node, low, scaled=phase == "recompute")
        source = self._source(node, low)
        self.convolve(
            low.layer(node), source, result, [*bias, *others], statistics, low, node.name, phase, bool(bias), epilogue
        )

    def written(self, node: Node, low: Trace) -> Buffer | None:
        """Flags (channels,) of the result's channels that are written; None: all are."""
        return None

    def read(self, node: Node, low: Trace) -> Buffer | None:
        """Flags (channels,) of the source's channels that are read, and whose gradient is not 0; None: all."""
        return None

    @staticmethod
    def problems(layer: Layer, program: Program) -> tuple[GatherConv, GatherConv | None]:
        """Of the layer's forward pass and of its input gradient, if it has one, in `program`."""
        forward, backward = (problem_of(program, layer, part) for part in ("pointers", "transposed_pointers"))
        assert forward is not None, f"{layer.spec.name} is not in program {program.name}"
        return forward, backward

    def index(self, layer: Layer, keep: np.ndarray, program: Program) -> LayerIndex:
        """Index arrays of the layer's kernels in `program` under the grid `keep`, asked for once."""
        return self.indexer(layer, program)(cells_of(keep))

    # What a family says.

    forward_kernel: ClassVar[str] = "conv"  # last word of the name of the kernel that its forward pass is
    by_rows: ClassVar[bool] = True  # whether its kernels take neighbouring pixels as a vector

    def takes(self, spec: LayerSpec) -> bool:
        """Whether its kernels are of such layers."""
        return spec.groups == 1 and spec.dilation == (1, 1) and not spec.transposed

    @abstractmethod
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
        """Records the forward pass of that node. others: bias, if it has one, and what the epilogue takes; statistics:
        one buffer or none; both as GatherConv has them."""

    @abstractmethod
    def grad_weight(
        self, layer: Layer, source: Activation, delta: Activation, gradients: Buffer, low: Trace, node: str
    ) -> None:
        """Records the weight gradient, in the order of the values."""

    @abstractmethod
    def grad_input(
        self, layer: Layer, delta: Activation, target: Activation, accumulate: bool, low: Trace, node: str
    ) -> None:
        """Records the input gradient, added to `target` or in its place."""

    @abstractmethod
    def indexer(self, layer: Layer, program: Program) -> Callable[[np.ndarray], LayerIndex]:
        """The function that gives the index arrays of the layer's kernels in `program` for live cells: (cells,) int32,
        their places in the grid, ascending. It is asked for once a layer.
        """

    @abstractmethod
    def index_elems(self, layer: Layer, part: str, cells: int) -> int:
        """Elements of the held index buffer `part` whose size depends on the mask, with `cells` live cells."""

    def held_cells(self, layer: Layer, cells: int) -> int:
        """Cells of the layer's value array when `cells` live: kernels may hold some of them twice."""
        return cells

    def turned_elems(self, layer: Layer, cells: int) -> int:
        """Elements of the layer's values in the order of its transposed index, with `cells` held cells."""
        return cells * layer.scheme.cell_elems(layer.spec)

    def kept_bytes(self, layer: Layer, cells: int) -> int:
        """What a step keeps of a layer for the next mutation, beside its held buffers: the mask, `cells` held cells
        long, and where in the value array each of them stands.
        """
        return (cell_type(layer.scheme.grid(layer.spec)).itemsize + np.min_scalar_type(cells).itemsize) * cells

    @abstractmethod
    def sections(
        self, spec: LayerSpec, scheme: Scheme, target: Target, activations: str, caches: tuple[int, int] = (1, 1)
    ) -> tuple[int, int]:
        """Source channels of a section of the index, forward and transposed, as the device's schedule wants them.

        activations  what the source of the forward pass is stored as
        caches       first-level caches full that a tile may read of a section, forward and transposed
        """


def family_for(scheme: Scheme, spec: LayerSpec, target: Target) -> str:
    """Name of the family that runs a layer of that scheme: the first of the scheme's that takes it and that the device
    has kernels of."""
    backend = backend_of(target)

    def runs(name: str) -> bool:
        kernels = FAMILIES.find(name)
        return kernels.takes(spec) and backend.has(f"{name}.{kernels.forward_kernel}")

    return next(filter(runs, scheme.kernels(spec)))


def problem_of(program: Program, layer: Layer, part: str) -> GatherConv | None:
    """The problem of the layer's convolution that reads the index buffer `part` first, or None."""
    return next(
        (
            call.problem
            for call in program.calls
            if isinstance(call.problem, GatherConv) and call.layer == layer.spec.name and call.buffers[0].role == part
        ),
        None,
    )


def masked_elems(
    buffer: Buffer, layers: Mapping[str, Layer], live_units: Mapping[str, int], sharer: str | None = None
) -> int:
    """Elements of a buffer whose size follows from its layer's mask: its kernels know their index arrays, the others
    have one a weight. sharer: the layer that those count of which use what several share; None: the largest."""
    if buffer.sharers:
        names = buffer.sharers if sharer is None else (sharer,)
        return max(FAMILIES.find(layers[name].kernels).turned_elems(layers[name], live_units[name]) for name in names)
    layer, cells = layers[buffer.layer], live_units[buffer.layer]
    if buffer.kind == "indices":
        return FAMILIES.find(layer.kernels).index_elems(layer, buffer.role, cells)
    return cells * layer.scheme.cell_elems(layer.spec)


FAMILIES = Registry("kernel family", "mest_compile.operators")


F = TypeVar("F", bound=type[KernelFamily])


def family(name: str) -> Callable[[F], F]:
    """Class decorator: registers a family of kernels (one instance serves all layers)."""

    def register(cls: F) -> F:
        FAMILIES.add(name, cls())
        return cls

    return register


def held_cells(layers: Mapping[str, Layer], live_units: Mapping[str, int]) -> dict[str, int]:
    """{weight name: cells of its value array} with so many units alive; a layer that `live_units` lacks has those that
    it starts with."""
    found = {}
    for name, layer in layers.items():
        live = live_units.get(name)
        cells = (
            layer.scheme.live_cells(layer.spec, layer.sparsity)
            if live is None
            else live * layer.scheme.unit_cells(layer.spec)
        )
        found[name] = FAMILIES.find(layer.kernels).held_cells(layer, cells)
    return found
