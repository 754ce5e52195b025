"""Kernels whose vectors cover neighbouring pixels, of slices with fewer examples than a vector has lanes."""

from dataclasses import replace

import numpy as np
import pytest
from test_gather import EPS, TARGET, assert_close, call

from mest_compile.hardware.target import Target
from mest_compile.ir.graph import LayerSpec
from mest_compile.ir.layouts.batch import Image, abreast, overhang
from mest_compile.ir.layouts.layout import FLOAT_BYTES
from mest_compile.kernels.specializing import Structure, structure_of
from mest_compile.operators import conversion
from mest_compile.operators.batch_norm import BatchNormMoments, moments_reference
from mest_compile.operators.layers.combing import combed_image
from mest_compile.operators.layers.gather import (
    GatherConv,
    GatherGrad,
    Pass,
    gather_conv_reference,
    gather_grad_reference,
)
from mest_compile.operators.layers.gather_family import gather_indexer
from mest_compile.operators.layers.geometry import (
    gradient_halo,
    grid_abreast,
    parity_passes,
    reads_combed,
    source_halo,
)


def test_a_row_has_as_few_vectors_as_can_be_and_no_wider_ones():
    found = {(width, examples): abreast(width, examples, 8) for width in (1, 4, 7, 9, 32) for examples in (1, 4, 8)}
    assert found == {
        **{(1, 1): 1, (4, 1): 4, (7, 1): 8, (9, 1): 8, (32, 1): 8},
        **{(1, 4): 1, (4, 4): 2, (7, 4): 2, (9, 4): 2, (32, 4): 2},
        **{(width, 8): 1 for width in (1, 4, 7, 9, 32)},
    }
    assert [overhang(width, 8) for width in (7, 8, 9)] == [1, 0, 7]


@pytest.mark.parametrize("combed", [2, 3])
def test_a_combed_row_has_each_remainders_columns_side_by_side(combed):
    image = Image(2, 3, 7, 4, (1, 1, 0, 2), 2, combed=combed)
    values = np.random.default_rng(0).standard_normal((2, 3, 7, 4))
    packed = image.pack(values)
    np.testing.assert_array_equal(image.unpack(packed), values)
    row = packed.reshape(-1)[image.slice_elems + image.origin :]  # of the second slice
    for x in range(7):
        np.testing.assert_array_equal(row[image.column(x) : image.column(x) + 2], values[0, 0, x, 2:])
    assert image.column(-combed) == -image.vector, "the halo is every part's own"


CASES = {  # examples, batch, (height, width), kernel, stride, padding
    "one, 7": (1, 3, (5, 7), (3, 3), 1, 1),
    "one, 14": (1, 1, (3, 14), (5, 5), 1, 2),
    "one, 16": (1, 1, (4, 16), (1, 1), 1, 0),
    "one, 20 of stride 2": (1, 2, (6, 20), (3, 3), 2, 1),
    "one, 13 of stride 2": (1, 1, (7, 13), (3, 3), 2, 1),
    "one, 16 of stride 3": (1, 1, (5, 16), (2, 4), 3, 0),
    "one, a pixel of stride 2": (1, 1, (2, 2), (1, 1), 2, 0),
    "two, 9": (2, 6, (4, 9), (3, 3), 1, 0),
    "two, 18 of stride 2": (2, 2, (4, 18), (1, 1), 2, 0),
    "four, 7": (4, 4, (7, 7), (3, 3), 1, 1),
    "four, 9 of stride 2": (4, 4, (5, 9), (5, 5), 2, 2),
}


def sliced(examples: int) -> Target:
    return replace(TARGET, examples=examples)


def activation(rng, image: Image) -> np.ndarray:
    return image.pack(rng.standard_normal((image.channels, image.height, image.width, image.batch)).astype(np.float32))


