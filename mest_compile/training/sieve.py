"""The data sieve: which training examples stay, by how often training has forgotten them.

A forgetting event is a step from right to wrong between two presentations of one example (Toneva et al., ICLR 2019),
counted in the results of ordinary training steps, under augmentation and while masks mutate. MEST (arXiv:2110.14032)
drops the least forgotten examples once; SpFDE (NeurIPS 2022) again and again, what was dropped before coming back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import StateError, UsageError

# MEST counts in the first 70 of 160 epochs, then drops.
PAPER_SHARE = 70 / 160
LAST_BIN = 10  # of the histogram: this many events or more


@dataclass(frozen=True, slots=True)
class SieveRule:
    """When which examples are dropped. Exactly one of `drop` and `forgets_at_most` is given.

    drop             share of all examples, of which those least often forgotten go
    forgets_at_most  all examples with at most this many forgetting events go
    after_epoch      epochs before the first drop; None: the paper's 70 of 160, in proportion
    every            epochs between further drops, before each of which all dropped examples come back; None: there is
                     one drop
    Examples that were never right are never dropped.
    """

    drop: float | None = None
    forgets_at_most: int | None = None
    after_epoch: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if (self.drop is None) == (self.forgets_at_most is None):
            raise UsageError(
                "a sieve takes either drop (share of the examples) or forgets_at_most (forgetting events), one "
                "of the two"
            )
        if self.drop is not None:
            if not checks.is_number(self.drop) or not 0 < self.drop < 1:
                raise UsageError(f"the sieve's drop must be a share between 0 and 1, not {checks.shown(self.drop)}")
            object.__setattr__(self, "drop", float(self.drop))
        if self.drop is not None and self.every is not None and self.drop > 0.5:
            raise UsageError(
                f"a repeated sieve drops others than the last time and so at most half of the examples, not {self.drop}"
            )
        for name, low in ("forgets_at_most", 0), ("after_epoch", 1), ("every", 1):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checks.whole(f"the sieve's {name}", getattr(self, name), low))

    def first(self, epochs: int) -> int:
        """Epochs of `epochs` before the first drop."""
        return max(1, round(PAPER_SHARE * epochs)) if self.after_epoch is None else self.after_epoch

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether examples are dropped before `epoch` (counted from 0) of `epochs`."""
        first = self.first(epochs)
        return epoch == first or (self.every is not None and epoch > first and (epoch - first) % self.every == 0)


@dataclass(slots=True)
class Sieve:
    """Counts of every training example, and which of them are trained on.

    forgets  (examples,) int32 forgetting events
    right    (examples,) bool, whether the last presentation was answered rightly
    learned  (examples,) bool, whether any was
    kept     (examples,) bool
    """

    examples: int
    forgets: np.ndarray = field(init=False)
    right: np.ndarray = field(init=False)
    learned: np.ndarray = field(init=False)
    kept: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.forgets = np.zeros(self.examples, np.int32)
        self.right, self.learned = np.zeros(self.examples, bool), np.zeros(self.examples, bool)
        self.kept = np.ones(self.examples, bool)

    def count(self, indices: np.ndarray, correct: np.ndarray) -> None:
        """One batch's results. indices (batch,) int, no example twice; correct (batch,) bool."""
        correct = np.asarray(correct, bool)
        self.forgets[indices] += self.right[indices] & ~correct
        self.right[indices] = correct
        self.learned[indices] |= correct

    def drop(self, rule: SieveRule, rng: np.random.Generator, at_least: int = 0) -> dict[str, Any]:
        """Drops by the rule and says what came of it, ready for JSON. Examples dropped before come back.

        at_least  examples that stay whatever the rule says, those forgotten most often: a batch. "spared": how many owe
                  it that they do
        Of equally often forgotten examples the generator chooses, so that data sets sorted by class do not lose one
        class. A share is met exactly, unless fewer trained examples were ever right.
        """
        before = self.kept
        candidates = np.flatnonzero(before & self.learned)
        shuffled = rng.permutation(candidates)
        ranked = shuffled[np.argsort(self.forgets[shuffled], kind="stable")]
        if rule.drop is None:
            chosen = ranked[self.forgets[ranked] <= rule.forgets_at_most]
        else:
            chosen = ranked[: round(rule.drop * self.examples)]
        spared = max(0, len(chosen) - max(0, self.examples - at_least))
        chosen = chosen[: len(chosen) - spared]
        self.kept = np.ones(self.examples, bool)
        self.kept[chosen] = False
        return {
            "dropped": len(chosen),
            "returned": int((~before).sum()),
            "kept": int(self.kept.sum()),
            "spared": spared,
            "counts": self.histogram(),
        }

    def histogram(self) -> dict[str, int]:
        """{forgetting events: examples}; examples that were never right count as "never learned"."""
        counts = np.bincount(np.minimum(self.forgets[self.learned], LAST_BIN), minlength=LAST_BIN + 1)
        names = [*map(str, range(LAST_BIN)), f"{LAST_BIN} or more"]
        return {"never learned": int((~self.learned).sum()), **dict(zip(names, counts.tolist(), strict=True))}

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps."""
        return {f"sieve.{name}": getattr(self, name) for name in ("forgets", "right", "learned", "kept")}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises StateError when the arrays are not those of as many examples."""
        for name in ("forgets", "right", "learned", "kept"):
            array = arrays.get(f"sieve.{name}")
            if array is None or array.shape != (self.examples,):
                raise StateError(
                    f"the checkpoint's sieve is not one of {self.examples} examples; resume with the run's own data"
                )
            setattr(self, name, array.astype(getattr(self, name).dtype))
