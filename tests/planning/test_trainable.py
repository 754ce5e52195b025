"""What patterns, and blocks counted from the end, mean; what nothing matches is refused with what is near."""

import numpy as np
import pytest
import torch
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import SpecError, UnknownName, UsageError
from mest_compile.frontend import from_onnx, from_torch
from mest_compile.ir.graph import CHOSEN, CUT, FLAG
from mest_compile.models.catalog import build_model
from mest_compile.options import StepOptions
from mest_compile.planning.freezing import parts_of
from mest_compile.planning.trainable import blocks, choose_trainable

SHAPE = (2, 3, 16, 16)


@pytest.fixture(scope="module")
def resnet():
    return from_torch(build_model("resnet20", SHAPE, 10, 4), SHAPE)[0]


class Nested(nn.Module):
    """A stem, blocks in stages, of which one has parts of its own, and a head."""

    def __init__(self, unused=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.stages = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())) for _ in range(2))
            for _ in range(2)
        )
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.aside = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(self.norm(x))


@pytest.fixture(scope="module")
def nested():
    return from_torch(Nested(), (4, 8))[0]


def chosen(graph, trainable):
    return choose_trainable(graph, StepOptions(trainable=trainable).trainable)


def evaluating(graph):
    return [node.name for node in graph.nodes if node.attrs.get("evaluating")]


def test_blocks_are_the_innermost_numbered_parts_that_hold_several_layers(resnet, nested):
    assert blocks(resnet) == [f"layer{stage}.{place}" for stage in (1, 2, 3) for place in range(3)]
    assert blocks(nested) == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]
    flat, _ = from_torch(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), (4, 8))
    assert blocks(flat) == ["0", "2"]
    assert blocks(from_torch(build_model("mlp", (4, 8), width=8), (4, 8))[0]) == []


def test_the_last_blocks_and_what_comes_after_them_train(resnet, nested):
    graph = chosen(resnet, "last:2")
    parts = {name.rsplit(".", 2)[0] if name.startswith("layer") else name for name in graph.trainable()}
    assert parts == {"layer3.1", "layer3.2", "fc.weight", "fc.bias"}
    assert set(graph.frozen.values()) == {CHOSEN}
    assert set(evaluating(graph)) == {
        node.name for node in graph.nodes if node.op == "batch_norm" and node.params["weight"] not in graph.trainable()
    }
    graph = chosen(nested, "last:1")
    assert {name.rpartition(".")[0] for name in graph.trainable()} == {"stages.1.1.0", "stages.1.1.1.0", "norm", "head"}
    assert evaluating(graph) == ["stem.1"]


def test_patterns_add_up_and_a_norm_that_trains_in_part_stays_as_it_is(nested):
    graph = chosen(nested, ["stages.[1-9].*", "*.bias"])
    assert [name for name in graph.frozen if not name.startswith(("stem", "stages.0"))] == [
        "norm.weight",
        "head.weight",
    ]
    assert "stem.0.bias" not in graph.frozen and evaluating(graph) == []
    assert chosen(nested, "stages.[1-9].*, *.bias") == graph


def test_patterns_decide_in_the_place_of_flags_but_not_of_cuts():
    module = Nested()
    module.stem.requires_grad_(False)
    graph, _ = from_torch(module, (4, 8))
    assert graph.frozen == dict.fromkeys(("stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"), FLAG)
    assert chosen(graph, None) == graph
    assert chosen(graph, "*").frozen == {}

    class Cut(Nested):
        def forward(self, x):
            with torch.no_grad():
                x = self.stem(x)
            return self.head(self.norm(x))

    graph, _ = from_torch(Cut(), (4, 8))
    assert chosen(graph, "head.*").frozen["stem.0.weight"] == CUT
    with pytest.raises(UnknownName, match="'stem.*' matches stem.0.weight, behind a cut gradient"):
        chosen(graph, "stem.*")


