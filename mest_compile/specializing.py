"""Specialized kernels: what a layer's index says about its structure, baked into the text of its kernels as constants.

An indexed kernel reads from `pointers` how many units each group of rows has. Where all groups of a section have the same number (dense
layers, whole filters and channels, patterns), the number, and with it where each group begins, can stand in the code: loops have known
lengths, and no address waits for a load. Values, offsets and the order of additions stay what they are, so both kernels give the same bits
and can be exchanged between any two steps. It works on any schedule's text, whatever its knobs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from mest_compile.building import KernelSource
from mest_compile.operators.gather import GatherConv, GatherGrad

MOST_COPIES = 8  # sections of different lengths, each of which gets code of its own


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
    if len(set(found)) > 1 and len(found) > MOST_COPIES:
        return f"its {len(found)} sections differ in length"
    return Structure(found, live_groups or 0)


def specialized(source: KernelSource, problem: GatherConv | GatherGrad, structure: Structure) -> KernelSource:
    """The kernel of `source` with `structure` baked in; equal structures give equal kernels."""
    counts, groups = structure.counts, structure.groups or problem.groups
    if len(set(counts)) == 1:
        def start(index: str, section: str) -> str:
            # Only the first `groups` groups of a section have units, which stand without a gap.
            return f"(({index}) - {section} * {problem.groups - groups}) * {counts[0]}"
    else:
        def start(index: str, section: str) -> str:
            found = _run(index, section, problem.groups, counts, groups, len(counts) - 1)
            for number in reversed(range(len(counts) - 1)):
                found = f"T.Select({section} == {number}, {_run(index, section, problem.groups, counts, groups, number)}, {found})"
            return found

    lines = source.text.split("\n")
    body = next(number for number, line in enumerate(lines) if line.startswith("def kernel(")) + 1
    text = "\n".join(lines[:body]) + "\n" + _POINTER.sub(lambda found: start(found[1], "section"), "\n".join(lines[body:]))
    if len(set(counts)) > 1:
        text = re.sub(r"\bfor section in T\.serial\(", "for section in T.unroll(", text)
        text = _SECTION_GRID.sub(r"\1for section in T.unroll(\2):\n\1 for turn in T.serial(\3):", text)
    if structure.groups:
        text = text.replace("live_groups[0]", str(structure.groups))
    return replace(source, text=text)


_POINTER = re.compile(r"\bpointers\[([^\[\]]*)\]")
_SECTION_GRID = re.compile(r"^( *)for section, turn in T\.grid\((\d+), (.*)\):$", re.MULTILINE)


def _run(index: str, section: str, all_groups: int, counts: tuple[int, ...], groups: int, number: int) -> str:
    """Where the units of a group of section `number` begin; `index` counts groups through all sections."""
    return f"({sum(counts[:number]) * groups} + (({index}) - {section} * {all_groups}) * {counts[number]})"
