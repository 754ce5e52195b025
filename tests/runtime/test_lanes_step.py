"""Whole steps of batches smaller than a vector, against masked dense torch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nets import Mobile
from test_schemes_step import RULES, MaskedTorch, Small, assert_gradients_are_torchs, check_steps
from test_step import make_batches
from torch import nn

import mest_compile as mest
from mest_compile.hardware.target import find_target

CASES = {  # scheme, input_shape, dense_layers
    "block of 1": ("block", (1, 3, 7, 7), None),
    "pattern of 2": ("pattern", (2, 3, 9, 14), None),
    "filter of 3": ("filter", (3, 3, 8, 9), ["conv1", "fc"]),
    "channel of 4": ("channel", (4, 3, 7, 14), ["conv1", "fc"]),
    "unstructured of 5": ("unstructured", (5, 3, 6, 16), None),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_with_a_mutation_between_them_equal_masked_torch_and_continue_from_a_checkpoint(case, tmp_path):
    scheme, shape, dense_layers = CASES[case]
    check_steps(scheme, lambda: Small(8), shape, dense_layers, RULES["sgd"], tmp_path, threads=1)


class Mixed(nn.Module):
    """Of kernels that take a pixel at a time, around some that take rows."""

    def __init__(self):
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.norm, self.gate = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)
        self.last, self.fc = nn.Conv2d(16, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x):
        x = F.hardswish(self.first(x))
        y = self.norm(self.down(x))
        y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        y = F.interpolate(y, scale_factor=2.0, mode="bilinear")
        y = F.max_pool2d(self.last(torch.cat([x, y], 1)).relu(), 3, 2, 1)
        return self.fc(y[:, :, 1:].mean((2, 3)))


@pytest.mark.parametrize(("make", "shape"), [(Mixed, (2, 3, 8, 10)), (Mobile, (3, 3, 9, 14))], ids=["mixed", "mobile"])
def test_gradients_of_other_nets_are_torchs(make, shape):
    torch.manual_seed(0)
    model = make()
    step = mest.compile(model, shape, scheme="block", sparsity=0.5, threads=1)
    assert step.describe()["slice_examples"] == (shape[0] & -shape[0])
    assert_gradients_are_torchs(step, model, make_batches(shape, 10, 1)[0])


def test_fewer_examples_than_a_slice_has_train_as_in_torch():
    """Then lanes of its vectors hold no example."""
    torch.manual_seed(0)
    model, target = Small(8), find_target("local")
    step = mest.compile(model, (4, 3, 7, 9), scheme="block", sparsity=0.75, optimizer=RULES["sgd"], threads=1)
    assert step.describe()["slice_examples"] == min(4, target.vector)
    twin = MaskedTorch(model, step.masks(), step.optimizer)
    for place, examples in enumerate((4, 3, 1)):
        (batch,) = make_batches((examples, 3, 7, 9), 10, 1, seed=place)
        assert step(*batch).loss == pytest.approx(twin.step(*batch), rel=1e-4)


@pytest.mark.parametrize("name", ["avx2", "avx512", "cortex-a76"])
def test_a_step_of_one_example_is_planned_in_a_sixth_of_the_bytes_of_eight(name):
    target = find_target("avx2" if name == "avx512" else name)
    if name == "avx512":
        target = replace(target, vector=16, registers=32, llvm=(("kind", "llvm"), ("mcpu", "x86-64-v4")))
    memory = mest.check("resnet20", (8, 3, 32, 32), scheme="block", sparsity=0.9, target=target).memory
    assert memory[1] <= memory[8] / 6
