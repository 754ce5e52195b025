"""Convolution and linear layers: three gathers over the live units, and how they stand in the training graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mest_compile.operators.bias import BiasGradient
from mest_compile.operators.gather import GatherConv, GatherGrad, Pass
from mest_compile.operators.optimizer import Sgd, SgdUnits
from mest_compile.registry import operator
from mest_compile.sparsity.packing import (
    LayerIndex,
    forward_index,
    gradient_halo,
    parity_passes,
    reaching_passes,
    source_halo,
    with_transposed,
)
from mest_compile.spec import Image, Node

if TYPE_CHECKING:
    from mest_compile.graph.lowering import Lowering
    from mest_compile.graph.program import Buffer, Program
    from mest_compile.sparsity.layer import Layer


def forward_problem(layer: Layer, source: Image, result: Image, bias: bool, statistics: bool) -> GatherConv:
    rows, sources = layer.scheme.block(layer.spec)
    return GatherConv(source, result, rows, sources, layer.spec.stride, (Pass((result.height, result.width)),),
                      layer.section_channels, bias=bias, statistics=statistics)


def gradient_problem(layer: Layer, delta: Image, result: Image, accumulate: bool) -> GatherConv:
    """The input gradient: the same gather on the output gradient, with the roles of the unit's sides swapped."""
    rows, sources = layer.scheme.block(layer.spec)
    passes = reaching_passes(layer.spec) if accumulate else parity_passes(layer.spec)
    return GatherConv(delta, result, sources, rows, (1, 1), passes, layer.transposed_section_channels, accumulate=accumulate)


@operator("conv2d")
class Conv2d:
    """Forward, input gradient and weight gradient at the live units. Saves its input, which the layer before keeps anyway."""

    def source_halo(self, node: Node, low: Lowering) -> tuple[int, int, int, int]:
        return source_halo(low.layer(node).spec)

    def gradient_halo(self, node: Node, low: Lowering) -> tuple[int, int, int, int]:
        return gradient_halo(low.layer(node).spec) if low.needs_gradient(node.inputs[0]) else (0, 0, 0, 0)

    def forward(self, node: Node, low: Lowering) -> None:
        weight = node.params["weight"]
        source, result = low.value(node.inputs[0]), low.output(node)
        assert source.image and result.image
        bias = [low.parameter(node, "bias")] if "bias" in node.params else []
        # Statistics in the epilogue spare batch_norm a pass over memory; lanes without an example would count in them.
        statistics = []
        normed, image = any(consumer.op == "batch_norm" for consumer in low.consumers(node.name)), result.image
        if low.training and normed and not bias and image.batch == image.lanes:
            statistics = [low.temporary(f"{node.name}.statistics", image.slices * image.height * 2 * image.channels * image.vector)]
        problem = forward_problem(low.layer(node), source.image, result.image, bool(bias), bool(statistics))
        low.call("gather.conv", problem, *self._index(weight, problem, low), self._values(weight, low), *bias, source, result, *statistics,
                 name=f"{node.name}.forward")

    def recompute(self, node: Node, low: Lowering) -> None:
        """The forward pass once more, for a value that was not kept."""
        weight = node.params["weight"]
        source, result = low.value(node.inputs[0]), low.output(node)
        assert source.image and result.image
        bias = [low.parameter(node, "bias")] if "bias" in node.params else []
        problem = forward_problem(low.layer(node), source.image, result.image, bool(bias), False)
        low.call("gather.conv", problem, *self._index(weight, problem, low), self._values(weight, low), *bias, source, result,
                 name=f"{node.name}.recompute")

    def backward(self, node: Node, low: Lowering) -> None:
        weight, layer = node.params["weight"], low.layer(node)
        source, delta = low.value(node.inputs[0]), low.gradient(node)
        assert source.image and delta.image
        values, gradients = self._values(weight, low), low.hold(f"{weight}:gradient", None, "gradients")
        momentum, hyper = low.hold(f"{weight}:momentum", None, "optimizer"), low.hold("hyper", 4, "batch")
        rows, sources = layer.scheme.block(layer.spec)
        grad = GatherGrad(source.image, delta.image, rows, sources, layer.spec.stride, layer.section_channels)
        low.call("gather.grad", grad, *self._index(weight, grad, low), source, delta, gradients, name=f"{node.name}.grad_weight")
        if "bias" in node.params:
            low.call("bias.gradient", BiasGradient(delta.image), delta, low.parameter_gradient(node, "bias"), name=f"{node.name}.grad_bias")
        if not low.needs_gradient(node.inputs[0]):
            low.call_update("optimizer.sgd", Sgd(), values, gradients, momentum, hyper, name=f"{weight}.update")
            return
        target, accumulate = low.contribute(node.inputs[0])
        assert target.image
        problem = gradient_problem(layer, delta.image, target.image, accumulate)
        transposed = low.hold(f"{weight}:transposed", None, "values")
        low.call("gather.conv", problem, *self._index(weight, problem, low, "transposed_"), transposed, delta, target,
                 name=f"{node.name}.grad_input")
        low.call_update("optimizer.sgd_units", SgdUnits(sources, rows), values, gradients, momentum, hyper,
                        low.hold(f"{weight}:permutation", None, "indices", "int32"), transposed, name=f"{weight}.update")

    @staticmethod
    def _index(weight: str, problem: GatherConv | GatherGrad, low: Lowering, prefix: str = "") -> tuple[Buffer, Buffer]:
        return (low.hold(f"{weight}:{prefix}pointers", problem.cells + 1, "indices", "int32"),
                low.hold(f"{weight}:{prefix}offsets", None, "indices", "int32"))

    @staticmethod
    def _values(weight: str, low: Lowering) -> Buffer:
        return low.hold(weight, None, "values")


@operator("linear")
class Linear(Conv2d):
    """A 1x1 convolution of a 1x1 image."""


def index_layer(layer: Layer, keep: np.ndarray, program: Program) -> LayerIndex:
    """Index arrays of the layer's three kernels in `program` under the unit mask `keep`."""
    def problem(part: str) -> GatherConv | None:
        name = f"{layer.spec.name}:{part}"
        return next((call.problem for call in program.calls if call.kernel == "gather.conv" and call.buffers[0].name == name), None)

    forward, backward = problem("pointers"), problem("transposed_pointers")
    assert forward is not None, f"{layer.spec.name} is not in program {program.name}"
    index = forward_index(layer.spec, keep, forward)
    return with_transposed(index, layer.spec, keep, backward) if backward is not None else index
