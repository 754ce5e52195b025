"""Bytes: meeting a budget, warning of too many."""

from __future__ import annotations

from dataclasses import replace

from mest_compile.base import checks
from mest_compile.base.errors import BudgetError
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import Target
from mest_compile.ir.graph import ForwardGraph
from mest_compile.lowering.fusing import fuse
from mest_compile.operators.layers.family import held_cells
from mest_compile.planning.facts import Facts
from mest_compile.planning.footprint import footprint
from mest_compile.planning.layers import log
from mest_compile.sparsity.distributions import DIGITS
from mest_compile.sparsity.room import overall_sparsity, units_at

MIB = 2**20


def recomputable(graph: ForwardGraph) -> tuple[frozenset[str], ...]:
    """Sets of nodes whose values the backward pass may compute again, each saving more memory and costing more time
    than the one before:

    batch_norm without an addition; also convolutions whose batch_norm takes in an addition, so that one activation is
    kept per convolution; also all other convolutions before a batch_norm, so that a residual block keeps its input
    only.
    """
    consumers = {node.name: [other for other in graph.nodes if node.name in other.inputs] for node in graph.nodes}
    norms = frozenset(node.name for node in graph.nodes if node.op == "batch_norm" and len(node.inputs) == 1)
    normed = {
        node.name: consumers[node.name][0]
        for node in graph.nodes
        if node.op == "conv2d" and [consumer.op for consumer in consumers[node.name]] == ["batch_norm"]
    }
    added = frozenset(name for name, norm in normed.items() if len(norm.inputs) == 2)
    return norms, norms | added, norms.union(normed)


def meet_budget(
    facts: Facts, budget_bytes: int, lower_density: bool, excess: float
) -> tuple[frozenset[str], float | None]:
    """(nodes to compute again in the backward pass, sparsity to raise all sparse layers to or None) with which the step
    needs at most `budget_bytes` when it is densest.

    excess  by how much mutations grow beyond the sparsity that the model starts with
    Raises BudgetError.
    """
    layers, target, graph = facts.layers, facts.target, fuse(facts.graph)

    def need(recomputed: frozenset[str], sparsity: float | None) -> int:
        units = room if sparsity is None else units_at(layers, round(max(0.0, sparsity - excess), DIGITS))
        train, predict = programs[recomputed]
        return footprint(train, predict, layers, held_cells(layers, units), target)["total"]

    start, room = (
        overall_sparsity(layers),
        {name: layer.capacity for name, layer in layers.items() if layer.capacity is not None},
    )
    choices = list(dict.fromkeys([usually_recomputed(graph, target), *recomputable(graph)]))
    programs = {recomputed: replace(facts, recomputed=recomputed).lower() for recomputed in choices}
    for recomputed in choices:
        if need(recomputed, None) <= budget_bytes:
            return recomputed, None
    leanest = min(choices, key=lambda choice: need(choice, None))
    if lower_density and start:
        for percent in range(int(start * 100) + 1, 100):
            if need(leanest, percent / 100) <= budget_bytes:
                log.warning(
                    "memory_budget %d bytes: sparsity raised from %.3f to %.2f", budget_bytes, start, percent / 100
                )
                return leanest, percent / 100
    least = need(leanest, 0.99 if lower_density and start else None)
    densest = f", {excess:g} denser than it starts," if excess else ""
    examples = graph.input_shape[0]
    how = f" in passes of {examples} example{'s' * (examples > 1)}" if facts.passes > 1 else ""
    advice = "model" if facts.passes == facts.batch else "batch, microbatch or model"
    raise BudgetError(
        f"memory_budget is {budget_bytes} bytes; the step{densest}{how} needs at least {least}, most of it activations "
        f"although it computes again what it can: use a smaller {advice}, or a larger budget"
    )


def usually_recomputed(graph: ForwardGraph, target: Target) -> frozenset[str]:
    """Nodes of a fused graph that the backward pass computes again whatever the budget.

    On a CPU what batch_norm gives: from its input, which the backward pass reads anyhow, that takes no longer than to
    fetch what was kept from memory (0 to 8% of a step less on a Zen 5), and needs a quarter less memory.
    """
    return recomputable(graph)[0] if backend_of(target).recomputes_norms else frozenset()


def warn_beyond_memory(need_bytes: int, target: Target, here: bool) -> None:
    """Says in the log when the step, at its densest, needs more than the smallest device that the target stands for
    has. It is no error: the device at hand may be a larger one, and what must not be exceeded is for `memory_budget`.

    here  the step is to run on this machine. Raises BudgetError when that has not as much memory.
    """
    if here:
        checks.memory(need_bytes, "the step", " or compile with a memory_budget")
    if target.memory_bytes is not None and need_bytes > target.memory_bytes:
        log.warning(
            "the step needs %.0f MiB, the smallest device of target %r has %.0f MiB: on such a one use a smaller "
            "batch or model, or memory_budget, which computes values again instead of keeping them",
            need_bytes / MIB,
            target.name,
            target.memory_bytes / MIB,
        )
