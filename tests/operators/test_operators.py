"""Kernels of the operators that are not convolutions: each gives what its float64 reference gives, whatever the
layout."""

import os

os.environ.setdefault("TVM_BIND_THREADS", "0")

import dataclasses

import losses
import numpy as np
import optimizers
import pytest
from activations import function_of

from mest_compile.base.errors import SpecError
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import find_target
from mest_compile.ir.arrangement import cut, inverse, merged, size_of, whole
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.layouts.layout import rounded, to_float, to_stored
from mest_compile.kernels.source import kernel_source
from mest_compile.operators import (
    add,
    adding,
    attention,
    attention_bias,
    batch_norm,
    combine,
    dropout,
    frozen_norm,
    matmul,
    norm,
    pool,
    rearrange,
    resize,
    softmax,
)
from mest_compile.operators import conversion as image
from mest_compile.operators.activation import ACTIVATIONS, ActivationBackward, ActivationForward
from mest_compile.operators.layers import bias, turning
from mest_compile.operators.losses import cross_entropy as loss
from mest_compile.operators.losses.cross_entropy import CrossEntropy
from mest_compile.operators.losses.loss import answers as given_answers
from mest_compile.operators.optimizers import optimizer

TARGET = find_target("local")
EPS = np.finfo(np.float32).eps
HALO = 123.0  # nonsense in every halo: kernels neither read nor write it


def make(channels, height, width, batch, halo=(0, 0, 0, 0), dtype="float32") -> Image:
    return Image(channels, height, width, batch, halo, TARGET.vector, dtype)


SHAPES = [
    make(13, 17, 17, 7, (1, 1, 1, 1)),
    make(20, 5, 6, 16),
    make(2, 9, 8, 12, (2, 0, 1, 3)),
    make(33, 1, 1, 13),
    make(16, 8, 8, 64, (0, 1, 0, 1)),
]
SHAPES += [dataclasses.replace(SHAPES[place], dtype="float16") for place in (0, 2, 4) if TARGET.float16]
if backend_of(TARGET).processor:  # where a vector may cover several pixels
    SHAPES.append(Image(5, 6, 11, 6, (1, 0, 1, 2), 2, abreast=4))
if "bfloat16" in backend_of(TARGET).activations:
    SHAPES.append(dataclasses.replace(SHAPES[2], dtype="bfloat16"))
NAMES = [f"{one.channels}x{one.height}x{one.width}x{one.batch}-{one.abreast}-{one.dtype}" for one in SHAPES]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
SOME = dict(zip(SHAPES[2:5] + SHAPES[6:], NAMES[2:5] + NAMES[6:], strict=True))
FEW = [shape for shape in SHAPES if dataclasses.replace(shape, dtype="float32") == SHAPES[2]]  # one of each type
some_shapes = pytest.mark.parametrize("shape", SOME, ids=SOME.values())


def other_halo(shape: Image) -> Image:
    return dataclasses.replace(shape, halo=(shape.halo[3], shape.halo[0] + 1, shape.halo[1], shape.halo[2]))


def sized(shape: Image, channels: int, height: int, width: int, halo=(0, 0, 0, 0)) -> Image:
    return dataclasses.replace(shape, channels=channels, height=height, width=width, halo=halo)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def run(builder):
    """Runs a kernel on flat copies of the arrays; returns them as they are afterwards."""

    def call(kernel, problem, *arrays):
        import tvm

        function = builder.function(kernel_source(kernel, problem, TARGET))
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(array).reshape(-1)) for array in arrays]
        function(*tensors)
        return [tensor.numpy() for tensor in tensors]

    return call


def pack(layout: Image, values: np.ndarray, dead: float = 7.5) -> np.ndarray:
    """The flat array of values (C, H, W, N): `dead` in lanes without an example, HALO around it."""
    return to_stored(layout.pack(values, dead, HALO), layout.dtype).ravel()


def room(layout: Image, value: float) -> np.ndarray:
    """A flat array that holds one value."""
    return to_stored(np.full(layout.elems, value), layout.dtype)


def as_stored(layout: Image, values: np.ndarray) -> np.ndarray:
    """float32 values as an array of `layout` holds them."""
    return rounded(values.astype(np.float32), layout.dtype).astype(np.float32)


def unpack(layout: Image, flat: np.ndarray, gradient: bool = False, halo: float = HALO) -> np.ndarray:
    """(C, H, W, N) float32, after a look at what a kernel must leave alone; `halo` is what must be around it."""
    assert flat.dtype == layout.array_dtype
    array = to_float(flat.reshape(layout.shape)).astype(np.float32)
    values, dead = layout.unpack(array).copy(), layout.unpack(array, empty_lanes=True)[..., layout.batch :].copy()
    assert np.isfinite(dead).all()
    if gradient:
        assert not dead.any(), "a gradient is not 0 in a lane without an example"
    array[layout.interior] = halo
    assert (array == halo).all(), "the halo is not what it should be"
    return values


def draw(rng, layout: Image, mean: float = 0.0) -> np.ndarray:
    return as_stored(layout, rng.standard_normal((layout.channels, layout.height, layout.width, layout.batch)) + mean)


def assert_close(got, wanted, terms: int = 4, scale=None, stored: Image | None = None, stores: int = 1):
    """Equal to `terms` roundings of float32 at the size of the largest wanted value, or of `scale`; where `stored` is
    an image in two bytes also to `stores` roundings of that, half a unit in the last place each.
    """
    assert got.shape == wanted.shape
    limit = terms * EPS * (np.abs(wanted).max() if scale is None else scale)
    if stored and stored.dtype != "float32":
        half_ulp, least = {"float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 0)}[stored.dtype]
        limit += stores * (half_ulp * (np.abs(wanted) if stores == 1 else np.abs(wanted).max()) + least)
    worst = np.abs(got - wanted)
    assert (worst <= limit).all(), f"off by {worst.max()}, allowed {np.max(limit)}"  # not true of NaN


def test_assert_close_notices_one_wrong_element_and_nan():
    wanted = np.ones((3, 4))
    for wrong in (1.00001, np.nan):
        got = np.ones((3, 4), np.float32)
        got[2, 3] = wrong
        with pytest.raises(AssertionError):
            assert_close(got, wanted)
    got[2, 3] = 1.0006  # a float16 is off by half of 2^-10 at most
    with pytest.raises(AssertionError):
        assert_close(got, wanted, stored=make(1, 3, 4, 1, dtype="float16"))
    got[2, 3] = 1.005  # a bfloat16 by half of 2^-7
    with pytest.raises(AssertionError):
        assert_close(got, wanted, stored=make(1, 3, 4, 1, dtype="bfloat16"))


# Images


@shapes
def test_import_gives_the_batch_innermost_and_repeats_the_last_example(run, rng, shape):
    images = rng.standard_normal((shape.batch, shape.channels, shape.height, shape.width)).astype(np.float32)
    got = run("image.import", image.ImageImport(shape), images, room(shape, HALO))[1]
    assert np.array_equal(unpack(shape, got), as_stored(shape, image.import_reference(images)))
    lanes = shape.unpack(got, empty_lanes=True)
    assert np.array_equal(
        lanes[..., shape.batch :], np.repeat(lanes[..., shape.batch - 1 : shape.batch], shape.lanes - shape.batch, -1)
    )


@pytest.mark.parametrize("shape", [make(10, 1, 1, 7), make(4, 1, 1, 16, (1, 1, 1, 1), SHAPES[-1].dtype)], ids=str)
def test_export_gives_the_batch_outermost(run, rng, shape):
    values = draw(rng, shape)
    got = run(
        "image.export",
        image.ImageExport(shape),
        pack(shape, values),
        np.zeros((shape.batch, shape.channels), np.float32),
    )[1]
    assert np.array_equal(got, image.export_reference(values).ravel())


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[4], *SHAPES[6:7]], ids=str)
def test_zero_halo_clears_the_halo_and_only_that(run, rng, shape):
    before = pack(shape, draw(rng, shape))
    got = run("image.zero_halo", image.ZeroHalo(shape), before)[0]
    assert np.array_equal(got, np.where(before == HALO, 0, before))


@pytest.mark.parametrize("accumulate", [False, True])
@some_shapes
def test_copy_moves_to_another_halo(run, rng, shape, accumulate):
    source, result, start = other_halo(shape), shape, draw(rng, shape)
    values = draw(rng, shape)
    got = run(
        "image.copy", image.ImageCopy(source, result, accumulate), pack(source, values, 0), pack(result, start, 0)
    )[1]
    assert np.array_equal(
        unpack(result, got, gradient=True), as_stored(result, values + start) if accumulate else values
    )


def grids():
    """(size, grid in the large image, grid in the small one) of channels, of rows and columns with steps, of all."""
    return {
        "channels": ((2, 9, 8), image.Grid((3, 0, 0)), image.Grid()),
        "steps": ((3, 4, 3), image.Grid((1, 1, 2), (2, 2, 2)), image.Grid((0, 1, 0), (1, 1, 2))),
        "crop": ((6, 4, 5), image.Grid((0, 2, 1)), image.Grid((1, 0, 3))),
    }


