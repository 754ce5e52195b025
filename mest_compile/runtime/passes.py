"""Batches through a step's programs: whole ones through those that it was compiled with, smaller ones through a
training program for as many examples, which is compiled when the first such batch comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mest_compile.base.errors import InputError
from mest_compile.ir.program import OF_BATCH, function_name
from mest_compile.runtime.compiled import Compiled
from mest_compile.runtime.feeding import Feeding, Part
from mest_compile.runtime.runner import Extends, Runner

MOST_KEPT = 4  # training programs for fewer examples: a run's last batches change as the data sieve drops examples


class Passes:
    """Runs a step's programs on batches.

    draws  of an update's number: what decides what its dropouts drop
    """

    def __init__(
        self,
        compiled: Compiled,
        runner: Runner,
        feeding: Feeding,
        draws: Callable[[int], Mapping[str, np.ndarray]],
    ):
        self._compiled, self._runner, self._feeding, self._draws = compiled, runner, feeding, draws
        self._whole = compiled.graph.input_shape[0]
        self._kept: list[int] = []  # numbers of examples that there is a program for, beside the step's own

    def ready(self, examples: int) -> None:
        """Has compiled what a batch of so many needs. Raises InputError where there is no compiler, or no such batch,
        SpecError, BuildError."""
        if examples > self._whole:
            raise InputError(f"a batch of this step has at most {self._whole} examples, not {examples}")
        if examples == self._whole or not self._needs(examples):
            return
        assert self._compiled.fewer and isinstance(self._runner, Extends)
        self._runner.extend(*self._compiled.fewer(examples))
        self._kept.append(examples)
        if len(self._kept) > MOST_KEPT:
            longest = self._kept.pop(0)
            self._runner.forget([function_name(name, longest) for name in OF_BATCH])

    def run(self, function: str, parts: Sequence[Part], update: int) -> None:
        """Runs one of OF_BATCH on what is `ready`, for the update of that number, the first is 1."""
        for part in parts:
            self.put(part, update)
            self._runner.run(function_name(function, None if part.examples == self._whole else part.examples))

    def put(self, part: Part, update: int) -> None:
        """Puts a part where programs read it, and what dropouts drop at that update."""
        self._feeding.put(part)
        for name, array in self._draws(update).items():
            self._runner.put(name, array)

    def _needs(self, examples: int) -> bool:
        """Whether a program for so many is missing and can be made."""
        if examples in self._kept:
            self._kept.append(self._kept.pop(self._kept.index(examples)))  # used last
            return False
        if self._compiled.fewer is None:
            raise InputError(
                f"{examples} examples came, and this step has code for {self._whole} at a time, and no compiler: give "
                f"it whole batches (drop_last), or build it for batches of another size"
            )
        return isinstance(self._runner, Extends)  # what does not run here says so itself
