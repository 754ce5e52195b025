"""Specialized kernels: what a layer's index says about its structure, baked into the text of its kernels as constants.

An indexed kernel reads from `pointers` how many units each group of rows has. Where all groups of a section have the same number (dense
layers, whole filters and channels, patterns), the number, and with it where each group begins, can stand in the code: loops have known
lengths, and no address waits for a load. Values, offsets and the order of additions stay what they are, so both kernels give the same bits
and can be exchanged between any two steps. It works on any schedule's text, whatever its knobs.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace

import numpy as np

from mest_compile.building import KernelSource
from mest_compile.operators.gather import GatherConv, GatherGrad

MOST_RUNS = 3  # of sections of equal length, one behind the other; with more of them nothing is gained


@dataclass(frozen=True, slots=True)
class Structure:
    """counts: units of every group, one number a section; groups: those that have units, where rows are listed, else 0."""

    counts: tuple[int, ...]
    groups: int = 0

    def __str__(self) -> str:
        return ", ".join(map(str, dict.fromkeys(self.counts))) + " units a group"


def structure_of(problem: GatherConv | GatherGrad, pointers: np.ndarray, live_groups: int | None = None) -> Structure | str:
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
    if sum(1 for _ in itertools.groupby(found)) > MOST_RUNS:
        return f"its {len(found)} sections differ in length"
    return Structure(found, live_groups or 0)


def specialized(source: KernelSource, problem: GatherConv | GatherGrad, structure: Structure) -> KernelSource:
    """The kernel of `source` with `structure` baked in; equal structures give equal kernels.

    Sections of several lengths share one loop, whose length is chosen a section: a loop for each would take half as long again to compile.
    """
    groups, lines = structure.groups or problem.groups, source.text.split("\n")
    (head,) = (number for number, line in enumerate(lines) if _SECTIONS.match(line))
    indent = re.match(" *", lines[head]).group()  # type: ignore[union-attr]
    end = next((number for number in range(head + 1, len(lines)) if not lines[number].startswith(indent + " ")), len(lines))
    count, begun, first, units = "", "", 0, 0  # the section and the unit that the next run begins at
    for length, run in itertools.groupby(structure.counts):
        each, last = length * groups, first + len(list(run))
        start = f"section * {each}" + (f" + {units - first * each}" if units != first * each else "")
        more = last < problem.sections
        count += f"T.Select(section < {last}, {length}, " if more else str(length) + ")" * count.count("Select")
        begun += f"T.Select(section < {last}, {start}, " if more else start + ")" * begun.count("Select")
        first, units = last, units + (last - first) * each
    body = lines[head + 1:end]
    if len(set(structure.counts)) > 1:
        body = [re.match(" *", body[0]).group() + f"section_units: T.let = {count}", *body]  # type: ignore[union-attr]
        count = "section_units"
    baked = _COUNT.sub(count, "\n".join(body))
    text = "\n".join([*lines[:head + 1], _POINTER.sub(rf"({begun} + (\1 - section * {problem.groups}) * {count})", baked), *lines[end:]])
    if structure.groups:
        text = text.replace("live_groups[0]", str(structure.groups))
    assert not _POINTER.search(text), f"{source.kernel} reads pointers outside its loop over sections"
    return replace(source, text=text, checked=False)  # it takes the arguments of the indexed one, which was


_SECTIONS = re.compile(r" *for section(?: in T\.serial|, [a-z, ]+ in T\.grid)\(")
_POINTER = re.compile(r"\bpointers\[([^\[\]]*)\]")
_COUNT = re.compile(r"\(pointers\[([^\[\]]*) \+ 1\] - pointers\[\1\]\)")
