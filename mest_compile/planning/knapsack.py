"""Which layers train: those of the largest importance that a budget has room for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mest_compile.planning.units import Front, Unit, fronts_of

GRAINS = 10_000  # parts of a budget that costs are rounded up to: of 100 layers, 1% of it may be left over

Names = frozenset[str]
Cost = Callable[[Names], float]


def knapsack(values: Sequence[float], costs: Sequence[int], room: int) -> list[int]:
    """Places of the things of the largest total value whose costs are together at most `room`: exact, by a dynamic
    program over room. values, costs: 0 or more."""
    best = np.zeros(room + 1)
    taken = np.zeros((len(values), room + 1), bool)
    for place, (value, cost) in enumerate(zip(values, costs, strict=True)):
        if cost > room:
            continue
        with_it = best[: room + 1 - cost] + value
        taken[place, cost:] = with_it > best[cost:]
        best[cost:] = np.maximum(best[cost:], with_it)
    chosen, left = [], room
    for place in reversed(range(len(values))):
        if taken[place, left]:
            chosen.append(place)
            left -= costs[place]
    return chosen[::-1]


class Search:
    """Which units train within a budget.

    importance  {unit: 0 or more}
    cost        of a step in which those units train: what must not exceed the budget
    summed      the same but for what does not add up, where that is not the cost itself; choices are made by its sums
                and then held to `cost`
    """

    def __init__(self, units: Sequence[Unit], importance: Mapping[str, float], cost: Cost, summed: Cost | None = None):
        self.units, self.importance, self.cost = units, importance, cost
        self.summed = summed or cost
        self._whole = frozenset(unit.name for unit in units)
        self._extra: dict[str, float] = {}

    def extra(self, unit: Unit) -> float:
        """What it costs that a unit trains that gradients pass through anyhow."""
        if unit.name not in self._extra:
            spared = self.summed(self._whole) - self.summed(self._whole - {unit.name})
            self._extra[unit.name] = max(0.0, spared)
        return self._extra[unit.name]

    def least(self) -> float:
        """The cost of the cheapest step in which anything trains."""
        return min(self.cost(frozenset({unit.name})) for unit in self.units)

    def best(self, budget: float) -> Names:
        """The units of the largest importance whose step costs at most `budget`; none where no step does.

        For every front a 0/1 knapsack of the layers above, beside what the gradients' way down to its lowest layers
        and these cost; exact where costs add up, to a share of 1 / GRAINS of the budget a layer. Where they do not,
        what turns out too dear is chosen anew with as much less room, and what room is left is filled.
        Source: ours; Kwon et al., arXiv:2307.09988, choose by importance over cost alone.
        """
        if self.cost(self._whole) <= budget:
            return self._whole
        grain = budget / GRAINS
        fronts = list(fronts_of(self.units, lambda front: self.cost(_names(front.lowest)) <= budget))
        rooms = [budget - self.summed(_names(front.lowest)) for front in fronts]
        offers = [self._of_front(front, room, grain) for front, room in zip(fronts, rooms, strict=True)]
        while offers:
            place = max(range(len(offers)), key=lambda place: self._value(offers[place]))
            chosen, front = offers[place], fronts[place]
            excess = self.cost(chosen) - budget
            if excess <= 0:
                return self._filled(chosen, front, budget)
            if chosen == _names(front.lowest):
                del offers[place], fronts[place], rooms[place]
                continue
            used = sum(self.extra(unit) for unit in front.above if unit.name in chosen)
            rooms[place] = min(rooms[place], used) - max(excess, grain)
            offers[place] = self._of_front(front, rooms[place], grain)
        return frozenset()

    def _of_front(self, front: Front, room: float, grain: float) -> Names:
        """The units that train if gradients end there; its lowest ones alone where there is no room for others."""
        grains = int(max(0.0, room) / grain + 1e-6)
        costs = [int(np.ceil(self.extra(unit) / grain - 1e-6)) for unit in front.above]
        picked = knapsack([self.importance[unit.name] for unit in front.above], costs, grains) if room >= 0 else []
        return _names([*front.lowest, *(front.above[place] for place in picked)])

    def _filled(self, chosen: Names, front: Front, budget: float) -> Names:
        for unit in sorted(front.above, key=lambda unit: -self.importance[unit.name]):
            if unit.name not in chosen and self.cost(chosen | {unit.name}) <= budget:
                chosen |= {unit.name}
        return chosen

    def _value(self, chosen: Names) -> float:
        return sum(self.importance[name] for name in chosen)


def _names(units: Sequence[Unit]) -> Names:
    return frozenset(unit.name for unit in units)
