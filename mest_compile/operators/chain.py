"""Where a depthwise convolution takes in the normalisations around it: it normalises what it reads while it reads it,
and both gradients are its own. What the first normalisation gives, six times as wide as a mobile net's blocks are at
their ends, is then nowhere in memory, and the way back reads and writes each wide array once.

Batch statistics stay those of the whole batch: a kernel has a channel of all examples at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mest_compile.ir.graph import Node
from mest_compile.operators.operator import Trace

KERNELS = ("normed_depthwise.forward", "normed_depthwise.backward")


@dataclass(frozen=True, slots=True)
class Chain:
    """A depthwise convolution between the normalisation whose value it reads and the one that reads its value."""

    before: Node
    convolution: Node
    behind: Node


def chain_of(node: Node, low: Trace) -> Chain | None:
    """The chain that a node is in. There is one where everything in it trains, nobody else reads what lies between, and
    the device has kernels for it. Of depthwise convolutions in a row with a normalisation between every two, each
    second one has a chain: a normalisation is in one at most."""
    if node.op != "batch_norm":
        return _chain_around(node, low)
    return _chain_around(low.node(node.inputs[0]), low) or _chain_around(_only(low.consumers(node.name)), low)


def _chain_around(convolution: Node | None, low: Trace) -> Chain | None:
    if convolution is None or not _is_depthwise(convolution, low):
        return None
    first, last = low.node(convolution.inputs[0]), _only(low.consumers(convolution.name))
    if first is None or last is None or not (_trains(first, low) and _trains(last, low)):
        return None
    alone = low.consumers(first.name) == [convolution] and low.consumers(first.inputs[0]) == [first]
    whole = low.written(first.inputs[0]) is None and low.read(last.name) is None
    if not (alone and whole and low.needs_gradient(first.inputs[0]) and all(map(low.has, KERNELS))):
        return None
    taken = _chain_around(low.node(first.inputs[0]), low)
    return None if taken else Chain(first, convolution, last)


def _only(nodes: Sequence[Node]) -> Node | None:
    return nodes[0] if len(nodes) == 1 else None


def _is_depthwise(node: Node | None, low: Trace) -> bool:
    """A result for each channel, and nothing else at its end."""
    if node is None or node.op != "conv2d" or "bias" in node.params or node.attrs.get("folded"):
        return False
    layer = low.layer(node)
    alike = layer.spec.weight_shape[0] == layer.spec.input_shape[1]
    return layer.kernels == "depthwise" and alike and low.trains(node, "weight")


def _trains(node: Node, low: Trace) -> bool:
    """Whether it is a normalisation by batch statistics that adds nothing, all of which trains."""
    if node.op != "batch_norm" or len(node.inputs) > 1 or node.attrs.get("evaluating"):
        return False
    return low.trains(node, "weight") and low.trains(node, "bias")