@pytest.mark.parametrize("name", grids())
@pytest.mark.parametrize("dtype", dict.fromkeys(layout.dtype for layout in SHAPES))
def test_parts_of_images(run, rng, name, dtype):
    size, grid, other = grids()[name]
    large, small = make(6, 9, 8, 12, (2, 0, 1, 3), dtype), make(7, 9, 8, 12, (0, 1, 0, 0), dtype)
    for source, result, taken, put in (large, small, grid, other), (small, large, other, grid):
        x, before = draw(rng, source), draw(rng, result)
        for how in {}, {"accumulate": True}, {"fill": 0.0}, {"fill": -1.5}:
            problem = image.ImagePart(source, result, size, taken, put, **how)
            got = run("image.part", problem, pack(source, x, 0), pack(result, before, 0))[1]
            wanted = as_stored(result, image.part_reference(problem, x, before))
            gradient = "fill" not in how or not how["fill"]
            assert np.array_equal(unpack(result, got, gradient=gradient), wanted), how


# Batch normalisation


def norm_case(rng, shape, mean=0.5):
    z, residual, dy = draw(rng, shape, mean), draw(rng, shape), draw(rng, shape)
    weight, offset = np.add(rng.standard_normal((2, shape.channels)), [[1], [0]]).astype(np.float32)
    return z, residual, dy, weight, offset


@pytest.mark.parametrize("mean", [0.5, 3000.0, 1e5])
@shapes
def test_moments_are_the_batch_statistics(run, rng, shape, mean):
    z = draw(rng, shape, min(mean, {"float16": 3000.0, "bfloat16": 300.0}.get(shape.dtype, mean)))
    got = run(
        "batch_norm.moments",
        batch_norm.BatchNormMoments(shape, 1e-5),
        pack(shape, z),
        np.zeros(3 * shape.channels, np.float32),
    )[1]
    for row, wanted in zip(got.reshape(3, -1), batch_norm.moments_reference(z, 1e-5), strict=True):
        assert_close(row, wanted, terms=40)


def test_moments_of_one_value_a_channel_are_refused():
    with pytest.raises(SpecError, match="more than 1 value"):
        batch_norm.BatchNormMoments(make(4, 1, 1, 1), 1e-5)


@pytest.mark.parametrize("shape", [make(20, 5, 6, 16, (1, 0, 0, 1)), make(16, 8, 8, 64), make(9, 1, 1, 32)], ids=str)
def test_moments_come_from_the_sums_that_a_convolution_left(run, rng, shape):
    """And from the values themselves where their mean is too far from 0: a variance is a small difference of large sums
    then."""
    means = np.resize([0.5, -7.0, 9.0, 1e3, -1e5], shape.channels)[:, None, None, None]
    z = draw(rng, shape, means)
    z[4] = 1e5  # a constant
    lanes = z.reshape(
        shape.channels, -1, shape.width, shape.slices, shape.vector
    )  # the sums' order of rows and slices is all one
    statistics = np.stack([lanes.sum(2), (lanes**2).sum(2)]).transpose(2, 3, 0, 1, 4)
    problem = batch_norm.BatchNormMoments(shape, 1e-5, chunks=shape.height * shape.slices)
    got = run("batch_norm.moments", problem, statistics, pack(shape, z), np.zeros(3 * shape.channels, np.float32))[2]
    for row, wanted in zip(got.reshape(3, -1), batch_norm.moments_reference(z, 1e-5), strict=True):
        assert (np.abs(row - wanted) <= 100 * EPS * np.abs(wanted)).all()  # FAR roundings, and each value by itself


def test_running_statistics_move_as_torch_moves_them(run, rng):
    import torch

    shape = SHAPES[1]
    z = draw(rng, shape)
    module = torch.nn.BatchNorm2d(shape.channels, momentum=0.3)
    module(torch.from_numpy(z).permute(3, 0, 1, 2))
    moments = batch_norm.moments_reference(z, 1e-5).astype(np.float32)
    start = np.zeros(shape.channels, np.float32), np.ones(shape.channels, np.float32)
    got = run("batch_norm.running", batch_norm.BatchNormRunning(shape.channels, 0.3), moments, *start)[1:]
    wanted_both = batch_norm.running_reference(moments, *start, 0.3)
    for have, wanted, told in zip(got, wanted_both, (module.running_mean, module.running_var), strict=True):
        assert_close(have, wanted)
        assert_close(told.numpy(), wanted, terms=40)


def test_frozen_moments_are_the_running_statistics(run, rng):
    mean, variance = rng.standard_normal(13).astype(np.float32), rng.random(13).astype(np.float32)
    got = run("batch_norm.frozen", batch_norm.BatchNormFrozen(13, 1e-3), mean, variance, np.zeros(39, np.float32))[2]
    for row, wanted in zip(got.reshape(3, 13), batch_norm.frozen_reference(mean, variance, 1e-3), strict=True):
        assert_close(row, wanted)


# Kernels that others end in take the formulas of these as they take silu's, hardswish's and leaky_relu's; their own
# kernels are tested one by one.
ALIKE = ("relu6", "hardtanh", "hardsigmoid", "sigmoid", "tanh", "gelu", "gelu_tanh", "elu", "softplus", "mish")
# batch_norm alone and with all that may follow it: (whether something is added, activation).
FOLLOWING = {name: row for name, row in ACTIVATIONS.load().items() if name not in ALIKE}
JOINED = [
    (False, None),
    (True, None),
    *((False, name) for name in FOLLOWING),
    *((True, name) for name, row in FOLLOWING.items() if row.from_result),
]
on_shapes = pytest.mark.parametrize(
    ("shape", "added", "activation"),
    [
        pytest.param(shape, *case, id=f"{name}-{case[1]}-{'residual' if case[0] else 'alone'}")
        for shape, name in SOME.items()
        for case in JOINED
        if case[1] in (None, "relu") or shape in FEW
    ],
)


@on_shapes
def test_batch_norm_forward(run, rng, shape, added, activation):
    z, residual, _, weight, offset = norm_case(rng, shape)
    moments = batch_norm.moments_reference(z, 1e-5).astype(np.float32)
    y_image, r_image = other_halo(shape), dataclasses.replace(shape, halo=(0, 0, 0, 2)) if added else None
    arguments = [
        pack(shape, z),
        moments,
        np.stack([offset, weight]),
        *([pack(r_image, residual)] if added else []),
        pack(y_image, z),
    ]
    got = run("batch_norm.forward", batch_norm.BatchNormForward(shape, y_image, activation, r_image), *arguments)[-1]
    wanted = batch_norm.forward_reference(z, moments, weight, offset, residual if added else None, activation)
    assert_close(unpack(y_image, got, halo=0), wanted, terms=8, stored=y_image)


@on_shapes
def test_batch_norm_backward(run, rng, shape, added, activation):
    z, residual, dy, weight, offset = norm_case(rng, shape)
    moments = batch_norm.moments_reference(z, 1e-5).astype(np.float32)
    y = batch_norm.forward_reference(z, moments, weight, offset, residual if added else None, activation).astype(
        np.float32
    )
    dy_image, y_image = (
        other_halo(shape),
        dataclasses.replace(shape, halo=(0, 0, 0, 2)) if added and activation else None,
    )
    source = as_stored(y_image, y) if y_image else batch_norm.forward_reference(z, moments, weight, offset)
    masked, sums, dz = batch_norm.backward_reference(dy, z, moments, weight, activation, source)
    if y_image:  # the rest is made of what was stored
        _, sums, dz = batch_norm.backward_reference(as_stored(dy_image, masked), z, moments, weight, None, source)

    arguments = [pack(dy_image, dy, 0), pack(shape, z), moments, np.stack([offset, weight])]
    facts = [*arguments, *([pack(y_image, y)] if y_image else []), np.zeros(2 * shape.channels, np.float32)]
    pixels = shape.batch * shape.height * shape.width
    for accumulate in (False, True) if shape in FEW else (False,):
        problem = batch_norm.BatchNormBackward(dy_image, shape, y_image or shape, activation, y_image, accumulate)
        got_dy, *_, got_sums, got = run("batch_norm.backward", problem, *facts, pack(problem.dz, z, 0))
        assert_close(got_sums.reshape(2, -1), sums, terms=20, scale=np.sqrt(pixels) * 4)
        assert_close(unpack(dy_image, got_dy, gradient=True), masked if y_image else dy, terms=1, stored=dy_image)
        halo = HALO if accumulate else 0
        stores = 2 if y_image and activation == "leaky_relu" else 1  # dy in between, which 0 and 1 leave exact
        assert_close(
            unpack(problem.dz, got, gradient=True, halo=halo),
            dz + z if accumulate else dz,
            terms=20,
            stored=problem.dz,
            stores=stores,
        )
    if not y_image:
        problem = batch_norm.BatchNormBackward(dy_image, shape, None, activation, in_place=True)
        got, *_, got_sums = run("batch_norm.backward", problem, *facts)
        assert_close(got_sums.reshape(2, -1), sums, terms=20, scale=np.sqrt(pixels) * 4)
        assert_close(unpack(dy_image, got, gradient=True), dz, terms=20, stored=dy_image)
    only_sums = run(
        "batch_norm.backward", batch_norm.BatchNormBackward(dy_image, shape, None, activation, y_image), *facts
    )[-1]
    assert np.array_equal(only_sums, got_sums)


