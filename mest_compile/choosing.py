"""mest.choose_trainable: a model, data and an update budget in, what should train out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mest_compile.assembling import Again, make_step
from mest_compile.base.errors import UsageError
from mest_compile.budgeting import Batches, Choice, choose, runs_here, sampled
from mest_compile.compiling import chosen_step, planned_step
from mest_compile.options import StepOptions, find_loss, find_optimizer, read_budget
from mest_compile.planning.plan import Plan
from mest_compile.runtime.state import as_conv

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep


def choose_again(step: TrainStep, budget: float | int | str, batches: Batches) -> Choice:
    """What of a step should train from now on, among what it was compiled to train: as `choose_trainable`, with the
    weights and masks that it has. The full step is compiled beside it, and needs its memory meanwhile.

    batches  (images, labels) as a step takes them
    Raises UsageError of a step without a compiler, and as `choose_trainable` does.
    """
    facts, again = step.whole()
    if not isinstance(again, Again):
        raise UsageError("an artifact's step has no compiler to choose anew with; train where the compiler is")
    state, masks = step.state_dict(), {name: as_conv(mask) for name, mask in step.masks().items()}

    def make(plan: Plan) -> TrainStep:
        return make_step(plan, state, again.builder, None, None, masks)

    local = again.device is None and runs_here(facts.target)
    return choose(Plan(facts, again.records), batches, read_budget(budget), make, local)


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
