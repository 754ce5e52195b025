"""ONNX files as exporters leave them: old operator sets, channels last, a softmax behind the logits, folded norms."""

import logging

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from test_frontend import run_graph
from test_onnx_import import CLASSES, ROWS, assert_reads_right, gemm, node, numbers, write
from torch import nn

from mest_compile.base.errors import UnsupportedOperator
from mest_compile.frontend import from_onnx

IMAGES = (2, 3, 6, 5)


def squeezed():
    """Operators whose axes and numbers were attributes."""
    nodes = [
        node("Conv", "x k", "c", kernel_shape=[3, 3]),
        node("Clip", "c", "r", min=0.0, max=6.0),
        node("ReduceMean", "r", "m", axes=[2, 3], keepdims=1),
        node("Dropout", "m", "d", ratio=0.5),
        node("Squeeze", "d", "s", axes=[2, 3]),
        gemm("s w"),
    ]
    return nodes, {"k": numbers(7, 3, 3, 3), "w": numbers(CLASSES, 7)}


@pytest.mark.parametrize("opset", [9, 11, 12])
def test_files_of_old_operator_sets_are_read_as_they_are_meant(tmp_path, opset):
    """A batch of one: a squeeze without its axes would lose it."""
    nodes, weights = squeezed()
    if opset > 9:
        nodes[1] = node("Clip", "c low high", "r")
        weights |= {"low": np.float32(0), "high": np.float32(6)}
    if opset > 11:
        nodes[3] = node("Dropout", "m", "d")
    graph, _ = from_onnx(write(tmp_path, nodes, weights, (1, *IMAGES[1:]), opset=opset), (1, *IMAGES[1:]))
    ops = [one.op for one in graph.nodes if one.op != "flatten"]
    assert ops == ["conv2d", "relu6", "global_avg_pool", "dropout", "linear"]


@pytest.mark.parametrize("opset", [13, 18, 21, 25])
def test_files_of_newer_operator_sets_are_read_right(tmp_path, opset):
    nodes = [
        node("Conv", "x k", "c", kernel_shape=[3, 3]),
        node("HardSwish", "c", "r") if opset >= 14 else node("Relu", "c", "r"),
        node("GlobalAveragePool", "r", "m"),
        node("Flatten", "m", "s"),
        gemm("s w"),
    ]
    assert_reads_right(
        write(tmp_path, nodes, {"k": numbers(7, 3, 3, 3), "w": numbers(CLASSES, 7)}, IMAGES, opset=opset), IMAGES
    )


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_a_last_softmax_is_left_out_and_said(tmp_path, op, caplog):
    weights = {"w": numbers(CLASSES, 12)}
    path = write(tmp_path, [gemm("x w", "h"), node(op, "h", "y", name="last")], weights)
    with caplog.at_level(logging.WARNING):
        graph, state = from_onnx(path, (ROWS, 12))
    assert [one.op for one in graph.nodes] == ["linear"]
    assert [line for line in caplog.messages if f"{op} 'last', which gives the model's output, is left out" in line]
    x = numbers(ROWS, 12)
    (want,) = ReferenceEvaluator(str(path)).run(None, {"x": x})
    found = run_graph(graph, state, torch.from_numpy(x))
    found = found.softmax(1) if op == "Softmax" else found.log_softmax(1)
    np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=1e-5)


FIRST, LAST = {"perm": [0, 3, 1, 2]}, {"perm": [0, 2, 3, 1]}


def channels_last(*between):
    """As converters from TensorFlow leave it: every convolution between two transpositions."""
    nodes = [
        node("Transpose", "x", "t", name="in", **FIRST),
        node("Conv", "t k", "c", kernel_shape=[3, 3]),
        node("Transpose", "c", "l", name="back", **LAST),
        *between,
        node("Transpose", "r", "t2", name="again", **FIRST),
        node("Conv", "t2 k2", "c2", kernel_shape=[1, 1]),
        node("Transpose", "c2", "l2", name="end", **LAST),
        node("ReduceMean", "l2", "m", axes=[1, 2], keepdims=0),
        gemm("m w"),
    ]
    return nodes, {"k": numbers(7, 3, 3, 3), "k2": numbers(6, 7, 1, 1), "w": numbers(CLASSES, 6)}


