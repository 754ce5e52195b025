"""Models that normalise their input themselves: read from torch and ONNX in any spelling, equal to torch, refused where
torch would train it."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnxruntime import InferenceSession
from test_frontend import assert_same
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import InputError, UnsupportedOperator
from mest_compile.frontend import from_onnx, from_torch
from mest_compile.ir.graph import BUFFER, Preparation

SHAPE = (4, 3, 8, 8)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


class Net(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first = first
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.register_buffer("mean4", mean.view(1, 3, 1, 1))
        self.register_buffer("std4", std.view(1, 3, 1, 1))
        self.register_buffer("mean3", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("one", torch.tensor(0.5))
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(self.first(self, x)))).mean((2, 3)))


FORMS = {
    "buffers": lambda net, x: (x - net.mean4) / net.std4,
    "views": lambda net, x: (x - net.mean.view(1, -1, 1, 1)) / net.std.view(3, 1, 1),
    "new axes": lambda net, x: (x - net.mean[None, :, None, None]) / net.std[:, None, None],
    "not persistent": lambda net, x: (x - net.mean3) / net.std4,
    "numbers": lambda net, x: (x / 255 - 0.5) / 0.25,
    "number first": lambda net, x: 1 - x * 2,
    "a number, then one a channel": lambda net, x: (x / 255 - net.mean4) / net.std4,
    "one a channel, then a number": lambda net, x: (net.mean4 - x) * 2 + 1,
    "scale and shift": lambda net, x: x * net.std4 + net.mean4,
    "buffer without axes": lambda net, x: x - net.one,
    "made in forward": lambda net, x: x.sub(torch.as_tensor(MEAN)[:, None, None]).div(torch.tensor(STD).view(3, 1, 1)),
    "in place": lambda net, x: x.clone().sub_(net.mean4).div_(net.std4),
}


def made(first):
    torch.manual_seed(0)
    return Net(first)


def compiled(model, builder, **options):
    asked = {"scheme": "dense", "sparsity": 0, "threads": 1, "builder": builder, "optimizer": mest.SGD(lr=0.05)}
    return mest.compile(model, SHAPE, **asked | options)


def images(count=SHAPE[0], seed=0):
    return np.random.default_rng(seed).random((count, *SHAPE[1:]), np.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMS)
def test_any_spelling_is_read_from_torch_and_from_onnx(name, builder, tmp_path):
    module = made(FORMS[name])
    x = torch.from_numpy(images(6))
    with torch.no_grad():
        want = module.eval()(x).numpy()
    step = compiled(module, builder)
    assert step.graph.prepared and [node.name for node in step.graph.nodes][:2] == ["conv", "norm"]
    np.testing.assert_allclose(step.predict(x), want, rtol=0, atol=2e-6)
    torch.onnx.export(module, (x[:4],), tmp_path / "net.onnx", dynamo=False, do_constant_folding=False)
    graph, _ = from_onnx(tmp_path / "net.onnx", SHAPE)
    assert graph.nodes == step.graph.nodes and len(graph.prepared) == len(step.graph.prepared)
    again = compiled(tmp_path / "net.onnx", builder)
    np.testing.assert_allclose(again.predict(x), want, rtol=0, atol=2e-6)
    # And out again.
    mest.to_onnx(step, tmp_path / "new.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "new.onnx"), full_check=True)
    (found,) = InferenceSession(tmp_path / "new.onnx").run(None, {"input": x.numpy()})
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
    back, _ = from_onnx(tmp_path / "new.onnx", SHAPE)
    assert len(back.prepared) == len(step.graph.prepared)


def test_steps_equal_torch_and_padding_is_of_the_normalised_image(builder, tmp_path):
    """Padding the image before it is normalised would put -2 for 0 around it: all borders would differ."""
    module = made(FORMS["buffers"])
    rule = torch.optim.SGD(module.train().parameters(), lr=0.05, momentum=0.9)
    step = compiled(module, builder, optimizer=mest.SGD(lr=0.05, momentum=0.9, weight_decay=0))
    for seed in range(10):
        x, y = images(seed=seed), np.arange(4)
        rule.zero_grad()
        loss = F.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y))
        loss.backward()
        if seed == 0:
            gradients = step.gradients(x, y)
            for name, parameter in module.named_parameters():
                np.testing.assert_allclose(gradients[name], parameter.grad.numpy(), rtol=0, atol=1e-6)
        rule.step()
        assert step(x, y).loss == pytest.approx(loss.item(), rel=1e-5)
        if seed == 5:
            step.save(tmp_path / "step")
            step = mest.load(tmp_path / "step", builder=builder)
    for name, value in module.state_dict().items():
        np.testing.assert_allclose(step.state_dict()[name], value.numpy(), rtol=0, atol=1e-5)


def test_buffers_that_normalise_are_those_of_the_state(builder):
    module = made(FORMS["views"])
    step = compiled(module, builder)
    changed = step.state_dict() | {"mean": np.array([0.1, 0.2, 0.3], np.float32)}
    step.load_state_dict(changed)
    module.mean.copy_(torch.tensor([0.1, 0.2, 0.3]))
    with torch.no_grad():
        want = module.eval()(torch.from_numpy(images()))
    np.testing.assert_allclose(step.predict(images()), want, rtol=0, atol=2e-6)


def test_images_are_judged_as_they_are_stored(builder):
    step = compiled(made(FORMS["numbers"]), builder, activations="float16")
    step.predict(images() * 1e5)  # beyond float16 before they are divided by 255, not after
    with pytest.raises(InputError, match=r'activations="float16" holds 65504 at most'):
        step.predict(images() * 1e8)
    bad = images()
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="1 image values are NaN or infinite"):
        step.predict(bad)


class TwoPaths(nn.Module):
    """One convolution reads what `first` makes of the input, another what `second` does."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc((F.relu(self.a(self.first(x))) + F.relu(self.b(self.second(x)))).mean((2, 3)))


