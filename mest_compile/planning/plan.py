"""From a model's graph, what it is to be compiled with, and what was measured, to what is compiled: one pass, asked by
whoever compiles, tunes, analyses or draws up tables."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mest_compile.base import checks
from mest_compile.base.errors import BudgetError, UsageError
from mest_compile.hardware.target import Target, find_target
from mest_compile.ir.graph import ForwardGraph
from mest_compile.ir.layouts.layout import ACTIVATIONS
from mest_compile.ir.program import Program
from mest_compile.lowering.fusing import fuse
from mest_compile.operators.layers.family import held_cells
from mest_compile.options import AUTO, StepOptions
from mest_compile.planning.facts import Facts
from mest_compile.planning.footprint import footprint, told_spared
from mest_compile.planning.layers import plan_layers
from mest_compile.planning.layout import choose_sections, choose_vector, widened, with_slices
from mest_compile.planning.memory import meet_budget, usually_recomputed
from mest_compile.planning.trainable import choose_trainable
from mest_compile.records.log import Records
from mest_compile.sparsity.distributions import DIGITS, rescaled
from mest_compile.sparsity.layer import Layer
from mest_compile.sparsity.room import masked_layers, overall_sparsity, with_all, with_room

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is compiled: layers, layout, what is computed again, capacity, and the kernel calls that follow from them.

    facts    what decides the step, which checkpoints and artifacts hold
    records  of the target, what its kernels' knobs are chosen by
    chosen   how an update budget chose what trains, ready for JSON; None: none did
    spared   what a memory budget was met by, {"microbatch": bytes, "recomputing": bytes} less; None: there was none
    """

    facts: Facts
    records: Records
    chosen: Mapping[str, Any] | None = None
    spared: Mapping[str, int] | None = None

    @property
    def target(self) -> Target:
        """With the vector width of this step."""
        return self.facts.target

    @property
    def layers(self) -> Mapping[str, Layer]:
        """{weight name: Layer}."""
        return self.facts.layers

    @cached_property
    def programs(self) -> tuple[Program, Program]:
        """(training step, prediction)."""
        return self.facts.lower()

    @property
    def train(self) -> Program:
        return self.programs[0]

    def memory(self) -> dict[str, int]:
        """{kind: bytes, "total": bytes} of the step at its densest, and what a memory budget was met by
        (`told_spared`)."""
        room = {name: layer.capacity for name, layer in self.layers.items() if layer.capacity is not None}
        found = footprint(*self.programs, self.layers, held_cells(self.layers, room), self.target)
        return found | told_spared(self.spared)


def plan_step(
    graph: ForwardGraph,
    options: StepOptions,
    records: Callable[[Target], Records] = Records,
    vector: int | None = None,
) -> Plan:
    """The plan of a step of `graph`, as imported, whatever its update budget: who has data chooses by that
    (`budgeting`).

    records  those of a target that vector width and sections are chosen by; default: none
    vector   examples of a slice, whatever the records say; None: as they say
    Raises SparsityError, SpecError, UnknownName, UsageError, TargetError, BudgetError.
    """
    batch, budget = graph.input_shape[0], options.memory_budget
    if options.activations == AUTO:
        raise UsageError(
            f"activations {AUTO!r} is decided where a step is compiled: by mest.compile, train, build, plan, bench, "
            f"table and tune; here give one of {', '.join(ACTIVATIONS)}"
        )
    if options.microbatch == AUTO:
        return _plan_largest(graph, options, records, vector)
    examples = batch if options.microbatch is None else int(options.microbatch)
    if batch % examples:
        raise UsageError(
            f"microbatch is {examples}, and a batch of {batch} is no multiple of it; give one of "
            f"{', '.join(map(str, divisors(batch)))}, or another batch"
        )
    plan = _plan_passes(graph, examples, options, records, vector)
    return plan if budget is None else replace(plan, spared=_spared(plan))


def divisors(batch: int) -> list[int]:
    """Ascending."""
    return [examples for examples in range(1, batch + 1) if batch % examples == 0]


