"""NaN, infinity and -0 go through every kernel as through its reference, which says what torch says."""

from collections.abc import Iterator
from dataclasses import replace

import ml_dtypes  # noqa: F401 - numpy knows bfloat16 by it
import numpy as np
import pytest
from losses import as_tuple, rules
from optimizers import EVERY
from test_compact import SHAPES as COMPACT_SHAPES
from test_compact import row_case, values_of
from test_depthwise import Case
from test_gather import TARGET, VECTOR, activation, call, random_problem
from test_normed_depthwise import Chain
from test_operators import HALO, JOINED, make, pack

from mest_compile.hardware.backend import backend_of
from mest_compile.ir.arrangement import whole
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.layouts.layout import rounded, to_float
from mest_compile.kernels.source import SCHEDULES
from mest_compile.kernels.specializing import structure_of
from mest_compile.operators import (
    add,
    adding,
    attention,
    attention_bias,
    batch_norm,
    combine,
    dropout,
    embedding,
    frozen_norm,
    matmul,
    norm,
    pool,
    rearrange,
    recurrent,
    resize,
    softmax,
)
from mest_compile.operators import conversion as image
from mest_compile.operators.activation import (
    ACTIVATIONS,
    ActivationBackward,
    ActivationForward,
    FormulaBackward,
    FormulaForward,
    activation_of,
)
from mest_compile.operators.layers import bias, turning
from mest_compile.operators.layers.depthwise import (
    DepthwiseForward,
    DepthwiseGradInput,
    DepthwiseGradWeight,
    depthwise_forward_reference,
    depthwise_grad_input_reference,
    depthwise_grad_weight_reference,
)
from mest_compile.operators.layers.gather import (
    GatherConv,
    GatherGrad,
    Pass,
    gather_conv_reference,
    gather_grad_reference,
)
from mest_compile.operators.layers.normed_depthwise import normed_depthwise_backward_reference
from mest_compile.operators.losses import cross_entropy as loss
from mest_compile.operators.optimizers import optimizer

EPS = np.finfo(np.float32).eps
KERNELS = sorted(name.partition("/")[2] for name in SCHEDULES.load() if name.startswith(f"{TARGET.device}/"))
CONVOLUTIONS = ("gather", "compact", "pattern", "pattern_groups", "depthwise", "normed_depthwise")
DTYPES = {"float32": KERNELS, **({"float16": KERNELS} if TARGET.float16 else {})}
if "bfloat16" in backend_of(TARGET).activations:  # of convolutions in test_pairs
    # and of chains in test_normed_depthwise
    DTYPES["bfloat16"] = [name for name in KERNELS if name.partition(".")[0] not in CONVOLUTIONS]
KEEP_SIGNS = {"image.import", "image.export", "rearrange.forward", "relu.forward"}
SPECIAL = np.array([np.nan, np.inf, -np.inf, -0.0, np.nan, np.inf, -np.inf, -0.0], np.float32)
FORMULA_TEXT = "select(x > 0.5, x * tanh(x), maximum(-2.0, x) / 3.0 - 1.0)"
# kernel -> function(rng, dtype) that yields (problem, arrays, {number of an array: what it must be afterwards})
CASES = {}


def case(*kernels):
    """Registers a function(kernel, rng, dtype) for kernels."""

    def register(function):
        CASES.update(dict.fromkeys(kernels, function))
        return function

    return register


