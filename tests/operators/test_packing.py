"""Index arrays: with the float64 reference kernels they compute what torch's convolution and its gradients compute."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mest_compile.ir.graph import LayerSpec
from mest_compile.operators.layers.gather import GatherGrad, gather_conv_reference, gather_grad_reference
from mest_compile.operators.layers.gather_family import forward_problem, gather_indexer, gradient_problem
from mest_compile.operators.layers.geometry import gradient_halo, image_of, source_halo
from mest_compile.operators.layers.index import places_of
from mest_compile.operators.layers.values import carry_over, cells_of, gather_units, merge, scatter_units
from mest_compile.sparsity import parse_scheme
from mest_compile.sparsity.layer import Layer

CASES = [  # scheme, (out, in, kh, kw), (h, w), stride, padding, (sections forward, transposed)[, groups, dilation]
    ("unstructured", (6, 5, 3, 3), (7, 9), (1, 1), (1, 1), (2, 4)),
    ("block:4x1", (8, 6, 3, 3), (8, 8), (2, 2), (1, 1), (3, 4)),
    ("block:2x3", (4, 6, 5, 3), (9, 6), (2, 1), (2, 1), (3, 2)),
    ("unstructured", (3, 4, 1, 1), (7, 5), (2, 2), (0, 0), (4, 3)),
    ("unstructured", (3, 2, 3, 3), (1, 5), (2, 3), (1, 1), (2, 3)),
    ("block:1x4", (3, 8, 2, 2), (6, 5), (3, 2), (0, 1), (4, 1)),
    ("unstructured", (5, 7, 1, 1), (1, 1), (1, 1), (0, 0), (7, 5)),
    ("unstructured", (6, 2, 3, 3), (7, 9), (2, 1), (1, 1), (6, 6), 3),
    ("block:4x2", (8, 4, 3, 2), (6, 5), (1, 2), (1, 0), (8, 8), 2),
    ("unstructured", (8, 1, 3, 3), (5, 6), (2, 2), (1, 1), (4, 8), 4),
    ("unstructured", (4, 3, 3, 3), (9, 8), (2, 3), (3, 1), (2, 3), 1, (3, 2)),
    ("block:2x1", (4, 2, 3, 3), (8, 7), (2, 1), (2, 2), (4, 4), 2, (2, 1)),
]


def pad_image(dense, image):
    return image.pack(dense.transpose(1, 2, 3, 0))


def spec_of(weight_shape, size, stride, padding, sections, groups=1, dilation=(1, 1)):
    return LayerSpec("w", weight_shape, (3, weight_shape[1] * groups, *size), stride, padding, groups, dilation)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_index_arrays_give_the_convolution_and_both_its_gradients(case):
    rng, (scheme, *sizes) = np.random.default_rng(7), case
    spec, sections = spec_of(*sizes), sizes[4]
    weight_shape, stride = spec.weight_shape, spec.stride
    layer = Layer(spec, parse_scheme(scheme), 0.6, "gather", *sections)
    keep = rng.random(layer.scheme.grid(spec)) < 0.4
    keep[0, 0, 0, 0] = True
    mask = layer.scheme.expand(spec, keep)
    weight = torch.tensor(rng.standard_normal(weight_shape) * mask, requires_grad=True)
    x = torch.tensor(rng.standard_normal(spec.input_shape), requires_grad=True)
    y = F.conv2d(x, weight, None, stride, spec.padding, spec.dilation, spec.groups)
    dy = torch.tensor(rng.standard_normal(y.shape))
    y.backward(dy)

    source, result = image_of(spec, source_halo(spec), 4, False), image_of(spec, gradient_halo(spec), 4, True)
    forward = forward_problem(layer, source, result, False, False)
    backward = gradient_problem(layer, result, source, False)
    index = gather_indexer(spec, forward, backward)(cells_of(keep))
    order = np.flatnonzero(keep)[index.sort]
    np.testing.assert_array_equal(index.sort[index.places], np.arange(len(order)))
    values = gather_units(weight.detach().numpy(), order, layer.scheme.grid(spec)).astype(np.float64)
    got = gather_conv_reference(
        forward, index.arrays["pointers"], index.arrays["offsets"], values, pad_image(x.detach().numpy(), source)
    )
    np.testing.assert_allclose(result.unpack(got).transpose(3, 0, 1, 2), y.detach().numpy(), rtol=1e-5, atol=1e-5)

    delta = pad_image(dy.numpy(), result)
    turned = np.empty((len(values), values.shape[2], values.shape[1]))
    turned[index.arrays["permutation"]] = values.transpose(0, 2, 1)
    got = gather_conv_reference(
        backward, index.arrays["transposed_pointers"], index.arrays["transposed_offsets"], turned, delta
    )
    np.testing.assert_allclose(source.unpack(got).transpose(3, 0, 1, 2), x.grad.numpy(), rtol=1e-5, atol=1e-5)

    rows, sources = layer.scheme.block(spec)
    grad = gather_grad_reference(
        GatherGrad(source, result, rows, sources, stride, sections[0]),
        index.arrays["pointers"],
        index.arrays["offsets"],
        pad_image(x.detach().numpy(), source),
        delta,
    )
    dense = scatter_units(grad, order, layer.scheme.grid(spec), weight_shape)
    np.testing.assert_allclose(dense, weight.grad.numpy() * mask, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_units_come_back_from_the_value_array_where_they_were(case):
    spec, chosen = spec_of(*case[1:]), parse_scheme(case[0])
    weight_shape = spec.weight_shape
    keep = np.random.default_rng(3).random(chosen.grid(spec)) < 0.5
    dense = np.arange(1, spec.weight_elems + 1, dtype=np.float32).reshape(weight_shape) * chosen.expand(spec, keep)
    order = np.flatnonzero(keep)[::-1]
    np.testing.assert_array_equal(
        scatter_units(gather_units(dense, order, keep.shape), order, keep.shape, weight_shape), dense
    )


def test_units_that_stay_carry_their_entries_and_new_ones_start_at_zero():
    moved = carry_over(np.array([[1.0, 2], [3, 4], [5, 6]]), np.array([1, -1, 0]))
    np.testing.assert_array_equal(moved, [[3, 4], [0, 0], [1, 2]])


def test_new_cells_go_among_the_old_ones_which_tell_where_they_stood():
    cells, places = merge(np.array([4, 7, 9], np.int32), np.array([2, 0, 1], np.uint8), np.array([1, 8], np.int32))
    assert cells.tolist() == [1, 4, 7, 8, 9] and places.tolist() == [-1, 2, 0, -1, 1] and cells.dtype == np.int32
    cells, places = merge(np.array([], np.int32), np.array([], np.uint8), np.array([3], np.int32))
    assert cells.tolist() == [3] and places.tolist() == [-1]


def test_cells_that_are_held_twice_are_found_at_their_last_place():
    assert places_of(np.array([2, 0, 1]), 3).tolist() == [1, 2, 0] and places_of(np.arange(256), 256).dtype == np.uint16
    places = places_of(np.array([2, 0, 2, 0, 1]), 3)
    assert places.tolist() == [3, 4, 2] and places.dtype == np.uint8
