"""Freezing a step while it trains: what is inside it is exchanged for what computes the same without the backward pass
of what froze."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import MestError, UnknownName, UsageError
from mest_compile.base.interrupts import uninterrupted
from mest_compile.hardware.host import give_memory_back
from mest_compile.ir.graph import FROZE
from mest_compile.operators.dropout import draws
from mest_compile.operators.embedding import whole_numbers
from mest_compile.operators.operator import OPERATORS
from mest_compile.operators.optimizers.groups import Setting, Settings
from mest_compile.options import trainable_patterns
from mest_compile.planning.facts import Facts
from mest_compile.planning.freezing import (
    frozen_meanwhile,
    kernel_seconds,
    named,
    need_bytes,
    operations,
    parts_of,
    seconds_of,
    stages,
    thawed,
    with_frozen,
)
from mest_compile.runtime.changes import Changes, Part, in_turn
from mest_compile.runtime.compiled import Compiled, Knobs, Recompiles
from mest_compile.runtime.feeding import Feeding, prepared
from mest_compile.runtime.masked import set_state
from mest_compile.runtime.mutating import Change, Mutating
from mest_compile.runtime.passes import Passes
from mest_compile.runtime.runner import Closes, Runner, Spares
from mest_compile.runtime.state import HeldState, Snapshot

if TYPE_CHECKING:
    from mest_compile.runtime.specializer import Specializer


class Freezes:
    """What a step has inside, and how it is exchanged."""

    _compiled: Compiled
    _runner: Runner
    _state: HeldState
    _feeding: Feeding
    _passes: Passes
    _mutating: Mutating
    _settings: list[Setting]  # of the parameters that train
    _coming: list[Knobs]  # of the kernels when each of `Facts.parts` has frozen
    _specializer: Specializer | None
    _rng: np.random.Generator
    _turn: threading.RLock
    _changes: Changes

    @in_turn
    def freeze(
        self,
        names: str | Sequence[str],
        prune_to: float | None = None,
        importance_lambda: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> None:
        """From the next step on these parameters stay as they are, and what only their training needs is gone from the
        step and from memory: its backward pass, activations, gradients and optimizer state. All else goes on bit for
        bit.

        names     shell patterns of torch's parameter names, or blocks, as `trainable` of `mest.compile` has them
        prune_to  sparsity, of all sparse layers together, that sparse layers which freeze are pruned to first by the
                  importance that `mutate` tells of; None, or where they are as sparse already: their masks stay
        A BatchNorm of which nothing trains any longer normalises with its running statistics from then on and keeps
        them. Kernels that the step lacks are compiled, unless `plan_freezing` has had that done.
        Raises UnknownName, SpecError where nothing would be left to train, UsageError where there is no compiler,
        BuildError; nothing is changed then.
        """
        graph = self._compiled.graph
        chosen = named(graph, trainable_patterns(names))
        self._freeze_exactly({*frozen_meanwhile(graph), *chosen}, chosen, prune_to, importance_lambda, rng)

    @in_turn
    def train_only(
        self,
        names: Sequence[str],
        prune_to: float | None = None,
        importance_lambda: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> None:
        """From the next step on these parameters train, and of what the step was compiled to train nothing else: the
        others are frozen as by `freeze`. Those that were frozen meanwhile go on with the weights, masks and statistics
        that they have, and optimizer state 0.

        names     of parameters
        prune_to  as `freeze` has it, of what freezes now
        Raises as `freeze` does; nothing is changed then.
        """
        graph = self._compiled.graph
        able, chosen = thawed(graph).trainable(), checks.names("names", names, " of parameters")
        if strange := [name for name in chosen if name not in able]:
            raise UnknownName(
                f"{strange[0]} is not among what the step was compiled to train; there are: {', '.join(able)}"
            )
        frozen = set(able) - set(chosen)
        new = frozen - set(frozen_meanwhile(graph))
        self._freeze_exactly(frozen, new, prune_to, importance_lambda, rng)

    @in_turn
    def whole(self) -> tuple[Facts, Recompiles]:
        """The facts of the step in which nothing has frozen meanwhile, and what compiles it. Raises UsageError."""
        again = self._recompiles()
        return with_frozen(self._compiled.facts, ()), again

    def _freeze_exactly(
        self,
        frozen: Collection[str],
        new: Collection[str],
        prune_to: float | None,
        importance_lambda: float,
        rng: np.random.Generator | None,
    ) -> None:
        """Lets that be frozen meanwhile, and nothing else. new: of it, what is pruned."""
        again = self._recompiles()
        facts = with_frozen(self._compiled.facts, frozen)
        compiled = again.compiled(facts, self._knobs_of(facts, again))
        rng = self._rng if rng is None else rng
        drawn = deepcopy(rng)  # what is refused or interrupted has drawn nothing
        changes: dict[str, Change] = {}
        if prune_to is not None:
            changes = self._mutating.without_growth(new, prune_to, importance_lambda, drawn)
        last = partial(set_state, rng, drawn.bit_generator.state), partial(self._become, compiled)
        self._changes.make(*self._mutating.parts(changes, self._state.install), *last)

    @in_turn
    def plan_freezing(self, parts: Sequence[Sequence[str]]) -> None:
        """Prepares a step for parts of it to freeze one after another. Each has a learning rate of its own from now on
        (`lr` of a call), and kernels that the step will want are compiled by other processes meanwhile.

        parts  names of parameters that train, in the order in which they will freeze
        Raises as `freeze` does.
        """
        again, facts = self._recompiles(), self._compiled.facts
        listed = tuple(tuple(checks.names("parts", part, " of parameters, a list a part")) for part in parts)
        every = [name for part in listed for name in part]
        if not all(listed) or len(every) > len(set(every)):
            raise UsageError("parts has one without a name, or a name twice; wanted each part's parameters, once")
        if facts.parts != listed:
            facts = with_frozen(facts, frozen_meanwhile(facts.graph), listed)
            self._changes.make(partial(self._become, again.compiled(facts, again.knobs(facts))))
            self._coming = []
        coming = stages(facts, listed)[1:]
        if len(self._coming) != len(coming):
            self._coming = [again.knobs(stage) for stage in coming]
        again.ahead(self._still_coming())

    def _still_coming(self) -> list[tuple[Facts, Knobs]]:
        """What the step will become, of what was planned."""
        facts = self._compiled.facts
        planned = zip(stages(facts, facts.parts)[1:], self._coming, strict=True) if self._coming else ()
        frozen = len(frozen_meanwhile(facts.graph))
        return [(stage, knobs) for stage, knobs in planned if len(frozen_meanwhile(stage.graph)) > frozen]

    @in_turn
    def freezing_parts(self) -> dict[str, tuple[str, ...]]:
        """{name of what freezes at once: its parameters that train}, in the order of the forward pass: blocks, and
        layers that are in no block."""
        return parts_of(self._compiled.graph)

    @in_turn
    def freezing_costs(self, parts: Sequence[Sequence[str]], profile: Mapping[str, float] | None = None) -> list[float]:
        """What a step costs with none of the parts frozen, with the first, with the first two, and so on: operations of
        its convolutions and linear layers at the sparsity that it was compiled for, or seconds.

        parts    names of parameters, as `plan_freezing` has them
        profile  what `profile` gave: of every kernel the time that it took, of those that only a frozen step has the
                 time of the one in their place
        """
        self._recompiles()
        facts = self._compiled.facts
        seconds = None if profile is None else kernel_seconds(self._compiled.train, profile)
        costs: list[float] = []
        for stage in stages(facts, parts):
            program, _ = stage.lower()
            cost = operations(program, facts.layers) if seconds is None else seconds_of(program, seconds)
            costs.append(min([cost, *costs]))  # times of kernels are not those of steps, by a little
        return costs

    @in_turn
    def freezing_memory(self, parts: Sequence[Sequence[str]]) -> list[int]:
        """Bytes that the step needs at its densest with none of the parts frozen, with the first, with the first two,
        and so on. parts: names of parameters, as `plan_freezing` has them."""
        return [need_bytes(stage) for stage in stages(self._compiled.facts, parts)]

    def _recompiles(self) -> Recompiles:
        if self._compiled.again is None:
            raise UsageError(
                "this step has no compiler to freeze with: it was opened to be read, or from an artifact that was not "
                "built to freeze; build one by the recipe (mest-compile build --recipe), or train where the compiler is"
            )
        return self._compiled.again

    def _knobs_of(self, facts: Facts, again: Recompiles) -> Knobs:
        """Those that were told to be coming, or new ones."""
        coming = stages(facts, facts.parts)[1:] if self._coming else []
        found = [knobs for stage, knobs in zip(coming, self._coming) if stage == facts]
        return found[0] if found else again.knobs(facts)

    def _match(self, document: Mapping[str, Any]) -> None:
        """Freezes what a checkpoint's step had frozen while it trained, and nothing else, in the parts that it knew.
        Where it is of another model nothing is done, which is for others to tell."""
        facts, compiled = self._compiled.facts, self._compiled
        same = document.get("target") == compiled.document["target"]
        graph, parts = document.get("graph"), tuple(map(tuple, document.get("parts", ())))
        try:
            names = {name for name, why in graph.get("frozen", {}).items() if why == FROZE} if graph else set()
            wanted = with_frozen(facts, names, parts)
        except MestError:
            return
        if graph == wanted.to_json()["graph"]:
            if (graph, parts) != (compiled.document["graph"], facts.parts):
                again = self._recompiles()
                knobs = document["knobs"] if same and "knobs" in document else again.knobs(wanted)
                self._changes.make(partial(self._become, again.compiled(wanted, knobs)))
            self._coming = list(document.get("coming", ())) if same else []

    # What is exchanged.

    def _become(self, compiled: Compiled) -> Sequence[Part]:
        """The parts of a change that puts what was compiled in the place of what is inside, with its state."""
        snapshot = self._state.snapshot(compiled.optimizer.state)
        return [partial(self._take_place, compiled, snapshot)]

    def _take_place(self, compiled: Compiled, snapshot: Snapshot) -> None:
        """Memory that is not state goes first: there need not be room for two steps."""
        if isinstance(self._runner, Closes):  # a device has room for one step
            self._runner.close()
        elif isinstance(self._runner, Spares):
            self._runner.spare()
        runner = compiled.runner()
        state = held_by(compiled, runner)
        state.take(snapshot)
        with uninterrupted():
            self._be(compiled, runner, state)
            if self._specializer is not None:
                self._specializer = self._specializer.successor(compiled, runner, state.get)
        give_memory_back()

    def _be(self, compiled: Compiled, runner: Runner, state: HeldState) -> None:
        """Is that from here on."""
        graph = compiled.graph
        self._compiled, self._runner, self._state = compiled, runner, state
        self._feed(runner)
        self._mutating = Mutating(compiled.layers, graph.state_shapes, state)
        self._settings = Settings(compiled.optimizer, graph.nodes, graph.frozen, compiled.facts.parts).listed

    def _feed(self, runner: Runner) -> None:
        """Batches go to that runner from here on."""
        facts = self._compiled.facts
        graph = facts.graph

        def prepare(images: np.ndarray) -> np.ndarray:
            return prepared(images, graph.prepared, self._state.kept)

        shapes = tuple(graph.input_shape), tuple(graph.nodes[-1].shape)
        constants: dict[str, np.ndarray] = {}
        for node in graph.nodes:
            constants |= OPERATORS.find(node.op).constants(node)
        results = {name: self._state.held[name] for name in ("correct", "logits") if name in self._state.held}
        told: dict[str, tuple[int, str]]
        told = {name: ((buffer.elems or 0) // graph.input_shape[0], buffer.dtype) for name, buffer in results.items()}
        self._feeding = Feeding(
            runner,
            *shapes,
            facts.passes,
            facts.loss,
            facts.activations,
            prepare,
            constants,
            told,
            graph.inputs,
            whole_numbers(graph),
        )
        self._passes = Passes(self._compiled, runner, self._feeding, partial(draws, graph, facts.seed))


def held_by(compiled: Compiled, runner: Runner) -> HeldState:
    return HeldState((compiled.train, compiled.predict), compiled.layers, compiled.graph.state_shapes, runner)
