""".onnx file -> ForwardGraph, through TVM's ONNX importer. BatchNormalization is a training operator again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import DataError, UnsupportedOperator
from mest_compile.frontend.onnx_exporters import upgrade
from mest_compile.frontend.onnx_masks import densify
from mest_compile.frontend.onnx_plain import opset, plain
from mest_compile.frontend.onnx_recurrent import Moved
from mest_compile.frontend.onnx_writer import load_onnx_package
from mest_compile.frontend.refusals import Origin, Refusals, check_finite
from mest_compile.frontend.relax_graph import read_main
from mest_compile.ir.graph import ForwardGraph, Node


def read_onnx(
    path: str | Path, input_shape: tuple[int, ...], refusals: Refusals
) -> tuple[ForwardGraph, dict[str, np.ndarray]]:
    """The forward pass of an ONNX model and its weights by name, which torch.onnx.export takes from torch.

    Export with `torch.onnx.export(model.eval(), x, path, dynamo=False, do_constant_folding=False)`; otherwise BatchNorm
    is folded into the convolutions, and stays so.
    input_shape  (N, C, H, W), (N, C, L) or (N, features); N may differ from the exported one unless the file fixes it
                 in a reshape
    refusals     where goes what cannot be trained, as far as the rest can be read without it
    Raises DataError when the file cannot be read, UnsupportedOperator, SpecError.
    """
    graph, state, *_ = read_as_stored(path, input_shape, refusals)
    return graph, state


def read_as_stored(
    path: str | Path, input_shape: tuple[int, ...], refusals: Refusals
) -> tuple[ForwardGraph, dict[str, np.ndarray], set[str], dict[str, Moved]]:
    """The same, the names of the weights that the file holds transposed, and those that it has as parts of others."""
    model = load_model(path)
    model = upgrade(model, opset(model))
    state, names, moved = plain(model, input_shape)
    function, origins = _to_relax(model, input_shape, names)
    parameters = {ours: name for ours, name in names.items() if name in state}
    graph, transposed = read_main(
        function,
        parameters,
        {name: array.shape for name, array in state.items()},
        origins,
        refusals,
        may_transpose=True,
    )
    check_finite(graph, state)
    for name in transposed:
        state[name] = np.ascontiguousarray(state[name].T)
    return replace(graph, nodes=tuple(_torch_momentum(node) for node in graph.nodes)), state, transposed, moved


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


def _to_relax(model: Any, input_shape: tuple[int, ...], names: Mapping[str, str]) -> tuple[Any, dict[str, Origin]]:
    from mest_compile.frontend.onnx_relax import CONVERTER_ERRORS, to_relax, trouble

    try:
        with redirect_stdout(StringIO()):  # TVM prints which operator it was converting when it failed
            return to_relax(model, names)
    except CONVERTER_ERRORS as error:
        line = trouble(error, names)
        raise UnsupportedOperator(f"the ONNX model cannot be read for input_shape {input_shape} ({line})") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
