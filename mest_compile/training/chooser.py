"""What of a run trains within a budget: chosen when the run begins, and again before every mutation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import numpy as np

from mest_compile.base.errors import UsageError
from mest_compile.training.epoch import CHOICE
from mest_compile.training.recipe import Recipe

log = logging.getLogger(__name__)


class Chooser:
    """Lets a step train what is worth most within the recipe's budget. Without a budget it does nothing.

    told  of the last choice, ready for JSON: layers that train, "since" which epoch (from 1), and what `Choice` says;
          None: there was none
    """

    def __init__(self, recipe: Recipe, step: Any):
        """Raises UsageError for a step that cannot be chosen for."""
        self.told: Mapping[str, Any] | None = None
        self._recipe = recipe
        if recipe.budget_at_mutations is None:
            return
        if step.describe().get("update_budget") is not None:
            raise UsageError(
                "the step was compiled with an update_budget, and the recipe has budget_at_mutations; leave one of the "
                "two out"
            )
        step.whole()  # refuses where there is no compiler

    def choose(self, step: Any, epoch: int, batch: Callable[[np.random.Generator], Any]) -> bool:
        """Before an epoch (from 0), where it is one to choose before; whether it was. It comes before the epoch's
        mutation, so that the masks of what trains from then on mutate, and before the checkpoint is written, so that a
        run which goes on from it has the same choice. What stops training is pruned to the target, by importance.

        batch  draws one of the training set
        """
        recipe = self._recipe
        if recipe.budget_at_mutations is None or (epoch and not recipe.mutation_at(epoch)):
            return False
        from mest_compile.budgeting import BATCHES  # what a device trains an artifact with imports no compiler
        from mest_compile.choosing import choose_again

        began = perf_counter()
        batches = [batch(np.random.default_rng([recipe.seed, epoch, CHOICE, number])) for number in range(BATCHES)]
        choice = choose_again(step, recipe.budget_at_mutations, batches)
        target = recipe.phases[-1].grow_to
        rng = np.random.default_rng([recipe.seed, epoch, CHOICE])
        step.train_only(choice.trainable, target, recipe.importance_lambda, rng)
        layers = [unit.name for unit in choice.units if unit.chosen]
        self.told = {
            "since": epoch + 1,
            "layers": layers,
            "of": len(choice.units),
            "costs": choice.costs,
            "predicted": choice.predicted,
            "measured": choice.measured,
            "importance": {unit.name: unit.importance for unit in choice.units},
            "seconds": perf_counter() - began,
        }
        log.info("from epoch %d on %d of %d layers train: %s", epoch + 1, len(layers), len(choice.units), layers)
        return True
