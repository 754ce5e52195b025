"""Which layers stay dense when nobody says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mest_compile.ir.graph import LAYERS, ForwardGraph, LayerSpec, Node
from mest_compile.sparsity.scheme import Scheme


def default_dense_layers(
    graph: ForwardGraph, specs: Sequence[LayerSpec], schemes: Mapping[str, Scheme]
) -> dict[str, str]:
    """{weight name: why} of what MEST (arXiv:2110.14032) leaves dense: the first convolution, the 1x1 convolutions of
    shortcuts, the classifier. Ours: recurrent layers, and depthwise layers, which have a few percent of a mobile net's
    weights and are bound by memory.
    So do layers that their scheme cannot cut into its units.

    specs: of the graph's layers, in order. schemes: {weight name: Scheme}, of those that have one.
    """
    convolutions = {node.params["weight"]: node for node in graph.nodes if node.op == "conv2d"}
    first = next(iter(convolutions), specs[-1].name)
    small = [spec.name for spec in specs if spec.name in convolutions and spec.weight_shape[2:] == (1, 1)]
    found = {first: "the first convolution"}
    for name in small:
        if _is_shortcut(graph, convolutions[name]):
            found.setdefault(name, "a shortcut")
    nodes = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        if node.op == "recurrent":
            found.setdefault(nodes[node.inputs[0]].params["weight"], "of a recurrent layer")
    for spec in specs:
        if spec.depthwise:
            found.setdefault(spec.name, "depthwise")
        elif spec.name in schemes and (why := schemes[spec.name].misfit(spec)):
            found.setdefault(spec.name, f"{schemes[spec.name]} {why}")
    return {**found, specs[-1].name: "the last layer"}


def _is_shortcut(graph: ForwardGraph, convolution: Node) -> bool:
    """Whether what it gives is added to what a path of more layers, which it is none of, made of the same value: not
    the 1x1 convolution that ends a block of a mobile net, whose result the next block adds to what it makes of it."""
    nodes = {node.name: node for node in graph.nodes}
    starts = _before(convolution.inputs[0], nodes)
    for node in graph.nodes:
        if node.op == "add":
            for mine, others in ((mine, [other for other in node.inputs if other != mine]) for mine in node.inputs):
                if _before(mine, nodes)[-1] == convolution.name and any(
                    _layers_between(starts, other, nodes, convolution.name) > 1 for other in others
                ):
                    return True
    return False


def _before(name: str, nodes: dict[str, Node]) -> list[str]:
    """A value and those before it that normalisation, activations and pools made it of, up to a layer, an addition or
    the input."""
    found = [name]
    while name in nodes and nodes[name].inputs and nodes[name].op not in (*LAYERS, "add"):
        name = nodes[name].inputs[0]
        found.append(name)
    return found


def _layers_between(starts: Sequence[str], end: str, nodes: dict[str, Node], without: str) -> int:
    """The most layers on a path from one of `starts` to `end` that leaves out a node; -1 when there is none."""
    most = {"input": 0 if "input" in starts else -1}
    for name, node in nodes.items():
        before = max((most[source] for source in node.inputs), default=-1)
        passed = before + (node.op in LAYERS) if before >= 0 and name != without else -1
        most[name] = max(passed, 0 if name in starts else -1)
        if name == end:
            break
    return most[end]
