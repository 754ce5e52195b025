"""Which layers are dense when nobody says, and that it is said when that is most of a model."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import MestError, SparsityError, UnknownName, UsageError
from mest_compile.frontend import import_model
from mest_compile.ir.graph import ForwardGraph, LayerSpec, Node
from mest_compile.models.catalog import build_model
from mest_compile.options import StepOptions
from mest_compile.planning.layers import layer_specs, say_what_stays_dense, why_dense
from mest_compile.planning.plan import plan_step
from mest_compile.sparsity import parse_scheme
from mest_compile.sparsity.defaults import default_dense_layers
from mest_compile.sparsity.distributions import distribute, together

SHAPE = (2, 8, 8, 8)


def graph(text):
    """A forward graph of lines "name = op input ...", conv3 and conv1 being convolutions, every value (2, 8, 8, 8), and
    a classifier."""
    nodes, shapes = [], {}
    for line in text.strip().splitlines():
        name, _, op, *inputs = line.split()
        params, attrs = {}, {}
        if op.startswith("conv"):
            size = int(op[4:])
            op, params, attrs = (
                "conv2d",
                {"weight": f"{name}.weight"},
                {"stride": (1, 1), "padding": (size // 2, size // 2)},
            )
            shapes[f"{name}.weight"] = (8, 8, size, size)
        nodes.append(Node(op, name, tuple(inputs), SHAPE, params, attrs))
    nodes += [
        Node("global_avg_pool", "mean", (nodes[-1].name,), (2, 8)),
        Node("linear", "fc", ("mean",), (2, 10), {"weight": "fc.weight"}),
    ]
    return ForwardGraph(tuple(nodes), SHAPE, shapes | {"fc.weight": (10, 8)})


BLOCK = "a = conv3 stem\nn = batch_norm a\nr = relu n\nb = conv3 r\nm = batch_norm b\n"
SHORTCUTS = {
    "of a residual block": (BLOCK + "s = conv1 stem\nq = batch_norm s\nsum = add m q", True),
    "the other way round": ("s = conv1 stem\nq = batch_norm s\n" + BLOCK + "sum = add q m", True),
    "behind a pool": (BLOCK + "p = avg_pool2d stem\ns = conv1 p\nsum = add m s", True),
    "of what is normalised before": (
        "n = batch_norm stem\nr = relu n\na = conv3 r\nb = conv3 a\ns = conv1 r\nsum = add b s",
        True,
    ),
    "of a bottleneck": ("a = conv1 stem\nb = conv3 a\nc = conv1 b\ns = conv1 stem\nsum = add c s", True),
    "beside a path as long": ("a = conv3 stem\ns = conv1 stem\nsum = add a s", False),
    "in a row": ("a = conv3 stem\ns = conv1 a\nr = relu s", False),
    "the last of a path, beside the value itself": (BLOCK + "s = conv1 m\nsum = add s stem", False),
    "the last of a path, beside a shorter one": (
        "a = conv3 stem\nb = conv3 a\ns = conv1 b\nc = conv3 stem\nsum = add s c",
        False,
    ),
    "the last of a block, which the next block adds to its own": (
        "a = conv3 stem\ns = conv1 a\nn = batch_norm s\nb = conv1 n\nc = conv3 b\nd = conv1 c\nsum = add n d",
        False,
    ),
    "whose result is worked on further": (BLOCK + "s = conv1 stem\nz = conv3 s\nsum = add m z", False),
}


@pytest.mark.parametrize("case", SHORTCUTS)
def test_of_1x1_convolutions_those_of_shortcuts_are_dense(case):
    text, dense = SHORTCUTS[case]
    model = graph("stem = conv3 input\n" + text)
    specs = layer_specs(model)
    found = default_dense_layers(model, specs, {spec.name: parse_scheme("unstructured") for spec in specs})
    assert set(found) == {"stem.weight", "fc.weight"} | ({"s.weight"} if dense else set())


@pytest.mark.parametrize(("name", "width", "share"), [("mobilenetv2", 32, 0.96), ("mobilenetv1", 8, 0.93)])
def test_a_mobile_nets_1x1_convolutions_are_sparse_and_its_depthwise_ones_dense(name, width, share):
    model, _ = import_model(build_model(name, (2, 3, 96, 96), 10, width), (2, 3, 96, 96))
    layers = plan_step(model, StepOptions("block", 0.9)).layers
    sparse = {weight for weight, layer in layers.items() if layer.sparsity}
    pointwise = {weight for weight, layer in layers.items() if layer.spec.weight_shape[2:] == (1, 1)}
    assert pointwise - sparse == {list(layers)[-1]} and sparse < pointwise
    elems = {weight: layer.spec.weight_elems for weight, layer in layers.items()}
    assert sum(elems[weight] for weight in sparse) / sum(elems.values()) == pytest.approx(share, abs=0.01)
    depthwise = {weight for weight, layer in layers.items() if layer.spec.depthwise}
    assert {layers[weight].kernels for weight in depthwise} == {"depthwise"} and len(depthwise) in (13, 17)


def planned(text, scheme="unstructured", sparsity=0.9, distribution="uniform", dense_layers=None):
    return plan_step(graph(text), StepOptions(scheme, sparsity, distribution, dense_layers)).layers


def say(text, *options):
    """What the log says of them."""
    layers = planned(text, *options)
    say_what_stays_dense(layers, why_dense(graph(text), StepOptions(*(options or ("unstructured",))), layers))
    return layers


POINTWISE = "stem = conv3 input\na = conv1 stem\nb = conv1 a\nc = conv3 b"


def test_a_scheme_for_3x3_kernels_leaves_pointwise_convolutions_and_the_log_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        layers = say(POINTWISE, "pattern")
    assert {name for name, layer in layers.items() if layer.sparsity} == {"c.weight"}
    [line] = caplog.messages
    assert line.startswith("42% of the weights are in sparse layers, so that the sparsity of all is 0.381; dense are: ")
    assert (
        "dense are: stem.weight (the first convolution); a.weight, b.weight (pattern is for 3x3 kernels, the layer's "
        "are 1x1); fc.weight (the last layer). " in line
    )


def test_a_layer_that_the_scheme_has_no_units_for_stays_dense_and_says_why_unless_it_is_named():
    net = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 8), nn.Linear(8, 4))
    found = mest.check(net, (2, 12), sparsity=0.5)
    why = "block:4x1 needs multiples of 4 output and 1 input channels, the layer has 6 and 40"
    assert [layer.why for layer in found.layers] == ["", why, "", "the last layer"]
    assert [bool(layer.sparsity) for layer in found.layers] == [True, False, True, False]
    assert mest.check(net, (2, 12), scheme={"*": "block"}, sparsity={"*": 0.5}).layers == found.layers
    for named in ({"sparsity": {"2": 0.5}}, {"scheme": {"2": "block", "*": "block"}}, {"dense_layers": ["0"]}):
        with pytest.raises(SparsityError, match="2.weight: scheme block:4x1 needs .* 6 and 40; choose another scheme"):
            mest.check(net, (2, 12), **{"sparsity": 0.5} | named)


def test_a_scheme_that_fits_no_layer_is_refused():
    net = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 10), nn.Linear(10, 4))
    with pytest.raises(SparsityError, match="0.weight: scheme block:4x1 needs multiples of 4 .* choose another scheme"):
        mest.check(net, (2, 12), sparsity=0.5)
    assert mest.check(net[-1:], (2, 10), sparsity=0.5).layers[0].why == "the last layer"


def test_a_model_that_comes_out_dense_says_so_and_one_that_is_sparse_says_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        say("stem = conv3 input")
        assert caplog.messages.pop().startswith(
            "none of the weights are in sparse layers, so that the sparsity of all is 0.000; dense"
        )
        caplog.clear()
        say("stem = conv1 input\nb = conv3 stem")
        assert not caplog.messages


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"sparsity": {"d": 0.9}},
            UnknownName,
            "sparsity names 'd', which is no layer of the model; layers: stem.weight, a.weight",
        ),
        ({"sparsity": {5: 0.9}}, UnknownName, "sparsity names 5, which is no layer"),
        (
            {"sparsity": {"a": 0.9}, "dense_layers": ["a"]},
            UsageError,
            "sparsity names a.weight, and so does dense_layers",
        ),
        ({"sparsity": {"a": 0.9, "a.weight": 0.8}}, UsageError, "names a.weight twice"),
        (
            {"sparsity": {"a": "x"}},
            SparsityError,
            "a.weight: sparsity is 'x'; wanted a finite number of 0 or more and below 1$",
        ),
        ({"sparsity": {"a": 1.0}}, SparsityError, "a.weight: sparsity is 1.0; wanted"),
        ({"sparsity": {"a": True}}, SparsityError, "a.weight: sparsity is True; wanted"),
        ({"sparsity": {"a": 0.9}, "distribution": "erk"}, UsageError, "leave distribution out"),
        ({"sparsity": {"a": 0.9}, "distribution": "magic"}, UnknownName, "no distribution 'magic'"),
        ({"distribution": ["erk"]}, UnknownName, r"no distribution \['erk'\]"),
        ({"sparsity": [0.9]}, SparsityError, r"sparsity is \[0.9\]; wanted"),
        ({"sparsity": float("nan")}, SparsityError, "sparsity is nan; wanted"),
        ({"dense_layers": ["d"]}, UnknownName, "dense_layers names 'd'"),
        ({"dense_layers": "a"}, UsageError, "dense_layers is 'a'; wanted a list of names, or None"),
        ({"dense_layers": [1]}, UsageError, r"dense_layers is \[1\]; wanted"),
    ],
)
def test_what_is_said_of_layers_and_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message) as caught:
        planned(POINTWISE, **options)
    assert "\n" not in str(caught.value)


def test_a_sparsity_for_each_layer_is_honoured():
    layers = planned(POINTWISE, sparsity={"stem": np.float32(0.5), "c.weight": 0.75})
    assert {name: layer.sparsity for name, layer in layers.items() if layer.sparsity} == {
        "stem.weight": 0.5,
        "c.weight": 0.75,
    }
    assert all(type(layer.sparsity) is float for layer in layers.values())


@pytest.mark.parametrize("sizes", [(10, 1), (1, 10), (3, 7), (5, 3)])
def test_erk_of_no_sparsity_is_no_sparsity_and_full_layers_have_none(sizes):
    layers = [LayerSpec("a", (*sizes, 3, 3), (2, sizes[1], 8, 8)), LayerSpec("b", (3, 360, 1, 1), (2, 360, 1, 1))]
    assert distribute("erk", layers, 0.0) == {"a": 0.0, "b": 0.0}
    for sparsity in np.linspace(0, 0.5, 40):
        assert all(share == 0 or share > 1e-9 for share in distribute("erk", layers, sparsity).values())


def test_the_sparsity_of_all_is_weighted_by_weights():
    assert together({"a": 0.9, "b": 0.5}, {"a": 300, "b": 100, "dense": 50}) == 0.8
    assert together({}, {}) == 0.0


def test_the_spare_units_of_a_sparser_net_are_spread_over_all_rows_by_the_seed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    weight = net[0].weight.data
    weight *= weight.abs() > weight.abs().flatten().kthvalue(int(0.95 * weight.numel())).values

    layer, scheme = LayerSpec("0.weight", (32, 32, 1, 1), (8, 32, 1, 1)), parse_scheme("unstructured")

    def start(seed):
        energy = scheme.energy(layer, weight.numpy().reshape(layer.weight_shape))
        return scheme.start(layer, energy, scheme.live_units(layer, 0.8), np.random.default_rng(seed)).reshape(32, 32)

    one, other = start(0), start(1)
    assert (start(0) == one).all() and (one != other).any()
    step = mest.compile(net, (8, 32), scheme="unstructured", sparsity=0.8, seed=1, threads=1)
    for found in (one, step.masks()["0.weight"]):
        assert found.sum() == round(0.2 * 1024) and found[weight.numpy() != 0].all()
        assert found.sum(1).min() >= 1 and found.sum(1).max() < 16


class Dying(nn.Module):
    """A convolution whose bias of normalisation is 0, as every new one's is, before a ReLU."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.norm, self.fc = (
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.Conv2d(8, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.Linear(16, 4),
        )

    def forward(self, x):
        return self.fc(self.norm(self.conv(self.stem(x))).relu().mean((2, 3)))


