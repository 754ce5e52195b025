"""A net cut in two: the halves compute what the whole does, and train as it trains."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import INPUTS, Tiny, tiny
from torch import nn

from mest_compile.assembling import make_step
from mest_compile.finetuning.cutting import between, cut_of, evaluating, rest_of
from mest_compile.finetuning.features import BATCH, Extractor
from mest_compile.finetuning.net import prepared_net
from mest_compile.frontend import import_model
from mest_compile.options import StepOptions
from mest_compile.planning.plan import Plan, plan_step
from mest_compile.planning.trainable import choose_trainable


def cut_at(model, trainable, shape=(2, 3, 12, 12)):
    """(how many nodes are before the cut, the name of the last of them)."""
    graph, _ = import_model(model, shape)
    graph = choose_trainable(graph, [trainable])
    count = cut_of(graph)
    return count, graph.nodes[count - 1].name if count else None, graph


def test_a_net_is_cut_above_all_that_is_frozen():
    for trainable, first in (("last:1", "blocks.2.0.weight"), ("last:2", "blocks.1.0.weight"), ("fc.*", "fc.weight")):
        count, _, graph = cut_at(Tiny(), trainable)
        rest = between(graph, count, len(graph.nodes))
        assert next(iter(rest.parameters())) == first
        assert rest.nodes[0].inputs[0] == "input" and rest.prepared == ()
        assert rest.input_shape == ((2, 8, 6, 6) if trainable != "fc.*" else (2, 8))
        assert rest.trainable() == graph.trainable() and "stem.0.weight" not in rest.state_shapes


def test_a_path_around_moves_the_cut_down():
    class Around(nn.Module):
        """Its input is read again behind the second convolution."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            x = self.a(x).relu()
            return self.fc((self.c(self.b(x).relu()) + x).mean((2, 3)))

    count, name, graph = cut_at(Around(), "c.*")
    assert [node.op for node in graph.nodes[:count]] == ["conv2d", "relu"] and name == graph.nodes[1].name
    assert cut_at(Around(), "a.*")[0] == 0


@pytest.fixture(scope="module")
def parted(builder):
    """A plan in which the last block is sparse and trains, where it is cut, and the net."""
    net = prepared_net(tiny(), INPUTS, 3, 4, None, builder)
    everything = StepOptions(trainable="last:1", threads=1, scheme="unstructured", sparsity=0.5)
    frozen = ("stem.0.weight", *(f"blocks.{block}.{part}.weight" for block in (0, 1) for part in (0, 3)), "fc.weight")
    plan = plan_step(net.graph, replace(everything, dense_layers=frozen))
    return plan, cut_of(plan.facts.graph), net


def test_a_cut_net_trains_as_the_whole_one(parted, builder):
    plan, start, net = parted
    rng = np.random.default_rng(2)
    images, labels = rng.integers(0, 256, (9, 3, 12, 12)).astype(np.uint8), rng.integers(0, 4, 9)
    features = Extractor(plan, 0, start, net.state, builder)(images)
    whole = make_step(plan, net.state, builder, None)
    rest = Plan(rest_of(plan.facts, start), plan.records)
    part = make_step(rest, {name: net.state[name] for name in rest.facts.graph.state_shapes}, builder, None)
    assert part.sparsity() == whole.sparsity() == {"blocks.2.0.weight": 0.5, "blocks.2.3.weight": 0.5}
    for begin in (0, 3, 6):
        now = slice(begin, begin + 3)
        theirs = whole(images[now].astype(np.float32), labels[now], lr=0.1)
        mine = part(features[now], labels[now], lr=0.1)
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
    after, state = whole.state_dict(), part.state_dict()
    assert len(state) < len(after) and all(np.allclose(value, after[name], atol=1e-5) for name, value in state.items())
    assert np.allclose(part.predict(features), whole.predict(images), atol=1e-4)


def test_features_are_torchs_whatever_their_number(parted, builder, tmp_path):
    plan, start, net = parted
    model, seen = tiny(), []
    model.blocks[2].register_forward_hook(lambda part, inputs, output: seen.append(inputs[0].numpy()))
    extractor = Extractor(plan, 0, start, net.state, builder)
    images = np.random.default_rng(1).integers(0, 256, (BATCH + 5, 3, 12, 12)).astype(np.uint8)
    with torch.no_grad():
        mean, std = (torch.tensor(one).reshape(3, 1, 1) for one in (INPUTS.mean, INPUTS.std))
        model((torch.from_numpy(images).float() - mean) / std)
    told = []
    kept = extractor.cached(images, tmp_path / "a.npy", 2**20, lambda *counts: told.append(counts))
    assert kept.shape == (BATCH + 5, 8, 6, 6) and np.allclose(kept, seen[0], atol=1e-4)
    assert told == [(BATCH, BATCH + 5), (BATCH + 5, BATCH + 5)] and not isinstance(kept, np.memmap)
    told.clear()
    again = extractor.cached(images, tmp_path / "a.npy", 100, lambda *counts: told.append(counts))
    assert isinstance(again, np.memmap) and np.array_equal(again, kept) and not told  # read where it lies


def test_nothing_of_what_only_predicts_trains(parted):
    plan, _, _ = parted
    facts = evaluating(plan.facts)
    assert not facts.graph.trainable() and not facts.graph.moving()
    assert all(layer.frozen for layer in facts.layers.values())
    assert all(node.attrs["evaluating"] for node in facts.graph.nodes if node.op == "batch_norm")
