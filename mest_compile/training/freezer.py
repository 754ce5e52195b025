"""What of a run freezes when: decided once, when the run begins, and kept in its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np

from mest_compile.base.errors import DeviceError, UsageError
from mest_compile.training.epoch import FREEZE
from mest_compile.training.freezing import schedule
from mest_compile.training.recipe import Recipe
from mest_compile.training.sieve import SieveRule


@dataclass(frozen=True, slots=True)
class Freeze:
    """What freezes before one epoch.

    epoch    from 0
    parts    name of a part -> its parameters
    saved    share of a step that freezing saves from then on, of what the rule tells
    weights  share of the model's parameters that train at the beginning and are frozen from then on
    """

    epoch: int
    parts: Mapping[str, Sequence[str]]
    saved: float
    weights: float

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return [name for part in self.parts.values() for name in part]


class Freezer:
    """Freezes a run's step. Without freezes it does nothing.

    freezes  in order
    of       what shares of a step are of
    """

    def __init__(self, freezes: Sequence[Freeze] = (), of: str = "flops"):
        self.freezes, self.of = tuple(freezes), of

    @classmethod
    def of_run(cls, recipe: Recipe, step: Any, profile: Callable[[], Mapping[str, float]] | None = None) -> Freezer:
        """What a resolved recipe freezes of a step. profile: measures the step's kernels; None: there is nothing to
        measure with, and what times decide is not decided yet. Raises UsageError where it cannot save what it is to."""
        rule = recipe.freeze
        if rule is None or (rule.of == "time" and profile is None):
            return cls()
        found = step.freezing_parts()
        *most, last = found.items()
        if not most:
            raise UsageError(
                f"nothing could freeze: {last[0]} is the only part of the model that trains; leave freeze out"
            )
        when, names = recipe.freezing_epochs(), [part for _, part in most]
        costs = step.freezing_costs(names, _profiled(profile) if profile else None)
        weights = [_weight(recipe.sieve, epoch, recipe.epochs) for epoch in range(recipe.epochs)]
        shapes = step.graph.state_shapes
        elems = [sum(int(np.prod(shapes[name])) for name in part) for part in found.values()]
        freezes, before = [], 0
        for epoch, depth in schedule(costs, weights, when, rule.share):
            saved, frozen = 1 - costs[depth] / costs[0], sum(elems[:depth]) / sum(elems)
            freezes.append(Freeze(epoch, dict(most[before:depth]), saved, frozen))
            before = depth
        return cls(freezes, rule.of)

    @classmethod
    def from_json(cls, document: Mapping[str, Any] | None) -> Freezer | None:
        """What `to_json` told of; None of a run that freezes nothing."""
        return None if document is None else cls([Freeze(**one) for one in document["freezes"]], document["of"])

    def to_json(self) -> dict[str, Any]:
        return {"of": self.of, "freezes": [asdict(one) for one in self.freezes]}

    def __bool__(self) -> bool:
        return bool(self.freezes)

    def prepare(self, step: Any) -> None:
        """Gives what freezes learning rates of its own; kernels are compiled ahead."""
        if self:
            step.plan_freezing([one.names for one in self.freezes])

    def rates(self, recipe: Recipe, epoch: int, iteration: int, iterations: int) -> Any:
        """`lr` of a call of the step, as `Recipe.lr_at` tells it."""
        rate = recipe.lr_at(epoch, iteration, iterations)
        if not self:
            return rate
        return [*(recipe.lr_at(epoch, iteration, iterations, one.epoch) for one in self.freezes), rate]

    def freeze(self, step: Any, recipe: Recipe, epoch: int) -> dict[str, Any] | None:
        """Freezes what does before an epoch (from 0), and says how much is frozen in it, ready for JSON. Layers that
        are denser than the target are pruned to it first, by importance: they will not mutate again."""
        if not self:
            return None
        now = next((one for one in self.freezes if one.epoch == epoch), None)
        began = perf_counter()
        if now is not None:
            target = recipe.phases[-1].grow_to if recipe.phases else None
            rng = np.random.default_rng([recipe.seed, epoch, FREEZE])
            step.freeze(now.names, target, recipe.importance_lambda, rng)
        done = [one for one in self.freezes if one.epoch <= epoch]
        return {
            "now": [] if now is None else list(now.parts),
            "parts": sum(len(one.parts) for one in done),
            "saved": done[-1].saved if done else 0.0,
            "weights": done[-1].weights if done else 0.0,
            "seconds": 0.0 if now is None else perf_counter() - began,
        }

    def settle(self, step: Any, recipe: Recipe, epoch: int) -> float:
        """After the mutation before an epoch (from 0): what freezes at the next one has the target's sparsity from then
        on, so that it trains an interval at the masks that it keeps, and its BatchNorms' running statistics are of
        them. Gives the seconds that it took."""
        after = next((later for later in range(epoch + 1, recipe.epochs) if recipe.mutation_at(later)), None)
        names = [name for one in self.freezes if one.epoch == after for name in one.names]
        if not names:
            return 0.0
        rng = np.random.default_rng([recipe.seed, epoch, FREEZE])
        report = step.settle(names, recipe.phases[-1].grow_to, recipe.importance_lambda, rng)
        return report.seconds

    def about(self) -> list[str]:
        """A line on what will freeze, if anything does."""
        if not self:
            return []
        count, epochs = sum(len(one.parts) for one in self.freezes), ", ".join(str(one.epoch) for one in self.freezes)
        last = self.freezes[-1]
        return [
            f"{count} parts freeze, after epoch {epochs}; a step is {last.saved:.0%} of {self.of} shorter in the end"
        ]


def _profiled(profile: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
    try:
        return profile()
    except DeviceError as problem:
        raise UsageError(f'the freezing\'s of is "time", and {problem}; give of = "flops"') from problem


def _weight(sieve: SieveRule | None, epoch: int, epochs: int) -> float:
    """Steps of an epoch beside those of one over all examples, as far as that is known before."""
    if sieve is None or sieve.drop is None or epoch < sieve.first(epochs):
        return 1.0
    return 1.0 - sieve.drop
