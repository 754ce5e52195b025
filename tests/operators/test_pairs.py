"""Sparse convolutions of images in bfloat16 against their float64 references: with products of pairs where this machine
has them, in slices of every width, and with float32 arithmetic anywhere."""

from dataclasses import replace

import numpy as np
import pytest
from test_gather import EPS, Index, random_problem

from mest_compile.hardware.target import find_target
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.layouts.layout import rounded, to_float, to_stored
from mest_compile.kernels.source import kernel_source, knob_space
from mest_compile.kernels.specializing import Structure, specialized, structure_of
from mest_compile.operators.layers.gather import (
    Epilogue,
    GatherConv,
    GatherGrad,
    gather_conv_reference,
    gather_grad_reference,
)

LOCAL = find_target("local")
TARGETS = {"float32": (replace(LOCAL, bfloat16=False), LOCAL.vector)}
if LOCAL.bfloat16:
    TARGETS |= {f"pairs{lanes}": (LOCAL.storing("bfloat16"), lanes) for lanes in (8, 16, 32)}
ways = pytest.mark.parametrize("way", TARGETS)
two_ways = pytest.mark.parametrize("way", [way for way in TARGETS if way in ("float32", "pairs32")])
HALF_ULP = 2.0**-8  # of a bfloat16, at most, beside its size


def with_lanes(image: Image, lanes: int, dtype: str = "bfloat16") -> Image:
    return replace(image, vector=lanes, dtype=dtype)


def moved(index: Index, before: Image, after: Image) -> Index:
    """The offsets in an image with other slices: all distances are multiples of the slice's examples."""
    return Index(index.pointers, index.offsets // before.vector * after.vector)


def close(got: np.ndarray, wanted: np.ndarray, scale: np.ndarray, terms: int, stored: bool) -> None:
    limit = (terms + 2) * EPS * scale + np.finfo(np.float32).tiny + (HALF_ULP * np.abs(wanted) if stored else 0)
    wrong = ~(np.abs(to_float(got) - wanted) <= limit)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} differ, the first at {np.argwhere(wrong)[0]}"


def stored(rng: np.random.Generator, image: Image, gradient: bool = False) -> np.ndarray:
    """Bits of random pixels: lanes without example are 0 in a gradient, something else in a forward value."""
    values = rng.standard_normal((image.channels, image.height, image.width, image.batch))
    return image.pack(to_stored(values, image.dtype), empty=to_stored(np.array(0.0 if gradient else 3.5), image.dtype))


def ran(builder, kernel: str, problem, target, *arrays: np.ndarray, **knobs) -> list[np.ndarray]:
    import tvm

    function = builder.function(kernel_source(kernel, problem, target, **knobs))
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(array).ravel()) for array in arrays]
    function(*tensors)
    return [tensor.numpy().reshape(array.shape) for tensor, array in zip(tensors, arrays, strict=True)]


def case(way: str, seed: int, taps: int = 1, live: float | None = None):
    """(target, GatherConv, GatherGrad, Index, random numbers) in bfloat16 of `random_problem`."""
    (target, lanes), (conv, grad, index) = TARGETS[way], random_problem(seed, taps, live)
    before, source, result = conv.source, with_lanes(conv.source, lanes), with_lanes(conv.result, lanes)
    statistics = conv.statistics and conv.result.batch % lanes == 0
    conv = replace(conv, source=source, result=result, statistics=statistics)
    print("seed", seed, way, conv)
    return (
        target,
        conv,
        replace(grad, source=source, delta=result),
        moved(index, before, source),
        np.random.default_rng(seed),
    )


def check_conv(builder, target, conv: GatherConv, index: Index, rng: np.random.Generator, **knobs) -> None:
    values = rng.standard_normal((len(index.offsets), conv.unit[0], conv.row_block)).astype(np.float32)
    source, before = stored(rng, conv.source), stored(rng, replace(conv.result, batch=conv.result.lanes))
    bias = rng.standard_normal(conv.result.channels).astype(np.float32) if conv.bias else None
    arrays = [index.pointers, index.offsets, values, *([bias] if conv.bias else []), source, before]
    if conv.statistics:
        elems = conv.result.slices * conv.result.height, 2, conv.result.channels, conv.result.vector
        arrays.append(np.full(elems, 7, np.float32))
    after = ran(builder, "gather.conv", conv, target, *arrays, **knobs)
    got = after[-2] if conv.statistics else after[-1]
    floats = [to_float(source), to_float(before)]
    wanted = gather_conv_reference(conv, index.pointers, index.offsets, values, *floats, bias)
    sizes = [np.abs(array) for array in (values, *floats)]
    scale = gather_conv_reference(conv, index.pointers, index.offsets, *sizes, None if bias is None else np.abs(bias))
    close(got, wanted, scale, index.most_terms * conv.unit[0] * conv.sections + 1, stored=True)
    if conv.statistics:
        inside = to_float(got)[conv.result.interior].astype(np.float64)
        for power in (1, 2):
            moments = (inside**power).sum(3).transpose(0, 2, 1, 3)
            most = (np.abs(inside) ** power).sum(3).transpose(0, 2, 1, 3)
            close(after[-1][:, power - 1].reshape(moments.shape), moments, most, inside.shape[3] + 1, stored=False)


def check_grad(builder, target, grad: GatherGrad, index: Index, rng: np.random.Generator, **knobs) -> None:
    source, delta = stored(rng, grad.source), stored(rng, grad.delta, gradient=True)
    floats = [to_float(source), to_float(delta)]
    wanted = gather_grad_reference(grad, index.pointers, index.offsets, *floats)
    scale = gather_grad_reference(grad, index.pointers, index.offsets, *map(np.abs, floats))
    arrays = [index.pointers, index.offsets, source, delta, np.full(wanted.shape, 7, np.float32)]
    got = ran(builder, "gather.grad", grad, target, *arrays, **knobs)[-1]
    close(got, wanted, scale, grad.delta.height * grad.delta.width * grad.delta.lanes, stored=False)


