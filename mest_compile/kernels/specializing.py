"""Specialized kernels: what a layer's index says about its structure, baked into its kernels as constants.

An indexed kernel reads from `pointers` how many units each group of rows has. Where all groups of a section have the
same number (dense layers, whole filters and channels, patterns), the number, and with it where each group begins, can
stand in the code: loops have known lengths, and no address waits for a load. Values, offsets and the order of additions
stay what they are, so both kernels give the same bits and can be exchanged between any two steps. It works on any
schedule's text, whatever its knobs; what a known length makes superfluous is not compiled (wide ResNet-32: filter a
quarter less, channel a third). The text gets one line, and whoever compiles it does the work (kernels/baking.py): the
thread that trains asks for many.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from mest_compile.kernels.source import KernelSource
from mest_compile.operators.layers.gather import GatherConv, GatherGrad

MOST_COPIES = (
    3  # loops over sections of equal length, each of which is code of its own; with more of them nothing is gained
)


@dataclass(frozen=True, slots=True)
class Structure:
    """counts: units of every group, one number a section; groups: those that have units, where rows are listed, else
    0."""

    counts: tuple[int, ...]
    groups: int = 0

    def __str__(self) -> str:
        return ", ".join(map(str, dict.fromkeys(self.counts))) + " units a group"


def structure_of(
    problem: GatherConv | GatherGrad, pointers: np.ndarray, live_groups: int | None = None
) -> Structure | str:
    """What can be baked for a problem under these pointers, or the reason why nothing can.

    live_groups  content of the buffer of that name, where rows are listed
    """
    passes = len(problem.passes) if isinstance(problem, GatherConv) else 1
    if passes > 1:
        return "its input gradient runs in several passes"
    counts = np.diff(pointers).reshape(problem.sections, problem.groups)
    if problem.rows_live:
        assert live_groups is not None
        counts = counts[:, :live_groups]
    if (counts != counts[:, :1]).any():
        return f"its groups have {counts.min()} to {counts.max()} units"
    found = tuple(int(count) for count in counts[:, 0])
    if min(found) == 0:
        return "a section of it has no units"
    if sum(1 for _ in itertools.groupby(found)) > MOST_COPIES:
        return f"its {len(found)} sections differ in length"
    return Structure(found, live_groups or 0)


def specialized(source: KernelSource, problem: GatherConv | GatherGrad, structure: Structure) -> KernelSource:
    """The kernel of `source` with `structure` baked in; equal structures give equal kernels."""
    facts = f"@baked(counts={structure.counts}, groups={problem.groups}, live={structure.groups})\n"
    # It takes the arguments of the indexed one, which were looked at.
    return replace(source, text=facts + source.text, checked=False)