def salted(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """A copy with each special value at two places, or fewer in a small array."""
    found = values.astype(np.float32)
    places = rng.choice(found.size, min(len(SPECIAL), found.size // 2), replace=False)
    found.reshape(-1)[places] = SPECIAL[: len(places)]
    return found


def draw(rng: np.random.Generator, layout: Image) -> np.ndarray:
    """Salted values (C, H, W, N), as `layout` holds them."""
    values = rng.standard_normal((layout.channels, layout.height, layout.width, layout.batch))
    return rounded(salted(rng, values), layout.dtype).astype(np.float32)


def agree(got: np.ndarray, wanted: np.ndarray, dtype: str) -> None:
    """NaN where NaN is wanted, the very infinities, and numbers but for rounding."""
    assert got.shape == wanted.shape
    numbers = np.isfinite(wanted)
    assert np.array_equal(got[~numbers], wanted[~numbers].astype(np.float32), equal_nan=True), (
        "not the same NaN and infinities"
    )
    assert np.isfinite(got[numbers]).all(), "NaN or infinity in the place of a number"
    scale = np.abs(wanted[numbers]).max(initial=0)
    assert (
        np.abs(got[numbers] - wanted[numbers]).max(initial=0)
        <= scale * ({"float32": 200 * EPS, "float16": 2.0**-8, "bfloat16": 2.0**-5}[dtype])
    )


@pytest.mark.usefixtures("drivers_optimise")
@pytest.mark.parametrize(("kernel", "dtype"), [(kernel, dtype) for dtype in DTYPES for kernel in DTYPES[dtype]])
def test_a_kernel_gives_what_its_reference_gives(usual_builder, kernel, dtype):
    """With optimised code, as users run it."""
    rng = np.random.default_rng(11)
    met = 0
    with np.errstate(all="ignore"):
        for problem, arrays, wanted in CASES[kernel](kernel, rng, dtype):
            results = call(usual_builder, kernel, problem, *arrays)
            for place, want in wanted.items():
                layout, values = want if isinstance(want, tuple) else (None, want)
                got = to_float(results[place])
                got = got if layout is None else layout.unpack(got.astype(np.float32))
                agree(got.reshape(values.shape), np.asarray(values, np.float64), dtype)
                if kernel in KEEP_SIGNS:
                    assert np.array_equal(
                        np.signbit(got.reshape(values.shape)[values == 0]), np.signbit(values[values == 0])
                    )
                met += np.count_nonzero(~np.isfinite(values))
    assert met or kernel in ("image.zero_halo", "gradients.zero")


@pytest.mark.skipif(TARGET.device != "cpu", reason="only kernels for the CPU are specialized")
@pytest.mark.parametrize("kernel", ["gather.conv", "gather.grad"])
def test_a_kernel_with_a_structure_baked_in_gives_the_same(builder, kernel):
    with np.errstate(all="ignore"):
        for problem, arrays, wanted in gathered(kernel, np.random.default_rng(3), "float32", live=1.0):
            structure = structure_of(problem, arrays[0])
            results, plain = (
                call(builder, kernel, problem, *arrays, structure=structure),
                call(builder, kernel, problem, *arrays),
            )
            assert all(np.array_equal(results[place], plain[place], equal_nan=True) for place in wanted)
            assert not all(np.isfinite(results[place]).all() for place in wanted)


def test_the_comparator_notices():
    wanted = np.array([1.0, np.nan, np.inf, -np.inf])
    agree(wanted.astype(np.float32), wanted, "float32")
    for place, wrong in ((0, np.nan), (0, 1.1), (1, 0.0), (2, -np.inf), (3, np.nan)):
        got = wanted.astype(np.float32)
        got[place] = wrong
        with pytest.raises(AssertionError):
            agree(got, wanted, "float32")


def shapes(dtype: str) -> tuple[Image, Image]:
    """A batch that leaves lanes empty, and the same with another halo."""
    shape = make(9, 6, 5, 7, (1, 1, 1, 1), dtype)
    return shape, replace(shape, halo=(0, 0, 2, 1))


# Pointwise


@case(
    "image.import",
    "image.export",
    "image.zero_halo",
    "image.copy",
    "rearrange.forward",
    "add.forward",
)
def pointwise(kernel, rng, dtype) -> Iterator:
    shape, other = shapes(dtype)
    x, start = draw(rng, shape), draw(rng, shape)
    here, there, room = pack(shape, x, 0), pack(other, start, 0), pack(shape, start, 0)
    if kernel == "image.import":
        yield (
            image.ImageImport(shape),
            [np.moveaxis(x, -1, 0), room],
            {1: (shape, image.import_reference(np.moveaxis(x, -1, 0)))},
        )
    elif kernel == "image.export":
        logits = make(9, 1, 1, 7, dtype=dtype)
        values = draw(rng, logits)
        yield (
            image.ImageExport(logits),
            [pack(logits, values), np.zeros((7, 9), np.float32)],
            {1: image.export_reference(values)},
        )
    elif kernel == "image.zero_halo":
        before = to_float(here)
        yield image.ZeroHalo(shape), [here], {0: np.where(before == HALO, 0, before)}
    elif kernel == "image.copy":
        yield image.ImageCopy(shape, other, True), [here, there], {1: (other, x + start)}
    elif kernel == "rearrange.forward":
        dims = whole((1, 9, 6, 5))
        turned = make(5, 9, 6, 7, (1, 0, 0, 1), dtype)
        problem = rearrange.Rearrange(shape, turned, dims["W"], dims["C"], dims["H"])
        room = pack(turned, draw(rng, turned), 0)
        yield problem, [here, room], {1: (turned, rearrange.reference(problem, x))}
    elif kernel == "add.forward":
        yield add.AddForward(shape, other, shape), [here, there, room], {2: (shape, add.forward_reference(x, start))}


@case("combine.forward", "combine.backward")
def combinations(kernel, rng, dtype) -> Iterator:
    shape, other = shapes(dtype)
    one, weights = make(9, 1, 1, 7, dtype=dtype), combine.Weights(9, (1, 0, 0))
    for second in other, one, weights:
        held = isinstance(second, combine.Weights)
        a, dy = draw(rng, shape), draw(rng, shape)
        b = salted(rng, rng.standard_normal(9)) if held else draw(rng, second)
        left, right, room = pack(shape, a, 0), b if held else pack(second, b, 0), pack(shape, dy, 0)
        if kernel == "combine.forward":
            problem = combine.Combine("(x0 * x1)", (shape, second), shape)
            yield problem, [left, right, room], {2: (shape, combine.forward_reference(problem, a, b))}
        else:
            goals = combine.Goal(0, shape), combine.Goal(1, second)
            problem = combine.CombineBackward("(x0 * x1)", shape, (shape, second), goals)
            da, db = combine.backward_reference(problem, dy, a, b)
            wanted = {3: (shape, da), 4: db if held else (second, db)}
            yield problem, [room, left, right, left, right], wanted


@case("norm.forward", "norm.backward", "norm.parameters")
def norms(kernel, rng, dtype) -> Iterator:
    """Of one example all is NaN; the others have none of it."""
    shape, _ = shapes(dtype)
    x, dy = rng.standard_normal((2, 9, 6, 5, 7)).astype(dtype).astype(np.float32)
    x[3, 2, 1, 4] = np.nan
    weight, bias = rng.standard_normal((2, 9)).astype(np.float32)
    moments = norm.moments_reference(x, shape, 3, True, 1e-5).astype(np.float32)
    dx, dweight, dbias = norm.backward_reference(dy, x, 3, True, 1e-5, weight)
    there, up = pack(shape, x, 0), pack(shape, dy, 0)
    if kernel == "norm.forward":
        wanted = norm.forward_reference(x, 3, True, 1e-5, weight, bias)
        problem = norm.Norm(shape, shape, 3, True, 1e-5, True, True)
        yield problem, [there, weight, bias, moments, up], {4: (shape, wanted)}
    elif kernel == "norm.backward":
        problem = norm.NormBackward(shape, shape, shape, 3, True, True)
        yield problem, [up, there, weight, moments, up], {4: (shape, dx)}
    else:
        yield norm.NormParameters(shape, shape, 3, True), [up, there, moments, weight, bias], {3: dweight, 4: dbias}


@case("recurrent.forward", "recurrent.backward", "recurrent.parameters")
def series(kernel, rng, dtype) -> Iterator:
    """Of one example all is NaN from one step on; the others have none of it."""
    x, y = make(12, 1, 5, 7, (0, 1, 0, 0), dtype), make(4, 1, 5, 7, dtype=dtype)
    values, dy = (rng.standard_normal((one.channels, 1, 5, 7)).astype(dtype).astype(np.float32) for one in (x, y))
    values[3, 0, 2, 4] = np.nan
    weight, bias = rng.standard_normal(48).astype(np.float32), rng.standard_normal(12).astype(np.float32)
    problem = recurrent.Recurrent(x, y, "gru", bias=True)
    made, kept = recurrent.forward_reference(problem, values, weight, bias)
    dx, dues = recurrent.backward_reference(problem, dy, values, weight, kept)
    given, up, room = pack(x, values, 0), pack(y, dy, 0), np.zeros(problem.kept_elems, np.float32)

    def lanes(array: np.ndarray) -> np.ndarray:
        found = np.pad(array, ((0, 0), (0, 0), (0, x.lanes - x.batch))).reshape(*array.shape[:2], -1, x.vector)
        return np.moveaxis(found, 2, 0).astype(np.float32)

    if kernel == "recurrent.forward":
        yield problem, [given, weight, bias, room, up], {4: (y, made)}
    elif kernel == "recurrent.backward":
        yield recurrent.RecurrentBackward(problem, y, x), [up, given, weight, lanes(kept), room, given], {5: (x, dx)}
    else:
        problem = recurrent.RecurrentParameters("gru", 4, 5, x.lanes, x.vector, True)
        found = recurrent.parameters_reference(problem, kept, dues)
        yield problem, [lanes(kept), lanes(dues), weight, bias], dict(zip((2, 3), (found[0].ravel(), found[1])))


@case("embedding.forward", "embedding.backward")
def tables(kernel, rng, dtype) -> Iterator:
    """NaN in one row, and in what one example gives back."""
    x, y, weight = make(6, 1, 1, 7, dtype=dtype), make(9, 1, 6, 7, (0, 2, 0, 1), dtype), rng.standard_normal((5, 9))
    numbers = rng.integers(0, 5, (6, 1, 1, 7)).astype(np.float32)
    weight, dy = weight.astype(np.float32), rng.standard_normal((9, 1, 6, 7)).astype(dtype).astype(np.float32)
    weight[2, 4] = dy[3, 0, 1, 2] = np.nan
    given = pack(x, numbers, 0)
    if kernel == "embedding.forward":
        yield (
            embedding.Embedding(x, y, 5),
            [given, weight, pack(y, dy)],
            {2: (y, embedding.forward_reference(numbers, weight))},
        )
    else:
        for padding in (-1, int(numbers[1, 0, 0, 2])):
            problem = embedding.EmbeddingBackward(y, x, 5, padding)
            wanted = embedding.backward_reference(problem, dy, numbers)
            met = wanted if padding < 0 else np.where(np.isnan(wanted), 0, wanted)
            yield problem, [pack(y, dy, 0), given, weight], {2: met}


@case("attention.forward", "attention.backward")
def attentions(kernel, rng, dtype) -> Iterator:
    q, k = make(4, 2, 3, 7, (1, 0, 0, 1), dtype), make(4, 2, 2, 7, dtype=dtype)
    problem = attention.Attention(q, k, k, q, 2, 0.5)
    values = [draw(rng, image) for image in (q, k, k)]
    y, sums = attention.forward_reference(problem, *values)
    given = [pack(image, value, 0) for image, value in zip((q, k, k), values, strict=True)]
    if kernel == "attention.forward":
        room = pack(q, values[0], 0), np.zeros(problem.sums_elems, np.float32)
        yield problem, [*given, *room], {3: (q, y)}
        return
    lanes = np.zeros((*sums.shape[:3], q.lanes))
    lanes[..., : q.batch] = sums
    held = np.moveaxis(lanes.reshape(*sums.shape[:3], q.slices, q.vector), 3, 0).astype(np.float32)
    dy, dq, dk = (replace(image, dtype="float32") for image in (q, q, k))
    upstream, rooms = draw(rng, dy), [pack(image, draw(rng, image), 0) for image in (dq, dk, dk)]
    *gradients, _ = attention.backward_reference(problem, upstream, *values)
    yield (
        attention.AttentionBackward(problem, dy, dq, dk, dk),
        [pack(dy, upstream, 0), *given, pack(q, y, 0), held, *rooms],
        dict(zip((6, 7, 8), zip((dq, dk, dk), gradients, strict=True), strict=True)),
    )


@case("attention.bias", "attention.table")
def attention_biases(kernel, rng, dtype) -> Iterator:
    if kernel == "attention.bias":
        problem = attention_bias.AttentionBias(9, (2, 1, 2, 3), 2, (1, 1))
        table, places, mask = (
            salted(rng, rng.standard_normal(9)),
            np.array([0, 3, 1, 6, 5, 2], np.int32),
            salted(rng, rng.standard_normal(6)),
        )
        wanted = attention_bias.bias_reference(problem, table, places, mask).ravel()
        yield problem, [table, places, mask, np.zeros(12, np.float32)], {3: wanted}
        return
    problem, order = attention_bias.AttentionTable(4, 2, 1, 1, 6), np.arange(6, dtype=np.int32)
    dscores, firsts = salted(rng, rng.standard_normal(12)), np.array([0, 2, 2, 5, 6], np.int32)
    wanted = attention_bias.table_reference(problem, dscores, order, firsts)
    yield problem, [dscores, order, firsts, np.zeros(4, np.float32)], {3: wanted}


@case("matmul.forward")
def products(kernel, rng, dtype) -> Iterator:
    image = replace(shapes(dtype)[0], channels=2, height=5, width=5)
    a, b, start = draw(rng, image), draw(rng, image), draw(rng, image)
    problem = matmul.Product(image, image, image, (False, True))
    yield problem, [pack(image, a), pack(image, b), pack(image, start)], {2: (image, matmul.reference(problem, a, b))}


@case("softmax.forward", "softmax.backward")
def softmaxes(kernel, rng, dtype) -> Iterator:
    shape, other = shapes(dtype)
    x, dy, start = draw(rng, shape), draw(rng, shape), draw(rng, shape)
    if kernel == "softmax.forward":
        wanted = softmax.forward_reference(x)
        yield softmax.Softmax(shape, other), [pack(shape, x), pack(other, start, 0)], {1: (other, wanted)}
        return
    problem, wanted = softmax.SoftmaxBackward(shape, other, shape), softmax.backward_reference(dy, x)
    yield problem, [pack(shape, dy, 0), pack(other, x), pack(shape, start, 0)], {2: (shape, wanted)}


@case("dropout.forward")
def dropouts(kernel, rng, dtype) -> Iterator:
    shape, other = shapes(dtype)
    x, problem = draw(rng, shape), dropout.Dropout(shape, other, 0.5)
    yield (
        problem,
        [np.array([5], np.int32), pack(shape, x, 0), pack(other, x, 0)],
        {2: (other, dropout.reference(problem, 5, x))},
    )


@case(*(f"{name}.{phase}" for name in (*ACTIVATIONS.load(), "formula") for phase in ("forward", "backward")))
def activations(kernel, rng, dtype) -> Iterator:
    shape, other = shapes(dtype)
    x, dy, start = draw(rng, shape), draw(rng, shape), draw(rng, shape)
    name = kernel.partition(".")[0]
    row, told = activation_of(FORMULA_TEXT if name == "formula" else name), {}
    forward, backward = ActivationForward, ActivationBackward
    if name == "formula":
        forward, backward, told = FormulaForward, FormulaBackward, {"formula": FORMULA_TEXT}
    if kernel.endswith("forward"):
        yield (
            forward(other, shape, **told),
            [pack(other, x), pack(shape, start, 0)],
            {1: (shape, row.forward_reference(x))},
        )
        return
    for accumulate in (False, True):
        yield (
            backward(shape, shape, other, accumulate, **told),
            [pack(shape, dy, 0), pack(shape, x, 0), pack(other, start, 0)],
            {2: (other, row.backward_reference(dy, x) + (start if accumulate else 0))},
        )


@case("bias.gradient")
def bias_gradient(kernel, rng, dtype) -> Iterator:
    shape, _ = shapes(dtype)
    dy = draw(rng, shape)
    yield bias.BiasGradient(shape), [pack(shape, dy, 0), np.zeros(9, np.float32)], {1: bias.gradient_reference(dy)}


# Pools


@case("max_pool2d.forward", "max_pool2d.backward", "avg_pool2d.forward", "avg_pool2d.backward")
def pools(kernel, rng, dtype) -> Iterator:
    for window, stride, padding in ((2, 2, 0), (3, 2, 1)):
        shape = make(9, 6, 6, 7, (1, 1, 1, 1), dtype)
        size = (6 + 2 * padding - window) // stride + 1
        result = replace(shape, height=size, width=size, halo=(0, 0, 0, 0))
        problem = pool.Pool(shape, result, (window, window), (stride, stride), (padding, padding))
        x, start, dy = draw(rng, shape).round(0), rounded(rng.standard_normal((9, 6, 6, 7)), dtype), draw(rng, result)
        x[0, :, :, 0], x[1, :4, :4, 1], x[2, 0:2, 0:2, 2] = -np.inf, np.nan, [[1, np.nan], [np.inf, np.nan]]
        if kernel.endswith("forward"):
            reference = pool.max_forward_reference if kernel.startswith("max") else pool.avg_forward_reference
            yield problem, [pack(shape, x), pack(result, dy)], {1: (result, reference(problem, x))}
            continue
        for accumulate in (False, True) if padding else (False,):
            before = start if accumulate else 0
            if kernel.startswith("max"):
                yield (
                    pool.MaxPoolBackward(problem, result, shape, accumulate),
                    [pack(result, dy, 0), pack(shape, x), pack(shape, start, 0)],
                    {2: (shape, pool.max_backward_reference(problem, dy, x) + before)},
                )
            else:
                yield (
                    pool.AvgPoolBackward(problem, result, shape, accumulate),
                    [pack(result, dy, 0), pack(shape, start, 0)],
                    {1: (shape, pool.avg_backward_reference(problem, dy) + before)},
                )


@case("image.part")
def image_parts(kernel, rng, dtype) -> Iterator:
    shape, other = make(9, 6, 5, 7, (1, 1, 1, 1), dtype), make(9, 4, 8, 7, (0, 1, 0, 0), dtype)
    x, before = draw(rng, shape), draw(rng, other)
    grids = image.Grid((1, 0, 1), (2, 2, 1)), image.Grid((0, 1, 0), (1, 1, 2))
    for how in {"accumulate": True}, {"fill": 0.0}:
        problem = image.ImagePart(shape, other, (4, 3, 4), *grids, **how)
        yield problem, [pack(shape, x), pack(other, before)], {1: (other, image.part_reference(problem, x, before))}


@case("image.comb", "image.uncomb")
def image_combs(kernel, rng, dtype) -> Iterator:
    stored = "float16" if dtype == "float16" and kernel == "image.comb" else "float32"  # gradients are float32
    plain = Image(3, 5, 12, 2, (1, 1, 0, 2), 2, stored, abreast=2)
    combed = replace(plain, combed=2, halo=(1, 2, 1, 1))
    x, before = draw(rng, plain), draw(rng, plain)
    if kernel == "image.comb":
        yield image.ImageComb(plain, combed), [pack(plain, x), pack(combed, before)], {1: (combed, x)}
    else:
        for accumulate in (False, True):
            problem = image.ImageComb(plain, combed, accumulate)
            yield problem, [pack(combed, x), pack(plain, before)], {1: (plain, x + before if accumulate else x)}


@case("resize.forward", "resize.backward")
def resized(kernel, rng, dtype) -> Iterator:
    shape = make(9, 6, 6, 7, (1, 1, 1, 1), dtype)
    larger = replace(shape, height=12, width=9, halo=(0, 0, 0, 0))
    for linear, coordinates in (False, "asymmetric"), (True, "half_pixel"):
        scale = (0.5, float(np.float32(6) / np.float32(9)))
        problem = resize.Resize(shape, larger, linear, coordinates, "floor", scale)
        x, dy = draw(rng, shape), draw(rng, larger)
        if kernel.endswith("forward"):
            yield problem, [pack(shape, x), pack(larger, dy)], {1: (larger, resize.forward_reference(problem, x))}
        elif not linear:
            wanted = resize.backward_reference(problem, dy)
            yield problem, [pack(larger, dy, 0), pack(shape, x, 0)], {1: (shape, wanted)}


@case("global_avg_pool.forward", "global_avg_pool.backward")
def global_pool(kernel, rng, dtype) -> Iterator:
    shape, _ = shapes(dtype)
    one = make(9, 1, 1, 7, dtype=dtype)
    x, y = draw(rng, shape), draw(rng, one)
    problem = pool.GlobalPool(shape, one)
    if kernel.endswith("forward"):
        yield problem, [pack(shape, x), pack(one, y)], {1: (one, pool.global_forward_reference(x))}
    else:
        yield problem, [pack(one, y, 0), pack(shape, x, 0)], {1: (shape, pool.global_backward_reference(problem, y))}


# Batch normalisation


def by_channel(rng, layout: Image) -> np.ndarray:
    """Values whose channels have one special value each, at several places, or none; the last one is constant."""
    values = rng.standard_normal((layout.channels, layout.height, layout.width, layout.batch))
    values = rounded(values, layout.dtype).astype(np.float32)
    for channel, special in enumerate((np.nan, np.inf, -np.inf, -0.0)):
        values[channel, 0, 0, 0] = values[channel, -1, -1, -1] = special
    values[4, 0, 0, 1], values[4, 1, 1, 0], values[5, 1, 2, 2], values[-1] = np.inf, -np.inf, np.inf, 3
    return values


@case("batch_norm.moments")
def moments(kernel, rng, dtype) -> Iterator:
    shape, room = make(9, 6, 5, 7, (1, 1, 1, 1), dtype), np.zeros(27, np.float32)
    z = by_channel(rng, shape)
    yield batch_norm.BatchNormMoments(shape, 1e-5), [pack(shape, z), room], {1: batch_norm.moments_reference(z, 1e-5)}
    shape = make(9, 6, 5, 16, (1, 0, 0, 1), dtype)
    z = by_channel(rng, shape)
    lanes = z.reshape(9, -1, shape.width, shape.slices, shape.vector)
    statistics = np.stack([lanes.sum(2), (lanes**2).sum(2)]).transpose(2, 3, 0, 1, 4).astype(np.float32)
    yield (
        batch_norm.BatchNormMoments(shape, 1e-5, shape.height * shape.slices),
        [statistics, pack(shape, z), room],
        {2: batch_norm.moments_reference(z, 1e-5)},
    )


@case("batch_norm.running", "batch_norm.frozen")
def statistics_kept(kernel, rng, dtype) -> Iterator:
    known, mean, variance = salted(rng, rng.random((3, 9))), salted(rng, rng.random(9)), salted(rng, rng.random(9))
    if kernel.endswith("running"):
        wanted = batch_norm.running_reference(known, mean, variance, 0.3)
        yield batch_norm.BatchNormRunning(9, 0.3), [known, mean, variance], {1: wanted[0], 2: wanted[1]}
    else:
        yield (
            batch_norm.BatchNormFrozen(9, 1e-3),
            [mean, variance, np.zeros((3, 9), np.float32)],
            {2: batch_norm.frozen_reference(mean, variance, 1e-3)},
        )


@case("batch_norm.forward", "batch_norm.backward")
def batch_norms(kernel, rng, dtype) -> Iterator:
    shape, other = shapes(dtype)
    z, dy, residual = draw(rng, shape), draw(rng, shape), draw(rng, shape)
    known = rng.standard_normal((3, 9)).astype(np.float32)
    affine = rng.standard_normal((2, 9)).astype(np.float32)
    known[0, 0], known[1, 1], known[0, 2], affine[0, 3], affine[1, 4] = np.nan, np.nan, np.inf, np.inf, np.nan
    facts = [known, affine]
    for added, after in JOINED:
        y = batch_norm.forward_reference(z, known, affine[1], affine[0], residual if added else None, after)
        if kernel.endswith("forward"):
            problem = batch_norm.BatchNormForward(shape, other, after, shape if added else None)
            arrays = [pack(shape, z), *facts, *([pack(shape, residual)] if added else []), pack(other, z)]
            yield problem, arrays, {len(arrays) - 1: (other, y)}
            continue
        y = rounded(y, dtype).astype(np.float32)
        told = bool(added and after)  # by y, and dy becomes the residual's gradient
        source = y if told else batch_norm.forward_reference(z, known, affine[1], affine[0])
        masked, sums, dz = batch_norm.backward_reference(dy, z, known, affine[1], after, source)
        problem = batch_norm.BatchNormBackward(shape, shape, shape, after, shape if told else None)
        there = [pack(shape, y)] if told else []
        arrays = [pack(shape, dy, 0), pack(shape, z), *facts, *there, np.zeros(18, np.float32), pack(shape, z, 0)]
        yield problem, arrays, {0: (shape, masked if told else dy), len(arrays) - 2: sums, len(arrays) - 1: (shape, dz)}
        if after and not added:
            problem = batch_norm.BatchNormBackward(shape, shape, None, after, in_place=True)
            yield problem, arrays[:-1], {0: (shape, dz), 4: sums}


@case("frozen_norm.scaling")
def scalings(kernel, rng, dtype) -> Iterator:
    mean, variance, affine = salted(rng, rng.random(9)), salted(rng, rng.random(9)), salted(rng, rng.random((2, 9)))
    yield (
        frozen_norm.FrozenNormScaling(9, 1e-3),
        [mean, variance, affine, np.zeros((2, 9), np.float32)],
        {3: frozen_norm.scaling_reference(mean, variance, affine, 1e-3)},
    )


@case("values.part")
def parts(kernel, rng, dtype) -> Iterator:
    values = salted(rng, rng.random(9))
    yield frozen_norm.CopyPart(9, 1, 9, 0, 8), [values, np.zeros(9, np.float32)], {1: np.append(values[1:], 0)}


@case("frozen_norm.backward")
def frozen_norms(kernel, rng, dtype) -> Iterator:
    shape, _ = shapes(dtype)
    z, dy = draw(rng, shape), draw(rng, shape)
    known, affine = rng.standard_normal((3, 9)).astype(np.float32), rng.standard_normal((2, 9)).astype(np.float32)
    known[0, 0], known[1, 1], affine[0, 3], affine[1, 4] = np.nan, np.nan, np.inf, np.nan
    for added, after in JOINED:
        source = batch_norm.forward_reference(z, known, affine[1], affine[0])
        masked, sums, dz = frozen_norm.backward_reference(dy, z, known, affine[1], after, source)
        if not added:
            yield (
                frozen_norm.FrozenNormBackward(shape, after, z=shape, dz=shape, sums=True),
                [pack(shape, dy, 0), known, affine, pack(shape, z), np.zeros(18, np.float32), pack(shape, z, 0)],
                {4: sums, 5: (shape, dz)},
            )
        elif after:
            y = rounded(source, dtype).astype(np.float32)
            masked, _, dz = frozen_norm.backward_reference(dy, z, known, affine[1], after, y)
            scaling = np.stack([affine[0], (affine[1] * known[1]).astype(np.float32)])
            yield (
                frozen_norm.FrozenNormBackward(shape, after, True, y=shape, dz=shape, residual=True),
                [pack(shape, dy, 0), scaling, pack(shape, y), pack(shape, z, 0)],
                {0: (shape, masked), 3: (shape, dz)},
            )


# Loss and optimizer


@case("loss.cross_entropy")
def losses(kernel, rng, dtype) -> Iterator:
    shape = make(6, 1, 1, 1)
    inf, nan = np.inf, np.nan
    rows = (
        [0, 1, 2, -0.0, 5, 1],
        [0, nan, 2, 9, nan, 1],
        [nan, 1, 2, 3, 4, 5],
        [0, inf, 1, 2, 3, 4],
        [-inf, 1, 2, -inf, 0, 1],
        [-inf] * 6,
        [0, inf, nan, 1, 2, inf],
    )
    weight = (1.0, 2.0, 0.5, 1.0, 3.0, 1.0)
    for rule in (
        loss.CrossEntropy(),
        loss.CrossEntropy(0.1),
        loss.CrossEntropy(weight=weight),
        loss.CrossEntropy(0.1, weight, -100),
    ):
        for row in rows:
            for label in (1,) if rule.smoothing else (0, 1, 4):
                logits, size = np.array(row, np.float32)[:, None, None, None], (1, 6)
                arrays = rule.constants(size) | rule.targets(np.array([label]), shape=size)
                value, correct, dlogits = rule.reference(logits, arrays)
                read = [arrays[name] for name in rule.arrays(size)]
                results = [np.zeros(1, np.float32), np.zeros(1, np.int32), pack(shape, logits)]
                told = np.array([value]), correct.ravel().astype(float), (shape, dlogits)
                yield (
                    rule.problem(shape, shape),
                    [pack(shape, logits), *read, *results],
                    dict(enumerate(told, 1 + len(read))),
                )


@case("loss.elementwise", "loss.soft_targets")
def other_losses(kernel, rng, dtype) -> Iterator:
    shape, sizes = make(6, 1, 1, 5), (5, 6)
    for rule, draw_targets, _ in rules(6).values():
        if rule.kernel == kernel:
            outputs = rng.standard_normal((6, 1, 1, 5)).astype(np.float32)
            arrays = rule.constants(sizes) | rule.targets(*as_tuple(draw_targets(rng, sizes)), shape=sizes)
            read = [arrays[name] for name in rule.arrays(sizes)]
            for at in range(0, 6, 2):  # one value at a time: they all end in the same loss
                bad = outputs.copy()
                bad[at, 0, 0, at % 5] = (np.nan, np.inf, -np.inf)[at // 2]
                value, correct, slope = rule.reference(bad, arrays)
                told = {1 + len(read): np.array([value])}
                results = [np.zeros(1, np.float32)]
                if correct is not None:
                    told[2 + len(read)] = correct.ravel().astype(float)
                    results.append(np.zeros(5, np.int32))
                told[1 + len(read) + len(results)] = (shape, slope)
                yield rule.problem(shape, shape), [pack(shape, bad), *read, *results, pack(shape, bad)], told


@case("optimizer.norm", "optimizer.bound")
def bounds(kernel, rng, dtype) -> Iterator:
    for special in (np.nan, np.inf, -np.inf):
        gradients, one = rng.standard_normal(48).astype(np.float32), np.ones(1, np.float32)
        gradients[7] = special
        if kernel == "optimizer.norm":
            for problem in (optimizer.Norm(True, False), optimizer.Norm(False, False)):
                norm = optimizer.norm_reference(problem, gradients, None, 1.0)
                yield problem, [gradients, one], {1: np.array([norm])}
            places = np.arange(8, dtype=np.int32)
            norm = optimizer.norm_reference(optimizer.Norm(True, True), gradients, places, 1.0)
            yield optimizer.Norm(True, True), [gradients, places, one], {2: np.array([norm])}
        else:
            for norm in (special, 0.5, 2.0):
                wanted = optimizer.bound_reference(gradients, norm, 1.0)
                yield optimizer.Bound(), [gradients, np.float32([norm]), one], {0: wanted}


@case("gradients.zero", "gradients.add", "gradients.scale")
def sums_of_passes(kernel, rng, dtype) -> Iterator:
    gradients, part, share = (salted(rng, rng.standard_normal(count)) for count in (48, 48, 1))
    if kernel == "gradients.zero":
        yield adding.Zero(), [gradients], {0: adding.zero_reference(gradients)}
    elif kernel == "gradients.add":
        yield adding.Add(), [part, gradients], {1: adding.add_reference(part, gradients)}
    else:
        yield adding.Scale(), [gradients, share], {0: adding.scale_reference(gradients, share)}


@case("values.turn", "values.copy")
def turned_values(kernel, rng, dtype) -> Iterator:
    values, turned = salted(rng, rng.standard_normal(48)), np.zeros(48, np.float32)
    if kernel == "values.copy":
        places = rng.permutation(48).astype(np.int32)
        yield turning.CopyValues(), [values, places, turned], {2: values[places]}
        return
    problem, permutation = turning.TurnUnits(2, 3), rng.permutation(8).astype(np.int32)
    yield problem, [values, permutation, turned], {2: turning.turned_reference(problem, values, permutation)}


@case("optimizer.update", "optimizer.update_part")
def optimizers(kernel, rng, dtype) -> Iterator:
    for rule in EVERY.values():
        values, gradients, *states = (salted(rng, rng.standard_normal(48)) for _ in range(2 + len(rule.state)))
        arrays = [values, gradients, *states, rule.hyper(3, 0.1)]
        new, *moved = optimizer.update_reference(rule.rule_name, *arrays)
        wanted = {0: new, **dict(enumerate(moved, 2))}
        if kernel == "optimizer.update":
            yield optimizer.Update(rule.rule_name), arrays, wanted
        else:
            part = np.arange(48) >= 8
            kept = {place: np.where(part, new, arrays[place]) for place, new in wanted.items()}
            yield optimizer.UpdatePart(rule.rule_name, 8, 40, 48), arrays, kept


# Convolutions


def with_dtype(problem, dtype: str):
    """A convolution whose activations are stored as `dtype`."""
    changed = {
        name: replace(getattr(problem, name), dtype=dtype) for name in ("source", "result") if hasattr(problem, name)
    }
    return replace(problem, **changed)


def spoil(rng, array: np.ndarray, inside: tuple = ...) -> np.ndarray:
    """A copy with one NaN, one infinity and one -0 among `inside`."""
    found = array.copy()
    part = found[inside]
    for special in (np.nan, np.inf, -0.0):
        part[tuple(rng.integers(0, part.shape))] = special
    found[inside] = part
    return found


def convolved(rng, problem: GatherConv | DepthwiseForward, reference) -> tuple[list, dict]:
    """(source, result before, statistics if any; what they must be), reference(source, before) gives the result."""
    source = spoil(rng, activation(rng, problem.source), problem.source.interior)
    before = rng.standard_normal(problem.result.shape).astype(problem.result.dtype)
    result = reference(source, before)
    arrays, wanted = [source, before], {1: result}
    if problem.statistics:
        inside = result[problem.result.interior].astype(problem.result.dtype).astype(np.float64)
        sums = np.stack([(inside**power).sum(3).transpose(0, 2, 1, 3) for power in (1, 2)], 2)
        arrays.append(
            np.zeros((problem.result.slices * problem.result.height, 2, problem.result.channels, VECTOR), np.float32)
        )
        wanted[2] = sums.reshape(arrays[2].shape)
    return arrays, wanted


@case("gather.conv", "pattern.conv", "gather.grad", "pattern.grad")
def gathered(kernel, rng, dtype, live=0.3) -> Iterator:
    for seed in (1, 6):  # with statistics, with several sections
        conv, grad, index = random_problem(seed, 2 if kernel.startswith("pattern") else 1, live)
        conv, grad, facts = with_dtype(conv, dtype), with_dtype(grad, dtype), [index.pointers, index.offsets]
        if kernel.endswith("conv"):
            values = spoil(
                rng, rng.standard_normal((len(index.offsets), conv.unit[0], conv.row_block)).astype(np.float32)
            )
            offset = [rng.standard_normal(conv.result.channels).astype(np.float32)] if conv.bias else []

            def answer(*ends, conv=conv, facts=facts, values=values, offset=offset):
                return gather_conv_reference(conv, *facts, values, *ends, *offset)

            arrays, wanted = convolved(rng, conv, answer)
            first = 3 + len(offset)
            yield conv, [*facts, values, *offset, *arrays], {first + place: array for place, array in wanted.items()}
        else:
            source = spoil(rng, activation(rng, grad.source), grad.source.interior)
            delta = activation(rng, grad.delta, gradient=True)
            delta[0, 0, grad.delta.halo[0], grad.delta.halo[1], 0] = np.inf
            found = gather_grad_reference(grad, *facts, source, delta)
            yield grad, [*facts, source, delta, np.zeros(found.shape, np.float32)], {4: found}


@case("depthwise.forward", "depthwise.grad_input", "depthwise.grad_weight")
def depthwise(kernel, rng, dtype) -> Iterator:
    made = Case("three results a channel", dtype)
    values, delta = spoil(rng, made.values), spoil(rng, made.dy, made.delta.interior)
    source = spoil(rng, made.x, made.source.interior)
    if kernel.endswith("forward"):
        problem = DepthwiseForward(made.source, made.result, made.window, statistics=True)
        arrays, wanted = convolved(
            rng, problem, lambda source, before: depthwise_forward_reference(problem, values, source, before)
        )
        yield problem, [values, *arrays], {1 + place: array for place, array in wanted.items()}
    elif kernel.endswith("grad_input"):
        problem, before = DepthwiseGradInput(made.delta, made.dx, made.window), np.zeros(made.dx.shape, np.float32)
        found = depthwise_grad_input_reference(problem, values, delta, before)
        yield problem, [values, delta, before], {2: found}
    else:
        problem = DepthwiseGradWeight(made.source, made.delta, made.window)
        found = depthwise_grad_weight_reference(problem, source, delta)
        yield problem, [np.zeros(found.shape, np.float32), source, delta], {0: found}


@case("normed_depthwise.forward", "normed_depthwise.backward")
def chained(kernel, rng, dtype) -> Iterator:
    made = Chain("3x3", dtype)
    made.x = spoil(rng, made.x, made.source.interior)
    before = np.zeros(made.z.shape, dtype)
    if kernel.endswith("forward"):
        arrays = [made.values, made.moments, made.affine, made.x, before]
        yield made.problem(), arrays, {4: made.forward_reference(before)}
        return
    made.gradient[:, 0] = spoil(rng, made.gradient[:, 0])
    arrays, problem = made.backward_arrays(), made.backward_problem()
    *found, dz = normed_depthwise_backward_reference(problem, *arrays)
    room = [np.zeros(array.shape, np.float32) for array in found]
    wanted = {8 + place: array for place, array in enumerate(found)} | {11: (made.dz, dz)}
    yield problem, [*arrays, *room, np.zeros(made.dz.shape, np.float32)], wanted


@case("compact.conv", "compact.grad")
def compacted(kernel, rng, dtype) -> Iterator:
    shape = COMPACT_SHAPES[1]
    _, source, result, index, pointers, rows, channels, count = row_case(shape)
    live, sections = shape[1::3]
    problem = with_dtype(
        GatherConv(source, result, 2, 1, (1, 1), (Pass(shape[2]),), sections[1], rows_live=live), dtype
    )
    plain = replace(problem, result=replace(problem.result, channels=len(rows)), rows_live=0)
    x = spoil(rng, activation(rng, problem.source), problem.source.interior)
    if kernel == "compact.conv":
        values = values_of(rng, index, rows)
        values[0] = np.inf
        before = np.zeros(problem.result.shape, dtype)
        wanted = before.astype(np.float64)
        wanted[:, rows] = gather_conv_reference(plain, index.pointers, index.offsets, values, x, before[:, rows])
        yield problem, [pointers, index.offsets, values, channels, count, x, before], {6: wanted}
        return
    dy = activation(rng, result, gradient=True)
    grad = GatherGrad(problem.source, result, 2, 1, (1, 1), sections[1], rows_live=live)
    wanted = gather_grad_reference(
        replace(grad, delta=plain.result, rows_live=0), index.pointers, index.offsets, x, dy[:, rows]
    )
    yield grad, [pointers, index.offsets, channels, count, x, dy, np.zeros(wanted.shape, np.float32)], {6: wanted}


@case("pattern_groups.conv", "pattern_groups.grad")
def pattern_groups(kernel, rng, dtype) -> Iterator:
    import test_opencl_patterns as patterns

    _, problem, *facts = patterns.case((5, 7), (8, 8), 8, (1, 1, 1, 1), 0.3, statistics=True)
    if kernel.endswith("conv"):
        values = spoil(rng, rng.standard_normal((len(facts[1]), problem.taps)).astype(np.float32))
        arrays, wanted = convolved(
            rng,
            problem.gather,
            lambda source, before: patterns.grouped_conv_reference(problem, *facts, values, source, before, None),
        )
        yield problem, [*facts, values, *arrays], {3 + place: array for place, array in wanted.items()}
        return
    gather = problem.gather
    grad = patterns.GroupedGrad(GatherGrad(gather.source, gather.result, 1, 1, (1, 1), 5), patterns.SHAPES)
    source, delta = (
        spoil(rng, activation(rng, gather.source), gather.source.interior),
        activation(rng, gather.result, gradient=True),
    )
    wanted = patterns.grouped_grad_reference(grad, *facts, source, delta)
    yield grad, [*facts, source, delta, np.zeros(wanted.shape, np.float32)], {4: wanted}
