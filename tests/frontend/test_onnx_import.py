"""ONNX files as people have them: names of any kind, weights in any place, everyday spellings; what cannot be read is
one line."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from test_frontend import run_graph
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import DataError, SpecError, UnsupportedOperator
from mest_compile.frontend import from_onnx, from_torch

ROWS, CLASSES = 4, 5
IMAGES = (2, 3, 9, 9)


def numbers(*shape):
    return (np.random.default_rng(sum(shape)).standard_normal(shape) / 4).astype(np.float32)


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs.split(), [output], **attributes)


def gemm(inputs="x w b", output="y", **attributes):
    return node("Gemm", inputs, output, **{"transB": 1} | attributes)


def write(folder, nodes, weights, shape=(ROWS, 12), others=(), before=(), after=(), ir=8, opset=17):
    """A file with the data input x; `before` and `after` are further inputs, (name, shape)."""

    def info(name, sizes):
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes)

    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(
        nodes,
        "net",
        [info(*facts) for facts in (*before, ("x", shape), *after)],
        [info("y", (shape[0], CLASSES))],
        [*held, *others],
    )
    path = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir), path)
    return path


def assert_reads_right(path, shape=(ROWS, 12)):
    """What ONNX's own reference computes; returns (graph, state)."""
    graph, state = from_onnx(path, shape)
    x = numbers(*shape)
    (want,) = ReferenceEvaluator(str(path)).run(None, {"x": x})
    np.testing.assert_allclose(run_graph(graph, state, torch.from_numpy(x)).numpy(), want, rtol=0, atol=1e-5)
    return graph, state


@pytest.mark.parametrize(
    "names",
    [
        ("a:b", "a::b", "onnx::Conv_20"),
        ("onnx::Q", "Q", "onnx::onnx::Q"),
        ("a.b.weight", "a_b.weight", "a.b_weight"),
        ("input", "x.weight", "y.bias"),
        ("value2", "value1", "value0"),
        ("1", "-", "Ö b"),
    ],
)
def test_weights_may_have_any_name(tmp_path, names):
    first, second, bias = names
    last = helper.make_node("Gemm", ["r", second, bias], ["y"], transB=1)
    path = write(
        tmp_path,
        [gemm(f"x {first}", "h"), node("Relu", "h", "r"), last],
        {first: numbers(7, 12), second: numbers(CLASSES, 7), bias: numbers(CLASSES)},
    )
    graph, state = assert_reads_right(path)
    assert list(state) == list(names)
    assert len({"input", *(node.name for node in graph.nodes)}) == 4


@pytest.mark.filterwarnings("ignore")
def test_what_torch_folded_trains(tmp_path):
    """torch's exporter calls the folded weights onnx::Conv_20."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    ).eval()
    torch.onnx.export(module, (torch.randn(IMAGES),), tmp_path / "net.onnx", dynamo=False)
    step = mest.compile(tmp_path / "net.onnx", IMAGES, scheme="dense", sparsity=0)
    x = torch.randn(IMAGES)
    np.testing.assert_allclose(step.predict(x), module(x).detach().numpy(), rtol=0, atol=1e-5)
    assert any("::" in name for name in step.state_dict())
    before = step.state_dict()
    step(x, torch.arange(2))
    assert all((array != before[name]).any() for name, array in step.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_evaluation_mode_keeps_batch_norm_and_equal_parameters(tmp_path):
    """The exporter merges parameters that are equal, as those of new BatchNorms are, and tells them apart by Identity
    nodes."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    ).eval()
    torch.onnx.export(module, (torch.randn(IMAGES),), tmp_path / "net.onnx", dynamo=False, do_constant_folding=False)
    assert any(node.op_type == "Identity" for node in onnx.load(tmp_path / "net.onnx").graph.node)
    graph, state = from_onnx(tmp_path / "net.onnx", IMAGES)
    want, wanted_state = from_torch(module, IMAGES)
    assert graph.nodes == want.nodes
    assert sorted([*state, "1.num_batches_tracked", "4.num_batches_tracked"]) == sorted(wanted_state)
    for name, array in state.items():
        np.testing.assert_array_equal(wanted_state[name], array)


def test_the_data_is_the_input_that_is_no_weight(tmp_path):
    weights = {"w": numbers(CLASSES, 12), "b": numbers(CLASSES)}
    assert_reads_right(
        write(tmp_path, [gemm()], weights, before=[("w", (CLASSES, 12))], after=[("b", (CLASSES,))], ir=3, opset=8)
    )


