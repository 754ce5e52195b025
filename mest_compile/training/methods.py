"""Training methods: what their mutations prune and grow, and when."""

from __future__ import annotations

import math
from collections.abc import Callable

from mest_compile.sparsity.mutation import Phase

# The paper's ResNet-32 schedule: a mutation every 5 of 160 epochs, phases switch at epochs 90 and 120.
PAPER_EPOCHS, PAPER_MUTATE_EVERY, PAPER_SWITCHES = 160, 5, (90, 120)

# SET replaces 30% of the live weights at every mutation; RigL starts with as many, falls by a cosine and stops at three
# quarters.
DROP_SHARE, RIGL_END = 0.3, 0.75

# The method that begins with all weights and only prunes; shares of the epochs between which it does. The last quarter
# trains what is left.
GRADUAL = "gradual"
PRUNE_BEGIN, PRUNE_END = 0.0, 0.75


def _em(sparsity: float, epochs: int, interval: int) -> tuple[Phase, ...]:
    """Prune 20%, 10%, 0% of the live units beyond the target and grow them back: the paper's table at 90% and 95%, for
    any target."""
    return _scaled([(sparsity + share * (1 - sparsity), sparsity) for share in (0.2, 0.1, 0.0)], epochs)


def _em_s(sparsity: float, epochs: int, interval: int) -> tuple[Phase, ...]:
    """Grow 0.05, 0.025, 0 of all units beyond the target: the paper's table, the same at 90% and 95%."""
    return _scaled([(sparsity, max(0.0, sparsity - excess)) for excess in (0.05, 0.025, 0.0)], epochs)


def _set(sparsity: float, epochs: int, interval: int) -> tuple[Phase, ...]:
    """The same share of the live units every time. Source: Mocanu et al., arXiv:1707.04780."""
    return (_phase(epochs, _fewer(sparsity, DROP_SHARE), sparsity),)


def _rigl(sparsity: float, epochs: int, interval: int) -> tuple[Phase, ...]:
    """A share that falls by a cosine to 0 at RIGL_END of training, a phase for each mutation. Source: Evci et al.,
    arXiv:1911.11134."""
    end = RIGL_END * epochs
    starts = [0, *range(interval, epochs, interval)]
    shares = [0.5 * DROP_SHARE * (1 + math.cos(math.pi * start / end)) if start < end else 0.0 for start in starts]
    return tuple(
        _phase(until, _fewer(sparsity, share), sparsity)
        for until, share in zip([*starts[1:], epochs], shares, strict=True)
    )


def _gradual(
    sparsity: float, epochs: int, interval: int, begin: float = PRUNE_BEGIN, end: float = PRUNE_END
) -> tuple[Phase, ...]:
    """s (1 - (1 - t)^3), where t goes from 0 to 1 between `begin` and `end`, shares of the epochs; a phase for each
    mutation, the first with all weights. Source: Zhu and Gupta, arXiv:1710.01878, equation 1."""
    first = begin * epochs
    last = max(1, min(round(end * epochs), epochs - 1))
    starts = [*(epoch for epoch in range(interval, last, interval) if epoch > first), last]
    reached = [sparsity * (1 - (1 - (start - first) / (last - first)) ** 3) for start in starts[:-1]] + [sparsity]
    return (
        _phase(starts[0], 0.0, 0.0),
        *(_phase(until, share, share) for until, share in zip([*starts[1:], epochs], reached, strict=True)),
    )


def _fewer(sparsity: float, share: float) -> float:
    """The sparsity when that share of the live units is gone."""
    return sparsity + share * (1 - sparsity)


def _phase(until: int, prune_to: float, grow_to: float) -> Phase:
    return Phase(
        until, round(prune_to, 6), round(grow_to, 6)
    )  # six digits: 0.9 + 0.2 * (1 - 0.9) is to read 0.92 in the run folder


# method -> phases of (target sparsity, epochs, epochs between mutations), of gradual also of when pruning begins and
# ends; None: the mask never changes
METHODS: dict[str, Callable[..., tuple[Phase, ...]] | None] = {
    "static": None,
    "em": _em,
    "em_s": _em_s,
    "set": _set,
    "rigl": _rigl,
    GRADUAL: _gradual,
}


def _scaled(pairs: list[tuple[float, float]], epochs: int) -> tuple[Phase, ...]:
    """Phases with the paper's switches in proportion; the last phase, which makes the model exact, always gets the last
    epoch."""
    ends = [*(min(round(switch * epochs / PAPER_EPOCHS), epochs - 1) for switch in PAPER_SWITCHES), epochs]
    starts = [0, *ends[:-1]]
    return tuple(_phase(end, *pair) for pair, start, end in zip(pairs, starts, ends, strict=True) if start < end)
