"""An update budget: which layers train, chosen by what each costs and by what it gains on the user's own data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import BudgetError, InputError, NotInstalled, UnknownName, UsageError
from mest_compile.data import as_dataset
from mest_compile.data.sampling import sample
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import Target, find_target, is_foreign
from mest_compile.operators.losses.distill import Distill
from mest_compile.options import StepOptions
from mest_compile.planning.knapsack import Names, Search
from mest_compile.planning.plan import Plan
from mest_compile.planning.prices import CountedPrices, MeasuredPrices, Prices
from mest_compile.planning.retargeting import retargeted
from mest_compile.planning.units import Unit, units_of, with_trainable
from mest_compile.records.log import Records

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep

log = logging.getLogger(__name__)

Batches = Sequence[tuple[Any, Any]]  # (images, labels) as a step takes them
Make = Callable[[Plan], "TrainStep"]

BATCHES = 8  # of the data, that gradients are taken of
ROUNDS, REPEATS = 5, 3  # in which steps that are timed take turns, and how often a step runs in each
SUMMED = ("values", "indices", "gradients", "optimizer", "activations")  # bytes of a step that add up over its layers

# name -> of a parameter's gradient and values, how much it matters that it trains
IMPORTANCES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    # Trace of the empirical Fisher information: by so much, times the rate, a step of gradient descent lowers the loss.
    "fisher": lambda gradient, values: float(np.square(gradient, dtype=np.float64).sum()),
    # By so much, to first order, the loss changes as the weights go: what pruning asks.
    "saliency": lambda gradient, values: float(np.abs(gradient * values).sum(dtype=np.float64)),
}


@dataclass(frozen=True, slots=True)
class ChosenUnit:
    """A layer with its bias and BatchNorm, or a BatchNorm by itself.

    importance  mean over batches, of all its parameters
    cost        share of the full step's cost: what it adds that it trains, where gradients pass through it anyhow
    alone       share of the full step's cost: a step in which it alone trains
    size_bytes  what it adds to the step that it trains: values, gradients, optimizer state, kept activations
    chosen      whether it trains
    """

    name: str
    parameters: tuple[str, ...]
    importance: float
    cost: float
    alone: float
    size_bytes: int
    chosen: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """What trains within an update budget, and why.

    budget      a share of the full step's cost (float), or bytes (int)
    costs       what costs are: "measured" (seconds), "modelled cycles of ...", or "counted", roughly, from the kernels'
                bytes and operations, where nothing can say better or the budget is of bytes
    importance  how it was measured: a key of IMPORTANCES
    predicted   share of the full step's cost that the chosen step's is
    measured    the same of whole steps that took turns on this machine; None: none did
    seconds     of the full step, in those turns; None likewise
    full_bytes, chosen_bytes  planned memory of the full step and of the chosen one
    """

    budget: float | int
    units: tuple[ChosenUnit, ...]
    costs: str
    importance: str
    predicted: float
    measured: float | None
    seconds: float | None
    full_bytes: int
    chosen_bytes: int

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters that train, as `trainable` of `mest.compile` takes them."""
        return tuple(name for unit in self.units if unit.chosen for name in unit.parameters)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return asdict(self) | {"units": [asdict(unit) | {"parameters": list(unit.parameters)} for unit in self.units]}


def choose(
    plan: Plan,
    batches: Batches,
    budget: float | int,
    make: Make,
    local: bool,
    importance: str = "fisher",
) -> Choice:
    """What of a full step trains within a budget, as StepOptions has it.

    plan     of the full step
    batches  of the user's data
    make     compiles a plan to run in this process
    local    whether the step is for this process
    Raises BudgetError where not even the cheapest step meets the budget, UnknownName, InputError.
    """
    if importance not in IMPORTANCES:
        raise UnknownName(f"no importance {importance!r}; there are: {', '.join(IMPORTANCES)}")
    units = units_of(plan.facts.graph)
    everything = frozenset(unit.name for unit in units)

    @cache
    def plan_of(chosen: Names) -> Plan:
        names = [name for unit in units if unit.name in chosen for name in unit.parameters]
        return plan if chosen == everything else with_trainable(plan, names)

    full = make(plan if local else _here(plan))
    gains = importances(full, units, batches, importance)
    # What a step takes is asked for where it decides.
    timing = _Timing(full, plan, make, batches[0]) if local and isinstance(budget, float) else None
    prices = timing.prices if timing else _prices(plan.target, budget)
    shares: dict[Names, float] = {everything: 1.0}
    if timing:  # a gradient flows through all down to the lowest layer: what that costs
        lowest = max(units, key=lambda unit: len(unit.moving))
        shares[frozenset({lowest.name})] = timing.learn(plan_of(frozenset({lowest.name})))

    def priced() -> Search:
        whole = prices.of(plan)
        return Search(units, gains, lambda names: prices.of(plan_of(names)) / whole)

    def search() -> Search:
        if isinstance(budget, float):
            return priced()
        return Search(units, gains, lambda names: _total(plan_of(names)), lambda names: _summed(plan_of(names)))

    chosen = search().best(budget)
    while timing and chosen and chosen not in shares:  # what it has of kernels that were not timed is known then
        shares[chosen] = timing.learn(plan_of(chosen))
        chosen = search().best(budget)
    if not chosen:
        raise BudgetError(_too_little(budget, search().least()))
    costs = priced()
    return Choice(
        budget,
        tuple(
            ChosenUnit(
                unit.name,
                unit.parameters,
                gains[unit.name],
                costs.extra(unit),
                costs.cost(frozenset({unit.name})),
                _summed(plan) - _summed(plan_of(everything - {unit.name})) if len(units) > 1 else _summed(plan),
                unit.name in chosen,
            )
            for unit in units
        ),
        prices.kind,
        importance,
        costs.cost(chosen),
        shares.get(chosen),
        timing.seconds if timing else None,
        _total(plan),
        _total(plan_of(chosen)),
    )


