"""Transposed convolutions, in whole steps: strided, dilated, grouped, of one row, first in a net, frozen; as torch."""

import numpy as np
import pytest
import torch
from test_frontend import KEEP, export
from test_joins import same_as_torch
from test_step import make_batches, masked_steps, relative
from torch import nn
from torch.nn import functional as F

import mest_compile as mest
from mest_compile.base.errors import UnsupportedOperator
from mest_compile.frontend import from_torch, import_model


class Up(nn.Module):
    """The first reads the input; a value that two layers read gets two gradients; a kernel that is smaller than its
    stride leaves pixels without any sum."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.ConvTranspose2d(3, 8, 3, 2, 1, output_padding=1), nn.BatchNorm2d(12)
        self.second = nn.ConvTranspose2d(8, 12, (1, 4), (2, 3), (0, 2), (1, 0), 4, False, (2, 1))
        self.last = nn.Linear(12, 5)

    def forward(self, x):
        x = self.first(x).relu()
        y = self.norm(self.second(x)).relu()
        return self.last(y.mean((2, 3)) + F.pad(x, (0, 0, 0, 0, 0, 4)).mean((2, 3)))


class Series(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv1d(3, 8, 3, 2), nn.ConvTranspose1d(8, 6, 4, 2, output_padding=1)
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        return self.last(self.up(self.down(x).relu()).relu().mean(2))


NETS = {"images": (Up, (5, 3, 2, 3)), "series": (Series, (5, 3, 11))}


def made(name):
    torch.manual_seed(0)
    kind, shape = NETS[name]
    return kind(), shape


@pytest.mark.parametrize("scheme", ["unstructured", "filter"])
def test_three_steps_equal_torchs(scheme, tmp_path):
    model, shape = made("images")
    masks = same_as_torch(model, model, shape, tmp_path, scheme=scheme, dense_layers=["last"]).masks()
    assert all(0 < mask.mean() < 1 for mask in masks.values())
    if scheme == "filter":  # of the weight as torch has it: an input channel of a transposed convolution
        alive = masks["second.weight"].any((1, 2, 3))
        assert alive.sum() == 4 and (masks["second.weight"] == alive[:, None, None, None]).all()


@pytest.mark.filterwarnings("ignore")
def test_series_and_onnx_files_are_read_alike(tmp_path):
    for name in NETS:
        model, shape = made(name)
        path = export(model, shape, tmp_path / "net.onnx", **KEEP)
        graph, _ = import_model(path, shape)
        ours, _ = from_torch(model, shape)
        assert [node.op for node in graph.nodes] == [node.op for node in ours.nodes]
        if name == "series":
            same_as_torch(model, path, shape, tmp_path)


def test_on_opencl_with_blocks(tmp_path):
    pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    model, shape = made("images")
    schemes = {"*": "unstructured", "second.weight": "block:2x1"}
    same_as_torch(model, model, shape, tmp_path, "opencl", scheme=schemes)


def test_in_bfloat16_nearly():
    model, shape = made("images")
    exact, rounded = (
        mest.compile(model, shape, "unstructured", 0.5, activations=kind) for kind in ("float32", "bfloat16")
    )
    batch = make_batches(shape, 5, 1)[0]
    found, near = exact.gradients(*batch), rounded.gradients(*batch)
    for key, wanted in found.items():
        assert 0 < relative(near[key], wanted) < 0.1, key


@pytest.mark.parametrize("frozen", ["first", "second"])
def test_frozen_ones_stay_and_let_gradients_pass(frozen):
    """The first lets none pass: its kernels read the transposed index alone."""
    model, shape = made("images")
    stays = [name for name, _ in model.named_parameters() if name.startswith(frozen)]
    trained = [name for name, _ in model.named_parameters() if name not in stays]
    step = mest.compile(model, shape, "unstructured", 0.5, trainable=trained)
    before, batches = step.state_dict(), make_batches(shape, 5, 3)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in before.items()})
    for name in stays:
        model.get_parameter(name).requires_grad_(False)
    masks = {name: mask for name, mask in step.masks().items() if name in trained}
    found = step.gradients(*batches[0])
    losses, gradients = masked_steps(model, masks, batches, 0.01, mest.SGD())
    assert gradients.keys() == found.keys() == set(trained)
    for key, wanted in gradients.items():
        assert relative(found[key], wanted) < 1e-4, key
    np.testing.assert_allclose([step(*batch, lr=0.01).loss for batch in batches], losses, rtol=1e-4)
    assert all(np.array_equal(step.state_dict()[name], before[name]) for name in stays)


def test_what_a_convolution_could_not_have_taken_is_refused():
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 1, output_padding=1, dilation=2), nn.Flatten(), nn.LazyLinear(5))
    net(torch.zeros(2, 3, 4, 4))
    with pytest.raises(UnsupportedOperator, match="output padding less than the strides"):
        from_torch(net, (2, 3, 4, 4))
