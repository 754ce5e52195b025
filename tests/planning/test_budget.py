"""What an update budget chooses: exact where costs add up, within the budget where they do not."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from lib.nets import short_resnet
from torch import nn

from mest_compile.frontend import from_torch
from mest_compile.options import StepOptions, read_budget
from mest_compile.planning.knapsack import Search, knapsack
from mest_compile.planning.plan import plan_step
from mest_compile.planning.prices import CountedPrices, MeasuredPrices, call_bytes, calls_of
from mest_compile.planning.retargeting import with_batch
from mest_compile.planning.units import fronts_of, units_of, with_trainable

SHAPE = (16, 3, 8, 8)
OPTIONS = StepOptions(sparsity=0.75, threads=1)


@pytest.fixture(scope="module")
def graph():
    return from_torch(short_resnet(SHAPE), SHAPE)[0]


@pytest.fixture(scope="module")
def plan(graph):
    return plan_step(graph, OPTIONS)


@pytest.fixture(scope="module")
def units(graph):
    return units_of(graph)


def subsets(things):
    return [frozenset(some) for count in range(1, len(things) + 1) for some in combinations(things, count)]


def test_the_knapsack_is_exact():
    rng = np.random.default_rng(0)
    for _ in range(50):
        count, room = int(rng.integers(0, 9)), int(rng.integers(0, 30))
        values, costs = rng.random(count), rng.integers(0, 12, count).tolist()
        chosen = knapsack(values, costs, room)
        assert sum(costs[place] for place in chosen) <= room
        best = max(
            (sum(values[list(some)]) for some in subsets(range(count)) if sum(costs[one] for one in some) <= room),
            default=0,
        )
        assert sum(values[chosen]) == pytest.approx(best)


def test_a_layer_has_its_bias_and_its_norm(units):
    named = {unit.name: unit.parameters for unit in units}
    assert named["layer2.0.conv1"] == ("layer2.0.conv1.weight", "layer2.0.bn1.weight", "layer2.0.bn1.bias")
    assert named["fc"] == ("fc.weight", "fc.bias") and "bn1" not in named
    assert units[0].name == "conv1" and units[0].moving > units[1].moving


def test_a_norm_of_no_layer_stands_alone_and_what_is_frozen_is_in_no_unit():
    module = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 4))
    module[1].weight.requires_grad_(False)
    module[2].requires_grad_(False)
    named = {unit.name: unit.parameters for unit in units_of(from_torch(module, (4, 8))[0])}
    assert named == {"0": ("0.weight", "0.bias"), "1": ("1.bias",)}


def test_every_way_down_that_gradients_can_take_is_a_front(units):
    fronts = list(fronts_of(units, lambda front: True))
    ways = {frozenset().union(*(unit.moving for unit in some)) for some in subsets(units)}
    found = [frozenset().union(*(unit.moving for unit in front.lowest)) for front in fronts]
    assert len(found) == len(set(found)) and set(found) == ways
    assert any({unit.name for unit in front.lowest} == {"layer2.0.conv2", "layer2.0.downsample.0"} for front in fronts)
    for front in fronts:
        below = {unit.name for unit in units} - {unit.name for unit in front.lowest + front.above}
        assert all(unit.moving - fronts_moving(front) for unit in units if unit.name in below)


def fronts_moving(front):
    return frozenset().union(*(unit.moving for unit in front.lowest))


def added(units, seed):
    """(importances, a cost that adds up: a forward pass, what gradients pass through, what trains)."""
    rng = np.random.default_rng(seed)
    nodes = sorted({node for unit in units for node in unit.moving})
    passing = dict(zip(nodes, rng.integers(1, 10, len(nodes)).tolist(), strict=True))
    own = {unit.name: int(rng.integers(0, 12)) for unit in units}
    moving = {unit.name: unit.moving for unit in units}

    def cost(names):
        through = frozenset().union(*(moving[name] for name in names))
        return 40 + sum(passing[node] for node in through) + sum(own[name] for name in names)

    return dict(zip(own, rng.random(len(own)).tolist(), strict=True)), cost


@pytest.mark.parametrize("seed", range(3))
def test_what_is_chosen_is_the_best_of_all_subsets(units, seed):
    importance, cost = added(units, seed)
    costs = {names: cost(names) for names in subsets([unit.name for unit in units])}
    gains = {names: sum(importance[name] for name in names) for names in costs}
    search = Search(units, importance, cost)
    assert search.least() == min(costs.values())
    for budget in np.linspace(min(costs.values()), max(costs.values()), 8):
        budget = int(budget) + 0.5  # costs are whole: none is within rounding of it
        chosen = search.best(budget)
        assert costs[chosen] <= budget
        assert gains[chosen] == pytest.approx(max(gains[names] for names, one in costs.items() if one <= budget))
    assert search.best(min(costs.values()) - 0.5) == frozenset()


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_holds_where_costs_do_not_add_up(units, seed):
    importance, summed = added(units, seed)

    def cost(names):
        return summed(names) + 3 * len(names) + (25 if {"fc", "layer3.0.conv2"} <= names else 0)

    search = Search(units, importance, cost, summed)
    whole = frozenset(unit.name for unit in units)
    for budget in np.linspace(search.least(), cost(whole) - 1, 6):
        chosen = search.best(budget)
        assert chosen and cost(chosen) <= budget
        front = next(one for one in fronts_of(units, lambda _: True) if {unit.name for unit in one.lowest} <= chosen)
        reached = {unit.name for unit in front.above if fronts_moving(front) >= unit.moving}
        moving = frozenset().union(*(unit.moving for unit in units if unit.name in chosen))
        if moving == fronts_moving(front):  # no room is left for any other
            assert all(cost(chosen | {name}) > budget for name in reached - chosen)


def test_a_plan_with_other_layers_training_is_that_of_patterns(graph, plan):
    names = ["layer3.0.conv2.weight", "layer3.0.bn2.weight", "layer3.0.bn2.bias", "fc.weight"]
    room = plan_step(graph, StepOptions(sparsity=0.75, threads=1, grow_to=0.5))
    for mine, options in (plan, OPTIONS), (room, StepOptions(sparsity=0.75, threads=1, grow_to=0.5)):
        theirs = plan_step(graph, StepOptions(**{**vars_of(options), "trainable": names}))
        mine = with_trainable(mine, names)
        assert mine.facts.to_json() == theirs.facts.to_json() and mine.memory() == theirs.memory()


def vars_of(options):
    return {name: getattr(options, name) for name in type(options).__dataclass_fields__}


def test_measured_prices_are_the_times_and_what_was_not_timed_is_like_what_was(plan):
    prices, seconds = MeasuredPrices(), {call.name: 1.0 + place for place, call in enumerate(calls_of(plan))}
    prices.learn(plan, seconds)
    assert prices.of(plan) == pytest.approx(sum(seconds.values()))
    part = with_trainable(plan, ["fc.*"])
    timed = {(call.kernel, call.problem, call.buffers[0].name): prices.known(call, plan) for call in calls_of(plan)}
    keyed = [(call, (call.kernel, call.problem, call.buffers[0].name)) for call in calls_of(part)]
    new = [call for call, key in keyed if key not in timed]
    seen = set()
    for call in new:
        like = next((one for one in calls_of(plan) if (one.name, one.kernel) == (call.name, call.kernel)), None)
        if like is not None:  # the same convolution, which now ends with what was a BatchNorm
            in_proportion = call_bytes(call, part) / call_bytes(like, plan)
            assert prices.known(call, part) == pytest.approx(prices.known(like, plan) * in_proportion)
            seen.add(call.phase)
        else:
            assert prices.known(call, part) > 0
    assert seen == {"forward"}
    prices.learn(part, dict.fromkeys((call.name for call in calls_of(part)), 0.5))
    assert prices.of(part) == pytest.approx(sum(timed.get(key, 0.5) for _, key in keyed))


def test_counted_prices_fall_with_what_trains_and_rise_with_the_batch(plan, units):
    prices = CountedPrices()
    alone = [prices.of(with_trainable(plan, unit.parameters)) for unit in units]
    assert prices.of(plan) > alone[0] > alone[1] > alone[-1]
    assert prices.of(with_batch(plan, 32)) == pytest.approx(2 * prices.of(plan), rel=0.05)  # updates are once a step


def test_bytes_of_every_choice_are_the_planners(plan, units):
    """The sums that choices are made by stay below what the step needs."""
    of = cache(
        lambda names: with_trainable(plan, [one for unit in units if unit.name in names for one in unit.parameters])
    )
    search = Search(
        units,
        dict.fromkeys((unit.name for unit in units), 1.0),
        lambda names: of(names).memory()["total"],
        lambda names: sum(of(names).memory()[kind] for kind in ("gradients", "optimizer", "activations")),
    )
    budget = (search.least() + plan.memory()["total"]) / 2
    chosen = search.best(budget)
    assert 1 < len(chosen) < len(units) and of(chosen).memory()["total"] <= budget


@pytest.mark.parametrize(
    ("said", "read"),
    [(0.5, 0.5), ("0.5", 0.5), (1, 1.0), ("24MiB", 24 * 2**20), ("1.5 kB", 1500), ("300000", 300_000), (2, 2)],
)
def test_a_budget_is_a_share_or_bytes(said, read):
    found = read_budget(said)
    assert found == read and isinstance(found, type(read)) and StepOptions(update_budget=said).update_budget == read
