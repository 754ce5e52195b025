"""Freezing while training: what freezes with what, and the step in which some of it is frozen.

A *part* is what freezes at once: a block as "last:3" has it (`planning.trainable`), else a convolution or linear layer,
with the biases and normalisations behind it. Parts are in the order of the forward pass, and freeze in it: only then
does the backward pass end earlier. Source: SpFDE, arXiv:2209.11204.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mest_compile.base.errors import SpecError, UnknownName
from mest_compile.ir.graph import FROZE, LAYERS, ForwardGraph, Node
from mest_compile.ir.program import PRODUCTS, Program
from mest_compile.operators.layers.family import held_cells
from mest_compile.planning.facts import Facts
from mest_compile.planning.footprint import footprint
from mest_compile.planning.trainable import block_of, blocks, matching
from mest_compile.sparsity.layer import Layer, live_cells


def parts_of(graph: ForwardGraph) -> dict[str, tuple[str, ...]]:
    """{name of a part: its parameters that train}, front to back; what is frozen already has none."""
    there, part = blocks(graph), ""
    found: dict[str, list[str]] = {}
    for name, node in graph.parameters().items():
        begins = node.op in LAYERS and node.params["weight"] == name
        if (block := block_of(name, there)) is not None:
            part = block
        elif begins or not part:
            part = node.name
        found.setdefault(part, []).append(name)
    trained = {part: tuple(name for name in names if name not in graph.frozen) for part, names in found.items()}
    return {part: names for part, names in trained.items() if names}


def named(graph: ForwardGraph, patterns: Sequence[str]) -> tuple[str, ...]:
    """The parameters that train and are meant by patterns as `trainable` has them. Raises UnknownName, UsageError."""
    able = graph.trainable()
    found = set().union(*(matching(graph, pattern, able, "freeze") for pattern in patterns))
    return tuple(name for name in able if name in found)


def frozen_meanwhile(graph: ForwardGraph) -> list[str]:
    """Names of the parameters that froze while the step trained."""
    return [name for name, why in graph.frozen.items() if why == FROZE]


def with_frozen(facts: Facts, names: Collection[str], parts: Sequence[Sequence[str]] | None = None) -> Facts:
    """The facts of the same step, of which exactly those parameters froze while it trained.

    parts  as `Facts` has them; None: as they are
    A BatchNorm of which nothing trains any longer is in evaluation mode: it normalises with the running statistics that
    it has by then, as under `trainable`. Raises SpecError where nothing would be left to train, UnknownName.
    """
    graph = thawed(facts.graph)
    trained = graph.trainable()
    if strange := [name for name in names if name not in trained]:
        raise UnknownName(f"{strange[0]} does not train, so that it cannot freeze; there are: {', '.join(trained)}")
    if not set(trained) - set(names):
        raise SpecError("nothing would be left to train; leave the classifier out of what freezes")
    chosen = set(names)

    before = graph.moving()
    behind = replace(graph, frozen={**graph.frozen, **dict.fromkeys(names, FROZE)}).moving()

    def evaluating(node: Node) -> bool:
        """A BatchNorm of which nothing trains any longer; nor before it, where it has nothing that could."""
        if node.op != "batch_norm" or node.attrs.get("evaluating"):
            return False
        mine = {node.params[role] for role in ("weight", "bias") if role in node.params}
        if not mine:
            return node.inputs[0] in before and node.inputs[0] not in behind
        return bool(mine & chosen) and mine <= chosen | graph.frozen.keys()

    nodes = tuple(
        replace(node, attrs={**node.attrs, "evaluating": FROZE}) if evaluating(node) else node for node in graph.nodes
    )
    graph = replace(graph, nodes=nodes, frozen={**graph.frozen, **dict.fromkeys(names, FROZE)})
    layers = {name: replace(layer, frozen=name in graph.frozen) for name, layer in facts.layers.items()}
    kept = facts.parts if parts is None else tuple(map(tuple, parts))
    return replace(facts, graph=graph, layers=layers, parts=kept)


def stages(facts: Facts, parts: Sequence[Sequence[str]]) -> list[Facts]:
    """The facts with none of those parts frozen beside what is, with the first, with the first two, and so on."""
    planned = {name for part in parts for name in part}
    frozen = {name for name in frozen_meanwhile(facts.graph) if name not in planned}
    found = [with_frozen(facts, frozen)]
    for part in parts:
        frozen |= set(part)
        found.append(with_frozen(facts, frozen))
    return found


def need_bytes(facts: Facts) -> int:
    """What a step needs when all that trains is at its densest; what has frozen is at its target."""
    units = {
        name: layer.scheme.live_units(layer.spec, layer.sparsity) if layer.frozen else layer.capacity
        for name, layer in facts.layers.items()
    }
    known = {name: count for name, count in units.items() if count is not None}
    return footprint(*facts.lower(), facts.layers, held_cells(facts.layers, known), facts.target)["total"]


def thawed(graph: ForwardGraph) -> ForwardGraph:
    """The graph as it was before anything froze."""

    def trains(node: Node) -> Node:
        if node.attrs.get("evaluating") != FROZE:
            return node
        return replace(node, attrs={key: value for key, value in node.attrs.items() if key != "evaluating"})

    frozen = {name: why for name, why in graph.frozen.items() if why != FROZE}
    return replace(graph, nodes=tuple(map(trains, graph.nodes)), frozen=frozen)


def operations(program: Program, layers: Mapping[str, Layer]) -> int:
    """Multiplications and additions of a training step's convolutions and linear layers, at the sparsity that they are
    compiled for: 2 * live weights * output pixels * examples a
    phase, twice that where one has both gradients."""
    return sum(
        2 * PRODUCTS[call.phase] * live_cells(layer) * layer.scheme.cell_elems(layer.spec) * _pixels(layer)
        for call in program.calls
        if call.phase in PRODUCTS and (layer := layers.get(call.layer)) is not None
    )


def seconds_of(program: Program, seconds: Mapping[tuple[Any, ...], float]) -> float:
    """What a training step takes by measured times of kernels. seconds: those of `kernel_seconds`; what it lacks counts
    as 0."""
    return sum(
        seconds.get((call.kernel, call.problem), seconds.get((call.layer, call.phase), 0.0))
        for call in program.calls
        if call.stage != "clip"
    )


def kernel_seconds(program: Program, profile: Mapping[str, float]) -> dict[tuple[Any, ...], float]:
    """Mean seconds of every (kernel, problem), and of every (layer, phase), of a program from those of its calls."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for call in program.calls:
        if call.name in profile:
            found.setdefault((call.kernel, call.problem), []).append(profile[call.name])
            if call.phase:
                found.setdefault((call.layer, call.phase), []).append(profile[call.name])
    return {kind: sum(times) / len(times) for kind, times in found.items()}


def _pixels(layer: Layer) -> int:
    """Output pixels of a batch."""
    height, width = layer.spec.output_size
    return height * width * layer.spec.input_shape[0]
