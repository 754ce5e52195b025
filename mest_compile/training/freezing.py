"""Progressive freezing: which parts of a model stop training at which epoch, front to back, so that freezing saves a
given share of the run.

A part freezes once and stays frozen, at an epoch at which masks mutate, its learning rate having fallen to its end by
then. Source: SpFDE (Yuan et al., NeurIPS 2022, arXiv:2209.11204); how fast it proceeds there is not published, and the
ramp is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mest_compile.base import checks
from mest_compile.base.errors import UsageError

MEASURES = ("flops", "time")
SLACK = 1e-9  # by which a share may be missed: rounding of the sums that it is compared with


@dataclass(frozen=True, slots=True)
class FreezeRule:
    """How much freezing is to save, and between which epochs.

    share       of the training of the whole run that freezing saves, evaluation aside, 0 < share < 1
    of          what that is a share of: "flops", operations of convolutions and linear layers, or "time", the time of
                kernels as it is measured when the run begins
    begin, end  share of the epochs before the first part freezes, and before the last one does
    """

    share: float
    of: str = "flops"
    begin: float = 0.4
    end: float = 0.9

    def __post_init__(self) -> None:
        if not checks.is_number(self.share) or not 0 < self.share < 1:
            raise UsageError(f"the freezing's share must be a share between 0 and 1, not {checks.shown(self.share)}")
        object.__setattr__(self, "share", float(self.share))
        if self.of not in MEASURES:
            raise UsageError(f"the freezing's of is {checks.shown(self.of)}; wanted {' or '.join(map(repr, MEASURES))}")
        for name in ("begin", "end"):
            value = checks.number(f"the freezing's {name}", getattr(self, name))
            object.__setattr__(self, name, value)
        if not self.begin <= self.end <= 1:
            raise UsageError(
                f"the freezing begins at {self.begin:g} of the epochs and ends at {self.end:g}; wanted "
                "begin <= end <= 1"
            )

    def covers(self, epoch: int, epochs: int) -> bool:
        """Whether something may freeze before `epoch` (counted from 0) of `epochs`: never before the first."""
        return epoch > 0 and self.begin * epochs <= epoch <= self.end * epochs


def schedule(
    costs: Sequence[float], weights: Sequence[float], when: Sequence[int], share: float
) -> list[tuple[int, int]]:
    """[(epoch, parts that are frozen from it on)], in order, each with more parts than the one before.

    costs    of a step with none, one, two ... of the parts frozen, not rising; the last is of all that may freeze
    weights  of each epoch: its steps beside those of another
    when     epochs (from 0) before which parts may freeze, ascending
    share    of the run's cost that freezing is to save. It is met by at most one part at one of these epochs
    What is saved of a step rises evenly from the first of the epochs to the last, as far as whole parts allow: the
    slowest such ramp that saves enough. Ours. Raises UsageError where even all at the first epoch would not save it.
    """
    saved = [costs[0] - cost for cost in costs]
    total = costs[0] * sum(weights)
    spans = [sum(weights[start:end]) for start, end in zip(when, [*when[1:], len(weights)], strict=True)]

    def share_of(depths: Sequence[int]) -> float:
        return sum(span * saved[depth] for span, depth in zip(spans, depths, strict=True)) / total

    def ramp(height: float) -> list[int]:
        """Parts frozen after each of the epochs when the last step saves `height`."""
        allowed = [height * (place + 1) / len(when) * (1 + SLACK) for place in range(len(when))]
        return [max(depth for depth, gain in enumerate(saved) if gain <= most) for most in allowed]

    heights = sorted({gain * len(when) / (place + 1) for gain in saved[1:] for place in range(len(when))})
    depths = ramp(0.0)
    for height in heights:
        if share_of(depths) >= share - SLACK:
            break
        # The last epoch first: as many of what this height allows as are needed, and every ramp stays one.
        for place, depth in reversed(list(enumerate(ramp(height)))):
            while depths[place] < depth and share_of(depths) < share - SLACK:
                depths[place] += 1
    if (most := share_of(depths)) < share - SLACK:
        raise UsageError(
            f"the freezing's share is {share:g}, but all that may freeze, {len(saved) - 1} parts, saves {most:.3f} of "
            f"the run even from epoch {when[0] + 1} on; lower share, or let it begin earlier"
        )
    found: list[tuple[int, int]] = []
    for epoch, depth in zip(when, depths, strict=True):
        if depth > (found[-1][1] if found else 0):
            found.append((epoch, depth))
    return found
