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
from mest_compile.frontend.torch_attention import written_out
from mest_compile.operators.dropout import WHOLE, draws, stays

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

    def kept(x, p, name):
        update, place = divmod(called[0], len(nodes))
        called[0] += 1
        (draw,) = draws(graph, SEED, update + 1)[f"{nodes[place].name}:draw"]
        drawn = stays(int(draw), nodes[place].shape, p, WHOLE.get(name, "element"))
        drawn = drawn if drawn.shape == x.shape else np.moveaxis(drawn, 1, -1)  # shares lie with keys for channels
        return torch.tensor(drawn.copy()) / (1 - p)

    def like(name):
        def drop(x, p, training, inplace=False):
            if not training or not p:
                return x
            return x.mul_(kept(x, p, name)) if inplace else x * kept(x, p, name)

        return drop

    for name in "dropout", "dropout2d":
        monkeypatch.setattr(F, name, like(name))
    for kind in StochasticDepth, DropPath, SomeDropPath:
        monkeypatch.setattr(
            kind,
            "forward",
            lambda self, x: (
                x * kept(x, self.share, "drop_batch" if self.whole else "drop_path")
                if self.training and self.share
                else x
            ),
        )


class StochasticDepth(nn.Module):
    """As torchvision has it."""

    def __init__(self, p, mode):
        super().__init__()
        self.p, self.mode, self.share, self.whole = p, mode, p, mode == "batch"

    def forward(self, x):
        if not self.training or self.p == 0.0:
            return x
        size = [x.shape[0]] + [1] * (x.ndim - 1) if self.mode == "row" else [1] * x.ndim
        noise = torch.empty(size, dtype=x.dtype, device=x.device).bernoulli_(1.0 - self.p)
        return x * noise.div_(1.0 - self.p)


class DropPath(nn.Module):
    """As timm has it."""

    def __init__(self, drop_prob=0.0, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep, self.share, self.whole = drop_prob, scale_by_keep, drop_prob, False

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        noise = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (noise.div_(keep) if keep > 0.0 and self.scale_by_keep else noise)


class SomeDropPath(nn.Module):
    """As models of transformers have it."""

    def __init__(self, drop_prob=None):
        super().__init__()
        self.drop_prob, self.share, self.whole = drop_prob, drop_prob or 0.0, False

    def forward(self, x):
        if not self.drop_prob or not self.training:
            return x
        keep = 1 - self.drop_prob
        noise = keep + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x.div(keep) * noise.floor_()


class Depths(nn.Module):
    """Blocks that are skipped, with a gate in each, as EfficientNets have them; features too, and parts that never
    are."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(8, 5)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.wide = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False) for _ in range(3))
        self.gates = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.depths = nn.ModuleList([StochasticDepth(0.25, "row"), DropPath(0.5), StochasticDepth(0.5, "batch")])
        self.features, self.never = SomeDropPath(0.25), nn.ModuleList([DropPath(0.0), SomeDropPath()])

    def forward(self, x):
        x = F.silu(self.norms[0](self.stem(x)))
        for norm, wide, gate, depth in zip(self.norms[1:], self.wide, self.gates, self.depths, strict=True):
            y = norm(wide(x))
            x = x + depth(y * torch.sigmoid(gate(F.adaptive_avg_pool2d(y, 1))))
        x = x.mean((2, 3))
        return self.last(x + self.features(F.silu(self.never[1](self.never[0](x)))))


class Attending(nn.Module):
    """No patch sees the next one; shares are dropped."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, 3), nn.Linear(8, 5)
        self.attend = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.register_buffer("hidden", torch.eye(9, dtype=torch.bool).roll(1, 1))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.last((x + self.attend(x, x, x, attn_mask=self.hidden, need_weights=False)[0]).mean(1))


def test_stochastic_depth_is_read_as_what_it_drops():
    model = Depths()
    before = torch.get_rng_state()
    nodes = [node for node in graph_of(model).nodes if node.op == "dropout"]
    assert [(node.attrs["p"], node.attrs["whole"]) for node in nodes] == [
        (0.25, "example"),
        (0.5, "example"),
        (0.5, "batch"),
        (0.25, "example"),
    ]
    assert torch.equal(torch.get_rng_state(), before) and not any("forward" in vars(part) for part in model.modules())
    model.depths[0].eval()
    assert sum(node.op == "dropout" for node in graph_of(model).nodes) == 3


@pytest.mark.parametrize("odd", [DropPath(0.5, scale_by_keep=False), StochasticDepth(0.5, "column")])
def test_what_only_looks_like_stochastic_depth_is_refused(odd):
    """The second drops all of a batch together, and does not say that."""
    model = Depths()
    model.depths[1] = odd
    with pytest.raises(UnsupportedOperator, match=r"in training mode the model does .* 'depths.1'"):
        graph_of(model)


def test_how_it_is_read():
    nodes = [node for node in graph_of(Dropping()).nodes if node.op == "dropout"]
    assert [node.attrs for node in nodes] == [
        {"p": 0.25, "whole": "channel"},
        *({"p": p} for p in (0.3, 0.3, 0.5, 0.1)),
    ]
    assert len({node.name for node in nodes}) == 5
    last = graph_of(Dropping()).nodes[-1]
    assert last.op == "linear" and last.inputs == (nodes[-1].name,) and nodes[-1].inputs == (nodes[-2].name,)


def test_what_does_not_train_does_not_drop():
    model = Dropping()
    model.some.eval()
    assert [node.attrs["p"] for node in graph_of(model).nodes if node.op == "dropout"] == [0.25, 0.5, 0.1]
    assert sum(node.op == "dropout" for node in graph_of(model.eval()).nodes) == 5


@pytest.mark.parametrize(
    ("kind", "target"),
    [(Dropping, "local"), (Dropping, "opencl"), (Depths, "local"), (Depths, "opencl"), (Attending, "local")],
)
def test_three_steps_equal_torchs_that_drops_the_same(kind, target, monkeypatch, tmp_path):
    if target == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    torch.manual_seed(0)
    model, optimizer = kind(), mest.SGD(lr=0.05, momentum=0.9)
    named = {"scheme": "unstructured", "sparsity": 0.5, "dense_layers": ["last"], "seed": SEED}
    step = mest.compile(model, BATCH, optimizer=optimizer, target=target, **named)
    batches = make_batches(BATCH, 5, 3)
    found = step.gradients(*batches[0])
    drawn(graph_of(model), monkeypatch)
    with written_out(model):
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
    whole = stays(found[0], (64, 32, 8, 8), 0.25, whole="channel")
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