def test_constant_nodes_are_weights(tmp_path):
    value = numpy_helper.from_array(numbers(CLASSES, 12), "any")
    path = write(
        tmp_path,
        [
            helper.make_node("Constant", [], ["w"], value=value),
            helper.make_node("Constant", [], ["b"], value_floats=[1.0] * CLASSES),
            gemm(),
        ],
        {},
    )
    _, state = assert_reads_right(path)
    assert sorted(state) == ["b", "w"]


SPELLINGS = {
    "bias as a row": ([gemm()], {"w": numbers(CLASSES, 12), "b": numbers(1, CLASSES)}),
    "matmul and add": (
        [node("MatMul", "x w", "m"), node("Add", "b m", "y")],
        {"w": numbers(12, CLASSES), "b": numbers(1, CLASSES)},
    ),
    "sum of one": ([node("Sum", "x", "s"), gemm("s w")], {"w": numbers(CLASSES, 12)}),
    "sum of three": (
        [gemm("x w", "a"), gemm("x v", "c"), node("Relu", "a", "r"), node("Sum", "a c r", "y")],
        {"w": numbers(CLASSES, 12), "v": numbers(CLASSES, 12)},
    ),
    "a weight that is not used": ([gemm("x w")], {"w": numbers(CLASSES, 12), "old": numbers(3, 3)}),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_everyday_spellings_read_right(tmp_path, case):
    _, state = assert_reads_right(write(tmp_path, *SPELLINGS[case]))
    assert list(state) == list(SPELLINGS[case][1])


def images(window, weights=None):
    """A network with one convolution or pool of that kind."""
    nodes = [window, node("GlobalAveragePool", "a", "p"), node("Flatten", "p", "f"), gemm("f w")]
    return nodes, {
        "c": numbers(6, 3, *(weights or (3, 3))),
        "w": numbers(CLASSES, 6 if window.op_type == "Conv" else 3),
    }


WINDOWS = {
    "same": images(node("Conv", "x c", "a", kernel_shape=[3, 3], auto_pad="SAME_UPPER")),
    "same, no kernel_shape": images(node("Conv", "x c", "a", auto_pad="SAME_UPPER")),
    "same lower": images(node("Conv", "x c", "a", kernel_shape=[3, 3], auto_pad="SAME_LOWER")),
    "same, stride 2 on 9 pixels": images(
        node("Conv", "x c", "a", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")
    ),
    "same, 5 by 3": images(
        node("Conv", "x c", "a", kernel_shape=[5, 3], strides=[3, 1], auto_pad="SAME_UPPER"), (5, 3)
    ),
    "valid": images(node("Conv", "x c", "a", kernel_shape=[3, 3], auto_pad="VALID")),
    "max pool": images(node("MaxPool", "x", "a", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")),
    "average pool": images(node("AveragePool", "x", "a", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")),
    "average pool, padding counts": images(
        node("AveragePool", "x", "a", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER", count_include_pad=1)
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_auto_pad_is_the_padding_that_it_means(tmp_path, case):
    assert_reads_right(write(tmp_path, *WINDOWS[case], shape=IMAGES), IMAGES)


def one(weights, nodes=None, **options):
    return {"nodes": nodes or [gemm("x w")], "weights": weights} | options


HALF = numpy_helper.from_array(np.ones((CLASSES, 12), np.float16), "w")
SPARSE = helper.make_sparse_tensor(
    numpy_helper.from_array(np.ones(1, np.float32), "w"), numpy_helper.from_array(np.array([3]), "i"), [CLASSES, 12]
)
BRANCH = helper.make_graph(
    [node("Identity", "x", "z")], "branch", [], [helper.make_tensor_value_info("z", 1, (ROWS, 12))]
)


@pytest.mark.parametrize(
    ("facts", "error", "words"),
    [
        (
            one({"w": numbers(CLASSES, 12)}, [gemm("x w", "a"), node("Celu", "a", "y", name="act")]),
            UnsupportedOperator,
            "Celu in node 'act'",
        ),
        (
            one({"w": numbers(CLASSES, 12)}, [gemm("x w", domain="com.microsoft")]),
            UnsupportedOperator,
            "com.microsoft.Gemm in node 'y'",
        ),
        (
            one(
                {"w": numbers(CLASSES, 12), "c": np.array(True)},
                [node("If", "c", "y", then_branch=BRANCH, else_branch=BRANCH)],
            ),
            UnsupportedOperator,
            "If in node 'y'",
        ),
        (
            one({"w": numbers(CLASSES, 11)}),
            UnsupportedOperator,
            "Gemm .TVM: .*LHS x has shape.* in node 'y' cannot",
        ),
        (
            one({"w": numbers(CLASSES, 12)}, [gemm("nothing w")]),
            SpecError,
            "Gemm in node 'y' reads 'nothing', which no node before it",
        ),
        (
            one({"w": numbers(CLASSES, 12)}, after=[("z", (ROWS, 12))]),
            SpecError,
            "one input is wanted, this one has 2: x, z",
        ),
        (one({"w": numbers(CLASSES, 12) * np.nan}), SpecError, "60 of 60 values of w are NaN"),
        (one({"w": numbers(CLASSES, 12).astype(np.float64)}), SpecError, "w is double: export the model in float32"),
        (one({}, others=[HALF]), SpecError, "w is float16: export the model in float32"),
        (one({}, [node("Relu", "x", "y")]), SpecError, "nothing to train"),
        (
            one({}, [helper.make_node("Constant", [], ["w"], sparse_value=SPARSE), gemm("x w")]),
            UnsupportedOperator,
            "a sparse Constant in node 'w'",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line_on_no_stream(tmp_path, capfd, facts, error, words):
    path = write(tmp_path, **facts)
    with pytest.raises(error, match=words) as caught:
        from_onnx(path, (ROWS, 12))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("sizes", [(1,), (CLASSES,), (1, CLASSES)])
def test_what_a_gemm_adds_may_be_spread(tmp_path, sizes):
    assert_reads_right(write(tmp_path, [gemm()], {"w": numbers(CLASSES, 12), "b": numbers(*sizes)}))


@pytest.mark.parametrize(
    ("window", "size"),
    [
        (node("Conv", "x c", "a", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"), 8),
        (node("MaxPool", "x", "a", kernel_shape=[2, 2], auto_pad="SAME_LOWER"), 9),
    ],
)
def test_auto_pad_may_pad_unevenly(tmp_path, window, size):
    graph, _ = assert_reads_right(write(tmp_path, *images(window), shape=(2, 3, size, size)), (2, 3, size, size))
    upper = graph.nodes[0].op == "conv2d"
    sides = [graph.nodes[0].attrs[name] for name in ("padding", "padding_end")]
    assert sides == ([(0, 0), (1, 1)] if upper else [(1, 1), (0, 0)])


def factors(*values):
    return {"s": np.array([1, 1, *values], np.float32)}


SIZED = {
    "nearest": (node("Resize", "x", "a"), factors(2, 3)),
    "nearest of torch": (
        node("Resize", "x", "a", nearest_mode="floor", coordinate_transformation_mode="asymmetric"),
        factors(2, 1.5),
    ),
    "nearest of fewer": (node("Resize", "x", "a", nearest_mode="round_prefer_ceil"), factors(0.5, 1)),
    "halves": (node("Resize", "x", "a"), factors(0.5, 0.5)),
    "linear": (node("Resize", "x", "a", mode="linear"), factors(2, 1.25)),
    "corners": (
        node("Resize", "x", "a", mode="linear", coordinate_transformation_mode="align_corners"),
        factors(2, 1 / 3),
    ),
    "asymmetric": (
        node("Resize", "x", "a", mode="linear", coordinate_transformation_mode="asymmetric"),
        factors(1.5, 2),
    ),
}


@pytest.mark.parametrize("given", ["scales", "sizes"])
@pytest.mark.parametrize("case", SIZED)
def test_images_are_resized_as_onnx_does(tmp_path, case, given):
    window, held = SIZED[case]
    nodes, weights = images(window)
    by = held["s"] if given == "scales" else np.int64([2, 3, *np.floor(9 * held["s"][2:])])
    window.input[:] = ["x", "", "s"] if given == "scales" else ["x", "", "", "s"]
    _, state = assert_reads_right(write(tmp_path, nodes, weights | {"s": by}, IMAGES), IMAGES)
    assert "s" not in state


def test_upsample_of_old_files(tmp_path):
    nodes, weights = images(node("Upsample", "x s", "a", mode="nearest"))
    graph, state = from_onnx(write(tmp_path, nodes, weights | factors(2, 3), IMAGES, opset=9), IMAGES)
    x = torch.from_numpy(numbers(*IMAGES))
    wanted = torch.nn.functional.interpolate(x, scale_factor=(2, 3)).mean((2, 3)) @ torch.from_numpy(weights["w"]).T
    np.testing.assert_allclose(run_graph(graph, state, x), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "said"),
    [
        (node("Resize", "x  s", "a", mode="cubic"), "resize with method cubic"),
        (node("Resize", "x  s", "a", nearest_mode="ceil"), "resize with .*rounded by ceil"),
        (node("Resize", "x  s", "a", mode="linear", antialias=1), "^Resize .antialias.* in node 'a'"),
        (node("Pad", "x q", "a", mode="reflect"), "pad with reflect"),
    ],
)
def test_resizing_and_padding_otherwise_is_refused(tmp_path, window, said):
    nodes, weights = images(window)
    if window.op_type == "Resize":
        window.input[:] = ["x", "", "s"]
    others = factors(2, 2) | {"q": np.int64([0, 0, 1, 1, 0, 0, 1, 1])}
    with pytest.raises(UnsupportedOperator, match=said):
        from_onnx(write(tmp_path, nodes, weights | others, IMAGES, opset=18), IMAGES)


def sparse(name, weight, linear):
    """A SparseTensorProto of what is not 0."""
    places = np.flatnonzero(weight) if linear else np.argwhere(weight)
    values = numpy_helper.from_array(weight[weight != 0], name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(places.astype(np.int64)), weight.shape)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("live", [0, 9])
def test_sparse_initializers_are_read_and_written_back_dense(tmp_path, linear, live):
    weight = numbers(CLASSES, 12)
    weight.ravel()[live:] = 0
    path = write(tmp_path, [gemm()], {"b": numbers(CLASSES)})
    model = onnx.load(path)
    model.graph.sparse_initializer.append(sparse("w", weight, linear))
    onnx.save(model, path)
    _, state = from_onnx(path, (ROWS, 12))
    np.testing.assert_array_equal(state["w"], weight)
    if live:
        step = mest.compile(path, (ROWS, 12), scheme="unstructured", sparsity="as-given", threads=1)
        assert step.masks()["w"].sum() == live
        mest.to_onnx(step, tmp_path / "out.onnx", into=path)
        np.testing.assert_array_equal(from_onnx(tmp_path / "out.onnx", (ROWS, 12))[1]["w"], weight)


@pytest.mark.parametrize(("linear", "place"), [(True, 60), (True, -1), (False, (5, 0)), (False, (0, -1))])
def test_sparse_initializers_outside_of_their_shape_are_refused_by_name(tmp_path, linear, place):
    path = write(tmp_path, [gemm()], {"b": numbers(CLASSES)})
    model, one = onnx.load(path), sparse("w", np.eye(CLASSES, 12, dtype=np.float32), linear)
    indices = numpy_helper.to_array(one.indices).copy()
    indices[0] = place
    one.indices.CopyFrom(numpy_helper.from_array(indices))
    model.graph.sparse_initializer.append(one)
    onnx.save(model, path)
    with pytest.raises(DataError, match="w: the indices of the sparse_initializer do not lie in its shape"):
        from_onnx(path, (ROWS, 12))


@pytest.mark.parametrize("turned", [False, True])
def test_a_mask_that_torch_has_left_in_the_file_is_multiplied_in(tmp_path, turned):
    weight, mask = numbers(CLASSES, 12), (numbers(CLASSES, 12) > 0).astype(np.float32)
    product = node("Mul", "w_mask w_orig" if turned else "w_orig w_mask", "mul_3")
    path = write(tmp_path, [product, gemm("x mul_3 b")], {"w_orig": weight, "w_mask": mask, "b": numbers(CLASSES)})
    _, state = assert_reads_right(path)
    assert state.keys() == {"w", "b"}
    np.testing.assert_array_equal(state["w"], weight * mask)


def test_external_data_is_read_or_missed_by_name(tmp_path):
    path = write(tmp_path, [gemm()], {"w": numbers(CLASSES, 12), "b": numbers(CLASSES)})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.data", size_threshold=0)
    assert_reads_right(path)
    (tmp_path / "w.data").unlink()
    with pytest.raises(DataError, match=r"net.onnx cannot be read.*w\.data") as caught:
        from_onnx(path, (ROWS, 12))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\x00\x01junk", b"no model at all\n", onnx.ModelProto(ir_version=8).SerializeToString()]
)
def test_files_that_are_no_model_are_named(tmp_path, content):
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(DataError, match="net.onnx cannot be read as an ONNX model") as caught:
        from_onnx(tmp_path / "net.onnx", (ROWS, 12))
    assert "\n" not in str(caught.value)