def test_one_normalisation_serves_several_layers():
    graph, _ = from_torch(TwoPaths(lambda x: x / 2 - 1, lambda x: x / 2 - 1), SHAPE)
    assert graph.prepared == (Preparation("divide", 2.0), Preparation("subtract", 1.0))
    assert [node.inputs for node in graph.nodes if node.op == "conv2d"] == [("input",)] * 2


@pytest.mark.parametrize("second", [lambda x: x, lambda x: x / 2, lambda x: x * 3])
def test_an_input_that_is_normalised_for_some_layers_only_is_refused(second):
    with pytest.raises(UnsupportedOperator, match="the input is normalised for some layers and not"):
        from_torch(TwoPaths(lambda x: x / 2 - 1, second), SHAPE)


def test_what_torch_would_train_and_what_is_no_number_a_channel_is_refused():
    module = made(FORMS["buffers"])
    del module.mean4
    module.mean4 = nn.Parameter(torch.zeros(1, 3, 1, 1))
    with pytest.raises(UnsupportedOperator, match="mean4 normalises the input and is a parameter"):
        from_torch(module, SHAPE)
    module.mean4.requires_grad_(False)
    assert from_torch(module, SHAPE)[0].prepared[0] == Preparation("subtract", "mean4")
    module = made(lambda net, x: x * net.image)
    module.register_buffer("image", torch.ones(4, 3, 1, 1))
    with pytest.raises(UnsupportedOperator, match="mul"):
        from_torch(module, SHAPE)


@pytest.mark.parametrize("shape", [(8,), (8, 8), (3, 1, 1), (3, 8, 8)])
def test_buffers_that_are_no_number_a_channel_or_come_later_are_operands(shape):
    module = made(lambda net, x: F.relu(x) * net.image)
    module.register_buffer("image", torch.rand(shape))
    graph, state = from_torch(module, SHAPE)
    assert_same(module, graph, state, SHAPE)
    assert not graph.prepared and graph.frozen == {"image": BUFFER}


@pytest.mark.parametrize(
    "first", [lambda net, x: (x * 1 - 0.5) / 0.25, lambda net, x: abs(x / 1 + 0)], ids=["-", "abs"]
)
def test_a_number_that_changes_nothing_does_so_in_front_of_others(first, builder):
    module = made(first).eval()
    x = torch.from_numpy(images())
    wanted = module(x).detach()
    np.testing.assert_allclose(compiled(module, builder).predict(x), wanted, rtol=0, atol=2e-6)


def test_an_activation_of_the_input_is_still_one():
    graph, _ = from_torch(made(lambda net, x: x * F.relu6(x + 3) / 6), SHAPE)
    assert graph.nodes[0].op == "hardswish" and not graph.prepared
