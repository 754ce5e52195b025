"""The depthwise kernels against their float64 references and torch, over sizes nobody would choose."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_gather import EPS, TARGET, VECTOR, activation, assert_close, call

from mest_compile.ir.graph import LayerSpec
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import knob_space
from mest_compile.operators.layers.depthwise import (
    DepthwiseForward,
    DepthwiseGradInput,
    DepthwiseGradWeight,
    Window,
    depthwise_forward_reference,
    depthwise_grad_input_reference,
    depthwise_grad_weight_reference,
)
from mest_compile.operators.layers.gather import Epilogue
from mest_compile.operators.layers.geometry import gradient_halo, image_of, source_halo

CASES = {  # (channels, multiplier), (h, w), kernel, stride, padding, dilation, batch
    "3x3": ((5, 1), (8, 12), (3, 3), (1, 1), (1, 1), (1, 1), VECTOR),
    "3x3, odd sizes, lanes without example": ((3, 1), (13, 11), (3, 3), (1, 1), (1, 1), (1, 1), 17),
    "3x3 of stride 2": ((4, 1), (12, 16), (3, 3), (2, 2), (1, 1), (1, 1), 2 * VECTOR),
    "3x3 of stride 2, odd sizes": ((3, 1), (9, 7), (3, 3), (2, 2), (1, 1), (1, 1), 7),
    "3x3 of stride 2 without padding": ((2, 1), (8, 9), (3, 3), (2, 2), (0, 0), (1, 1), 1),
    "5x5": ((3, 1), (7, 17), (5, 5), (1, 1), (2, 2), (1, 1), 5),
    "5x5 of stride 2": ((3, 1), (10, 9), (5, 5), (2, 2), (2, 2), (1, 1), 16),
    "7x7": ((2, 1), (6, 8), (7, 7), (1, 1), (3, 3), (1, 1), 3),
    "3x3 of a pixel": ((9, 1), (1, 1), (3, 3), (1, 1), (1, 1), (1, 1), 13),
    "3x3 of stride 2 of a pixel": ((4, 1), (1, 1), (3, 3), (2, 2), (1, 1), (1, 1), 2),
    "even kernel, other sides": ((3, 1), (6, 5), (2, 4), (3, 2), (0, 1), (1, 1), 8),
    "several results a channel": ((3, 2), (7, 6), (3, 3), (2, 1), (1, 1), (1, 1), 11),
    "three results a channel": ((2, 3), (5, 8), (5, 3), (1, 1), (2, 1), (1, 1), VECTOR),
    "dilation": ((3, 1), (12, 9), (3, 3), (1, 1), (2, 3), (2, 3), 10),
    "dilation and stride": ((2, 1), (11, 10), (3, 5), (2, 3), (2, 2), (2, 1), 6),
    "stride beyond the kernel": ((3, 1), (9, 8), (1, 2), (2, 3), (0, 0), (1, 1), 4),
}
cases = pytest.mark.parametrize("case", CASES)


class Case:
    """A layer with its images and random arrays; images' halos are wider than it needs."""

    def __init__(self, name, dtype="float32"):
        (channels, multiplier), size, kernel, stride, padding, dilation, batch = CASES[name]
        shape = (channels * multiplier, 1, *kernel)
        self.spec = LayerSpec("w", shape, (batch, channels, *size), stride, padding, channels, dilation)
        self.window = Window(kernel, stride, padding, dilation)
        self.source = self.image(source_halo(self.spec), False, dtype)
        self.result = self.image((0, 1, 0, 2), True, dtype)
        self.delta = self.image(gradient_halo(self.spec), True)
        self.dx = self.image((1, 0, 2, 0), False)
        self.rng = rng = np.random.default_rng(3)
        self.values = rng.standard_normal(shape).astype(np.float32)
        self.x, self.dy = activation(rng, self.source), activation(rng, self.delta, gradient=True)

    def image(self, halo, output, dtype="float32") -> Image:
        return image_of(self.spec, halo, VECTOR, output, dtype)

    def forward(self, builder, problem, *others, **knobs):
        """(result, statistics or None), compared with the reference. others: bias, scaling, residual; None: it has
        none."""
        before = self.rng.standard_normal(self.result.shape).astype(self.result.dtype)
        wanted = depthwise_forward_reference(problem, self.values, self.x, before, *others)
        scale = depthwise_forward_reference(problem, *map(np.abs, (self.values, self.x, before)), *map(_size, others))
        given = [array for array in others if array is not None]
        rows = self.result.slices * self.result.height
        sums = [np.full((rows, 2, self.result.channels, VECTOR), 7, np.float32)] * problem.statistics
        after = call(builder, "depthwise.forward", problem, self.values, *given, self.x, before, *sums, **knobs)
        got = after[1 + len(given) + 1]
        assert_close(got, wanted, np.abs(scale), self.window.taps + 3)
        if problem.statistics:
            inside = got[self.result.interior].astype(np.float64)
            for power in (1, 2):
                rows_of, sizes = (
                    (array**power).sum(3).transpose(0, 2, 1, 3).reshape(rows, *after[-1].shape[2:])
                    for array in (inside, np.abs(inside))
                )
                assert_close(after[-1][:, power - 1], rows_of, sizes, self.result.width + 1)

    def grad_input(self, builder, accumulate=False, **knobs):
        problem = DepthwiseGradInput(self.delta, self.dx, self.window, accumulate)
        before = self.rng.standard_normal(self.dx.shape).astype(np.float32)
        arrays = self.values, self.dy, before
        wanted = depthwise_grad_input_reference(problem, *arrays)
        scale = depthwise_grad_input_reference(problem, *map(np.abs, arrays))
        got = call(builder, "depthwise.grad_input", problem, *arrays, **knobs)[-1]
        assert_close(got, wanted, scale, self.window.taps * problem.multiplier + 1)

    def grad_weight(self, builder):
        problem = DepthwiseGradWeight(self.source, self.delta, self.window)
        wanted = depthwise_grad_weight_reference(problem, self.x, self.dy)
        scale = depthwise_grad_weight_reference(problem, np.abs(self.x), np.abs(self.dy))
        before = np.full(wanted.shape, 7, np.float32)
        got = call(builder, "depthwise.grad_weight", problem, before, self.x, self.dy)[0]
        assert_close(got, wanted, scale, self.delta.height * self.delta.width * self.delta.lanes)


