"""The net that is fine-tuned: a pretrained one as a graph, which takes pixels and tells the user's classes apart."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import SpecError, UsageError
from mest_compile.finetuning.importing import imported
from mest_compile.ir.graph import ForwardGraph, Node, Preparation
from mest_compile.kernels.cache import Builder
from mest_compile.models.inputs import Inputs
from mest_compile.models.pretrained import PRETRAINED
from mest_compile.models.sources import packaged_inputs

MOMENTUM = 0.1  # torch's own; at the 0.01 of TensorFlow's nets 200 steps leave an eighth of the old statistics


@dataclass(frozen=True, slots=True)
class Net:
    """graph: of a batch of pixels 0 to 255, which it scales itself; state: its weights by torch name; head: names of
    the classifier's parameters."""

    graph: ForwardGraph
    state: Mapping[str, np.ndarray]
    inputs: Inputs
    head: tuple[str, ...]

    def crc32(self) -> int:
        """Tells whether another net has the same weights."""
        crc = 0
        for name, value in self.state.items():
            crc = zlib.crc32(np.ascontiguousarray(value).data, zlib.crc32(name.encode(), crc))
        return crc


def wanted_inputs(model: Any, inputs: Inputs | None, weights: Any, image: tuple[int, int, int] | None) -> Inputs:
    """How photos become the net's images. image: (channels, height, width), where they are to have another size. Raises
    UsageError where nobody says how its pixels were scaled."""
    if inputs is None:
        inputs = packaged_inputs(model) if weights is None and isinstance(model, str) else None
        if weights is None and isinstance(model, str) and model in PRETRAINED:
            inputs = PRETRAINED[model].inputs
        if inputs is None:
            raise UsageError(
                "nobody says how the net's images were scaled: give inputs=mest.Inputs(size, crop, mean, std), on the "
                "command line --image, --mean and --std, in pixels 0 to 255"
            )
    if image is None:
        return inputs
    if image[0] != inputs.channels:
        raise UsageError(f"the net takes {inputs.channels} channels, not {image[0]}; give {inputs.channels}xHxW")
    return replace(inputs, size=image[1:])


def prepared_net(
    model: Any, inputs: Inputs, batch: int, classes: int, weights: str | Path | None, builder: Builder
) -> Net:
    """A net for images of `inputs` and so many classes; where it told others apart, its classifier begins at 0.

    model, weights  as `importing.imported` takes them
    Raises SpecError, and what that does.
    """
    shape = (batch, inputs.channels, *inputs.size)
    graph, state = imported(model, shape, weights, builder)
    graph, state, head = _with_classes(graph, state, classes)
    graph = replace(graph, nodes=tuple(map(_quicker, graph.nodes)))
    scaled = (Preparation("subtract", inputs.mean), Preparation("divide", inputs.std))
    return Net(replace(graph, prepared=(*scaled, *graph.prepared)), state, inputs, head)


def _quicker(node: Node) -> Node:
    """With running statistics that follow new images within one fine-tuning."""
    if node.op != "batch_norm":
        return node
    return replace(node, attrs={**node.attrs, "momentum": max(MOMENTUM, node.attrs["momentum"])})


def _with_classes(
    graph: ForwardGraph, state: Mapping[str, np.ndarray], classes: int
) -> tuple[ForwardGraph, dict[str, np.ndarray], tuple[str, ...]]:
    """The same net with so many outputs. Raises SpecError where it does not end with a linear layer."""
    last = graph.nodes[-1]
    if last.op != "linear":
        raise SpecError(
            f"the net ends with {last.op} in {last.name}; wanted a linear layer, an output a class, which can be "
            "replaced: leave what comes behind it out"
        )
    roles = {role: last.params[role] for role in ("weight", "bias") if role in last.params}
    shared = [name for name in roles.values() if sum(name in node.params.values() for node in graph.nodes) > 1]
    if shared:
        raise SpecError(f"{shared[0]} is also used by another layer, so that the classifier cannot be replaced")
    if last.shape[1] == classes:
        return graph, dict(state), tuple(roles.values())
    sizes = {roles[role]: (classes, *graph.state_shapes[roles[role]][1:]) for role in roles}
    nodes = (*graph.nodes[:-1], replace(last, shape=(last.shape[0], classes)))
    changed = replace(graph, nodes=nodes, state_shapes={**graph.state_shapes, **sizes})
    fresh = {name: np.zeros(shape, np.float32) for name, shape in sizes.items()}
    return changed, {**state, **fresh}, tuple(roles.values())
