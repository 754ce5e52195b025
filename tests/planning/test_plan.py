"""One pass from graph, options and records to what is compiled."""

import re
from dataclasses import replace

import pytest
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import BudgetError
from mest_compile.compiling import compile_step
from mest_compile.frontend import from_torch, import_model
from mest_compile.hardware.target import find_target
from mest_compile.models.catalog import build_model
from mest_compile.options import StepOptions
from mest_compile.planning.layout import step_facts
from mest_compile.planning.plan import plan_step
from mest_compile.records.log import FixedRecords, Records, key_of
from mest_compile.records.record import STEP
from mest_compile.sparsity.room import overall_sparsity

SHAPE = (8, 3, 8, 8)


@pytest.fixture(scope="module")
def graph():
    return import_model(build_model("resnet20", SHAPE, 10, 8), SHAPE)[0]


@pytest.mark.parametrize(
    "options",
    [
        StepOptions(threads=1, seed=3, grow_to=0.8),
        StepOptions("pattern", 0.8, optimizer=mest.AdamW(), loss=mest.CrossEntropy(0.1)),
        StepOptions("unstructured", target="cortex-a76", activations="float32", memory_budget=10**7),
    ],
    ids=["room", "pattern", "elsewhere"],
)
def test_what_is_planned_is_what_is_compiled(options, graph, builder):
    plan = plan_step(graph, options)
    records = Records(find_target(options.target))
    step = compile_step(build_model("resnet20", SHAPE, 10, 8), SHAPE, options, builder=builder, records=records)
    assert step._compiled.facts == plan.facts
    assert [(call.name, call.problem) for call in step.program.calls] == [
        (call.name, call.problem) for call in plan.train.calls
    ]
    assert plan.memory() == step.memory(at_capacity=True)


def test_a_plan_has_the_width_that_is_told_else_the_one_on_record(graph):
    usual = plan_step(graph, StepOptions(target="avx2"))
    assert usual.target == find_target("avx2") == usual.records.target
    told = plan_step(graph, StepOptions(target="avx2"), vector=4)
    assert told.target.vector == 4 == told.records.target.vector and told.facts != usual.facts
    fastest = {key_of(STEP, step_facts(usual.layers), 0): {"vector": 4}}
    assert (
        plan_step(graph, StepOptions(target="avx2"), lambda target: FixedRecords(target, fastest)).facts == told.facts
    )


@pytest.mark.parametrize(("batch", "examples"), [(1, 1), (6, 2), (8, None), (9, None), (12, 4), (44, None)])
def test_slices_hold_half_a_vector_where_many_lanes_would_be_empty(batch, examples, graph):
    """Of 44 examples in slices of 8 it is 4 lanes; 9 are no multiple of 4."""
    assert plan_step(graph.with_batch(batch), StepOptions(target="avx2")).target.examples == examples


def test_nets_whose_kernels_take_a_pixel_at_a_time_have_whole_vectors():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 4))
    graph, _ = from_torch(model, (12, 3, 8, 8))
    assert plan_step(graph, StepOptions(target="avx2")).target.examples is None
    assert plan_step(graph.with_batch(4), StepOptions(target="avx2")).target.examples == 4


def least_bytes(graph, options):
    """That a step may have whose sparsity is not raised."""
    with pytest.raises(BudgetError) as caught:
        plan_step(graph, replace(options, memory_budget=1))
    return int(re.search(r"at least (\d+)", str(caught.value))[1])


def test_a_budget_takes_the_largest_passes_that_fit_and_says_what_they_spare(graph):
    options, graph = StepOptions("unstructured", 0.9), graph.with_batch(32)
    needs = {size: plan_step(graph, replace(options, microbatch=size)).memory()["total"] for size in (32, 8)}
    least = {size: least_bytes(graph, replace(options, microbatch=size)) for size in (32, 8)}
    auto = replace(options, microbatch="auto", memory_budget=least[32])
    assert plan_step(graph, auto).facts.passes == 1  # what is computed again suffices
    plan = plan_step(graph, replace(auto, memory_budget=least[8]))
    memory, examples = plan.memory(), 32 // plan.facts.passes
    assert memory["total"] <= least[8] < needs[8] < needs[32] and examples >= 8
    with pytest.raises(BudgetError):
        plan_step(graph, replace(options, microbatch=2 * examples, memory_budget=least[8]))
    assert memory["spared_by_microbatch"] > 0 and memory["spared_by_recomputing"] > 0
    whole = memory["total"] + memory["spared_by_microbatch"] + memory["spared_by_recomputing"]
    assert whole == pytest.approx(needs[32], rel=0.01)  # but for the layout, which suits the examples of a pass
    with pytest.raises(BudgetError, match=r"in passes of 1 example needs at least .* use a smaller model"):
        plan_step(graph, replace(auto, memory_budget=1))


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_a_budget_raises_one_sparsity_as_if_it_had_been_asked_for(graph, distribution):
    options = StepOptions("unstructured", 0.3, distribution)
    lean = least_bytes(graph, options) - 20_000
    raised = plan_step(graph, replace(options, memory_budget=lean, lower_density=True))
    overall = overall_sparsity(raised.layers)
    assert overall > 0.3 and raised.memory()["total"] <= lean
    asked = plan_step(graph, replace(options, sparsity=overall))
    assert {name: layer.sparsity for name, layer in raised.layers.items()} == pytest.approx(
        {name: layer.sparsity for name, layer in asked.layers.items()}
    )


def test_a_budget_raises_the_sparsity_of_named_layers_in_proportion_and_of_no_other(graph):
    said = {"layer3.0.conv2": 0.4, "layer3.1.conv1": 0.2}
    options = StepOptions("unstructured", said)
    lean = least_bytes(graph, options) - 20_000
    leanest = plan_step(graph, replace(options, memory_budget=lean, lower_density=True))
    sparse = {name: layer.sparsity for name, layer in leanest.layers.items() if layer.sparsity}
    assert sparse.keys() == {f"{name}.weight" for name in said}
    assert all(sparse[f"{name}.weight"] > before for name, before in said.items())
    assert (1 - sparse["layer3.0.conv2.weight"]) / (1 - sparse["layer3.1.conv1.weight"]) == pytest.approx(0.6 / 0.8)
