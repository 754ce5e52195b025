"""Makes the forward graph cheap to differentiate: joins batch_norm with the addition and the activation that follow it,
lets a convolution end with a batch_norm that stays as it is, makes combinations of combinations one, and puts strided
1x1 convolutions first among a value's consumers.

The joined operator has one backward pass over memory instead of three, and saves nothing for the activation. A
convolution that reads only some pixels has an input gradient only there: when it is the last to contribute, as the
first consumer is, it need not write the others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from mest_compile.ir.arrangement import image_shape
from mest_compile.ir.graph import STATISTICS, ForwardGraph, Node
from mest_compile.operators.activation import activation_in, activation_of
from mest_compile.operators.combine import joined


def fuse(graph: ForwardGraph) -> ForwardGraph:
    """`graph` with batch_norm(+add)(+activation) as single batch_norm nodes: attrs gain `activation`, inputs gain the
    other summand. Where such a node is `evaluating` and nothing of it trains, it becomes part of the convolution before
    it (`folded`).

    Behind an addition only an activation whose slope follows from its result: the sum, which others need, is not kept.
    """
    graph = _join(_without_idle_cuts(graph))
    nodes = [
        replace(node, attrs={**node.attrs, "activation": None}) if node.op == "batch_norm" else node
        for node in graph.nodes
    ]
    uses = Counter(source for node in nodes for source in node.inputs)
    by_name = {node.name: node for node in nodes}
    order = {node.name: place for place, node in enumerate(nodes)}
    renamed: dict[str, str] = {}

    def current(name: str) -> str:
        while name in renamed:
            name = renamed[name]
        return name

    def plain_norm(name: str) -> Node | None:
        node = by_name.get(name)
        return (
            node if node and node.op == "batch_norm" and node.attrs["activation"] is None and uses[name] == 1 else None
        )

    placed: dict[str, Node] = {}  # by name, in order; a joined node stands where the last of its parts stood
    for node in nodes:
        inputs = tuple(current(source) for source in node.inputs)
        joined = None
        if node.op == "add" and inputs[0] != inputs[1]:
            found = [name for name in inputs if plain_norm(name) and len(by_name[name].inputs) == 1]
            if found:
                norm = max(found, key=order.__getitem__)
                residual = inputs[1] if norm == inputs[0] else inputs[0]
                joined = replace(by_name[norm], inputs=(by_name[norm].inputs[0], residual))
        elif (activation := activation_in(node)) and (plain := plain_norm(inputs[0])):  # noqa: SIM102
            if len(plain.inputs) == 1 or activation_of(activation).from_result:
                joined = replace(plain, attrs={**plain.attrs, "activation": activation})
        if joined is None:
            placed[node.name] = by_name[node.name] = replace(node, inputs=inputs)
            continue
        del placed[joined.name]
        placed[joined.name] = by_name[joined.name] = joined
        renamed[node.name] = joined.name
        uses[joined.name] = uses[node.name]
        order[joined.name] = order[node.name]
    return _partial_readers_first(_fold(replace(graph, nodes=tuple(placed.values()))))


def _join(graph: ForwardGraph) -> ForwardGraph:
    """`graph` with every combination that one other alone reads, and that is as large, as a part of that one: a scale
    and a shift are one pass. Constants keep their places in memory, which go by their nodes' names."""
    uses = Counter(source for node in graph.nodes for source in node.inputs)
    placed: dict[str, Node] = {}
    for node in graph.nodes:
        for source in node.inputs if node.op == "combine" else ():
            inner = placed.get(source)
            alone = inner is not None and inner.op == "combine" and uses[source] == 1 and inner.shape == node.shape
            if inner and alone and not any("constants" in one.attrs for one in (inner, node)):
                del placed[source]
                node = joined(inner, node)
        placed[node.name] = node
    return replace(graph, nodes=tuple(placed.values()))


def _without_idle_cuts(graph: ForwardGraph) -> ForwardGraph:
    """`graph` without the cuts behind which nothing trains anyhow."""
    moving, nodes, source = graph.moving(), [], {"input": "input"}
    for node in graph.nodes:
        inputs = tuple(source[name] for name in node.inputs)
        idle = node.op == "detach" and inputs[0] not in moving
        source[node.name] = inputs[0] if idle else node.name
        if not idle:
            nodes.append(replace(node, inputs=inputs))
    return replace(graph, nodes=tuple(nodes))


def _fold(graph: ForwardGraph) -> ForwardGraph:
    """`graph` with every batch_norm that is `evaluating` and wholly frozen at the end of the convolution or linear
    layer before it, where nobody else reads that: it goes by the layer's name and has its weights as `norm_weight` and
    `norm_bias`.

    Where a gradient flows through it the activation's slope must follow from the result: what it takes is not kept.
    """
    moving = graph.moving()
    uses = Counter(source for node in graph.nodes for source in node.inputs)
    layers = {node.name: node for node in graph.nodes if node.op in ("conv2d", "linear")}
    placed: dict[str, Node] = {}
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        node = replace(node, inputs=tuple(renamed.get(source, source) for source in node.inputs))
        placed[node.name] = node
        if node.op != "batch_norm" or not node.attrs.get("evaluating") or "weight" not in node.params:
            continue
        layer, activation = layers.get(node.inputs[0]), node.attrs["activation"]
        stays = node.params["weight"] in graph.frozen and node.params["bias"] in graph.frozen
        told = activation is None or node.name not in moving or activation_of(activation).from_result
        if layer is None or uses[layer.name] > 1 or placed[layer.name].attrs.get("folded") or not (stays and told):
            continue
        layer = placed.pop(layer.name)
        del placed[node.name]
        params = {**layer.params, **{f"norm_{role}": node.params[role] for role in ("weight", "bias")}}
        params |= {role: node.params[role] for role in STATISTICS}
        attrs = {**layer.attrs, "folded": True, "eps": node.attrs["eps"], "activation": activation}
        inputs = (*layer.inputs, *node.inputs[1:])
        placed[layer.name] = replace(layer, inputs=inputs, params=params, attrs=attrs)
        renamed[node.name] = layer.name
    return replace(graph, nodes=tuple(placed.values()))


def _partial_readers_first(graph: ForwardGraph) -> ForwardGraph:
    """`graph` with every convolution whose stride exceeds its kernel, and that adds nothing, directly behind the node
    that it reads."""

    def partial(node: Node) -> bool:
        if node.op != "conv2d" or len(node.inputs) > 1:
            return False
        taps = image_shape(graph.state_shapes[node.params["weight"]])[2:]
        return any(step > width for step, width in zip(node.attrs["stride"], taps, strict=True))

    nodes = [node for node in graph.nodes if not partial(node)]
    for node in filter(partial, graph.nodes):
        nodes.insert(next((place + 1 for place, other in enumerate(nodes) if other.name == node.inputs[0]), 0), node)
    return replace(graph, nodes=tuple(nodes))
