"""The depthwise family: every channel by itself, all of its weights alive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mest_compile.ir.graph import LayerSpec
from mest_compile.operators.batch_norm import AFFINE
from mest_compile.operators.chain import chain_of
from mest_compile.operators.layers.depthwise import DepthwiseForward, DepthwiseGradInput, DepthwiseGradWeight, Window
from mest_compile.operators.layers.family import KernelFamily, family
from mest_compile.operators.layers.index import LayerIndex, places_of
from mest_compile.operators.layers.normed_depthwise import NormedDepthwiseBackward, NormedDepthwiseForward

if TYPE_CHECKING:
    from mest_compile.hardware.target import Target
    from mest_compile.ir.graph import Node
    from mest_compile.ir.layouts.batch import Image
    from mest_compile.ir.program import Activation, Buffer, Program
    from mest_compile.operators.layers.gather import Epilogue
    from mest_compile.operators.operator import Trace
    from mest_compile.sparsity.layer import Layer
    from mest_compile.sparsity.scheme import Scheme


def _window(spec: LayerSpec) -> Window:
    return Window(spec.weight_shape[2:], spec.stride, spec.padding, spec.dilation)


def _apart(value: Activation) -> Image:
    """Its image with a pixel a vector, as these kernels take it."""
    return replace(value.image, abreast=1)


def _facts(norm: Node, low: Trace) -> tuple[Buffer, Buffer]:
    """(moments, affine) of a normalisation in a chain."""
    return low.temporary(f"{norm.name}.moments", 3 * norm.shape[1]), low.parameter(norm, *AFFINE)


@family("depthwise")
class DepthwiseFamily(KernelFamily):
    """Three kernels that read a layer's values as torch has them: there is no index and no transposed copy."""

    forward_kernel = "forward"
    by_rows = False

    def takes(self, spec: LayerSpec) -> bool:
        return spec.depthwise and not spec.transposed

    def _convolve(self, node: Node, low: Trace, result: Activation, statistics: list[Buffer], phase: str) -> None:
        chain = chain_of(node, low)
        if chain is None:
            super()._convolve(node, low, result, statistics, phase)
            return
        layer, source = low.layer(node), low.value(chain.before.inputs[0])
        activation = chain.before.attrs["activation"]
        problem = NormedDepthwiseForward(
            _apart(source), _apart(result), _window(layer.spec), activation, bool(statistics)
        )
        arrays = self.hold(layer, low, "", "values"), *_facts(chain.before, low), source, result, *statistics
        low.call("normed_depthwise.forward", problem, *arrays, node=node.name, phase=phase)

    def backward(self, node: Node, low: Trace) -> None:
        chain = chain_of(node, low)
        if chain is None:
            super().backward(node, low)
            return
        layer, source = low.layer(node), low.value(chain.before.inputs[0])
        z, dy = low.value(node.name), low.gradient(node)
        name = chain.before.inputs[0]  # nobody else reads its value, or contributes to its gradient
        dz = None if low.adopt(name, source) else low.contribute(name)[0]
        before, behind = (norm.attrs["activation"] for norm in (chain.before, chain.behind))
        problem = NormedDepthwiseBackward(
            _apart(source), _apart(z), _apart(dy), _apart(dz) if dz else None, _window(layer.spec), before, behind
        )
        low.call(
            "normed_depthwise.backward",
            problem,
            self.hold(layer, low, "", "values"),
            *_facts(chain.before, low),
            source,
            *_facts(chain.behind, low),
            z,
            dy,
            self._part(layer, self.hold(layer, low, "gradient", "gradients"), low),
            *(low.parameter_gradient(norm, *AFFINE) for norm in (chain.before, chain.behind)),
            *([dz] if dz else []),
            node=node.name,
            phase="backward",
        )
        self.update(layer, low)

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
        problem = DepthwiseForward(
            _apart(source), _apart(result), _window(layer.spec), bias, bool(statistics), epilogue
        )
        values = self.hold(layer, low, "", "values")
        low.call("depthwise.forward", problem, values, *others, source, result, *statistics, node=node, phase=phase)

    def grad_weight(
        self, layer: Layer, source: Activation, delta: Activation, gradients: Buffer, low: Trace, node: str
    ) -> None:
        problem = DepthwiseGradWeight(_apart(source), _apart(delta), _window(layer.spec))
        gradients = self._part(layer, gradients, low)
        low.call("depthwise.grad_weight", problem, gradients, source, delta, node=node, phase="grad_weight")

    @staticmethod
    def _part(layer: Layer, gradients: Buffer, low: Trace) -> Buffer:
        """What a kernel that does not add writes to: all weights live."""
        return low.part(gradients, layer.spec.weight_elems)

    def grad_input(
        self, layer: Layer, delta: Activation, target: Activation, accumulate: bool, low: Trace, node: str
    ) -> None:
        problem = DepthwiseGradInput(_apart(delta), _apart(target), _window(layer.spec), accumulate)
        values = self.hold(layer, low, "", "values")
        low.call("depthwise.grad_input", problem, values, delta, target, node=node, phase="grad_input")

    def indexer(self, layer: Layer, program: Program) -> Callable[[np.ndarray], LayerIndex]:
        def index(cells: np.ndarray) -> LayerIndex:
            sort = np.arange(len(cells), dtype=np.int32)
            return LayerIndex(sort, places_of(sort, len(cells)), {})

        return index

    def index_elems(self, layer: Layer, part: str, cells: int) -> int:
        return 0

    def sections(
        self, spec: LayerSpec, scheme: Scheme, target: Target, activations: str, caches: tuple[int, int] = (1, 1)
    ) -> tuple[int, int]:
        return spec.input_shape[1], spec.weight_shape[0]
