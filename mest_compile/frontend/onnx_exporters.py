"""What exporters put around a net: old operator sets, images with their channels last, a softmax behind the logits,
batch normalisation folded into convolutions. Undone where that is the same net, and said where it is another."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mest_compile.base.errors import UnsupportedOperator

log = logging.getLogger(__name__)

OLDEST = 11  # operator set; of older files TVM's importer misses what became inputs, the bounds of a Clip for one
# Operators on single numbers: before a transposition they are what they are behind it.
ELEMENTWISE = {"Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Softplus"}
ELEMENTWISE |= {"Identity", "Dropout", "Cast"}
TO_CHANNELS_FIRST = (0, 3, 1, 2)


def upgrade(model: Any, opset: int) -> Any:
    """The model in an operator set that is not too old. Raises UnsupportedOperator where onnx cannot translate it."""
    if opset >= OLDEST:
        return model
    from onnx import version_converter

    try:
        return version_converter.convert_version(model, OLDEST)
    except (RuntimeError, ValueError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedOperator(
            f"the model is written in operator set {opset}, which onnx cannot translate to {OLDEST} ({line}): export "
            "it with opset_version=17"
        ) from error


def plain_constants(graph: Any) -> None:
    """Numbers that Constant nodes hold as attributes become tensors, which TVM reads."""
    from onnx import helper, numpy_helper

    for node in graph.node:
        if node.op_type != "Constant":
            continue
        for item in node.attribute:
            held = {"value_float": np.float32(item.f), "value_int": np.int64(item.i), "value_ints": np.int64(item.ints)}
            if item.name in held:
                tensor = numpy_helper.from_array(np.asarray(held[item.name]))
                item.CopyFrom(helper.make_attribute("value", tensor))


def plain_gemms(graph: Any) -> None:
    """alpha A B + beta C as beta (alpha / beta A B + C): a bias is what a layer adds, not a part of it."""
    from onnx import helper

    for node in [node for node in graph.node if node.op_type == "Gemm" and len(node.input) == 3]:
        factors = {item.name: item.f for item in node.attribute if item.name in ("alpha", "beta")}
        beta = factors.get("beta", 1.0)
        if beta == 1:
            continue
        rest = [item for item in node.attribute if item.name not in factors]
        del node.attribute[:]
        node.attribute.extend(rest)
        if beta == 0:
            del node.input[2]
            node.attribute.append(helper.make_attribute("alpha", factors.get("alpha", 1.0)))
            continue
        node.attribute.append(helper.make_attribute("alpha", factors.get("alpha", 1.0) / beta))
        result, place = node.output[0], list(graph.node).index(node)
        node.output[0] = f"{result} / beta"
        factor = helper.make_node("Constant", [], [f"{result} beta"], value_float=beta)
        graph.node.insert(place + 1, factor)
        graph.node.insert(
            place + 2, helper.make_node("Mul", [node.output[0], factor.output[0]], [result], name=node.name)
        )


def say_what_was_folded(graph: Any) -> None:
    """A warning where torch's exporters have folded BatchNorms into convolutions, which then train without."""
    folded = [node.name for node in graph.node if node.op_type == "Conv" and _is_folded(node)]
    if folded:
        log.warning(
            "%s convolutions have a batch normalisation folded into them by the exporter, %s the first: they train "
            "without it. To train with it, export by torch.onnx.export(model.eval(), ..., dynamo=False, "
            "do_constant_folding=False)",
            len(folded),
            repr(folded[0]),
        )


def _is_folded(node: Any) -> bool:
    rules = "".join(one.value for one in node.metadata_props if one.key.endswith("rewriter.rule_name"))
    # The older exporter gives such a weight and its bias names of its own.
    renamed = len(node.input) == 3 and all(name.startswith("onnx::Conv_") for name in node.input[1:])
    return "FuseBatchNormIntoConv" in rules or renamed


def drop_last_softmax(graph: Any) -> None:
    """Takes out a softmax that gives the model's output: losses take what goes into it. Says so in the log."""
    if len(graph.output) != 1:
        return
    last = next((node for node in graph.node if graph.output[0].name in node.output), None)
    if last is None or last.op_type not in ("Softmax", "LogSoftmax"):
        return
    if sum(last.output[0] in node.input for node in graph.node):
        return
    log.warning(
        "%s %s, which gives the model's output, is left out: losses take the logits before it, and those are what the "
        "step predicts",
        last.op_type,
        repr(last.name),
    )
    graph.output[0].name = last.input[0]
    graph.node.remove(last)


def takes_channels_last(graph: Any, name: str) -> bool:
    """Whether all that becomes of that input is a transposition from (N, H, W, C) to (N, C, H, W)."""
    readers = [node for node in graph.node if name in node.input]
    return bool(readers) and all(
        node.op_type == "Transpose" and _permutation(node) == TO_CHANNELS_FIRST for node in readers
    )


def give_channels_first(graph: Any, name: str) -> None:
    """The transpositions of such an input become nothing: it is to come as (N, C, H, W)."""
    for node in [node for node in graph.node if name in node.input]:
        _replace(graph, node, name)


def cancel_transpositions(graph: Any) -> None:
    """Takes out pairs that undo each other: each is moved behind the operators on single numbers that follow it, and
    joined with the next; a mean over its axes is one over the axes before it."""
    while any(_moved(graph, node) for node in graph.node if node.op_type == "Transpose"):
        pass


def _moved(graph: Any, node: Any) -> bool:
    from onnx import helper

    order, source = _permutation(node), node.input[0]
    if order is None:
        return False
    if order == tuple(range(len(order))):
        _replace(graph, node, source)
        return True
    readers = [one for one in graph.node if node.output[0] in one.input]
    if len(readers) != 1 or any(node.output[0] == one.name for one in graph.output):
        return False
    (reader,) = readers
    if reader.op_type == "Transpose" and (then := _permutation(reader)) is not None:
        del reader.attribute[:]
        reader.attribute.append(helper.make_attribute("perm", [order[axis] for axis in then]))
        reader.input[0] = source
        graph.node.remove(node)
        return True
    if reader.op_type in ELEMENTWISE and reader.input[0] == node.output[0] and len(reader.output) == 1:
        before, behind = node.output[0], reader.output[0]
        reader.input[0], reader.output[0] = source, f"{behind} before {node.name}"
        node.input[0], node.output[0] = reader.output[0], behind
        assert before != behind
        place = list(graph.node).index(reader)
        graph.node.remove(node)
        graph.node.insert(place, node)
        return True
    axes = next((item for item in reader.attribute if item.name == "axes"), None)
    kept = next((item.i for item in reader.attribute if item.name == "keepdims"), 1)
    if reader.op_type == "ReduceMean" and axes is not None and not kept and len(order) == 4:
        left = [axis for axis in order if axis not in {order[axis] for axis in axes.ints}]
        if left == sorted(left):  # what is left is in the same order
            mean = sorted(order[axis] for axis in axes.ints)
            axes.CopyFrom(helper.make_attribute("axes", mean))
            reader.input[0] = source
            graph.node.remove(node)
            return True
    return False


def _permutation(node: Any) -> tuple[int, ...] | None:
    """None where it is the default, which depends on the rank."""
    return next((tuple(item.ints) for item in node.attribute if item.name == "perm"), None)


def _replace(graph: Any, node: Any, by: str) -> None:
    """Takes the node out; what read its result reads `by`."""
    graph.node.remove(node)
    for one in graph.node:
        one.input[:] = [by if name == node.output[0] else name for name in one.input]
    for value in graph.output:
        if value.name == node.output[0]:
            value.name = by
