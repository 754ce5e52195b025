"""A step's masks: what they are, and every way to change them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import UsageError
from mest_compile.runtime.changes import Changes, Part, in_turn
from mest_compile.runtime.mutating import Change, Mutating, MutationReport
from mest_compile.runtime.runner import Runner
from mest_compile.runtime.state import Arrangement, HeldState

if TYPE_CHECKING:
    from mest_compile.runtime.specializer import Specializer


class Masked:
    """Which weights of a step live."""

    _state: HeldState
    _mutating: Mutating
    _turn: threading.RLock
    _changes: Changes
    _runner: Runner
    _rng: np.random.Generator
    _specializer: Specializer | None

    @in_turn
    def masks(self) -> dict[str, np.ndarray]:
        """{torch weight name: bool array in torch's shape, True where the weight lives}, sparse layers only."""
        return {name: self._state.mask(name) for name in self._mutating.sparse}

    @in_turn
    def set_masks(self, masks: Mapping[str, np.ndarray]) -> MutationReport:
        """Installs masks; units that stay keep weight and optimizer state, new ones start at 0.

        masks  {torch weight name: bool, or 0 and 1, in torch's shape}; layers that are not named stay as they are
        Raises StateError, CapacityError; nothing is changed then.
        """
        begun = time.perf_counter(), self._runner.uploaded_bytes
        return self._exchange(self._mutating.to_masks(masks), begun, lambda: None)

    @in_turn
    def mutate(
        self,
        prune_to: float,
        grow_to: float,
        importance_lambda: float = 0.0,
        rng: np.random.Generator | None = None,
        gradients: Mapping[str, np.ndarray] | None = None,
    ) -> MutationReport:
        """Elastic Mutation: in every sparse layer that trains the least important units die until `prune_to`, others
        grow until `grow_to`. Frozen layers keep their masks; `set_masks` changes them.

        prune_to, grow_to  sparsity of all sparse layers together, if the frozen ones followed; grow_to <= prune_to
        importance_lambda  weight of the last step's gradient in |w| + lambda * |g|
        gradients          {weight name: dense gradient}: the dead units of largest gradient norm grow, as in RigL;
                           None: random ones
        Source: MEST, arXiv:2110.14032; RigL, arXiv:1911.11134. Raises UsageError, SparsityError, CapacityError; nothing
        is changed then.
        """
        return self._drawn(
            rng,
            lambda drawn: self._mutating.by_importance(prune_to, grow_to, importance_lambda, drawn, gradients),
        )

    @in_turn
    def protect(self, masks: Mapping[str, np.ndarray]) -> None:
        """From now on units that live in these masks die last: mutations and pruning take others while there are any,
        as what an earlier task has learned is protected in SparCL, arXiv:2209.09476. Files do not hold it.

        masks  {torch weight name: bool in torch's shape}; layers that are not named protect nothing
        Raises StateError where a scheme cannot have such a mask; nothing is changed then.
        """
        self._mutating.protect(masks)

    @in_turn
    def prune(
        self, to: float, importance_lambda: float = 0.0, rng: np.random.Generator | None = None
    ) -> MutationReport:
        """Gradual pruning, of a step that began with more live weights than it is compiled for: in every sparse layer
        that trains the least important units die until it has gone as far towards its own sparsity as all of them
        together, which have `to` then. Nothing grows; at the sparsity of all that the step is compiled for each layer
        has exactly its own.

        to  sparsity of all sparse layers together, if the frozen ones followed
        importance_lambda  weight of the last step's gradient in |w| + lambda * |g|
        Source: Zhu and Gupta, arXiv:1710.01878; that layers keep their proportions is ours. Raises UsageError; nothing
        is changed then.
        """
        return self._drawn(rng, lambda drawn: self._mutating.by_pruning(to, importance_lambda, drawn))

    @in_turn
    def settle(
        self,
        names: Collection[str],
        to: float,
        importance_lambda: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> MutationReport:
        """Prunes the sparse layers among `names` that are denser to what they have when all sparse layers together have
        the sparsity `to`, by importance. Nothing grows: before a layer freezes it still trains at the mask that it
        keeps, and the BatchNorm behind it sees that.

        names  of parameters, such as parts of `freezing_parts`
        importance_lambda  as `mutate` has it
        Raises UsageError, SparsityError; nothing is changed then. Ours.
        """
        return self._drawn(rng, lambda drawn: self._mutating.without_growth(names, to, importance_lambda, drawn))

    def check_room(self, grow_to: float) -> dict[str, int]:
        """{weight name: live units} of the sparse layers that train at that sparsity of all sparse layers. Raises
        CapacityError where there is no room."""
        return self._mutating.check_room(grow_to)

    def _drawn(
        self, rng: np.random.Generator | None, choose: Callable[[np.random.Generator], Mapping[str, Change]]
    ) -> MutationReport:
        """Makes what `choose` chooses with the generator's numbers; None: the step's own."""
        begun = time.perf_counter(), self._runner.uploaded_bytes
        rng = self._rng if rng is None else rng
        if not isinstance(rng, np.random.Generator):
            raise UsageError(
                f"rng is {checks.shown(rng)}; wanted np.random.default_rng(seed), or None for the step's own"
            )
        drawn = deepcopy(rng)  # what is refused or interrupted has drawn nothing
        return self._exchange(choose(drawn), begun, partial(set_state, rng, drawn.bit_generator.state))

    def _exchange(self, changes: Mapping[str, Change], begun: tuple[float, int], last: Part) -> MutationReport:
        """Makes those changes of layers; the others stay as they are. Then comes `last`. begun: clock and bytes sent
        before."""
        chosen = time.perf_counter()
        fates = dict.fromkeys(self._mutating.sparse, "unchanged")
        self._changes.make(*self._mutating.parts(changes, partial(self._install, fates=fates)), last)
        end = time.perf_counter()
        return MutationReport(fates, end - begun[0], end - chosen, self._runner.uploaded_bytes - begun[1])

    def _install(self, arrangement: Arrangement, fates: dict[str, str] | None = None) -> None:
        """Lets a layer hold that, tells who specializes kernels of it, and notes its fate."""
        self._state.install(arrangement)
        recompiled = self._specializer is not None and self._specializer.changed(arrangement.name)
        if fates is not None:
            fates[arrangement.name] = "recompiled" if recompiled else "re-indexed"


def set_state(rng: np.random.Generator, state: Mapping[str, Any]) -> None:
    rng.bit_generator.state = state