@pytest.mark.parametrize(
    "between", [[node("Relu", "l", "r")], [node("Sigmoid", "l", "s"), node("Relu", "s", "r")]], ids=["one", "two"]
)
def test_transpositions_of_channels_last_files_cancel(tmp_path, between):
    nodes, weights = channels_last(*between)
    path = write(tmp_path, nodes, weights, (2, 6, 5, 3))
    graph, state = from_onnx(path, IMAGES)
    ops = [one.op for one in graph.nodes]
    assert ops[0] == "conv2d" and ops[-2:] == ["global_avg_pool", "linear"] and len(ops) == 4 + len(between)
    x = numbers(*IMAGES)
    (want,) = ReferenceEvaluator(str(path)).run(None, {"x": np.ascontiguousarray(x.transpose(0, 2, 3, 1))})
    np.testing.assert_allclose(run_graph(graph, state, torch.from_numpy(x)).numpy(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("factors", [{"alpha": 0.5}, {"beta": 2.0}, {"alpha": 3.0, "beta": 0.5}, {"beta": 0.0}])
def test_a_gemm_with_factors_is_what_it_computes(tmp_path, factors):
    weights = {"v": numbers(7, 12), "w": numbers(CLASSES, 7), "b": numbers(CLASSES)}
    assert_reads_right(write(tmp_path, [gemm("x v", "h"), gemm("h w b", **factors)], weights))


def test_numbers_of_constant_nodes_may_be_attributes(tmp_path):
    nodes = [
        gemm("x v", "h"),
        helper.make_node("Constant", [], ["c"], value_float=0.5),
        helper.make_node("Constant", [], ["s"], value_ints=[ROWS, 7]),
        node("Mul", "h c", "m"),
        node("Reshape", "m s", "r"),
        gemm("r w"),
    ]
    assert_reads_right(write(tmp_path, nodes, {"v": numbers(7, 12), "w": numbers(CLASSES, 7)}))


def test_a_gemm_of_the_transposed_input_is_refused_by_name(tmp_path):
    path = write(tmp_path, [gemm("x w", transA=1)], {"w": numbers(CLASSES, 12)}, (12, 12))
    with pytest.raises(UnsupportedOperator, match="^Gemm .*in node 'y'"):
        from_onnx(path, (12, 12))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
def test_norms_that_an_exporter_folded_are_said(tmp_path, caplog):
    path, net = tmp_path / "net.onnx", Normed().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with caplog.at_level(logging.WARNING, "mest_compile"):
        torch.onnx.export(net, (torch.zeros(IMAGES),), path, dynamo=False, do_constant_folding=False)
        graph, _ = from_onnx(path, IMAGES)
        assert "batch_norm" in [one.op for one in graph.nodes] and not caplog.messages
        torch.onnx.export(net, (torch.zeros(IMAGES),), path, dynamo=False)
        from_onnx(path, IMAGES)
        assert "1 convolutions have a batch normalisation folded into them" in caplog.messages.pop()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_newer_exporters_folding_is_known_by_its_rule(tmp_path, caplog):
    nodes, weights = squeezed()
    path = write(
        tmp_path,
        [*nodes[:1], node("GlobalAveragePool", "c", "m"), node("Flatten", "m", "s"), nodes[-1]],
        weights,
        IMAGES,
    )
    model = onnx.load(path)
    model.graph.node[0].metadata_props.append(
        helper.onnx.StringStringEntryProto(key="pkg.onnxscript.rewriter.rule_name", value="FuseBatchNormIntoConv")
    )
    onnx.save(model, path)
    with caplog.at_level(logging.WARNING):
        from_onnx(path, IMAGES)
    assert "folded into them by the exporter, 'c' the first" in caplog.messages[0]
