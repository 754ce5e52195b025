"""Specialized kernels: what a layer's index says about its structure, baked into the text of its kernels as constants.

An indexed kernel reads from `pointers` how many units each group of rows has. Where all groups of a section have the
same number (dense layers, whole filters and channels, patterns), the number, and with it where each group begins, can
stand in the code: loops have known lengths, and no address waits for a load. Values, offsets and the order of additions
stay what they are, so both kernels give the same bits and can be exchanged between any two steps. It works on any
schedule's text, whatever its knobs; what a known length makes superfluous goes from it, as there is then less to
compile (wide ResNet-32: filter a quarter, channel a third).
"""

from __future__ import annotations

import itertools
import re
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
    """The kernel of `source` with `structure` baked in; equal structures give equal kernels.

    Neighbouring sections of equal length share one loop over them, so a layer whose last section alone is shorter has
    two.
    """
    groups, lines = structure.groups or problem.groups, source.text.split("\n")
    (head,) = (number for number, line in enumerate(lines) if _SECTIONS.match(line))
    indent, names, extents = _SECTIONS.match(lines[head]).group(1, 2, 3)  # type: ignore[union-attr]
    end = next(
        (number for number in range(head + 1, len(lines)) if not lines[number].startswith(indent + " ")), len(lines)
    )
    body = "\n".join(lines[head + 1 : end])
    loops, first, begun = [], 0, 0  # the section and the unit that the next loop begins at
    for count, run in itertools.groupby(structure.counts):
        many = len(list(run))
        loops.append(f"{indent}for section in T.serial({first}, {first + many}):")
        if names:
            loops.append(f"{indent} for {names} in T.{'grid' if ',' in names else 'serial'}({extents}):")
        # Unit (index - section * all groups) of a section, sections of `groups` groups standing without a gap.
        base = f"{begun - first * groups * count} + " if begun != first * groups * count else ""
        gap = f" - section * {(problem.groups - groups) * count}" if groups < problem.groups else ""
        loops.append(_POINTER.sub(rf"({base}(\1) * {count}{gap})", _shortened(_COUNT.sub(str(count), body))))
        first, begun = first + many, begun + many * groups * count
    text = "\n".join([*lines[:head], *loops, *lines[end:]])
    if structure.groups:
        text = text.replace("live_groups[0]", str(structure.groups))
    assert not _POINTER.search(text), f"{source.kernel} reads pointers outside its loop over sections"
    return replace(source, text=text, checked=False)  # it takes the arguments of the indexed one, which was


def _shortened(body: str) -> str:
    """Lines of known lengths without the loops that never turn, and with one loop over all units where one over rounds
    of several was followed by one over those that remain: LLVM unrolls it as far as that pays.
    """
    body = _REST.sub("unit", _ROUNDS.sub(r"\1for unit in T.serial(\2):", body))
    return _BATCHES.sub(
        lambda loop: loop[0] if eval(loop[2]) else "", body
    )  # digits, brackets, divisions and remainders only


_SECTIONS = re.compile(r"^( *)for section(?: in T\.serial\(\d+\)|, ([a-z, ]+) in T\.grid\(\d+, (.*)\)):$")
_POINTER = re.compile(r"\bpointers\[([^\[\]]*)\]")
_COUNT = re.compile(r"\(pointers\[([^\[\]]*) \+ 1\] - pointers\[\1\]\)")
_ROUNDS = re.compile(
    r"^( *)for round in T\.serial\((\d+) // (\d+)\):\n(?:\1 .*\n)+\1for unit in T\.serial\(\2 % \3\):$", re.MULTILINE
)
_REST = re.compile(r"\(\d+ // (\d+) \* \1 \+ unit\)")
_BATCHES = re.compile(r"^( *)for several in T\.serial\(([\d()%/ ]+)\):\n(?:\1 .*(?:\n|$))+", re.MULTILINE)