class Case:
    """A layer and its images as a step has them."""

    def __init__(self, name: str, row_block: int, source_block: int, live: float = 0.4):
        examples, batch, size, kernel, stride, padding = CASES[name]
        self.rng, self.blocks, target = np.random.default_rng(0), (row_block, source_block), sliced(examples)
        spec = LayerSpec("w", (8, 4, *kernel), (batch, 4, *size), (stride, stride), (padding, padding))
        self.spec, made = spec, spec.output_size
        forward, backward = target.abreast(made[1]), grid_abreast(spec, target)
        halo = (0, 0, 0, 0) if reads_combed(spec, target) else source_halo(spec, forward)
        plain = Image(4, *size, batch, (0, 0, 0, 0), examples, abreast=target.abreast(size[1])).haloed(halo)
        self.source = combed_image(plain, [spec], target) if reads_combed(spec, target) else plain
        self.result = Image(8, *made, batch, (0, 1, 1, 0), examples, abreast=forward).haloed((0, 1, 1, 0))
        self.delta = self.result.haloed(gradient_halo(spec, backward))
        goal = replace(plain, combed=stride, abreast=backward) if stride > 1 and backward > 1 else plain
        self.goal = goal.haloed((0, 2, 0, 0))
        self.forward = GatherConv(
            self.source, self.result, *self.blocks, (stride, stride), (Pass(made),), 4, statistics=True
        )
        passes = parity_passes(spec)
        self.backward = GatherConv(self.delta, self.goal, source_block, row_block, (1, 1), passes, 8)
        self.gradient = GatherGrad(self.source, self.delta, *self.blocks, (stride, stride), 4)
        grid = 8 // row_block, 4 // source_block, *kernel
        cells = np.flatnonzero(self.rng.random(np.prod(grid)) < live).astype(np.int32)
        self.index = gather_indexer(spec, self.forward, self.backward)(cells).arrays
        assert 0 < len(cells) < np.prod(grid) or live == 1
        self.values = self.rng.standard_normal((len(cells), source_block, row_block)).astype(np.float32)


@pytest.fixture(params=[(name, [(1, 1), (4, 1)][turn % 2]) for turn, name in enumerate(CASES)], ids=str)
def case(request):
    return Case(request.param[0], *request.param[1])


def check_conv(builder, case: Case, problem: GatherConv, part: str) -> None:
    pointers, offsets = case.index[f"{part}pointers"], case.index[f"{part}offsets"]
    values = case.values.reshape(len(offsets), problem.source_block, problem.row_block)
    source, before = activation(case.rng, problem.source), np.zeros(problem.result.shape, np.float32)
    for accumulate in [False] if problem.statistics else [False, True]:
        told = replace(problem, accumulate=accumulate)
        start = activation(case.rng, problem.result) if accumulate else before
        wanted = gather_conv_reference(told, pointers, offsets, values, source, start)
        scale = gather_conv_reference(told, pointers, offsets, *(abs(array) for array in (values, source, start)))
        result = problem.result
        rows = (result.slices * result.height, 2, result.channels, result.floats)
        sums = [np.full(rows, 7, np.float32)] if problem.statistics else []
        after = call(builder, "gather.conv", told, pointers, offsets, values, source, start, *sums)
        got = after[4]
        assert_close(got, wanted, scale, len(offsets) + 1)  # what is beside the pixels too: it stays 0
        if sums:
            inside, of = got[result.interior].astype(np.float64), scale[result.interior]
            for power, found in enumerate(after[5].transpose(1, 2, 0, 3)):
                terms, sizes = inside ** (power + 1), of ** (power + 1)
                close = np.abs(found.sum((1, 2)) - terms.sum((0, 2, 3, 4)))
                assert (close <= terms[0, 0].size * result.slices * EPS * sizes.sum((0, 2, 3, 4))).all()


def test_both_convolutions_are_their_references_and_leave_halos_zero(builder, case):
    check_conv(builder, case, case.forward, "")
    check_conv(builder, case, case.backward, "transposed_")


def test_the_weight_gradient_is_its_reference_where_the_last_column_is_infinite(builder, case):
    """Lanes beyond a row's end hold a 0 of the gradient, and read that column."""
    pointers, offsets = case.index["pointers"], case.index["offsets"]
    source, delta = activation(case.rng, case.source), activation(case.rng, case.delta)
    values = case.source.unpack(source).copy()
    values[1, :, -1] = np.inf
    problem, gradients = case.gradient, np.full(case.values.shape, 7, np.float32)
    for array in source, case.source.pack(values):
        with np.errstate(invalid="ignore"):
            wanted = gather_grad_reference(problem, pointers, offsets, array, delta)
        got = call(builder, "gather.grad", problem, pointers, offsets, array, delta, gradients)[-1]
        there = np.isfinite(wanted)
        assert np.array_equal(there, np.isfinite(got))
        scale, terms = gather_grad_reference(problem, pointers, offsets, abs(source), abs(delta)), delta[:, 0].size
        assert_close(np.where(there, got, 0), np.where(there, wanted, 0), scale, terms)


