"""What `mest.check` and `mest-compile check` say of a model is what compiling it does."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import mest_compile as mest
from mest_compile import checking
from mest_compile.base.errors import UnsupportedOperator, UsageError
from mest_compile.cli import main
from mest_compile.cli.check import _step_time
from mest_compile.kernels.choosing import kind_of
from mest_compile.kernels.source import kernel_source
from mest_compile.planning.layout import step_facts
from mest_compile.planning.plan import plan_step
from mest_compile.records.log import (
    STEP,
    FixedRecords,
    Measure,
    Outcome,
    Record,
    Records,
    plain,
    target_facts,
    text_digest,
)

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
    counted = f"{found.live_weights} of {found.weights} weights live"
    assert repr(found) == f"<Check taken: layers 1 sparse, 3 dense; {counted}>"
    assert "<td>body</td>" in found._repr_html_() and "<td>depthwise</td>" in found._repr_html_()
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


def test_the_time_of_a_step_is_what_is_on_record_of_it(monkeypatch):
    plans = []
    monkeypatch.setattr(checking, "plan_step", lambda *given: plans.append(plan_step(*given)) or plans[-1])
    monkeypatch.setattr(checking.Records, "of", lambda target: FixedRecords(target, {}))
    assert mest.check(Net(), SHAPE, sparsity=0.75).step is None

    def record(kernel, problem, live, seconds, text, target):
        facts = plain(problem), live, target_facts(target), "any", {}, Outcome.OK, Measure.MEASURED
        return Record(kernel, *facts, (seconds, seconds), text)

    target, calls = plans[0].target, plans[0].train.calls
    kinds = {kind_of(call, plans[0].layers) for call in calls if call.phase == "forward" and call.layer}
    count = sum(kind_of(call, plans[0].layers) in kinds for call in calls)
    held = Records(target, [], "any")
    for kind in kinds:
        held.add(record(*kind, 0.25, text_digest(kernel_source(*kind[:2], target).text), target))
    monkeypatch.setattr(checking.Records, "of", lambda target: held)
    found = mest.check(Net(), SHAPE, sparsity=0.75).step
    assert (found.seconds, found.timed, found.calls) == (0.25 * count, count, len(calls)) and 0 < count < len(calls)
    held.add(record(STEP, step_facts(plans[0].layers), 0, 0.125, text_digest(STEP), target))
    whole = mest.check(Net(), SHAPE, sparsity=0.75)
    assert (whole.step.seconds, whole.step.timed) == (0.125, len(calls))
    partly = replace(whole, step=found)
    assert _step_time(whole) == "step time, from tuning records: 125.0 ms at batch 4"
    assert f"{250.0 * count:.1f} ms at batch 4 in the {count} of its {len(calls)} kernel calls" in _step_time(partly)
    assert "mest-compile tune measures it" in _step_time(replace(whole, step=None))


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
