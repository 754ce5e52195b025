"""torch.optim's optimizers, read as ours where they say something that ours do. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mest_compile.base.errors import UsageError
from mest_compile.operators.optimizers.groups import Group
from mest_compile.operators.optimizers.optimizer import OPTIMIZERS, Optimizer

# Options that decide how torch computes, not what.
SAYS_NOTHING = frozenset(("params", "param_names", "foreach", "fused", "capturable", "differentiable", "initial_lr"))
OF_GROUPS = ("lr", "weight_decay")  # options that may differ between groups


def from_torch(given: Any, parameters: Mapping[str, Any]) -> Optimizer:
    """An optimizer of torch with the same rule, hyper-parameters and groups.

    parameters  {torch name: parameter} of the model that is compiled
    Raises UsageError, naming what ours cannot say.
    """
    kind = type(given).__name__
    groups = [dict(group) for group in given.param_groups]
    options = {name: value for name, value in groups[0].items() if name not in SAYS_NOTHING}
    ours = _class_of(given, options)
    _, fields, wanted = ours.torch
    if given.state:
        raise UsageError(f"the {kind} has made steps already, and what it keeps is not taken; give a new one")
    for group in groups:
        for name, value in group.items():
            if name in SAYS_NOTHING:
                continue
            if name in wanted:
                if value != wanted[name]:
                    raise UsageError(f"{kind} has {name}={value}, which a step cannot do; wanted {name}={wanted[name]}")
            elif name not in fields:
                raise UsageError(f"{kind} has {name}={value}, which mest.{ours.__name__} does not know; leave it out")
            elif name not in OF_GROUPS and value != options[name]:
                raise UsageError(
                    f"{kind} has groups with {name}={options[name]} and with {name}={value}; groups of a step differ "
                    "in lr and weight_decay alone"
                )
    made: Optimizer = ours(**{ours_name: _number(options[name]) for name, ours_name in fields.items()})
    names = _names(kind, groups, parameters)
    if len(groups) == 1:
        return made
    if made.lr == 0:
        raise UsageError(f"the first group of {kind} has lr=0, of which no other is a multiple; put another one first")
    others = tuple(
        Group(tuple(map(_escaped, listed)), _number(group["lr"]) / made.lr, _number(group["weight_decay"]))
        for group, listed in zip(groups[1:], names[1:], strict=True)
    )
    return replace(made, groups=others)


def check_trains(given: Any, parameters: Mapping[str, Any], trained: Iterable[str]) -> None:
    """Raises UsageError where an optimizer of torch leaves out one of the parameters of these names, which train."""
    known = {id(parameter) for group in given.param_groups for parameter in group["params"]}
    if left := [name for name in trained if id(parameters[name]) not in known]:
        more = f", and {len(left) - 1} more" if len(left) > 1 else ""
        raise UsageError(
            f"{type(given).__name__} leaves {left[0]} as it is{more}; a step updates all that trains: give it all of "
            "model.parameters(), or freeze what is to stay"
        )


def _class_of(given: Any, options: Mapping[str, Any]) -> type[Optimizer]:
    kind = type(given)
    name = kind.__name__
    if name == "Adam" and options.get("decoupled_weight_decay"):
        name = "AdamW"
    known = {one.torch[0]: one for one in OPTIMIZERS.load().values()}
    if name not in known or not kind.__module__.startswith("torch.optim"):
        raise UsageError(
            f"optimizer is torch's {kind.__module__}.{kind.__name__}; of torch a step takes {', '.join(sorted(known))}"
        )
    return known[name]


def _names(kind: str, groups: list[dict[str, Any]], parameters: Mapping[str, Any]) -> list[list[str]]:
    """Names of each group's parameters, which are the model's."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    names = []
    for group in groups:
        if any(id(parameter) not in name_of for parameter in group["params"]):
            raise UsageError(
                f"{kind} has a parameter that is none of the model's; make the optimizer of model.parameters()"
            )
        names.append([name_of[id(parameter)] for parameter in group["params"]])
    return names


def _number(value: Any) -> Any:
    """A tensor's, where torch keeps one."""
    return value.item() if hasattr(value, "item") else value


def _escaped(name: str) -> str:
    """A pattern of that name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
