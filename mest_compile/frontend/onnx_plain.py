"""An ONNX model in the spellings that TVM's importer reads right, and what each name meant.

TVM's importer drops prefixes, parses names as C++ scopes and lets two of them fall together, so it gets names of ours.
Weights may come as initializers, as Constant nodes, or through Identity nodes where torch.onnx.export has merged equal
ones: here all are initializers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from mest_compile.base.errors import SpecError
from mest_compile.frontend.onnx_exporters import (
    TO_CHANNELS_FIRST,
    cancel_transpositions,
    drop_last_softmax,
    give_channels_first,
    plain_constants,
    plain_gemms,
    say_what_was_folded,
    takes_channels_last,
)
from mest_compile.frontend.onnx_folding import factors_to_constants, fold_sizes, shapes
from mest_compile.frontend.onnx_recurrent import Moved, plain_recurrent
from mest_compile.frontend.refusals import unsupported

WINDOWS = ("Conv", "MaxPool", "AveragePool")
ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min")
FLOATS = ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16")


def plain(model: Any, input_shape: tuple[int, ...]) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, Moved]]:
    """Rewrites `model` in place; returns (weights by their own name, name of ours -> the value's own name, weights that
    the file has as parts of others).

    input_shape  of the one input that is no initializer, whose sizes it sets; (N, C, H, W) where the file has
                 (N, H, W, C), too
    Raises SpecError, UnsupportedOperator.
    """
    graph = model.graph
    for node in graph.node:
        node.name = node.name or " ".join(node.output)
    _refuse_foreign(graph)
    say_what_was_folded(graph)
    drop_last_softmax(graph)
    plain_gemms(graph)
    plain_constants(graph)
    _weights_to_initializers(graph, factors_to_constants(graph))
    data = _data_input(graph, input_shape)
    del graph.input[:]
    graph.input.append(data)
    cancel_transpositions(graph)
    _numbers_to_constants(graph)
    fold_sizes(model)
    moved = plain_recurrent(model)
    _sums_to_additions(graph)
    _same_to_pads(model)
    state = _state(graph)
    return state, {ours: name for name, ours in _rename(graph).items()}, moved


def opset(model: Any) -> int:
    """Version of ONNX's own operators that the model is written in."""
    return max((int(one.version) for one in model.opset_import if one.domain in ("", "ai.onnx")), default=1)


def where(node: Any) -> str:
    """Where an ONNX node stands, for error messages."""
    return f"in node {node.name!r}"


def _refuse_foreign(graph: Any) -> None:
    from onnx import AttributeProto

    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise unsupported(f"{node.domain}.{node.op_type}", where(node))
        if any(attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for attribute in node.attribute):
            raise unsupported(node.op_type, where(node))


def _data_input(graph: Any, input_shape: tuple[int, ...]) -> Any:
    """The input that is no weight, with the sizes of `input_shape`."""
    held = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in held]
    if len(inputs) != 1:
        raise SpecError(
            f"a model with one input is wanted, this one has {len(inputs)}: "
            f"{', '.join(value.name for value in inputs) or 'is it an ONNX model?'}"
        )
    shape = inputs[0].type.tensor_type.shape
    declared = [dim.dim_value or None for dim in shape.dim]  # None where the size is free
    known = inputs[0].type.tensor_type.HasField("shape")
    if len(input_shape) == 4 and takes_channels_last(graph, inputs[0].name):
        give_channels_first(graph, inputs[0].name)
        declared = [declared[axis] for axis in TO_CHANNELS_FIRST] if len(declared) == 4 else declared
    if known and (
        len(declared) != len(input_shape)
        or any(want not in (None, size) for want, size in zip(declared[1:], input_shape[1:], strict=True))
    ):
        shown = ", ".join("any" if size is None else str(size) for size in declared)
        hint = ""
        if None not in declared[1:]:
            wanted = (input_shape[0], *declared[1:])
            hint = f"; give {wanted}, on the command line --image {'x'.join(map(str, wanted[1:]))}"
        raise SpecError(f"the model takes an input of shape ({shown}), input_shape is {input_shape}{hint}")
    del shape.dim[:]
    for size in input_shape:
        shape.dim.add().dim_value = size
    return inputs[0]


def _weights_to_initializers(graph: Any, others: set[str]) -> None:
    """Constant nodes of rank 1 and more that are none of the others, and Identity of an initializer, become
    initializers under their output's name."""
    from onnx import TensorProto, helper, numpy_helper

    held = {tensor.name: tensor for tensor in graph.initializer}
    idle = {(name, float(place == 1)) for node in graph.node for place, name in enumerate(node.input) if _norms(node)}
    rest, weighed = [], {name for node in graph.node if node.op_type not in ARITHMETIC for name in node.input}
    for node in graph.node:
        tensor = None
        if node.op_type == "Identity" and node.input[0] in held:
            tensor = TensorProto()
            tensor.CopyFrom(held[node.input[0]])
        elif node.op_type == "Constant" and node.output[0] not in others:
            tensor = _constant(node, numpy_helper)
            if tensor is not None and any(
                name == node.output[0] and (numpy_helper.to_array(tensor) == usual).all() for name, usual in idle
            ):
                tensor = None  # the scale or the bias of a norm that has none
            if tensor is not None and node.output[0] not in weighed and all(size == 1 for size in tensor.dims):
                del tensor.dims[:]  # the 2 of 2 * x, which has axes in some exporters' files
                node.attribute[0].CopyFrom(helper.make_attribute("value", tensor))
                tensor = None
        if tensor is None:
            rest.append(node)
            continue
        tensor.name = node.output[0]
        held[tensor.name] = tensor
        graph.initializer.append(tensor)
    del graph.node[:]
    graph.node.extend(rest)