def _plan_largest(
    graph: ForwardGraph, options: StepOptions, records: Callable[[Target], Records], vector: int | None
) -> Plan:
    """The plan of the largest passes that fit into the memory budget. What fits is looked for by halves: passes of more
    examples need no less. Raises BudgetError."""
    sizes = divisors(graph.input_shape[0])
    found: Plan | None = None
    fits, fails = 0, len(sizes)  # how many of the smallest sizes are known to fit, and the first known not to
    strict = replace(options, lower_density=False)
    while fits < fails:
        middle = (fits + fails) // 2
        try:
            found, fits = _plan_passes(graph, sizes[middle], strict, records, vector), middle + 1
        except BudgetError:
            fails = middle
    if found is None:
        found = _plan_passes(graph, sizes[0], options, records, vector)
    return replace(found, spared=_spared(found))


def _spared(plan: Plan) -> dict[str, int]:
    """How many bytes passes and computing again spare, beside one pass that computes again what it does anyhow."""
    facts = plan.facts
    kept = replace(facts, recomputed=usually_recomputed(fuse(facts.graph), facts.target))
    whole = replace(kept.with_batch(facts.batch), passes=1)
    in_one, in_passes = (Plan(one, plan.records).memory()["total"] for one in (whole, kept))
    return {"microbatch": in_one - in_passes, "recomputing": in_passes - plan.memory()["total"]}


def _plan_passes(
    graph: ForwardGraph,
    examples: int,
    options: StepOptions,
    records: Callable[[Target], Records],
    vector: int | None,
) -> Plan:
    """The plan of a step that makes passes of so many examples. Raises as `plan_step` does."""
    batch, graph = graph.input_shape[0], graph.with_batch(examples)
    target = find_target(options.target).storing(options.activations).for_batch(examples)
    if options.activations == "bfloat16" and not target.pairs:
        log.warning(
            "target %r has no products of pairs of bfloat16 (AVX512-BF16): activations take half the bytes, and are "
            "computed with in float32",
            target.name,
        )
    graph = choose_trainable(graph, options.trainable)
    found, sliced = records(target), with_slices(graph, target, options.activations)
    layers = plan_layers(graph, options, sliced)
    wide = choose_vector(layers, target, found) if vector is None else widened(target, vector)
    if wide != target:
        target, found = wide, found.for_target(wide)
        sliced = with_slices(graph, target, options.activations)
        layers = plan_layers(graph, options, sliced)
    target = sliced
    facts = Facts(
        graph,
        choose_sections(layers, target, found, options.activations),
        usually_recomputed(fuse(graph), target),
        options.optimizer,
        target,
        options.threads or target.cores,
        options.seed,
        options.loss,
        options.activations,
        passes=batch // examples,
    )
    if options.grow_to is not None or options.memory_budget is not None or options.dense_start:
        facts = _with_room(facts, options, found)
    return Plan(facts, found)


def _with_room(facts: Facts, options: StepOptions, records: Records) -> Facts:
    """With the capacity that mutations need, and what the memory budget asks for."""
    start = overall_sparsity(facts.layers)
    grow_to = start if options.grow_to is None else options.grow_to
    layers = with_all(facts.layers) if options.dense_start else with_room(facts.layers, grow_to)
    facts = replace(facts, layers=layers)
    if options.memory_budget is None:
        return facts
    excess = start - grow_to
    recomputed, raised = meet_budget(
        facts, checks.size("memory_budget", options.memory_budget), options.lower_density, excess
    )
    if raised is not None:
        sparser = replace(options, sparsity=_raised(options, facts.layers, raised))
        layers = plan_layers(facts.graph, sparser, facts.target)
        layers = choose_sections(layers, facts.target, records, options.activations)
        facts = replace(facts, layers=with_room(layers, max(0.0, round(overall_sparsity(layers) - excess, DIGITS))))
    return replace(facts, recomputed=recomputed)


def _raised(options: StepOptions, layers: Mapping[str, Layer], overall: float) -> float | dict[str, float]:
    """What `sparsity` is when all sparse layers together have `overall`."""
    if not isinstance(options.sparsity, Mapping):
        return overall
    sparse = masked_layers(layers)
    share = {name: layer.sparsity for name, layer in sparse.items()}
    return rescaled(share, {name: layer.spec.weight_elems for name, layer in sparse.items()}, overall)
