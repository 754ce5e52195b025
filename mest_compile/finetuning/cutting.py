"""A graph in two: what is the same for an image however often it is seen, and what trains."""

from __future__ import annotations

from dataclasses import replace

from mest_compile.ir.graph import CHOSEN, COUNTER, ForwardGraph
from mest_compile.lowering.fusing import fuse
from mest_compile.planning.facts import Facts
from mest_compile.planning.memory import usually_recomputed


def cut_of(graph: ForwardGraph) -> int:
    """How many of the first nodes are frozen and reach the others through the last of them alone; as many as can be.
    0 where there are none."""
    moving, found, reached = graph.moving(), 0, -1
    last = {source: place for place, node in enumerate(graph.nodes) for source in node.inputs}  # that reads each value
    for count in range(1, len(graph.nodes)):
        before = graph.nodes[count - 2].name if count > 1 else "input"
        reached = max(reached, last.get(before, -1))  # the last node that reads something from before the gate
        if graph.nodes[count - 1].name in moving:
            break
        if reached < count:
            found = count
    return found


def between(graph: ForwardGraph, start: int, end: int) -> ForwardGraph:
    """The nodes from `start` to before `end` as a graph of its own, both of them places where a graph can be cut; its
    input is what the node before `start` gives."""
    nodes, shape, prepared = graph.nodes[start:end], graph.input_shape, graph.prepared
    if start:
        gate = graph.nodes[start - 1]
        shape, prepared = gate.shape, ()
        nodes = tuple(
            replace(node, inputs=tuple("input" if one == gate.name else one for one in node.inputs)) for node in nodes
        )
    owned = {name for node in nodes for name in node.params.values()}
    owned |= {f"{name.rpartition('.')[0]}.{COUNTER}".lstrip(".") for name in owned}
    owned |= {step.operand for step in prepared if isinstance(step.operand, str)}
    return ForwardGraph(
        nodes,
        tuple(shape),
        {name: sizes for name, sizes in graph.state_shapes.items() if name in owned},
        prepared,
        {name: why for name, why in graph.frozen.items() if name in owned},
    )


def rest_of(facts: Facts, start: int) -> Facts:
    """The facts of a step of the nodes from `start` on."""
    graph = between(facts.graph, start, len(facts.graph.nodes))
    layers = {name: layer for name, layer in facts.layers.items() if name in graph.state_shapes}
    return replace(facts, graph=graph, layers=layers, recomputed=usually_recomputed(fuse(graph), facts.target))


def evaluating(facts: Facts) -> Facts:
    """The facts of the same model with nothing that trains, every BatchNorm in evaluation mode."""
    nodes = tuple(
        replace(node, attrs={**node.attrs, "evaluating": True}) if node.op == "batch_norm" else node
        for node in facts.graph.nodes
    )
    frozen = {name: facts.graph.frozen.get(name, CHOSEN) for name in facts.graph.parameters()}
    layers = {name: replace(layer, frozen=True) for name, layer in facts.layers.items()}
    return replace(facts, graph=replace(facts.graph, nodes=nodes, frozen=frozen), layers=layers)
