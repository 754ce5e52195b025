"""A step's facts for another device or batch: what a user decided stays, what the device decided is decided again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mest_compile.base import checks
from mest_compile.base.errors import UsageError
from mest_compile.hardware.target import Target
from mest_compile.lowering.fusing import fuse
from mest_compile.operators.layers.family import family_for
from mest_compile.options import check_activations
from mest_compile.planning.facts import Facts
from mest_compile.planning.freezing import thawed
from mest_compile.planning.layout import choose_sections, choose_vector, with_slices
from mest_compile.planning.memory import usually_recomputed
from mest_compile.planning.plan import Plan, divisors
from mest_compile.records.log import Records
from mest_compile.sparsity.layer import Layer


def retargeted(facts: Facts, target: Target, batch: int, records: Callable[[Target], Records] = Records.of) -> Plan:
    """The plan of the same model, schemes, sparsities, capacities and optimizer for `target` and steps of `batch`
    examples. threads: as they were, on another target its cores. Raises UsageError, TargetError.
    """
    batch = checks.whole("batch", batch, 1)
    check_activations(facts.activations, target)
    examples = facts.graph.input_shape[0] if facts.passes > 1 else batch
    if batch % examples:
        raise UsageError(f"batch is {batch}, and the step makes passes of {examples} examples; wanted a multiple")
    target = replace(target.storing(facts.activations), examples=None).for_batch(examples)
    facts = replace(facts.with_batch(examples), passes=batch // examples)
    found = records(target)

    def planned(target: Target) -> dict[str, Layer]:
        layers = {}
        for name, layer in facts.layers.items():
            layers[name] = replace(layer, kernels=family_for(layer.scheme, layer.spec, target))
        return layers

    if (tuned := choose_vector(planned(target), target, found)) != target:
        target, found = tuned, found.for_target(tuned)
    target = with_slices(facts.graph, target, facts.activations)
    # Decided when nothing had frozen; not as usual where a memory budget asked for more.
    usual = facts.recomputed == usually_recomputed(fuse(thawed(facts.graph)), facts.target)
    recomputed = usually_recomputed(fuse(thawed(facts.graph)), target) if usual else facts.recomputed
    layers = choose_sections(planned(target), target, found, facts.activations)
    threads = facts.threads if target.name == facts.target.name else target.cores
    return Plan(replace(facts, layers=layers, recomputed=recomputed, target=target, threads=threads), found)


def bytes_by_microbatch(facts: Facts) -> dict[int, int]:
    """{examples of a pass: bytes that a step of those facts needs at its densest if it makes such passes}, most
    first."""
    found = {}
    for examples in reversed(divisors(facts.batch)):
        plan = retargeted(replace(facts, passes=1), facts.target, examples, Records)
        in_passes = replace(plan.facts, passes=facts.batch // examples)
        found[examples] = replace(plan, facts=in_passes).memory()["total"]
    return found


def with_batch(plan: Plan, batch: int) -> Plan:
    """The plan of steps of `batch` examples, else as it is, the layout too."""
    return replace(plan, facts=plan.facts.with_batch(batch))
