"""What forward computes from constants alone: tables of positions, masks of windows, indices."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx.node import map_arg


def folded(program: Any) -> dict[str, torch.Tensor]:
    """{node: its value} of a program without writes in place, of those that depend on no input, no parameter and no
    buffer of numbers that a state_dict has."""
    values: dict[str, Any] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.CONSTANT_TENSOR or (spec.kind is InputKind.BUFFER and not spec.persistent):
            values[spec.arg.name] = program.constants[spec.target]
        elif spec.kind is InputKind.BUFFER and not program.state_dict[spec.target].is_floating_point():
            values[spec.arg.name] = program.state_dict[spec.target]
    for node in program.graph.nodes:
        if node.op == "call_function" and _is_pure(node.target):
            if node.target is torch.ops.aten.full_like.default:  # of which the size alone counts
                like = node.meta["val"]
                values[node.name] = torch.full(like.shape, node.args[1], dtype=like.dtype)
            elif all(source.name in values for source in node.all_input_nodes):
                arguments, named = (map_arg(given, lambda one: values[one.name]) for given in (node.args, node.kwargs))
                values[node.name] = node.target(*arguments, **named)
    return {name: value.detach().cpu() for name, value in values.items() if isinstance(value, torch.Tensor)}


def _is_pure(target: Any) -> bool:
    if target is getitem:
        return True
    return isinstance(target, torch._ops.OpOverload) and not (
        torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable
    )
