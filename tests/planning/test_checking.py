"""What `mest.check` and `mest-compile check` say of a model is what compiling it does."""

import json
import logging

import numpy as np
import pytest
import torch
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import UnsupportedOperator, UsageError
from mest_compile.cli import main

SHAPE = (4, 3, 8, 8)


class Net(nn.Module):
    def __init__(self, odd=False):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.body, self.fc, self.odd = nn.Conv2d(8, 32, 3), nn.Linear(32, 5), odd
        self.stem.requires_grad_(False)

    def forward(self, x):
        y = self.deep(self.stem(x))
        y = self.body(y.cumsum(2) if self.odd else y)
        return self.fc((y.cumprod(1) if self.odd else y).mean((2, 3)))


def test_what_is_said_is_what_is_compiled():
    found = mest.check(Net(), SHAPE, sparsity=0.75)
    step = mest.compile(Net(), SHAPE, sparsity=0.75)
    assert found.taken and found.words == "" and found.refused == ()
    assert {f"{layer.name}.weight": layer.live_weights for layer in found.layers} == step.live_weights()
    assert [(layer.name, layer.kind, layer.state, layer.frozen, layer.why) for layer in found.layers] == [
        ("stem", "conv2d 3x3", "dense", True, "the first convolution"),
        ("deep", "depthwise 3x3", "dense", False, "depthwise"),
        ("body", "conv2d 3x3", "sparse", False, ""),
        ("fc", "linear", "dense", False, "the last layer"),
    ]
    assert found.memory[64] > found.memory[16] > found.memory[8] > 0
    same = mest.check(Net(), (8, *SHAPE[1:]), sparsity=0.75)
    compiled = mest.compile(Net(), (8, *SHAPE[1:]), sparsity=0.75)
    assert same.memory[8] == compiled.memory()["total"]
    zeros = sum(int((mask == 0).sum()) for mask in step.masks().values())
    assert found.sparsity == pytest.approx(zeros / found.weights) and found.weights - found.live_weights == zeros


def test_refused_operators_stand_among_the_layers_that_would_be_taken():
    found = mest.check(Net(odd=True), SHAPE)
    assert not found.taken and found.memory == {}
    assert [(layer.kind, layer.state) for layer in found.layers] == [
        ("conv2d 3x3", "dense"),
        ("depthwise 3x3", "dense"),
        ("cumsum", "refused"),
        ("conv2d 3x3", "sparse"),
        ("cumprod", "refused"),
        ("linear", "dense"),
    ]
    with pytest.raises(UnsupportedOperator) as caught:
        mest.compile(Net(odd=True), SHAPE)
    assert str(caught.value) == found.words and caught.value.refused == found.refused


def test_what_has_no_graph_at_all_is_refused_all_the_same():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    found = mest.check(Branches(), SHAPE)
    assert not found.taken and found.layers == () and "torch.export" in found.words


def test_memory_is_told_of_batches_that_a_model_can_have():
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    assert list(mest.check(net, (8, 6)).memory) == [8, 16, 32, 64]


def test_a_checkpoint_is_described_by_what_it_holds(tmp_path):
    step = mest.compile(Net(), SHAPE, sparsity=0.75)
    step.save(tmp_path / "net.safetensors")
    found = mest.check(tmp_path / "net.safetensors", ())
    assert {f"{layer.name}.weight": layer.live_weights for layer in found.layers} == step.live_weights()
    assert [layer.state for layer in found.layers] == ["dense", "dense", "sparse", "dense"]
    with pytest.raises(UsageError, match="has its scheme already"):
        mest.check(tmp_path / "net.safetensors", (), scheme="dense")
    with pytest.raises(UsageError, match="check takes the options"):
        mest.check(Net(), SHAPE, colour="red")


NET = """
from torch import nn

class Odd(nn.Module):
    def forward(self, x):
        return x.cumsum(1)

def taken(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, classes))

def refused(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), Odd(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, classes))
"""


def checked(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["check", *map(str, arguments)])
    return ended.value.code


def test_the_command_says_it_and_its_exit_code(tmp_path, capsys):
    (tmp_path / "net.py").write_text(NET)
    assert checked(f"{tmp_path}/net.py:taken", "--image", "3x8x8", "--classes", 7) == 0
    text = capsys.readouterr().out
    assert "taken: it can be trained" in text and "the first convolution" in text and "MiB at batch 64" in text
    assert checked(f"{tmp_path}/net.py:refused", "--image", "3x8x8", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert [layer["state"] for layer in document["layers"]] == ["dense", "refused", "sparse", "dense"]
    assert document["refused"] == [{"what": "cumsum", "where": "in layer '1' (Odd)", "operator": "cumsum"}]
    assert checked("gone.safetensors", "--scheme", "block") == 2
    assert "has its --scheme already" in capsys.readouterr().err


def test_a_model_that_stays_dense_says_why_of_each_layer(caplog):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 5))
    with caplog.at_level(logging.WARNING):
        step = mest.compile(net, SHAPE)
    [line] = [line for line in caplog.messages if "dense are" in line]
    assert "dense are: 0.weight (the first convolution); 1.weight (depthwise); 3.weight (the last layer). " in line
    images, labels = np.zeros(SHAPE, np.float32), np.zeros(4, np.int64)
    assert np.isfinite(step(torch.from_numpy(images), labels).loss)
