"""Collects the kernel calls of a program as its operators record them: it knows who produces and who consumes a value,
adds up gradients, and gives operators their buffers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import Target
from mest_compile.ir.arrangement import image_shape
from mest_compile.ir.graph import ForwardGraph, Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.layouts.layout import gradients_of
from mest_compile.ir.program import Activation, Buffer, Call, Stage
from mest_compile.operators.adding import Add
from mest_compile.operators.conversion import ZeroHalo
from mest_compile.operators.operator import OPERATORS
from mest_compile.operators.optimizers.groups import Settings, hyper_name
from mest_compile.operators.optimizers.optimizer import Optimizer
from mest_compile.operators.optimizers.sgd import USUAL
from mest_compile.sparsity.layer import Layer


class Lowering:
    """Collects the calls of one program. Operators use it; its buffers are shared between the programs of a step."""

    def __init__(
        self,
        graph: ForwardGraph,
        layers: Mapping[str, Layer],
        target: Target,
        held: dict[str, Buffer],
        training: bool,
        recomputed: frozenset[str] = frozenset(),
        activations: str = "float32",
        optimizer: Optimizer = USUAL,
        parts: Sequence[Collection[str]] = (),
        adds: bool = False,
    ):
        self.graph = graph
        self.adds = adds
        self.activations = activations
        self.optimizer = optimizer
        self.settings = Settings(optimizer, graph.nodes, graph.frozen, parts)
        self.layers = layers
        self.target = target
        self.held = held
        self.training = training
        self.calls: list[Call] = []
        self.stage: Stage = "forward"
        self._nodes = {node.name: node for node in graph.nodes}
        self._recomputed = set(recomputed)
        self._values: dict[str, Activation] = {}
        self._gradients: dict[str, Activation] = {}
        self._temporaries: dict[str, Buffer] = {}
        self._aliases: dict[str, str] = {}
        self.copies: dict[tuple[str, Stage], Activation] = {}
        self._touched: set[Buffer] = set()
        self.updates: dict[Buffer, Buffer] = {}
        self._parts: dict[Buffer, Buffer] = {}
        self._moving = graph.moving()
        self._shapes = {"input": graph.input_shape} | {node.name: node.shape for node in graph.nodes}

    # What operators ask about the graph, and the device.

    def node(self, name: str) -> Node | None:
        """The node that gives the value `name`; None: it is the model's input."""
        return self._nodes.get(name)

    def has(self, kernel: str) -> bool:
        """Whether the device has that kernel."""
        return backend_of(self.target).has(kernel)

    def consumers(self, name: str) -> list[Node]:
        return [node for node in self.graph.nodes if name in node.inputs]

    def needs_gradient(self, name: str) -> bool:
        """False for the input and for what has no trainable parameter before it."""
        return name in self._moving

    def trains(self, node: Node, role: str) -> bool:
        """Whether the step changes the node's parameter of that role; False where there is none."""
        return role in node.params and node.params[role] not in self.graph.frozen

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def layer(self, node: Node) -> Layer:
        return self.layers[node.params["weight"]]

    def written(self, name: str) -> Buffer | None:
        """Flags of the channels of a value that its operator writes; None: all."""
        node = self._nodes.get(name)
        operator = OPERATORS.find(node.op) if node else None
        return operator.written(node, self) if operator else None

    def read(self, name: str) -> Buffer | None:
        """Flags of the channels of a value that its consumers read; None: all, or more than one operator does."""
        readers = [
            (node, place) for node in self.consumers(name) for place, one in enumerate(node.inputs) if one == name
        ]
        node, place = readers[0] if len(readers) == 1 else (None, 0)
        return OPERATORS.find(node.op).read(node, self) if node and place == 0 else None

    # Buffers.

    def value(self, name: str) -> Activation:
        """Forward value of a node. In the backward pass one that was not kept is computed again, once."""
        name = self._root(name)
        if self.stage == "backward" and name in self._recomputed:
            self._recomputed.remove(name)
            OPERATORS.find(self._nodes[name].op).recompute(self._nodes[name], self)
        return self._values[name]

    def output(self, node: Node) -> Activation:
        """A new buffer for the node's value, with the halo that its consumers read."""
        image = self._image(node.name, self.value_halo(node.name), self.activations)
        self._values[node.name] = _buffer_of(node.name, image)
        return self._values[node.name]

    def value_halo(self, name: str) -> tuple[int, int, int, int]:
        """(top, left, bottom, right) zero pixels that the consumers of `name` read around its value: around a summand,
        which comes second, none does."""
        readers = [node for node in self.consumers(name) if node.inputs[0] == name]
        halos = [OPERATORS.find(node.op).source_halo(node, self) for node in readers]
        return tuple(max(sides) for sides in zip(*halos)) if halos else (0, 0, 0, 0)  # type: ignore[return-value]

    def alias(self, node: Node, source: str) -> None:
        """The node's value is that of `source`; so is its gradient."""
        self._aliases[node.name] = source

    def gradient(self, node: Node) -> Activation:
        """Gradient of the loss with respect to the node's value; complete when its backward is called."""
        return self._gradients[self._root(node.name)]

    def gradient_halo(self, name: str) -> tuple[int, int, int, int]:
        """(top, left, bottom, right) zero pixels that the operator of `name` reads around the gradient of its value."""
        node = self._nodes[name]
        return OPERATORS.find(node.op).gradient_halo(node, self)

    def has_gradient(self, node: Node) -> bool:
        """Whether the loss depends on the node's value through a trainable path."""
        return self._root(node.name) in self._gradients

    def contribute(self, name: str) -> tuple[Activation, bool]:
        """(buffer, accumulate): where to write a contribution to the gradient of `name`, and whether one is there
        already."""
        name = self._root(name)
        if name in self._gradients:
            return self._gradients[name], True
        self._gradients[name] = _buffer_of(f"{name}.gradient", self._gradient_image(name))
        return self._gradients[name], False

    def adopt(self, name: str, buffer: Activation) -> bool:
        """Takes a finished buffer as the first contribution to the gradient of `name`, without a copy; False if it
        cannot be."""
        name = self._root(name)
        if name in self._gradients or buffer.image != self._gradient_image(name):
            return False
        self._gradients[name] = buffer
        return True

    def temporary(self, name: str, elems: int, dtype: str = "float32") -> Buffer:
        """Arena memory that lives from its first call to its last; the same name gives the same buffer."""
        if name not in self._temporaries:
            self._temporaries[name] = Buffer(name, elems, dtype)
        return self._temporaries[name]

    def scratch(self, name: str, image: Image) -> Activation:
        """The same for a value that is no node's."""
        return _buffer_of(name, image)

    def hold(self, name: str, elems: int | None, kind: str, dtype: str = "float32") -> Buffer:
        """Memory that the step keeps; the same name gives the same buffer, in every program of the step."""
        if name not in self.held:
            self.held[name] = Buffer(name, elems, dtype, kind)
        return self.held[name]

    def hyper(self, parameter: str) -> Buffer:
        """The optimizer's scalars at this update, for a parameter of that name."""
        return self.hold(hyper_name(self.settings.of(parameter)), len(self.optimizer.rule.scalars), "batch")

    def parameter(self, node: Node, *roles: str) -> Buffer:
        """Dense parameters or statistics of these roles, flat, one after another."""
        names = tuple(node.params[role] for role in roles)
        buffer = self.hold(
            "+".join(names), sum(int(np.prod(self.graph.state_shapes[name])) for name in names), "values"
        )
        buffer.parts = names
        return buffer

    def parameter_gradient(self, node: Node, *roles: str) -> Buffer:
        """Where a kernel writes their gradient, laid out likewise; asking for it makes the step update them."""
        values = self.parameter(node, *roles)
        gradients = self.hold(f"{values.name}:gradient", values.elems, "gradients")
        assert values not in self.updates, f"two operators give the gradient of {values.name}"
        self.updates[values] = gradients
        assert values.elems is not None, "dense parameters have a size"
        return self.part(gradients, values.elems)

    def part(self, gradients: Buffer, elems: int) -> Buffer:
        """Where a kernel that does not add writes its share of a parameter's gradient, of so many elements: where that
        is to be added, a buffer from which it is, behind the calls of this node."""
        if not self.adds:
            return gradients
        self._parts[gradients] = self.temporary(f"{gradients.name}:part", elems)
        return self._parts[gradients]

    def add_parts(self) -> None:
        """Records that what a node's calls wrote in parts is added to the gradients."""
        for gradients, part in self._parts.items():
            self.call("gradients.add", Add(), part, gradients)
        self._parts.clear()

    def statistics(self, name: str) -> Buffer | None:
        """Sums that the convolution `name` left in its epilogue for batch_norm, if it did."""
        return self._temporaries.get(f"{name}.statistics")

    # Calls.

    def call(
        self, kernel: str, problem: Any, *buffers: Buffer, node: str = "", phase: str = "", fills: Buffer | None = None
    ) -> None:
        """Records a kernel call in the present stage, a layer's by the names of its node and phase. `fills` is a buffer
        whose halo the kernel itself sets to 0.
        """
        if fills:
            self._touched.add(fills)
        self._record(kernel, problem, buffers, f"{node}.{phase}" if node else None, self.stage, phase)

    def call_statistics(self, kernel: str, problem: Any, *buffers: Buffer) -> None:
        """Records a call that only runs when the step trains."""
        self._record(kernel, problem, buffers, None, "statistics")

    def call_update(self, kernel: str, problem: Any, *buffers: Buffer, name: str | None = None) -> None:
        """Records a call that only runs when the step updates parameters."""
        self._record(kernel, problem, buffers, name, "update")

    def _record(
        self, kernel: str, problem: Any, buffers: Sequence[Buffer], name: str | None, stage: Stage, phase: str = ""
    ) -> None:
        for buffer in buffers:
            if buffer not in self._touched:
                self._touched.add(buffer)
                if buffer.image and any(buffer.image.halo):
                    zero = ZeroHalo(buffer.image)
                    self.calls.append(
                        Call(f"{len(self.calls)}.zero_halo", "image.zero_halo", zero, (buffer,), self.stage)
                    )
        self.calls.append(Call(name or f"{len(self.calls)}.{kernel}", kernel, problem, tuple(buffers), stage, phase))

    # Internal.

    def _root(self, name: str) -> str:
        while name in self._aliases:
            name = self._aliases[name]
        return name

    def _gradient_image(self, name: str) -> Image:
        return self._image(name, self.gradient_halo(name), gradients_of(self.activations))

    def _image(self, name: str, halo: tuple[int, int, int, int], dtype: str) -> Image:
        shape = self._shapes[name]
        if name == self._root(self.graph.nodes[-1].name):  # logits are few, and the loss exponentiates them
            dtype = "float32"
        batch, channels, height, width = image_shape(shape)
        each, pixels = self.target.slice_examples, self.target.abreast(width)
        image = Image(channels, height, width, batch, halo, each, dtype, pixels).haloed(halo)
        return image.spread() if backend_of(self.target).processor else image


def _buffer_of(name: str, image: Image) -> Activation:
    return Activation(name, image.elems, image.array_dtype, "arena", image)