@pytest.mark.parametrize("name", ["one, 7", "one, 20 of stride 2", "two, 9"])
def test_a_baked_structure_gives_the_same(builder, name):
    case = Case(name, 4, 1, live=1.0)
    pointers, offsets = case.index["pointers"], case.index["offsets"]
    source, delta = activation(case.rng, case.source), activation(case.rng, case.delta)
    result, gradients = np.zeros(case.result.shape, np.float32), np.zeros_like(case.values)
    for kernel, problem, arrays in (
        ("gather.conv", replace(case.forward, statistics=False), (case.values, source, result)),
        ("gather.grad", case.gradient, (source, delta, gradients)),
    ):
        structure = structure_of(problem, pointers)
        assert isinstance(structure, Structure)
        wanted = call(builder, kernel, problem, pointers, offsets, *arrays)[-1]
        got = call(builder, kernel, problem, pointers, offsets, *arrays, structure=structure)[-1]
        assert wanted.any()
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", [name for name in CASES if "stride" in name and "pixel" not in name])
def test_rows_are_combed_and_put_back(builder, name):
    examples, batch, size, _, stride, _ = CASES[name]
    rng, target = np.random.default_rng(1), sliced(examples)
    plain = Image(3, *size, batch, (1, 1, 0, 2), examples, abreast=target.abreast(size[1]))
    combed = replace(plain, combed=stride, abreast=target.abreast(-(-size[1] // stride)), halo=(1, 2, 1, 1))
    values = rng.standard_normal((3, *size, batch)).astype(np.float32)
    kept = np.full(combed.shape, np.nan, np.float32)
    problem = conversion.ImageComb(plain, combed)
    got = call(builder, "image.comb", problem, plain.pack(values), kept)[1]
    np.testing.assert_array_equal(combed.unpack(got), values)
    clean = call(builder, "image.zero_halo", conversion.ZeroHalo(combed), got)[0]
    np.testing.assert_array_equal(clean, combed.pack(values))
    more = rng.standard_normal(values.shape).astype(np.float32)
    for accumulate, wanted in (False, values), (True, values + more):
        problem = conversion.ImageComb(plain, combed, accumulate)
        back = call(builder, "image.uncomb", problem, clean, plain.pack(more))[1]
        np.testing.assert_array_equal(back, plain.pack(wanted))
    half = [replace(image, dtype="float16") for image in (plain, combed)]
    stored, kept = values.astype(np.float16), np.zeros(combed.shape, np.float16)
    got = call(builder, "image.comb", conversion.ImageComb(*half), half[0].pack(stored), kept)[1]
    np.testing.assert_array_equal(got, half[1].pack(stored))


def test_moments_come_from_sums_over_the_lanes_of_a_row(builder):
    image = Image(3, 4, 10, 4, (0, 0, 0, 2), 2, abreast=4)
    z = np.random.default_rng(2).standard_normal((3, 4, 10, 4)).astype(np.float32)
    rows = np.zeros((4, 2, 3, 12 * 2), np.float32)  # whole vectors
    rows[..., :20] = z.reshape(3, 4, 10, 2, 2).transpose(1, 3, 0, 2, 4).reshape(4, 2, 3, 20)
    lanes = rows.reshape(8, 3, 3, 8)
    statistics = np.stack([lanes.sum(2), (lanes**2).sum(2)], 1)
    moments = np.zeros(9, np.float32)
    got = call(builder, "batch_norm.moments", BatchNormMoments(image, 1e-5, 8), statistics, image.pack(z), moments)[2]
    for row, wanted in zip(got.reshape(3, 3), moments_reference(z, 1e-5), strict=True):
        np.testing.assert_allclose(row, wanted, rtol=100 * EPS, atol=10 * EPS)


def test_a_slice_of_one_example_has_an_eighth_of_the_elements_of_eight():
    eight = Image(16, 32, 32, 8, (1, 1, 1, 1), 8)
    one = replace(eight, batch=1, vector=1, abreast=8)
    assert one.elems * 8 == eight.elems and one.floats * FLOAT_BYTES == 32
