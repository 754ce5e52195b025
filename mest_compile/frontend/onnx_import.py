""".onnx file -> ForwardGraph, through TVM's ONNX importer. BatchNormalization is a training operator again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import DataError, UnsupportedOperator
from mest_compile.frontend.onnx_masks import densify
from mest_compile.frontend.onnx_plain import plain, where
from mest_compile.frontend.onnx_writer import load_onnx_package
from mest_compile.frontend.relax_graph import check_finite, read_main, unsupported
from mest_compile.ir.graph import ForwardGraph, Node

# What TVM's converters raise; its own errors are RuntimeErrors.
_CONVERTER_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    KeyError,
    IndexError,
    AttributeError,
    NotImplementedError,
)


def read_onnx(path: str | Path, input_shape: tuple[int, ...]) -> tuple[ForwardGraph, dict[str, np.ndarray]]:
    """The forward pass of an ONNX model and its weights by name, which torch.onnx.export takes from torch.

    Export with `torch.onnx.export(model.eval(), x, path, dynamo=False, do_constant_folding=False)`; otherwise BatchNorm
    is folded into the convolutions, and stays so.
    input_shape  (N, C, H, W) or (N, features); N may differ from the exported one unless the file fixes it in a reshape
    Raises DataError when the file cannot be read, UnsupportedOperator, SpecError.
    """
    graph, state, _ = read_as_stored(path, input_shape)
    return graph, state


def read_as_stored(
    path: str | Path, input_shape: tuple[int, ...]
) -> tuple[ForwardGraph, dict[str, np.ndarray], set[str]]:
    """The same, and the names of the weights that the file holds transposed."""
    model = load_model(path)
    state, names = plain(model, input_shape)
    function = _to_relax(model, input_shape, names)
    parameters = {ours: name for ours, name in names.items() if name in state}
    graph, transposed = read_main(
        function, parameters, {name: array.shape for name, array in state.items()}, {}, may_transpose=True
    )
    check_finite(graph, state)
    for name in transposed:
        state[name] = np.ascontiguousarray(state[name].T)
    return replace(graph, nodes=tuple(_torch_momentum(node) for node in graph.nodes)), state, transposed


def _torch_momentum(node: Node) -> Node:
    """ONNX counts the share of the old statistics, torch and `Node` that of the new ones."""
    if node.op != "batch_norm":
        return node
    return replace(node, attrs={**node.attrs, "momentum": round(1 - node.attrs["momentum"], 7)})


def load_model(path: str | Path) -> Any:
    """The onnx.ModelProto of a file, whose weights may lie beside it; here all are dense. Raises DataError, MestError
    without the package onnx."""
    load_onnx_package()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path)
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise DataError(f"{path} cannot be read as an ONNX model: {_first_line(error)}") from error
    if not model.graph.node:
        raise DataError(f"{path} cannot be read as an ONNX model: it holds no graph")
    densify(model)
    return model


def _to_relax(model: Any, input_shape: tuple[int, ...], names: Mapping[str, str]) -> Any:
    from tvm.relax.frontend.onnx import from_onnx
    from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

    known = {*_get_convert_map(), "Constant"}
    for node in model.graph.node:
        if node.op_type not in known:
            raise unsupported(node.op_type, where(node))
    printed = StringIO()
    try:
        # TVM prints which operator it was converting when it failed, and warns of sizes that are given below.
        with warnings.catch_warnings(), redirect_stdout(printed):
            warnings.simplefilter("ignore", UserWarning)
            return from_onnx(
                model, shape_dict={model.graph.input[0].name: list(input_shape)}, keep_params_in_input=True
            )["main"]
    except _CONVERTER_ERRORS as error:
        failed = re.match(r"Error converting operator (\w+)", printed.getvalue())
        line = re.sub(r"\bvalue\d+\b", lambda found: names.get(found[0], found[0]), _first_line(error))
        what = f"{failed[1]} of the ONNX model" if failed else "the ONNX model"
        raise UnsupportedOperator(f"TVM cannot import {what} for input_shape {input_shape}: {line}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
