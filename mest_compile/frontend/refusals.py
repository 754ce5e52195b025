"""What of a model cannot be trained here: found in one pass over all of it, told in one error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from mest_compile.base.errors import Refusal, SpecError, UnsupportedOperator
from mest_compile.base.registry import Registry
from mest_compile.ir.graph import ForwardGraph

SUPPORTED = Registry("supported operator", "mest_compile.operators")
NAMED = 3  # layers of one operator that a message names


def unsupported(what: str, where: str = "", operator: str = "") -> UnsupportedOperator:
    """The error for an operator that has no training form here; `where` names the layer, for instance "in layer
    'act'", `operator` what people call it where `what` says more."""
    return _error([Refusal(what, where, operator or what)])


def dropout_error(p: float, where: str) -> UnsupportedOperator:
    return UnsupportedOperator(
        f"dropout with p={p} {where} trains differently from how it evaluates, which is not supported: "
        "set p to 0 or remove it"
    )


@dataclass(frozen=True)
class Origin:
    """Where in the model a Relax variable is from.

    where     "in layer 'act' (GELU)", for error messages
    operator  that the model's author called; "" where it is Relax's own
    several   whether it is made of several of the importer's operators, of which this is one
    trouble   why the importer does not take it, if it says so
    """

    where: str = ""
    operator: str = ""
    several: bool = False
    trouble: str = ""


class Refusals:
    """All that is refused of a model, in the order in which it was found."""

    def __init__(self) -> None:
        self.found: list[Refusal] = []

    def add(self, error: UnsupportedOperator) -> None:
        self.found += [one for one in error.refused if one not in self.found]

    @contextmanager
    def noted(self) -> Iterator[None]:
        """What is refused inside, where it ends, is noted and not raised."""
        try:
            yield
        except UnsupportedOperator as error:
            self.add(error)

    def words(self) -> str:
        """Of the error that `check` raises; "" when there are none."""
        return str(_error(self.found)) if self.found else ""

    def check(self) -> None:
        """Raises UnsupportedOperator when there are any."""
        if self.found:
            raise _error(self.found)


def _error(refused: Sequence[Refusal]) -> UnsupportedOperator:
    groups: dict[str, list[Refusal]] = {}
    for one in refused:
        if one.operator:
            groups.setdefault(one.operator, []).append(one)
    told = [one.what for one in refused if not one.operator]
    if groups:
        count = f"{len(groups)} operators cannot be trained here: " if len(groups) > 1 else ""
        listed = "; ".join(map(_group, groups.values())) + ("" if count else " cannot be trained here")
        told.append(f"{count}{listed}; supported: {', '.join(SUPPORTED.names())}")
    return UnsupportedOperator("; ".join(told), refused)


def _group(group: Sequence[Refusal]) -> str:
    """One operator: "hardswish in layer 'features.1.act' (Hardswish), 'features.4.act' and 12 more"."""
    first = group[0]
    layers = list(dict.fromkeys(repr(one.layer) for one in group if one.layer != first.layer))
    named = layers if len(layers) < NAMED else [*layers[: NAMED - 1], f"{len(layers) - NAMED + 1} more"]
    others = " and ".join(filter(None, [", ".join(named[:-1]), *named[-1:]]))
    sign = ", " if len(named) > 1 else " and "
    return f"{first.what} {first.where}".strip() + (f"{sign}{others}" if named else "")


def check_finite(graph: ForwardGraph, state: Mapping[str, np.ndarray]) -> None:
    """Raises SpecError when a weight that the graph uses is NaN or infinite."""
    used = [name for node in graph.nodes for name in node.params.values()]
    for name in used + [step.operand for step in graph.prepared if isinstance(step.operand, str)]:
        if wrong := np.count_nonzero(~np.isfinite(state[name])):
            raise SpecError(
                f"{wrong} of {state[name].size} values of {name} are NaN or infinite: load a state from before it "
                "diverged"
            )
