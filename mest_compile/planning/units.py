"""What an update budget chooses among: layers with what belongs to them, and how far down gradients must then flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mest_compile.ir.graph import LAYERS, STATISTICS, ForwardGraph
from mest_compile.lowering.fusing import fuse
from mest_compile.planning.memory import usually_recomputed
from mest_compile.planning.plan import Plan
from mest_compile.planning.trainable import choose_trainable

MOST_FRONTS = 512  # of a graph of very many branches; beyond them gradients end at one layer, or at two that were tried


@dataclass(frozen=True, slots=True)
class Unit:
    """A convolution or linear layer, its bias and the BatchNorm behind it; or another BatchNorm, by itself.

    name        torch path of the layer, or of that BatchNorm
    parameters  those of it that train in the full step
    moving      nodes whose value follows from them: where a gradient flows if they train
    """

    name: str
    parameters: tuple[str, ...]
    moving: frozenset[str]


@dataclass(frozen=True, slots=True)
class Front:
    """How far down gradients flow.

    lowest  the units below which none flows: they train, or it would end higher
    above   the others that gradients reach: they may train or let them pass
    """

    lowest: tuple[Unit, ...]
    above: tuple[Unit, ...]


def units_of(graph: ForwardGraph) -> list[Unit]:
    """Every unit of which something trains, in the order of the forward pass."""
    layers = {node.name: node.params["weight"] for node in graph.nodes if node.op in LAYERS}
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        owner = next(filter(None, map(layers.get, (node.name, *node.inputs[:1]))), node.params.get("weight"))
        for role, name in node.params.items():
            if role not in STATISTICS and name not in graph.frozen:
                found.setdefault((owner or name).removesuffix(".weight"), []).append(name)
    return [Unit(name, tuple(names), _moving(graph, names)) for name, names in found.items()]


def _moving(graph: ForwardGraph, names: Sequence[str]) -> frozenset[str]:
    frozen = {name: "" for name in graph.parameters() if name not in names}
    return frozenset(replace(graph, frozen=frozen).moving())


def fronts_of(units: Sequence[Unit], affordable: Callable[[Front], bool]) -> Iterator[Front]:
    """Every front that is affordable, those of few nodes first. Layers of parallel branches may be lowest together;
    a front that contains one that is not affordable is not tried.
    """
    known: dict[frozenset[str], bool] = {}

    def tried(moving: frozenset[str]) -> Iterator[Front]:
        reached = [unit for unit in units if unit.moving <= moving]
        lowest = [unit for unit in reached if not any(unit.moving < other.moving for other in reached)]
        front = Front(tuple(lowest), tuple(unit for unit in reached if unit not in lowest))
        known[moving] = affordable(front)
        if known[moving]:
            yield front

    for unit in sorted(units, key=lambda unit: len(unit.moving)):
        yield from tried(unit.moving)
    single = [moving for moving, can in known.items() if can]
    waiting = list(single)
    while waiting and len(known) < MOST_FRONTS:
        moving = waiting.pop(0)
        for other in single:
            both = moving | other
            if both not in known:
                yield from tried(both)
                if known[both]:
                    waiting.append(both)


def with_trainable(plan: Plan, names: Sequence[str]) -> Plan:
    """The plan of the same step in which those parameters alone train, its layout and sparsity as they are."""
    facts = plan.facts
    graph = choose_trainable(facts.graph, names)
    layers = {
        name: replace(layer, frozen=True, capacity=None) if name in graph.frozen else layer
        for name, layer in facts.layers.items()
    }
    recomputed = usually_recomputed(fuse(graph), facts.target)
    return replace(plan, facts=replace(facts, graph=graph, layers=layers, recomputed=recomputed))
