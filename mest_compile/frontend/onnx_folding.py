"""What of an ONNX graph follows from the input's size alone becomes constants.

Exporters compute sizes where torch has numbers: a pad's widths or a chunk's parts are a dozen operators there, which
TVM's importer imports in part.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MEASURES = ("Shape", "Size")


def fold_sizes(model: Any) -> None:
    """Replaces what sizes and other numbers alone go into, in place. Weights are left as they are: an array of floats
    counts only where it was made of numbers."""
    while _fold_once(model):
        pass


def factors_to_constants(graph: Any) -> set[str]:
    """Makes Constant nodes of the initializers that tell a Resize its factors; returns the names of all values that
    do, of which some look like weights."""
    from onnx import helper

    told = {name for node in graph.node if node.op_type in ("Resize", "Upsample") for name in node.input[1:]}
    for node in reversed(graph.node):
        if told.intersection(node.output) and node.op_type not in MEASURES:
            told.update(node.input)
    for tensor in [tensor for tensor in graph.initializer if tensor.name in told and not _is_size(tensor)]:
        graph.initializer.remove(tensor)
        graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    return told


def _fold_once(model: Any) -> bool:
    """Folds what the shapes tell that are known by now; whether it was anything."""
    from onnx import helper, numpy_helper

    graph, changed = model.graph, False
    known = {tensor.name: tensor for tensor in graph.initializer if _is_size(tensor)}
    sizes = shapes(model) if any(node.op_type in MEASURES for node in graph.node) else {}
    values = {name: numpy_helper.to_array(tensor) for name, tensor in known.items()}
    rest = []
    for node in graph.node:
        made = None
        if node.op_type == "Constant":
            tensor = next((item.t for item in node.attribute if item.name == "value"), None)
            if tensor is not None:
                values[node.output[0]] = numpy_helper.to_array(tensor)
        elif node.op_type in MEASURES and node.input[0] in sizes:
            made = [_measured(node, sizes[node.input[0]])]
        elif node.input and all(name in values or not name for name in node.input):
            made = evaluated(model, node, values)
        if made is None:
            rest.append(node)
            continue
        changed = True
        for name, value in zip(node.output, made, strict=True):
            values[name] = value
            rest.append(helper.make_node("Constant", [], [name], name=name, value=numpy_helper.from_array(value)))
    del graph.node[:]
    graph.node.extend(rest)
    return changed


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Every value's shape as far as ONNX infers it."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    known = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in [*graph.input, *graph.value_info, *graph.output]
        if value.type.tensor_type.HasField("shape")
    }
    known = {name: shape for name, shape in known.items() if all(shape)}
    return known | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


def _is_size(tensor: Any) -> bool:
    from onnx import TensorProto

    return TensorProto.DataType.Name(tensor.data_type) in ("INT64", "INT32", "BOOL") or not tensor.dims


def _measured(node: Any, shape: tuple[int, ...]) -> np.ndarray:
    if node.op_type == "Size":
        return np.array(np.prod(shape, dtype=np.int64))
    ends = {item.name: item.i for item in node.attribute}
    return np.array(shape, np.int64)[ends.get("start", 0) : ends.get("end", len(shape))]


def evaluated(model: Any, node: Any, values: dict[str, np.ndarray]) -> list[np.ndarray] | None:
    """The results of a node of known inputs; None where onnx cannot tell, or tells something else than arrays.

    model  whose opsets count
    """
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    inputs = {name: values[name] for name in node.input if name}
    given = [
        helper.make_tensor_value_info(name, numpy_helper.from_array(array).data_type, array.shape)
        for name, array in inputs.items()
    ]
    results = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "sizes", given, results)
    try:
        one = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
        made = ReferenceEvaluator(one).run(None, inputs)
    except Exception:  # whatever its operators raise: the importer says why it cannot be read
        return None
    return (
        [np.asarray(array) for array in made] if all(isinstance(one, np.ndarray | np.generic) for one in made) else None
    )
