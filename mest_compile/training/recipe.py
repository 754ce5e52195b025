"""How to train: epochs, learning rate, mutation schedule. The scheme, sparsity and optimizer belong to the step."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mest_compile.base import checks
from mest_compile.base.errors import MestError, SparsityError, UnknownName, UsageError
from mest_compile.base.names import meant
from mest_compile.options import StepOptions, find_loss
from mest_compile.sparsity.distributions import DIGITS
from mest_compile.sparsity.mutation import Phase
from mest_compile.training.consistent import (
    AUGMENTATIONS,
    check_augment,
    check_budget,
    check_freeze,
    check_phases,
    check_pruning,
    check_sieve,
)
from mest_compile.training.freezing import FreezeRule
from mest_compile.training.methods import GRADUAL, METHODS, PAPER_EPOCHS, PAPER_MUTATE_EVERY, PRUNE_BEGIN, PRUNE_END
from mest_compile.training.sieve import SieveRule
from mest_compile.training.tables import check_keys, read_run_options, read_toml

MOST_EPOCHS, MOST_SEED = 1_000_000, 2**63 - 1  # beyond what anybody trains; a longer number is a slip

# name -> share of the way from lr_final to lr, given the share of training done
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda done: 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01,
    "constant": lambda done: 1.0,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A training run's settings; checked when made.

    epochs             whole passes over the training set
    method             "static" (the mask never changes), "em", "em_s", "set", "rigl" (grows by the gradient of dead
                       weights) or "gradual" (prunes a dense model to the step's sparsity)
    lr                 learning rate at its highest; None: the one of the step's optimizer
    lr_schedule        "cosine" from lr to lr_final; "step": a tenth at half and again at three quarters of the epochs;
                       "constant". It moves with every iteration, not only between epochs. That of what freezes has
                       ended when it does
    lr_final           where the schedule ends; "step" and "constant" do not go below it
    warmup_epochs      the learning rate first rises linearly over this many epochs; the schedule covers the rest
    mutate_every       epochs between mutations; None: the paper's 5 of 160 epochs, in proportion, at least 1
    phases             what mutations do when; empty: the paper's table for the step's sparsity, switches in proportion
                       to `epochs`
    prune_begin, prune_end  shares of the epochs between which "gradual" prunes; None: 0 and 0.75
    label_smoothing    share of every label that is spread over all classes; the step must be compiled with it too
    clip_norm          largest norm of all gradients together, larger ones are scaled down to it; None: no bound
    importance_lambda  weight of |dL/dw| beside |w| in a weight's importance
    sieve              when which examples are dropped; None: all stay
    freeze             what freezing is to save of the run: parts of the model stop training, front to back, at epochs
                       at which masks mutate, or every `mutate_every` epochs where they never do; None: all train to the
                       end
    budget_at_mutations  what a step may cost, as `update_budget` of `mest.compile`: what trains within it is chosen
                       when the run begins and again before every mutation; None: all trains that the step was compiled
                       to train
    augment            "none", "shift", "mirror" or "shift,mirror"; True: shift, and mirror images of data sets known to
                       allow it; False: neither; None: as data sets are known to allow, others not at all
    mirror             whether images are mirrored left to right; None: as `augment` says
    seed               of shuffling, augmentation and mutation
    eval_every         epochs between evaluations; the last epoch is always evaluated
    patience           evaluations without a better model after which training ends; None: it goes to its last epoch
    drop_last          whether the examples that do not fill a last batch are left out, others each epoch; None: no, but
                       with a step that takes whole batches only, such as an artifact's
    """

    epochs: int
    method: str = "em"
    lr: float | None = None
    lr_schedule: str = "cosine"
    lr_final: float = 4e-8
    warmup_epochs: int = 0
    mutate_every: int | None = None
    phases: tuple[Phase, ...] = ()
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    importance_lambda: float = 0.0
    sieve: SieveRule | None = None
    augment: bool | str | None = None
    seed: int = 0
    eval_every: int = 1
    mirror: bool | None = None
    prune_begin: float | None = None
    prune_end: float | None = None
    freeze: FreezeRule | None = None
    patience: int | None = None
    drop_last: bool | None = None
    budget_at_mutations: float | int | str | None = None

    def __post_init__(self) -> None:
        for name, low in (
            ("epochs", 1),
            ("warmup_epochs", 0),
            ("seed", 0),
            ("eval_every", 1),
            ("mutate_every", 1),
            ("patience", 1),
        ):
            self._check(checks.whole, name, low)
        for name in ("lr", "lr_final", "importance_lambda", "clip_norm"):
            self._check(checks.number, name)
        for name in ("label_smoothing", "prune_begin", "prune_end"):
            self._check(checks.number, name, 0.0, 1.0)
        for name in ("mirror", "drop_last"):
            self._check(checks.flag, name)
        for name, most in ("epochs", MOST_EPOCHS), ("seed", MOST_SEED):
            if getattr(self, name) > most:
                raise UsageError(f"{name} is {checks.shown(getattr(self, name))}; wanted at most {most}")
        if self.clip_norm == 0:
            raise UsageError("clip_norm must be above 0; leave it out for no bound")
        if self.lr is not None and (self.lr == 0 or self.lr_final > self.lr):
            raise UsageError(f"lr must be above 0 and at least lr_final, not lr {self.lr}, lr_final {self.lr_final}")
        if self.warmup_epochs >= self.epochs:
            raise UsageError(f"warmup_epochs must be below epochs ({self.epochs}), not {self.warmup_epochs}")
        for name, known in ("method", METHODS), ("lr_schedule", LR_SCHEDULES):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise UnknownName(
                    f"no {name} {checks.shown(value)}; there are: {', '.join(known)}{meant(str(value), known)}"
                )
        check_augment(self)
        if self.mutate_every is not None and self.mutate_every >= self.epochs > 1:
            raise UsageError(
                f"mutate_every is {self.mutate_every} of {self.epochs} epochs: it would never act; lower it or "
                "leave it out"
            )
        check_sieve(self)
        check_freeze(self)
        check_budget(self)
        check_phases(self)
        check_pruning(self)

    def _check(self, kind: Callable[..., Any], name: str, *bounds: float) -> None:
        """Makes the field what `kind` makes of it; None stays where it is the default."""
        value = getattr(self, name)
        if value is not None or type(self).__dataclass_fields__[name].default is not None:
            object.__setattr__(self, name, kind(name, value, *bounds))

    def window(self) -> dict[str, float]:
        """What `gradual` takes beside the sparsity and the epochs."""
        return {
            name: default if (given := getattr(self, f"prune_{name}")) is None else given
            for name, default in (("begin", PRUNE_BEGIN), ("end", PRUNE_END))
        }

    @property
    def augments(self) -> bool:
        """Whether images are to be augmented, whatever data they are of."""
        return bool(self.mirror) or self.augment not in (None, False, "none")

    def augmentation(self, shift: bool, mirror: bool) -> tuple[bool, bool]:
        """(whether images are shifted, whether they are mirrored). shift, mirror: what the data set is known to
        allow."""
        if isinstance(self.augment, str):
            return AUGMENTATIONS[self.augment]
        mirror = mirror if self.mirror is None else self.mirror
        return {None: (shift, mirror), True: (True, mirror), False: (False, False)}[self.augment]

    @property
    def starts_dense(self) -> bool:
        """Whether the step begins with all weights alive."""
        return self.method == GRADUAL

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> Recipe:
        """The recipe in a TOML file whose keys are the fields above. Raises UsageError when it cannot be read or has
        unknown keys.

        A table [run] in it says on what the recipe is meant to be run, and is no part of the recipe: `run_options`
        reads it.
        """
        data = read_toml(path)
        data.pop("run", None)
        return cls.from_dict(data, where=str(path))

    @staticmethod
    def run_options(path: str | os.PathLike) -> dict[str, Any]:
        """What the table [run] of a recipe's file says: options of `mest-compile train` by name. Raises UsageError."""
        return read_run_options(read_toml(path).get("run", {}), str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """The recipe that `to_dict` described. Raises UsageError for unknown keys, naming the nearest known one, and
        wrong values."""
        if not isinstance(data, Mapping):
            raise UsageError(f"{where} is no table of settings: {checks.shown(data)}")
        check_keys(cls, data, where)
        for name, kind, example in ("sieve", SieveRule, "drop = 0.15"), ("freeze", FreezeRule, "share = 0.2"):
            if (table := data.get(name)) is not None:
                if not isinstance(table, Mapping):
                    raise UsageError(f"{where}: {name} must be a table, for example [{name}] with {example}")
                check_keys(kind, table, f"{where}, {name}")
        phases = data.get("phases", ())
        if not isinstance(phases, (list, tuple)) or not all(isinstance(phase, Mapping) for phase in phases):
            raise UsageError(f"{where}: phases must be a list of tables with until_epoch, prune_to and grow_to")
        for phase in phases:
            check_keys(Phase, phase, f"{where}, phases")
        try:
            read: dict[str, Any] = {"phases": tuple(Phase(**phase) for phase in phases)}
            for name, kind in ("sieve", SieveRule), ("freeze", FreezeRule):
                if data.get(name) is not None:
                    read[name] = kind(**data[name])
            return cls(**{**data, **read})
        except MestError as problem:
            raise type(problem)(f"{where}: {problem}") from problem

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives an equal recipe back."""
        return {**dataclasses.asdict(self), "phases": [dataclasses.asdict(phase) for phase in self.phases]}

    def resolved(self, sparsity: float, lr: float | None = None) -> Recipe:
        """This recipe with what it leaves open filled in, for a model whose sparse layers together start at `sparsity`.

        lr  the rate of the step's optimizer, for a recipe without one
        Raises SparsityError when the method needs a sparse model, or the first phase cannot be pruned to.
        """
        phases_of, rate = METHODS[self.method], lr if self.lr is None else self.lr
        if phases_of is None:
            return dataclasses.replace(self, lr=rate)
        interval = self._interval()
        if not 0 < sparsity < 1:
            raise SparsityError(
                f"the method {self.method!r} needs a sparsity between 0 and 1, not {sparsity}; use method 'static'"
            )
        window = self.window() if self.starts_dense else {}
        phases = self.phases or phases_of(sparsity, self.epochs, interval, **window)
        if self.starts_dense:
            if phases[-1].prune_to != round(sparsity, DIGITS):
                raise SparsityError(f"the last phase prunes to {phases[-1].prune_to}, the model is to have {sparsity}")
        elif phases[0].prune_to < sparsity:
            raise SparsityError(
                f"the first phase prunes to {phases[0].prune_to}, but the model starts sparser: {sparsity}; "
                f"raise its prune_to"
            )
        return dataclasses.replace(self, mutate_every=interval, phases=phases, lr=rate)

    def longer(self, epochs: int) -> Recipe:
        """This recipe, resolved, for a run that goes on to that many epochs. The rate follows the schedule over all of
        them, the last phase lasts to the end, and the sieve acts when it would have."""
        sieve = self.sieve and dataclasses.replace(self.sieve, after_epoch=self.sieve.first(self.epochs))
        last = tuple(dataclasses.replace(phase, until_epoch=epochs) for phase in self.phases[-1:])
        return dataclasses.replace(self, epochs=epochs, phases=self.phases[:-1] + last, sieve=sieve)

    def idle(self) -> list[str]:
        """What this recipe, not yet resolved, asks for and what will never happen; a line each."""
        if METHODS[self.method] is None:
            idle = ("importance_lambda",) if self.freeze else ("mutate_every", "importance_lambda")
            given = [name for name in idle if getattr(self, name)]
            return [f"{name} is {getattr(self, name)}, but the method {self.method!r} never mutates" for name in given]
        if self.epochs == 1:
            return [f"the method {self.method!r} mutates between epochs: in 1 epoch it never does"]
        if self.phases and not self.starts_dense and self.phases[0].until_epoch <= self._interval():
            return [
                f"the phase until epoch {self.phases[0].until_epoch} never acts: the first mutation comes after epoch "
                f"{min(self._interval(), self.phases[0].until_epoch)}"
            ]
        return []

    def _interval(self) -> int:
        return self.mutate_every or max(1, round(PAPER_MUTATE_EVERY * self.epochs / PAPER_EPOCHS))

    def step_options(self, options: StepOptions) -> StepOptions:
        """`options` with what a recipe decides: seed, learning rate where it has one and the optimizer was given none,
        label smoothing, and room for the densest phase of a model with one sparsity. Raises SparsityError, UsageError.
        """
        rule = options.optimizer
        if self.lr is not None and rule.lr == type(rule)().lr:
            rule = dataclasses.replace(rule, lr=self.lr)
        loss = find_loss(options.loss, self.label_smoothing)
        if self.starts_dense:
            options = dataclasses.replace(options, dense_start=True)
        overall = None if self.starts_dense else options.one_sparsity
        room = options.grow_to if overall is None else self.densest(overall)
        return dataclasses.replace(options, optimizer=rule, seed=self.seed, loss=loss, grow_to=room)

    def densest(self, sparsity: float) -> float:
        """The lowest sparsity that a model of that target sparsity has while it is trained: what its memory must be
        planned for."""
        if self.starts_dense:
            return 0.0
        return min([sparsity, *(phase.grow_to for phase in self.resolved(sparsity).phases)])

    def mutation_at(self, epoch: int) -> Phase | None:
        """The mutation that a resolved recipe makes before `epoch` (counted from 0), if any.

        There is one every `mutate_every` epochs and where a phase begins, so that the last phase always makes the model
        exact. Never before epoch 0: untrained weights say nothing about importance.
        """
        if not self.phases or epoch == 0:
            return None
        begins = epoch in [phase.until_epoch for phase in self.phases]
        return self._phase_of(epoch) if begins or epoch % (self.mutate_every or 1) == 0 else None

    def freezing_epochs(self) -> list[int]:
        """The epochs (from 0) of a resolved recipe before which parts may freeze. Raises UsageError where there are
        none."""
        rule, interval = self.freeze, self._interval()
        assert rule, "there is something to freeze"

        def pauses(epoch: int) -> bool:
            return epoch % interval == 0 if METHODS[self.method] is None else self.mutation_at(epoch) is not None

        epochs = range(self.warmup_epochs + 1, self.epochs)
        if found := [epoch for epoch in epochs if rule.covers(epoch, self.epochs) and pauses(epoch)]:
            return found
        raise UsageError(
            f"nothing would freeze: from {rule.begin:g} to {rule.end:g} of {self.epochs} epochs masks never mutate, "
            f"with mutate_every {interval}; lower it"
        )

    def meets_target(self, epoch: int) -> bool:
        """Whether the model in `epoch` is as sparse as the final one. EM&S is denser for a while, and
        gradual pruning until its end; such a model is no result."""
        last = next((phase for earlier in range(epoch, 0, -1) if (phase := self.mutation_at(earlier))), None)
        return not self.starts_dense if last is None else last.grow_to >= self.phases[-1].grow_to

    def evaluates(self, epoch: int) -> bool:
        """Whether the model is evaluated after `epoch` (counted from 0)."""
        return (epoch + 1) % self.eval_every == 0 or epoch + 1 == self.epochs

    def lr_at(self, epoch: int, iteration: int, iterations: int, until: int | None = None) -> float:
        """The learning rate of `iteration` (from 0) of the `iterations` of `epoch` (from 0). until: epochs after which
        it has ended, and stays there; None: all. Raises UsageError when there is no lr yet."""
        if self.lr is None:
            raise UsageError("the recipe has no lr and no step that has one; give it lr")
        if epoch < self.warmup_epochs:
            return self.lr * (epoch + (iteration + 1) / iterations) / self.warmup_epochs
        end = self.epochs if until is None else until
        done = min(1.0, (epoch + iteration / iterations - self.warmup_epochs) / (end - self.warmup_epochs))
        if self.lr_schedule == "cosine":
            return self.lr_final + (self.lr - self.lr_final) * LR_SCHEDULES[self.lr_schedule](done)
        return max(self.lr_final, self.lr * LR_SCHEDULES[self.lr_schedule](done))

    def _phase_of(self, epoch: int) -> Phase:
        return next(phase for phase in self.phases if epoch < phase.until_epoch)