def _norms(node: Any) -> bool:
    return node.op_type == "InstanceNormalization"


def _numbers_to_constants(graph: Any) -> None:
    """A single number that is read, as a bound of a Clip is, becomes a Constant node, which TVM folds: no weight has no
    axes."""
    from onnx import helper

    read = {name for node in graph.node for name in node.input}
    numbers = [tensor for tensor in graph.initializer if not tensor.dims and _is_float(tensor) and tensor.name in read]
    for tensor in numbers:
        graph.initializer.remove(tensor)
        graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))


def _constant(node: Any, numpy_helper: Any) -> Any:
    """The tensor of a Constant node that may be a weight; None for what TVM should fold."""
    value = node.attribute[0]
    if value.name == "value_floats":
        return numpy_helper.from_array(np.array(value.floats, np.float32))
    if value.name == "sparse_value":
        raise unsupported("a sparse Constant", where(node))
    return value.t if value.name == "value" and value.t.dims and _is_float(value.t) else None


def _is_float(tensor: Any) -> bool:
    from onnx import TensorProto

    return TensorProto.DataType.Name(tensor.data_type) in FLOATS


def _sums_to_additions(graph: Any) -> None:
    """Sum of two and more values as Add, which is what it is where no sizes are repeated; TVM stacks them."""
    from onnx import helper

    rest = []
    for node in graph.node:
        if node.op_type != "Sum":
            rest.append(node)
            continue
        total = node.input[0]
        for place, term in enumerate(node.input[1:], 2):
            result = node.output[0] if place == len(node.input) else f"{node.output[0]}/sum of {place}"
            rest.append(helper.make_node("Add", [total, term], [result], name=node.name))
            total = result
        if len(node.input) == 1:
            rest.append(helper.make_node("Identity", [total], [node.output[0]], name=node.name))
    del graph.node[:]
    graph.node.extend(rest)


def _same_to_pads(model: Any) -> None:
    """auto_pad as the padding that it is for this input; TVM pads by an operator of its own, and max pools by zeros."""
    from onnx import helper

    def auto_pad(node: Any) -> str:
        return next((item.s.decode() for item in node.attribute if item.name == "auto_pad"), "NOTSET")

    padded = [node for node in model.graph.node if node.op_type in WINDOWS and auto_pad(node) != "NOTSET"]
    known = shapes(model) if padded else {}
    for node in padded:
        how, attributes = auto_pad(node), {item.name: list(item.ints) for item in node.attribute if item.ints}
        kernel = attributes.get("kernel_shape") or list(known.get(node.input[1], ())[2:])
        image = known.get(node.input[0], ())[2:]
        if not kernel or len(kernel) != len(image):
            raise SpecError(
                f"auto_pad={how} {where(node)} needs a known size of its input: export the model with explicit pads"
            )
        strides, dilations = (attributes.get(name) or [1] * len(kernel) for name in ("strides", "dilations"))
        totals = [
            0 if how == "VALID" else max(0, (-(-size // step) - 1) * step + (width - 1) * apart + 1 - size)
            for size, width, step, apart in zip(image, kernel, strides, dilations, strict=True)
        ]
        less, more = [total // 2 for total in totals], [-(-total // 2) for total in totals]
        pads = [*more, *less] if how == "SAME_LOWER" else [*less, *more]
        kept = [item for item in node.attribute if item.name not in ("auto_pad", "pads")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("pads", pads)])


def _state(graph: Any) -> dict[str, np.ndarray]:
    """The weights by name; whole numbers and truth values are shapes and axes, no weights."""
    from onnx import TensorProto, numpy_helper

    state = {}
    for tensor in graph.initializer:
        kind = TensorProto.DataType.Name(tensor.data_type)
        if not _is_float(tensor):
            continue
        if kind != "FLOAT":
            raise SpecError(
                f"float32 parameters are wanted, {tensor.name} is {kind.lower()}: export the model in float32"
            )
        state[tensor.name] = numpy_helper.to_array(tensor).copy()
    return state


def _rename(graph: Any) -> dict[str, str]:
    """Gives every value of the graph a name of ours; returns {its own name: ours}."""
    ours: dict[str, str] = {"": ""}  # an input that is left out

    def named(names: Iterable[str]) -> list[str]:
        return [ours.setdefault(name, f"value{len(ours)}") for name in names]

    for value in [*graph.initializer, *graph.input]:
        (value.name,) = named([value.name])
    for node in graph.node:
        if missing := [name for name in node.input if name not in ours]:
            raise SpecError(
                f"{node.op_type} {where(node)} reads {missing[0]!r}, which no node before it and no weight "
                "gives: the file is "
                "no whole model"
            )
        node.input[:], node.output[:] = named(node.input), named(node.output)
    for value in graph.output:
        (value.name,) = named([value.name])
    del graph.value_info[:]
    return ours
