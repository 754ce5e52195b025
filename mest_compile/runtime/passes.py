"""Batches through a step's programs, in as many passes as it was compiled for: whole passes through its own programs,
what is left through a training program for as many examples, which is compiled when the first such batch comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from mest_compile.base.errors import InputError
from mest_compile.ir.program import function_name
from mest_compile.runtime.compiled import Compiled
from mest_compile.runtime.feeding import Feeding, Part
from mest_compile.runtime.runner import Extends, Runner

MOST_KEPT = 4  # training programs for fewer examples: a run's last batches change as the data sieve drops examples
Draws = Callable[[int, int], Mapping[str, np.ndarray]]


class Passes:
    """Runs a step's programs on batches.

    draws  of an update's number and a pass of it, the first is 0: what decides what its dropouts drop
    """

    def __init__(self, compiled: Compiled, runner: Runner, feeding: Feeding, draws: Draws):
        self._compiled, self._runner, self._feeding, self._draws = compiled, runner, feeding, draws
        self._whole, self.adds = compiled.graph.input_shape[0], compiled.train.adds
        self._kept: dict[int, list[str]] = {}  # examples -> functions of a program for them, beside the step's own

    def ready(self, examples: int) -> None:
        """Has compiled what a batch of so many needs. Raises InputError where there is no compiler, or no such batch,
        SpecError, BuildError."""
        most = self._compiled.facts.batch
        if examples > most:
            raise InputError(f"a batch of this step has at most {most} examples, not {examples}")
        left = examples % self._whole
        if not left or not self._needs(left, examples):
            return
        assert self._compiled.fewer and isinstance(self._runner, Extends)
        functions, code = self._compiled.fewer(left)
        self._runner.extend(functions, code)
        self._kept[left] = list(functions)
        if len(self._kept) > MOST_KEPT:
            self._runner.forget(self._kept.pop(next(iter(self._kept))))

    def train(
        self, parts: Sequence[Part], update: int, bound: float | None, ahead: tuple | None
    ) -> tuple[float, np.ndarray]:
        """(loss, what is told of each example) of a batch that is `ready`, which makes the update of that number, the
        first is 1. bound: of the norm of all gradients; ahead: as `Feeding.send_ahead` has it."""
        if bound is not None:
            self._runner.put("clip:bound", np.array([bound], np.float32))
        if self.adds:
            return self._train_in_passes(parts, update, bound is not None, ahead)
        (part,) = parts
        self.put(part, update)
        self._runner.run(self._named("train" if bound is None else "backward", part))
        if bound is not None:
            self._runner.run("update")
        self._feeding.send_ahead(ahead)
        return self._told(part)

    def _train_in_passes(
        self, parts: Sequence[Part], update: int, clips: bool, ahead: tuple | None
    ) -> tuple[float, np.ndarray]:
        loss, told = 0.0, []
        for place, part in enumerate(self._each("add", parts, update)):
            if place + 1 < len(parts):
                self._feeding.send(parts[place + 1])
            else:
                self._feeding.send_ahead(ahead)
            found = self._told(part)
            loss += found[0]
            told.append(found[1])
        for function in ("clip", "update") if clips else ("update",):
            self._runner.run(function)
        return loss, np.concatenate(told)

    def gradients(self, parts: Sequence[Part], update: int) -> None:
        """Makes the gradients those of a batch that is `ready`."""
        for _ in self._each("gradients", parts, update):
            pass

    def put(self, part: Part, update: int, turn: int = 0) -> None:
        """Puts a part where programs read it, and what dropouts drop in that pass of that update."""
        self._feeding.put(part)
        for name, array in self._draws(update, turn).items():
            self._runner.put(name, array)

    def _each(self, function: str, parts: Sequence[Part], update: int) -> Iterator[Part]:
        """Each part, after the function has begun to run on it."""
        if self.adds:
            self._runner.run("zero")
        for turn, part in enumerate(parts):
            self.put(part, update, turn)
            self._runner.run(self._named(function, part))
            yield part

    def _told(self, part: Part) -> tuple[float, np.ndarray]:
        """(share of the batch's loss, correct or else outputs) of the last run, of that part."""
        loss = float(self._runner.get("loss")[0])
        result = "correct" if self._compiled.facts.loss.tells_correct else "logits"
        return loss * part.share, self._runner.get(result).reshape(part.examples, -1)

    def _named(self, function: str, part: Part) -> str:
        return function_name(function, None if part.examples == self._whole else part.examples)

    def _needs(self, left: int, examples: int) -> bool:
        """Whether a program for what is left of so many is missing and can be made."""
        if left in self._kept:
            self._kept[left] = self._kept.pop(left)  # used last
            return False
        if self._compiled.fewer is None:
            raise InputError(
                f"{examples} examples came, and this step has code for {self._whole} at a time, and no compiler: give "
                f"it multiples of {self._whole} (drop_last), or build it for batches of another size or a smaller "
                "microbatch"
            )
        return isinstance(self._runner, Extends)  # what does not run here says so itself