@pytest.mark.parametrize("mean", [0.0, 0.01, 2.0])
@pytest.mark.parametrize("shape", SHAPES[:5], ids=NAMES[:5])
def test_gradients_before_a_constant_channel_add_up_to_zero(run, rng, shape, mean):
    """To what rounding each element by itself leaves of it: the weights before see the sum times the mean of data."""
    dy, constant = draw(rng, shape, mean), np.full((shape.channels, shape.height, shape.width, shape.batch), 1.5)
    moments = batch_norm.moments_reference(constant, 1e-5).astype(np.float32)
    weight, scale = np.ones(shape.channels, np.float32), 1 / np.sqrt(1e-5)
    facts = [pack(shape, constant), moments, np.stack([0 * weight, weight]), np.zeros(2 * shape.channels, np.float32)]
    problem = batch_norm.BatchNormBackward(shape, shape, shape)
    got = unpack(
        shape, run("batch_norm.backward", problem, pack(shape, dy, 0), *facts, pack(shape, dy, 0))[-1], True, 0
    )
    rounding = EPS / 4 * scale * np.abs(dy).max((1, 2, 3))  # of an element, in the mean
    found = np.abs(got.sum((1, 2, 3), dtype=np.float64))
    assert (found <= 4 * np.sqrt(dy[0].size) * rounding).all(), found / np.sqrt(dy[0].size) / rounding


def test_scaling_is_one_multiplication_and_one_addition(run, rng):
    mean, variance, affine = rng.standard_normal(13), rng.random(13), rng.standard_normal((2, 13))
    arrays = [array.astype(np.float32) for array in (mean, variance, affine)]
    got = run("frozen_norm.scaling", frozen_norm.FrozenNormScaling(13, 1e-3), *arrays, np.zeros(26, np.float32))[3]
    assert_close(got.reshape(2, 13), frozen_norm.scaling_reference(*arrays, 1e-3), terms=8)


def test_a_part_is_copied_and_the_rest_stays(run, rng):
    source, target = rng.standard_normal(9).astype(np.float32), rng.standard_normal(12).astype(np.float32)
    got = run("values.part", frozen_norm.CopyPart(9, 4, 12, 7, 5), source, target)[1]
    assert np.array_equal(got, [*target[:7], *source[4:]])


@on_shapes
def test_backward_of_a_batch_norm_that_stays_as_it_is(run, rng, shape, added, activation):
    """What is written, what is added to, and in which place; folded into a convolution, and not."""
    z, residual, dy, weight, offset = norm_case(rng, shape)
    moments = batch_norm.moments_reference(z, 1e-5).astype(np.float32)
    arguments = moments, weight, offset
    y = batch_norm.forward_reference(z, *arguments, residual if added else None, activation).astype(np.float32)
    dy_image, dz_image = other_halo(shape), dataclasses.replace(shape, halo=(0, 0, 0, 2), dtype="float32")
    told = bool(activation) and added
    source = as_stored(shape, y) if told else batch_norm.forward_reference(z, *arguments)
    masked, sums, dz = frozen_norm.backward_reference(dy, z, moments, weight, activation, source)
    facts, there = [moments, np.stack([offset, weight])], [pack(shape, z), *([pack(shape, y)] if told else [])]
    room, pixels = np.zeros(2 * shape.channels, np.float32), shape.batch * shape.height * shape.width
    problem = frozen_norm.FrozenNormBackward(
        dy_image, activation, z=shape, y=shape if told else None, dz=dz_image, sums=True, residual=told
    )
    for accumulate in (False, True):
        problem = dataclasses.replace(problem, accumulate=accumulate)
        start = pack(dz_image, z, 0)
        got_dy, *_, got_sums, got = run(
            "frozen_norm.backward", problem, pack(dy_image, dy, 0), *facts, *there, room, start
        )
        assert_close(got_sums.reshape(2, -1), sums, terms=20, scale=np.sqrt(pixels) * 4)
        kept = masked if told else dy
        assert_close(unpack(dy_image, got_dy, gradient=True), as_stored(dy_image, kept), stored=dy_image)
        halo, wanted = (HALO, dz + z) if accumulate else (0, dz)
        assert_close(unpack(dz_image, got, gradient=True, halo=halo), wanted, terms=20)

    if activation and not ACTIVATIONS.find(activation).from_result:
        return
    scaling = np.stack([offset, weight * moments[1]]).astype(np.float32)  # folded: y alone tells the slope
    masked, _, dz = frozen_norm.backward_reference(dy, z, moments, weight, activation, as_stored(shape, y))
    there = [pack(shape, y)] if activation else []
    folded = frozen_norm.FrozenNormBackward(
        dy_image, activation, True, y=shape if activation else None, dz=dz_image if added else None, in_place=not added
    )
    folded = dataclasses.replace(folded, residual=added)
    room = [pack(dz_image, z, 0)] if added else []
    got_dy, *_, got = run("frozen_norm.backward", folded, pack(dy_image, dy, 0), scaling, *there, *room)
    if added:
        assert_close(unpack(dz_image, got, gradient=True, halo=0), dz, terms=20)
    assert_close(unpack(dy_image, got_dy, gradient=True), masked if added else dz, terms=20, stored=dy_image)


@pytest.mark.parametrize(("added", "activation"), JOINED)
def test_batch_norm_references_agree_with_torch(rng, added, activation):
    import torch

    shape = SHAPES[2]
    z, residual, dy, weight, offset = (
        torch.from_numpy(array.astype(np.float64)).requires_grad_() for array in norm_case(rng, shape)
    )
    y = torch.nn.functional.batch_norm(z.permute(3, 0, 1, 2), None, None, weight, offset, True, 0.1, 1e-5).permute(
        1, 2, 3, 0
    )
    y = y + residual if added else y
    y = function_of(activation)(y) if activation else y
    y.backward(dy.detach())
    z_, residual_, dy_, weight_, offset_ = (tensor.detach().numpy() for tensor in (z, residual, dy, weight, offset))
    moments = batch_norm.moments_reference(z_, 1e-5)
    got = batch_norm.forward_reference(z_, moments, weight_, offset_, residual_ if added else None, activation)
    source = got if added else batch_norm.forward_reference(z_, moments, weight_, offset_)
    masked, sums, dz = batch_norm.backward_reference(dy_, z_, moments, weight_, activation, source)
    pairs = [
        (got, y.detach()),
        (sums[0], offset.grad),
        (sums[1], weight.grad),
        (dz, z.grad),
        *([(masked, residual.grad)] if added else []),
    ]
    for have, wanted in pairs:
        np.testing.assert_allclose(have, wanted.numpy(), rtol=1e-9, atol=1e-9)


# Activations, addition, rearranged images, bias


@pytest.mark.parametrize(
    ("shape", "name"), [(shape, name) for name in ACTIVATIONS.load() for shape in (SOME if name == "relu" else FEW)]
)
def test_activation(run, rng, shape, name):
    row, x, dy, start, other = (
        ACTIVATIONS[name],
        4 * draw(rng, shape),
        draw(rng, shape),
        draw(rng, shape),
        other_halo(shape),
    )
    y = run(f"{name}.forward", ActivationForward(other, shape), pack(other, x, -1), pack(shape, x))[1]
    assert_close(unpack(shape, y), row.forward_reference(x), stored=shape)
    source = (shape, y) if row.from_result else (other, pack(other, x, -1))
    wanted = row.backward_reference(dy, source[0].unpack(to_float(source[1]).astype(np.float32)))
    for accumulate in (False, True):
        problem = ActivationBackward(shape, source[0], other, accumulate)
        got = run(f"{name}.backward", problem, pack(shape, dy, 0), source[1], pack(other, start, 0))[2]
        assert_close(unpack(other, got, gradient=True), wanted + (start if accumulate else 0), stored=other)


@some_shapes
def test_add(run, rng, shape):
    a, b, other = draw(rng, shape), draw(rng, shape), other_halo(shape)
    got = run("add.forward", add.AddForward(shape, other, shape), pack(shape, a), pack(other, b), pack(shape, a))[2]
    assert_close(unpack(shape, got), add.forward_reference(a, b), terms=1, stored=shape)


ARRANGED = {  # axes of a rearranged image, of those of the image
    "flattened": lambda c, h, w: (c + h + w, (), ()),
    "turned": lambda c, h, w: (w, h, c),
    "patches for channels": lambda c, h, w: (h[:1] + c + w[:1], h[1:], w[1:]),
    "shuffled": lambda c, h, w: (c[::-1], (), h + w),
}


