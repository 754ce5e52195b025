"""Weights back into the ONNX file that a model was read from: where and as they were stored, all else as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import StateError
from mest_compile.frontend.onnx_import import load_model, read_as_stored
from mest_compile.frontend.refusals import Refusals
from mest_compile.ir.graph import ForwardGraph


def written_into(path: str | Path, graph: ForwardGraph, state: Mapping[str, np.ndarray]) -> Any:
    """The file's onnx.ModelProto with that state in the place of its own.

    graph  of the model that the state is of
    Raises StateError where the file holds another model, DataError, UnsupportedOperator.
    """
    from onnx import numpy_helper

    refusals = Refusals()
    theirs, stored, transposed, moved = read_as_stored(path, graph.input_shape, refusals)
    refusals.check()
    if (theirs.nodes, theirs.prepared) != (graph.nodes, graph.prepared):
        pairs = zip(graph.nodes, theirs.nodes, strict=False)
        odd = next((node.name for node, other in pairs if node != other), "the number of operators")
        raise StateError(
            f"{path} is not the model that the step was compiled from: they differ in {odd}; leave `into` out to write "
            "a file of its own"
        )
    model = load_model(path)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, tensor in _places(model.graph, held):
        if name in stored and name in state:
            _fill(tensor, state[name].T if name in transposed else state[name])
        if parts := {part: one.places for part, one in moved.items() if one.source == name and part in state}:
            array = numpy_helper.to_array(tensor).copy()
            for part, places in parts.items():
                array.ravel()[places] = state[part]
            _fill(tensor, array)
    return model


def _places(graph: Any, held: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name of a weight, the tensor that holds it); what is a copy of an initializer becomes a constant of its own."""
    from onnx import helper, numpy_helper

    yield from held.items()
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in held:
            value = helper.make_attribute("value", held[node.input[0]])
            node.op_type = "Constant"
            del node.input[:]
            node.attribute.append(value)
        if node.op_type != "Constant":
            continue
        attribute = node.attribute[0]
        if attribute.name == "value_floats":
            tensor = numpy_helper.from_array(np.array(attribute.floats, np.float32))
            attribute.CopyFrom(helper.make_attribute("value", tensor))
        if attribute.name == "value":
            yield node.output[0], attribute.t


def _fill(tensor: Any, array: np.ndarray) -> None:
    """Gives the tensor other values of the same type and shape."""
    from onnx import numpy_helper

    assert tuple(tensor.dims) == array.shape, f"{tensor.name} is stored as {tuple(tensor.dims)}, not {array.shape}"
    tensor.ClearField("float_data")
    tensor.raw_data = numpy_helper.from_array(np.ascontiguousarray(array)).raw_data
