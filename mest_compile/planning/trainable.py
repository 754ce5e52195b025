"""Which parameters train, where the caller says so.

A *block*, as in "last:3", is a numbered part of the model that holds several convolutions or linear layers, such as
"layer3.1" or "blocks.12"; of such parts within each other it is the innermost. In a model where none holds several,
each numbered part that holds one is a block. "last:3" are the last three of them in the order in which the forward pass
uses them, and what comes after the first of these and is in no block: the classifier, the last normalisation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from mest_compile.base.errors import SpecError, UnknownName, UsageError
from mest_compile.ir.graph import CHOSEN, FLAG, LAYERS, ForwardGraph, Node
from mest_compile.planning.patterns import near

LAST = "last:"


def choose_trainable(graph: ForwardGraph, trainable: Sequence[str] | None) -> ForwardGraph:
    """The graph in which those parameters train and the others are frozen; trainable: as StepOptions has it.

    Raises UsageError, UnknownName where a pattern names no parameter that could train, SpecError where nothing would.
    """
    if trainable is not None:
        graph = _chosen(graph, trainable)
    if graph.frozen and not graph.trainable():
        names = ", ".join(f"{name} ({why})" for name, why in list(graph.frozen.items())[:3])
        raise SpecError(
            f"nothing would train, every parameter is frozen: {names}{' ...' if len(graph.frozen) > 3 else ''}; call "
            'requires_grad_(True) on some, or say which with trainable=["head.*"]'
        )
    return graph


def blocks(graph: ForwardGraph) -> list[str]:
    """Names of the model's blocks, in the order in which the forward pass uses them."""
    layers = [node.params["weight"] for node in graph.nodes if node.op in LAYERS]
    holds: dict[str, int] = {}
    for name in layers:
        for part in _numbered(name):
            holds[part] = holds.get(part, 0) + 1
    least = 2 if any(count > 1 for count in holds.values()) else 1
    found = [next((part for part in _numbered(name) if holds[part] >= least), None) for name in layers]
    return list(dict.fromkeys(part for part in found if part is not None))


def _numbered(name: str) -> list[str]:
    """The numbered parts that a parameter lies in, the innermost first: "a.0.b.1" and "a.0" of "a.0.b.1.weight"."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in reversed(range(len(parts) - 1)) if parts[end].isdigit()]


def block_of(parameter: str, there: Collection[str]) -> str | None:
    """Which of the blocks `there` a parameter lies in."""
    return next((part for part in _numbered(parameter) if part in there), None)


def matching(graph: ForwardGraph, pattern: str, able: Sequence[str], where: str) -> set[str]:
    """The parameters among `able` that a pattern means. where: what the pattern was given as. Raises UnknownName,
    UsageError."""
    if pattern.startswith(LAST):
        return _last(graph, pattern, able, where)
    matched = {name for name in able if fnmatchcase(name, pattern)}
    if not matched:
        raise UnknownName(_no_match(graph, pattern, able, where))
    return matched


def _chosen(graph: ForwardGraph, patterns: Sequence[str]) -> ForwardGraph:
    able = [name for name in graph.parameters() if graph.frozen.get(name, FLAG) in (FLAG, CHOSEN)]
    trained = {name for pattern in patterns for name in matching(graph, pattern, able, "trainable")}
    fixed = {name: why for name, why in graph.frozen.items() if name not in able}
    frozen = {name: fixed.get(name, CHOSEN) for name in graph.parameters() if name not in trained}
    moving = replace(graph, frozen=frozen).moving()

    def stays(node: Node) -> bool:
        """A BatchNorm of which nothing trains; nor before it, where it has nothing that could."""
        mine = {node.params[role] for role in ("weight", "bias") if role in node.params}
        return node.op == "batch_norm" and not (mine & trained if mine else node.inputs[0] in moving)

    nodes = tuple(
        replace(node, attrs={**node.attrs, "evaluating": True}) if stays(node) else node for node in graph.nodes
    )
    return replace(graph, nodes=nodes, frozen=frozen)


def _last(graph: ForwardGraph, pattern: str, able: Sequence[str], where: str) -> set[str]:
    """The parameters that "last:3" means."""
    there, count = blocks(graph), pattern.removeprefix(LAST)
    if not count.isdigit() or not 1 <= int(count) <= len(there):
        has = f"the model has {len(there)} blocks: {', '.join(there)}" if there else "the model has no numbered parts"
        raise UsageError(f"{where} is {pattern!r}; wanted last: and a number from 1 to {len(there)}, {has}")
    chosen = there[-int(count) :]
    owners = graph.parameters()
    order = {node.name: place for place, node in enumerate(graph.nodes)}
    first = min(order[node.name] for name, node in owners.items() if block_of(name, there) in chosen)
    return {
        name
        for name in able
        if block_of(name, there) in chosen or (block_of(name, there) is None and order[owners[name].name] > first)
    }


def _no_match(graph: ForwardGraph, pattern: str, able: Sequence[str], where: str) -> str:
    for name, why in graph.frozen.items():
        if name not in able and fnmatchcase(name, pattern):
            return f"{where}: {pattern!r} matches {name}, {why}, which cannot train; name others"
    if any(fnmatchcase(name, pattern) for name in graph.state_shapes):
        return f"{where}: {pattern!r} matches only what the forward pass does not train with; name parameters"
    return f"{where}: no parameter matches {pattern!r}; there are, for example: {near(pattern, able)}"