@pytest.mark.parametrize("scheme", ["filter", "unstructured", "block:4x1"])
def test_what_grows_in_a_dead_filter_trains(scheme):
    torch.manual_seed(0)
    step = mest.compile(
        Dying(), (8, 3, 6, 6), scheme=scheme, sparsity=0.5, threads=1, optimizer=mest.SGD(0.1, weight_decay=0)
    )
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((8, 3, 6, 6), np.float32), rng.integers(0, 4, 8)
    masks = step.masks()
    masks["conv.weight"][:8] = False  # as given: whole filters may die
    step.set_masks(masks)
    assert not step.masks()["conv.weight"][:8].any()
    step(*batch)
    step.mutate(0.8, 0.4)
    grown = step.masks()["conv.weight"]
    revived = grown & ~masks["conv.weight"].any((1, 2, 3), keepdims=True)
    if scheme != "filter":
        assert grown.any((1, 2, 3)).all()
    assert revived.any()
    before = step.state_dict()["conv.weight"]
    step(*batch)
    after = step.state_dict()["conv.weight"]
    for filter in np.flatnonzero(revived.any((1, 2, 3))):
        assert (before[filter] != after[filter])[revived[filter]].any(), filter


def test_a_model_without_layers_is_refused():
    with pytest.raises(MestError, match="no convolution and no linear layer"):
        plan_step(ForwardGraph((Node("relu", "relu", ("input",), SHAPE),), SHAPE, {}), StepOptions("dense", 0.0))
