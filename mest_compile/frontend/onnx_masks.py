"""Pruned weights of an ONNX model, however a file tells of them, as dense initializers with zeros."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from mest_compile.base.errors import DataError

ORIGINAL, MASK = "_orig", "_mask"  # behind a weight's name: what torch.nn.utils.prune makes of it


def densify(model: Any) -> None:
    """Rewrites the onnx.ModelProto: sparse initializers, which TVM's importer does not read, become dense ones, and
    products `weight_orig * weight_mask` the weight itself. Raises DataError where indices lie outside of a weight."""
    from onnx import numpy_helper

    graph = model.graph
    for sparse in graph.sparse_initializer:
        graph.initializer.append(numpy_helper.from_array(_dense(sparse), sparse.values.name))
    del graph.sparse_initializer[:]
    held = {tensor.name: tensor for tensor in graph.initializer}
    for node, name in list(_products(graph, held)):
        weight, mask = (numpy_helper.to_array(held[f"{name}{part}"]) for part in (ORIGINAL, MASK))
        graph.initializer.append(numpy_helper.from_array(np.multiply(weight, mask, dtype=weight.dtype), name))
        graph.node.remove(node)
        read = {source for other in graph.node for source in other.input}
        for part in (ORIGINAL, MASK):
            if f"{name}{part}" not in read:
                graph.initializer.remove(held[f"{name}{part}"])
        for other in graph.node:
            other.input[:] = [name if source == node.output[0] else source for source in other.input]


def _dense(sparse: Any) -> np.ndarray:
    """The array of a SparseTensorProto, whose indices are linear (values,) or (values, rank)."""
    from onnx import numpy_helper

    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    shape, name = tuple(sparse.dims), sparse.values.name
    places = indices if indices.ndim == 1 else np.ravel_multi_index(_columns(indices, shape, name), shape)
    if len(places) != len(values) or (len(places) and not 0 <= places.min() <= places.max() < prod(shape)):
        raise DataError(f"{name}: the indices of the sparse_initializer do not lie in its shape {shape}")
    found = np.zeros(prod(shape), values.dtype)
    found[places] = values
    return found.reshape(shape)


def _columns(indices: np.ndarray, shape: tuple[int, ...], name: str) -> tuple[np.ndarray, ...]:
    if indices.shape[1:] != (len(shape),) or (indices < 0).any() or (indices >= np.array(shape)).any():
        raise DataError(f"{name}: the indices of the sparse_initializer do not lie in its shape {shape}")
    return tuple(indices.T)


def _products(graph: Any, held: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """(a node that multiplies a weight by its mask, the weight's name)."""
    for node in graph.node:
        if node.op_type == "Mul" and set(node.input) <= held.keys():
            for name in {source.removesuffix(ORIGINAL) for source in node.input}:
                if sorted(node.input) == sorted((f"{name}{ORIGINAL}", f"{name}{MASK}")) and name not in held:
                    yield node, name