@pytest.mark.parametrize(
    ("trainable", "error", "words"),
    [
        ("heads.*", UnknownName, "no parameter matches 'heads.*'; there are, for example: .*head"),
        (["head.*", "stages.7.*"], UnknownName, "no parameter matches 'stages.7.*'"),
        ("aside.*", UnknownName, "matches only what the forward pass does not train with"),
        ("stem.1.running_*", UnknownName, "matches only what the forward pass does not train with"),
        ("last:5", UsageError, "from 1 to 4, the model has 4 blocks: stages.0.0"),
        ("last:0", UsageError, "a number from 1 to 4"),
        ("last:x", UsageError, "a number from 1 to 4"),
        ("", UsageError, "wanted patterns"),
        ([], UsageError, "wanted patterns"),
        (3, UsageError, "wanted a list of names"),
    ],
)
def test_what_is_asked_and_is_not_there_is_refused(nested, trainable, error, words):
    with pytest.raises(error, match=words) as caught:
        chosen(nested, trainable)
    assert "\n" not in str(caught.value)


def test_nothing_that_trains_is_refused():
    module = Nested().requires_grad_(False)
    with pytest.raises(SpecError, match="nothing would train, every parameter is frozen: stem.0.weight"):
        mest.compile(module, (4, 8))


def test_a_fixed_filter_stays_dense_and_as_it_was():
    class Blurred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("blur", torch.randn(8, 8, 3, 3))
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            x = self.second(nn.functional.conv2d(self.first(x).relu(), self.blur, padding=1)).relu()
            return self.fc(x.mean((2, 3)))

    module = Blurred()
    step = mest.compile(module, (4, 3, 8, 8), scheme="unstructured", sparsity=0.8, threads=1)
    assert step.masks().keys() == {"second.weight"} and step.describe()["frozen"] == {"blur": "a buffer"}
    step(np.zeros((4, 3, 8, 8), np.float32), np.arange(4))
    assert np.array_equal(step.state_dict()["blur"], module.blur.numpy())


def test_an_onnx_model_takes_patterns(tmp_path):
    """Its file has no flags: all trains where nothing is said."""
    torch.onnx.export(Nested().eval(), torch.zeros(4, 8), tmp_path / "a.onnx", dynamo=False, do_constant_folding=False)
    graph, _ = from_onnx(tmp_path / "a.onnx", (4, 8))
    assert chosen(graph, None).frozen == {}
    options = {"scheme": "dense", "sparsity": 0, "threads": 1, "trainable": ["head.*", "norm.*"]}
    step = mest.compile(tmp_path / "a.onnx", (4, 8), **options)
    assert set(step.describe()["trainable"]) == {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    before = step.state_dict()
    step(np.random.default_rng(0).standard_normal((4, 8), np.float32), np.arange(4))
    moved = {name for name, array in step.state_dict().items() if not np.array_equal(array, before[name])}
    assert moved == {*step.describe()["trainable"], "norm.running_mean", "norm.running_var"}


@pytest.mark.parametrize(
    ("name", "trainable", "wanted"),
    [
        ("resnet20", None, ["conv1", "layer1.0", "layer1.1", "layer1.2", "layer2.0", "layer2.1", "layer2.2"]),
        ("resnet20", ("last:2",), ["layer3.1", "layer3.2", "fc"]),
        ("vgg11", None, ["features.0", "features.4", "features.8", "features.11", "features.15", "features.18"]),
    ],
)
def test_what_freezes_at_once_is_a_block_or_a_layer_with_what_follows_it(name, trainable, wanted):
    shape = (2, 3, 32, 32)
    graph, _ = from_torch(build_model(name, shape, 10, 8), shape)
    graph = choose_trainable(graph, trainable)
    parts = parts_of(graph)
    assert list(parts)[: len(wanted)] == wanted
    assert [one for part in parts.values() for one in part] == graph.trainable()
    if name == "vgg11":
        assert parts["features.4"] == ("features.4.weight", "features.5.weight", "features.5.bias")
