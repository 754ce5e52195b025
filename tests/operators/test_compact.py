"""Kernels that compute live channels only, and batch normalisation beside them. What is dead holds NaN: whoever reads
it is found out."""

from dataclasses import replace

import numpy as np
import pytest
from test_gather import VECTOR, activation, assert_close, call, random_index

from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.specializing import structure_of
from mest_compile.operators import batch_norm
from mest_compile.operators.layers.compact_family import LISTED_ROWS
from mest_compile.operators.layers.gather import (
    GatherConv,
    GatherGrad,
    Pass,
    gather_conv_reference,
    gather_grad_reference,
)

EPS = np.finfo(np.float32).eps
# channels (in, out), live, size, batch, sections (how many, channels of one)
SHAPES = [
    ((5, 7), 3, (6, 5), VECTOR, (1, 5)),
    ((8, 9), 4, (4, 8), 2 * VECTOR - 3, (2, 4)),
    ((6, 12), 1, (7, 7), 1, (3, 2)),
    ((4, 6), 6, (8, 8), 3 * VECTOR, (1, 4)),
]


def listed(rng, channels: int, live: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows of the live groups, the list with its end filled up, number of live groups); an odd last row is listed
    twice."""
    alive = np.sort(rng.choice(channels, live, replace=False))
    rows = np.concatenate([alive, np.repeat(alive[-1:], -live % LISTED_ROWS)]).astype(np.int32)
    filled = np.concatenate([rows, np.repeat(rows[-1:], groups * LISTED_ROWS - len(rows))])
    return rows, filled, np.array([len(rows) // LISTED_ROWS], np.int32)


def row_case(shape, step=(1, 1)):
    """A layer of `live` live result channels: (problem's source, result, index of live groups, rows, list, live
    groups)."""
    (inputs, out), live, size, batch, sections = shape
    rng = np.random.default_rng(live)
    source = Image(inputs, size[0] * step[0], size[1] * step[1], batch, (1, 1, 1, 1), VECTOR)
    result = Image(out, *size, batch, (1, 0, 0, 1), VECTOR)
    groups = -(-out // LISTED_ROWS) + 1
    rows, channels, count = listed(rng, out, live, groups)
    index = random_index(rng, source, step, 1, len(rows) // LISTED_ROWS, sections, [size], (3, 3), 1.0)
    # Sections know of all groups, of which only the first ones have units.
    units = np.pad(np.diff(index.pointers).reshape(sections[0], -1), ((0, 0), (0, groups - count[0])))
    found = np.concatenate([[0], units.cumsum()]).astype(np.int32)
    return rng, source, result, index, found, rows, channels, count


def structured(problem, pointers, count, baked):
    """(number of live groups that a kernel is told, what else `call` is): with the number baked in it is told that
    there are none."""
    return (
        (np.zeros_like(count), {"structure": structure_of(problem, pointers, int(count[0]))}) if baked else (count, {})
    )


def values_of(rng, index, rows: np.ndarray) -> np.ndarray:
    """Values (units, 1, LISTED_ROWS); a row that is listed twice has equal values."""
    values = rng.standard_normal((len(index.offsets), 1, LISTED_ROWS)).astype(np.float32)
    cells = len(index.pointers) - 1
    groups = len(rows) // LISTED_ROWS
    for cell in range(cells):
        if len(set(rows.reshape(-1, LISTED_ROWS)[cell % groups])) == 1:
            values[index.pointers[cell] : index.pointers[cell + 1]] = values[
                index.pointers[cell] : index.pointers[cell + 1], :, :1
            ]
    return values


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("step", [(1, 1), (2, 1)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution_writes_live_rows_and_leaves_the_others(builder, shape, step, accumulate):
    check_live_rows(builder, shape, step, accumulate)


def check_live_rows(builder, shape, step, accumulate, baked=False):
    """baked: of the kernel with the layer's structure in it."""
    rng, source, result, index, pointers, rows, channels, count = row_case(shape, step)
    values, (live, sections) = values_of(rng, index, rows), shape[1::3]
    problem = GatherConv(
        source, result, LISTED_ROWS, 1, step, (Pass(shape[2]),), sections[1], accumulate=accumulate, rows_live=live
    )
    x, before = activation(rng, source), activation(rng, result)
    dead = np.setdiff1d(np.arange(result.channels), rows)
    before[:, dead] = np.nan
    count, special = structured(problem, pointers, count, baked)
    *_, got = call(
        builder, "compact.conv", problem, pointers, index.offsets, values, channels, count, x, before.copy(), **special
    )

    # The same rows one after another, none listed.
    plain = replace(problem, result=replace(result, channels=len(rows)), rows_live=0)
    wanted = gather_conv_reference(plain, index.pointers, index.offsets, values, x, before[:, rows])
    scale = gather_conv_reference(
        plain, index.pointers, index.offsets, np.abs(values), np.abs(x), np.abs(before[:, rows])
    )
    assert np.isnan(got[:, dead]).all()
    assert_close(got[:, rows], wanted, scale, len(index.offsets))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_statistics_are_those_of_live_rows(builder, shape):
    rng, source, result, index, pointers, rows, channels, count = row_case(shape)
    values, (live, sections) = values_of(rng, index, rows), shape[1::3]
    problem = GatherConv(
        source, result, LISTED_ROWS, 1, (1, 1), (Pass(shape[2]),), sections[1], statistics=True, rows_live=live
    )
    statistics = np.full((result.slices * result.height, 2, result.channels, VECTOR), np.nan, np.float32)
    *_, got, sums = call(
        builder,
        "compact.conv",
        problem,
        pointers,
        index.offsets,
        values,
        channels,
        count,
        activation(rng, source),
        np.zeros(result.shape, np.float32),
        statistics,
    )
    inside = result.unpack(got, empty_lanes=True).astype(np.float64)
    alive = np.unique(rows)
    for moment in (1, 2):
        wanted = (inside[alive] ** moment).sum((1, 2, 3))
        have = sums[:, moment - 1, alive].astype(np.float64).sum((0, 2))
        limit = 4 * EPS * (np.abs(inside[alive]) ** moment).sum((1, 2, 3)) * shape[2][1]
        assert (np.abs(have - wanted) <= limit).all()
    assert np.isnan(np.delete(sums, alive, axis=2)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_gradient_of_live_rows(builder, shape):
    check_gradient_of_live_rows(builder, shape)


def check_gradient_of_live_rows(builder, shape, baked=False):
    rng, source, delta, index, pointers, rows, channels, count = row_case(shape)
    live, sections = shape[1::3]
    problem = GatherGrad(source, delta, LISTED_ROWS, 1, (1, 1), sections[1], rows_live=live, adds=not baked)
    x, dy = activation(rng, source), activation(rng, delta, gradient=True)
    dy[:, np.setdiff1d(np.arange(delta.channels), rows)] = np.nan
    count, special = structured(problem, pointers, count, baked)
    got = call(
        builder,
        "compact.grad",
        problem,
        pointers,
        index.offsets,
        channels,
        count,
        x,
        dy,
        before := np.full((len(index.offsets), 1, LISTED_ROWS), 3, np.float32),
        **special,
    )[-1]
    plain = replace(problem, delta=replace(delta, channels=len(rows)), rows_live=0)
    wanted = gather_grad_reference(plain, index.pointers, index.offsets, x, dy[:, rows], before)
    scale = gather_grad_reference(plain, index.pointers, index.offsets, np.abs(x), np.abs(dy[:, rows]))
    assert_close(got, wanted, scale, delta.slices * delta.height * delta.width)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_listed_sources_are_the_only_ones_read(builder, shape):
    (inputs, out), _, size, batch, sections = shape
    rng = np.random.default_rng(inputs)
    alive = np.sort(rng.choice(inputs, max(inputs // 3, 1), replace=False))
    source, result = Image(inputs, *size, batch, (1, 1, 1, 1), VECTOR), Image(out, *size, batch, (0, 0, 0, 0), VECTOR)
    index = random_index(rng, source, (1, 1), 1, out, sections, [size], (3, 3), 1.0)
    lives = np.isin(index.offsets // source.channel_elems, alive)
    pointers = np.concatenate([[0], lives.cumsum()])[index.pointers].astype(np.int32)
    offsets = index.offsets[lives]
    values = rng.standard_normal((len(offsets), 1, 1)).astype(np.float32)
    x, dy = activation(rng, source), activation(rng, result, gradient=True)
    x[:, np.setdiff1d(np.arange(inputs), alive)] = np.nan
    sources = np.concatenate([alive, np.repeat(alive[-1:], inputs - len(alive))]).astype(np.int32)

    conv = GatherConv(source, result, 1, 1, (1, 1), (Pass(size),), sections[1], sources_live=len(alive))
    got = call(
        builder, "compact.conv", conv, pointers, offsets, values, sources, x, np.zeros(result.shape, np.float32)
    )[-1]
    x_known, plain = np.nan_to_num(x), replace(conv, sources_live=0)
    assert_close(
        got,
        gather_conv_reference(plain, pointers, offsets, values, x_known),
        gather_conv_reference(plain, pointers, offsets, np.abs(values), np.abs(x_known)),
        9 * len(alive),
    )
    grad = GatherGrad(source, result, 1, 1, (1, 1), sections[1], sources_live=len(alive))
    got = call(builder, "compact.grad", grad, pointers, offsets, sources, x, dy, np.zeros(len(offsets), np.float32))[-1]
    plain = replace(grad, sources_live=0)
    assert_close(
        got,
        gather_grad_reference(plain, pointers, offsets, x_known, dy).ravel(),
        gather_grad_reference(plain, pointers, offsets, np.abs(x_known), np.abs(dy)).ravel(),
        result.slices * size[0] * size[1],
    )


# Batch normalisation

IMAGES = [Image(6, 5, 4, VECTOR + 3, (1, 1, 1, 1), VECTOR), Image(5, 8, 8, 2 * VECTOR, (0, 1, 1, 0), VECTOR)]


class Case:
    """Channels of z that are dead hold NaN, as do those of dy that nobody reads; `known` has 0 there."""

    def __init__(self, image: Image):
        rng = np.random.default_rng(image.channels)
        self.image = image
        self.alive, self.read = np.ones(image.channels, np.int32), np.ones(image.channels, np.int32)
        self.alive[[0, 3]] = 0
        self.read[[1, 3]] = 0
        size = image.channels, image.height, image.width, image.batch
        self.z, self.dy, self.residual = (rng.standard_normal(size).astype(np.float32) for _ in range(3))
        self.weight, self.offset = rng.standard_normal((2, image.channels)).astype(np.float32)
        self.known_z, self.known_dy = self.z * self.alive[:, None, None, None], self.dy * self.read[:, None, None, None]
        self.moments = batch_norm.moments_reference(self.known_z, 1e-5).astype(np.float32)
        self.facts = self.moments, np.stack([self.offset, self.weight])

    def packed(self, values: np.ndarray, there: np.ndarray | None = None, empty: float = 0.0) -> np.ndarray:
        array = self.image.pack(values.astype(np.float32), empty)
        if there is not None:
            array[:, there == 0] = np.nan
        return array

    def close(self, got: np.ndarray, wanted: np.ndarray, terms: int) -> None:
        assert np.abs(got - wanted).max() <= terms * EPS * np.abs(wanted).max()


@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_moments_of_a_dead_channel_are_those_of_zeros(builder, image):
    case = Case(image)
    start = np.zeros(3 * image.channels, np.float32)
    got = call(
        builder,
        "batch_norm.moments",
        batch_norm.BatchNormMoments(image, 1e-5, alive=True),
        case.packed(case.z, case.alive),
        start,
        case.alive,
    )[1]
    case.close(got.reshape(3, -1), batch_norm.moments_reference(case.known_z, 1e-5), 40)
    if image.batch == image.lanes:
        rows = image.unpack(case.packed(case.z)).reshape(
            image.channels, image.height, image.width, image.slices, VECTOR
        )
        sums = (
            np.stack([rows.sum(2), (rows**2).sum(2)])
            .transpose(3, 2, 0, 1, 4)
            .reshape(-1, 2, image.channels, VECTOR)
            .copy()
        )
        sums[:, :, case.alive == 0] = np.nan
        problem = batch_norm.BatchNormMoments(image, 1e-5, chunks=len(sums), alive=True)
        got = call(builder, "batch_norm.moments", problem, sums, case.packed(case.z, case.alive), start, case.alive)[2]
        case.close(got.reshape(3, -1), batch_norm.moments_reference(case.known_z, 1e-5), 40)


@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("flags", [("alive",), ("read",), ("alive", "read")], ids=str)
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_forward_neither_reads_nor_writes_what_is_dead(builder, image, flags, added):
    case = Case(image)
    dead = {"alive": "alive" in flags, "read": "read" in flags}
    z = case.packed(case.z, case.alive if dead["alive"] else None)
    known = case.known_z if dead["alive"] else case.z
    problem = batch_norm.BatchNormForward(image, image, "relu", image if added else None, **dead)
    got = call(
        builder,
        "batch_norm.forward",
        problem,
        z,
        *case.facts,
        *([case.packed(case.residual)] if added else []),
        np.full(image.shape, 9.0, np.float32),
        *(getattr(case, flag) for flag in flags),
    )[3 + added]
    wanted = batch_norm.forward_reference(
        known, case.moments, case.weight, case.offset, case.residual if added else None, "relu"
    )
    written = case.read == 1 if dead["read"] else np.ones(image.channels, bool)
    case.close(image.unpack(got)[written], wanted[written], 8)
    assert (got[:, ~written] == 9.0).all()


@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in place"])
@pytest.mark.parametrize("flags", [("alive",), ("read",), ("alive", "read")], ids=str)
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_backward_neither_reads_nor_writes_what_is_dead(builder, image, flags, in_place):
    case = Case(image)
    alive, read = "alive" in flags, "read" in flags
    z, dy = case.packed(case.z, case.alive if alive else None), case.packed(case.dy, case.read if read else None)
    known_z, known_dy = case.known_z if alive else case.z, case.known_dy if read else case.dy
    moments = batch_norm.moments_reference(known_z, 1e-5).astype(np.float32)
    y = batch_norm.forward_reference(known_z, moments, case.weight, case.offset, None, "relu")
    _, sums, dz = batch_norm.backward_reference(known_dy, known_z, moments, case.weight, "relu", y)
    problem = batch_norm.BatchNormBackward(
        image, image, None if in_place else image, "relu", in_place=in_place, alive=alive, read=read
    )
    start = np.full(image.shape, 9.0, np.float32)
    arrays = call(
        builder,
        "batch_norm.backward",
        problem,
        dy,
        z,
        moments,
        case.facts[1],
        np.zeros(2 * image.channels, np.float32),
        *([] if in_place else [start]),
        *(getattr(case, flag) for flag in flags),
    )
    case.close(arrays[4].reshape(2, -1), sums, 20 * int(np.sqrt(image.batch * image.height * image.width)))
    got = arrays[0 if in_place else 5]
    written = case.alive == 1 if alive else np.ones(image.channels, bool)
    case.close(image.unpack(got)[written], dz[written], 20)
    untouched = dy if in_place else start
    assert np.array_equal(got[:, ~written], untouched[:, ~written], equal_nan=True)
