"""Drafts of nodes become nodes with names: those that the logits need, in order, each layer under its torch path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mest_compile.base.errors import SpecError, UnsupportedOperator
from mest_compile.ir.graph import LAYERS, Node, Preparation

INPUT = "input"  # what nodes call the graph's input
REFUSED = "refused"  # drafts and nodes of what cannot be trained; attrs: operator, and error, why, if it says so first
PREPARE = "prepare"  # drafts of what the model does to its input first; attrs: step, a Preparation
# What a step calls its own arrays; it holds a parameter under the parameter's name.
TAKEN = ("images", "labels", "loss", "correct", "logits", "hyper")


@dataclass(frozen=True)
class Draft:
    """A node before it has a name; inputs are places in the list of drafts, -1 the graph's input."""

    op: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    params: dict[str, str] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)


def needed(drafts: Sequence[Draft], last: Sequence[int]) -> list[int]:
    """Places of the drafts that those at the places `last` need, and theirs; in topological order, in which they are
    made."""
    found, pending = set(), list(last)
    while pending:
        index = pending.pop()
        if index >= 0 and index not in found:
            found.add(index)
            pending.extend(drafts[index].inputs)
    return sorted(found)


def name_nodes(drafts: Sequence[Draft], last: int) -> tuple[Node, ...]:
    """The drafts that the logits, at place `last`, need. Raises SpecError."""
    order = needed(drafts, [last])
    if not any(drafts[index].op in LAYERS for index in order):
        raise SpecError("there is nothing to train: the model's output depends on no convolution and no linear layer")
    layers = {
        index: drafts[index].params["weight"].removesuffix(".weight")
        for index in order
        if "weight" in drafts[index].params
    }
    taken = {INPUT, *layers.values()}
    names = {-1: INPUT}
    for index, path in layers.items():
        names[index] = path if path != INPUT else _free(path, taken)
    counts: dict[str, int] = {}
    for index in order:
        while index not in names:
            op = drafts[index].op
            counts[op] = counts.get(op, 0) + 1
            if (name := f"{op}_{counts[op]}") not in taken:
                names[index] = name
                taken.add(name)
    return tuple(
        Node(
            draft.op,
            names[index],
            tuple(names[source] for source in draft.inputs),
            draft.shape,
            draft.params,
            draft.attrs,
        )
        for index in order
        for draft in [drafts[index]]
    )


def split_prepared(nodes: tuple[Node, ...]) -> tuple[tuple[Preparation, ...], tuple[Node, ...]]:
    """(what becomes of the input before the others see it, the others). Raises UnsupportedOperator."""
    chain, rest = ([node for node in nodes if (node.op == PREPARE) is wanted] for wanted in (True, False))
    if not chain:
        return (), nodes
    names = [INPUT, *(node.name for node in chain)]
    if [node.inputs for node in chain] != [(name,) for name in names[:-1]] or any(
        name in names[:-1] for node in rest for name in node.inputs
    ):
        raise UnsupportedOperator(
            "the input is normalised for some layers and not, or otherwise, for others: normalise it once, for all"
        )
    named = {names[-1]: INPUT}
    return tuple(node.attrs["step"] for node in chain), tuple(
        replace(node, inputs=tuple(named.get(name, name) for name in node.inputs)) for node in rest
    )


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def check_parameters(drafts: Sequence[Draft], last: int) -> None:
    """Raises UnsupportedOperator where two operators that the logits need share a parameter, SpecError for names that
    a step cannot have."""
    used = [name for index in needed(drafts, [last]) for name in drafts[index].params.values()]
    seen: set[str] = set()
    for name in used:
        if name in seen:
            raise UnsupportedOperator(
                f"{name} is used by two operators; shared weights cannot be trained here: give each operator its own"
            )
        seen.add(name)
    for name in used:
        if name in TAKEN or (":" in name and name.rpartition(":")[0] in seen):
            raise SpecError(
                f"{name!r} cannot be a parameter's name here, a step calls an array of its own so: rename it in "
                "the model"
            )
