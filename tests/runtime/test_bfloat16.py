"""Activations stored as bfloat16: steps equal torch that rounds at the same places, in half the memory, from files, and
who refuses them. Kernels are in tests/operators/test_bfloat16.py, test_operators and test_nonfinite."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_float16 import Rounded, Shallow
from test_step import Odd, make_batches, masked_steps

import mest_compile as mest
from mest_compile.hardware.target import find_target
from mest_compile.lowering.fusing import fuse

LOCAL = find_target("local")
WAYS = {"float32": replace(LOCAL, bfloat16=False), **({"pairs": LOCAL} if LOCAL.bfloat16 else {})}
ULP = 2.0**-7  # of a bfloat16, at most, beside its size


class RoundsBoth(torch.autograd.Function):
    """A value is rounded as it is stored, and so is its gradient."""

    @staticmethod
    def forward(context, value):
        return value.bfloat16().float()

    @staticmethod
    def backward(context, gradient):
        return gradient.bfloat16().float()


class RoundedTwice(Rounded):
    """`Rounded` to bfloat16, gradients too, and weights of convolutions where they are multiplied."""

    @staticmethod
    def _stored(value):
        return RoundsBoth.apply(value)

    @staticmethod
    def _value(node, inputs, parts):
        if node.op in ("conv2d", "linear"):
            weight = parts["weight"]
            parts = parts | {"weight": weight + (weight.bfloat16().float() - weight).detach()}
        return Rounded._value(node, inputs, parts)


def compiled(target, model, shape, scheme="block", activations="bfloat16", **options):
    options = {"sparsity": 0.75, "threads": 1, "optimizer": mest.SGD(lr=0.01, momentum=0.9), **options}
    return mest.compile(model, shape, scheme=scheme, activations=activations, target=target, **options)


CASES = {
    "odd-unstructured": (Odd, (7, 3, 17, 17), "pairs"),
    "shallow-block": (Shallow, (40, 3, 8, 8), "pairs"),
    "shallow-block-float32": (Shallow, (16, 3, 8, 8), "float32"),
    "shallow-pattern": (Shallow, (32, 3, 8, 8), "pairs"),
    "shallow-filter": (Shallow, (16, 3, 8, 8), "pairs"),
    "shallow-channel": (Shallow, (5, 3, 8, 8), "pairs"),
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_torch_that_rounds_where_values_are_stored(case):
    """Values near the middle between two bfloat16 may be rounded apart."""
    make, shape, way = CASES[case]
    if way not in WAYS:
        pytest.skip("this processor has no products of pairs of bfloat16")
    torch.manual_seed(0)
    model = make()
    dense = ["f"] if make is Odd else ["first", "last"]
    step = compiled(WAYS[way], model, shape, case.split("-")[1], dense_layers=dense)
    batches = make_batches(shape, step.classes, 3)
    found = step.gradients(*batches[0])
    got = [step(*batch, lr=0.01).loss for batch in batches]
    rounded = RoundedTwice(model, fuse(step._compiled.graph))
    wanted, gradients = masked_steps(rounded, step.masks(), batches, 0.01, step.optimizer)
    for name, gradient in gradients.items():
        scale = max(np.abs(gradient).max(), np.abs(gradients[name.replace(".bias", ".weight")]).max())
        assert np.abs(found[name] - gradient).max() <= ULP * scale, name
    np.testing.assert_allclose(got, wanted, rtol=ULP / 4)
