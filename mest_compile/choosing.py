"""mest.choose_trainable: a model, data and an update budget in, what should train out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mest_compile.base.errors import UsageError
from mest_compile.budgeting import Choice, sampled
from mest_compile.compiling import chosen_step, planned_step
from mest_compile.options import StepOptions, find_loss, find_optimizer


def choose_trainable(
    model: Any,
    input_shape: Sequence[int],
    data: Any,
    budget: float | int | str,
    importance: str = "fisher",
    **options: Any,
) -> Choice:
    """Which layers should train so that a step costs no more than `budget`: those that matter most on the user's data.

    model, input_shape  as in `compile`
    data        a Dataset, (images, labels) arrays or a torch Dataset, as `Trainer.fit` takes it; some batches of it are
                used, not augmented
    budget      as `update_budget` of `compile`
    importance  "fisher": a layer matters by the mean over batches of the squares of its gradients, "saliency": of their
                sizes times the weights'
    options     of the step, as in `compile`; `trainable` says what there is to choose from
    The answer's `trainable` is for `compile`; a BatchNorm of which nothing trains is then in evaluation mode. Costs are
    measured where the step runs in this process; of a target elsewhere they are modelled cycles where it has a model of
    them, or counted, and so they are where the budget is of bytes.
    Raises BudgetError, which says the smallest budget that can be met, and as `compile` does.
    """
    device, builder, records = (options.pop(name, None) for name in ("device", "builder", "records"))
    taken = {**options, "optimizer": find_optimizer(options.get("optimizer"), model), "update_budget": budget}
    loss = find_loss(taken.pop("loss", "cross_entropy"), taken.pop("label_smoothing", 0.0))
    try:
        said = StepOptions(**taken, loss=loss)
    except TypeError as problem:
        raise UsageError(f"{problem}; choose_trainable takes the options of mest.compile") from problem
    planned = planned_step(model, input_shape, said, device, builder, records)
    return chosen_step(planned, said, sampled(data, input_shape, said), device, builder, importance)
