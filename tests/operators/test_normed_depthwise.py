"""Depthwise convolutions between two normalisations: against their float64 references, these against torch, and against
the kernels they stand for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_depthwise import CASES, Case
from test_gather import EPS, TARGET, VECTOR, activation, call

from mest_compile.hardware.backend import backend_of
from mest_compile.ir.layouts.layout import rounded, to_float, to_stored
from mest_compile.operators import batch_norm
from mest_compile.operators.layers.normed_depthwise import (
    NormedDepthwiseBackward,
    NormedDepthwiseForward,
    normed_depthwise_backward_reference,
    normed_depthwise_forward_reference,
)

NAMES = [
    name for name, (channels, _, _, _, _, _, batch) in CASES.items() if channels[1] == 1 and name != "3x3 of a pixel"
]
EPSILON = 1e-3
STORED = [name for name in backend_of(TARGET).activations if name != "float16" or TARGET.float16]


class Chain:
    def __init__(self, name, dtype="float32", before="relu6", behind=None):
        made = Case(name, dtype)
        self.rng, self.spec, self.window, self.values = made.rng, made.spec, made.window, made.values
        self.source, self.z = made.image((1, 0, 2, 0), False, dtype), made.image((0, 0, 0, 1), True, dtype)
        self.dy, self.dz = made.image((0, 1, 0, 0), True), made.image((0, 0, 1, 1), False)
        self.before, self.behind = before, behind
        x = activation(self.rng, replace(self.source, dtype="float32"))
        self.x, self.gradient = rounded(x, dtype), activation(self.rng, self.dy, gradient=True)
        channels = self.source.channels
        self.moments = batch_norm.moments_reference(self.source.unpack(self.x), EPSILON).astype(np.float32)
        self.affine, self.affine_behind = (self.rng.standard_normal((2, channels)).astype(np.float32) for _ in "ab")
        self.zs = rounded(self.forward_reference(np.zeros(self.z.shape)), dtype)
        self.moments_behind = batch_norm.moments_reference(self.z.unpack(self.zs), EPSILON).astype(np.float32)

    def problem(self, statistics=False):
        return NormedDepthwiseForward(self.source, self.z, self.window, self.before, statistics)

    def forward_reference(self, before):
        return normed_depthwise_forward_reference(
            self.problem(), self.values, self.moments, self.affine, self.x, before
        )

    def backward_arrays(self):
        return (
            self.values,
            self.moments,
            self.affine,
            self.x,
            self.moments_behind,
            self.affine_behind,
            self.zs,
            self.gradient,
        )

    def backward_problem(self, in_place=False):
        dz = None if in_place else self.dz
        return NormedDepthwiseBackward(self.source, self.z, self.dy, dz, self.window, self.before, self.behind)

    def backward(self, builder):
        """(gradients, sums before, sums behind, dz's array)."""
        channels, problem = self.dy.channels, self.backward_problem()
        room = [np.full((channels, self.window.taps), 7, np.float32), *(np.full((2, channels), 7, np.float32),) * 2]
        start = np.full(self.dz.shape, 7, np.float32)
        arrays = [*self.backward_arrays(), *room, start]
        arrays[3], arrays[6] = to_stored(self.x, self.source.dtype), to_stored(self.zs, self.z.dtype)
        *sums, dz = call(builder, "normed_depthwise.backward", problem, *arrays)[len(arrays) - 4 :]
        if self.source.dtype == "float32":  # in the source's place
            after = call(builder, "normed_depthwise.backward", self.backward_problem(True), *arrays[:-1])
            for one, other in zip(sums, after[len(arrays) - 4 :], strict=True):
                assert np.array_equal(one, other)
            assert np.array_equal(self.dz.unpack(dz, True), self.source.unpack(after[3], True))
        return *sums, dz

    def check_backward(self, builder):
        *sums, dz = self.backward(builder)
        *wanted, wanted_dz = normed_depthwise_backward_reference(self.backward_problem(), *self.backward_arrays())
        pixels = self.source.height * self.source.width * self.source.batch
        for got, right in zip(sums, wanted, strict=True):
            close(got, right, 8 * np.sqrt(pixels * self.window.taps))
        got = self.dz.unpack(dz, True)
        close(got[..., : self.dz.batch], wanted_dz, 64 * self.window.taps)
        assert not got[..., self.dz.batch :].any()
        outside = np.ones(self.dz.shape, bool)
        outside[self.dz.interior] = False
        assert (dz[outside] == 7).all()


def close(got, wanted, terms):
    """In float32: what is wanted to `terms` roundings of the largest of its kind."""
    assert got.shape == wanted.shape and np.isfinite(got).all()
    assert np.abs(got - wanted).max() <= terms * EPS * np.abs(wanted).max()


@pytest.mark.parametrize("name", NAMES)
def test_references_are_torchs(name):
    made = Chain(name, before="hardswish", behind="relu6")
    spec = made.spec
    x, weight = made.source.unpack(made.x).transpose(3, 0, 1, 2), made.values
    leaves = [
        torch.tensor(array.astype(np.float64), requires_grad=True)
        for array in (x, weight, made.affine[1], made.affine[0], made.affine_behind[1], made.affine_behind[0])
    ]
    x, weight, *affine = leaves
    y = F.hardswish(F.batch_norm(x, None, None, *affine[:2], training=True, eps=EPSILON))
    z = F.conv2d(y, weight, None, spec.stride, spec.padding, spec.dilation, spec.groups)
    out = F.relu6(F.batch_norm(z, None, None, *affine[2:], training=True, eps=EPSILON))
    out.backward(torch.tensor(made.dy.unpack(made.gradient).transpose(3, 0, 1, 2).astype(np.float64)))
    made.moments = batch_norm.moments_reference(made.source.unpack(made.x), EPSILON)
    made.zs = made.forward_reference(np.zeros(made.z.shape))
    made.moments_behind = batch_norm.moments_reference(made.z.unpack(made.zs), EPSILON)
    gradients, before, behind, dz = normed_depthwise_backward_reference(
        made.backward_problem(), *made.backward_arrays()
    )
    for got, wanted in (
        (made.z.unpack(made.zs).transpose(3, 0, 1, 2), z),
        (gradients.reshape(weight.shape), weight.grad),
        (before[::-1], torch.stack([leaf.grad for leaf in affine[:2]])),
        (behind[::-1], torch.stack([leaf.grad for leaf in affine[2:]])),
        (dz.transpose(3, 0, 1, 2), x.grad),
    ):
        np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_give_what_their_references_give(builder, name):
    made = Chain(name)
    full = made.z.batch == made.z.lanes
    before = made.rng.standard_normal(made.z.shape).astype(np.float32)
    rows = made.z.slices * made.z.height
    sums = [np.full((rows, 2, made.z.channels, made.z.vector), 7, np.float32)] * full
    arrays = made.values, made.moments, made.affine, made.x, before, *sums
    after = call(builder, "normed_depthwise.forward", made.problem(full), *arrays)
    wanted = made.forward_reference(before)
    close(after[4], wanted, 4 * made.window.taps)
    if full:
        inside = after[4][made.z.interior].astype(np.float64)
        for power in (1, 2):
            rows_of = (inside**power).sum(3).transpose(0, 2, 1, 3).reshape(rows, made.z.channels, made.z.vector)
            close(after[5][:, power - 1], rows_of, 4 * made.z.width)
    made.check_backward(builder)


def test_activations_on_both_sides_change_nothing_else(builder):
    Chain("3x3 of stride 2", before="hardswish", behind="relu").check_backward(builder)
    Chain("3x3, odd sizes, lanes without example", before=None, behind="relu6").check_backward(builder)


def test_gaps_between_channels_change_nothing(builder):
    """Of several slices, between which there are gaps as well."""
    made = Chain("3x3 of stride 2")
    assert made.source.slices > 1
    plain = made.source, made.z, made.dy, made.dz
    apart = [replace(image, gap=VECTOR) for image in plain]
    sums = [np.full((made.dy.channels, made.window.taps), 7, np.float32), *(np.zeros((2, 4), np.float32),) * 2]
    arrays = [made.values, made.moments, made.affine, made.x, made.moments_behind, made.affine_behind, made.zs]

    def run(source, z, dy, dz):
        def moved(before, image, array):
            return replace(image, batch=image.lanes).pack(before.unpack(array, True))

        given = list(arrays)
        given[3], given[6] = moved(plain[0], source, made.x), moved(plain[1], z, made.zs)
        result = np.zeros(z.elems, np.float32)
        problem = NormedDepthwiseForward(source, z, made.window, made.before)
        forward = call(builder, "normed_depthwise.forward", problem, *given[:4], result)[4]
        problem = NormedDepthwiseBackward(source, z, dy, dz, made.window, made.before, made.behind)
        rest = [moved(plain[2], dy, made.gradient), *sums, np.zeros(dz.elems, np.float32)]
        *found, last = call(builder, "normed_depthwise.backward", problem, *given, *rest)[-4:]
        return z.unpack(forward), *found, dz.unpack(last)

    for one, other in zip(run(*plain), run(*apart), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("dtype", [dtype for dtype in ("float16", "bfloat16") if dtype in STORED])
def test_what_is_stored_in_two_bytes_is_rounded_once(builder, dtype):
    made = Chain("3x3", dtype, behind="hardswish")
    made.check_backward(builder)
    arrays = made.values, made.moments, made.affine, *(to_stored(array, dtype) for array in (made.x, made.zs))
    got = to_float(call(builder, "normed_depthwise.forward", made.problem(), *arrays)[4])
    wanted = made.forward_reference(made.zs)
    half_ulp = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    assert np.abs(got - wanted).max() <= 1.01 * half_ulp * np.abs(wanted).max()
