"""Kernels of units with constant taps against float64, over sizes nobody would choose."""

from dataclasses import replace

import numpy as np
import pytest
from test_gather import activation, assert_close
from test_opencl_kernels import TARGET, shaped_launch

from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.layers.gather import GatherConv, GatherGrad, Pass
from mest_compile.operators.layers.pattern_groups import (
    GroupedConv,
    GroupedGrad,
    grouped_conv_reference,
    grouped_grad_reference,
    shape_of,
)
from mest_compile.operators.layers.pattern_groups_family import SHAPES
from mest_compile.schedules.opencl.patterns import reads
from mest_compile.sparsity.schemes.pattern import PATTERNS

CASES = [  # channels (in, out), size, batch, halo of the result, live kernels, knobs
    ((5, 7), (8, 8), 8, (1, 1, 1, 1), 0.4, {}),
    ((5, 7), (9, 5), 3, (0, 2, 1, 0), 0.3, {"staged": 0, "run": 2}),
    ((6, 4), (7, 16), 4, (0, 0, 0, 0), 1.0, {"accumulators": 16, "pieces": 2}),
    ((3, 8), (12, 17), 12, (1, 1, 1, 1), 0.0, {}),
    ((16, 8), (16, 16), 16, (1, 1, 1, 1), 0.5, {"accumulators": 4}),
    ((70, 2), (4, 4), 5, (0, 0, 0, 0), 1.0, {"staged": 32}),  # more units than are staged at a time
]
FORMS = {"plain": {}, "bias": {"bias": True}, "accumulate": {"accumulate": True}, "statistics": {"statistics": True}}
FORMS_OF_CASES = [
    "plain statistics",
    "bias accumulate",
    "accumulate statistics",
    "plain bias",
    "accumulate statistics",
    "bias statistics",
]


def random_runs(rng, source: Image, rows: int, live: float):
    """(pointers, offsets): kernels anywhere in a 3x3 window, sorted by row and shape."""
    pointers, offsets = [0], []
    for _ in range(rows):
        patterns = [
            (channel, PATTERNS[rng.integers(len(PATTERNS))])
            for channel in range(source.channels)
            if rng.random() < live
        ]
        for shape in SHAPES:
            for channel, pattern in patterns:
                taps = np.argwhere(pattern)
                if shape_of(taps) == shape:
                    offsets.append(
                        channel * source.channel_elems + taps[0][0] * source.row_elems + taps[0][1] * source.vector
                    )
            pointers.append(len(offsets))
    return np.array(pointers, np.int32), np.array(offsets, np.int32)


def case(channels, size, batch, halo, live, **form):
    rng = np.random.default_rng(channels[0] * size[1])
    source = Image(channels[0], *size, batch, (1, 1, 1, 1), TARGET.vector)
    result = Image(channels[1], *size, batch, halo, TARGET.vector)
    problem = GroupedConv(GatherConv(source, result, 1, 1, (1, 1), (Pass(size),), channels[0], **form), SHAPES)
    return rng, problem, *random_runs(rng, source, channels[1], live)


@pytest.mark.parametrize(
    ("channels", "size", "batch", "halo", "live", "knobs", "form"),
    [(*case, form) for case, forms in zip(CASES, FORMS_OF_CASES, strict=True) for form in forms.split()],
    ids=str,
)
def test_convolution_with_constant_taps(builder, channels, size, batch, halo, live, knobs, form):
    rng, problem, pointers, offsets = case(
        channels, size, batch if form != "statistics" else -(-batch // 4) * 4, halo, live, **FORMS[form]
    )
    gather = problem.gather
    values = rng.standard_normal((len(offsets), problem.taps)).astype(np.float32)
    source, before = activation(rng, gather.source), rng.standard_normal(gather.result.shape).astype(np.float32)
    bias = rng.standard_normal(channels[1]).astype(np.float32) if gather.bias else None
    statistics = np.full((gather.result.slices * size[0], 2, channels[1], TARGET.vector), np.nan, np.float32)
    arrays = [
        pointers,
        offsets,
        values,
        *([bias] if gather.bias else []),
        source,
        before,
        *([statistics] if gather.statistics else []),
    ]
    after = shaped_launch(builder, "pattern_groups.conv", problem, *arrays, **knobs)
    got = after[-2] if gather.statistics else after[-1]
    wanted = grouped_conv_reference(problem, pointers, offsets, values, source, before, bias)
    scale = grouped_conv_reference(
        problem,
        pointers,
        offsets,
        np.abs(values),
        np.abs(source),
        np.abs(before),
        None if bias is None else np.abs(bias),
    )
    assert_close(got, wanted, scale, channels[0] * problem.taps)
    if gather.statistics:
        inside = got[gather.result.interior].astype(np.float64)
        for power in (0, 1):
            sums, sizes = ((values ** (power + 1)).sum(3).transpose(0, 2, 1, 3) for values in (inside, np.abs(inside)))
            assert_close(after[-1][:, power].reshape(sums.shape), sums, sizes, size[1] + 1)


@pytest.mark.parametrize(("channels", "size", "batch", "halo", "live", "knobs"), CASES, ids=str)
def test_weight_gradient_with_constant_taps(builder, channels, size, batch, halo, live, knobs):
    rng, problem, pointers, offsets = case(channels, size, batch, halo, live)
    conv = problem.gather
    adds = size[0] % 2 == 0
    grad = GroupedGrad(GatherGrad(conv.source, conv.result, 1, 1, (1, 1), channels[0], adds=adds), SHAPES)
    source, delta = activation(rng, conv.source), activation(rng, conv.result, gradient=True)
    known = {name: value for name, value in knobs.items() if name in ("accumulators", "run")}
    got = shaped_launch(
        builder,
        "pattern_groups.grad",
        grad,
        pointers,
        offsets,
        source,
        delta,
        np.full(len(offsets) * grad.taps, 7, np.float32),
        **known,
    )[-1]
    wanted = grouped_grad_reference(grad, pointers, offsets, source, delta)
    assert_close(
        got,
        wanted + 7 * adds,
        grouped_grad_reference(grad, pointers, offsets, np.abs(source), np.abs(delta)) + 7 * adds,
        conv.result.lanes * size[0] * size[1],
    )


def test_a_run_reads_once_what_its_taps_share():
    square = ((0, 0), (0, 1), (1, 0), (1, 1))
    assert square in SHAPES and len(SHAPES) == 3
    assert len(reads(square, 4)) == 10  # five rows of two columns, for sixteen products
    assert sum(len(uses) for _, _, uses in reads(square, 4)) == 16
    assert [len(reads(shape, 4)) for shape in SHAPES if shape != square] == [13, 13]


def test_shapes_of_unequal_taps_are_refused():
    _, problem, _, _ = case(*CASES[0][:5])
    with pytest.raises(AssertionError, match="shapes differ in taps"):
        replace(problem, shapes=(*SHAPES, ((0, 0),)))
