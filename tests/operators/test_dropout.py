"""Dropout: the same on every device and after a resumed run, and else torch's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_frontend import KEEP, Calls, export, part
from test_step import make_batches, masked_steps, relative
from torch import nn
from torch.nn import functional as F

import mest_compile as mest
from mest_compile.base.errors import UnsupportedOperator
from mest_compile.frontend import from_onnx, from_torch
from mest_compile.operators.dropout import draws, stays

BATCH = (6, 3, 9, 9)
SEED = 3


class Dropping(nn.Module):
    """Behind a convolution, whole channels, in place, before the classifier; one that never drops, and one twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.some, self.channels, self.none = nn.Dropout(0.3), nn.Dropout2d(0.25), nn.Dropout(0)
        self.inside = nn.Dropout(0.5, inplace=True)

    def forward(self, x):
        x = F.relu(self.channels(self.first(self.none(x))))
        x = x + self.some(self.second(self.some(x)))
        x = x.mean((2, 3))
        self.inside(x)  # what was dropped in place is meant below
        return self.last(F.dropout(x, 0.1, self.training))


def graph_of(model):
    return from_torch(model, BATCH)[0]


def drawn(graph, monkeypatch):
    """Lets torch drop what a step drops: call by call, update by update."""
    nodes = [node for node in graph.nodes if node.op == "dropout"]
    called = [0]

    def like(name):
        def drop(x, p, training, inplace=False):
            if not training or not p:
                return x
            update, place = divmod(called[0], len(nodes))
            called[0] += 1
            (draw,) = draws(graph, SEED, update + 1)[f"{nodes[place].name}:draw"]
            kept = torch.tensor(stays(int(draw), tuple(x.shape), p, name == "dropout2d").copy())
            return x.mul_(kept / (1 - p)) if inplace else x * (kept / (1 - p))

        return drop

    for name in "dropout", "dropout2d":
        monkeypatch.setattr(F, name, like(name))


def test_how_it_is_read():
    nodes = [node for node in graph_of(Dropping()).nodes if node.op == "dropout"]
    assert [node.attrs for node in nodes] == [{"p": 0.25, "whole": True}, *({"p": p} for p in (0.3, 0.3, 0.5, 0.1))]
    assert len({node.name for node in nodes}) == 5
    last = graph_of(Dropping()).nodes[-1]
    assert last.op == "linear" and last.inputs == (nodes[-1].name,) and nodes[-1].inputs == (nodes[-2].name,)


def test_what_does_not_train_does_not_drop():
    model = Dropping()
    model.some.eval()
    assert [node.attrs["p"] for node in graph_of(model).nodes if node.op == "dropout"] == [0.25, 0.5, 0.1]
    assert sum(node.op == "dropout" for node in graph_of(model.eval()).nodes) == 5


@pytest.mark.parametrize("target", ["local", "opencl"])
def test_three_steps_equal_torchs_that_drops_the_same(target, monkeypatch, tmp_path):
    if target == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    torch.manual_seed(0)
    model, optimizer = Dropping(), mest.SGD(lr=0.05, momentum=0.9)
    named = {"scheme": "unstructured", "sparsity": 0.5, "dense_layers": ["last"], "seed": SEED}
    step = mest.compile(model, BATCH, optimizer=optimizer, target=target, **named)
    batches = make_batches(BATCH, 5, 3)
    found = step.gradients(*batches[0])
    drawn(graph_of(model), monkeypatch)
    losses, gradients = masked_steps(model, step.masks(), batches, 0.05, optimizer)
    for key, wanted in gradients.items():
        assert relative(found[key], wanted) < 1e-4, key
    made = [step(*batch).loss for batch in batches[:2]]
    step.save(tmp_path / "checkpoint")
    made.append(step(*batches[2]).loss)
    np.testing.assert_allclose(made, losses, rtol=1e-5)
    again = mest.load(tmp_path / "checkpoint")
    assert again(*batches[2]).loss == made[2] and len(set(made)) == 3
    model.eval()
    assert relative(step.predict(batches[0][0]), model(torch.from_numpy(batches[0][0])).detach().numpy()) < 1e-4


def test_updates_names_and_seeds_draw_differently_and_evenly():
    graph = graph_of(Dropping())
    found = [int(one[0]) for seed in (0, 1, 2**40) for update in (1, 2) for one in draws(graph, seed, update).values()]
    assert len(set(found)) == 3 * 2 * 5
    first, second = stays(found[0], (64, 32, 8, 8), 0.25), stays(found[1], (64, 32, 8, 8), 0.25)
    for axes in (1, 2, 3), (0, 2, 3), (0, 1):
        spread = np.sqrt(0.25 * 0.75 / np.prod([first.shape[axis] for axis in axes]))
        assert abs(first.mean(axes) - 0.75).max() < 5 * spread
    assert abs((first & second).mean() - 0.75**2) < 0.01
    whole = stays(found[0], (64, 32, 8, 8), 0.25, whole=True)
    assert (whole == whole[:, :, :1, :1]).all() and abs(whole.mean() - 0.75) < 0.05


@pytest.mark.filterwarnings("ignore")
def test_a_training_file_drops_and_one_that_is_written_does_not(tmp_path):
    path = export(part(nn.Dropout(0.25)).train(), (2, 3, 8, 8), tmp_path / "dropout.onnx", **KEEP)
    graph, _ = from_onnx(path, (2, 3, 8, 8))
    assert [node.attrs for node in graph.nodes if node.op == "dropout"] == [{"p": 0.25}]
    step = mest.compile(Dropping(), BATCH, scheme="dense", sparsity=0)
    mest.to_onnx(step, tmp_path / "out.onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    ((images, _),) = make_batches(BATCH, 5, 1)
    assert relative(session.run(None, {"input": images})[0], step.predict(images)) < 1e-5


def test_dropping_all_leaves_no_gradient():
    step = mest.compile(part(nn.Dropout(1.0)), (4, 3, 8, 8), scheme="dense", sparsity=0)
    found = step.gradients(np.random.default_rng(0).standard_normal((4, 3, 8, 8), np.float32), np.arange(4) % 2)
    assert not found["conv.weight"].any() and found["fc.bias"].any()


def test_what_evaluation_would_drop_too_is_refused():
    with pytest.raises(UnsupportedOperator, match="dropout with p=0.2 .* trains differently"):
        from_torch(Calls(lambda self, y: F.dropout(y, 0.2, training=True)), (2, 3, 8, 8))


def test_a_name_decides_what_is_dropped():
    graph = graph_of(Dropping())
    node = next(node for node in graph.nodes if node.op == "dropout")
    renamed = replace(graph, nodes=(replace(node, name="elsewhere"),))
    assert draws(renamed, 0, 1)["elsewhere:draw"] != draws(graph, 0, 1)[f"{node.name}:draw"]