def _size(array):
    return None if array is None else np.abs(array)


@cases
def test_references_are_torchs_convolution_and_its_gradients(case):
    made = Case(case)
    spec, window = made.spec, made.window
    x, dy = (
        torch.tensor(image.unpack(array).transpose(3, 0, 1, 2).astype(np.float64), requires_grad=True)
        for image, array in ((made.source, made.x), (made.delta, made.dy))
    )
    weight = torch.tensor(made.values.astype(np.float64), requires_grad=True)
    y = F.conv2d(x, weight, None, spec.stride, spec.padding, spec.dilation, spec.groups)
    y.backward(dy.detach())
    zeros = np.zeros(made.result.shape), np.zeros(made.dx.shape)
    forward = depthwise_forward_reference(
        DepthwiseForward(made.source, made.result, window), made.values, made.x, zeros[0]
    )
    back = depthwise_grad_input_reference(
        DepthwiseGradInput(made.delta, made.dx, window), made.values, made.dy, zeros[1]
    )
    weights = depthwise_grad_weight_reference(DepthwiseGradWeight(made.source, made.delta, window), made.x, made.dy)
    for got, wanted in (
        (made.result.unpack(forward).transpose(3, 0, 1, 2), y),
        (made.dx.unpack(back).transpose(3, 0, 1, 2), x.grad),
        (weights.reshape(weight.shape), weight.grad),
    ):
        np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-9, atol=1e-9)


@cases
def test_kernels_give_what_their_references_give(builder, case):
    made = Case(case)
    full = made.result.batch == made.result.lanes
    made.forward(builder, DepthwiseForward(made.source, made.result, made.window, statistics=full))
    made.grad_input(builder)
    made.grad_weight(builder)


def test_contributions_are_added_up_and_a_bias_is_added(builder):
    for name in ("3x3 of stride 2, odd sizes", "several results a channel"):
        made = Case(name)
        made.grad_input(builder, accumulate=True)
        bias = made.rng.standard_normal(made.result.channels).astype(np.float32)
        made.forward(builder, DepthwiseForward(made.source, made.result, made.window, bias=True), bias)


@pytest.mark.parametrize("added", [False, True])
def test_a_frozen_normalisation_ends_the_kernel(builder, added):
    made = Case("several results a channel")
    residual = replace(made.result, halo=(1, 2, 0, 1))
    problem = DepthwiseForward(
        made.source, made.result, made.window, epilogue=Epilogue("relu6", residual if added else None)
    )
    scaling = made.rng.standard_normal((2, made.result.channels)).astype(np.float32)
    summand = activation(made.rng, residual) if added else None
    before = made.rng.standard_normal(made.result.shape).astype(np.float32)
    wanted = depthwise_forward_reference(problem, made.values, made.x, before, None, scaling, summand)
    given = [scaling, *([summand] if added else [])]
    got = call(builder, "depthwise.forward", problem, made.values, *given, made.x, before)[-1]
    assert_close(got, wanted, np.full(got.shape, 50.0), made.window.taps)


def test_activations_in_float16(builder):
    if not TARGET.float16:
        pytest.skip("this processor does not convert float16")
    for name in ("5x5 of stride 2", "3x3, odd sizes, lanes without example"):
        made = Case(name, "float16")
        statistics = made.result.batch == made.result.lanes
        made.forward(builder, DepthwiseForward(made.source, made.result, made.window, statistics=statistics))
        made.grad_weight(builder)


def test_tiles_change_speed_alone(builder):
    for name in ("3x3 of stride 2, odd sizes", "3x3"):
        made = Case(name)
        forward = DepthwiseForward(made.source, made.result, made.window)
        tiles = knob_space("depthwise.forward", forward, TARGET)["tile"]
        for tile in (tiles[1], tiles[len(tiles) // 2], tiles[-1]):
            made.forward(builder, forward, tile=tile)
        tiles = knob_space("depthwise.grad_input", DepthwiseGradInput(made.delta, made.dx, made.window), TARGET)["tile"]
        assert all(size % step == 0 for tile in tiles[1:] for size, step in zip(tile, made.window.stride, strict=True))
        for tile in (tiles[1], tiles[-1]):
            made.grad_input(builder, tile=tile)


def test_rounding_grows_with_rows_and_columns_and_not_with_their_product(builder):
    image = Image(1, 64, 64, VECTOR, (0, 0, 0, 0), VECTOR)
    problem = DepthwiseGradWeight(image, image, Window((1, 1)))
    x = np.random.default_rng(0).uniform(0.5, 1.5, image.shape).astype(np.float32)
    got = call(builder, "depthwise.grad_weight", problem, np.zeros((1, 1), np.float32), x, x)[0]
    wanted = depthwise_grad_weight_reference(problem, x, x)
    assert abs(got / wanted - 1)[0, 0] < 24 * EPS
