""".onnx file -> ForwardGraph, through TVM's ONNX importer. BatchNormalization is a training operator again."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.errors import DataError, MestError, SpecError, UnsupportedOperator
from mest_compile.frontend.relax_graph import read_main
from mest_compile.spec import ForwardGraph, Node


def read_onnx(path: str | Path, input_shape: tuple[int, ...]) -> tuple[ForwardGraph, dict[str, np.ndarray]]:
    """The forward pass of an ONNX model and its initializers by name, which torch.onnx.export takes from torch.

    Export with `torch.onnx.export(model, x, path, dynamo=False, do_constant_folding=False,
    training=torch.onnx.TrainingMode.PRESERVE)`; otherwise BatchNorm is folded into the convolutions, and stays so.
    input_shape  (N, C, H, W) or (N, features); N may differ from the exported one unless the file fixes it in a reshape
    Raises DataError when the file cannot be read, UnsupportedOperator, SpecError.
    """
    model = _load(Path(path))
    state = _state(model)
    function = _to_relax(model, input_shape)
    # TVM drops the prefix that torch puts before the constants it has folded.
    parameters = {name.removeprefix("onnx::"): name for name in state}
    graph, transposed = read_main(function, parameters, {name: array.shape for name, array in state.items()}, {}, may_transpose=True)
    for name in transposed:
        state[name] = np.ascontiguousarray(state[name].T)
    return replace(graph, nodes=tuple(_torch_momentum(node) for node in graph.nodes)), state


def _torch_momentum(node: Node) -> Node:
    """ONNX counts the share of the old statistics, torch and `Node` that of the new ones."""
    if node.op != "batch_norm":
        return node
    return replace(node, attrs={**node.attrs, "momentum": round(1 - node.attrs["momentum"], 7)})


def _load(path: Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MestError("reading .onnx files needs the package onnx: pip install onnx") from error
    try:
        return onnx.load(path)
    except (OSError, DecodeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an ONNX model: {error}") from error


def _state(model: Any) -> dict[str, np.ndarray]:
    from onnx import TensorProto, numpy_helper

    state = {}
    for tensor in model.graph.initializer:
        if tensor.data_type in (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL):
            continue                                       # shapes and axes, no parameters
        if tensor.data_type != TensorProto.FLOAT:
            raise SpecError(f"float32 parameters are wanted, {tensor.name} is {TensorProto.DataType.Name(tensor.data_type).lower()}: "
                            "export the model in float32")
        state[tensor.name] = numpy_helper.to_array(tensor).copy()
    return state


def _to_relax(model: Any, input_shape: tuple[int, ...]) -> Any:
    import tvm
    from tvm.relax.frontend.onnx import from_onnx

    held = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in held]
    if len(inputs) != 1:
        raise SpecError(f"a model with one input is wanted, this one has {len(inputs)}: {', '.join(value.name for value in inputs)}")
    declared = [dim.dim_value or None for dim in inputs[0].type.tensor_type.shape.dim]       # None where the size is free
    if len(declared) != len(input_shape) or any(want not in (None, size) for want, size in zip(declared[1:], input_shape[1:])):
        shown = ", ".join("any" if size is None else str(size) for size in declared)
        raise SpecError(f"the model takes an input of shape ({shown}), input_shape is {input_shape}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)   # free sizes are given by shape_dict
            return from_onnx(model, shape_dict={inputs[0].name: list(input_shape)}, keep_params_in_input=True)["main"]
    except (tvm.error.TVMError, ValueError, TypeError, AssertionError, KeyError, NotImplementedError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedOperator(f"TVM cannot import the ONNX model for input_shape {input_shape}: {line}") from error
