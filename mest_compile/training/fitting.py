"""Whether a step, a recipe and data fit each other: asked before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mest_compile.base.errors import SparsityError, UsageError
from mest_compile.data import Dataset, Stream
from mest_compile.data.sampling import check_shape
from mest_compile.ir.graph import FROZE
from mest_compile.sparsity.distributions import together
from mest_compile.training.judging import Judge
from mest_compile.training.recipe import Recipe


def target_sparsity(step: Any) -> float:
    """The sparsity that the step was compiled for, over the weights of all its sparse layers together; 0 when it has
    none."""
    targets, elems = step.describe()["sparsity"], {name: mask.size for name, mask in step.masks().items()}
    return together({name: targets[name] for name in elems}, elems)


def resolved(recipe: Recipe, step: Any) -> Recipe:
    """The recipe with what it leaves open as the step has it. Raises UsageError, SparsityError and CapacityError where
    they do not fit."""
    if not isinstance(recipe, Recipe):
        raise UsageError(
            f"recipe is a {type(recipe).__name__}; wanted a mest.Recipe, such as Recipe.from_dict or from_file give"
        )
    if None not in (recipe.lr, step.asked_lr) and recipe.lr != step.asked_lr:
        raise UsageError(
            f"the recipe's lr is {recipe.lr:g}, that of the optimizer which the step was compiled with "
            f"{step.asked_lr:g}; "
            f"leave one of the two out"
        )
    if recipe.augments and len(step.input_shape) == 3:
        raise UsageError(
            f"augmentation shifts images, and the step takes {step.input_shape}, which have no rows; set augment = "
            "false in the recipe"
        )
    if recipe.drop_last is None:
        recipe = replace(recipe, drop_last=step.whole_batches)
    elif step.whole_batches and not recipe.drop_last:
        raise UsageError(
            f"the step takes {step.batch} examples at a time and has no compiler for what is left of an epoch; leave "
            "drop_last out, or train where the compiler is"
        )
    target = target_sparsity(step)
    found = recipe.resolved(target, step.optimizer.lr)
    step.check_room(recipe.densest(target))
    frozen = {name for name, why in step.describe().get("frozen", {}).items() if why != FROZE}  # from the beginning
    if found.phases and step.masks().keys() <= frozen:
        raise SparsityError(
            f"the method {found.method!r} mutates, but every sparse layer is frozen; use method 'static'"
        )
    smoothing = step.describe().get("label_smoothing", 0.0)
    if recipe.label_smoothing and smoothing != recipe.label_smoothing:
        raise UsageError(
            f"the recipe has label_smoothing {recipe.label_smoothing}, the step was compiled with {smoothing}; "
            f"compile it with label_smoothing={recipe.label_smoothing}"
        )
    return found


def check_start(recipe: Recipe, step: Any) -> None:
    """Raises UsageError when a run that is to begin dense does not."""
    frozen = step.describe().get("frozen", {})
    sparse = [name for name, mask in step.masks().items() if name not in frozen and not mask.all()]
    if recipe.starts_dense and sparse:
        raise UsageError(
            f"the method {recipe.method!r} begins with all weights, and {sparse[0]} has dead ones; compile the step "
            "with dense_start=True"
        )


def check_data(step: Any, judge: Judge, data: Dataset | Stream) -> None:
    """Raises InputError when the step, or its loss, does not take such examples."""
    check_shape(data, tuple(step.input_shape))
    judge.check(data)
