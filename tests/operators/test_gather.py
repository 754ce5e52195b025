"""The sparse convolution kernels against their float64 references, over sizes nobody would choose."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from test_operators import FOLLOWING

from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import find_target
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.layouts.layout import rounded
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import kernel_source
from mest_compile.kernels.specializing import Structure, specialized
from mest_compile.operators.layers.gather import (
    Epilogue,
    GatherConv,
    GatherGrad,
    Pass,
    gather_conv_reference,
    gather_grad_reference,
)
from mest_compile.schedules.cpu.gather_sizes import pick_tile, register_tile

EPS = np.finfo(np.float32).eps
TARGET = find_target("local")
VECTOR = TARGET.vector


def assert_close(got: np.ndarray, wanted: np.ndarray, scale: np.ndarray, terms: int) -> None:
    """Every element within terms * eps of the sum of its terms' magnitudes (`scale`); what is stored in float16 was
    rounded to it once."""
    assert got.shape == wanted.shape
    assert np.isfinite(got).all()
    stored = np.finfo(np.float16).eps / 2 * np.abs(wanted) + 2.0**-25 if got.dtype == np.float16 else 0
    wrong = np.abs(got - wanted) > (terms + 2) * EPS * scale + np.finfo(np.float32).tiny + stored
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} elements differ, the first at {np.argwhere(wrong)[0]}"


def call(
    builder: Builder, kernel: str, problem, *arrays: np.ndarray, structure: Structure | None = None, **knobs
) -> list[np.ndarray]:
    """Runs a kernel; every array as it is afterwards. One that has `structure` baked in is given pointers that say
    there are no units."""
    import tvm

    source = kernel_source(kernel, problem, TARGET, **knobs)
    if structure is not None:
        source, arrays = specialized(source, problem, structure), (np.zeros_like(arrays[0]), *arrays[1:])
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(array).ravel()) for array in arrays]
    builder.function(source)(*tensors)
    return [tensor.numpy().reshape(array.shape) for tensor, array in zip(tensors, arrays, strict=True)]


@dataclass
class Index:
    pointers: np.ndarray
    offsets: np.ndarray

    @property
    def most_terms(self) -> int:
        return int(np.diff(self.pointers).max(initial=0))


def random_index(
    rng: np.random.Generator,
    source: Image,
    source_step,
    source_block: int,
    groups: int,
    sections: tuple[int, int],
    grids: list[tuple[int, int]],
    kernel: tuple[int, int],
    live: float,
    taps: int = 1,
) -> Index:
    """Units anywhere a grid can read; about one group in four has none.

    sections  (how many, source channels of one)
    """
    pointers, offsets = [0], []
    for grid in grids:
        reach = [
            size - (max(extent, 1) - 1) * step
            for size, extent, step in zip((source.rows, source.columns), grid, source_step, strict=True)
        ]
        places = [(y, x) for y in range(min(kernel[0], reach[0])) for x in range(min(kernel[1], reach[1]) - taps + 1)]
        dead = rng.random(groups) < (0.25 if live < 1 else 0)
        for section in range(sections[0]):
            channels = range(section * sections[1], min((section + 1) * sections[1], source.channels), source_block)
            for group in range(groups):
                offsets += [
                    channel * source.channel_elems + y * source.row_elems + x * source.vector
                    for channel in channels
                    for y, x in places
                    if rng.random() < live and not dead[group]
                ]
                pointers.append(len(offsets))
    return Index(np.array(pointers, np.int32), np.array(offsets, np.int32))


def activation(rng: np.random.Generator, image: Image, gradient: bool = False) -> np.ndarray:
    """Random pixels, zero halo; lanes without example are 0 in a gradient and something else in a forward value."""
    values = rounded(rng.standard_normal((image.channels, image.height, image.width, image.batch)), image.dtype)
    return image.pack(values, empty=0.0 if gradient else 3.5)


def conv_case(problem: GatherConv, index: Index, rng: np.random.Generator):
    """(values, source, result before, bias)"""
    values = rng.standard_normal((len(index.offsets), problem.unit[0], problem.row_block)).astype(np.float32)
    bias = rng.standard_normal(problem.result.channels).astype(np.float32) if problem.bias else None
    before = rng.standard_normal(problem.result.elems).astype(problem.result.dtype)
    return values, activation(rng, problem.source), before if problem.result.gap else problem.result.view(before), bias


def check_conv(builder: Builder, problem: GatherConv, index: Index, rng: np.random.Generator, **knobs) -> None:
    values, source, before, bias = conv_case(problem, index, rng)
    wanted = gather_conv_reference(problem, index.pointers, index.offsets, values, source, before, bias)
    scale = gather_conv_reference(
        problem,
        index.pointers,
        index.offsets,
        np.abs(values),
        np.abs(source),
        np.abs(before),
        None if bias is None else np.abs(bias),
    )
    arrays = [index.pointers, index.offsets, values, *([bias] if problem.bias else []), source, before]
    if problem.statistics:
        rows = problem.passes[0].grid[0]
        arrays.append(
            np.full((problem.result.slices * rows, 2, problem.result.channels, problem.result.vector), 7, np.float32)
        )
    after = call(builder, "gather.conv", problem, *arrays, **knobs)
    got = problem.result.view(after[-2] if problem.statistics else after[-1])
    terms = index.most_terms * problem.unit[0] * problem.sections + 1
    assert_close(got, wanted, scale, terms)
    if problem.statistics:
        inside = got[problem.result.interior].astype(np.float64)
        moments = [(inside**power).sum(3).transpose(0, 2, 1, 3) for power in (1, 2)]
        sizes = [(np.abs(inside) ** power).sum(3).transpose(0, 2, 1, 3) for power in (1, 2)]
        for power in (0, 1):
            rows_of = after[-1][:, power].reshape(moments[power].shape)
            assert_close(rows_of, moments[power], sizes[power], inside.shape[3] + 1)


def grad_case(problem: GatherGrad, index: Index, rng: np.random.Generator):
    return activation(rng, problem.source), activation(rng, problem.delta, gradient=True)


def check_grad(builder: Builder, problem: GatherGrad, index: Index, rng: np.random.Generator, **knobs) -> None:
    problem = replace(problem, adds=bool(rng.integers(2)))
    source, delta = grad_case(problem, index, rng)
    units = len(index.offsets), problem.unit[0], problem.row_block
    gradients = np.full(units, 7, np.float32)
    wanted = gather_grad_reference(problem, index.pointers, index.offsets, source, delta, gradients)
    scale = gather_grad_reference(problem, index.pointers, index.offsets, np.abs(source), np.abs(delta), gradients)
    got = call(builder, "gather.grad", problem, index.pointers, index.offsets, source, delta, gradients, **knobs)[-1]
    assert_close(got, wanted, scale, problem.delta.height * problem.delta.width * problem.delta.lanes)


def random_problem(seed: int, taps: int = 1, live: float | None = None, gap: int = 0):
    """(GatherConv, GatherGrad, Index): a convolution of random sizes whose units have `taps` neighbouring taps.

    live  share of units; None: any
    gap   vectors behind a channel
    """
    rng = np.random.default_rng(seed)
    pick = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    row_block, source_block = pick(1, 1, 2, 4, 8), pick(1, 1, 2, 4) if taps == 1 else 1
    stride, kernel = pick(1, 1, 2), pick((1, taps), (3, 3), (3, 3), (5, max(2, taps)))
    halo = pick((0, 0, 0, 0), (1, 1, 1, 1), (1, 0, 2, 1))
    batch = pick(1, 7, 8, 16, 20, 24)
    source = Image(
        source_block * int(rng.integers(1, 7)), int(rng.integers(5, 19)), pick(5, 8, 16, 17), batch, halo, VECTOR
    )
    height, width = (
        (size - extent) // stride + 1 for size, extent in zip((source.rows, source.columns), kernel, strict=True)
    )
    result = Image(
        row_block * int(rng.integers(1, 7)),
        height,
        width,
        batch,
        pick((0, 0, 0, 0), (1, 1, 1, 1), (0, 2, 1, 0)),
        VECTOR,
    )
    source, result = replace(source, gap=2 * gap * VECTOR), replace(result, gap=gap * VECTOR)
    section = source_block * int(rng.integers(1, source.channels // source_block + 1))
    accumulate = bool(rng.integers(2))
    statistics = not accumulate and batch % VECTOR == 0 and bool(rng.integers(2))
    conv = GatherConv(
        source,
        result,
        row_block,
        source_block,
        (stride, stride),
        (Pass((height, width)),),
        section,
        accumulate=accumulate,
        bias=not accumulate and bool(rng.integers(2)),
        statistics=statistics,
        taps=taps,
    )
    index = random_index(
        rng,
        source,
        (stride, stride),
        source_block,
        conv.groups,
        (conv.sections, section),
        [(height, width)],
        kernel,
        live or pick(0.1, 0.3, 1.0),
        taps,
    )
    return conv, GatherGrad(source, result, row_block, source_block, (stride, stride), section, taps), index


@pytest.mark.parametrize("seed", range(0, 16, 1 if TARGET.device == "cpu" else 2))  # there knobs have others
def test_convolutions_of_random_sizes(builder, seed):
    conv, grad, index = random_problem(seed)
    print("seed", seed, conv)
    check_conv(builder, conv, index, np.random.default_rng(seed))
    check_grad(builder, grad, index, np.random.default_rng(seed))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("row_block", [1, 4])
def test_weight_gradients_of_small_images_without_a_halo_keep_no_sums(builder, row_block, stride):
    """Over several examples and sections, whatever reads them; larger images do."""
    rng, size, channels = np.random.default_rng(stride), (3, 5), (2, 7)
    source = Image(13, 3 * stride, 5 * stride, 20, (0, 0, 0, 0), VECTOR, gap=VECTOR)
    grad = GatherGrad(source, Image(12, *size, 20, (0, 0, 0, 0), VECTOR), row_block, 1, (stride, stride), 7)
    index = random_index(rng, source, (stride, stride), 1, 12 // row_block, channels, [size], (1, 1), 0.8)
    check_grad(builder, grad, index, rng)
    large = replace(grad, source=replace(source, batch=4096), delta=replace(grad.delta, batch=4096))
    keeps_sums = backend_of(TARGET).keeps_sums
    assert [keeps_sums(problem, TARGET) for problem in (grad, large)] == [False, True]


@pytest.mark.parametrize("seed", [3, 9])
def test_nobody_writes_between_channels(builder, seed):
    conv, grad, index = random_problem(seed, gap=1)
    print("seed", seed, conv)
    check_conv(builder, conv, index, np.random.default_rng(seed))
    check_grad(builder, grad, index, np.random.default_rng(seed))
    values, source, before, bias = conv_case(conv, index, np.random.default_rng(seed))
    arrays = [index.pointers, index.offsets, values, *([bias] if conv.bias else []), source, before]
    conv = replace(conv, statistics=False)
    between = np.ones(conv.result.elems, bool)
    conv.result.view(between)[...] = False
    assert between.sum() == conv.result.slices * conv.result.channels * VECTOR
    np.testing.assert_array_equal(call(builder, "gather.conv", conv, *arrays)[-1][between], before[between])


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_activations_in_float16(builder, seed, once):
    """Rounded once, when a result is stored: not between the sections of an index."""
    conv, grad, index = random_problem(seed)
    source = replace(conv.source, dtype="float16")
    conv, grad = (
        replace(conv, source=source, result=replace(conv.result, dtype="float16")),
        replace(grad, source=source),
    )
    print("seed", seed, conv)
    check_conv(builder, conv, index, np.random.default_rng(seed), once=once)
    delta = replace(grad.delta, dtype="float16" if seed % 2 else "float32")
    check_grad(builder, replace(grad, delta=delta), index, np.random.default_rng(seed), once=once)


@pytest.mark.parametrize("taps", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_units_of_neighbouring_taps(builder, seed, taps):
    conv, grad, index = random_problem(seed, taps)
    print("seed", seed, conv)
    check_conv(builder, conv, index, np.random.default_rng(seed))
    check_grad(builder, grad, index, np.random.default_rng(seed))


@pytest.mark.parametrize("activation_name", [None, *FOLLOWING])
@pytest.mark.parametrize("seed", range(4))
def test_an_epilogue_scales_adds_and_activates_once(builder, seed, activation_name):
    """Behind the last section of an index, and NaN in one pixel stays there."""
    conv, _, index = random_problem(seed)
    dtype = "float16" if TARGET.float16 and seed % 2 else "float32"
    result = replace(conv.result, dtype=dtype)
    residual = replace(result, halo=(0, 1, 0, 2)) if seed % 4 < 2 else None
    conv = replace(
        conv, accumulate=False, statistics=False, result=result, epilogue=Epilogue(activation_name, residual)
    )
    rng = np.random.default_rng(seed)
    print("seed", seed, conv)
    values, source, before, bias = conv_case(conv, index, rng)
    scaling = rng.standard_normal((2, result.channels)).astype(np.float32)
    added = [activation(rng, residual)] if residual else []
    if residual:
        added[0][residual.interior][0, 0, 0, 0, 0] = np.nan
    arrays = [index.pointers, index.offsets, values, *([bias] if conv.bias else []), scaling, *added, source, before]
    got = call(builder, "gather.conv", conv, *arrays)[-1]
    wanted = gather_conv_reference(conv, index.pointers, index.offsets, values, source, before, bias, scaling, *added)
    assert np.array_equal(np.isnan(got), np.isnan(wanted))
    summed, sizes = replace(conv, epilogue=None), [abs(array) for array in (values, source, before)]
    scale = gather_conv_reference(summed, index.pointers, index.offsets, *sizes, None if bias is None else np.abs(bias))
    inside = result.interior
    by_channel = np.abs(scaling)[:, None, :, None, None, None]
    scale[inside] = scale[inside] * by_channel[1] + by_channel[0]
    if residual:
        scale[inside] += np.nan_to_num(np.abs(added[0][residual.interior].astype(np.float64)))
    terms = index.most_terms * conv.unit[0] * conv.sections + 4
    assert_close(np.nan_to_num(got), np.nan_to_num(wanted), 2 * scale, terms)


@pytest.mark.parametrize("live", [0.0, 0.02, 1.0])
@pytest.mark.parametrize(("row_block", "source_block"), [(1, 1), (4, 1), (1, 4), (3, 2), (16, 1)])
def test_dead_rows_and_full_rows(builder, row_block, source_block, live):
    rng = np.random.default_rng(0)
    source, result = Image(24, 8, 8, 16, (1, 1, 1, 1), VECTOR), Image(48, 8, 8, 16, (1, 1, 1, 1), VECTOR)
    conv = GatherConv(source, result, row_block, source_block, (1, 1), (Pass((8, 8)),), 16, statistics=True)
    index = random_index(rng, source, (1, 1), source_block, conv.groups, (2, 16), [(8, 8)], (3, 3), live)
    assert live > 0 or len(index.offsets) == 0
    check_conv(builder, conv, index, rng)
    check_grad(builder, GatherGrad(source, result, row_block, source_block, (1, 1), 16), index, rng)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("size", "row_block", "source_block"), [((8, 8), 1, 4), ((17, 5), 4, 1)])
def test_passes_over_parity_classes(builder, size, row_block, source_block, accumulate):
    """What the input gradient of a stride 2 convolution asks for."""
    rng = np.random.default_rng(3)
    result = Image(8, *size, 7, (1, 1, 1, 1), VECTOR)
    source = Image(12, -(-size[0] // 2), -(-size[1] // 2), 7, (1, 1, 1, 1), VECTOR)
    passes = tuple(
        Pass(((size[0] - y + 1) // 2, (size[1] - x + 1) // 2), (y, x), (2, 2)) for y in (0, 1) for x in (0, 1)
    )
    conv = GatherConv(source, result, row_block, source_block, (1, 1), passes, 8, accumulate=accumulate)
    index = random_index(
        rng, source, (1, 1), source_block, conv.groups, (2, 8), [each.grid for each in passes], (2, 2), 0.4
    )
    check_conv(builder, conv, index, rng)


def test_a_pass_without_pixels_and_pixels_without_a_pass(builder):
    rng = np.random.default_rng(4)
    source = result = Image(4, 1, 6, 8, (0, 0, 0, 0), VECTOR)
    passes = (Pass((1, 3), (0, 0), (2, 2)), Pass((0, 3), (1, 0), (2, 2)))
    conv = GatherConv(source, result, 2, 1, (1, 1), passes, 4, bias=True)
    index = random_index(rng, source, (1, 1), 1, 2, (1, 4), [(1, 3), (0, 3)], (1, 3), 0.5)
    check_conv(builder, conv, index, rng)  # the reference keeps what no pass covers


def test_answers_do_not_depend_on_threads(builder):
    import tvm

    conv, grad, index = random_problem(5)
    conv = replace(conv, accumulate=False)
    rng = np.random.default_rng(5)
    values, source, before, bias = conv_case(conv, index, rng)
    _, delta = grad_case(grad, index, rng)
    threads = tvm.get_global_func("runtime.config_threadpool")
    answers = []
    try:
        for count in (1, 2, 3, 2):
            threads(1, count)
            arrays = [index.pointers, index.offsets, values, *([bias] if conv.bias else []), source, before]
            if conv.statistics:
                arrays.append(
                    np.zeros((conv.result.slices * conv.passes[0].grid[0], 2, conv.result.channels, VECTOR), np.float32)
                )
            gradients = call(
                builder,
                "gather.grad",
                grad,
                index.pointers,
                index.offsets,
                source,
                delta,
                np.zeros(values.shape, np.float32),
            )
            answers.append(
                call(builder, "gather.conv", conv, *arrays)[len(arrays) - conv.statistics - 1 :] + gradients[-1:]
            )
    finally:
        threads(1, 1)
    for answer in answers[1:]:
        for got, wanted in zip(answer, answers[0], strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_a_row_that_no_short_tile_divides_has_a_longer_one():
    """Of 65 tokens: 13 pixels, as far as there are registers."""
    assert pick_tile((1, 65), 8, 8, 13) == (1, 13, 1) and pick_tile((1, 65), 8, 8) == (1, 1, 8)
    assert pick_tile((10, 10), 8, 8, 13) == (1, 10, 1) and pick_tile((32, 32), 8, 8, 13) == (1, 8, 1)
    assert pick_tile((1, 197), 8, 8, 13) == (1, 1, 8) and pick_tile((3, 3), 8, 8, 13) == (1, 1, 8)


def test_tiles_of_an_odd_row_that_all_rows_of_a_group_leave_no_registers_for():
    """Have fewer rows; where there is no such divisor, or a row is even, they are as they were."""
    found = {}
    for width in (65, 3, 7, 16, 197):
        image = Image(8, 1, width, 4 * VECTOR, (0, 0, 0, 0), VECTOR)
        problem = GatherConv(image, image, 4, 1, (1, 1), (Pass((1, width)),), 8)
        found[width] = register_tile(problem, (1, width), replace(TARGET, registers=16))
    assert found == {65: (2, 1, 5, 1), 3: (4, 1, 3, 1), 7: (1, 1, 7, 1), 16: (4, 1, 2, 1), 197: (4, 1, 1, 2)}


def test_sections_fit_the_first_level_cache():
    section_channels = backend_of(TARGET).section_channels
    for size, channels in ((32, 32), (16, 64), (8, 128), (8, 12)):
        image = Image(channels, size, size, 64, (1, 1, 1, 1), VECTOR)
        count = section_channels(image, (1, 1), (3, 3), (1, 4), TARGET)
        assert count % 4 == 0
        assert 4 <= count <= channels
    assert section_channels(image, (1, 1), (31, 31), (1, 4), TARGET) == 4  # at least one unit


@pytest.mark.parametrize("change", ["one element", "shape", "nan"])
def test_assert_close_notices(change):
    wanted = np.ones((3, 4))
    got = np.ones((3, 4), np.float32)
    assert_close(got, wanted, wanted, terms=6)
    if change == "one element":
        got[2, 3] = 1 + 9 * EPS
    elif change == "nan":
        got[0, 1] = np.nan
    else:
        got = got[:2]
    with pytest.raises(AssertionError):
        assert_close(got, wanted, wanted, terms=6)