@ways
@pytest.mark.parametrize("seed", range(8))
def test_convolutions_of_random_sizes(builder, seed, way):
    target, conv, grad, index, rng = case(way, seed)
    check_conv(builder, target, conv, index, rng)
    check_grad(builder, target, grad, index, rng)


@two_ways
@pytest.mark.parametrize("taps", [2, 3])
def test_units_of_neighbouring_taps(builder, taps, way):
    target, conv, grad, index, rng = case(way, 1, taps)
    check_conv(builder, target, conv, index, rng)
    check_grad(builder, target, grad, index, rng)


@two_ways
def test_knobs_change_no_answer(builder, way):
    target, conv, grad, index, rng = case(way, 6)
    for kernel, problem, check in (("gather.conv", conv, check_conv), ("gather.grad", grad, check_grad)):
        for knob, values in knob_space(kernel, problem, target).items():
            for value in values[1:][:2]:
                check(builder, target, problem, index, rng, **{knob: value})
    assert (len(knob_space("gather.conv", conv, target)["once"]) == 3) == (way == "float32")


@two_ways
@pytest.mark.parametrize("seed", [1, 2])
def test_a_structure_that_is_baked_in_gives_the_same_bits(builder, way, seed):
    import tvm

    target, conv, grad, index, rng = case(way, seed, live=1.0)
    values = rng.standard_normal((len(index.offsets), conv.unit[0], conv.row_block)).astype(np.float32)
    conv = replace(conv, bias=False, statistics=False, accumulate=False)
    facts, source = [index.pointers, index.offsets], stored(rng, conv.source)
    for kernel, problem, arrays in (
        ("gather.conv", conv, [*facts, values, source, np.zeros(conv.result.shape, "uint16")]),
        ("gather.grad", grad, [*facts, source, stored(rng, grad.delta, True), np.zeros(values.shape, np.float32)]),
    ):
        plain = kernel_source(kernel, problem, target)
        structure = structure_of(problem, index.pointers)
        assert isinstance(structure, Structure)
        answers = []
        for made in (plain, specialized(plain, problem, structure)):
            tensors = [tvm.runtime.tensor(np.ascontiguousarray(array).ravel()) for array in arrays]
            builder.function(made)(*tensors)
            answers.append(tensors[-1].numpy())
        assert answers[0].any() and np.array_equal(*answers)


@two_ways
@pytest.mark.parametrize("name", [None, "hardswish"])
def test_an_epilogue_scales_adds_and_activates_once(builder, way, name):
    target, conv, _, index, rng = case(way, 3)
    residual = replace(conv.result, halo=(0, 1, 0, 2))
    conv = replace(conv, accumulate=False, statistics=False, bias=False, epilogue=Epilogue(name, residual))
    values = rng.standard_normal((len(index.offsets), conv.unit[0], conv.row_block)).astype(np.float32)
    scaling = rng.standard_normal((2, conv.result.channels)).astype(np.float32)
    source, added, before = stored(rng, conv.source), stored(rng, residual), stored(rng, conv.result)
    arrays = [index.pointers, index.offsets, values, scaling, added, source, before]
    got = ran(builder, "gather.conv", conv, target, *arrays)[-1]
    floats = [to_float(source), to_float(before), None, scaling, to_float(added)]
    wanted = gather_conv_reference(conv, index.pointers, index.offsets, values, *floats)
    close(got, wanted, np.full(wanted.shape, np.abs(wanted).max()), 50 * index.most_terms, stored=True)


@two_ways
@pytest.mark.parametrize("seed", [1, 6])
def test_what_is_not_finite_goes_through(builder, way, seed):
    """A unit without a partner is paired with nothing, which makes no NaN of an infinity."""
    target, conv, _, index, rng = case(way, seed, live=1.0)
    conv = replace(conv, accumulate=False, statistics=False, bias=False)
    values = rng.standard_normal((len(index.offsets), conv.unit[0], conv.row_block)).astype(np.float32)
    source, before = stored(rng, conv.source), stored(rng, conv.result)
    inside = source[conv.source.interior]
    inside[0, 0, 1, 1, 0], inside[0, -1, 2, 3, 0] = to_stored(np.array([np.inf, np.nan]), "bfloat16")
    source[conv.source.interior] = inside
    arrays = [index.pointers, index.offsets, values, source, before]
    got = to_float(ran(builder, "gather.conv", conv, target, *arrays)[-1])
    with np.errstate(invalid="ignore"):
        wanted = gather_conv_reference(conv, index.pointers, index.offsets, values, to_float(source), to_float(before))
    assert np.isinf(wanted).any() and np.isnan(wanted).any()
    for which in (np.isnan, np.isposinf, np.isneginf):
        assert np.array_equal(which(got), which(wanted))


def test_the_comparator_notices_one_wrong_element():
    wanted, scale = np.ones((3, 4)), np.ones((3, 4))
    got = to_stored(wanted, "bfloat16")
    close(got, wanted, scale, 6, stored=True)
    got[1, 2] = to_stored(np.array(1.01), "bfloat16")
    with pytest.raises(AssertionError, match="1 of 12 differ"):
        close(got, wanted, scale, 6, stored=True)


def test_numbers_are_rounded_as_torch_rounds_them():
    import torch

    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = np.append(bits.view(np.float32), [0.0, -0.0, np.inf, np.nan, 3.4e38, 1 + 2.0**-8, 1 + 3 * 2.0**-8])
    values = values.astype(np.float32)
    told = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(rounded(values, "bfloat16"), told)