@pytest.mark.parametrize("how", ARRANGED)
@pytest.mark.parametrize("shape", [make(6, 4, 9, 7, (1, 0, 2, 1)), *SHAPES[7:8]], ids=str)
def test_rearranged_and_back(run, rng, shape, how):
    """Both ways, into another halo, and added to what is there; of float16 too."""
    dims = whole((1, shape.channels, shape.height, shape.width))
    split = {dim: cut(dims[dim], (2, size_of(dims[dim]) // 2)) for dim in "CH"}
    split["W"] = cut(dims["W"], (size_of(dims["W"]) // 3, 3)) if shape.width % 3 == 0 else [(), dims["W"]]
    pieces = [sum(split[dim], ()) for dim in "CHW"]
    channels, rows, columns = map(merged, ARRANGED[how](*pieces))
    sizes = [size_of(axis) for axis in (channels, rows, columns)]
    there = make(*sizes, shape.batch, (1, 2, 0, 1), dtype=shape.dtype)
    x, start = draw(rng, shape), draw(rng, there)
    problem = rearrange.Rearrange(shape, there, channels, rows, columns)
    wanted = rearrange.reference(problem, x)
    assert np.array_equal(np.sort(wanted, None), np.sort(x, None)) and np.array_equal(
        wanted[..., 0].ravel(), by_numpy(x[..., 0], pieces, (channels, rows, columns))
    )
    for accumulate in (False, True):
        problem = dataclasses.replace(problem, accumulate=accumulate)
        y = run("rearrange.forward", problem, pack(shape, x, 0), pack(there, start, 0))[1]
        assert np.array_equal(
            unpack(there, y, gradient=True), as_stored(there, wanted + start) if accumulate else wanted
        )
    back = inverse({"C": channels, "H": rows, "W": columns})
    problem = rearrange.Rearrange(there, shape, back["C"], back["H"], back["W"])
    got = run("rearrange.forward", problem, pack(there, wanted, 0), pack(shape, x * 0, 0))[1]
    assert np.array_equal(unpack(shape, got, gradient=True), x)


def by_numpy(x, pieces, axes):
    """The same by a reshape and a transposition; x (C, H, W), whose dimensions are those pieces."""
    parts = [part for piece in pieces for part in piece]
    order = [part for axis in axes for whole_part in axis for part in parts_of(whole_part, parts)]
    return x.reshape([part.size for part in parts]).transpose([parts.index(part) for part in order]).ravel()


def parts_of(joined, parts):
    """Of the parts those that make the joined one, in order."""
    ends = range(joined.stride, joined.stride * joined.size)
    inside = [part for part in parts if part.dim == joined.dim and part.stride in ends]
    return sorted(inside, key=lambda part: -part.stride)


@some_shapes
def test_bias_gradient(run, rng, shape):
    dy = draw(rng, shape)
    got = run("bias.gradient", bias.BiasGradient(shape), pack(shape, dy, 0), np.zeros(shape.channels, np.float32))[1]
    assert_close(got, bias.gradient_reference(dy), terms=20, scale=np.sqrt(dy[0].size))


# Attention

ATTENTIONS = {  # heads, channels of a head in q and k, in v; (rows, width) of q, of k; groups; causal; bias
    "patches": (2, 4, 5, (2, 9), (9, 5), 1, False, (2, 1)),
    "windows": (3, 4, 2, (1, 6), (1, 5), 4, False, (1, 4)),
    "alone": (2, 3, 2, (1, 3), (1, 5), 2, False, None),
    "causal": (1, 3, 4, (1, 17), (1, 17), 1, True, None),
}


@pytest.mark.parametrize("dtype", ["float32", *(["float16"] if TARGET.float16 else [])])
@pytest.mark.parametrize("how", ATTENTIONS)
def test_attention(run, rng, how, dtype):
    heads, depth, width, (rows, columns), (key_rows, key_columns), groups, causal, bias = ATTENTIONS[how]
    batch = 1 if how == "windows" else TARGET.vector + 3
    q = make(heads * depth, groups * rows, columns, batch, (1, 0, 2, 1), dtype)
    k = make(heads * depth, groups * key_rows, key_columns, batch, (0, 1, 0, 0), dtype)
    v = dataclasses.replace(k, channels=heads * width, halo=(0, 0, 0, 2))
    y = dataclasses.replace(q, channels=heads * width, halo=(2, 0, 0, 0))
    problem = attention.Attention(q, k, v, y, heads, 0.7, (rows, key_rows), causal, bias)
    values = [2 * draw(rng, q), 2 * draw(rng, k), draw(rng, v)]
    given = [pack(image, value) for image, value in zip((q, k, v), values, strict=True)]
    added = rng.standard_normal(problem.bias_elems, np.float32)
    added[::7] = -np.inf
    more = [added] if bias else []
    wanted, sums = attention.forward_reference(problem, *values, *more)
    sums_before = np.zeros(problem.sums_elems, np.float32)
    got, found = run("attention.forward", problem, *given, *more, pack(y, wanted), sums_before)[-2:]
    terms = 8 * depth + problem.tokens[1]
    assert_close(unpack(y, got), wanted, terms, stored=y)
    lanes = found.reshape(q.slices, heads, q.height, q.width, q.vector)
    lanes = np.moveaxis(lanes, 0, 3).reshape(heads, q.height, q.width, -1)
    assert np.isfinite(lanes).all()
    assert_close(lanes[..., :batch], sums, terms, scale=np.abs(sums).max() + 1)
    dy, gradients = (
        dataclasses.replace(y, dtype="float32", halo=(0, 1, 1, 0)),
        [dataclasses.replace(image, dtype="float32", halo=(1, 0, 0, 1)) for image in (q, k, v)],
    )
    upstream, starts = draw(rng, dy), [draw(rng, image) for image in gradients]
    stored = unpack(y, got)  # from which, rounded, the backward pass begins
    wanted = attention.backward_reference(problem, upstream, *values, *more)
    for chosen, accumulate in ((0, 1, 2), (False, True, False)), ((1,), (False, True, False)), ((0, 2), (True,) * 3):
        images = [image if place in chosen else None for place, image in enumerate(gradients)]
        backward = attention.AttentionBackward(problem, dy, *images, accumulate, bias is not None)
        results = run(
            "attention.backward",
            backward,
            *(pack(dy, upstream, 0), *given, *more, pack(y, stored), found),
            *(pack(gradients[place], starts[place], 0) for place in chosen),
            *([np.full(backward.dscores_elems, 7, np.float32)] if bias else []),
        )[6 + len(more) :]
        if bias:
            each = np.zeros((*wanted[3].shape[:-1], q.lanes))
            each[..., :batch] = wanted[3]
            summed = np.moveaxis(each.reshape(*each.shape[:-1], q.slices, q.vector).sum(-1), -1, 0)
            slack = {"stored": dataclasses.replace(q, dtype=dtype), "stores": 2 * heads * width}
            assert_close(results.pop().reshape(summed.shape), summed, 4 * terms * q.vector, **slack)
        for place, result in zip(chosen, results, strict=True):
            limit = wanted[place] + (starts[place] if accumulate[place] else 0)
            image = gradients[place]
            slack = {"stored": dataclasses.replace(image, dtype=dtype), "stores": 2 * heads * width}
            assert_close(unpack(image, result, gradient=True), limit, 4 * terms, **slack)


@some_shapes
@pytest.mark.parametrize("accumulate", [False, True])
def test_softmax(run, rng, shape, accumulate):
    x, dy, start = 2 * draw(rng, shape), draw(rng, shape), draw(rng, shape)
    other = other_halo(shape)
    wanted = softmax.forward_reference(x)
    got = run("softmax.forward", softmax.Softmax(shape, other), pack(shape, x), pack(other, start))[1]
    assert_close(unpack(other, got), wanted, terms=20 + shape.channels, stored=other)
    stored = unpack(other, got)
    wanted = softmax.backward_reference(dy, stored) + (start if accumulate else 0)
    problem = softmax.SoftmaxBackward(shape, other, shape, accumulate)
    got = run("softmax.backward", problem, pack(shape, dy, 0), pack(other, stored), pack(shape, start, 0))[2]
    assert_close(unpack(shape, got, gradient=True), wanted, terms=20 + shape.channels, stored=shape)


@some_shapes
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True)])
def test_products_of_matrices(run, rng, shape, turned):
    a, b = (sized(shape, 3, *(sizes[::-1] if turn else sizes)) for sizes, turn in zip(((5, 7), (7, 6)), turned))
    y = other_halo(sized(shape, 3, 5, 6))
    first, second, start = draw(rng, a), draw(rng, b), draw(rng, y)
    wanted = matmul.reference(matmul.Product(a, b, y, turned), first, second)
    left, right = (np.swapaxes(array, 1, 2) if turn else array for array, turn in zip((first, second), turned))
    for channel, example in (0, 0), (2, shape.batch - 1):
        np.testing.assert_allclose(
            wanted[channel, :, :, example], left[channel, :, :, example].astype(float) @ right[channel, :, :, example]
        )
    problem = matmul.Product(a, b, y, turned, any(turned))
    got = run("matmul.forward", problem, pack(a, first), pack(b, second), pack(y, start))[2]
    assert_close(unpack(y, got), wanted + any(turned) * start, terms=16, stored=y)
    with pytest.raises(SpecError, match="do not make a product"):
        matmul.Product(a, b, sized(shape, 3, 5, 5), turned)


@pytest.mark.parametrize("mask", [None, (1, 1), (3, 2)])
def test_what_attention_adds_and_the_gradient_of_its_table(run, rng, mask):
    sizes, elems = (3, 2, 4, 5), 23
    places = rng.integers(0, elems - 8, 20).astype(np.int32)
    problem = attention_bias.AttentionBias(elems, sizes, 3, mask)
    table, added = rng.standard_normal(elems, np.float32), rng.standard_normal(np.prod(mask or 0) * 20, np.float32)
    arrays = (table, places, *([added] if mask else []))
    wanted = attention_bias.bias_reference(problem, *arrays)
    got = run("attention.bias", problem, *arrays, np.zeros(wanted.size, np.float32))[-1]
    assert_close(got.reshape(sizes), wanted, terms=2)
    node = Node("attention", "a", (), (), {}, {"places": tuple(places), "apart": 3, "heads": 3, "table": elems})
    held = attention_bias.bias_constants(node)
    summed = attention_bias.AttentionTable(elems, 2, 3, 2, 20)
    dscores = rng.standard_normal(2 * 3 * 2 * 20, np.float32)
    wanted = attention_bias.table_reference(summed, dscores, held["a:order"], held["a:firsts"])
    again = np.zeros(elems)
    every = dscores.reshape(2, 3, 2, 20).sum((0, 2), dtype=np.float64)
    np.add.at(again, places + 3 * np.arange(3)[:, None], every)
    np.testing.assert_allclose(wanted, again, rtol=1e-12, atol=1e-12)
    arrays = dscores, held["a:order"], held["a:firsts"], np.full(elems, 7, np.float32)
    assert_close(run("attention.table", summed, *arrays)[-1], wanted, terms=64, scale=8.0)


# Pools

POOLS = {
    "2x2": ((2, 2), (2, 2), (0, 0)),
    "overlap": ((3, 3), (2, 2), (1, 1)),
    "gaps": ((2, 1), (3, 2), (1, 0)),
    "dense": ((3, 2), (1, 1), (0, 1)),
    "beyond": ((3, 2), (2, 3), (1, 0), (0, 1)),
    "rounded up": ((3, 4), (2, 3), (0, 1), None),
    "adaptive": (None, None, None),
}
pools = pytest.mark.parametrize("window", list(POOLS.values()), ids=list(POOLS))
pool_shapes = pytest.mark.parametrize("shape", [SHAPES[0], *SHAPES[4:6]], ids=[NAMES[0], *NAMES[4:6]])


def pool_case(shape, window, count_include_pad=True):
    """window: kernel, stride, padding, padding at the end; None there: with windows that leave the image."""
    kernel, stride, padding, *end = window
    if kernel is None:
        return pool.Pool(shape, dataclasses.replace(other_halo(shape), height=5, width=shape.width * 2 // 3))
    sizes = []
    for axis, size in enumerate((shape.height, shape.width)):
        spare = size + padding[axis] + (end[0] if end and end[0] else padding)[axis] - kernel[axis]
        count = -(-spare // stride[axis]) if end == [None] else spare // stride[axis]
        sizes.append(count + 1 - (end == [None] and count * stride[axis] >= size + padding[axis]))
    result = dataclasses.replace(other_halo(shape), height=sizes[0], width=sizes[1])
    return pool.Pool(shape, result, kernel, stride, padding, count_include_pad, end[0] if end else None)


@pools
@pool_shapes
def test_max_pool(run, rng, shape, window):
    problem = pool_case(shape, window)
    x = draw(rng, shape).round(0)  # many ties
    dy, start, dx_image = draw(rng, problem.y), draw(rng, shape), other_halo(shape)
    y = run("max_pool2d.forward", problem, pack(shape, x), pack(problem.y, dy))[1]
    assert np.array_equal(unpack(problem.y, y), pool.max_forward_reference(problem, x))
    for accumulate in (False, True) if shape in (SHAPES[0], *SHAPES[5:6]) else (False,):
        backward = pool.MaxPoolBackward(problem, problem.y, dx_image, accumulate)
        got = run("max_pool2d.backward", backward, pack(problem.y, dy, 0), pack(shape, x), pack(dx_image, start, 0))[2]
        wanted = pool.max_backward_reference(problem, dy, x) + (start if accumulate else 0)
        assert_close(unpack(dx_image, got, gradient=True), wanted, 9, stored=dx_image, stores=9)


@pytest.mark.parametrize(  # whether padding counts is nothing where there is none, and no matter of the batch's
    ("shape", "window", "count_include_pad"),
    [
        pytest.param(shape, POOLS[name], counted, id=f"{NAMES[SHAPES.index(shape)]}-{name}-{counted}")
        for shape in (SHAPES[0], *SHAPES[4:6])
        for name in POOLS
        for counted in (False, True)
        if counted or (name not in ("2x2", "adaptive") and shape == SHAPES[0])
    ],
)
def test_avg_pool(run, rng, shape, window, count_include_pad):
    problem = pool_case(shape, window, count_include_pad)
    x, dy, start, dx_image = draw(rng, shape), draw(rng, problem.y), draw(rng, shape), other_halo(shape)
    y = run("avg_pool2d.forward", problem, pack(shape, x), pack(problem.y, dy))[1]
    assert_close(unpack(problem.y, y), pool.avg_forward_reference(problem, x), terms=9, stored=problem.y)
    for accumulate in (False, True) if count_include_pad and shape in (SHAPES[0], *SHAPES[5:6]) else (False,):
        backward = pool.AvgPoolBackward(problem, problem.y, dx_image, accumulate)
        got = run("avg_pool2d.backward", backward, pack(problem.y, dy, 0), pack(dx_image, start, 0))[1]
        wanted = pool.avg_backward_reference(problem, dy) + (start if accumulate else 0)
        assert_close(unpack(dx_image, got, gradient=True), wanted, 9, stored=dx_image, stores=9)


@pytest.mark.parametrize("count_include_pad", [False, True])
@pools
def test_pool_references_agree_with_torch(rng, window, count_include_pad):
    import torch
    from torch.nn import functional

    shape = SHAPES[0]
    problem = pool_case(shape, window, count_include_pad)
    x, dy = draw(rng, shape).round(0), draw(rng, problem.y)
    kernel, step, pad, *end = window
    for kind in ("max", "avg"):
        source = torch.from_numpy(x.astype(np.float64)).requires_grad_()
        nchw = source.permute(3, 0, 1, 2)
        if kernel is None:
            adaptive = functional.adaptive_max_pool2d if kind == "max" else functional.adaptive_avg_pool2d
            y = adaptive(nchw, problem.counts)
        else:
            if end and end[0]:  # a maximum and a mean that does not count padding are those of the image alone
                if kind == "avg" and not count_include_pad:
                    continue
                around = (pad[1], end[0][1], pad[0], end[0][0])
                nchw = functional.pad(nchw, around, value=-np.inf if kind == "max" else 0)
            how = {"padding": 0 if end and end[0] else pad, "ceil_mode": end == [None]}
            y = (
                functional.max_pool2d(nchw, kernel, step, **how)
                if kind == "max"
                else functional.avg_pool2d(nchw, kernel, step, **how, count_include_pad=count_include_pad)
            )
        y.permute(1, 2, 3, 0).backward(torch.from_numpy(dy.astype(np.float64)))
        forward = pool.max_forward_reference(problem, x) if kind == "max" else pool.avg_forward_reference(problem, x)
        backward = (
            pool.max_backward_reference(problem, dy, x) if kind == "max" else pool.avg_backward_reference(problem, dy)
        )
        np.testing.assert_allclose(forward, y.detach().permute(1, 2, 3, 0).numpy(), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(backward, source.grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (3, 3), (2, 3), (4, 3), (3, 1)])
def test_as_many_windows_as_torch_has(kernel, stride, padding):
    import torch
    from torch.nn import functional

    for size in range(1, 12):
        for ceil_mode in (False, True):
            try:
                y = functional.avg_pool2d(torch.zeros(1, 1, size, size), kernel, stride, padding, ceil_mode)
            except RuntimeError:
                continue
            x = make(1, size, size, 1)
            made = dataclasses.replace(x, height=y.shape[2], width=y.shape[3])
            problem = pool.Pool(x, made, (kernel, kernel), (stride, stride), (padding, padding))
            assert all(first < end for first, end, _ in (problem.window(0, place) for place in range(made.height)))
            with pytest.raises(SpecError, match="gives"):
                dataclasses.replace(problem, y=dataclasses.replace(made, height=made.height + 2))


def test_pool_of_a_wrong_size_is_refused():
    with pytest.raises(SpecError, match="gives 4x4, not 5x4"):
        pool.Pool(make(3, 8, 8, 8), make(3, 5, 4, 8), (2, 2), (2, 2))
    with pytest.raises(SpecError, match="more than half"):
        pool.Pool(make(3, 8, 8, 8), make(3, 6, 6, 8), (2, 2), (2, 2), (2, 2))


RESIZES = {  # height, width, linear, coordinates, rounding, scale where the sizes do not tell it
    "twice": (34, 34, False, "asymmetric", "floor"),
    "twice between": (34, 34, True, "half_pixel", "floor"),
    "corners": (23, 9, True, "align_corners", "floor"),
    "nearest of fewer": (6, 29, False, "asymmetric", "floor"),
    "exact": (12, 40, False, "half_pixel", "round_prefer_ceil"),
    "halves go before": (8, 51, False, "half_pixel", "round_prefer_floor"),
    "a factor": (25, 42, True, "half_pixel", "floor", (1.5, 2.5)),
    "of fewer": (5, 1, True, "half_pixel", "floor"),
    "a pixel": (1, 1, True, "align_corners", "floor"),
}


def resize_case(name, shape):
    height, width, linear, coordinates, rounding, *factors = RESIZES[name]
    result = dataclasses.replace(other_halo(shape), height=height, width=width)
    pairs = [(shape.height, height), (shape.width, width)]
    scale = tuple(float(np.float32(size) / np.float32(count)) for size, count in pairs)
    if coordinates == "align_corners":
        scale = tuple(float(np.float32(size - 1) / np.float32(max(count - 1, 1))) for size, count in pairs)
    if factors:
        scale = tuple(float(np.float32(1 / factor)) for factor in factors[0])
    return resize.Resize(shape, result, linear, coordinates, rounding, scale)


@pytest.mark.parametrize(
    ("shape", "name"), [(shape, name) for name in RESIZES for shape in (SHAPES[0], *SHAPES[5:6] * (name == "a factor"))]
)
def test_resize(run, rng, shape, name):
    problem = resize_case(name, shape)
    dy_image, dx_image = (dataclasses.replace(one, dtype="float32") for one in (problem.y, other_halo(shape)))
    x, dy, start = draw(rng, shape), draw(rng, dy_image), draw(rng, dx_image)
    y = run("resize.forward", problem, pack(shape, x), pack(problem.y, dy))[1]
    terms = 8 + problem.linear * shape.width  # a compiler that joins product and sum moves a place by a rounding of it
    assert_close(unpack(problem.y, y), resize.forward_reference(problem, x), terms, stored=problem.y)
    for accumulate in (False, True) if name in ("twice between", "a factor") else (False,):
        backward = dataclasses.replace(problem, x=dx_image, y=dy_image, accumulate=accumulate)
        got = run("resize.backward", backward, pack(dy_image, dy, 0), pack(dx_image, start, 0))[1]
        wanted = resize.backward_reference(problem, dy) + (start if accumulate else 0)
        assert_close(unpack(dx_image, got, gradient=True), wanted, 20 + terms)


@pytest.mark.parametrize("name", [name for name in RESIZES if name != "halves go before"])
def test_resize_references_agree_with_torch(rng, name):
    import torch
    from torch.nn import functional

    shape = SHAPES[0]
    problem = resize_case(name, shape)
    x, dy = draw(rng, shape), draw(rng, problem.y)
    *_, linear, coordinates, rounding = RESIZES[name][:5]
    mode = "bilinear" if linear else "nearest" if rounding == "floor" else "nearest-exact"
    how = {"scale_factor": RESIZES[name][5]} if len(RESIZES[name]) > 5 else {"size": RESIZES[name][:2]}
    corners = {"align_corners": coordinates == "align_corners"} if linear else {}
    source = torch.from_numpy(x).requires_grad_()  # float32, whose places torch's float64 does not have
    y = functional.interpolate(source.permute(3, 0, 1, 2), **how, mode=mode, **corners).permute(1, 2, 3, 0)
    y.backward(torch.from_numpy(dy))
    exact = {"rtol": 0, "atol": 8 * EPS * shape.width if linear else 0}  # a place is off by a rounding of the last one
    np.testing.assert_allclose(resize.forward_reference(problem, x), y.detach().numpy(), **exact)
    np.testing.assert_allclose(resize.backward_reference(problem, dy), source.grad.numpy(), rtol=0, atol=5e-5)


def test_nearest_pixels_are_torchs_for_all_sizes():
    import torch
    from torch.nn import functional

    for size in range(1, 50, 3):
        line = torch.arange(size, dtype=torch.float32).reshape(1, 1, 1, size)
        for count in (*range(1, 60), 41 * size):
            x, y = make(1, 1, size, 1), make(1, 1, count, 1)
            scale = float(np.float32(size) / np.float32(count))
            for mode, how in (
                ("nearest", ("asymmetric", "floor")),
                ("nearest-exact", ("half_pixel", "round_prefer_ceil")),
            ):
                wanted = functional.interpolate(line, size=(1, count), mode=mode).flatten().numpy()
                found, *_ = resize.Resize(x, y, False, *how, (1.0, scale)).taps(1)
                assert np.array_equal(found, wanted), (size, count, mode)


def spread_over(shape, text):
    """The operand of a shape that a word says: "chw" an image of its size, "c" one with a pixel a channel, "C" a weight
    a channel."""
    sizes = dict(zip("chw", (shape.channels, shape.height, shape.width), strict=True))
    if text.islower() or text == "-":
        own = {axis: size if axis in text else 1 for axis, size in sizes.items()}
        return sized(shape, own["c"], own["h"], own["w"], (1, 0, 0, 1))
    strides, elems = [], 1
    for axis in "whc":
        strides.insert(0, elems if axis.upper() in text else 0)
        elems *= sizes[axis] if axis.upper() in text else 1
    return combine.Weights(elems, tuple(strides))


COMBINATIONS = [  # formula, operands
    ("(x0 * x1)", ("chw", "c")),
    ("(x0 * x1)", ("chw", "chw")),
    ("(x0 - x1)", ("c", "chw")),
    ("(x0 / x1)", ("chw", "hw")),
    ("((x0 * x1) + x2)", ("chw", "C", "C")),
    ("(x0 * x1)", ("chw", "CHW")),
    ("(x0 + x1)", ("chw", ".")),
    ("(x0 * x1)", ("w", "HW")),
    ("maximum(x0, x1)", ("chw", "-")),
]
some_combinations = pytest.mark.parametrize(
    ("shape", "formula", "kinds"),
    [
        pytest.param(shape, *case, id=f"{SOME[shape]}-{case[0]}-{'-'.join(case[1])}")
        for place, shape in enumerate(SOME)
        for case in (COMBINATIONS if shape in FEW or place == 1 else COMBINATIONS[::4])
    ],
)


@some_combinations
def test_combine(run, rng, shape, formula, kinds):
    layouts = tuple(spread_over(shape, kind) for kind in kinds)

    def drawn(layout):
        """Away from 0, by which a formula divides."""
        if isinstance(layout, combine.Weights):
            return (2 + rng.random(layout.elems)).astype(np.float32)
        return as_stored(layout, 2 + rng.random((layout.channels, layout.height, layout.width, layout.batch)))

    def packed(layout, values):
        return values if isinstance(layout, combine.Weights) else pack(layout, values, 1)

    operands, y_image = [drawn(layout) for layout in layouts], other_halo(shape)
    arrays = [packed(*one) for one in zip(layouts, operands, strict=True)]
    dy, start = draw(rng, shape), draw(rng, shape)
    for accumulate in (False, True):
        problem = combine.Combine(formula, layouts, y_image, accumulate)
        got = run("combine.forward", problem, *arrays, pack(y_image, start))[-1]
        wanted = combine.forward_reference(problem, *operands) + (start if accumulate else 0)
        assert_close(unpack(y_image, got), wanted, terms=4, stored=y_image)
    summed = [place for place, one in enumerate(layouts) if not all(combine.kept(one, shape))]
    same = {combine.kept(layouts[place], shape) for place in summed[:1]}
    goals = [
        place
        for place, one in enumerate(layouts)
        if all(combine.kept(one, shape)) or {combine.kept(one, shape)} == same
    ]
    for accumulate in (False, True):
        made = tuple(combine.Goal(place, layouts[place], accumulate) for place in goals)
        problem = combine.CombineBackward(formula, shape, layouts, made)
        before = [operands[place] if accumulate else 0 for place in goals]
        room = [
            pack(layouts[place], operands[place], 0)
            if place not in summed or isinstance(layouts[place], Image)
            else operands[place]
            for place in goals
        ]
        results = run("combine.backward", problem, pack(shape, dy, 0), *arrays, *room)[-len(goals) :]
        references = combine.backward_reference(problem, dy, *operands)
        for place, got, wanted, held in zip(goals, results, references, before, strict=True):
            layout, many = layouts[place], dy.size // np.size(wanted)
            terms = 4 + 4 * np.sqrt(many) * (many > 1)
            if isinstance(layout, combine.Weights):
                assert_close(got, wanted + held, terms=terms, scale=np.abs(wanted).max() + 3)
            else:
                assert_close(unpack(layout, got, gradient=True), wanted + held, terms, stored=layout)
    if isinstance(layouts[-1], Image):
        only = combine.CombineBackward("(x0 + x1)", shape, (None, None), (combine.Goal(1, layouts[-1]),))
        got = run("combine.backward", only, pack(shape, dy, 0), pack(layouts[-1], operands[-1], 0))[-1]
        assert_close(
            unpack(layouts[-1], got, gradient=True),
            combine.backward_reference(only, dy, None, None)[0],
            60,
            stored=layouts[-1],
        )


NORMS = {"groups": (3, True), "whole": (1, True), "channels": (1, False), "instances": (0, True)}


@pytest.mark.parametrize("kind", NORMS)
@some_shapes
def test_norm(run, rng, shape, kind):
    """Far from 0, with and without weight and bias."""
    shape = dataclasses.replace(shape, channels=6)
    groups, pixels = NORMS[kind]
    groups = groups or shape.channels
    if norm.count_of(shape, groups, pixels) == 1:
        return
    x, dy, start = draw(rng, shape, 3.0), draw(rng, shape), draw(rng, shape)
    weight, bias = np.add(rng.standard_normal((2, shape.channels)), [[1], [0]]).astype(np.float32)
    room = np.zeros(norm.moments_elems(shape, groups, pixels), np.float32)
    y_image = other_halo(shape)
    for held in ({"weight": weight, "bias": bias}, {}):
        problem = norm.Norm(shape, y_image, groups, pixels, 1e-5, **dict.fromkeys(held, True))
        *_, moments, y = run("norm.forward", problem, pack(shape, x), *held.values(), room, pack(y_image, start))
        wanted = norm.forward_reference(x, groups, pixels, 1e-5, held.get("weight"), held.get("bias"))
        assert_close(unpack(y_image, y), wanted, terms=40, stored=y_image)
        told = norm.moments_reference(x, shape, groups, pixels, 1e-5)
        assert_close(moments.reshape(told.shape) * (told != 0), told, terms=40)
        dx, dweight, dbias = norm.backward_reference(dy, x, groups, pixels, 1e-5, held.get("weight"))
        # A gradient is a difference of terms as large as this, of two values hardly any of it is left.
        parts = 2 * np.abs(norm.normal_reference(x, groups, pixels, 1e-5)[1] * dy).max() * np.abs(weight).max()
        arrays = [pack(shape, dy, 0), pack(shape, x)]
        for accumulate in (False, True) if held else (False,):
            back = norm.NormBackward(shape, shape, y_image, groups, pixels, bool(held), accumulate)
            got = run("norm.backward", back, *arrays, *([weight] if held else []), moments, pack(y_image, start, 0))[-1]
            wanted = dx + (start if accumulate else 0)
            assert_close(unpack(y_image, got, gradient=True), wanted, 20, scale=parts, stored=y_image)
    sums = [np.zeros(shape.channels, np.float32) for _ in range(2)]
    parameters = norm.NormParameters(shape, shape, groups, pixels)
    got = run("norm.parameters", parameters, *arrays, moments, *sums)[-2:]
    for have, wanted in zip(got, (dweight, dbias), strict=True):
        assert_close(have, wanted, terms=40, scale=np.sqrt(dy[0].size) * 4)
    only = dataclasses.replace(parameters, weight=False)
    assert_close(run("norm.parameters", only, arrays[0], sums[0])[-1], dbias, 40, scale=np.sqrt(dy[0].size) * 4)


@pytest.mark.parametrize("kind", NORMS)
def test_norm_references_agree_with_torch(rng, kind):
    import torch
    from torch.nn import functional

    groups, pixels = NORMS[kind]
    x, dy = rng.standard_normal((2, 6, 4, 3, 5))
    weight, bias = rng.standard_normal((2, 6))
    tensors = [torch.from_numpy(one).requires_grad_() for one in (x, weight, bias)]
    theirs = tensors[0].permute(3, 0, 1, 2)
    if pixels:
        y = functional.group_norm(theirs, groups or 6, *tensors[1:], 1e-3)
    else:
        y = functional.layer_norm(theirs.permute(0, 2, 3, 1), (6,), *tensors[1:], 1e-3).permute(0, 3, 1, 2)
    y = y.permute(1, 2, 3, 0)
    y.backward(torch.from_numpy(dy))
    ours = norm.forward_reference(x, groups or 6, pixels, 1e-3, weight, bias)
    np.testing.assert_allclose(ours, y.detach().numpy(), rtol=1e-9, atol=1e-9)
    gradients = norm.backward_reference(dy, x, groups or 6, pixels, 1e-3, weight)
    for have, wanted in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(have, wanted.grad.numpy(), rtol=1e-9, atol=1e-9)


def test_sums_over_different_axes_are_several_calls():
    shape = SHAPES[0]
    goals = (combine.Goal(0, spread_over(shape, "c")), combine.Goal(1, spread_over(shape, "C")))
    with pytest.raises(AssertionError, match="different axes"):
        combine.CombineBackward("(x0 * x1)", shape, (None, None), goals)


@some_shapes
@pytest.mark.parametrize(
    ("p", "whole"), [(0.25, "element"), (0.3, "channel"), (1.0, "element"), (0.5, "example"), (0.5, "batch")]
)
def test_dropout(run, rng, shape, p, whole):
    x, before, drawn = draw(rng, shape), draw(rng, shape), np.array([-12345], np.int32)
    for accumulate in (False, True):
        problem = dropout.Dropout(shape, shape, p, whole, accumulate)
        wanted = dropout.reference(problem, -12345, x)
        got = run("dropout.forward", problem, drawn, pack(shape, x, 0), pack(shape, before, 0))[2]
        wanted = wanted + before if accumulate else wanted
        assert_close(unpack(shape, got, gradient=True), wanted, terms=2, stored=shape)


@some_shapes
def test_global_avg_pool(run, rng, shape):
    y_image = sized(shape, shape.channels, 1, 1)
    x, start, dy = draw(rng, shape), draw(rng, shape), draw(rng, y_image)
    y = run("global_avg_pool.forward", pool.GlobalPool(shape, y_image), pack(shape, x), pack(y_image, dy))[1]
    assert_close(unpack(y_image, y), pool.global_forward_reference(x), terms=20, stored=y_image)
    for accumulate in (False, True):
        problem = pool.GlobalPool(shape, y_image, accumulate)
        got = run("global_avg_pool.backward", problem, pack(y_image, dy, 0), pack(shape, start, 0))[1]
        wanted = pool.global_backward_reference(problem, dy) + (start if accumulate else 0)
        assert_close(unpack(shape, got, gradient=True), wanted, stored=shape)


# Loss


@pytest.mark.parametrize(("classes", "batch", "spread"), [(10, 7, 1.0), (13, 64, 50.0), (300, 64, 1.0)])
def test_cross_entropy(run, rng, classes, batch, spread):
    import torch

    logits_image, dlogits_image = make(classes, 1, 1, batch), make(classes, 1, 1, batch, (1, 0, 0, 1))
    logits, labels = draw(rng, logits_image) * np.float32(spread), rng.integers(0, classes, batch)
    logits[:, 0, 0, 1] = 80.0  # all tie: the first is taken
    labels[:2] = logits[:, 0, 0, 0].argmax(), 1
    problem = loss.SoftmaxCrossEntropy(logits_image, dlogits_image)
    results = run(
        "loss.cross_entropy",
        problem,
        pack(logits_image, logits),
        labels.astype(np.int32),
        np.zeros(1, np.float32),
        np.zeros(batch, np.int32),
        pack(dlogits_image, logits),
    )
    wanted_loss, correct, dlogits = loss.CrossEntropy().reference(logits, {"labels": labels})
    assert_close(results[2], np.array([wanted_loss]), terms=20)
    assert np.array_equal(results[3], correct.ravel()) and correct[0] and not correct[1]
    assert_close(unpack(dlogits_image, results[4], gradient=True), dlogits, terms=40)

    source = torch.from_numpy(logits[:, 0, 0].T.astype(np.float64)).requires_grad_()
    torch.nn.functional.cross_entropy(source, torch.from_numpy(labels)).backward()
    np.testing.assert_allclose(dlogits[:, 0, 0].T, source.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_cross_entropy_of_large_logits_is_finite(run):
    shape = make(3, 1, 1, 8)
    logits = np.full((3, 1, 1, 8), 3e38, np.float32)
    logits[1] = -3e38
    got = run(
        "loss.cross_entropy",
        loss.SoftmaxCrossEntropy(shape, shape),
        pack(shape, logits),
        np.zeros(8, np.int32),
        np.zeros(1, np.float32),
        np.zeros(8, np.int32),
        pack(shape, logits),
    )
    assert_close(got[2], np.array([np.log(2)]))
    assert np.isfinite(got[4]).all()


@pytest.mark.parametrize("name", losses.NAMES)
@pytest.mark.parametrize("shape", [(1, 2), (7, 13), (33, 5), (5, 3, 4, 6), (8, 4, 1, 3)], ids=str)
def test_a_loss_is_its_reference_and_torchs(run, rng, name, shape):
    import torch

    rule, draw_targets, theirs = losses.rules(shape[1])[name]
    height, width = shape[2:] or (1, 1)
    image, slope_image = (make(shape[1], height, width, shape[0], halo) for halo in ((0, 0, 0, 0), (1, 0, 0, 1)))
    outputs, given = draw(rng, image), draw_targets(rng, shape)
    rule.check(shape)
    arrays = rule.constants(shape) | rule.targets(*losses.as_tuple(given), shape=shape)
    wanted_arrays = rule.arrays(shape)
    assert {key: (array.size, str(array.dtype)) for key, array in arrays.items()} == wanted_arrays
    told = [np.zeros(1, np.float32), *([np.zeros(given_answers(shape), np.int32)] if rule.tells_correct else [])]
    got = run(
        rule.kernel,
        rule.problem(image, slope_image),
        pack(image, outputs),
        *(arrays[key] for key in wanted_arrays),
        *told,
        pack(slope_image, outputs),
    )
    value, correct, slope = rule.reference(outputs, arrays)
    after = 1 + len(wanted_arrays)
    assert_close(got[after], np.array([value]), terms=shape[1] + 20)
    assert (correct is None) == (not rule.tells_correct)
    assert correct is None or np.array_equal(got[after + 1], correct.ravel())
    assert_close(unpack(slope_image, got[-1], gradient=True), slope, terms=40)

    theirs_of = outputs[:, 0, 0].T if len(shape) == 2 else np.moveaxis(outputs, -1, 0)
    source = torch.from_numpy(theirs_of.astype(np.float64)).requires_grad_()
    wanted = theirs(source, losses.tensors(given))
    wanted.backward()
    ours = slope[:, 0, 0].T if len(shape) == 2 else np.moveaxis(slope, -1, 0)
    if wanted_arrays.keys() == {"labels"}:
        np.testing.assert_allclose(value, wanted.item(), rtol=1e-9)
        np.testing.assert_allclose(ours, source.grad.numpy(), rtol=1e-9, atol=1e-12)
    else:  # weights and what is wanted go to kernels as float32
        assert_close(np.array(value), np.array(wanted.item()), terms=20)
        assert_close(ours, source.grad.numpy(), terms=8)


@pytest.mark.parametrize("shape", [(7, 13), (5, 3, 4, 6)], ids=str)
def test_where_no_label_counts_the_loss_is_nan_and_the_gradient_zero(run, rng, shape):
    rule = CrossEntropy(ignore_index=3, weight=losses.weights(shape[1]))
    image = make(shape[1], *(shape[2:] or (1, 1)), shape[0])
    arrays = rule.constants(shape) | rule.targets(np.full((shape[0], *shape[2:]), 3), shape=shape)
    outputs, count = draw(rng, image), given_answers(shape)
    told = np.zeros(1, np.float32), np.ones(count, np.int32), pack(image, outputs)
    got = run(
        rule.kernel, rule.problem(image, image), pack(image, outputs), *map(arrays.get, rule.arrays(shape)), *told
    )
    assert np.isnan(got[-3]).all() and not got[-2].any() and not unpack(image, got[-1], gradient=True).any()
    value, correct, slope = rule.reference(outputs, arrays)
    assert np.isnan(value) and not correct.any() and not slope.any()


@pytest.mark.parametrize("shape", [make(3, 4, 5, 9, (1, 0, 2, 1)), make(2, 3, 1, 16)], ids=str)
def test_export_gives_maps_as_torch_has_them(run, rng, shape):
    values = draw(rng, shape)
    result = np.zeros(values.size, np.float32)
    got = run("image.export", image.ImageExport(shape), pack(shape, values), result)[1]
    assert np.array_equal(got, image.export_reference(values).ravel())


# Optimizer


every_rule = pytest.mark.parametrize("rule", optimizers.EVERY.values(), ids=optimizers.EVERY)


@pytest.mark.parametrize("count", [1, 9000])
@every_rule
def test_an_optimizer_is_torchs(run, rng, rule, count):
    import torch

    values = rng.standard_normal(count).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(values.copy()))
    rival = optimizers.twin(rule, [parameter])
    states = [np.zeros_like(values) for _ in rule.state]
    exact, exact_states = values.astype(np.float64), [np.zeros(count) for _ in rule.state]
    name = rule.rule_name
    for number in range(1, 11):
        gradients, hyper = rng.standard_normal(count).astype(np.float32), rule.hyper(number, rule.lr)
        exact, *exact_states = optimizer.update_reference(name, exact, gradients, *exact_states, hyper)
        values, _, *states, _ = run("optimizer.update", optimizer.Update(name), values, gradients, *states, hyper)
        parameter.grad = torch.from_numpy(gradients)
        rival.step()
    assert_close(values, exact, terms=40)
    for state, wanted in zip(states, exact_states, strict=True):
        assert_close(state, wanted, terms=40)
    assert_close(parameter.detach().numpy(), exact, terms=40)


@every_rule
def test_an_update_of_a_part_leaves_the_rest(run, rng, rule):
    problem = optimizer.UpdatePart(rule.rule_name, 5, 7, 20)
    values, gradients, *states = rng.standard_normal((2 + len(rule.state), 20)).astype(np.float32)
    arrays = [values, gradients, *map(np.abs, states), rule.hyper(2, rule.lr)]
    got = run("optimizer.update_part", problem, *arrays)
    wanted = optimizer.update_reference(rule.rule_name, *arrays)
    for place, want in zip((0, *range(2, 2 + len(rule.state))), wanted, strict=True):
        assert_close(got[place][5:12], want[5:12])
        for rest in (slice(5), slice(12, None)):
            np.testing.assert_array_equal(got[place][rest], arrays[place][rest])


@pytest.mark.parametrize("count", [1, 2000, 70001])
def test_gradients_of_passes_begin_at_zero_add_up_and_count_their_share(run, rng, count):
    gradients, part = rng.standard_normal((2, count)).astype(np.float32)
    share, bad = np.float32([0.3]), np.full(count, np.nan, np.float32)
    assert_close(run("gradients.zero", adding.Zero(), bad)[0], adding.zero_reference(bad))
    got = run("gradients.add", adding.Add(), part, gradients)
    np.testing.assert_array_equal(got[0], part)
    assert_close(got[1], adding.add_reference(part, gradients))
    got = run("gradients.scale", adding.Scale(), gradients, share)[0]
    assert_close(got, adding.scale_reference(gradients, share))


@pytest.mark.parametrize("count", [1, 2000, 70001])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("listed", [True, False])
def test_a_norm_is_its_reference_and_bounds_gradients(run, rng, count, first, listed):
    gradients, before = rng.standard_normal(count).astype(np.float32), np.float32([3.0])
    places = rng.permutation(count)[: -(-count // 2)].astype(np.int32) if listed else None
    problem = optimizer.Norm(first, listed)
    got = run("optimizer.norm", problem, gradients, *([places] if listed else []), before)[-1]
    wanted = optimizer.norm_reference(problem, gradients, places, float(before[0]))
    assert_close(got, np.array([wanted]), terms=20)
    for bound in (wanted * 2, wanted / 2, np.nan):
        bounded = run("optimizer.bound", optimizer.Bound(), gradients, got, np.float32([bound]))[0]
        reference = optimizer.bound_reference(gradients, float(got[0]), bound)
        if np.isnan(bound):
            assert np.isnan(bounded).all() and np.isnan(reference).all()
        elif bound > wanted:
            np.testing.assert_array_equal(bounded, gradients)
        else:
            assert_close(bounded, reference)


@pytest.mark.parametrize(("source_block", "row_block"), [(1, 1), (1, 4), (2, 3), (4, 4)])
@pytest.mark.parametrize("units", [1, 5000])
def test_units_are_turned_and_what_is_behind_them_stays(run, rng, units, source_block, row_block):
    problem = turning.TurnUnits(source_block, row_block)
    values = rng.standard_normal(units * source_block * row_block, np.float32)
    permutation = rng.permutation(units).astype(np.int32)
    before = rng.standard_normal(values.size + 7, np.float32)
    *_, got = run("values.turn", problem, values, permutation, before.copy())
    assert np.array_equal(got[: values.size], turning.turned_reference(problem, values, permutation))
    assert np.array_equal(got[values.size :], before[values.size :])


def test_values_are_copied_from_their_places_and_what_is_behind_them_stays(run, rng):
    values, before = (rng.standard_normal(size, np.float32) for size in (90, 75))
    places = rng.permutation(90)[:70].astype(np.int32)
    *_, got = run("values.copy", turning.CopyValues(), values, places, before.copy())
    assert np.array_equal(got, np.concatenate([values[places], before[70:]]))


# Threads


def test_sums_do_not_depend_on_the_number_of_threads(run, rng):
    import tvm

    shape = make(3, 33, 32, 32)
    z, dy = pack(shape, draw(rng, shape)), pack(shape, draw(rng, shape))
    facts = rng.standard_normal((5, shape.channels)).astype(np.float32)
    configure = tvm.get_global_func("runtime.config_threadpool")
    results = []
    try:
        for threads in (1, 2):
            configure(1, threads)
            results.append(
                (
                    run("batch_norm.moments", batch_norm.BatchNormMoments(shape, 1e-5), z, facts[:3])[1],
                    run(
                        "batch_norm.backward",
                        batch_norm.BatchNormBackward(shape, shape, None, "relu"),
                        dy,
                        z,
                        facts[:3],
                        facts[3:5],
                        np.zeros(2 * shape.channels, np.float32),
                    )[4],
                    run("bias.gradient", bias.BiasGradient(shape), dy, facts[0])[1],
                )
            )
    finally:
        configure(1, 1)
    for one, two in zip(*results, strict=True):
        assert np.array_equal(one, two)
