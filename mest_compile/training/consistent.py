"""Whether the parts of a recipe (`recipe.Recipe`) fit each other: asked when one is made."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from mest_compile.base import checks
from mest_compile.base.errors import SparsityError, UnknownName, UsageError
from mest_compile.base.names import meant
from mest_compile.options import read_budget
from mest_compile.sparsity.mutation import Phase
from mest_compile.training.freezing import FreezeRule
from mest_compile.training.methods import GRADUAL, METHODS
from mest_compile.training.sieve import SieveRule

# name -> (shifts images, mirrors them)
AUGMENTATIONS = {
    "none": (False, False),
    "shift": (True, False),
    "mirror": (False, True),
    "shift,mirror": (True, True),
}


def check_augment(recipe: Any) -> None:
    said = recipe.augment
    if isinstance(said, str):
        if said not in AUGMENTATIONS:
            raise UnknownName(f"no augment {said!r}; there are: {', '.join(AUGMENTATIONS)}{meant(said, AUGMENTATIONS)}")
        if recipe.mirror is not None:
            raise UsageError(f"augment {said!r} says whether images are mirrored; leave mirror out")
    elif not (said is None or isinstance(said, bool)):
        raise UsageError(f"augment is {checks.shown(said)}; wanted True, False, or one of {', '.join(AUGMENTATIONS)}")
    if recipe.mirror and said is False:
        raise UsageError(
            "mirror is part of the augmentation, which augment = false turns off; leave one of the two out"
        )


def check_sieve(recipe: Any) -> None:
    if recipe.sieve is None:
        return
    if not isinstance(recipe.sieve, SieveRule):
        raise UsageError(f"sieve must be a SieveRule or None, not {checks.shown(recipe.sieve)}")
    first, every = recipe.sieve.first(recipe.epochs), recipe.sieve.every
    if first >= recipe.epochs:
        raise UsageError(
            f"the sieve's after_epoch is {first} of {recipe.epochs} epochs: it would never act; lower it or "
            "leave the "
            f"sieve out"
        )
    if every is not None and first + every >= recipe.epochs:
        raise UsageError(
            f"the sieve's every is {every}, the first drop comes after epoch {first} of {recipe.epochs}: there "
            "would be no "
            f"second one; lower it or leave it out"
        )


def check_freeze(recipe: Any) -> None:
    if recipe.freeze is None:
        return
    if not isinstance(recipe.freeze, FreezeRule):
        raise UsageError(f"freeze must be a FreezeRule or None, not {checks.shown(recipe.freeze)}")
    if recipe.starts_dense:
        raise UsageError(
            f"the method {recipe.method!r} prunes all layers by and by, and what freezes is pruned no further; use "
            "method 'em_s', or leave freeze out"
        )
    if not any(recipe.freeze.covers(epoch, recipe.epochs) for epoch in range(recipe.warmup_epochs + 1, recipe.epochs)):
        raise UsageError(
            f"nothing would freeze: from {recipe.freeze.begin:g} to {recipe.freeze.end:g} of {recipe.epochs} epochs "
            f"there is no epoch that begins after the {'warm-up' if recipe.warmup_epochs else 'first one'}; train "
            "for more epochs, or leave freeze out"
        )


def check_budget(recipe: Any) -> None:
    """Also reads the budget."""
    if recipe.budget_at_mutations is None:
        return
    object.__setattr__(recipe, "budget_at_mutations", read_budget(recipe.budget_at_mutations, "budget_at_mutations"))
    if recipe.freeze is not None:
        raise UsageError(
            "budget_at_mutations chooses what trains again and again, and what freezes stays frozen; leave one of "
            "the two out"
        )
    if METHODS[recipe.method] is None or recipe.starts_dense:
        never = "prunes all layers by and by" if recipe.starts_dense else "never mutates"
        raise UsageError(
            f"the method {recipe.method!r} {never}; use method 'em_s', or update_budget, which chooses once, in the "
            "place of budget_at_mutations"
        )


def check_phases(recipe: Any) -> None:
    if not isinstance(recipe.phases, tuple) or not all(isinstance(phase, Phase) for phase in recipe.phases):
        raise UsageError("phases must be a tuple of Phase(until_epoch, prune_to, grow_to)")
    if not recipe.phases:
        return
    if METHODS[recipe.method] is None:
        raise UsageError(
            f"the method {recipe.method!r} never mutates and takes no phases; use method 'em' or leave phases out"
        )
    ends = [phase.until_epoch for phase in recipe.phases]
    if ends != sorted(set(ends)) or ends[-1] != recipe.epochs:
        raise UsageError(f"the phases' until_epoch must rise and end at epochs ({recipe.epochs}), not {ends}")
    for before, after in pairwise(recipe.phases):
        if after.prune_to < before.grow_to:
            raise SparsityError(
                f"the phase until epoch {after.until_epoch} prunes to {after.prune_to}, but the model is sparser "
                f"by then: {before.grow_to}; raise its prune_to"
            )


def check_pruning(recipe: Any) -> None:
    given = [name for name in ("prune_begin", "prune_end") if getattr(recipe, name) is not None]
    if not recipe.starts_dense:
        if given:
            raise UsageError(f"{given[0]} is of the method {GRADUAL!r}, not of {recipe.method!r}; leave it out")
        return
    window = recipe.window()
    if window["begin"] >= window["end"]:
        raise UsageError(f"prune_begin must be below prune_end, not {window['begin']} and {window['end']}")
    if recipe.epochs < 2:
        raise UsageError(f"the method {GRADUAL!r} prunes between epochs, and there is 1; give it more")
    if any(phase.prune_to != phase.grow_to for phase in recipe.phases):
        raise UsageError(f"the method {GRADUAL!r} grows nothing: prune_to and grow_to of its phases must be equal")
