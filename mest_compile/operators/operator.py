"""What an operator is, and what it may ask of the step that is being lowered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from mest_compile.base.errors import UnsupportedOperator
from mest_compile.base.registry import Registry
from mest_compile.frontend.onnx_writer import Writer
from mest_compile.hardware.target import Target
from mest_compile.ir.graph import ForwardGraph, Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.program import Activation, Buffer, Stage
from mest_compile.operators.optimizers.optimizer import Optimizer
from mest_compile.sparsity.layer import Layer

Halo = tuple[int, int, int, int]  # (top, left, bottom, right) zero pixels

OPERATORS = Registry("operator", "mest_compile.operators")


O = TypeVar("O", bound="type[Operator]")


def operator(name: str) -> Callable[[O], O]:
    """Class decorator: registers a training operator (one instance serves all layers)."""

    def register(cls: O) -> O:
        OPERATORS.add(name, cls())
        return cls

    return register


class Trace(Protocol):
    """A step that is being lowered, as its operators see it; `lowering.Lowering` is one.

    graph     that is lowered
    target    device that it is lowered for
    stage     what is being recorded: "forward", "backward"
    copies    of values, by name and stage, made once by operators that want them laid out otherwise
    training  whether the program trains; else it predicts
    optimizer  updates the parameters
    adds      whether the gradients of parameters are added to what is there
    """

    graph: ForwardGraph
    target: Target
    stage: Stage
    copies: dict[tuple[str, Stage], Activation]
    training: bool
    optimizer: Optimizer
    adds: bool

    # The graph, and the device.

    def node(self, name: str) -> Node | None:
        """The node that gives the value `name`; None: it is the model's input."""

    def has(self, kernel: str) -> bool:
        """Whether the device has that kernel."""

    def consumers(self, name: str) -> Sequence[Node]:
        """Nodes that read the value of `name`."""

    def needs_gradient(self, name: str) -> bool:
        """False for the input and for what has no trainable parameter before it."""

    def trains(self, node: Node, role: str) -> bool:
        """Whether the step changes the node's parameter of that role; False where there is none."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the value of `name`: (N, C, H, W) or (N, features)."""

    def layer(self, node: Node) -> Layer:
        """The layer of a convolution or linear node."""

    def written(self, name: str) -> Buffer | None:
        """Flags of the channels of a value that its operator writes; None: all."""

    def read(self, name: str) -> Buffer | None:
        """Flags of the channels of a value that its consumers read; None: all, or more than one operator does."""

    # Buffers.

    def value(self, name: str) -> Activation:
        """Forward value of a node. In the backward pass one that was not kept is computed again, once."""

    def output(self, node: Node) -> Activation:
        """A new buffer for the node's value, with the halo that its consumers read."""

    def value_halo(self, name: str) -> Halo:
        """Zero pixels that the consumers of `name` read around its value."""

    def alias(self, node: Node, source: str) -> None:
        """The node's value is that of `source`; so is its gradient."""

    def gradient(self, node: Node) -> Activation:
        """Gradient of the loss with respect to the node's value; complete when its backward is called."""

    def gradient_halo(self, name: str) -> Halo:
        """Zero pixels that the operator of `name` reads around the gradient of its value."""

    def contribute(self, name: str) -> tuple[Activation, bool]:
        """(buffer, accumulate): where to write a contribution to the gradient of `name`, and whether one is there
        already."""

    def adopt(self, name: str, buffer: Activation) -> bool:
        """Takes a finished buffer as the first contribution to the gradient of `name`, without a copy; False if it
        cannot be."""

    def temporary(self, name: str, elems: int, dtype: str = "float32") -> Buffer:
        """Arena memory that lives from its first call to its last; the same name gives the same buffer."""

    def scratch(self, name: str, image: Image) -> Activation:
        """A new buffer in the arena for a value that is no node's."""

    def hold(self, name: str, elems: int | None, kind: str, dtype: str = "float32") -> Buffer:
        """Memory that the step keeps; the same name gives the same buffer, in every program of the step."""

    def hyper(self, parameter: str) -> Buffer:
        """The optimizer's scalars at this update, for a parameter of that name."""

    def parameter(self, node: Node, *roles: str) -> Buffer:
        """Dense parameters or statistics of these roles, flat, one after another."""

    def parameter_gradient(self, node: Node, *roles: str) -> Buffer:
        """Where a kernel writes their gradient, laid out likewise; asking for it makes the step update them."""

    def part(self, gradients: Buffer, elems: int) -> Buffer:
        """Where a kernel that does not add writes its share of a parameter's gradient, of so many elements: where that
        is to be added, a buffer from which it is, behind the calls of this node."""

    def statistics(self, name: str) -> Buffer | None:
        """Sums that the convolution `name` left in its epilogue for batch_norm, if it did."""

    # Calls.

    def call(
        self, kernel: str, problem: Any, *buffers: Buffer, node: str = "", phase: str = "", fills: Buffer | None = None
    ) -> None:
        """Records a kernel call in the present stage, a layer's by the names of its node and phase. `fills` is a buffer
        whose halo the kernel itself sets to 0.
        """

    def call_statistics(self, kernel: str, problem: Any, *buffers: Buffer) -> None:
        """Records a call that only runs when the step trains."""

    def call_update(self, kernel: str, problem: Any, *buffers: Buffer, name: str | None = None) -> None:
        """Records a call that only runs when the step updates parameters."""


class Operator:
    """Base of the operators: what most of them answer. Each has `forward`, and `backward` unless nothing flows back
    through it.

    not_in_onnx  why `onnx` is left as it is here
    """

    not_in_onnx = "its file does not say how"

    def source_halo(self, node: Node, low: Trace) -> Halo:
        """Zero pixels that it reads around its input's value."""
        return (0, 0, 0, 0)

    def gradient_halo(self, node: Node, low: Trace) -> Halo:
        """Zero pixels that it reads around the gradient of its value."""
        return (0, 0, 0, 0)

    def written(self, node: Node, low: Trace) -> Buffer | None:
        """Flags (channels,) of the channels of its value that are written; None: all are."""
        return None

    def read(self, node: Node, low: Trace) -> Buffer | None:
        """Flags (channels,) of the channels of its input that it reads; None: all."""
        return None

    def constants(self, node: Node) -> dict[str, np.ndarray]:
        """{held buffer: what it holds from the start, flat}."""
        return {}

    def forward(self, node: Node, low: Trace) -> None:
        """Records the forward pass."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def recompute(self, node: Node, low: Trace) -> None:
        """Records the forward pass once more, for a value that was not kept."""
        raise NotImplementedError(f"{type(self).__name__}.recompute")

    def backward(self, node: Node, low: Trace) -> None:
        """Records what the gradient of its value gives to its inputs and parameters."""
        raise NotImplementedError(f"{type(self).__name__}.backward")

    def onnx(self, node: Node, writer: Writer) -> str:
        """Writes it, as evaluation has it, into an ONNX graph; returns the name of its value there. Raises
        UnsupportedOperator."""
        raise UnsupportedOperator(f"{node.op} {node.name!r} cannot be written to ONNX: {self.not_in_onnx}")