def sampled(data: Any, input_shape: Sequence[int], options: StepOptions, teacher: Any = None) -> Batches:
    """Some batches of the user's data, as a step takes them. teacher: of mest.Distill, from images to logits. Raises
    DataError, InputError, UsageError."""
    if isinstance(options.loss, Distill) and teacher is None:
        raise UsageError(
            "an update_budget chooses by labels, and mest.Distill wants a teacher's answers beside them; choose with "
            "another loss, and compile with trainable"
        )
    input_shape, _ = checks.shapes("input_shape", input_shape)
    drawn = sample(as_dataset(data, name="data", **options.loss.labels), input_shape, BATCHES, options.seed)
    return drawn if teacher is None else [(images, (labels, teacher(images))) for images, labels in drawn]


def importances(step: TrainStep, units: Sequence[Unit], batches: Batches, importance: str) -> dict[str, float]:
    """{unit: mean over batches of its parameters' importance}, at live weights. step: of which all of them train.

    TinyTrain (Kwon et al., arXiv:2307.09988) chooses by Fisher information of activations, example by example. Ours is
    of parameters, whose gradients a step has anyhow, and batch by batch, as BatchNorm's statistics tie the examples of
    one together. Of activations it would be 0 for every convolution before a BatchNorm, as the loss does not change
    with the scale of a channel's weights.
    """
    measure, values = IMPORTANCES[importance], step.state_dict()
    found = dict.fromkeys((unit.name for unit in units), 0.0)
    for images, labels in batches:
        gradients = step.gradients(images, labels)
        for unit in units:
            found[unit.name] += sum(measure(gradients[name], values[name]) for name in unit.parameters) / len(batches)
    if wrong := [name for name, gain in found.items() if not np.isfinite(gain)]:
        raise InputError(
            f"update_budget chooses by gradients, and those of {wrong[0]} on this data hold NaN or infinity: look at "
            "the data, and at the weights that the model starts with"
        )
    return found


class _Timing:
    """Steps that take turns with the full one on one batch. seconds: of the full step, whole."""

    def __init__(self, full: TrainStep, plan: Plan, make: Make, batch: tuple[Any, Any]):
        self.prices, self.seconds = MeasuredPrices(), 0.0
        self._full, self._plan, self._make, self._batch = full, plan, make, batch

    def learn(self, plan: Plan) -> float:
        """Times a step of that plan and its calls; gives its share of the full step's time.

        Of times on a machine that others use too only the ratios last: the calls' are told in the seconds in which the
        full step was timed first.
        """
        steps = self._full, self._make(plan)
        turns = [[step.profile(*self._batch, REPEATS) for step in steps] for _ in range(ROUNDS)]
        whole = np.array([[sum(one.values()) for one in turn] for turn in turns])
        of_full, of_step = (
            {name: float(np.median([turn[place][name] for turn in turns])) for name in turns[0][place]}
            for place in range(2)
        )
        if not self.seconds:
            self.seconds = float(np.median(whole[:, 0]))
            self.prices.learn(self._plan, of_full)
        drift = self.prices.of(self._plan) / (sum(of_full.values()) - of_full["rest"])
        self.prices.learn(plan, {name: seconds * drift for name, seconds in of_step.items()})
        return float(np.median(whole[:, 1] / whole[:, 0]))


def _prices(target: Target, budget: float | int) -> Prices:
    """Of a step that is not timed."""
    if isinstance(budget, float) and target.cycle_model is not None:
        from mest_compile.devices.cycleprices import CyclePrices, missing_tools

        if not (missing := missing_tools(target)):
            return CyclePrices(target)
        log.warning(
            "update_budget: costs are counted, not modelled on %s, as this machine lacks %s; mest-compile doctor tells "
            "how to install them",
            target.cycle_model,
            ", ".join(missing),
        )
    return CountedPrices()


def _here(plan: Plan) -> Plan:
    """The plan of the same step for this machine, which has the same gradients."""
    facts = replace(plan.facts, activations="float32")
    return retargeted(facts, find_target("local"), facts.batch, Records)


def runs_here(target: Target) -> bool:
    """Whether a step for that target can be timed on this machine."""
    kind = backend_of(target)
    if kind.processor:
        return not is_foreign(target)
    try:
        kind.find_device(target)
    except NotInstalled:
        return False
    return True


def _total(plan: Plan) -> int:
    return plan.memory()["total"]


def _summed(plan: Plan) -> int:
    """Bytes that add up over the layers that train."""
    memory = plan.memory()
    return sum(memory[kind] for kind in SUMMED)


def _too_little(budget: float | int, least: float) -> str:
    if isinstance(budget, float):
        return (
            f"update_budget is {budget:g}; the cheapest step in which anything trains takes {least:.3f} of the full "
            f"one, most of it the forward pass: use at least {np.ceil(least * 100) / 100:g}"
        )
    return (
        f"update_budget is {budget} bytes; the leanest step in which anything trains needs {least:.0f}: use at least "
        "that, a smaller batch, or memory_budget, which computes values again"
    )
